"""The FFN's pre-activation rebuilt inside the backward kernel: it never reaches memory.

    gate = n Wgate^T + b      up = n Wup^T + b      dhidden = dy Wdown
    d_up = dhidden * act(gate)                      d_gate = dhidden * up * act'(gate)

| kept | recomputed | GEMMs |
|---|---|---|
| nothing of this half but its input | gate, up and hidden | 3 (2 without a gate) |

Two strategies, which sum in the same order:

    split   `ffn_up` writes gate and up into scratch, `ffn_dact` reads and overwrites them
    fused   one kernel: a loop over h with two accumulators, another one with a third, and one
            epilogue, in column parts

The fused kernel saves writing and reading gate and up, some 2 % of the half; it holds three
accumulators of a tile in registers, which costs the GEMMs some of their speed. Which one wins is a
matter of device and shape: `tuning.py` measures it. Both loops are those of the split kernels, in
their order; under the interpreter the bits are the same, and `backfuse tune` chooses `fused` on a
device only where it has seen that they are.

The input comes in normalised. With the norm in the loop instead (gamma on the A tile, rstd a factor
in the epilogue: `bench/norm_prologue.py`) the kernel compiles as well on sm_90: 252 registers and
no spill, against 255 and 8 bytes outside the loops. But its A operand then comes from registers,
which the ptxas that Triton ships is reported to miscompile in pipelined loops; it would round
otherwise than the forward pass; and the weight gradients read the normalised input anyway.
"""

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from .activation import check_kind
from .configs import Config, uses_descriptors
from .ffn_dact import DownLayouts, bias_gradient, check_dpreact, ffn_dact, store_dact
from .ffn_up import UpLayouts, add_bias, dot_up, ffn_up, gate_and_up
from .launch import (
    Layout,
    Plan,
    cdiv,
    check_matrix,
    layout,
    layouts,
    on_device,
    operand,
    planned,
    readable,
    stride,
)
from .low_rank import (
    Product,
    ProductLayouts,
    add_low_rank_kn,
    block_r,
    operands,
    product_layouts,
    readable_product,
)
from .tiles import column_parts, dot_kn, tile_of
from .tuning import config_for, strategy_for


@triton.jit(do_not_specialize=["M"])
def ffn_recompute_kernel(
    x,
    w_gate,
    w_up,
    b_gate,
    b_up,
    t_gate,
    v_gate,
    t_up,
    v_up,
    dy,
    down,
    u,
    a,
    dpreact,
    hidden,
    M,
    N,
    K,
    R_gate,
    R_up,
    R_down,
    stride_xm,
    stride_gn,
    stride_un,
    stride_ym,
    stride_wk,
    stride_dm,
    stride_hm,
    stride_tm,
    stride_ua,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    DESC: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
    acc_gate, acc_up = dot_up(
        x, w_gate, w_up, t_gate, v_gate, t_up, v_up, row, col, M, N, K, R_gate, R_up,
        stride_xm, stride_gn, stride_un, stride_tm,
        GATED, PACKED, DESC, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, EVEN_K, PRECISION,
    )  # fmt: skip
    d = dot_kn(
        dy, down, row, col, M, N, K, stride_ym, stride_wk,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, DESC,
    )  # fmt: skip
    if u is not None:
        d = add_low_rank_kn(
            d, u, a, row, col, M, N, R_down, stride_ua, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION
        )
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    gates = column_parts(acc_gate, BLOCK_M, BLOCK_N, SPLIT)
    ups = column_parts(acc_up, BLOCK_M, BLOCK_N, SPLIT)
    ds = column_parts(d, BLOCK_M, BLOCK_N, SPLIT)
    offs_m = row + tl.arange(0, BLOCK_M)
    for part in tl.static_range(SPLIT):
        offs_n = col + part * WIDTH + tl.arange(0, WIDTH)
        gate = add_bias(gates[part], b_gate, offs_n, N, HAS_BIAS).to(DTYPE).to(tl.float32)
        up = add_bias(ups[part], b_up, offs_n, N, HAS_BIAS).to(DTYPE).to(tl.float32)
        store_dact(
            ds[part], gate, up, dpreact, hidden, offs_m, offs_n, M, N,
            stride_dm, stride_hm, KIND, GATED, STORE_HIDDEN, DTYPE,
        )  # fmt: skip


@planned
def _plan(
    x: Layout,
    weights: tuple[Layout, ...],
    biases: tuple[Layout | None, ...],
    dy: Layout,
    down: Layout,
    dpreact: Layout,
    kind: str,
    gated: bool,
    need_hidden: bool,
    config: Config | None,
    products: tuple[ProductLayouts, ...],
    product: ProductLayouts,
) -> Plan | None:
    """None where only one side can be loaded through descriptors: gate and up would then be rebuilt
    in other tiles than the forward pass has, and their sums would have other bits."""
    ups = UpLayouts(x, weights, biases, gated, products)
    downs = DownLayouts(dy, down, product)
    M, N, K = ups.sizes
    width = N * (2 if gated else 1)
    check_kind(kind, gated, width)
    check_matrix("dy", dy, (M, K), x)
    check_matrix("down", down, (K, N), x)
    check_dpreact(dpreact, (M, width), x)
    aligned = ups.aligned and downs.aligned
    if config is None and ups.aligned != downs.aligned:
        return None
    if config is None:
        config = config_for("ffn_recompute", x, N, gated, aligned=aligned)
    desc = uses_descriptors(x) and aligned
    ranks = (*ups.ranks, downs.rank)
    flags = {
        **ups.flags(config, desc), "BLOCK_R": block_r(*ranks), "KIND": kind,
        "STORE_HIDDEN": need_hidden,
    }  # fmt: skip
    rows = (x, weights[0], weights[-1], dy, down, dpreact)
    return Plan(
        (cdiv(M, config.block_m) * cdiv(N, config.block_n),),
        ups.blocks(config, desc) + downs.blocks(config, desc),
        (M, N, K, *ranks, *map(stride, rows), N, ups.stride_tm, downs.stride_ua),
        flags,
    )


def ffn_recompute_dact(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kind: str,
    gated: bool,
    dy: Tensor,
    down: Tensor,
    dpreact: Tensor,
    *,
    products: Sequence[Product] = (),
    need_hidden: bool = True,
    need_dbias: bool = False,
    product: Product = None,
    addend: Tensor | None = None,
    strategy: str = "auto",
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """`ffn_dact` of a pre-activation that was not kept. As `reference.ffn.ffn_recompute_dact`.

    Args:
        strategy: `"split"`, `"fused"` (split where only one side of that kernel is aligned), or
            `"auto"`: what was measured on this device, else split.
        config: tile sizes of the fused kernel; None for the table's.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for shapes, strides or devices that do not fit, or an unknown strategy.
    """
    if strategy == "auto":
        strategy = strategy_for(x, down.shape[1], gated)
    if strategy not in ("split", "fused"):
        raise ValueError(f"strategy is {strategy!r}, expected 'auto', 'split' or 'fused'")
    x, weights = readable(x), [readable(weight) for weight in weights]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    dy, down = readable(dy), readable(down)
    products, product = tuple(map(readable_product, products)), readable_product(product)
    plan = None
    if strategy == "fused" and addend is None:
        plan = _plan(
            layout(x), layouts(*weights), layouts(*biases), *layouts(dy, down, dpreact),
            kind, gated, need_hidden, config, tuple(map(product_layouts, products)),
            product_layouts(product),
        )  # fmt: skip
    if plan is None:
        ffn_up(
            x, weights, biases, kind, gated, products=products, preact=dpreact, need_hidden=False
        )
        return ffn_dact(
            dy, down, dpreact, kind, gated, dpreact, need_hidden=need_hidden,
            need_dbias=need_dbias, product=product, addend=addend,
        )  # fmt: skip
    M, N, *_ = plan.numbers
    hidden = x.new_empty(M, N) if need_hidden else None
    x_block, gate_block, up_block, dy_block, down_block = plan.blocks
    gate, up = gate_and_up(weights, gated, gate_block is not None)
    with on_device(x):
        ffn_recompute_kernel[plan.grid](
            operand(x, x_block),
            operand(gate, gate_block),
            operand(up, up_block),
            *gate_and_up(biases, gated),
            *operands(products, gated, gate_block is not None),
            operand(dy, dy_block),
            operand(down, down_block),
            *(product or (None, None)),
            dpreact,
            hidden,
            *plan.numbers,
            **plan.flags,
        )
    return hidden, bias_gradient(dpreact, need_dbias)
