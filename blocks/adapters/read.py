"""Which modules of a live model are transformer layers, and what each of them is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from backfuse.blocks.block import TransformerBlock

from .attributes import NotUnderstood
from .facts import alike
from .liger import is_ligers
from .norms import is_norm
from .patched import original_class
from .projections import projection
from .recipe import Recipe
from .verify import same_but_for_number, understand


def _has_parts(module: nn.Module) -> bool:
    """Whether a module might be a transformer layer: a norm, and projections."""
    inner = [child for child in module.modules() if child is not module]
    count = sum(isinstance(m, nn.Linear) or projection(m) is not None for m in inner)
    return count >= 2 and any(is_norm(m) for m in inner)


def layers_of(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """The innermost modules in a list that might be layers, or the module itself."""
    found = list(_listed(module, name, set()))
    if not found and _has_parts(module):
        found = [(name, module)]
    yield from found


def _listed(module: nn.Module, name: str, seen: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    """Elements of lists that might be layers, and hold none."""
    in_list = isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)
    for key, child in module.named_children():
        place = f"{name}.{key}" if name else key
        if child in seen:
            continue
        seen.add(child)
        inner = list(_listed(child, place, seen))
        if not inner and in_list and _has_parts(child):
            inner = [(place, child)]
        yield from inner


def read(layers: Sequence[tuple[str, nn.Module]]) -> dict[str, Recipe | str]:
    """The recipe of each layer by its name, or why there is none.

    Of layers that are alike but for their weights and number, the first is read. Another is too, if
    its number changes what is computed.
    """
    groups: dict[object, list[tuple[str, nn.Module]]] = {}
    for name, layer in layers:
        groups.setdefault(alike(layer, original_class(layer)), []).append((name, layer))
    found: dict[str, Recipe | str] = {}
    for group in groups.values():
        inner = [layer for _, layer in group]
        first = _read_one(inner[0])
        if isinstance(first, Recipe):
            shared = _same(inner, first)
        else:
            shared = [first == _read_one(inner[-1])] * len(inner)
        for (name, layer), same in zip(group, shared, strict=True):
            found[name] = _own_obstacle(layer) or (first if same else _read_one(layer))
    return found


def _same(layers: Sequence[nn.Module], recipe: Recipe) -> list[bool]:
    """Which of the layers, all alike, are run as the first of them is."""
    first, *others = layers
    try:
        return [True, *same_but_for_number(first, others, recipe, original_class(first))]
    except Exception:  # whatever somebody's module raises, each is read
        return [True, *[False] * len(others)]


def _own_obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be patched whatever it is."""
    if isinstance(layer, TransformerBlock):
        return "it is a block of this library, which needs no patch: set its policy, or apply"
    if any(kind.__name__ == "FSDPModule" for kind in type(layer).__mro__):
        return "it is sharded by FSDP already: patch and plan before fully_shard"
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by hooks of accelerate, say)"
    for path, module in layer.named_modules():
        if is_ligers(type(module)):
            return (
                f"{path} is Liger's {type(module).__name__}, which no CPU runs: apply Liger to the "
                "model that is there (model=..., or Trainer's use_liger_kernel)"
            )
    return foreign_adapter(layer)


def foreign_adapter(layer: nn.Module) -> str | None:
    """Which of PEFT's layers stands in it that is no LoRA, in words."""
    for path, module in layer.named_modules():
        place = type(module).__module__
        if place.startswith("peft.tuners.") and not place.startswith("peft.tuners.lora"):
            return f"{path} is a {place}.{type(module).__name__}; of PEFT's a block has LoRA alone"
    return None


def _read_one(layer: nn.Module) -> Recipe | str:
    try:
        return understand(layer, original_class(layer))
    except NotUnderstood as reason:
        return str(reason)
    except Exception as error:  # whatever somebody's module raises, it is left alone
        return f"a copy of it raised {type(error).__name__}: {str(error).splitlines()[0]}"


def not_understood(model: nn.Module, found: Mapping[str, Recipe | str]) -> ValueError:
    """The error for a model without a layer that is understood, saying why."""
    told = "; ".join(f"{name or 'the model'}: {why}" for name, why in list(found.items())[:3])
    return ValueError(
        f"model is a {type(model).__name__} with no layer that is understood"
        + (f" ({told})" if told else ": nothing in it has a norm (with a weight) and projections")
    )
