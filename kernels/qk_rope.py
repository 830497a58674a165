"""qk-norm and RoPE of q and k side by side, as Triton kernels, and their gradients.

    forward     y = rope(qk_norm(raw))
    backward    draw = qk_norm^T(rope^T(dy))       dweight = sum over rows (and heads) of dy * x_hat
    delta       rowsum(O o dO), which an attention backward wants, on the way

| kept | recomputed | GEMMs |
|---|---|---|
| raw, if there is a qk-norm and the policy keeps it | y; the norm's rstd | none |

A program holds all heads of q, or all of k, of one row (of some rows, where rows are narrow), as
three tiles `[rows, heads, channels]`: the first partners of the rotations, the second ones, and the
channels that do not rotate. Every thread stores what it has loaded itself, after all its loads: so
both directions may work in place. Delta is the work of programs of its own in the same launch.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_delta import check_delta, delta_part, head_tiles
from .dispatch import MAX_WIDTH
from .launch import (
    SAME_BITS,
    Layout,
    Plan,
    cdiv,
    check_matrix,
    layouts,
    on_device,
    planned,
    stride,
)
from .norm import check_vector, resident_programs, scaled
from .reference.qk_rope import QKSpec


@triton.jit
def _columns(
    PART: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Where a part of the heads is (0, 1: the partners, 2: the rest): `[heads, channels]`, mask."""
    HALF: tl.constexpr = ROTARY_DIM // 2
    offs_h = tl.arange(0, BLOCK_H)[:, None]
    offs = tl.arange(0, BLOCK)[None, :]
    columns = offs_h * HEAD_DIM + PART * HALF + offs
    if PART == 2:
        mask = offs < HEAD_DIM - ROTARY_DIM
    else:
        mask = offs < HALF
        if INTERLEAVED:
            columns = offs_h * HEAD_DIM + 2 * offs + PART
    return columns, (offs_h < HEADS) & mask


@triton.jit
def _parts(
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Where the three parts of the heads are."""
    at1 = _columns(0, HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_H, BLOCK_R)
    at2 = _columns(1, HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_H, BLOCK_R)
    at3 = _columns(2, HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_H, BLOCK_P)
    return at1, at2, at3


@triton.jit
def _load_part(ptr, stride, offs_m, M, at):
    """A part of some rows, in fp32: `[rows, heads, channels]`."""
    rows = offs_m.to(tl.int64)[:, None, None] * stride
    mask = (offs_m < M)[:, None, None] & at[1][None, :, :]
    return tl.load(ptr + rows + at[0][None, :, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _load(ptr, stride, offs_m, M, at):
    """The three parts of some rows."""
    x1 = _load_part(ptr, stride, offs_m, M, at[0])
    x2 = _load_part(ptr, stride, offs_m, M, at[1])
    x3 = _load_part(ptr, stride, offs_m, M, at[2])
    return x1, x2, x3


@triton.jit
def _store(ptr, stride, offs_m, M, at, x):
    """Write the three parts of some rows."""
    rows = offs_m.to(tl.int64)[:, None, None] * stride
    for part in tl.static_range(3):
        mask = (offs_m < M)[:, None, None] & at[part][1][None, :, :]
        y = x[part].to(ptr.dtype.element_ty)
        tl.store(ptr + rows + at[part][0][None, :, :], y, mask=mask)


@triton.jit
def _rotate(
    first, second, cos_ptr, sin_ptr, stride_cosm, stride_sinm, offs_m, M, at,
    TRANSPOSE: tl.constexpr,
):  # fmt: skip
    """The partners rotated, in fp32; or, for gradients, by the transposed map."""
    cos1 = _load_part(cos_ptr, stride_cosm, offs_m, M, at[0])
    cos2 = _load_part(cos_ptr, stride_cosm, offs_m, M, at[1])
    sin1 = _load_part(sin_ptr, stride_sinm, offs_m, M, at[0])
    sin2 = _load_part(sin_ptr, stride_sinm, offs_m, M, at[1])
    # [rows, 1, channels]
    if TRANSPOSE:
        return first * cos1 + second * sin2, second * cos2 - first * sin1
    else:
        return first * cos1 - second * sin1, second * cos2 + first * sin2


@triton.jit
def _mean(a1, a2, a3, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FULL: tl.constexpr):
    """Means over each head, `[rows, heads, 1]`, or over the whole row, `[rows, 1, 1]`."""
    total = tl.sum(a1, 2, keep_dims=True) + tl.sum(a2, 2, keep_dims=True)
    total += tl.sum(a3, 2, keep_dims=True)
    if FULL:
        return tl.sum(total, 1, keep_dims=True) / (HEADS * HEAD_DIM)
    else:
        return total / HEAD_DIM


@triton.jit
def _rstd(
    x, offs_m, M, eps,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, FULL: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """qk-norm's statistic, `[rows, heads, 1]`; 0 where there is no such row or head."""
    there = (offs_m < M)[:, None, None] & (tl.arange(0, BLOCK_H) < HEADS)[None, :, None]
    mean = _mean(x[0] * x[0], x[1] * x[1], x[2] * x[2], HEADS, HEAD_DIM, FULL)
    return tl.where(there, tl.rsqrt(mean + tl.cast(eps, tl.float32)), 0.0)


@triton.jit
def _normed(
    x, rstd, weight_ptr, at, offset,
    ROUND_FIRST: tl.constexpr, RAW_DTYPE: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """A part after qk-norm, in fp32, rounded to where it would stand."""
    weight = tl.load(weight_ptr + at[0][None, :, :], mask=at[1][None, :, :], other=0.0)
    y = scaled(x * rstd, weight, weight, offset, False, ROUND_FIRST, RAW_DTYPE)
    return y.to(tl.float32).to(DTYPE).to(tl.float32)


@triton.jit
def _forward_part(
    raw_ptr, cos_ptr, sin_ptr, weight_ptr, out_ptr, M, stride_rawm, stride_cosm, stride_sinm,
    stride_outm, eps, offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr, FULL: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """q or k of some rows."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    at = _parts(HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_H, BLOCK_R, BLOCK_P)
    # a single head: for cos and sin, and for a weight that all heads share
    one = _parts(1, HEAD_DIM, ROTARY_DIM, INTERLEAVED, 1, BLOCK_R, BLOCK_P)
    x = _load(raw_ptr, stride_rawm, offs_m, M, at)
    if HAS_NORM:
        RAW: tl.constexpr = raw_ptr.dtype.element_ty
        OUT: tl.constexpr = out_ptr.dtype.element_ty
        w = at if FULL else one
        rstd = _rstd(x, offs_m, M, eps, HEADS, HEAD_DIM, FULL, BLOCK_H)
        x1 = _normed(x[0], rstd, weight_ptr, w[0], offset, ROUND_FIRST, RAW, OUT)
        x2 = _normed(x[1], rstd, weight_ptr, w[1], offset, ROUND_FIRST, RAW, OUT)
        x3 = _normed(x[2], rstd, weight_ptr, w[2], offset, ROUND_FIRST, RAW, OUT)
        x = x1, x2, x3
    if ROTARY_DIM > 0:
        x1, x2 = _rotate(
            x[0], x[1], cos_ptr, sin_ptr, stride_cosm, stride_sinm, offs_m, M, one, False
        )
        x = x1, x2, x[2]
    _store(out_ptr, stride_outm, offs_m, M, at, x)


@triton.jit(do_not_specialize=["M", "stride_deltam", "stride_deltah"])
def qk_rope_forward_kernel(
    raw_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, attn_out_ptr, dout_ptr,
    out_ptr, delta_ptr,
    M,
    stride_rawm, stride_cosm, stride_sinm, stride_attn_outm, stride_doutm,
    stride_outm, stride_deltam, stride_deltah,
    eps, offset,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
    FULL: tl.constexpr, ROUND_FIRST: tl.constexpr, HAS_DELTA: tl.constexpr,
    OUT_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offset = tl.cast(offset, tl.float32)
    K_START: tl.constexpr = Q_HEADS * HEAD_DIM
    if tl.program_id(1) == 0:
        _forward_part(
            raw_ptr, cos_ptr, sin_ptr, q_weight_ptr, out_ptr, M, stride_rawm, stride_cosm,
            stride_sinm, stride_outm, eps, offset, Q_HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED,
            HAS_NORM, FULL, ROUND_FIRST, BLOCK_M, BLOCK_Q, BLOCK_R, BLOCK_P,
        )  # fmt: skip
    elif tl.program_id(1) == 1:
        _forward_part(
            raw_ptr + K_START, cos_ptr, sin_ptr, k_weight_ptr, out_ptr + K_START, M, stride_rawm,
            stride_cosm, stride_sinm, stride_outm, eps, offset, KV_HEADS, HEAD_DIM, ROTARY_DIM,
            INTERLEAVED, HAS_NORM, FULL, ROUND_FIRST, BLOCK_M, BLOCK_K, BLOCK_R, BLOCK_P,
        )  # fmt: skip
    elif HAS_DELTA:
        delta_part(
            attn_out_ptr, dout_ptr, delta_ptr, M, stride_attn_outm, stride_doutm, stride_deltam,
            stride_deltah, Q_HEADS, OUT_HEAD_DIM, BLOCK_M, BLOCK_Q, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _store_dweight(ptr, acc, at, FULL: tl.constexpr):
    """A part of a program's share of a weight's gradient, from `[rows, heads, channels]`."""
    acc = tl.sum(acc, 0)
    if not FULL:
        acc = tl.sum(acc, 0, keep_dims=True)
    tl.store(ptr + at[0], acc, mask=at[1])


@triton.jit
def _backward_part(
    dqk_ptr, raw_ptr, cos_ptr, sin_ptr, weight_ptr, dweight_ptr, M, stride_dqkm, stride_rawm,
    stride_cosm, stride_sinm, eps, offset,
    HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr, FULL: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The gradient of q or of k, in place, of this program's share of the rows."""
    at = _parts(HEADS, HEAD_DIM, ROTARY_DIM, INTERLEAVED, BLOCK_H, BLOCK_R, BLOCK_P)
    one = _parts(1, HEAD_DIM, ROTARY_DIM, INTERLEAVED, 1, BLOCK_R, BLOCK_P)
    w = at if FULL else one
    acc1 = tl.zeros((BLOCK_M, BLOCK_H, BLOCK_R), tl.float32)
    acc2 = tl.zeros((BLOCK_M, BLOCK_H, BLOCK_R), tl.float32)
    acc3 = tl.zeros((BLOCK_M, BLOCK_H, BLOCK_P), tl.float32)

    for block in range(tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        d1, d2, d3 = _load(dqk_ptr, stride_dqkm, offs_m, M, at)
        if ROTARY_DIM > 0:
            DTYPE: tl.constexpr = dqk_ptr.dtype.element_ty
            d1, d2 = _rotate(
                d1, d2, cos_ptr, sin_ptr, stride_cosm, stride_sinm, offs_m, M, one, True
            )
            d1, d2 = d1.to(DTYPE).to(tl.float32), d2.to(DTYPE).to(tl.float32)
        if HAS_NORM:
            x = _load(raw_ptr, stride_rawm, offs_m, M, at)
            rstd = _rstd(x, offs_m, M, eps, HEADS, HEAD_DIM, FULL, BLOCK_H)
            x1, x2, x3 = x[0] * rstd, x[1] * rstd, x[2] * rstd
            if NEED_DWEIGHT:
                acc1 += d1 * x1
                acc2 += d2 * x2
                acc3 += d3 * x3
            w1, w2, w3 = _load(weight_ptr, 0, tl.zeros((1,), tl.int32), 1, w)
            d1, d2, d3 = d1 * (w1 + offset), d2 * (w2 + offset), d3 * (w3 + offset)
            projection = _mean(d1 * x1, d2 * x2, d3 * x3, HEADS, HEAD_DIM, FULL)
            d1 = (d1 - x1 * projection) * rstd
            d2 = (d2 - x2 * projection) * rstd
            d3 = (d3 - x3 * projection) * rstd
        _store(dqk_ptr, stride_dqkm, offs_m, M, at, (d1, d2, d3))

    if NEED_DWEIGHT:
        WIDTH: tl.constexpr = HEADS * HEAD_DIM if FULL else HEAD_DIM
        dweight_ptr += tl.program_id(0).to(tl.int64) * WIDTH
        _store_dweight(dweight_ptr, acc1, w[0], FULL)
        _store_dweight(dweight_ptr, acc2, w[1], FULL)
        _store_dweight(dweight_ptr, acc3, w[2], FULL)


@triton.jit(do_not_specialize=["M"])
def qk_rope_backward_kernel(
    raw_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr,
    dqk_ptr, dq_weight_ptr, dk_weight_ptr,
    M,
    stride_rawm, stride_cosm, stride_sinm, stride_dqkm,
    eps, offset,
    Q_HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, HAS_NORM: tl.constexpr,
    FULL: tl.constexpr, NEED_DQ_WEIGHT: tl.constexpr, NEED_DK_WEIGHT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    offset = tl.cast(offset, tl.float32)
    K_START: tl.constexpr = Q_HEADS * HEAD_DIM
    if tl.program_id(1) == 0:
        _backward_part(
            dqk_ptr, raw_ptr, cos_ptr, sin_ptr, q_weight_ptr, dq_weight_ptr, M, stride_dqkm,
            stride_rawm, stride_cosm, stride_sinm, eps, offset, Q_HEADS, HEAD_DIM, ROTARY_DIM,
            INTERLEAVED, HAS_NORM, FULL, NEED_DQ_WEIGHT, BLOCK_M, BLOCK_Q, BLOCK_R, BLOCK_P,
        )  # fmt: skip
    else:
        _backward_part(
            dqk_ptr + K_START, raw_ptr + K_START, cos_ptr, sin_ptr, k_weight_ptr, dk_weight_ptr, M,
            stride_dqkm, stride_rawm, stride_cosm, stride_sinm, eps, offset, KV_HEADS, HEAD_DIM,
            ROTARY_DIM, INTERLEAVED, HAS_NORM, FULL, NEED_DK_WEIGHT, BLOCK_M, BLOCK_K, BLOCK_R,
            BLOCK_P,
        )  # fmt: skip


@functools.cache
def _constants(spec: QKSpec, rotary_dim: int) -> dict[str, Any]:
    """The constexprs of every kernel that follow from the sizes, and the warps; checked."""
    head_dim, sizes = spec.head_dim, {"q_size": spec.q_size, "kv_size": spec.kv_size}
    for name, size in sizes.items():
        if not 0 < size <= MAX_WIDTH or size % head_dim:
            raise ValueError(
                f"{name} is {size}, expected a multiple of head_dim {head_dim} up to {MAX_WIDTH}"
            )
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise ValueError(
            f"cos has {rotary_dim} columns, expected an even number up to head_dim {head_dim}"
        )
    if spec.layout not in ("half", "interleaved"):
        raise ValueError(f"layout is {spec.layout!r}, expected 'half' or 'interleaved'")
    if spec.qk_norm not in (None, "head", "full"):
        raise ValueError(f"qk_norm is {spec.qk_norm!r}, expected 'head', 'full' or None")
    if spec.norm.kind != "rmsnorm":
        raise ValueError(f"qk-norm's kind is {spec.norm.kind!r}, expected 'rmsnorm'")
    return {
        "Q_HEADS": spec.q_size // head_dim, "KV_HEADS": spec.kv_size // head_dim,
        "HEAD_DIM": head_dim, "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": spec.layout == "interleaved", "FULL": spec.qk_norm == "full",
        "BLOCK_R": triton.next_power_of_2(max(1, rotary_dim // 2)),
        "BLOCK_P": triton.next_power_of_2(max(1, head_dim - rotary_dim)),
        **head_tiles(spec), **SAME_BITS,
    }  # fmt: skip


def _check(
    matrices: dict[str, Layout | None],
    cos: Layout | None,
    sin: Layout | None,
    weights: tuple[Layout | None, Layout | None],
    spec: QKSpec,
    like: Layout,
) -> dict[str, Any]:
    """Raise unless the kernels can work with these; the constants of the launch."""
    rows = like.shape[0]
    for name, matrix in matrices.items():
        if matrix is not None:
            check_matrix(name, matrix, (rows, spec.q_size + spec.kv_size), like)
    if (cos is None) != (sin is None):
        raise ValueError("cos or sin is None, expected both or neither")
    if (weights[0] is None) != (weights[1] is None):
        raise ValueError("q_weight or k_weight is None, expected both or neither")
    rotary_dim = 0
    if cos is not None and sin is not None:
        rotary_dim = cos.shape[-1]
        check_matrix("cos", cos, (rows, rotary_dim), like)
        check_matrix("sin", sin, (rows, rotary_dim), like)
    constants = _constants(spec, rotary_dim)
    for name, weight, size in zip(
        ("q_weight", "k_weight"), weights, (spec.q_size, spec.kv_size), strict=True
    ):
        if weight is not None:
            if spec.qk_norm is None:
                raise ValueError(f"{name} is given, expected None where spec.qk_norm is None")
            width = size if spec.qk_norm == "full" else spec.head_dim
            check_vector(name, weight, width, like)
    return constants


@planned
def _forward_plan(
    raw: Layout,
    cos: Layout | None,
    sin: Layout | None,
    q_weight: Layout | None,
    k_weight: Layout | None,
    attn_out: Layout | None,
    dout: Layout | None,
    out: Layout,
    delta: Layout | None,
    spec: QKSpec,
) -> Plan:
    constants = _check({"raw": raw, "out": out}, cos, sin, (q_weight, k_weight), spec, raw)
    has_delta = attn_out is not None and dout is not None and delta is not None
    if attn_out is not None and dout is not None and delta is not None:
        check_delta(attn_out, dout, delta, spec)
        if attn_out.shape[0] != raw.shape[0]:
            raise ValueError(f"attn_out has {attn_out.shape[0]} rows, expected {raw.shape[0]}")
    rows = raw.shape[0]
    flags = {
        "HAS_NORM": q_weight is not None,
        "ROUND_FIRST": spec.norm.round_first,
        "HAS_DELTA": has_delta,
        "OUT_HEAD_DIM": spec.out_head_dim,
        "BLOCK_D": triton.next_power_of_2(spec.out_head_dim),
        **constants,
    }
    strides = [stride(x) for x in (raw, cos, sin, attn_out, dout, out)]
    to_delta = delta.strides if has_delta and delta is not None else (0, 0)
    return Plan(
        (cdiv(rows, constants["BLOCK_M"]), 3 if has_delta else 2),
        (),
        (rows, *strides, *to_delta, spec.norm.eps, spec.norm.offset),
        flags,
    )


@planned
def _backward_plan(
    dqk: Layout,
    raw: Layout | None,
    cos: Layout | None,
    sin: Layout | None,
    q_weight: Layout | None,
    k_weight: Layout | None,
    spec: QKSpec,
    need_dweights: tuple[bool, bool],
) -> Plan | None:
    """None where there is nothing to do."""
    constants = _check({"dqk": dqk, "raw": raw}, cos, sin, (q_weight, k_weight), spec, dqk)
    has_norm = raw is not None and q_weight is not None
    if not has_norm and cos is None:
        return None
    rows = dqk.shape[0]
    programs = cdiv(rows, constants["BLOCK_M"])
    if has_norm:
        programs = min(programs, resident_programs(dqk.device, constants["num_warps"]))
    strides = [stride(x) for x in (raw, cos, sin, dqk)]
    flags = {
        "HAS_NORM": has_norm,
        "NEED_DQ_WEIGHT": has_norm and need_dweights[0],
        "NEED_DK_WEIGHT": has_norm and need_dweights[1],
        **constants,
    }
    return Plan((programs, 2), (), (rows, *strides, spec.norm.eps, spec.norm.offset), flags)


def qk_rope_forward(
    raw: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    spec: QKSpec,
    out: Tensor,
    *,
    attn_out: Tensor | None = None,
    dout: Tensor | None = None,
    delta: Tensor | None = None,
) -> None:
    """qk-norm and RoPE of some rows; and, in a backward pass, delta.

    Args:
        raw: `[rows, q_size + kv_size]`, fp32, bf16 or fp16, last stride 1.
        cos: `[rows, rotary_dim]`, of any of these dtypes, last stride 1; None for no RoPE.
        sin: as cos.
        q_weight: `[head_dim]` or `[q_size]`, contiguous; None for no qk-norm.
        k_weight: `[head_dim]` or `[kv_size]`, contiguous; None with q_weight.
        spec: what is done.
        out: `[rows, q_size + kv_size]`, last stride 1, written; may be raw.
        attn_out: `[rows, heads * out_head_dim]`, last stride 1; with dout and delta, delta is
            written.
        dout: as attn_out.
        delta: `[rows, heads]`, fp32, any strides; written.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for a shape, device, stride or spec that is not as above.
    """
    plan = _forward_plan(
        *layouts(raw, cos, sin, q_weight, k_weight, attn_out, dout, out, delta), spec
    )
    if len(raw):
        with on_device(raw):
            qk_rope_forward_kernel[plan.grid](
                raw, cos, sin, q_weight, k_weight, attn_out, dout, out, delta, *plan.numbers,
                **plan.flags,
            )  # fmt: skip


def qk_rope_backward(
    dqk: Tensor,
    raw: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    spec: QKSpec,
    *,
    need_dweights: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the projection's output, in place.

    Args:
        dqk: `[rows, q_size + kv_size]`, fp32, bf16 or fp16, last stride 1; overwritten.
        raw: `[rows, q_size + kv_size]`, last stride 1; only qk-norm needs it.
        cos: as in `qk_rope_forward`, and so sin, q_weight, k_weight and spec.
        sin: see cos.
        q_weight: see cos.
        k_weight: see cos.
        spec: see cos.
        need_dweights: whether the gradients of q_weight and k_weight are wanted.

    Returns:
        The gradients of q_weight and k_weight, fp32; None where not wanted.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for a shape, device, stride or spec that is not as above.
    """
    plan = _backward_plan(
        *layouts(dqk, raw, cos, sin, q_weight, k_weight), spec, tuple(need_dweights)
    )
    if plan is None:
        return None, None
    programs, _ = plan.grid
    partials = [
        weight.new_empty(programs, len(weight), dtype=torch.float32)
        if weight is not None and plan.flags[f"NEED_D{name}_WEIGHT"]
        else None
        for name, weight in (("Q", q_weight), ("K", k_weight))
    ]
    if len(dqk):
        with on_device(dqk):
            qk_rope_backward_kernel[plan.grid](
                dqk if raw is None else raw, cos, sin, q_weight, k_weight, dqk, *partials,
                *plan.numbers, **plan.flags,
            )  # fmt: skip
    dq_weight, dk_weight = (None if partial is None else partial.sum(0) for partial in partials)
    return dq_weight, dk_weight
