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
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.function import attention, block
from backfuse.blocks.policy import KEEP, NAMED_POLICIES, Policy

from .projections import projection
from .stand_in import ANGLES, MASK
from .verify import Recipe, first_tensor, implementation

#: Where a patched layer keeps what it knows; neither a parameter nor a module.
STATE = "_backfuse"

#: Arguments that hold a cache of keys and values.
CACHES = ("past_key_values", "past_key_value", "layer_past")

#: Arguments that change nothing a block computes, whatever they hold.
HARMLESS = (
    "position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict",
    "num_items_in_batch", "logits_to_keep",
)  # fmt: skip


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
    """

    recipe: Recipe
    policy: Policy
    name: str = "layer"
    chunk_size: int | None = None
    impl: str = "auto"
    ffn_strategy: str = "auto"
    offload_dir: Path | None = None


class _Own(Exception):
    """Why the layer's own forward runs."""


def state_of(layer: nn.Module) -> State | None:
    """What a patched layer knows; None for any other."""
    state = vars(layer).get(STATE)
    return state if isinstance(state, State) else None


def original_class(layer: nn.Module) -> type[nn.Module]:
    """The class of a layer, or of a patched one before that."""
    kind = type(layer)
    while "_backfuse_original" not in vars(kind) and hasattr(kind, "_backfuse_original"):
        kind = kind.__mro__[1]  # what a sharding engine made of a patched class
    return vars(kind).get("_backfuse_original", kind)


def _restore(original: type[nn.Module]) -> nn.Module:
    """An empty patched layer, for pickle and copy."""
    kind = patched_class(original)
    return kind.__new__(kind)


@functools.cache
def patched_class(original: type[nn.Module]) -> type[nn.Module]:
    """The class of patched layers that had the class `original`; the same one each time."""

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
    kind = type(original.__name__, (original,), body)

    @functools.wraps(original.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return _forward(self, original, args, kwargs)

    # Set on the finished class: transformers wraps the forward of a class that is being made.
    kind.forward = forward  # type: ignore[method-assign]
    return kind


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
    try:
        given = _arguments(layer, state.recipe, args, kwargs)
        weights = _weights(layer, state.recipe)
    except _Own as reason:
        return _own_forward(layer, original, state, str(reason), args, kwargs)
    output = _run(layer, state, weights, *given)
    extra = state.recipe.extra
    return output if extra is None else (output, *[None] * extra)


def _run(
    layer: nn.Module,
    state: State,
    weights: dict[str, Tensor],
    x: Tensor,
    position: tuple[Tensor, Tensor] | None,
    mask: Tensor | None,
) -> Tensor:
    recipe = state.recipe
    given: dict[str, Any] = {
        ANGLES: position, MASK: mask, "training": layer.training,
        "chunk_size": state.chunk_size, "impl": state.impl,
    }  # fmt: skip
    policy = current_policy(layer, state)
    if recipe.rest is None:
        given |= {"ffn_strategy": state.ffn_strategy, "offload_dir": state.offload_dir}
        return block(x, weights, recipe.spec, policy, **given)
    mid = attention(x, weights, recipe.spec, policy, **given)
    norm, ffn = (layer.get_submodule(path) for path in recipe.rest)
    return mid + first_tensor(ffn(norm(mid)))


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


def _arguments(
    layer: nn.Module, recipe: Recipe, args: Any, kwargs: dict[str, Any]
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, Tensor | None]:
    """Input, angles and mask of a call that a block can do."""
    given = dict(zip(recipe.arguments, args, strict=False))
    given.update(kwargs)
    x, mask, position = (given.pop(n, None) for n in (recipe.arguments[0], MASK, ANGLES))
    for name, value in given.items():
        if name in CACHES:
            if value is not None and not _unused_cache(layer, value):
                raise _Own("it is given a cache of keys and values")
        elif name not in HARMLESS and value is not None:
            if value is not False or name == "is_causal":
                raise _Own(f"it is given {name}, which a block does not know")
    if not isinstance(x, Tensor) or x.dim() != 3 or x.is_nested:
        raise _Own("its input is no tensor of [batch, seq_len, width]")
    if x.numel() == 0:
        raise _Own("its input is empty")
    if implementation(layer) != recipe.implementation:
        raise _Own(
            f"its attention was {recipe.implementation!r} when it was patched and is "
            f"{implementation(layer)!r}; patch again"
        )
    return x, _position(recipe, position), _mask(recipe, x, mask)


def _unused_cache(layer: nn.Module, cache: Any) -> bool:
    """Whether nobody needs what would go into a cache: as under Hugging Face's checkpointing."""
    if not (layer.training and torch.is_grad_enabled()):
        return False
    length = getattr(cache, "get_seq_length", None)
    return length is not None and int(length()) == 0


def _position(recipe: Recipe, position: Any) -> tuple[Tensor, Tensor] | None:
    if recipe.spec.rope is None:
        return None
    if not isinstance(position, tuple | list) or len(position) != 2:
        raise _Own(f"it is given no {ANGLES}")
    cos, sin = position
    if not isinstance(cos, Tensor) or cos.shape[-1] != recipe.spec.rotary_dim:
        raise _Own(f"{ANGLES} are not of {recipe.spec.rotary_dim} channels")
    return cos, sin


def _mask(recipe: Recipe, x: Tensor, mask: Any) -> Tensor | None:
    """The mask as a block takes it; None where its spec says what is seen."""
    batch, seq_len = x.shape[:2]
    spec = recipe.spec
    if mask is None:
        if not recipe.unmasked:
            raise _Own("it is given no mask, which its attention takes for no causality")
        if spec.sliding_window is not None and seq_len > spec.sliding_window:
            raise _Own("it is given no mask, which its attention takes for no window")
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.requires_grad:
        raise _Own(f"its {MASK} is not [batch, heads, seq_len, seq_len]")
    wanted = ((1, batch), (1, spec.num_attention_heads), (1, seq_len), (seq_len,))
    if any(size not in sizes for size, sizes in zip(mask.shape, wanted, strict=True)):
        raise _Own(f"its {MASK} is of shape {list(mask.shape)}, with {seq_len} tokens")
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise _Own(f"its {MASK} is {mask.dtype}")
    return mask.expand(-1, -1, seq_len, -1)


def _weights(layer: nn.Module, recipe: Recipe) -> dict[str, Tensor]:
    """The live parameters by the spec's names, if nothing else happens in their modules."""
    skipped = recipe.rest or ()
    for path, module in _parts(layer, skipped):
        if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
            if not _inactive_hooks(module):
                raise _Own(f"{path} has a hook, or a forward of its own, which would not be called")
        if module._backward_hooks or module._backward_pre_hooks:
            raise _Own(f"{path} has a hook, which would not be called")
        if module.training != layer.training:
            spec = recipe.spec
            if spec.attention_dropout or spec.residual_dropout:
                raise _Own(f"{path} is in another mode than its layer, which drops out")
    weights = {}
    for name, path in recipe.names.items():
        place, _, kind = path.rpartition(".")
        module = layer.get_submodule(place)
        if place in recipe.types:
            if type(module) is not recipe.types[place]:
                raise _Own(f"{place} is a {type(module).__name__}")
            weight = getattr(module, kind)
        else:
            found = projection(module)
            if found is None or found.adapters:
                raise _Own(f"{place} is a {type(module).__name__} of {type(module).__module__}")
            weight = found.weight if kind == "weight" else found.bias
        if type(weight) not in (Tensor, nn.Parameter):
            raise _Own(f"{path} is a {type(weight).__name__}")
        weights[name] = weight
    return weights


def _parts(
    module: nn.Module, skipped: tuple[str, ...], path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The modules in a layer that are not called when a block's function runs."""
    for name, child in module._modules.items():
        place = f"{path}.{name}" if path else name
        if child is not None and place not in skipped:
            yield place, child
            yield from _parts(child, skipped, place)


def _inactive_hooks(module: nn.Module) -> bool:
    """Whether a module's only hooks are transformers', which stay once outputs were asked for."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if capturing is None or "forward" in vars(module):
        return False
    if any(getattr(hook, "__module__", None) != capturing.__name__ for hook in hooks):
        return False
    asked = capturing._active_collector.get()
    return asked is None or all("hidden_states" in key for key in asked)


def obstacle(layer: nn.Module) -> str | None:
    """Why a patched layer runs its own forward as its parts are now, or None."""
    state = state_of(layer)
    assert state is not None
    try:
        _weights(layer, state.recipe)
    except _Own as reason:
        return str(reason)
    return None


def swap(layer: nn.Module, state: State) -> None:
    """Patch a layer, or change what a patched one knows."""
    if state_of(layer) is None:
        layer.__class__ = patched_class(type(layer))
    vars(layer)[STATE] = state


def with_policy(layer: nn.Module, policy: Policy) -> None:
    """Change what a patched layer keeps."""
    state = state_of(layer)
    assert state is not None
    vars(layer)[STATE] = replace(state, policy=policy)


def unswap(layer: nn.Module) -> None:
    """Give a patched layer its class back."""
    layer.__class__ = original_class(layer)
    del vars(layer)[STATE]
