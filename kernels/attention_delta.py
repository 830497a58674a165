"""delta, which an attention backward wants: for every row and head, the sum of O o dO.

    delta = rowsum(O o dO)

| kept | recomputed | GEMMs |
|---|---|---|
| O | delta | none |

`qk_rope.py` runs the same device function in programs of its own launch; this kernel is for a pass
that has nothing to rotate. Both give the same bits.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import (
    SAME_BITS,
    Layout,
    Plan,
    cdiv,
    check_matrix,
    layout,
    on_device,
    planned,
    stride,
)
from .norm import warps
from .reference.qk_rope import QKSpec


@triton.jit
def delta_part(
    attn_out_ptr, dout_ptr, delta_ptr, M, stride_attn_outm, stride_doutm, stride_deltam,
    stride_deltah,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta of some rows. Two-dimensional, so that no other tile of a kernel shares its layout."""
    line = tl.arange(0, BLOCK_M * BLOCK_H)
    offs_m = tl.program_id(0) * BLOCK_M + line // BLOCK_H
    offs_h = line % BLOCK_H
    offs_d = tl.arange(0, BLOCK_D)
    mask_l = (offs_m < M) & (offs_h < HEADS)
    mask = mask_l[:, None] & (offs_d < HEAD_DIM)[None, :]
    rows = offs_m.to(tl.int64)
    columns = offs_h[:, None] * HEAD_DIM + offs_d[None, :]
    attn_out_ptr += rows[:, None] * stride_attn_outm + columns
    dout_ptr += rows[:, None] * stride_doutm + columns
    attn_out = tl.load(attn_out_ptr, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr, mask=mask, other=0.0).to(tl.float32)
    delta_ptr += rows * stride_deltam + offs_h.to(tl.int64) * stride_deltah
    tl.store(delta_ptr, tl.sum(attn_out * dout, 1), mask=mask_l)


@triton.jit(do_not_specialize=["M", "stride_deltam", "stride_deltah"])
def attention_delta_kernel(
    attn_out_ptr, dout_ptr, delta_ptr,
    M,
    stride_attn_outm, stride_doutm, stride_deltam, stride_deltah,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    delta_part(
        attn_out_ptr, dout_ptr, delta_ptr, M, stride_attn_outm, stride_doutm, stride_deltam,
        stride_deltah, HEADS, HEAD_DIM, BLOCK_M, BLOCK_H, BLOCK_D,
    )  # fmt: skip


@functools.cache
def head_tiles(spec: QKSpec) -> dict[str, int]:
    """Rows and heads of a program, and its warps, by the sizes alone."""
    block_q = triton.next_power_of_2(spec.heads)
    block_k = triton.next_power_of_2(spec.kv_size // spec.head_dim)
    widest = max(spec.head_dim, spec.out_head_dim)
    elements = max(block_q, block_k) * triton.next_power_of_2(widest)
    rows = max(1, min(64, 2048 // elements))
    return {
        "BLOCK_M": rows, "BLOCK_Q": block_q, "BLOCK_K": block_k, "num_warps": warps(rows * elements)
    }  # fmt: skip


def check_delta(attn_out: Layout, dout: Layout, delta: Layout, spec: QKSpec) -> None:
    """Raise unless the kernels can work with these."""
    rows, width = attn_out.shape[0], spec.heads * spec.out_head_dim
    check_matrix("attn_out", attn_out, (rows, width), attn_out)
    check_matrix("dout", dout, (rows, width), attn_out)
    shape = rows, spec.heads
    if delta.dtype != torch.float32:
        raise TypeError(f"delta is {delta.dtype}, expected torch.float32")
    if tuple(delta.shape) != shape or delta.device != attn_out.device:
        raise ValueError(
            f"delta is {list(delta.shape)} on {delta.device}, expected {list(shape)} on "
            f"{attn_out.device}"
        )


@planned
def _plan(attn_out: Layout, dout: Layout, delta: Layout, spec: QKSpec) -> Plan:
    check_delta(attn_out, dout, delta, spec)
    tiles, rows = head_tiles(spec), attn_out.shape[0]
    flags = {
        "HEADS": spec.heads,
        "HEAD_DIM": spec.out_head_dim,
        "BLOCK_M": tiles["BLOCK_M"],
        "BLOCK_H": tiles["BLOCK_Q"],
        "BLOCK_D": triton.next_power_of_2(spec.out_head_dim),
        "num_warps": tiles["num_warps"],
        **SAME_BITS,
    }
    numbers = (rows, stride(attn_out), stride(dout), *delta.strides)
    return Plan((cdiv(rows, tiles["BLOCK_M"]),), (), numbers, flags)


def attention_delta(attn_out: Tensor, dout: Tensor, delta: Tensor, spec: QKSpec) -> None:
    """delta, where there is nothing to rotate. As `reference.qk_rope.attention_delta`.

    Args:
        attn_out: `[rows, heads * out_head_dim]`, fp32, bf16 or fp16, last stride 1.
        dout: as attn_out, its gradient.
        delta: `[rows, heads]`, fp32, any strides; written.
        spec: sizes of the heads.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for a shape, device or stride that is not as above.
    """
    plan = _plan(layout(attn_out), layout(dout), layout(delta), spec)
    if len(attn_out):
        with on_device(attn_out):
            attention_delta_kernel[plan.grid](attn_out, dout, delta, *plan.numbers, **plan.flags)
