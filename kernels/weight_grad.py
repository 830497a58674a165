"""Weight gradients summed over chunks of tokens, in fp32.

    dW += dy^T x

| kept | recomputed | GEMMs |
|---|---|---|
| the sum, fp32 | nothing | 1 |

Where PyTorch's GEMM takes short operands and adds to an fp32 result (CUDA), it is the library's
business. Elsewhere (ROCm) this kernel does it: the transposed operand is read as it stands, and
the sum is read, added to and written in column halves, to spare registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference
from .configs import Config, architecture, choose, uses_descriptors
from .launch import (
    Layout,
    Plan,
    cdiv,
    check_matrix,
    describable,
    described,
    dot_precision,
    layout,
    on_device,
    operand,
    planned,
    readable,
    stride,
)
from .tiles import halves, load_tile, tile_of


@triton.jit
def _add_part(value, out, offs_n, offs_k, N, K, stride_on, ACCUMULATE: tl.constexpr):
    """Write some columns of a tile, or add them to what is there."""
    pointers = out + offs_n.to(tl.int64)[:, None] * stride_on + offs_k[None, :]
    mask = (offs_n < N)[:, None] & (offs_k < K)[None, :]
    if ACCUMULATE:
        value += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, value, mask=mask)


@triton.jit(do_not_specialize=["M"])
def weight_grad_kernel(
    dy,
    x,
    out,
    M,
    N,
    K,
    stride_ym,
    stride_xm,
    stride_on,
    ACCUMULATE: tl.constexpr,
    PRECISION: tl.constexpr,
    DESC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """`out[N, K] (+)= dy[M, N].T @ x[M, K]`: tiles of `[BLOCK_M, BLOCK_N]` of out, and BLOCK_K rows
    of dy and x a step."""
    pid_n, pid_k = tile_of(tl.program_id(0), N, K, BLOCK_M, BLOCK_N, GROUP_M)
    first_n, first_k = pid_n * BLOCK_M, pid_k * BLOCK_N
    tl.assume(M > 0)  # see `tiles.dot_kn`
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for m in range(0, M, BLOCK_K):
        y_tile = load_tile(
            dy, m, first_n, M, N, stride_ym, BLOCK_K, BLOCK_M, False, False, DESC
        )  # [BLOCK_K, BLOCK_M]
        x_tile = load_tile(
            x, m, first_k, M, K, stride_xm, BLOCK_K, BLOCK_N, False, False, DESC
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(y_tile.T, x_tile, acc, input_precision=PRECISION)
    offs_n = first_n + tl.arange(0, BLOCK_M)
    if SPLIT == 1:
        offs_k = first_k + tl.arange(0, BLOCK_N)
        _add_part(acc, out, offs_n, offs_k, N, K, stride_on, ACCUMULATE)
    else:
        tl.static_assert(SPLIT == 2)
        left, right = halves(acc, BLOCK_M, BLOCK_N)
        offs_k = first_k + tl.arange(0, BLOCK_N // 2)
        _add_part(left, out, offs_n, offs_k, N, K, stride_on, ACCUMULATE)
        _add_part(right, out, offs_n, offs_k + BLOCK_N // 2, N, K, stride_on, ACCUMULATE)


def library_accumulates(x: Tensor) -> bool:
    """Whether PyTorch's GEMM adds products of x's dtype to an fp32 sum on x's device."""
    return x.is_cuda and torch.version.hip is None


def accumulate_outer(
    total: Tensor | None, dy: Tensor, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Add `dy^T x` to a weight gradient. As `reference.linear.accumulate_outer`.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for shapes, strides or devices that do not fit.
    """
    if library_accumulates(x):
        return reference.accumulate_outer(total, dy, x, dtype)
    return weight_grad(total, dy, x, dtype)


@planned
def _plan(dy: Layout, x: Layout, total: Layout, accumulate: bool, config: Config | None) -> Plan:
    (M, N), K = dy.shape, x.shape[1]
    check_matrix("dy", dy, (M, N), x)
    check_matrix("x", x, (M, K), x)
    if dy.dtype != x.dtype:
        raise TypeError(f"dy is {dy.dtype}, expected the dtype of x ({x.dtype})")
    check_matrix("total", total, (N, K), x)
    if total.dtype != torch.float32 and (accumulate or total.dtype != x.dtype):
        raise TypeError(f"total is {total.dtype}, expected torch.float32")
    aligned = describable(dy) and describable(x)
    desc = uses_descriptors(x) and aligned
    if config is None:
        config = choose("weight_grad", architecture(x.device), x.dtype.itemsize, aligned=aligned)
    m, n, k = config.block_m, config.block_n, config.block_k
    flags = {
        "ACCUMULATE": accumulate,
        "PRECISION": dot_precision(x.dtype),
        "DESC": desc,
        "BLOCK_M": m,
        "BLOCK_N": n,
        "BLOCK_K": k,
        "GROUP_M": config.group_m,
        "SPLIT": config.split,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    return Plan(
        (cdiv(N, m) * cdiv(K, n),),
        (described(dy, k, m), described(x, k, n)) if desc else (None, None),
        (M, N, K, stride(dy), stride(x), stride(total)),
        flags,
    )


def weight_grad(
    total: Tensor | None,
    dy: Tensor,
    x: Tensor,
    dtype: torch.dtype | None = None,
    config: Config | None = None,
) -> Tensor:
    """The kernel, whatever the library can do. Arguments as `accumulate_outer`.

    Args:
        total: as there, and so dy, x, dtype and the result.
        dy: see total.
        x: see total.
        dtype: see total.
        config: tile sizes; None for the table's.
    """
    dy, x = readable(dy), readable(x)
    accumulate = total is not None
    if total is None:
        short = dtype == x.dtype  # else the sum's
        total = x.new_empty(dy.shape[1], x.shape[1], dtype=dtype if short else torch.float32)
    plan = _plan(layout(dy), layout(x), layout(total), accumulate, config)
    dy_block, x_block = plan.blocks
    with on_device(x):
        weight_grad_kernel[plan.grid](
            operand(dy, dy_block), operand(x, x_block), total, *plan.numbers, **plan.flags
        )
    return total
