"""What a layer's parts are besides their weights: to tell layers apart, and to see them change."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

from torch import Tensor, nn

from .liger import is_ligers
from .peft import parts_of

#: Path of a part -> its type, the names of its parameters, those of its attributes, their values.
Facts = dict[str, tuple[type[nn.Module], tuple[str, ...], tuple[str, ...], tuple[Any, ...]]]

SIMPLE = (int, float, str, FunctionType, BuiltinFunctionType, type(None))

#: What PyTorch's own modules hold, and what says nothing of a layer's numbers.
_IGNORED = {
    *vars(nn.Module()), "gradient_checkpointing", "_gradient_checkpointing_func", "_backfuse"
}  # fmt: skip


def is_number(name: str) -> bool:
    """Whether an attribute says which layer of its model a layer is."""
    return name.endswith(("idx", "index", "layer_id"))


def numbers(layer: nn.Module) -> dict[tuple[str, str], Any]:
    """Path and name of each attribute that says which layer this is -> its value."""
    return {
        (path, name): value
        for path, module in (("", layer), *parts_of(layer))
        for name, value in vars(module).items()
        if is_number(name) and isinstance(value, int)
    }


def alike(layer: nn.Module, original: type[nn.Module]) -> object:
    """A key that layers share which differ in their weights' values and their number at most."""
    seen: list[object] = [original]
    for path, module in layer.named_modules():
        facts = tuple(
            (name, _key(value))
            for name, value in sorted(vars(module).items())
            if name not in _IGNORED
            and not (is_number(name) and isinstance(value, int))
            and not is_ligers(value)
        )
        shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
        buffers = tuple((n, _key(b)) for n, b in module.named_buffers(recurse=False))
        seen.append((path, type(module) if path else original, facts, shapes, buffers))
    return tuple(seen)


def _key(value: Any) -> object:
    """Equal for equal values; of an object that is not known, itself alone."""
    if isinstance(value, SIMPLE):
        return type(value), value
    if isinstance(value, Tensor):
        known = None if value.is_meta else tuple(value.detach().flatten().tolist())
        return value.dtype, tuple(value.shape), known
    if isinstance(value, list | tuple):
        return type(value), tuple(_key(one) for one in value)
    if isinstance(value, dict):
        return type(value), tuple((_key(name), _key(one)) for name, one in value.items())
    return type(value), id(value)


def remember(layer: nn.Module, original: type[nn.Module]) -> Facts:
    """The facts of a layer (path "") and its parts; PEFT's modules apart, which are read live."""
    facts: Facts = {}
    for path, module in (("", layer), *parts_of(layer)):
        kind = type(module) if path else original
        if kind.__module__.startswith("peft."):
            continue
        simple = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, SIMPLE) and not name.startswith("_")
            and name not in _IGNORED and not is_number(name)
        }  # fmt: skip
        facts[path] = kind, _present(module), tuple(simple), tuple(simple.values())
    return facts


def _present(module: nn.Module) -> tuple[str, ...]:
    """The names of a module's own parameters that are there."""
    return tuple([n for n, p in vars(module)["_parameters"].items() if p is not None])


def _as_attributes(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether a module has no parameters but those, and the others of them as plain tensors.

    So have the replicas of DataParallel, and modules in the forward pass of FSDP's first kind.
    """
    others = [name for name in names if vars(module)["_parameters"].get(name) is None]
    plain = all(isinstance(vars(module).get(name), Tensor) for name in others)
    return plain and set(_present(module)) <= {*names, "_flat_param"}


def change(layer: nn.Module, parts: Mapping[str, nn.Module], facts: Facts) -> str | None:
    """What is another than when the facts were taken, or None."""
    for path, module in (("", layer), *parts.items()):
        known = facts.get(path)
        if known is None:
            continue
        kind, present, names, values = known
        if path and type(module) is not kind:
            if type(module).__module__.startswith("peft."):
                continue
            return f"{path} is a {type(module).__name__}, was a {kind.__name__}"
        if _present(module) != present and not _as_attributes(module, present):
            return f"{path or 'it'} has the parameters {_present(module)}, had {present}"
        own = vars(module)
        if all(map(operator.is_, map(own.get, names), values)):  # nearly always, and quick
            continue
        for name, value in zip(names, values, strict=True):
            now = own.get(name)
            if now is not value and (type(now) is not type(value) or now != value):
                return f"{path + '.' if path else ''}{name} is {now!r}, was {value!r}"
    return None
