"""Down projection and activation backward: one kernel.

    dhidden = dy Wdown        d_up = dhidden * act(gate)        d_gate = dhidden * up * act'(gate)

| kept | recomputed | GEMMs |
|---|---|---|
| the pre-activation (gate and up), as it is or in e4m3; or what a rebuild left in scratch | hidden,
for the down projection's weight gradient | 1 |

dhidden never reaches memory. The gradients may overwrite the pre-activation they are made from:
each program reads its own tile before it writes it. Sums over rows, for biases, are taken from
what was written and not in the epilogue: there, the order of a sum would be that of the tile's
layout, which differs from kernel to kernel, and so would the bits of `split` and `fused`.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import act, act_grad, check_kind
from .configs import Config, uses_descriptors
from .eight_bits import check_preact
from .launch import (
    SAME_BITS,
    TRITON_DTYPES,
    Described,
    Layout,
    Plan,
    cdiv,
    check_matrix,
    describable,
    described,
    dot_precision,
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
    product_layouts,
    rank_of,
    readable_product,
)
from .reference import ffn as composed
from .reference.fp8 import TILE, scale_count
from .tiles import column_parts, dot_kn, tile_of
from .tuning import config_for


@triton.jit
def store_dact(
    d,
    gate,
    up,
    dpreact,
    hidden,
    offs_m,
    offs_n,
    M,
    N,
    stride_dm,
    stride_hm,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """What becomes of a tile of dhidden, with its gate and up in fp32 (the gate is unused without
    one)."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    pointers = dpreact + rows * stride_dm + offs_n[None, :]
    if GATED:
        activated = act(gate, KIND)
        value = activated * up
        d_gate = d * up * act_grad(gate, KIND)
        d_up = d * activated
        tl.store(pointers, d_gate.to(DTYPE), mask=mask)
        tl.store(pointers + N, d_up.to(DTYPE), mask=mask)
    else:
        value = act(up, KIND)
        d_up = d * act_grad(up, KIND)
        tl.store(pointers, d_up.to(DTYPE), mask=mask)
    if STORE_HIDDEN:
        tl.store(hidden + rows * stride_hm + offs_n[None, :], value.to(DTYPE), mask=mask)


@triton.jit
def _load_preact(
    preact,
    scales,
    offs_m,
    offs_n,
    first,
    first_scale,
    M,
    N,
    stride_pm,
    stride_sm,
    FP8: tl.constexpr,
    TILE_N: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """A tile of the gate or of the up, fp32."""
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    rows = offs_m.to(tl.int64)[:, None]
    value = tl.load(preact + rows * stride_pm + first + offs_n[None, :], mask=mask, other=0.0)
    value = value.to(tl.float32)
    if FP8:
        column = first_scale + tl.min(offs_n, 0) // TILE_N  # these columns share a scale
        value *= tl.load(scales + rows * stride_sm + column, mask=(offs_m < M)[:, None], other=0.0)
        value = value.to(DTYPE).to(tl.float32)
    return value


@triton.jit
def _dact_part(
    d,
    preact,
    scales,
    dpreact,
    hidden,
    offs_m,
    offs_n,
    M,
    N,
    stride_pm,
    stride_sm,
    stride_dm,
    stride_hm,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    FP8: tl.constexpr,
    TILE_N: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The epilogue of some columns: gate and up are loaded when their turn comes."""
    gate = _load_preact(
        preact, scales, offs_m, offs_n, 0, 0, M, N, stride_pm, stride_sm, FP8, TILE_N, DTYPE
    )
    up = gate
    if GATED:
        up = _load_preact(
            preact, scales, offs_m, offs_n, N, tl.cdiv(N, TILE_N), M, N,
            stride_pm, stride_sm, FP8, TILE_N, DTYPE,
        )  # fmt: skip
    store_dact(
        d, gate, up, dpreact, hidden, offs_m, offs_n, M, N,
        stride_dm, stride_hm, KIND, GATED, STORE_HIDDEN, DTYPE,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def ffn_dact_kernel(
    dy,
    down,
    preact,
    scales,
    u,
    a,
    dpreact,
    hidden,
    M,
    N,
    K,
    R,
    stride_ym,
    stride_wk,
    stride_pm,
    stride_sm,
    stride_dm,
    stride_hm,
    stride_ua,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    FP8: tl.constexpr,
    TILE_N: tl.constexpr,
    DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
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
    d = dot_kn(
        dy, down, row, col, M, N, K, stride_ym, stride_wk,
        BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION, DESC,
    )  # fmt: skip
    if u is not None:
        d = add_low_rank_kn(
            d, u, a, row, col, M, N, R, stride_ua, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION
        )
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    parts = column_parts(d, BLOCK_M, BLOCK_N, SPLIT)
    offs_m = row + tl.arange(0, BLOCK_M)
    for part in tl.static_range(SPLIT):
        offs_n = col + part * WIDTH + tl.arange(0, WIDTH)
        _dact_part(
            parts[part], preact, scales, dpreact, hidden, offs_m, offs_n, M, N,
            stride_pm, stride_sm, stride_dm, stride_hm,
            KIND, GATED, STORE_HIDDEN, FP8, TILE_N, DTYPE,
        )  # fmt: skip


@dataclass(frozen=True)
class DownLayouts:
    """dy and the down projection's weight as a launch is planned by them.

    Attributes:
        dy: `[rows, h]`.
        down: `[h, f]`.
        product: what adapters add to dhidden, or None.

    Raises:
        TypeError: for a dtype no kernel takes, or several.
        ValueError: for shapes or devices that do not fit.
    """

    dy: Layout
    down: Layout
    product: ProductLayouts = None

    def __post_init__(self) -> None:
        dy, down = self.dy, self.down
        check_matrix("dy", dy, (dy.shape[0], down.shape[0]), dy)
        check_matrix("down", down, (down.shape[0], down.shape[1]), dy)
        if down.dtype != dy.dtype:
            raise TypeError(f"down is {down.dtype}, expected the dtype of dy ({dy.dtype})")
        assert self.rank is None or self.rank > 0

    @cached_property
    def rank(self) -> int | None:
        """Of what is added."""
        rows, width = self.dy.shape[0], self.down.shape[1]
        return rank_of("product", self.product, rows, width, self.dy, tall=False)

    @property
    def stride_ua(self) -> int | None:
        """From row to row of the product's left matrix."""
        return None if self.product is None else stride(self.product[0])

    @property
    def aligned(self) -> bool:
        """Whether descriptors could describe both."""
        return describable(self.dy) and describable(self.down)

    def blocks(self, config: Config, desc: bool) -> tuple[Described | None, ...]:
        """How both are described."""
        if not desc:
            return None, None
        m, n, k = config.block_m, config.block_n, config.block_k
        return described(self.dy, m, k), described(self.down, k, n)


def bias_gradient(dpreact: Tensor, need: bool) -> Tensor | None:
    """The sum over rows in fp32, where it is wanted."""
    return dpreact.sum(0, dtype=torch.float32) if need else None


@planned
def _plan(
    dy: Layout,
    down: Layout,
    preact: Layout,
    dpreact: Layout,
    scales: Layout | None,
    kind: str,
    gated: bool,
    need_hidden: bool,
    config: Config | None,
    product: ProductLayouts,
) -> Plan:
    downs = DownLayouts(dy, down, product)
    M, (K, N) = dy.shape[0], down.shape
    width, fp8 = N * (2 if gated else 1), scales is not None
    check_kind(kind, gated, width)
    check_dpreact(dpreact, (M, width), dy)
    check_preact(preact, scales, (M, width), scale_count(N) * (1 + gated), dy)
    if config is None:
        config = config_for("ffn_dact", dy, N, gated, TILE if fp8 else None, downs.aligned)
    desc = uses_descriptors(dy) and downs.aligned
    flags = {
        "KIND": kind,
        "GATED": gated,
        "STORE_HIDDEN": need_hidden,
        "FP8": fp8,
        "TILE_N": TILE,
        "DTYPE": TRITON_DTYPES[dy.dtype],
        "PRECISION": dot_precision(dy.dtype),
        "DESC": desc,
        "EVEN_K": K % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "BLOCK_R": block_r(downs.rank),
        "GROUP_M": config.group_m,
        "SPLIT": config.split,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **SAME_BITS,
    }
    return Plan(
        (cdiv(M, config.block_m) * cdiv(N, config.block_n),),
        downs.blocks(config, desc),
        (
            M,
            N,
            K,
            downs.rank,
            *map(stride, (dy, down, preact, scales, dpreact)),
            N,
            downs.stride_ua,
        ),
        flags,
    )


def check_dpreact(dpreact: Layout, shape: tuple[int, int], like: Layout) -> None:
    """Raise unless the kernels can write dpreact: of that shape, in like's dtype, on its device."""
    check_matrix("dpreact", dpreact, shape, like)
    if dpreact.dtype != like.dtype:
        raise TypeError(f"dpreact is {dpreact.dtype}, expected the dtype of dy ({like.dtype})")


def ffn_dact(
    dy: Tensor,
    down: Tensor,
    preact: Tensor,
    kind: str,
    gated: bool,
    dpreact: Tensor,
    *,
    scales: Tensor | None = None,
    need_hidden: bool = True,
    need_dbias: bool = False,
    product: Product = None,
    addend: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Down projection and activation backward. As `reference.ffn.ffn_dact`, which runs where there
    is an addend.

    Args:
        config: tile sizes; None for the table's.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for shapes, strides or devices that do not fit.
    """
    if addend is not None:
        return composed.ffn_dact(
            dy, down, preact, kind, gated, dpreact, scales=scales, need_hidden=need_hidden,
            need_dbias=need_dbias, product=product, addend=addend,
        )  # fmt: skip
    dy, down = readable(dy), readable(down)
    if scales is None:
        preact = readable(preact)
    product = readable_product(product)
    plan = _plan(
        layout(dy), layout(down), *layouts(preact, dpreact, scales),
        kind, gated, need_hidden, config, product_layouts(product),
    )  # fmt: skip
    M, N, *_ = plan.numbers
    hidden = dy.new_empty(M, N) if need_hidden else None
    dy_block, down_block = plan.blocks
    with on_device(dy):
        ffn_dact_kernel[plan.grid](
            operand(dy, dy_block),
            operand(down, down_block),
            preact,
            scales,
            *(product or (None, None)),
            dpreact,
            hidden,
            *plan.numbers,
            **plan.flags,
        )
    return hidden, bias_gradient(dpreact, need_dbias)
