"""Checks of a pre-activation that is kept in eight bits; `reference/fp8.py` says what it is."""

import torch
from torch import Tensor

from .launch import check_matrix


def check_eight_bits(
    preact: Tensor, scales: Tensor, rows: int, width: int, count: int, like: Tensor
) -> None:
    """Raise unless the kernels can read or write these.

    Args:
        preact: `[rows, width]`, e4m3, last stride 1.
        scales: `[rows, count]`, fp32, last stride 1.
        rows: see preact.
        width: see preact.
        count: see scales.
        like: a tensor on the device they should be on.

    Raises:
        TypeError: for scales of another dtype.
        ValueError: for anything else that is not as above.
    """
    check_matrix("scales", scales, (rows, count), like)
    if scales.dtype != torch.float32:
        raise TypeError(f"scales is {scales.dtype}, expected torch.float32")
    wanted = preact.dtype == torch.float8_e4m3fn and tuple(preact.shape) == (rows, width)
    if not wanted or preact.stride(1) != 1 or preact.device != like.device:
        raise ValueError(
            f"preact is {preact.dtype} {list(preact.shape)} with strides {preact.stride()} on "
            f"{preact.device}, expected float8_e4m3fn {[rows, width]} with a last stride of 1 on "
            f"{like.device}, beside scales"
        )
