"""Checks of what an attention is given, before any work, on every path.

All but the values of offsets follow from what tensors look like (`Look`): whoever remembers that
need not ask twice.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from .explicit_attention import AttentionMask


class Look(Protocol):
    """What a tensor looks like: a tensor, or what a launch remembers of one."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    @property
    def device(self) -> torch.device:
        """Where it is."""


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
) -> None:
    """Raise unless these belong together. Arguments as `reference.attention.attention_forward`.

    Raises:
        TypeError: for several dtypes, or offsets that are no integers.
        ValueError: for shapes, devices or values that do not fit.
    """
    if sinks is not None and not isinstance(sinks, Tensor):
        raise TypeError(f"sinks is {sinks!r}, expected a tensor, or None")
    check_looks(q, k, v, mask, sinks, cu_seqlens, cu_seqlens_k, seed)
    check_offset_values("cu_seqlens", cu_seqlens, q.shape[1])
    check_offset_values("cu_seqlens_k", cu_seqlens_k, k.shape[1])


def check_looks(
    q: Look,
    k: Look,
    v: Look,
    mask: AttentionMask,
    sinks: Look | None = None,
    cu_seqlens: Look | None = None,
    cu_seqlens_k: Look | None = None,
    seed: Look | None = None,
) -> None:
    """All of `check_attention` but the values of the offsets."""
    _check_heads(q, k, v)
    if mask.window is not None and mask.window < 1:
        raise ValueError(f"window is {mask.window}, expected at least 1, or None")
    if mask.dropout and seed is None:
        raise ValueError(f"seed is None, expected one for a dropout of {mask.dropout}")
    if sinks is not None:
        if tuple(sinks.shape) != (q.shape[2],) or not sinks.dtype.is_floating_point:
            raise ValueError(
                f"sinks is {sinks.dtype} {list(sinks.shape)}, expected a floating-point one for "
                f"each head of q: [{q.shape[2]}]"
            )
        if sinks.device != q.device:
            raise ValueError(f"sinks is on {sinks.device}, expected {q.device}")
    if cu_seqlens is None:
        if cu_seqlens_k is not None:
            raise ValueError("cu_seqlens is None, expected one together with cu_seqlens_k")
        return
    if q.shape[0] != 1:
        raise ValueError(f"q has a batch of {q.shape[0]}, expected 1 with cu_seqlens")
    _check_offsets("cu_seqlens", cu_seqlens, q.device)
    if cu_seqlens_k is None:
        if k.shape[1] != q.shape[1]:
            raise ValueError(
                f"k has {k.shape[1]} rows and q {q.shape[1]}, expected as many, or cu_seqlens_k"
            )
        return
    _check_offsets("cu_seqlens_k", cu_seqlens_k, k.device)
    if cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"cu_seqlens_k has {cu_seqlens_k.shape[0]} offsets, expected as many as cu_seqlens "
            f"({cu_seqlens.shape[0]})"
        )


def _check_heads(q: Look, k: Look, v: Look) -> None:
    if len(q.shape) != 4:
        raise ValueError(f"q has the shape {list(q.shape)}, expected [batch, tokens, heads, dim]")
    batch, _, heads, head_dim = q.shape
    if not batch:
        raise ValueError(f"q has the shape {list(q.shape)}, expected a batch of at least 1")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not x.dtype.is_floating_point or x.dtype != q.dtype:
            raise TypeError(f"{name} is {x.dtype}, expected a floating-point dtype, all the same")
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected {q.device}")
    if len(k.shape) != 4 or (k.shape[0], k.shape[3]) != (batch, head_dim):
        raise ValueError(
            f"k has the shape {list(k.shape)}, expected [{batch}, keys, heads, {head_dim}]"
        )
    if len(v.shape) != 4 or v.shape[:2] != k.shape[:2]:
        raise ValueError(
            f"v has the shape {list(v.shape)}, expected [{batch}, {k.shape[1]}, heads, dim]"
        )
    kv_heads = k.shape[2]
    if kv_heads != v.shape[2] or not kv_heads or not heads or heads % kv_heads:
        raise ValueError(
            f"q, k and v have {heads}, {kv_heads} and {v.shape[2]} heads, expected as many of k "
            "as of v, and a multiple of them of q"
        )
    if not head_dim or not v.shape[3]:
        raise ValueError(f"heads of q and v have {head_dim} and {v.shape[3]} channels, expected 1+")


def check_offsets(name: str, offsets: Tensor, rows: int, device: torch.device) -> None:
    """Raise unless these are offsets of packed sequences; values are read on a CPU only.

    Args:
        name: what the tensor is called.
        offsets: the tensor.
        rows: of all sequences together.
        device: where it should be.

    Raises:
        TypeError: for a tensor of another kind.
        ValueError: for another device, or offsets that do not rise from 0 to `rows`.
    """
    _check_offsets(name, offsets, device)
    check_offset_values(name, offsets, rows)


def _check_offsets(name: str, offsets: Look, device: torch.device) -> None:
    if len(offsets.shape) != 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name} is {offsets.dtype} {list(offsets.shape)}, expected int32 or int64 [sequences "
            "+ 1]"
        )
    if offsets.device != device:
        raise ValueError(f"{name} is on {offsets.device}, expected {device}")


def check_offset_values(name: str, offsets: Tensor | None, rows: int) -> None:
    """Raise unless offsets on a CPU rise from 0 to `rows`; a GPU is not waited for."""
    if offsets is None or not offsets.is_cpu:
        return
    values = offsets.tolist()
    if len(values) < 2 or values[0] != 0 or values[-1] != rows or values != sorted(values):
        raise ValueError(
            f"{name} is {values}, expected offsets that rise from 0 to the number of rows ({rows})"
        )
