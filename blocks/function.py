"""The autograd functions: a run of blocks, and each half alone, over the same passes.

A *job* is what one call does besides its tensors: it has a forward that gives the output and what
is kept, and a backward that gives the gradients from that. `RecomputeFunction` is the thin layer
between a job and autograd.

Weights go through `save_for_backward` themselves, never as a copy or a cast: so a sharding engine
can free and regather them, and autograd notices if one is changed before the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import AttentionHalf
from .call import Call, Inputs, WeightGrads, Weights, cast_weights
from .ffn import FFNHalf
from .inputs import check_weights, prepare
from .keep import INPUT, attention_reads, block_reads, ffn_reads, half_needs
from .policy import Policy, PolicyLike
from .replay import effective_policies
from .spec import BlockSpec

Kept = dict[str, Tensor]
Gradients = tuple[Tensor | None, list[Tensor | None]]


class Job(Protocol):
    """What one call does, besides its tensors."""

    call: Call

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        """The output `[tokens, h]`, and what is kept."""

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        """The gradient of x `[tokens, h]` and those of the weights, None where not wanted."""


class RecomputeFunction(torch.autograd.Function):
    """Run a job under autograd."""

    @staticmethod
    def forward(ctx: Any, job: Job, inputs: Inputs, x: Tensor, *weights: Tensor) -> Tensor:
        """`x` is `[batch, seq_len, h]`, and so is the result."""
        with torch.autocast(x.device.type, enabled=False):
            z, kept = job.forward(x.reshape(-1, x.shape[-1]), weights, inputs)
        ctx.job, ctx.names = job, list(kept)
        if kept:
            ctx.save_for_backward(*inputs, *weights, *kept.values())
        else:
            ctx.save_for_backward(*[None] * len(inputs), *weights)
        return z.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        """Rebuild what was dropped, and differentiate by hand."""
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph is True, expected False: a backfuse block differentiates by hand "
                "and cannot be differentiated twice. For a second derivative run the layer as "
                "plain PyTorch under torch.utils.checkpoint(..., use_reentrant=False)."
            )
        job, count = ctx.job, len(Inputs._fields)
        saved = ctx.saved_tensors
        split = len(saved) - len(ctx.names)
        kept = dict(zip(ctx.names, saved[split:], strict=True))
        with torch.autocast(dz.device.type, enabled=False):
            dx, grads = job.backward(
                dz.reshape(-1, dz.shape[-1]), saved[count:split], Inputs(*saved[:count]), kept
            )
        return None, None, None if dx is None else dx.view(dz.shape), *grads


@dataclass(frozen=True)
class Layer:
    """One block of a run.

    Attributes:
        policy: what it keeps.
        names: its parameters' names, in the order of its weights.
        wanted: the names that want a gradient, `INPUT` for the block's input.
    """

    policy: Policy
    names: tuple[str, ...]
    wanted: frozenset[str]


#: Layers of a run, by index; a tuple is a segment, whose parts may be segments again.
Tree = int | tuple["Tree", ...]


@dataclass(frozen=True)
class RunJob:
    """A block, or a segment: a run of blocks of which only the first keeps its `x`.

    In backward, the inputs of a segment's parts are rebuilt from the first on, then the parts are
    differentiated from the last to the first. Only the inputs of the parts being worked on exist
    at a time: nesting segments holds O(log layers) of them.

    Attributes:
        call: the call, the same for all layers.
        layers: the run.
        tree: how the run is cut; `0` for a single block.
    """

    call: Call
    layers: tuple[Layer, ...]
    tree: Tree

    def _weights(self, weights: Sequence[Tensor], index: int) -> Sequence[Tensor]:
        start = sum(len(layer.names) for layer in self.layers[:index])
        return weights[start : start + len(self.layers[index].names)]

    def _cast(self, weights: Sequence[Tensor], index: int) -> dict[str, Tensor]:
        named = zip(self.layers[index].names, self._weights(weights, index), strict=True)
        return cast_weights(dict(named), self.call.compute_dtype)

    def _inputs(self, inputs: Inputs, index: int) -> Inputs:
        if inputs.seed is None:
            return inputs
        return inputs._replace(seed=inputs.seed[index : index + 1])

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        kept: Kept = {}
        anything = any(layer.wanted for layer in self.layers)
        if anything and len(self.layers) > 1:
            kept["0.x"] = x
        for index, layer in enumerate(self.layers):
            keep = block_reads(self.call.spec, layer.policy, layer.wanted).kept
            named, side = self._cast(weights, index), self._inputs(inputs, index)
            attn = AttentionHalf(self.call, named, side, x, {}, keep)
            mid = attn.mid()
            of_layer = {name: attn.values[name] for name in keep & attn.values.keys()}
            del attn
            x, of_ffn = FFNHalf(self.call, named, side, {}).forward(mid, keep)
            of_layer.update(of_ffn)
            if index:
                of_layer.pop("x", None)
            kept.update({f"{index}.{name}": of_layer[name] for name in sorted(of_layer)})
        return x, kept

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        grads: dict[int, list[Tensor | None]] = {}
        prefix = [f"{index}." for index in range(len(self.layers))]
        of_layer: list[Kept] = [
            {name[len(p) :]: value for name, value in kept.items() if name.startswith(p)}
            for p in prefix
        ]

        def rebuild(node: Tree, x: Tensor) -> Tensor:
            """The output of a part, from its input and what its layers kept."""
            if isinstance(node, tuple):
                for part in node:
                    x = rebuild(part, x)
                return x
            named, side = self._cast(weights, node), self._inputs(inputs, node)
            mid = AttentionHalf(self.call, named, side, x, of_layer[node]).mid()
            return FFNHalf(self.call, named, side, of_layer[node]).forward(mid)[0]

        def differentiate(node: Tree, x: Tensor | None, dz: Tensor | None) -> Tensor | None:
            """The gradient of a part's input."""
            if not isinstance(node, tuple):
                dz, found = self._backward_layer(
                    node,
                    self._cast(weights, node),
                    self._inputs(inputs, node),
                    x,
                    of_layer[node],
                    dz,
                )
                grads[node] = found.take(self.layers[node].names, self._weights(weights, node))
                return dz
            xs = [x]
            for part in node[:-1]:
                assert xs[-1] is not None
                xs.append(rebuild(part, xs[-1]))
            for part in reversed(node):
                dz = differentiate(part, xs.pop(), dz)
            return dz

        dx = differentiate(self.tree, kept.get("0.x"), dz)
        return dx, [grad for index in range(len(self.layers)) for grad in grads[index]]

    def _backward_layer(
        self,
        index: int,
        weights: Weights,
        inputs: Inputs,
        x: Tensor | None,
        kept: Kept,
        dz: Tensor | None,
    ) -> tuple[Tensor | None, WeightGrads]:
        """Gradients of one block's input and weights."""
        call, layer = self.call, self.layers[index]
        spec = call.spec
        attn_needs = half_needs(spec, "attn", layer.wanted, INPUT in layer.wanted)
        ffn_needs = half_needs(spec, "ffn", layer.wanted, attn_needs.anything)
        grads = WeightGrads(layer.wanted)
        if dz is None or not (attn_needs.anything or ffn_needs.anything):
            return None, grads
        attn = AttentionHalf(call, weights, inputs, x, kept)
        ffn = FFNHalf(call, weights, inputs, kept)
        mid = attn.mid() if "mid" in ffn_reads(spec, layer.policy, ffn_needs).kept else None
        dmid = ffn.backward(mid, dz, ffn_needs, grads)
        del mid, ffn
        attn.values.pop("mid", None)
        dx = None
        if dmid is not None:
            dx = attn.backward(dmid, attn_needs, grads)
        return dx, grads


@dataclass(frozen=True)
class HalfJob:
    """One half alone.

    Attributes:
        call: the call.
        layer: policy, parameter names and wanted names.
        half: `"attn"` or `"ffn"`.
    """

    call: Call
    layer: Layer
    half: str

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        call, layer = self.call, self.layer
        named = cast_weights(dict(zip(layer.names, weights, strict=True)), call.compute_dtype)
        needs = half_needs(call.spec, self.half, layer.wanted, INPUT in layer.wanted)
        if self.half == "ffn":
            keep = ffn_reads(call.spec, layer.policy, needs).kept
            z, kept = FFNHalf(call, named, inputs, {}).forward(x, keep)
            return z, kept | ({"mid": x} if "mid" in keep else {})
        keep = attention_reads(call.spec, layer.policy, needs, read_mid=False).kept
        attn = AttentionHalf(call, named, inputs, x, {}, keep)
        mid = attn.mid()
        return mid, {name: attn.values[name] for name in sorted(keep)}

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        call, layer = self.call, self.layer
        named = cast_weights(dict(zip(layer.names, weights, strict=True)), call.compute_dtype)
        needs = half_needs(call.spec, self.half, layer.wanted, INPUT in layer.wanted)
        grads = WeightGrads(layer.wanted)
        if self.half == "ffn":
            dx = FFNHalf(call, named, inputs, kept).backward(kept.get("mid"), dz, needs, grads)
        else:
            dx = AttentionHalf(call, named, inputs, kept.get("x"), kept).backward(dz, needs, grads)
        return dx, grads.take(layer.names, weights)


def wanted_names(x: Tensor, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of what wants a gradient; none where gradients are off."""
    if not torch.is_grad_enabled():
        return frozenset()
    wanted = {name for name, weight in weights.items() if weight.requires_grad}
    return frozenset(wanted | ({INPUT} if x.requires_grad else set()))


def _half(
    half: str,
    shapes: Mapping[str, tuple[int, ...]],
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike,
    **options: Any,
) -> Tensor:
    parsed = Policy.parse(policy)
    parsed.check_available()
    call, inputs = prepare(spec, hidden_states, attention=half == "attn", **options)
    weights = check_weights(weights, shapes, hidden_states)
    [parsed] = effective_policies([parsed])
    layer = Layer(parsed, tuple(weights), wanted_names(hidden_states, weights))
    job = HalfJob(call, layer, half)
    return RecomputeFunction.apply(job, inputs, hidden_states, *weights.values())  # type: ignore


def ffn(
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike = "selective",
    *,
    training: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """The FFN half alone: norm, FFN and residual.

    Args:
        hidden_states: `[batch, seq_len, hidden_size]`.
        weights: the tensors `spec.ffn_parameters()` names, by those names; more are ignored, so
            `dict(block.named_parameters())` will do. Gradients flow to them.
        spec: the block it is half of.
        policy: of its activations only `preact` matters here.
        training: whether dropout is active.
        chunk_size: tokens a chunk; None: the device's default.

    Returns:
        `[batch, seq_len, hidden_size]`, in hidden_states' dtype.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, or policy.
    """
    return _half(
        "ffn",
        spec.ffn_parameters(),
        hidden_states,
        weights,
        spec,
        policy,
        training=training,
        chunk_size=chunk_size,
    )


def attention(
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike = "selective",
    *,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    training: bool = False,
    chunk_size: int | None = None,
) -> Tensor:
    """The attention half alone: norm, attention, output projection and residual.

    Args:
        hidden_states: `[batch, seq_len, hidden_size]`.
        weights: the tensors `spec.attention_parameters()` names, by those names; more are ignored.
        spec: the block it is half of.
        policy: of its activations `qkv` and `attn_out` matter here.
        position_embeddings: see `TransformerBlock.forward`, and so the others.
        attention_mask: see position_embeddings.
        cu_seqlens: see position_embeddings.
        max_seqlen: see position_embeddings.
        training: whether dropout is active.
        chunk_size: tokens a chunk; None: the device's default.

    Returns:
        `[batch, seq_len, hidden_size]`, in hidden_states' dtype.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, or policy.
    """
    return _half(
        "attn",
        spec.attention_parameters(),
        hidden_states,
        weights,
        spec,
        policy,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        training=training,
        chunk_size=chunk_size,
    )
