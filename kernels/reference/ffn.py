"""The FFN between its normed input and its down projection, forward and backward.

    forward     preact = n Wup^T + b         hidden = act(preact)            (gated: two halves)
    backward    dhidden = dy Wdown           dpreact = act'(preact) o dhidden

| kept | recomputed | GEMMs |
|---|---|---|
| preact, if the policy says so, in eight bits if it says that | hidden always; preact otherwise |
up, and 1 or 2 in backward |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .activation import activation_backward, activation_forward
from .fp8 import dequantize, quantize
from .linear import linear, matmul_transposed
from .norm import accumulate_dtype


def preact_size(weights: Sequence[Tensor]) -> int:
    """Width of the pre-activation that weights side by side give."""
    return sum(weight.shape[0] for weight in weights)


def ffn_up(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kind: str,
    gated: bool,
    *,
    products: Sequence[tuple[Tensor, Tensor] | None] = (),
    preact: Tensor | None = None,
    scales: Tensor | None = None,
    need_hidden: bool = True,
) -> Tensor | None:
    """The first projections and the activation.

    Args:
        x: `[rows, h]`, the normed input.
        weights: `[f, h]` each: gate and up, or up alone; or one stacked `[2 f, h]`.
        biases: one a weight, or None each.
        kind: a key of `ACTIVATIONS`.
        gated: whether there is a gate.
        products: to be added, for each weight `t [rows, r]` and `b [f, r]` (`[2 f, r]`) whose
            `t b^T` it is, or None; none at all without adapters.
        preact: `[rows, 2 f]` (gate, then up) or `[rows, f]`, written; None if nobody wants it.
        scales: with a preact in e4m3: its scales (see `fp8.py`), written.
        need_hidden: whether the hidden is wanted.

    Returns:
        hidden `[rows, f]`, fresh; None where it is not wanted.
    """
    exact = preact
    if exact is None or scales is not None:
        exact = x.new_empty(len(x), preact_size(weights))
    linear(x, weights, biases, exact)
    parts = exact.split([weight.shape[0] for weight in weights], -1)
    for part, pair in zip(parts, products, strict=False):
        if pair is not None:
            torch.addmm(part, pair[0], pair[1].t(), out=part)
    if preact is not None and scales is not None:
        quantize(exact, 2 if gated else 1, preact, scales)
    return activation_forward(exact, kind, gated) if need_hidden else None


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
    product: tuple[Tensor, Tensor] | None = None,
    addend: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Down projection and activation backward.

    Args:
        dy: `[rows, h]`, the gradient of the down projection's output.
        down: `[h, f]`, its weight.
        preact: `[rows, 2 f or f]`; only read, unless dpreact is the same.
        kind: a key of `ACTIVATIONS`.
        gated: whether there is a gate.
        dpreact: shaped as preact, written with its gradient; may be preact.
        scales: with a preact in e4m3: its scales.
        need_hidden: whether the hidden is wanted (the down projection's weight gradient reads it).
        need_dbias: whether the sum of dpreact over rows is wanted.
        product: `u [rows, r]` and `a [r, f]`: `u a` is added to the gradient of the hidden.
        addend: `[rows, f]`, added likewise.

    Returns:
        hidden `[rows, f]`, with the bits of the forward pass, and dbias `[2 f or f]` in fp32 (fp64
        for fp64); None where not wanted.
    """
    if scales is not None:
        preact = dequantize(preact, scales, 2 if gated else 1, dpreact)
    dhidden = matmul_transposed(dy, down.t())
    if product is not None:
        torch.addmm(dhidden, *product, out=dhidden)
    if addend is not None:
        dhidden.add_(addend)
    hidden = activation_backward(dhidden, preact, kind, gated, dpreact)
    dbias = dpreact.sum(0, dtype=accumulate_dtype(dpreact.dtype)) if need_dbias else None
    return hidden if need_hidden else None, dbias


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
    products: Sequence[tuple[Tensor, Tensor] | None] = (),
    need_hidden: bool = True,
    need_dbias: bool = False,
    product: tuple[Tensor, Tensor] | None = None,
    addend: Tensor | None = None,
    strategy: str = "auto",
) -> tuple[Tensor | None, Tensor | None]:
    """`ffn_dact` of a pre-activation that was not kept. Arguments as there and in `ffn_up`.

    Args:
        strategy: means something to the kernels; here there is one way.
    """
    ffn_up(x, weights, biases, kind, gated, products=products, preact=dpreact, need_hidden=False)
    return ffn_dact(
        dy, down, dpreact, kind, gated, dpreact, need_hidden=need_hidden, need_dbias=need_dbias,
        product=product, addend=addend,
    )  # fmt: skip
