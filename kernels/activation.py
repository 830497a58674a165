"""The FFN's nonlinearity inside a kernel, and alone.

    gated  hidden = act(gate) * up        d_up = d * act(gate)     d_gate = d * up * act'(gate)
    plain  hidden = act(up)               d_up = d * act'(up)

| kept | recomputed | GEMMs |
|---|---|---|
| the pre-activation, or nothing | hidden | none |

In fp32, from a pre-activation that was rounded to the tensors' dtype: kept or rebuilt, it has the
same bits, and so has what is made of it.

    silu       x s(x)                                s + x s (1 - s)            s: sigmoid
    gelu_tanh  x s(2u), u = c (x + 0.044715 x^3)     s(2u) (1 + x s(-2u) 2u')   c = sqrt(2 / pi)
    gelu       x P(x)                                P + x p                    P, p: normal

(1 - s(2u) is written s(-2u), which does not cancel where s(2u) is near 1: its factor may be large.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .eight_bits import check_preact
from .launch import SAME_BITS, Layout, Plan, cdiv, layout, layouts, on_device, planned, stride
from .reference.fp8 import TILE, scale_count

#: Names of the activations, as in `reference.activation.ACTIVATIONS`.
KINDS = ("silu", "gelu", "gelu_tanh", "relu", "relu2")

#: Columns of a program of the elementwise kernel.
BLOCK_N = 1024


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def act(x, KIND: tl.constexpr):
    """act(x), fp32."""
    if KIND == "silu":
        y = x * _sigmoid(x)
    elif KIND == "gelu_tanh":
        y = x * _sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    elif KIND == "gelu":
        y = x * (0.5 + 0.5 * tl.erf(x * 0.7071067811865476))
    elif KIND == "relu2":
        y = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    else:
        tl.static_assert(KIND == "relu")
        y = tl.maximum(x, 0.0)
    return y


@triton.jit
def act_grad(x, KIND: tl.constexpr):
    """act'(x), fp32."""
    if KIND == "silu":
        s = _sigmoid(x)
        y = s + x * s * (1.0 - s)
    elif KIND == "gelu_tanh":
        u2 = 1.5957691216057308 * (x + 0.044715 * x * x * x)
        slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
        y = _sigmoid(u2) * (1.0 + x * _sigmoid(-u2) * slope)
    elif KIND == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476) + x * density
    elif KIND == "relu2":
        y = 2.0 * tl.maximum(x, 0.0)
    else:
        tl.static_assert(KIND == "relu")
        y = tl.where(x > 0.0, 1.0, 0.0)
    return y


@triton.jit
def activation_kernel(
    preact,
    scales,
    hidden,
    N,
    stride_pm,
    stride_sm,
    stride_hm,
    KIND: tl.constexpr,
    GATED: tl.constexpr,
    FP8: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    first = tl.cdiv(N, TILE_N)
    tile = row * stride_sm + offs_n // TILE_N
    gate = tl.load(preact + row * stride_pm + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    if FP8:
        gate *= tl.load(scales + tile, mask=mask_n, other=0.0)
        gate = gate.to(hidden.dtype.element_ty).to(tl.float32)
    value = act(gate, KIND)
    if GATED:
        up = tl.load(preact + row * stride_pm + N + offs_n, mask=mask_n, other=0.0).to(tl.float32)
        if FP8:
            up *= tl.load(scales + tile + first, mask=mask_n, other=0.0)
            up = up.to(hidden.dtype.element_ty).to(tl.float32)
        value *= up
    tl.store(hidden + row * stride_hm + offs_n, value.to(hidden.dtype.element_ty), mask=mask_n)


def check_kind(kind: str, gated: bool, width: int) -> int:
    """The hidden's width, from the pre-activation's.

    Raises:
        ValueError: for an unknown activation, or halves that are not equal.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    if gated and width % 2:
        raise ValueError(f"preact has {width} columns, expected an even number: gate and up")
    return width // 2 if gated else width


@planned
def _plan(preact: Layout, scales: Layout | None, kind: str, gated: bool) -> Plan:
    rows, width = preact.shape
    N = check_kind(kind, gated, width)
    count = scale_count(N) * (2 if gated else 1)
    check_preact(preact, scales, (rows, width), count, preact)
    flags = {
        "KIND": kind,
        "GATED": gated,
        "FP8": scales is not None,
        "TILE_N": TILE,
        "BLOCK_N": BLOCK_N,
        **SAME_BITS,
    }
    return Plan((rows, cdiv(N, BLOCK_N)), (), (N, stride(preact), stride(scales), N), flags)


def activation_forward(
    preact: Tensor,
    kind: str,
    gated: bool,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The activated hidden. Arguments and result as `reference.activation.activation_forward`."""
    plan = _plan(layout(preact), *layouts(scales), kind, gated)
    rows, N = plan.grid[0], plan.numbers[0]
    hidden = preact.new_empty(rows, N, dtype=dtype if scales is not None else preact.dtype)
    with on_device(preact):
        activation_kernel[plan.grid](preact, scales, hidden, *plan.numbers, **plan.flags)
    return hidden
