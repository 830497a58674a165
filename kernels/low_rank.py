"""Products of low rank, added to a tile that a GEMM has in its accumulators.

    acc += t v^T        t [M, R], v [N, R]: what adapters add to a projection
    acc += u a          u [M, R], a [R, N]: what they add to the gradient of its input

A second loop after the GEMM's own, of one or two steps: the sum is rounded once, with the rest. Its
operands come through pointers, whatever the rank and the alignment; no step is in flight while
another one multiplies, which would take shared memory from the loop that matters.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .launch import Layout, check_matrix, layouts, readable

#: A product: `[rows, r]`, and a matrix of that rank; or nothing to add.
Product = tuple[Tensor, Tensor] | None

#: The same as a launch is planned by it.
ProductLayouts = tuple[Layout, Layout] | None


@triton.jit
def add_low_rank(
    acc,
    t,
    v,
    row,
    col,
    M,
    N,
    R,
    stride_tm,
    HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + t @ v.T`. With HALVES = 2, v is `[2 N, R]`, and acc a tile of both halves."""
    tl.assume(R > 0)  # see `tiles.dot_kn`
    offs_m = row + tl.arange(0, BLOCK_M)
    offs = tl.arange(0, HALVES * BLOCK_N)
    offs_n = col + offs % BLOCK_N
    t_rows = t + offs_m.to(tl.int64)[:, None] * stride_tm
    v_rows = v + ((offs // BLOCK_N) * N + offs_n).to(tl.int64)[:, None] * R
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[:, None]
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        mask_r = (offs_r < R)[None, :]
        t_tile = tl.load(t_rows + offs_r[None, :], mask=mask_m & mask_r, other=0.0)
        v_tile = tl.load(v_rows + offs_r[None, :], mask=mask_n & mask_r, other=0.0)
        acc = tl.dot(t_tile, v_tile.T, acc, input_precision=PRECISION)
    return acc


@triton.jit
def add_low_rank_kn(
    acc,
    u,
    a,
    row,
    col,
    M,
    N,
    R,
    stride_um,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """`acc + u @ a`."""
    tl.assume(R > 0)  # see `tiles.dot_kn`
    offs_m, offs_n = row + tl.arange(0, BLOCK_M), col + tl.arange(0, BLOCK_N)
    u_rows = u + offs_m.to(tl.int64)[:, None] * stride_um
    mask_m, mask_n = (offs_m < M)[:, None], (offs_n < N)[None, :]
    for r in tl.range(0, R, BLOCK_R, num_stages=1):
        offs_r = r + tl.arange(0, BLOCK_R)
        u_tile = tl.load(u_rows + offs_r[None, :], mask=mask_m & (offs_r < R)[None, :], other=0.0)
        a_pointers = a + offs_r.to(tl.int64)[:, None] * N + offs_n[None, :]
        a_tile = tl.load(a_pointers, mask=(offs_r < R)[:, None] & mask_n, other=0.0)
        acc = tl.dot(u_tile, a_tile, acc, input_precision=PRECISION)
    return acc


def readable_product(product: Product) -> Product:
    """The same as a kernel reads it: rows of the first, all of the second in one piece."""
    return None if product is None else (readable(product[0]), product[1].contiguous())


def product_layouts(product: Product) -> ProductLayouts:
    """The layouts of both."""
    return None if product is None else layouts(*product)  # type: ignore[return-value]


def rank_of(
    name: str, product: ProductLayouts, rows: int, width: int, like: Layout, *, tall: bool
) -> int | None:
    """The rank of a product, which has to fit; None of nothing.

    Args:
        name: what it is called.
        product: its layouts.
        rows: of the first matrix.
        width: of the second, beside the rank.
        like: of a tensor with its dtype and device.
        tall: whether the second is `[width, r]`, or `[r, width]`.

    Raises:
        TypeError: for another dtype.
        ValueError: for a shape or a device that does not fit.
    """
    if product is None:
        return None
    left, right = product
    rank = left.shape[1]
    check_matrix(name, left, (rows, rank), like)
    check_matrix(name, right, (width, rank) if tall else (rank, width), like)
    for part in product:
        if part.dtype != like.dtype:
            raise TypeError(f"{name} is {part.dtype}, expected {like.dtype}")
    return rank


def block_r(*ranks: int | None) -> int | None:
    """Depth of a step: the smallest that holds the largest rank, 16 to 64; None without any."""
    largest = max(rank or 0 for rank in ranks)
    return min(64, max(16, 1 << (largest - 1).bit_length())) if largest else None


def operands(products: Sequence[Product], gated: bool, whole: bool) -> Sequence[Tensor | None]:
    """t and v of the gate, t and v of the up, None where nothing is added; without a gate twice the
    same.

    Args:
        products: one a weight (gate and up, up alone, or one stacked), or none at all.
        gated: whether there is a gate.
        whole: whether a stacked weight is loaded by a descriptor of both halves.
    """
    first, last = (products[0], products[-1]) if products else (None, None)
    if gated and len(products) == 1 and first is not None and not whole:
        t, v = first
        gate, up = v.chunk(2)
        return t, gate, t, up
    return *(first or (None, None)), *(last or (None, None))
