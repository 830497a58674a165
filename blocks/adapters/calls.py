"""What a patched layer is called with, and its parameters, as a block's functions take them.

Whatever a block would not do exactly as the layer does is refused with `OwnForward`: an argument
that is not known, a mask of another shape, a cache, a part with a hook that would not be called.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.lora import Adapters, LoRA

from .attributes import attribute, implementation
from .facts import change
from .liger import forward_of_its_own
from .masks import PACKED, seen_by
from .peft import parts_of, unwrap
from .projections import projection
from .recipe import OwnForward, Recipe
from .stand_in import ANGLES, MASK

#: Arguments that hold a cache of keys and values.
CACHES = ("past_key_values", "past_key_value", "layer_past")

#: Arguments that change nothing a block computes, whatever they hold.
HARMLESS = (
    "position_ids", "cache_position", "use_cache", "output_hidden_states", "return_dict",
    "num_items_in_batch", "logits_to_keep", "seq_idx", "output_router_logits", *PACKED,
)  # fmt: skip


def arguments_of(
    layer: nn.Module, recipe: Recipe, args: Any, kwargs: dict[str, Any], parts: int = 1
) -> tuple[Tensor, tuple[Tensor, Tensor] | None, dict[str, Any]]:
    """Input, angles, and what is seen (`seen_by`), of a call that a block can do.

    Args:
        layer: the live layer.
        recipe: how it is run.
        args: what it was called with.
        kwargs: see args.
        parts: of how many parts like the input whole sequences are; angles and masks are of these.
    """
    given = dict(zip(recipe.arguments, args, strict=False))
    given.update(kwargs)
    x, position = (given.pop(name, None) for name in (recipe.arguments[0], ANGLES))
    for name, value in given.items():
        if name in CACHES:
            if value is not None and not _unused_cache(layer, value):
                raise OwnForward("it is given a cache of keys and values")
        elif name not in (MASK, *HARMLESS):
            silent = value is None or (value is False and name != "is_causal")
            if not silent or name in recipe.defaults:
                raise OwnForward(f"it is given {name}, which a block does not know")
    if not isinstance(x, Tensor) or x.dim() != 3 or x.is_nested:
        raise OwnForward("its input is no tensor of [batch, seq_len, width]")
    if x.numel() == 0:
        raise OwnForward("its input is empty")
    if implementation(layer) != recipe.implementation:
        raise OwnForward(
            f"its attention was {recipe.implementation!r} when it was patched and is "
            f"{implementation(layer)!r}; patch again"
        )
    whole = x
    if parts > 1:  # of the whole sequences' shape, and no memory
        whole = x.new_empty(()).expand(len(x), x.shape[1] * parts, x.shape[2])
    return x, _position(recipe, position), seen_by(recipe, whole, given)


def _unused_cache(layer: nn.Module, cache: Any) -> bool:
    """Whether nobody needs what would go into a cache: as under Hugging Face's checkpointing."""
    if not (layer.training and torch.is_grad_enabled()):
        return False
    length = getattr(cache, "get_seq_length", None)
    index = attribute(layer, ("layer_idx",), int)
    if length is None or index is None or int(length(index)) != 0:
        return False
    if torch.compiler.is_compiling():
        return True
    left_empty = vars(cache).setdefault("_backfuse_left_empty", set())
    if index in left_empty:
        warnings.warn(
            "a cache of keys and values comes a second time that a patched layer left empty: in "
            "training nothing is cached (as under Hugging Face's checkpointing), so what stood "
            "there before is not seen. Call the model in eval mode or under torch.no_grad() to "
            "generate, or unpatch it",
            stacklevel=2,
        )
    left_empty.add(index)
    return True


def _position(recipe: Recipe, position: Any) -> tuple[Tensor, Tensor] | None:
    if recipe.spec.rope is None:
        return None
    if not isinstance(position, tuple | list) or len(position) != 2:
        raise OwnForward(f"it is given no {ANGLES}")
    cos, sin = position
    if not isinstance(cos, Tensor) or cos.shape[-1] != recipe.spec.rotary_dim:
        raise OwnForward(f"{ANGLES} are not of {recipe.spec.rotary_dim} channels")
    return (cos[None], sin[None]) if cos.dim() == 2 else (cos, sin)


def weights_of(
    layer: nn.Module, recipe: Recipe, split: bool = False
) -> tuple[dict[str, Tensor], Adapters]:
    """The live parameters by the spec's names, and PEFT's active LoRA with its own.

    Args:
        layer: the live layer.
        recipe: how it is run.
        split: whether they are DTensors, as `parallelize` left them.

    Raises:
        OwnForward: if anything else happens in their modules.
    """
    if nn.modules.module._has_any_global_hook():
        raise OwnForward("all modules have a hook, which would not be called in its parts")
    parts = dict(parts_of(layer, recipe.rest or ()))
    spec = recipe.spec
    drops = spec.attention_dropout or spec.residual_dropout or spec.activation_dropout
    for path, module in parts.items():
        facts = vars(module)
        if facts["_forward_hooks"] or facts["_forward_pre_hooks"] or forward_of_its_own(module):
            if not _inactive_hooks(module):
                raise OwnForward(
                    f"{path} has a hook, or a forward of its own, which would not be called"
                )
        if facts["_backward_hooks"] or facts["_backward_pre_hooks"]:
            raise OwnForward(f"{path} has a hook, which would not be called")
        if drops and module.training != layer.training:
            raise OwnForward(f"{path} is in another mode than its layer, which drops out")
    weights: dict[str, Tensor] = {}
    adapters: dict[str, tuple[LoRA, ...]] = {}
    for name, place, kind in recipe.places:
        module = parts.get(place, layer)
        if module is layer and place:
            raise OwnForward(f"{place} is not where it was when it was patched; patch again")
        if type(module) is not nn.Linear or place in recipe.types:
            module = _unwrapped(name, place, module, recipe, weights, adapters)
        weight = vars(module)["_parameters"].get(kind)
        if weight is None:  # a plain attribute in DataParallel's replicas and under FSDP 1
            weight = getattr(module, kind, None)
        if not split and type(weight) not in (Tensor, nn.Parameter):
            raise OwnForward(f"{place}.{kind} is a {type(weight).__name__}")
        weights[name] = weight
    if (changed := change(layer, parts, recipe.facts)) is not None:
        raise OwnForward(f"{changed} when it was patched; patch again")
    return weights, tuple(adapters.items())


def _unwrapped(
    name: str,
    place: str,
    module: nn.Module,
    recipe: Recipe,
    weights: dict[str, Tensor],
    adapters: dict[str, tuple[LoRA, ...]],
) -> nn.Module:
    """A parameter's module without what PEFT put around it, whose tensors go to the weights."""
    try:
        live = unwrap(module)
    except TypeError as error:
        raise OwnForward(f"{place}: {error}") from error
    kind: type[nn.Module] = type(live.module)
    if place in recipe.types:
        if kind is not recipe.types[place]:
            raise OwnForward(f"{place} is a {kind.__name__}")
        if live.adapters:
            raise OwnForward(f"{place} is a {kind.__name__} with an adapter beside it")
    elif projection(live.module) is None:
        raise OwnForward(f"{place} is a {kind.__name__} of {kind.__module__}")
    elif live.adapters and name.endswith(".weight"):
        own = name.removesuffix(".weight")
        weights |= live.weights(own)
        adapters[own] = live.adapters
    inner: nn.Module = live.module
    return inner


def _inactive_hooks(module: nn.Module) -> bool:
    """Whether a module's only hooks are transformers', which stay once outputs were asked for."""
    capturing = sys.modules.get("transformers.utils.output_capturing")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    if capturing is None or forward_of_its_own(module):
        return False
    if any(getattr(hook, "__module__", None) != capturing.__name__ for hook in hooks):
        return False
    asked = capturing._active_collector.get()
    harmless = ("hidden_states", "router_logits")  # which no part of a block gives
    return asked is None or all(any(one in key for one in harmless) for key in asked)
