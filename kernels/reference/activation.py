"""The FFN's nonlinearity, gated or plain, forward and backward.

    gated  hidden = act(gate) * up        d_up = d * act(gate)     d_gate = d * up * act'(gate)
    plain  hidden = act(up)               d_up = d * act'(up)

| kept | recomputed | GEMMs |
|---|---|---|
| the pre-activation, or nothing | hidden, inside the backward | none |

SwiGLU and GeGLU: Shazeer 2020. ReLU^2: So et al. 2021 (Primer).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .fp8 import dequantize

aten = torch.ops.aten


def _relu2(x: Tensor) -> Tensor:
    return F.relu(x).square_()


def _relu2_backward(grad: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor:
    return torch.mul(grad, F.relu(x).mul_(2), out=grad_input)


#: name -> (act(x), fresh; and grad * act'(x), written to `grad_input`, which may be grad or x).
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[..., Tensor]]] = {
    "silu": (F.silu, aten.silu_backward.grad_input),
    "gelu": (F.gelu, aten.gelu_backward.grad_input),
    "gelu_tanh": (
        partial(F.gelu, approximate="tanh"),
        partial(aten.gelu_backward.grad_input, approximate="tanh"),
    ),
    "relu": (F.relu, partial(aten.threshold_backward.grad_input, threshold=0)),
    "relu2": (_relu2, _relu2_backward),
}


def activation_forward(
    preact: Tensor,
    kind: str,
    gated: bool,
    scales: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The activated hidden.

    Args:
        preact: `[rows, 2 f]` (gate, then up) if gated, else `[rows, f]`.
        kind: a key of `ACTIVATIONS`.
        gated: whether the first half gates the second.
        scales: with a preact in e4m3: its scales (see `fp8.py`).
        dtype: with scales: of the result.

    Returns:
        `[rows, f]`, fresh, in preact's dtype.
    """
    if scales is not None:
        out = preact.new_empty(preact.shape, dtype=dtype)
        preact = dequantize(preact, scales, 2 if gated else 1, out)
    act = ACTIVATIONS[kind][0]
    if not gated:
        return act(preact)
    gate, up = preact.chunk(2, -1)
    return act(gate).mul_(up)


def activation_backward(
    dhidden: Tensor, preact: Tensor, kind: str, gated: bool, out: Tensor
) -> Tensor:
    """The hidden again, and the gradient of the pre-activation.

    Args:
        dhidden: `[rows, f]`; only read.
        preact: as in the forward pass; only read, unless `out` is the same tensor.
        kind: a key of `ACTIVATIONS`.
        gated: as in the forward pass.
        out: shaped as preact, written with its gradient; may be preact itself.

    Returns:
        hidden `[rows, f]`, the same bits as the forward pass gave.
    """
    act, act_backward = ACTIVATIONS[kind]
    if not gated:
        hidden = act(preact)
        act_backward(dhidden, preact, grad_input=out)
        return hidden
    gate, up = preact.chunk(2, -1)
    d_gate, d_up = out.chunk(2, -1)
    activated = act(gate)
    hidden = activated * up
    torch.mul(dhidden, up, out=d_up)  # d_up may be up, and is room for the gate's gradient first
    act_backward(d_up, gate, grad_input=d_gate)
    torch.mul(dhidden, activated, out=d_up)
    return hidden
