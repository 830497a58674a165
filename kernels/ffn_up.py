"""The FFN's first projections with the activation in the epilogue: one kernel.

    gate = n Wgate^T + b    up = n Wup^T + b    hidden = act(gate) * up      n: the normed input

Adapters add a product to each, `gate += t Vgate^T` (see `low_rank.py`), in the same accumulators.

| kept | recomputed | GEMMs |
|---|---|---|
| gate and up, if the policy says so: as they are, or in e4m3 with a scale for each 1 x 128 |
hidden, and gate and up if they were not kept | 2 (1 without a gate) |

Both accumulators stand in registers, so gate and up reach memory only where somebody keeps them.
They are rounded to the tensors' dtype before the activation: what the backward pass reads, or
rebuilds with the same loop, is what the forward pass computed with. That is also why a rebuild
runs this kernel (without its activation) and not the library's GEMM, whose sums have another order.

With a stacked weight, seen as `[2, N, K]`, one descriptor loads a tile of both and one wide dot
multiplies it; two weights take two loads and two dots.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .activation import act, check_kind
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
    add_low_rank,
    block_r,
    operands,
    product_layouts,
    rank_of,
    readable_product,
)
from .reference.fp8 import LARGEST, TILE, scale_count
from .tiles import column_parts, load_tile, tile_of
from .tuning import config_for


@triton.jit
def dot_up(
    x,
    w_gate,
    w_up,
    t_gate,
    v_gate,
    t_up,
    v_up,
    row,
    col,
    M,
    N,
    K,
    R_gate,
    R_up,
    stride_xm,
    stride_gn,
    stride_un,
    stride_tm,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
    DESC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of `x @ w_gate.T` and of `x @ w_up.T`, in fp32; twice the same without a gate.

    Where t and v are there, `t @ v.T` is added.
    """
    tl.assume(K > 0)  # without it ptxas serialises every wgmma of the loop (Triton 3.6, sm_90)
    if PACKED:
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([row, k])  # [BLOCK_M, BLOCK_K]
            w_tile = w_gate.load([0, col, k]).reshape(2 * BLOCK_N, BLOCK_K)
            both = tl.dot(x_tile, w_tile.T, both, input_precision=PRECISION)
        if t_gate is not None:
            both = add_low_rank(
                both, t_gate, v_gate, row, col, M, N, R_gate, stride_tm,
                2, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
        acc_gate, acc_up = both.reshape(BLOCK_M, 2, BLOCK_N).permute(0, 2, 1).split()
    elif GATED:
        acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = load_tile(
                x, row, k, M, K, stride_xm, BLOCK_M, BLOCK_K, False, EVEN_K, DESC
            )  # [BLOCK_M, BLOCK_K]
            g_tile = load_tile(
                w_gate, col, k, N, K, stride_gn, BLOCK_N, BLOCK_K, False, EVEN_K, DESC
            )  # [BLOCK_N, BLOCK_K]
            acc_gate = tl.dot(x_tile, g_tile.T, acc_gate, input_precision=PRECISION)
            u_tile = load_tile(
                w_up, col, k, N, K, stride_un, BLOCK_N, BLOCK_K, False, EVEN_K, DESC
            )  # [BLOCK_N, BLOCK_K]
            acc_up = tl.dot(x_tile, u_tile.T, acc_up, input_precision=PRECISION)
        if t_gate is not None:
            acc_gate = add_low_rank(
                acc_gate, t_gate, v_gate, row, col, M, N, R_gate, stride_tm,
                1, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
        if t_up is not None:
            acc_up = add_low_rank(
                acc_up, t_up, v_up, row, col, M, N, R_up, stride_tm,
                1, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
    else:
        acc_up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = load_tile(
                x, row, k, M, K, stride_xm, BLOCK_M, BLOCK_K, False, EVEN_K, DESC
            )  # [BLOCK_M, BLOCK_K]
            u_tile = load_tile(
                w_up, col, k, N, K, stride_un, BLOCK_N, BLOCK_K, False, EVEN_K, DESC
            )  # [BLOCK_N, BLOCK_K]
            acc_up = tl.dot(x_tile, u_tile.T, acc_up, input_precision=PRECISION)
        if t_up is not None:
            acc_up = add_low_rank(
                acc_up, t_up, v_up, row, col, M, N, R_up, stride_tm,
                1, BLOCK_M, BLOCK_N, BLOCK_R, PRECISION,
            )  # fmt: skip
        acc_gate = acc_up
    return acc_gate, acc_up


@triton.jit
def add_bias(acc, bias, offs_n, N, HAS_BIAS: tl.constexpr):
    """acc plus a row, fp32."""
    if HAS_BIAS:
        acc += tl.load(bias + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def _store_preact(
    value,
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
    LARGEST_FP8: tl.constexpr,
):
    """A tile of the gate or of the up, whose columns and scales begin at `first`, `first_scale`."""
    mask_m = offs_m < M
    rows = offs_m.to(tl.int64)
    if FP8:
        tl.static_assert(value.shape[1] == TILE_N)
        largest = tl.max(tl.abs(value), 1)  # [BLOCK_M]
        scale = tl.where(largest > 0.0, largest / LARGEST_FP8, 1.0)
        column = first_scale + tl.min(offs_n, 0) // TILE_N
        tl.store(scales + rows * stride_sm + column, scale, mask=mask_m)
        value = value / scale[:, None]
    pointers = preact + rows[:, None] * stride_pm + first + offs_n[None, :]
    mask = mask_m[:, None] & (offs_n < N)[None, :]
    tl.store(pointers, value.to(preact.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])
def ffn_up_kernel(
    x,
    w_gate,
    w_up,
    b_gate,
    b_up,
    t_gate,
    v_gate,
    t_up,
    v_up,
    hidden,
    preact,
    scales,
    M,
    N,
    K,
    R_gate,
    R_up,
    stride_xm,
    stride_gn,
    stride_un,
    stride_hm,
    stride_pm,
    stride_sm,
    stride_tm,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    STORE_HIDDEN: tl.constexpr,
    STORE_PREACT: tl.constexpr,
    FP8: tl.constexpr,
    TILE_N: tl.constexpr,
    LARGEST_FP8: tl.constexpr,
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
    WIDTH: tl.constexpr = BLOCK_N // SPLIT
    gates = column_parts(acc_gate, BLOCK_M, BLOCK_N, SPLIT)
    ups = column_parts(acc_up, BLOCK_M, BLOCK_N, SPLIT)
    offs_m = row + tl.arange(0, BLOCK_M)
    for part in tl.static_range(SPLIT):
        offs_n = col + part * WIDTH + tl.arange(0, WIDTH)
        up = add_bias(ups[part], b_up, offs_n, N, HAS_BIAS).to(DTYPE).to(tl.float32)
        if STORE_PREACT:
            first, first_scale = 0, 0
            if GATED:
                first, first_scale = N, tl.cdiv(N, TILE_N)
            _store_preact(
                up, preact, scales, offs_m, offs_n, first, first_scale, M, N,
                stride_pm, stride_sm, FP8, TILE_N, LARGEST_FP8,
            )  # fmt: skip
        if GATED:
            gate = add_bias(gates[part], b_gate, offs_n, N, HAS_BIAS).to(DTYPE).to(tl.float32)
            if STORE_PREACT:
                _store_preact(
                    gate, preact, scales, offs_m, offs_n, 0, 0, M, N,
                    stride_pm, stride_sm, FP8, TILE_N, LARGEST_FP8,
                )  # fmt: skip
            value = act(gate, KIND) * up
        else:
            value = act(up, KIND)
        if STORE_HIDDEN:
            pointers = hidden + offs_m.to(tl.int64)[:, None] * stride_hm + offs_n[None, :]
            mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
            tl.store(pointers, value.to(DTYPE), mask=mask)


def check_bias(bias: Layout, weight: Layout) -> None:
    """Raise a ValueError unless a bias is that weight's: by length, dtype and device."""
    if (bias.shape, bias.dtype, bias.device) != (weight.shape[:1], weight.dtype, weight.device):
        raise ValueError(
            f"a bias is {bias.dtype} {list(bias.shape)} on {bias.device}, expected {weight.dtype} "
            f"[{weight.shape[0]}] on {weight.device}"
        )


@dataclass(frozen=True)
class UpLayouts:
    """The first projections' input and weights as a launch is planned by them.

    Attributes:
        x: `[rows, h]`, their input.
        weights: gate and up, or up alone, `[f, h]`; or one stacked `[2 f, h]`.
        biases: one a weight, or None each.
        gated: whether there is a gate.
        products: what adapters add to each weight's output, or nothing at all.

    Raises:
        TypeError: for a dtype no kernel takes, or several.
        ValueError: for shapes or devices that do not fit.
    """

    x: Layout
    weights: tuple[Layout, ...]
    biases: tuple[Layout | None, ...]
    gated: bool
    products: tuple[ProductLayouts, ...] = ()

    def __post_init__(self) -> None:
        x, weights = self.x, self.weights
        if len(weights) != (2 if self.gated and not self.stacked else 1):
            raise ValueError(f"weights holds {len(weights)} tensors, expected gate and up, or one")
        first = weights[0]
        check_matrix("x", x, (x.shape[0], x.shape[1]), x)
        for weight in weights:
            width = weight.shape[0]
            check_matrix("a weight of the first projection", weight, (width, x.shape[1]), x)
            if weight.dtype != x.dtype or width != first.shape[0]:
                raise ValueError(
                    f"a weight of the first projection is {weight.dtype} {list(weight.shape)}, "
                    f"expected {x.dtype} {list(first.shape)}"
                )
        if self.stacked and first.shape[0] % 2:
            raise ValueError(f"the stacked weight has {first.shape[0]} rows, expected gate and up")
        if len(self.biases) != len(weights) or len({b is None for b in self.biases}) > 1:
            raise ValueError("biases hold some and lack some, expected one a weight, or no one")
        for bias, weight in zip(self.biases, weights, strict=True):
            if bias is not None:
                check_bias(bias, weight)
        if self.products and len(self.products) != len(weights):
            raise ValueError(
                f"products holds {len(self.products)}, expected one a weight ({len(weights)})"
            )
        if len({stride(product[0]) for product in self.products if product}) > 1:
            raise ValueError("the left matrices of products have rows of different strides")
        assert self.ranks is not None

    @property
    def sizes(self) -> tuple[int, int, int]:
        """M, N and K."""
        return self.x.shape[0], self.weights[0].shape[0] // (1 + self.stacked), self.x.shape[1]

    @cached_property
    def ranks(self) -> tuple[int | None, int | None]:
        """Of what is added to the gate and to the up."""
        found = [
            rank_of("a product", product, self.x.shape[0], weight.shape[0], self.x, tall=True)
            for product, weight in zip(self.products, self.weights, strict=False)
        ]
        return (found[0], found[-1]) if found else (None, None)

    @property
    def stride_tm(self) -> int | None:
        """From row to row of the left matrices of products."""
        return next((stride(product[0]) for product in self.products if product), None)

    @property
    def stacked(self) -> bool:
        """Whether gate and up are one weight."""
        return self.gated and len(self.weights) == 1

    @property
    def aligned(self) -> bool:
        """Whether descriptors could describe everything."""
        return describable(self.x) and all(map(describable, self.weights))

    def blocks(self, config: Config, desc: bool) -> tuple[Described | None, ...]:
        """How x, gate and up are described; a stacked weight as `[2, N, K]`, in gate's place."""
        if not desc:
            return None, None, None
        m, n, k = config.block_m, config.block_n, config.block_k
        x = described(self.x, m, k)
        gate, up = self.weights[0], self.weights[-1]
        if self.stacked:
            _, N, K = self.sizes
            both = gate._replace(shape=(2, N, K), strides=(N * gate.strides[0], *gate.strides))
            packed = described(both, 2, n, k)
            return x, packed, packed
        return x, described(gate, n, k), described(up, n, k)

    def flags(self, config: Config, desc: bool) -> dict[str, Any]:
        """The constexprs that describe the weights and the tiles."""
        return {
            "GATED": self.gated,
            "HAS_BIAS": self.biases[0] is not None,
            "DTYPE": TRITON_DTYPES[self.x.dtype],
            "PRECISION": dot_precision(self.x.dtype),
            "PACKED": desc and self.stacked,
            "DESC": desc,
            "EVEN_K": self.x.shape[1] % config.block_k == 0,
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": config.block_k,
            "BLOCK_R": block_r(*self.ranks),
            "GROUP_M": config.group_m,
            "SPLIT": config.split,
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            **SAME_BITS,
        }


Pair = tuple[Tensor | None, Tensor | None]


def gate_and_up(tensors: Sequence[Tensor | None], gated: bool, whole: bool = False) -> Pair:
    """The gate's and the up's part of weights or biases; twice the same without a gate.

    Args:
        tensors: gate and up, up alone, or one stacked.
        gated: whether there is a gate.
        whole: whether a stacked one is taken as it is: by a descriptor of both.
    """
    first, last = tensors[0], tensors[-1]
    if gated and first is not None and len(tensors) == 1 and not whole:
        gate, up = first.chunk(2)
        return gate, up
    return first, last


@planned
def _plan(
    x: Layout,
    weights: tuple[Layout, ...],
    biases: tuple[Layout | None, ...],
    preact: Layout | None,
    scales: Layout | None,
    kind: str,
    gated: bool,
    need_hidden: bool,
    config: Config | None,
    products: tuple[ProductLayouts, ...],
) -> Plan:
    ups = UpLayouts(x, weights, biases, gated, products)
    M, N, K = ups.sizes
    width, fp8 = N * (2 if gated else 1), scales is not None
    check_kind(kind, gated, width)
    if preact is not None:
        check_preact(preact, scales, (M, width), scale_count(N) * (1 + gated), x)
    if config is None:
        config = config_for("ffn_up", x, N, gated, TILE if fp8 else None, ups.aligned)
    desc = uses_descriptors(x) and ups.aligned
    flags = {
        **ups.flags(config, desc),
        "KIND": kind,
        "STORE_HIDDEN": need_hidden,
        "STORE_PREACT": preact is not None,
        "FP8": fp8,
        "TILE_N": TILE,
        "LARGEST_FP8": LARGEST,
    }
    if fp8:
        flags["SPLIT"] = 1  # a scale spans 128 columns
    strides = (stride(x), stride(weights[0]), stride(weights[-1]), N)
    return Plan(
        (cdiv(M, config.block_m) * cdiv(N, config.block_n),),
        ups.blocks(config, desc),
        (M, N, K, *ups.ranks, *strides, stride(preact), stride(scales), ups.stride_tm),
        flags,
    )


def ffn_up(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kind: str,
    gated: bool,
    *,
    products: Sequence[Product] = (),
    preact: Tensor | None = None,
    scales: Tensor | None = None,
    need_hidden: bool = True,
    config: Config | None = None,
) -> Tensor | None:
    """The first projections and the activation. Arguments and result as `reference.ffn.ffn_up`.

    Args:
        config: tile sizes; None for the table's.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for shapes, strides or devices that do not fit.
    """
    x, weights = readable(x), [readable(weight) for weight in weights]
    biases = [None if bias is None else bias.contiguous() for bias in biases]
    products = tuple(map(readable_product, products))
    plan = _plan(
        layout(x), layouts(*weights), layouts(*biases), *layouts(preact, scales),
        kind, gated, need_hidden, config, tuple(map(product_layouts, products)),
    )  # fmt: skip
    M, N, *_ = plan.numbers
    hidden = x.new_empty(M, N) if need_hidden else None
    x_block, gate_block, up_block = plan.blocks
    gate, up = gate_and_up(weights, gated, gate_block is not None)
    with on_device(x):
        ffn_up_kernel[plan.grid](
            operand(x, x_block),
            operand(gate, gate_block),
            operand(up, up_block),
            *gate_and_up(biases, gated),
            *operands(products, gated, gate_block is not None),
            hidden,
            preact,
            scales,
            *plan.numbers,
            **plan.flags,
        )
    return hidden
