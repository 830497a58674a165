"""The road not taken by `kernels/ffn_recompute.py`: the norm inside the GEMM's loop.

    gate = rstd * ((x o gamma) Wgate^T)        up = rstd * ((x o gamma) Wup^T)

x o gamma is the A tile times a row, and rstd a factor of the rows of the accumulators in the
epilogue: the normalised input is never written, which spares reading and writing `[rows, h]` once a
pass. The price is that the A operand comes from registers. `backfuse bench static` compiles this
beside the kernel that is used; nothing calls it.
"""

import triton
import triton.language as tl

from backfuse.kernels.ffn_dact import store_dact
from backfuse.kernels.tiles import column_parts, dot_kn, tile_of


@triton.jit(do_not_specialize=["M"])
def ffn_recompute_norm_kernel(
    x,
    gamma,
    rstd,
    w_gate_up,
    dy,
    down,
    dpreact,
    hidden,
    M,
    N,
    K,
    stride_ym,
    stride_wk,
    stride_dm,
    stride_hm,
    KIND: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """As `ffn_recompute_kernel` for a stacked weight and descriptors, but x is not normalised."""
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
    tl.assume(K > 0)
    both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        scale = tl.load(gamma + offs_k, mask=offs_k < K, other=0.0)
        x_tile = x.load([row, k]) * scale[None, :]  # [BLOCK_M, BLOCK_K]
        w_tile = w_gate_up.load([0, col, k]).reshape(2 * BLOCK_N, BLOCK_K)
        both = tl.dot(x_tile, w_tile.T, both, input_precision=PRECISION)
    acc_gate, acc_up = both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    d = dot_kn(
        dy, down, row, col, M, N, K, stride_ym, stride_wk,
        BLOCK_M, BLOCK_N, BLOCK_K, True, PRECISION, True,
    )  # fmt: skip
    offs_m = row + tl.arange(0, BLOCK_M)
    factor = tl.load(rstd + offs_m, mask=offs_m < M, other=0.0)[:, None]
    gates = column_parts(acc_gate, BLOCK_M, BLOCK_N, SPLIT)
    ups = column_parts(acc_up, BLOCK_M, BLOCK_N, SPLIT)
    ds = column_parts(d, BLOCK_M, BLOCK_N, SPLIT)
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    for part in tl.static_range(SPLIT):
        offs_n = col + part * WIDTH + tl.arange(0, WIDTH)
        gate = (gates[part] * factor).to(DTYPE).to(tl.float32)
        up = (ups[part] * factor).to(DTYPE).to(tl.float32)
        store_dact(
            ds[part], gate, up, dpreact, hidden, offs_m, offs_n, M, N,
            stride_dm, stride_hm, KIND, True, True, DTYPE,
        )  # fmt: skip
