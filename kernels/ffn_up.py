"""The FFN's first projections with the activation in the epilogue: one kernel.

    gate = n Wgate^T + b    up = n Wup^T + b    hidden = act(gate) * up      n: the normed input

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

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import act, check_kind
from .configs import Config, uses_descriptors
from .eight_bits import check_eight_bits
from .launch import (
    SAME_BITS,
    TRITON_DTYPES,
    cdiv,
    check_matrix,
    describable,
    descriptor,
    dot_precision,
    on_device,
    readable,
)
from .reference.fp8 import LARGEST, TILE, scale_count
from .tiles import column_parts, load_tile, tile_of
from .tuning import config_for


@triton.jit
def dot_up(
    x,
    w_gate,
    w_up,
    row,
    col,
    M,
    N,
    K,
    stride_xm,
    stride_gn,
    stride_un,
    GATED: tl.constexpr,
    PACKED: tl.constexpr,
    DESC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of `x @ w_gate.T` and of `x @ w_up.T`, in fp32; twice the same without a gate."""
    tl.assume(K > 0)  # without it ptxas serialises every wgmma of the loop (Triton 3.6, sm_90)
    if PACKED:
        both = tl.zeros((BLOCK_M, 2 * BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x_tile = x.load([row, k])  # [BLOCK_M, BLOCK_K]
            w_tile = w_gate.load([0, col, k]).reshape(2 * BLOCK_N, BLOCK_K)
            both = tl.dot(x_tile, w_tile.T, both, input_precision=PRECISION)
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
    hidden,
    preact,
    scales,
    M,
    N,
    K,
    stride_xm,
    stride_gn,
    stride_un,
    stride_hm,
    stride_pm,
    stride_sm,
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
    GROUP_M: tl.constexpr,
    SPLIT: tl.constexpr,
):
    pid_m, pid_n = tile_of(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
    acc_gate, acc_up = dot_up(
        x, w_gate, w_up, row, col, M, N, K, stride_xm, stride_gn, stride_un,
        GATED, PACKED, DESC, BLOCK_M, BLOCK_N, BLOCK_K, EVEN_K, PRECISION,
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


def check_bias(bias: Tensor, weight: Tensor) -> Tensor:
    """The bias, contiguous.

    Raises:
        ValueError: if it is not one of that weight's: by length, dtype or device.
    """
    if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype or bias.device != weight.device:
        raise ValueError(
            f"a bias is {bias.dtype} {list(bias.shape)} on {bias.device}, expected {weight.dtype} "
            f"[{len(weight)}] on {weight.device}"
        )
    return bias.contiguous()


class UpWeights:
    """The first projections' weights as the kernels take them.

    Args:
        x: `[rows, h]`, their input.
        weights: gate and up, or up alone, `[f, h]`; or one stacked `[2 f, h]`.
        biases: one a weight, or None each.
        gated: whether there is a gate.
        descriptors: whether the device loads through descriptors.

    Raises:
        TypeError: for a dtype no kernel takes, or several.
        ValueError: for shapes or devices that do not fit.
    """

    def __init__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        gated: bool,
        descriptors: bool,
    ) -> None:
        x, weights = readable(x), [readable(weight) for weight in weights]
        rows, self.K = x.shape
        check_matrix("x", x, (rows, self.K), x)
        self.stacked = gated and len(weights) == 1
        for weight in weights:
            width = weight.shape[0]
            check_matrix("a weight of the first projection", weight, (width, self.K), x)
            if weight.dtype != x.dtype or width != weights[0].shape[0]:
                raise ValueError(
                    f"a weight of the first projection is {weight.dtype} {list(weight.shape)}, "
                    f"expected {x.dtype} {list(weights[0].shape)}"
                )
        if len(weights) != (2 if gated and not self.stacked else 1):
            raise ValueError(f"weights holds {len(weights)} tensors, expected gate and up, or one")
        if self.stacked and weights[0].shape[0] % 2:
            raise ValueError(f"the stacked weight has {len(weights[0])} rows, expected gate and up")
        if len(biases) != len(weights) or len({bias is None for bias in biases}) > 1:
            raise ValueError("biases hold some and lack some, expected one a weight, or no one")
        biases = [
            None if bias is None else check_bias(bias, weight)
            for bias, weight in zip(biases, weights, strict=True)
        ]
        self.N = weights[0].shape[0] // (2 if self.stacked else 1)
        self.aligned = all(describable(t) for t in (x, *weights))
        self.desc = descriptors and self.aligned
        self.packed = self.desc and self.stacked
        if self.stacked:
            self.gate, self.up = weights[0][: self.N], weights[0][self.N :]
        else:
            self.gate, self.up = weights[0], weights[-1]
        bias = biases[0]
        self.has_bias = bias is not None
        self.b_gate, self.b_up = bias, biases[-1]
        if bias is not None and self.stacked:
            self.b_gate, self.b_up = bias[: self.N], bias[self.N :]
        self.x = x

    def operands(self, config: Config) -> tuple[Any, Any, Any]:
        """x, gate and up as pointers or descriptors of a configuration's blocks."""
        if not self.desc:
            return self.x, self.gate, self.up
        m, n, k = config.block_m, config.block_n, config.block_k
        x = descriptor(self.x, m, k)
        if self.packed:
            both = self.gate.as_strided(
                (2, self.N, self.K), (self.N * self.gate.stride(0), *self.gate.stride())
            )
            packed = descriptor(both, 2, n, k)
            return x, packed, packed
        return x, descriptor(self.gate, n, k), descriptor(self.up, n, k)

    def flags(self, config: Config) -> dict[str, Any]:
        """The constexprs that describe the weights and the tiles."""
        return _flags(config, self.x.dtype, self.has_bias, self.packed, self.desc, self.K)


@functools.cache
def _flags(
    config: Config, dtype: torch.dtype, has_bias: bool, packed: bool, desc: bool, K: int
) -> dict[str, Any]:
    return {
        "HAS_BIAS": has_bias,
        "DTYPE": TRITON_DTYPES[dtype],
        "PRECISION": dot_precision(dtype),
        "PACKED": packed,
        "DESC": desc,
        "EVEN_K": K % config.block_k == 0,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_K": config.block_k,
        "GROUP_M": config.group_m,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        **SAME_BITS,
    }


def ffn_up(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kind: str,
    gated: bool,
    *,
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
    operands = UpWeights(x, weights, biases, gated, uses_descriptors(x))
    M, N, K = len(x), operands.N, operands.K
    check_kind(kind, gated, N * (2 if gated else 1))
    fp8 = scales is not None
    if config is None:
        config = config_for("ffn_up", x, N, gated, TILE if fp8 else None, operands.aligned)
    if preact is not None:
        _check_preact(preact, scales, M, N * (2 if gated else 1), scale_count(N) * (1 + gated), x)
    hidden = x.new_empty(M, N) if need_hidden else None
    grid = (cdiv(M, config.block_m) * cdiv(N, config.block_n),)
    with on_device(x):
        ffn_up_kernel[grid](
            *operands.operands(config),
            operands.b_gate,
            operands.b_up,
            hidden,
            preact,
            scales,
            M,
            N,
            K,
            operands.x.stride(0),
            operands.gate.stride(0),
            operands.up.stride(0),
            N,
            0 if preact is None else preact.stride(0),
            0 if scales is None else scales.stride(0),
            KIND=kind,
            GATED=gated,
            STORE_HIDDEN=need_hidden,
            STORE_PREACT=preact is not None,
            FP8=fp8,
            TILE_N=TILE,
            LARGEST_FP8=LARGEST,
            SPLIT=1 if fp8 else config.split,  # a scale spans 128 columns
            **operands.flags(config),
        )
    return hidden


def _check_preact(
    preact: Tensor, scales: Tensor | None, rows: int, width: int, count: int, like: Tensor
) -> None:
    """Raise unless preact (in eight bits if there are scales) has the place it needs."""
    if scales is not None:
        check_eight_bits(preact, scales, rows, width, count, like)
    else:
        check_matrix("preact", preact, (rows, width), like)
        if preact.dtype != like.dtype:
            raise TypeError(f"preact is {preact.dtype}, expected {like.dtype}")
