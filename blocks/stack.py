"""`BlockStack`: blocks in a row, one policy a layer, and segments that share one `x`.

A segment is a run of layers of which only the first keeps its `x`; the others' are rebuilt from
it, one layer's output after another, reading what those layers kept. Segments nest: the parts of
a segment may be segments again, and then only the inputs of the parts being worked on exist at a
time. With `n` layers, `sqrt(n)` equal segments hold `2 sqrt(n)` inputs (Chen et al. 2016).

A layer that somebody has put hooks on (`fully_shard` does), compiled, or split over devices is
called as a module, so that those run. In a segment with others it cannot be: the segment reads all
its weights at once. There the stack is what to shard: one `BlockStack` a segment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .block import TransformerBlock
from .function import run_job
from .inputs import check_chunk_size, check_impl, check_offload_dir, check_weights, prepare
from .keep import INPUT
from .lora import all_parameters
from .policy import KEEP, Policy, PolicyLike
from .replay import effective_policies
from .run import Layer, RunJob, Tree, wanted_names
from .spec import BlockSpec

#: Sizes of segments: a number is a run of that many layers, a sequence a segment of segments.
Segments = int | Sequence["Segments"]


def layers_in(part: Segments) -> int:
    """How many layers a part holds."""
    return part if isinstance(part, int) else sum(layers_in(inner) for inner in part)


def _check_part(part: object) -> None:
    if isinstance(part, int) and not isinstance(part, bool):
        if part < 1:
            raise ValueError(f"segments hold the size {part}, expected positive numbers")
    elif isinstance(part, str) or not isinstance(part, Sequence) or not part:
        raise TypeError(
            f"segments hold {part!r}, expected numbers of layers and non-empty sequences of them"
        )
    else:
        for inner in part:
            _check_part(inner)


def _tree(part: Segments, first: int) -> Tree:
    """The same part with its layers' indices, counted from `first`."""
    if isinstance(part, int):
        return first if part == 1 else tuple(range(first, first + part))
    nodes: list[Tree] = []
    for inner in part:
        nodes.append(_tree(inner, first))
        first += layers_in(inner)
    return nodes[0] if len(nodes) == 1 else tuple(nodes)


def _without(parts: Sequence[Segments], count: int) -> list[Segments]:
    """The parts without their first `count` layers, which want no gradient and no segment.

    Args:
        parts: segments, from the first layer to the last.
        count: how many layers to leave out.
    """
    rest: list[Segments] = []
    for part in parts:
        cut = min(count, layers_in(part))
        count -= cut
        if cut == 0:
            rest.append(part)
        elif cut < layers_in(part):
            rest.append(part - cut if isinstance(part, int) else tuple(_without(part, cut)))
    return rest


def parse_segments(segments: Segments | None, policies: Sequence[Policy]) -> list[Segments]:
    """The segments of a stack, from the first layer to the last.

    Args:
        segments: a number `k`: every k-th layer keeps its x; a sequence: the sizes of the
            segments one by one; None: a layer whose policy recomputes `x` belongs to the segment
            of the layer before it.
        policies: one a layer.

    Raises:
        TypeError: for something else.
        ValueError: for sizes that do not add up to the number of layers.
    """
    count = len(policies)
    if segments is None:
        starts = [i for i, policy in enumerate(policies) if policy.keeps("x")]
        if not starts or starts[0] != 0:
            raise ValueError(
                "the first layer's policy recomputes x, expected it to keep x: there is no layer "
                "before it to rebuild its input from"
            )
        return [b - a for a, b in zip(starts, [*starts[1:], count], strict=True)]
    _check_part(segments)
    if isinstance(segments, int):
        return [min(segments, count - start) for start in range(0, count, segments)]
    if layers_in(segments) != count:
        raise ValueError(
            f"segments hold {layers_in(segments)} layers, expected num_layers ({count})"
        )
    return list(segments)


def _is_called(block: TransformerBlock) -> bool:
    """Whether a layer has to be called as a module, because more than its forward is to run."""
    hooks = (
        block._forward_pre_hooks, block._forward_hooks,
        block._backward_pre_hooks, block._backward_hooks,
    )  # fmt: skip
    return any(hooks) or block._compiled_call_impl is not None or block.parallel is not None


class BlockStack(nn.Module):
    """Blocks in a row.

    Args:
        spec: what each block is.
        num_layers: how many.
        policy: one for all layers (see `TransformerBlock`), or a sequence with one a layer.
        segments: which layers share one `x`: a number `k` (every k-th layer keeps its x), sizes
            such as `(4, 4)`, nested ones such as `((2, 2), 4)`; None: as the policies say, a
            layer with `x="recompute"` joining the segment of the layer before it.
        chunk_size: see `TransformerBlock`.
        impl: see `TransformerBlock`.
        ffn_strategy: see `TransformerBlock`.
        offload_dir: see `TransformerBlock`.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: for policies or segments that do not fit the number of layers.
    """

    def __init__(
        self,
        spec: BlockSpec,
        num_layers: int,
        policy: PolicyLike | Sequence[PolicyLike] = "selective",
        *,
        segments: Segments | None = None,
        chunk_size: int | None = None,
        impl: str = "auto",
        ffn_strategy: str = "auto",
        offload_dir: str | Path | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(num_layers, int) or num_layers < 1:
            raise ValueError(f"num_layers is {num_layers!r}, expected a positive integer")
        self.spec = spec
        self.chunk_size = check_chunk_size(chunk_size)
        check_impl(impl, ffn_strategy)
        self.impl, self.ffn_strategy = impl, ffn_strategy
        self.offload_dir = check_offload_dir(offload_dir)
        policies, parts = self._parse(policy, segments, num_layers)
        self.layers = nn.ModuleList(
            TransformerBlock(
                spec,
                chunk_size=chunk_size,
                impl=impl,
                ffn_strategy=ffn_strategy,
                offload_dir=offload_dir,
                device=device,
                dtype=dtype,
            )  # fmt: skip
            for _ in range(num_layers)
        )
        self._assign(policies, parts)

    @staticmethod
    def _parse(
        policy: PolicyLike | Sequence[PolicyLike], segments: Segments | None, count: int
    ) -> tuple[list[Policy], list[Segments]]:
        if isinstance(policy, Sequence) and not isinstance(policy, str):
            if len(policy) != count:
                raise ValueError(
                    f"policy holds {len(policy)} policies, expected one a layer ({count})"
                )
            policies = [Policy.parse(one) for one in policy]
        else:
            policies = [Policy.parse(policy)] * count
        for one in policies:
            one.check_available()
        return policies, parse_segments(segments, policies)

    def _assign(self, policies: list[Policy], parts: list[Segments]) -> None:
        for layer, policy in zip(self._blocks(), policies, strict=True):
            layer.policy = policy if policy.keeps("x") else policy.with_x("keep")
        self._segments = parts

    def set_policy(
        self, policy: PolicyLike | Sequence[PolicyLike], segments: Segments | None = None
    ) -> None:
        """Change what the layers keep; arguments as on construction. All or nothing is changed."""
        self._assign(*self._parse(policy, segments, len(self.layers)))

    @property
    def policies(self) -> list[Policy]:
        """One a layer, the first layer first."""
        return [block.policy for block in self._blocks()]

    @property
    def segments(self) -> list[Segments]:
        """The segments, from the first layer to the last."""
        return list(self._segments)

    def _blocks(self) -> Iterator[TransformerBlock]:
        for index, layer in enumerate(self.layers):
            if not isinstance(layer, TransformerBlock):
                raise TypeError(
                    f"layers.{index} is a {type(layer).__name__}, expected a TransformerBlock: a "
                    "stack reads its weights. In place of torch.compile(layer) call "
                    "layer.compile(); in place of a checkpoint around it give it a policy"
                )
            yield layer

    def forward(
        self,
        hidden_states: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """The last block's output; arguments as those of `TransformerBlock.forward`.

        Raises:
            TypeError, ValueError: as `TransformerBlock.forward`, and for a segment of several
                layers among which one has hooks, is compiled or split over devices.
        """
        options: dict[str, Any] = {
            "position_embeddings": position_embeddings, "attention_mask": attention_mask,
            "cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen,
        }  # fmt: skip
        blocks = list(self._blocks())
        called = [_is_called(block) for block in blocks]
        self._check_called(called)
        if all(called):
            for block in blocks:
                hidden_states = block(hidden_states, **options)
            return hidden_states
        context = blocks[0].context
        if any([block.context != context for block in blocks]):
            raise ValueError(
                "the layers' tokens are split over unlike ranks, expected one context for all: "
                "parallelize(stack, context=...)"
            )
        given = [block.weights() for block in blocks]
        call, inputs = prepare(
            self.spec,
            hidden_states,
            **options,
            training=self.training,
            chunk_size=self.chunk_size,
            impl=self.impl,
            ffn_strategy=self.ffn_strategy,
            lossy=any(block.policy.lossy for block in self._blocks()),
            layers=len(self.layers),
            offload_dir=self.offload_dir,
            adapters=[adapters for _, adapters in given],
            context=context,
        )
        weights = [
            own if by_call
            else check_weights(own, all_parameters(self.spec, adapters), hidden_states, call)
            for (own, adapters), by_call in zip(given, called, strict=True)
        ]  # fmt: skip
        parts = self._segments
        policies = effective_policies(
            [block.policy for block in blocks], any(part != 1 for part in parts)
        )
        if policies is None:
            policies, parts = [KEEP] * len(blocks), [1] * len(blocks)
        frozen = 0
        while frozen < len(blocks) and not wanted_names(hidden_states, weights[frozen]):
            frozen += 1
        first = 0
        for part in [*[1] * frozen, *_without(parts, frozen)]:
            last = first + layers_in(part)
            if called[first]:
                hidden_states = blocks[first](hidden_states, **options)
                first = last
                continue
            layers: list[Layer] = []
            flat: list[Tensor] = []
            for index in range(first, last):
                named = weights[index]
                wanted = wanted_names(hidden_states, named)
                if any(layer.wanted for layer in layers):
                    wanted = wanted | {INPUT}  # torch.compile of torch 2.11 has no |= for it
                layers.append(Layer(policies[index], tuple(named), wanted, given[index][1]))
                flat += named.values()
            seed = inputs.seed if inputs.seed is None else inputs.seed[first:last]
            job = RunJob(call, tuple(layers), _tree(part, 0), f"layers.{first}")
            hidden_states = run_job(job, inputs._replace(seed=seed), hidden_states, flat)
            first = last
        return hidden_states

    def _check_called(self, called: Sequence[bool]) -> None:
        """Raise a ValueError if a layer that has to be called shares a segment with others."""
        first = 0
        for part in self._segments:
            last = first + layers_in(part)
            if last > first + 1 and any(called[first:last]):
                name = first + called[first:last].index(True)
                raise ValueError(
                    f"layers.{name} has hooks (is sharded by itself, perhaps) or is compiled, and "
                    f"shares the segment of layers {first} to {last - 1}, which reads its layers' "
                    "weights without calling them. Expected segments of one such layer; or make "
                    "each segment a BlockStack of its own and shard that"
                )
            first = last

    def extra_repr(self) -> str:
        """The segments, for `print(model)`."""
        return "" if all(part == 1 for part in self._segments) else f"segments={self._segments}"
