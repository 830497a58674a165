"""FLOP formulas of the operators in `ops.py`, for `torch.utils.flop_counter`.

As `block_flops` counts: GEMMs and attention. A formula sees shapes, no values: packed sequences
count as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.cpu_attention import CPU
from backfuse.kernels.reference.explicit_attention import AttentionMask, score_flops

from .flops import Matmul, block_matmuls
from .keep import block_reads, half_needs, half_reads
from .run import Layer, Tree
from .told import HALVES, Told, read

#: How the names of the FFN half's products begin.
_FFN = ("preact", "down", "mlp.")


def _made(one: Matmul) -> str:
    """The name of what a product makes, or of what its adapters' products add to."""
    return one.name.split("_lora")[0]


def _matmuls(told: Told, layer: Layer, shape: Sequence[int], masked: bool) -> list[Matmul]:
    """The products of one layer's training step; a half's are those of that half.

    Args:
        told: what the operator is told.
        layer: one of its layers.
        shape: `[batch, seq_len]`.
        masked: whether an attention mask is given.
    """
    spec, (batch_size, seq_len) = told.spec, shape
    mask = AttentionMask(
        causal=spec.causal,
        window=spec.sliding_window,
        softcap=spec.attn_logit_softcapping,
        dropout=spec.attention_dropout if told.dropout else 0.0,
    )
    ranks = told.context.size if told.context else 1  # each has all tokens of its heads
    length = seq_len * ranks
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    request = AttentionRequest(
        mask, told.autocast or torch.float32, device, length, spec.head_dim, spec.v_head_dim,
        bias=masked, packed=False, sinks=spec.attention_sinks,
    )  # fmt: skip
    library = CPU.obstacle(request) is None
    scores, weighted = (
        batch_size * score_flops(length, None, width, mask, library, masked) // ranks
        for width in (spec.q_size, spec.attn_out_size)
    )
    tokens, own = batch_size * seq_len, (layer.policy, layer.wanted)
    found = block_matmuls(spec, *own, tokens, scores, weighted, layer.adapters)
    if told.kind == "block":
        return found
    half = HALVES[told.kind]
    needs = half_needs(spec, half, layer.wanted, told.wants_input)
    rebuilt = half_reads(spec, half, layer.policy, needs).rebuilt
    again = {{"attn_branch": "mid", "ffn_branch": "down"}.get(name, name) for name in rebuilt}
    return [
        one
        for one in found
        if one.name.startswith(_FFN) == (half == "ffn")
        and (one.phase != "recompute" or _made(one) in again)
    ]


def _sum(matmuls: Sequence[Matmul], *phases: str) -> int:
    return sum(one.flops for one in matmuls if one.phase in phases)


def _output(told: Told, layer: Layer, matmuls: Sequence[Matmul]) -> int:
    """Of a layer's output, made again from its input and what it kept (see `LayerPass.output`)."""
    kept = block_reads(told.spec, layer.policy, layer.wanted).kept
    needed = []
    if not kept & {"mid", "attn_branch"}:
        needed.append("mid")
        if "attn_out" not in kept:
            needed += ["attn_out"] if "qkv" in kept else ["attn_out", "qkv"]
    if "ffn_branch" not in kept:
        needed.append("down")
        if "preact" not in kept or "preact_scales" in kept:
            needed.append("preact")
    return sum(one.flops for one in matmuls if one.phase == "forward" and _made(one) in needed)


def _rebuilt(node: Tree, outputs: Sequence[int]) -> int:
    """Of the inputs that a segment's backward pass rebuilds, its parts' included."""
    if not isinstance(node, tuple):
        return 0
    return sum(_rebuilt(part, outputs) for part in node) + sum(
        _all(part, outputs) for part in node[:-1]
    )


def _all(node: Tree, outputs: Sequence[int]) -> int:
    return sum(_all(part, outputs) for part in node) if isinstance(node, tuple) else outputs[node]


def _layers(x: Sequence[int], side: Sequence[Any]) -> tuple[Told, list[list[Matmul]]]:
    mask, (batch_size, _, text) = side[2], side[-3:]
    told, shape = read(text), (batch_size, x[0] // batch_size)
    return told, [_matmuls(told, layer, shape, mask is not None) for layer in told.layers]


def forward_flops(x: Any, weights: Any, *side: Any, **_: Any) -> int:
    """Of a forward operator, from its arguments: shapes in the place of tensors."""
    return sum(_sum(matmuls, "forward") for matmuls in _layers(x, side)[1])


def backward_flops(dz: Any, x: Any, kept: Any, weights: Any, *side: Any, **_: Any) -> int:
    """Of a backward operator, likewise."""
    told, found = _layers(dz, side)
    outputs = [
        _output(told, layer, matmuls) for layer, matmuls in zip(told.layers, found, strict=True)
    ]
    layers = sum(_sum(matmuls, "backward", "recompute") for matmuls in found)
    return layers + _rebuilt(told.tree, outputs)
