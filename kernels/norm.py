"""RMSNorm and LayerNorm as Triton kernels; `reference/norm.py` says what they compute.

    x_hat = (x [- mean]) * rstd           y = x_hat * (offset + weight) + bias
    dx = rstd * (g - x_hat * mean(g * x_hat) [- mean(g)])    g = dy * (offset + weight)
    dweight = sum over rows of dy * x_hat        dbias = sum over rows of dy

| kept | recomputed | GEMMs |
|---|---|---|
| the statistics: rstd (and mean), fp32 | x_hat; y where the backward is asked for it | none |

A program holds whole rows. The backward's programs walk over the rows in steps and sum dweight and
dbias in registers: one fp32 row a program, and those are summed in a fixed order, without atomics.
Multiplications are not fused into additions: so every kernel gives y the same bits.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dispatch import MAX_WIDTH
from .launch import (
    SAME_BITS,
    TRITON_DTYPES,
    Layout,
    Plan,
    cdiv,
    check_matrix,
    layouts,
    on_device,
    planned,
    processors,
    stride,
)
from .reference.norm import NormSpec


@triton.jit
def scaled(
    x_hat, weight, bias, offset,
    HAS_BIAS: tl.constexpr, ROUND_FIRST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """y from x_hat in fp32; weight and bias as they are loaded. Rounds where a model rounds."""
    if ROUND_FIRST:
        scale = (weight.to(tl.float32) + offset).to(weight.dtype).to(DTYPE).to(tl.float32)
        y = (x_hat.to(DTYPE).to(tl.float32) * scale).to(DTYPE)
        if HAS_BIAS:
            y = (y.to(tl.float32) + bias.to(DTYPE).to(tl.float32)).to(DTYPE)
        return y
    else:
        y = x_hat * (weight.to(tl.float32) + offset)
        if HAS_BIAS:
            y += bias.to(tl.float32)
        return y.to(DTYPE)


@triton.jit(do_not_specialize=["M", "stride_statistics"])
def norm_forward_kernel(
    x_ptr, weight_ptr, bias_ptr, residual_ptr, statistics_ptr, out_ptr,
    M, N,
    stride_xm, stride_residualm, stride_statistics, stride_outm,
    eps, offset,
    LAYERNORM: tl.constexpr, KNOWN: tl.constexpr, ROUND_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, Y_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offset = tl.cast(offset, tl.float32)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_m = offs_m < M
    mask_n = offs_n < N
    mask = mask_m[:, None] & mask_n
    rows = offs_m.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * stride_xm + offs_n, mask=mask, other=0.0)
    # [BLOCK_M, BLOCK_N]
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0)
    bias = weight
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)

    centered = x.to(tl.float32)
    mean_ptr = statistics_ptr + tl.cast(stride_statistics, tl.int64) + offs_m
    if KNOWN:
        rstd = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)
        if LAYERNORM:
            centered -= tl.load(mean_ptr, mask=mask_m, other=0.0)[:, None]
    else:
        if LAYERNORM:
            mean = tl.sum(centered, 1) / N
            centered = tl.where(mask, centered - mean[:, None], 0.0)
            tl.store(mean_ptr, mean, mask=mask_m)
        rstd = tl.rsqrt(tl.sum(centered * centered, 1) / N + tl.cast(eps, tl.float32))
        tl.store(statistics_ptr + offs_m, rstd, mask=mask_m)

    x_hat = centered * rstd[:, None]
    y = scaled(x_hat, weight, bias, offset, HAS_BIAS, ROUND_FIRST, x_ptr.dtype.element_ty)
    y = y.to(tl.float32).to(Y_DTYPE)
    if HAS_RESIDUAL:
        residual = tl.load(residual_ptr + rows * stride_residualm + offs_n, mask=mask, other=0.0)
        y = (residual.to(tl.float32) + y.to(tl.float32)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + rows * stride_outm + offs_n, y, mask=mask)


@triton.jit(do_not_specialize=["M", "stride_statistics"])
def norm_backward_kernel(
    dy_ptr, x_ptr, statistics_ptr, weight_ptr, bias_ptr, residual_ptr,
    dx_ptr, normed_ptr, dweight_ptr, dbias_ptr,
    M, N,
    stride_dym, stride_xm, stride_statistics, stride_residualm, stride_dxm, stride_normedm,
    offset,
    LAYERNORM: tl.constexpr, ROUND_FIRST: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
    NEED_DX: tl.constexpr, NEED_NORMED: tl.constexpr,
    NEED_DWEIGHT: tl.constexpr, NEED_DBIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    offset = tl.cast(offset, tl.float32)
    pid = tl.program_id(0)
    offs_n = tl.arange(0, BLOCK_N)[None, :]
    mask_n = offs_n < N
    acc_dweight = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    acc_dbias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)

    for block in range(pid, tl.cdiv(M, BLOCK_M), tl.num_programs(0)):
        offs_m = block * BLOCK_M + tl.arange(0, BLOCK_M)
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n
        rows = offs_m.to(tl.int64)[:, None]
        x = tl.load(x_ptr + rows * stride_xm + offs_n, mask=mask, other=0.0)
        # [BLOCK_M, BLOCK_N]
        dy = tl.load(dy_ptr + rows * stride_dym + offs_n, mask=mask, other=0.0).to(tl.float32)
        x_hat = x.to(tl.float32)
        if LAYERNORM:
            mean_ptr = statistics_ptr + tl.cast(stride_statistics, tl.int64) + offs_m
            x_hat -= tl.load(mean_ptr, mask=mask_m, other=0.0)[:, None]
        rstd = tl.load(statistics_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        x_hat *= rstd
        if NEED_DWEIGHT:
            acc_dweight += dy * x_hat
        if NEED_DBIAS:
            acc_dbias += dy
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0)
        if NEED_NORMED:
            bias = weight
            if HAS_BIAS:
                bias = tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)
            y = scaled(x_hat, weight, bias, offset, HAS_BIAS, ROUND_FIRST, x_ptr.dtype.element_ty)
            y = y.to(tl.float32).to(normed_ptr.dtype.element_ty)
            tl.store(normed_ptr + rows * stride_normedm + offs_n, y, mask=mask)
        if NEED_DX:
            grad = dy * (weight.to(tl.float32) + offset)
            projection = tl.sum(grad * x_hat, 1, keep_dims=True) / N
            if LAYERNORM:
                grad -= tl.sum(grad, 1, keep_dims=True) / N
            grad = (grad - x_hat * projection) * rstd
            if HAS_RESIDUAL:
                residual = residual_ptr + rows * stride_residualm + offs_n
                grad = tl.load(residual, mask=mask, other=0.0).to(tl.float32) + grad
            dx = grad.to(dx_ptr.dtype.element_ty)
            tl.store(dx_ptr + rows * stride_dxm + offs_n, dx, mask=mask)

    partial = pid.to(tl.int64) * N + offs_n
    if NEED_DWEIGHT:
        tl.store(dweight_ptr + partial, tl.sum(acc_dweight, 0, keep_dims=True), mask=mask_n)
    if NEED_DBIAS:
        tl.store(dbias_ptr + partial, tl.sum(acc_dbias, 0, keep_dims=True), mask=mask_n)


def check_vector(name: str, x: Layout, width: int, like: Layout) -> None:
    """Raise unless a kernel can read x as a parameter: `[width]`, contiguous, on like's device."""
    row = x._replace(shape=(1, *x.shape), strides=(width, *x.strides))
    check_matrix(name, row, (1, width), like)
    if x.strides[0] != 1:
        raise ValueError(f"{name} has the stride {x.strides[0]}, expected 1: make it contiguous")


@functools.cache
def _tiles(width: int) -> dict[str, int]:
    """Tile and warps, by the width alone: a row's bits must not depend on its neighbours."""
    block = triton.next_power_of_2(width)
    rows = max(1, min(64, 2048 // block))
    return {"BLOCK_M": rows, "BLOCK_N": block, "num_warps": warps(rows * block)}


def warps(elements: int) -> int:
    """Warps for a tile: 16 numbers a thread up to 16 warps; 32 where those would spill badly."""
    most = 32 if elements > 16384 and torch.version.hip is None else 16  # AMD's are twice as wide
    return max(1, min(most, elements // 512))


def resident_programs(device: torch.device, num_warps: int) -> int:
    """Programs of a backward pass: 16 warps a processor. Each leaves a row of partial sums."""
    return processors(device) * max(1, 16 // num_warps)


def _check(
    x: Layout,
    statistics: Layout,
    weight: Layout,
    bias: Layout | None,
    spec: NormSpec,
    matrices: dict[str, Layout | None],
) -> dict[str, Any]:
    """Raise unless the kernels can work with these; `matrices` are shaped as x.

    Returns:
        The flags that both kernels share.
    """
    rows, width = x.shape
    if not 1 <= width <= MAX_WIDTH:
        raise ValueError(f"x has rows of width {width}, expected 1 to {MAX_WIDTH}")
    if spec.kind not in ("rmsnorm", "layernorm"):
        raise ValueError(f"spec.kind is {spec.kind!r}, expected 'rmsnorm' or 'layernorm'")
    check_matrix("x", x, (rows, width), x)
    for name, matrix in matrices.items():
        if matrix is not None:
            check_matrix(name, matrix, (rows, width), x)
    check_vector("weight", weight, width, x)
    if bias is not None:
        check_vector("bias", bias, width, x)
    if statistics.dtype != torch.float32:
        raise TypeError(f"statistics is {statistics.dtype}, expected torch.float32")
    check_matrix("statistics", statistics, (spec.statistics, rows), x)
    return {
        "LAYERNORM": spec.kind == "layernorm",
        "ROUND_FIRST": spec.round_first,
        "HAS_BIAS": bias is not None,
        "HAS_RESIDUAL": matrices["residual"] is not None,
        **SAME_BITS,
        **_tiles(width),
    }


@planned
def _forward_plan(
    x: Layout,
    statistics: Layout,
    weight: Layout,
    bias: Layout | None,
    residual: Layout | None,
    target: Layout,
    spec: NormSpec,
    dtype: torch.dtype,
    known: bool,
) -> Plan:
    matrices = {"residual": residual, "out": target}
    flags = _check(x, statistics, weight, bias, spec, matrices)
    rows, width = x.shape
    strides = (stride(x), stride(residual), stride(statistics), stride(target))
    return Plan(
        (cdiv(rows, flags["BLOCK_M"]),),
        (),
        (rows, width, *strides, spec.eps, spec.offset),
        {**flags, "KNOWN": known, "Y_DTYPE": TRITON_DTYPES[dtype]},
    )


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    statistics: Tensor,
    dtype: torch.dtype,
    residual: Tensor | None,
    out: Tensor | None,
    known: bool,
) -> Tensor:
    """Both forward functions: statistics are read where they are `known`, else written."""
    if dtype not in TRITON_DTYPES:
        raise TypeError(f"dtype is {dtype}, expected one of {', '.join(map(str, TRITON_DTYPES))}")
    target = out
    if target is None:
        wide = dtype if residual is None else torch.promote_types(dtype, residual.dtype)
        target = torch.empty(x.shape, dtype=wide, device=x.device)
    plan = _forward_plan(
        *layouts(x, statistics, weight, bias, residual, target), spec, dtype, known
    )
    if plan.grid[0]:
        with on_device(x):
            norm_forward_kernel[plan.grid](
                x, weight, bias, residual, statistics, target, *plan.numbers, **plan.flags
            )
    return target


def norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    statistics: Tensor,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The normalised rows, and their statistics.

    Arguments and result as `reference.norm.norm_forward`.

    Args:
        x: `[rows, width]`, fp32, bf16 or fp16, last stride 1, width at most `MAX_WIDTH`.
        weight: `[width]`, contiguous, of any of these dtypes.
        bias: `[width]`, likewise, or None.
        spec: the norm.
        statistics: `[1 or 2, rows]` fp32, last stride 1, written.
        dtype: of y.
        residual: `[rows, width]`, last stride 1.
        out: `[rows, width]`, last stride 1, written with y, or with the sum; may be the residual.

    Returns:
        y `[rows, width]`, fresh and in `dtype`; or `out`.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for a shape, device or stride that is not as above.
    """
    return _forward(x, weight, bias, spec, statistics, dtype, residual, out, known=False)


def norm_apply(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The normalised rows, from x and its statistics: the bits `norm_forward` gave.

    Args:
        x: as `norm_forward` read it; so weight, bias, spec, dtype, residual and out.
        statistics: as `norm_forward` wrote it.
        weight: see x.
        bias: see x.
        spec: see x.
        dtype: see x.
        residual: see x.
        out: see x.

    Returns:
        y, fresh and in `dtype`; or `out`.

    Raises:
        TypeError: as `norm_forward`.
        ValueError: as `norm_forward`.
    """
    return _forward(x, weight, bias, spec, statistics, dtype, residual, out, known=True)


@planned
def _backward_plan(
    dy: Layout,
    x: Layout,
    statistics: Layout,
    weight: Layout,
    bias: Layout | None,
    residual: Layout | None,
    dx: Layout | None,
    normed: Layout | None,
    spec: NormSpec,
    need_dweight: bool,
    need_dbias: bool,
) -> Plan:
    matrices = {"dy": dy, "residual": residual, "dx": dx, "normed": normed}
    flags = _check(x, statistics, weight, bias, spec, matrices)
    rows, width = x.shape
    blocks = cdiv(rows, flags["BLOCK_M"])
    strides = map(stride, (dy, x, statistics, residual, dx, normed))
    return Plan(
        (min(blocks, resident_programs(x.device, flags["num_warps"])),),
        (),
        (rows, width, *strides, spec.offset),
        {
            **flags,
            "NEED_DX": dx is not None,
            "NEED_NORMED": normed is not None,
            "NEED_DWEIGHT": need_dweight,
            "NEED_DBIAS": need_dbias,
        },
    )


def norm_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    *,
    residual: Tensor | None = None,
    dx: Tensor | None = None,
    normed: Tensor | None = None,
    need_dweight: bool = True,
    need_dbias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows and of the parameters; on the way, the normalised rows again.

    Arguments and results as `reference.norm.norm_backward`.

    Args:
        dy: `[rows, width]`, fp32, bf16 or fp16, last stride 1.
        x: `[rows, width]`, as `norm_forward` read it; so weight, bias and spec.
        statistics: `[1 or 2, rows]` fp32, as `norm_forward` wrote it.
        weight: see x.
        bias: see x.
        spec: see x.
        residual: `[rows, width]`, last stride 1, added to dx in fp32.
        dx: `[rows, width]`, last stride 1, written; may be dy or the residual.
        normed: `[rows, width]`, last stride 1, written with what `norm_apply` gives.
        need_dweight: whether dweight is wanted.
        need_dbias: whether dbias is wanted.

    Returns:
        dweight and dbias, `[width]` fp32; None where not wanted.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for a shape, device or stride that is not as above.
    """
    plan = _backward_plan(
        *layouts(dy, x, statistics, weight, bias, residual, dx, normed),
        spec, need_dweight, need_dbias,
    )  # fmt: skip
    if dx is None and normed is None and not (need_dweight or need_dbias):
        return None, None
    [programs] = plan.grid
    partials = [
        torch.empty(programs, x.shape[1], dtype=torch.float32, device=x.device) if need else None
        for need in (need_dweight, need_dbias)
    ]
    if programs:
        with on_device(x):
            norm_backward_kernel[plan.grid](
                dy, x, statistics, weight, bias, residual, dx, normed, *partials,
                *plan.numbers, **plan.flags,
            )  # fmt: skip
    dweight, dbias = (None if partial is None else partial.sum(0) for partial in partials)
    return dweight, dbias
