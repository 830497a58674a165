"""One block, and a run of blocks that share one `x`: what is kept, rebuilt and differentiated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

import torch
from torch import Tensor

from .attention import AttentionHalf
from .call import Call, Inputs, Weights, cast_weights
from .ffn import FFNHalf
from .keep import INPUT, block_needs, block_reads, ffn_reads, offloaded
from .lora import Adapters
from .policy import Policy
from .spec import BlockSpec
from .weight_grads import WeightGrads

Kept = dict[str, Tensor]
Gradients = tuple[Tensor | None, list[Tensor | None]]


@dataclass(frozen=True)
class Layer:
    """One block of a run.

    Attributes:
        policy: what it keeps.
        names: its parameters' names, in the order of its weights.
        wanted: the names that want a gradient, `INPUT` for the block's input.
        adapters: of its projections.
    """

    policy: Policy
    names: tuple[str, ...]
    wanted: frozenset[str]
    adapters: Adapters = ()


def wanted_names(x: Tensor, weights: Mapping[str, Tensor]) -> frozenset[str]:
    """Names of what wants a gradient; none where gradients are off."""
    if not torch.is_grad_enabled():
        return frozenset()
    wanted = {name for name, weight in weights.items() if weight.requires_grad}
    return frozenset(wanted | ({INPUT} if x.requires_grad else set()))


@dataclass(frozen=True)
class LayerPass:
    """The passes of one block.

    Attributes:
        call: the call.
        layer: policy, parameter names and wanted names.
        weights: the parameters, in the order of the names.
        inputs: the call's side inputs, with this layer's seed.
        kept: what its forward pass kept, by name; empty before it.
    """

    call: Call
    layer: Layer
    weights: Sequence[Tensor]
    inputs: Inputs
    kept: Mapping[str, Tensor]

    def _cast(self) -> dict[str, Tensor]:
        named = dict(zip(self.layer.names, self.weights, strict=True))
        return cast_weights(self.call.spec, named, self.call.compute_dtype)

    def _attention(
        self, weights: Weights, x: Tensor | None, keep: Set[str] = frozenset()
    ) -> AttentionHalf:
        own = self.layer.adapters
        return AttentionHalf(self.call, weights, self.inputs, x, self.kept, keep, own)

    def _ffn(self, weights: Weights) -> FFNHalf:
        return FFNHalf(self.call, weights, self.inputs, self.kept, self.layer.adapters)

    def forward(self, x: Tensor) -> tuple[Tensor, Kept]:
        """The block's output `[tokens, h]`, and what it keeps."""
        weights = self._cast()
        keep = block_reads(self.call.spec, self.layer.policy, self.layer.wanted).kept
        attn = self._attention(weights, x, keep)
        mid = attn.mid()
        kept = {name: attn.values[name] for name in keep & attn.values.keys()}
        del attn
        ffn_input = self._ffn_input(x, mid)
        z, of_ffn = self._ffn(weights).forward(ffn_input, mid, keep)
        return z, kept | of_ffn

    def output(self, x: Tensor) -> Tensor:
        """The block's output again, computing only what is not kept."""
        weights = self._cast()
        mid = self._attention(weights, x).mid()
        return self._ffn(weights).forward(self._ffn_input(x, mid), mid)[0]

    def _ffn_input(self, x: Tensor, mid: Tensor) -> Tensor:
        return x if self.call.spec.parallel_residual else mid

    def backward(self, x: Tensor | None, dz: Tensor | None) -> Gradients:
        """The gradient of the input, and those of the weights; None where not wanted."""
        call, layer = self.call, self.layer
        grads = WeightGrads(call, layer.names, self.weights, layer.wanted)
        attn_needs, ffn_needs = block_needs(call.spec, layer.wanted)
        dx = None
        if dz is not None and (attn_needs.anything or ffn_needs.anything):
            weights = self._cast()
            attn, ffn = self._attention(weights, x), self._ffn(weights)
            reads_mid = "mid" in ffn_reads(call.spec, layer.policy, ffn_needs).kept
            if call.spec.parallel_residual:
                dsum = ffn.backward(x, dz, ffn_needs, grads) if ffn_needs.anything else None
                dmid = dz if attn_needs.anything else None
            else:
                dmid = dsum = ffn.backward(attn.mid() if reads_mid else None, dz, ffn_needs, grads)
            del ffn
            attn.values.pop("mid", None)
            if dmid is not None:
                dx = attn.backward(dmid, attn_needs, grads, dsum)
        return dx, grads.take()


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
        label: whose run it is, for messages.
    """

    call: Call
    layers: tuple[Layer, ...]
    tree: Tree
    label: str = "the block"

    @property
    def offloads(self) -> bool:
        """Whether anything may go elsewhere than to the device's memory."""
        return any(layer.policy.offloads for layer in self.layers)

    def away(self, kept: Kept) -> list[str]:
        """Names of those kept tensors that go elsewhere."""
        names = []
        for index, layer in enumerate(self.layers):
            if not layer.policy.offloads:
                continue
            own = frozenset(
                name.removeprefix(f"{index}.") for name in kept if name.startswith(f"{index}.")
            )
            names += [f"{index}.{name}" for name in sorted(offloaded(layer.policy, own))]
        return names

    @staticmethod
    def kept_names(spec: BlockSpec, layers: Sequence[Layer]) -> list[str]:
        """Names of what a run keeps, as `forward` gives them."""
        names: list[str] = []
        if len(layers) > 1 and any(layer.wanted for layer in layers):
            names.append("0.x")
        for index, layer in enumerate(layers):
            own = block_reads(spec, layer.policy, layer.wanted).kept
            names += [f"{index}.{name}" for name in sorted(own) if name != "x" or not index]
        return list(dict.fromkeys(names))

    def _passes(self, weights: Sequence[Tensor], inputs: Inputs, kept: Kept) -> list[LayerPass]:
        passes, start = [], 0
        for index, layer in enumerate(self.layers):
            seed = None if inputs.seed is None else inputs.seed[index : index + 1]
            own = {
                name.removeprefix(f"{index}."): value
                for name, value in kept.items()
                if name.startswith(f"{index}.")
            }
            stop = start + len(layer.names)
            passes.append(
                LayerPass(self.call, layer, weights[start:stop], inputs._replace(seed=seed), own)
            )
            start = stop
        return passes

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        """The output `[tokens, h]`, and what is kept: names are `<layer>.<name>`."""
        kept: Kept = {}
        if len(self.layers) > 1 and any(layer.wanted for layer in self.layers):
            kept["0.x"] = x
        for index, layer_pass in enumerate(self._passes(weights, inputs, {})):
            x, own = layer_pass.forward(x)
            if index:
                own.pop("x", None)
            kept.update({f"{index}.{name}": own[name] for name in sorted(own)})
        return x, kept

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        """The gradient of the first layer's input, and those of all weights."""
        passes = self._passes(weights, inputs, kept)
        grads: dict[int, list[Tensor | None]] = {}
        dx = _differentiate(self.tree, passes, kept.get("0.x"), dz, grads)
        return dx, [grad for index in range(len(passes)) for grad in grads[index]]


# Functions, not closures: a recursive closure is a reference cycle, and would hold every kept
# tensor of the pass until the garbage collector comes by.


def _rebuild(node: Tree, passes: Sequence[LayerPass], x: Tensor) -> Tensor:
    """The output of a part, from its input and what its layers kept."""
    if not isinstance(node, tuple):
        return passes[node].output(x)
    for part in node:
        x = _rebuild(part, passes, x)
    return x


def _differentiate(
    node: Tree,
    passes: Sequence[LayerPass],
    x: Tensor | None,
    dz: Tensor | None,
    grads: dict[int, list[Tensor | None]],
) -> Tensor | None:
    """The gradient of a part's input; those of its layers' weights go to `grads`."""
    if not isinstance(node, tuple):
        dx, grads[node] = passes[node].backward(x, dz)
        return dx
    xs = [x]
    for part in node[:-1]:
        assert xs[-1] is not None
        xs.append(_rebuild(part, passes, xs[-1]))
    for part in reversed(node):
        dz = _differentiate(part, passes, xs.pop(), dz, grads)
    return dz
