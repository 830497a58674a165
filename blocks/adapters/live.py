"""What `plan` has to know of a live model: its layers, what of them is trained, and where it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backfuse.blocks.block import TransformerBlock
from backfuse.blocks.devices import DEVICES, Device, device_at
from backfuse.blocks.keep import INPUT
from backfuse.blocks.lora import Adapters
from backfuse.blocks.planner.step import ModelSpec
from backfuse.blocks.spec import BlockSpec

from .calls import weights_of
from .read import layers_of, not_understood, read
from .recipe import OwnForward, Recipe


class LiveLayers(NamedTuple):
    """The layers of a live model.

    Attributes:
        specs: by their names in the model, the first layer first.
        requires_grad: names of what wants a gradient, for each.
        adapters: of each layer's projections.
        dtype: of their parameters.
        place: where those are.
        skipped: names of layers that nothing is known of.
        model: what surrounds them, trained with AdamW; None without embedding and head, or where
            layers are skipped.
    """

    specs: dict[str, BlockSpec]
    requires_grad: list[frozenset[str]]
    adapters: Adapters
    dtype: torch.dtype
    place: torch.device
    skipped: tuple[str, ...]
    model: ModelSpec | None

    @property
    def device(self) -> Device:
        """The entry of the table for where they are.

        Raises:
            ValueError: for a place that has none.
        """
        if self.place.type in ("cpu", "cuda"):
            entry = device_at(self.place, self.dtype)
            if entry is not None:
                return entry
        named = torch.cuda.get_device_name(self.place) if self.place.type == "cuda" else "unknown"
        raise ValueError(
            f"device is None and the model is on {self.place} ({named}), expected one of "
            f"{', '.join(DEVICES)}, or a Device"
        )


def own_blocks(model: nn.Module) -> dict[str, TransformerBlock]:
    """The library's own blocks in a model, by their names."""
    return {n: m for n, m in model.named_modules() if isinstance(m, TransformerBlock)}


def live_layers(model: nn.Module) -> LiveLayers:
    """The layers of a model: its `TransformerBlock`s, or what `patch` understands.

    Raises:
        ValueError: for a model without any, for layers of which only a half is understood, that
            run their own forward for now, or whose adapters are unlike.
    """
    own = own_blocks(model)
    if own:
        given = {name: (block.spec, *block.weights()) for name, block in own.items()}
        return _of(model, given, tuple(n for n, _ in layers_of(model) if n not in own))
    layers = list(layers_of(model))
    found = read(layers)
    known = {name: recipe for name, recipe in found.items() if isinstance(recipe, Recipe)}
    if not known:
        raise not_understood(model, found)
    return read_layers(model, known, tuple(name for name in found if name not in known))


def read_layers(
    model: nn.Module, known: Mapping[str, Recipe], skipped: tuple[str, ...] = ()
) -> LiveLayers:
    """The same of recipes that are there.

    Args:
        model: it.
        known: its layers by name.
        skipped: names of the others.

    Raises:
        ValueError: see `live_layers`.
    """
    given = {}
    for name, recipe in known.items():
        if recipe.rest is not None:
            raise ValueError(
                f"only the attention half of {name} is understood, expected whole blocks: what the "
                "other half keeps is in no plan; patch with a policy"
            )
        if recipe.unreached:
            raise ValueError(
                f"calls that reach {recipe.unreached} of {name} keep what they always kept, which "
                "is in no plan; patch with a policy"
            )
        try:
            given[name] = (recipe.spec, *weights_of(model.get_submodule(name), recipe))
        except OwnForward as reason:
            raise ValueError(
                f"{name} runs its own forward for now: {reason}; what that keeps is in no plan"
            ) from reason
    return _of(model, given, skipped)


def _of(
    model: nn.Module,
    given: Mapping[str, tuple[BlockSpec, dict[str, Tensor], Adapters]],
    skipped: tuple[str, ...],
) -> LiveLayers:
    beside = {adapters for _, _, adapters in given.values()}
    if len(beside) > 1:
        raise ValueError("the layers have unlike adapters, expected the same in all")
    wanted = [
        frozenset(name for name, weight in weights.items() if weight.requires_grad)
        for _, weights, _ in given.values()
    ]
    if _may_want(model, model.get_submodule(next(iter(given)))):
        wanted[0] |= {INPUT}
    first = next(iter(given.values()))[1]
    sample = next(iter(first.values()))
    specs = {name: spec for name, (spec, _, _) in given.items()}
    return LiveLayers(
        specs, wanted, beside.pop(), sample.dtype, sample.device, skipped,
        None if skipped else surroundings(model),
    )  # fmt: skip


def _may_want(model: nn.Module, layer: nn.Module) -> bool:
    """Whether the input of the first layer may want a gradient.

    It does not if what stands before that in the model is frozen and has no hook (which is how
    inputs are made to want one).
    """
    before = []
    for module in model.modules():
        if module is layer:
            break
        before.append(module)
    own = [p for module in before for p in module.parameters(recurse=False)]
    hooks = any(module._forward_hooks for module in before)
    return not own or hooks or any(parameter.requires_grad for parameter in own)


def surroundings(model: nn.Module, **training: Any) -> ModelSpec | None:
    """What surrounds the layers of a language model: see `ModelSpec.from_model`.

    Returns:
        None for a model without an embedding, or without a head of as many rows.
    """
    pairs = [
        (table, head)
        for table in model.modules() if isinstance(table, nn.Embedding)
        for head in model.modules() if isinstance(head, nn.Linear)
        if table.weight.shape == head.weight.shape
    ]  # fmt: skip
    if not pairs:
        return None
    # of several the largest; PEFT keeps what it trains behind what it does not
    embedding, head = max(reversed(pairs), key=lambda pair: pair[0].num_embeddings)
    return ModelSpec(
        vocab_size=embedding.num_embeddings,
        tied=head.weight is embedding.weight,
        trained=embedding.weight.requires_grad or head.weight.requires_grad,
        parameter_bytes=sum(t.nbytes for t in (*model.parameters(), *model.buffers())),
        trained_bytes=sum(p.nbytes for p in model.parameters() if p.requires_grad),
        **training,
    )
