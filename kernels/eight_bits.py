"""Checks of a pre-activation, as it is or in eight bits: `reference/fp8.py` says what that is."""

from __future__ import annotations

import torch

from .launch import Layout, check_matrix


def check_preact(
    preact: Layout, scales: Layout | None, shape: tuple[int, int], count: int, like: Layout
) -> None:
    """Raise unless the kernels can read or write these.

    Args:
        preact: last stride 1; e4m3 where there are scales, else of like's dtype.
        scales: `[rows, count]`, fp32, last stride 1; or None.
        shape: preact's, `(rows, columns)`.
        count: see scales.
        like: of a tensor on the device they should be on.

    Raises:
        TypeError: for another dtype.
        ValueError: for anything else that is not as above.
    """
    if scales is None:
        check_matrix("preact", preact, shape, like)
        if preact.dtype != like.dtype:
            raise TypeError(f"preact is {preact.dtype}, expected {like.dtype}")
        return
    check_matrix("scales", scales, (shape[0], count), like)
    if scales.dtype != torch.float32:
        raise TypeError(f"scales is {scales.dtype}, expected torch.float32")
    wanted = preact.dtype == torch.float8_e4m3fn and preact.shape == shape
    if not wanted or preact.strides[1] != 1 or preact.device != like.device:
        raise ValueError(
            f"preact is {preact.dtype} {list(preact.shape)} with strides {preact.strides} on "
            f"{preact.device}, expected float8_e4m3fn {list(shape)} with a last stride of 1 on "
            f"{like.device}, beside scales"
        )
