"""A layer whose class was swapped: its own parts, run by a block's functions where that is exact.

The new class is made from the layer's own, has its name, and adds nothing to its `state_dict`. A
call that a block can do is run by `block` (or `attention`) on the live parameters; any other is
the layer's own forward, with the same numbers and its own memory: with a cache, with arguments
that are not known, with a hook on a part that would not be called.

Hugging Face's checkpointing sets `gradient_checkpointing` on each layer. A patched layer takes
that as a word about its policy: a layer that recomputes by itself needs no replay around it.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from backfuse.blocks.policy import KEEP, NAMED_POLICIES, Policy

from .calls import CACHES, arguments_of, weights_of
from .recipe import OwnForward, Recipe
from .stand_in import ANGLES
from .torch_layers import run_torch, torch_arguments
from .verify import run_hf

if TYPE_CHECKING:
    from backfuse.blocks.parallel import Parallel

#: Where a patched layer keeps what it knows; neither a parameter nor a module.
STATE = "_backfuse"


@dataclass(frozen=True)
class State:
    """What a patched layer knows.

    Attributes:
        recipe: how it is run.
        policy: what it keeps.
        name: its path in the model, for messages.
        chunk_size: see `TransformerBlock`, and so the others.
        impl: see chunk_size.
        ffn_strategy: see chunk_size.
        offload_dir: see chunk_size.
        parallel: how it is split over ranks, or None.
    """

    recipe: Recipe
    policy: Policy
    name: str = "layer"
    chunk_size: int | None = None
    impl: str = "auto"
    ffn_strategy: str = "auto"
    offload_dir: Path | None = None
    parallel: Parallel | None = None


def state_of(layer: nn.Module) -> State | None:
    """What a patched layer knows; None for any other."""
    state = vars(layer).get(STATE)
    return state if isinstance(state, State) else None


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, or of a patched one before that."""
    kind: type[nn.Module] = vars(type(layer)).get("_backfuse_original", type(layer))
    return kind


def _restore(original: type[nn.Module]) -> nn.Module:
    """An empty patched layer, for pickle and copy."""
    kind = patched_class(original)
    return kind.__new__(kind)


_classes: dict[type[nn.Module], type[nn.Module]] = {}


def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of patched layers that had the class `original`; the same one each time."""
    if original not in _classes:
        _classes[original] = _make_class(original)
    return _classes[original]


def _make_class(original: type[nn.Module]) -> type[nn.Module]:

    def reduce(self: nn.Module, protocol: Any) -> Any:
        return _restore, (original,), vars(self)

    body: dict[str, Any] = {
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "__reduce_ex__": reduce,
        "_backfuse_original": original,
    }
    if hasattr(original, "gradient_checkpointing"):
        body["gradient_checkpointing"] = property(_not_checkpointing, _set_checkpointing)
    kind: Any = type(original.__name__, (original,), body)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, original, args, kwargs)

    # Set on the finished class: transformers wraps the forward of a class that is being made.
    kind.forward = forward
    made: type[nn.Module] = kind
    return made


def _not_checkpointing(layer: nn.Module) -> bool:
    """What transformers' wrapper around a forward sees."""
    return False


def _set_checkpointing(layer: nn.Module, value: bool) -> None:
    vars(layer)["gradient_checkpointing"] = value


def _checkpointing(layer: nn.Module) -> bool:
    """Whether the layer was told to checkpoint, and trains."""
    return bool(layer.training and vars(layer).get("gradient_checkpointing", False))


def current_policy(layer: nn.Module, state: State) -> Policy:
    """What a layer keeps in this call: its own policy, or what checkpointing makes of it."""
    if not _checkpointing(layer):
        return state.policy
    function = getattr(layer, "_gradient_checkpointing_func", None)
    inner = getattr(function, "func", function)
    if "save_on_cpu" in getattr(getattr(inner, "__code__", None), "co_names", ()):
        return NAMED_POLICIES["offload"]
    return NAMED_POLICIES["full"] if state.policy == KEEP else state.policy


def _forward(layer: nn.Module, original: type[nn.Module], args: Any, kwargs: Any) -> Any:
    state = state_of(layer)
    assert state is not None
    recipe, parallel = state.recipe, state.parallel
    read, run = (arguments_of, run_hf) if recipe.kind == "hf" else (torch_arguments, run_torch)
    try:
        if parallel is None:
            given = read(layer, recipe, args, kwargs)
        else:
            given = arguments_of(layer, recipe, args, kwargs, parallel.parts)
        weights, adapters = weights_of(layer, recipe, split=parallel is not None)
    except OwnForward as reason:
        if parallel is not None:
            raise ValueError(
                f"{state.name} is split over ranks, and its own forward, which knows nothing of "
                f"that, would have to run: {reason}"
            ) from reason
        return _own_forward(layer, original, state, str(reason), args, kwargs)
    options: dict[str, Any] = {
        "training": layer.training, "chunk_size": state.chunk_size, "impl": state.impl,
        "ffn_strategy": state.ffn_strategy, "offload_dir": state.offload_dir,
        "adapters": adapters,
    }  # fmt: skip
    policy = current_policy(layer, state)
    if parallel is None:
        if recipe.rest is not None and _checkpointing(layer):
            given = *given, layer._gradient_checkpointing_func
        output = run(layer, recipe, policy, weights, options, *given)
    else:
        x, position, seen = given
        options |= {ANGLES: position, **seen}
        output = parallel.forward(x, weights, policy, **options)
    return output if recipe.extra is None else (output, *[None] * recipe.extra)


def _own_forward(
    layer: nn.Module, original: type[nn.Module], state: State, reason: str, args: Any, kwargs: Any
) -> Any:
    """The layer as it was, within the checkpoint it was told of."""
    if layer.training and torch.is_grad_enabled():
        _warn_once(type(layer).__name__, state.name, reason)
    if not _checkpointing(layer):
        return original.forward(layer, *args, **kwargs)
    without = {"use_cache": False, **dict.fromkeys(CACHES)}
    kwargs = {name: without.get(name, value) for name, value in kwargs.items()}
    checkpoint: Any = layer._gradient_checkpointing_func
    return checkpoint(functools.partial(original.forward, layer, **kwargs), *args)


_warned: set[tuple[str, str]] = set()


def _warn_once(kind: str, name: str, reason: str) -> None:
    if (kind, reason) in _warned:
        return
    _warned.add((kind, reason))
    warnings.warn(
        f"{name} ({kind}) runs its own forward, and keeps what that keeps: {reason}", stacklevel=2
    )


def obstacle(layer: nn.Module) -> str | None:
    """Why a patched layer runs its own forward as its parts are now, or None."""
    state = state_of(layer)
    assert state is not None
    try:
        weights_of(layer, state.recipe)
    except OwnForward as reason:
        return str(reason)
    return None


def swap(layer: nn.Module, state: State) -> None:
    """Patch a layer, or change what a patched one knows."""
    if state_of(layer) is None:
        layer.__class__ = patched_class(type(layer))
    vars(layer)[STATE] = state


def unswap(layer: nn.Module) -> None:
    """Give a patched layer its class back."""
    layer.__class__ = original_class(layer)
    del vars(layer)[STATE]
