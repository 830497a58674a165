"""What a layer says of itself: what its attributes, its configuration and its weights tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .norms import is_norm
from .projections import projection


class NotUnderstood(Exception):
    """Why a layer is left alone."""


def attribute(layer: nn.Module, names: Sequence[str], kinds: Any = (int, float)) -> Any:
    """The first attribute of that name and kind, of the layer or of a module inside it."""
    for module in layer.modules():
        for name in names:
            value = getattr(module, name, None)
            if isinstance(value, kinds) and not isinstance(value, bool):
                return value
    return None


def configuration(layer: nn.Module) -> Any:
    """The Hugging Face configuration that one of a layer's modules holds, or None."""
    for module in layer.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            return config
    return None


def implementation(layer: nn.Module) -> str | None:
    """What a layer's configuration says computes its attention."""
    return getattr(configuration(layer), "_attn_implementation", None)


def residual_width(layer: nn.Module) -> int:
    """Width of the residual stream: the most frequent one that norms and projections share."""
    parts = [part for module in layer.modules() if (part := projection(module))]
    ins = {part.weight.shape[0 if part.transposed else 1] for part in parts}
    outs = {part.weight.shape[1 if part.transposed else 0] for part in parts}
    widths = [m.weight.numel() for m in layer.modules() if is_norm(m)]  # type: ignore[operator]
    shared = [width for width in widths if width in ins & outs]
    if not shared:
        raise NotUnderstood("no norm is as wide as a plain projection's input and output")
    return max(shared, key=shared.count)


def head_dim(layer: nn.Module, width: int) -> int:
    """Channels a head, by the attributes that say so."""
    found = attribute(layer, ("head_dim", "attention_head_size", "head_size"), int)
    heads = attribute(layer, ("num_heads", "num_attention_heads", "n_heads", "n_head"), int)
    if found is None and heads:
        found = width // heads
    if found is None:
        raise NotUnderstood("nothing says how many channels a head has")
    return int(found)


def rotary_dims(layer: nn.Module, head: int) -> list[int]:
    """How many channels of a head may rotate, the likeliest first."""
    factors = [1.0]
    config = configuration(layer)
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        factors.insert(0, part.get("partial_rotary_factor", 1.0))
    found = [int(head * factor) for factor in factors]
    return list(dict.fromkeys(dim for dim in found if dim % 2 == 0 and 0 < dim <= head))
