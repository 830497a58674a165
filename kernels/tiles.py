"""Tiles of matrices: how programs share them out, and how they are loaded.

A kernel takes each operand of a GEMM as a pointer or as a tensor descriptor, under one name: what
the launcher passes decides, and the constexpr `DESC` says it. Descriptors (the tensor memory
accelerator of sm_90 and newer) fill what lies outside with zeros; pointers are masked to the same.
"""

import triton
import triton.language as tl


@triton.jit
def tile_of(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """Row and column number of a program's tile; GROUP_M rows of tiles share columns in L2."""
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = (pid // (GROUP_M * tiles_n)) * GROUP_M
    size = tl.minimum(tiles_m - first, GROUP_M)
    rest = pid % (GROUP_M * tiles_n)
    return first + rest % size, rest // size


@triton.jit
def load_tile(
    source,
    row,
    col,
    rows,
    cols,
    stride,
    BLOCK_ROW: tl.constexpr,
    BLOCK_COL: tl.constexpr,
    EVEN_ROW: tl.constexpr,
    EVEN_COL: tl.constexpr,
    DESC: tl.constexpr,
):
    """`[BLOCK_ROW, BLOCK_COL]` of a row-major matrix, zeros outside of it.

    EVEN_ROW and EVEN_COL promise that the tile lies inside in that direction.
    """
    # One return at the end: Triton compiles what follows a return inside a constexpr branch.
    if DESC:
        tile = source.load([row, col])
    else:
        offs_row, offs_col = row + tl.arange(0, BLOCK_ROW), col + tl.arange(0, BLOCK_COL)
        pointers = source + offs_row.to(tl.int64)[:, None] * stride + offs_col[None, :]
        if EVEN_ROW and EVEN_COL:
            tile = tl.load(pointers)
        elif EVEN_ROW:
            tile = tl.load(pointers, mask=(offs_col < cols)[None, :], other=0.0)
        elif EVEN_COL:
            tile = tl.load(pointers, mask=(offs_row < rows)[:, None], other=0.0)
        else:
            mask = (offs_row < rows)[:, None] & (offs_col < cols)[None, :]
            tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def halves(x, ROWS: tl.constexpr, COLS: tl.constexpr):
    """The left and the right half of `[ROWS, COLS]`: a renaming of registers, no data moves."""
    return x.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()


@triton.jit
def column_parts(x, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr):
    """SPLIT parts of `[ROWS, COLS]`, side by side: 1, 2 or 4."""
    if SPLIT == 1:
        parts = (x,)
    elif SPLIT == 2:
        parts = halves(x, ROWS, COLS)
    else:
        tl.static_assert(SPLIT == 4)
        left, right = halves(x, ROWS, COLS)
        parts = halves(left, ROWS, COLS // 2) + halves(right, ROWS, COLS // 2)
    return parts


@triton.jit
def dot_kn(
    x,
    w,
    row,
    col,
    M,
    N,
    K,
    stride_xm,
    stride_wk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    DESC: tl.constexpr,
):
    """One tile of `x @ w`, x `[M, K]`, w `[K, N]`, in fp32."""
    tl.assume(K > 0)  # without it ptxas serialises every wgmma of the loop (Triton 3.6, sm_90)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        x_tile = load_tile(
            x, row, k, M, K, stride_xm, BLOCK_M, BLOCK_K, False, EVEN_K, DESC
        )  # [BLOCK_M, BLOCK_K]
        w_tile = load_tile(
            w, k, col, K, N, stride_wk, BLOCK_K, BLOCK_N, EVEN_K, False, DESC
        )  # [BLOCK_K, BLOCK_N]
        acc = tl.dot(x_tile, w_tile, acc, input_precision=PRECISION)
    return acc
