"""PEFT's modules, read for what a block computes with: the base layer, and the adapters beside it.

PEFT is never imported: its modules are known by the names of their classes, and a module of
anybody else's passes through. Read in PEFT 0.21: `tuners/lora/layer.py`, `utils/other.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backfuse.blocks.lora import LoRA
from backfuse.blocks.remember import remembered


@remembered
def _lora(rank: int, scale: float, dropout: float, use_bias: bool, name: str) -> LoRA:
    """The adapter, the same one each time: a training step asks for the same ones."""
    return LoRA(rank, scale, dropout, use_bias, name)


def _number(value: float) -> float:
    """The number that a trace may have a symbol for; another one is another graph."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar  # SymPy: slow to import

    return float(guard_scalar(value))


class Live(NamedTuple):
    """A module without what PEFT put around it.

    Attributes:
        module: what was there before, or its copy in `modules_to_save` while that is active.
        adapters: the active ones, with the dropout that is active.
        tensors: A, B and B's bias (or None) of each.
    """

    module: Any
    adapters: tuple[LoRA, ...] = ()
    tensors: tuple[tuple[Tensor, Tensor, Tensor | None], ...] = ()

    def weights(self, projection: str) -> dict[str, Tensor]:
        """The adapters' tensors by the names under which a block looks for them."""
        found = {}
        for lora, given in zip(self.adapters, self.tensors, strict=True):
            for name, tensor in zip(lora.parameters(projection), given, strict=True):
                if tensor is not None:
                    found[name] = tensor
        return found


def active_of(module: Any) -> Any:
    """A module, or the one of PEFT's `modules_to_save` that is active in its place."""
    if type(module).__name__ != "ModulesToSaveWrapper":
        return module
    if module.disable_adapters or not module.active_adapters:
        return module.original_module
    return module.modules_to_save[module.active_adapters[0]]


def parts_of(
    module: nn.Module, skipped: tuple[str, ...] = (), path: str = ""
) -> Iterator[tuple[str, nn.Module]]:
    """The modules inside one, by their paths before PEFT wrapped any for `modules_to_save`.

    Args:
        module: a layer, or a module inside it.
        skipped: paths that are left out, with what is inside.
        path: the module's own.
    """
    for name, child in vars(module)["_modules"].items():
        place = f"{path}.{name}" if path else name
        if child is None or place in skipped:
            continue
        live = active_of(child)
        if live is not child:
            yield f"{place} (PEFT's wrapper)", child
        yield place, live
        if vars(live)["_modules"]:
            yield from parts_of(live, skipped, place)


def unwrap(module: Any) -> Live:
    """What a module computes with, adapters apart.

    While adapters are disabled, merged weights are restored, as PEFT's own forward would do.

    Raises:
        TypeError: for a module of PEFT's that computes something else than a base layer with LoRA
            beside it (DoRA and other variants, a quantised base, IA3, ...), saying what.
    """
    module = active_of(module)
    kind = type(module)
    if not kind.__module__.startswith("peft."):
        return Live(module)
    if (kind.__module__, kind.__name__) != ("peft.tuners.lora.layer", "Linear"):
        raise TypeError(f"{kind.__module__}.{kind.__name__} computes more than LoRA")
    if module.disable_adapters and module.merged:
        module.unmerge()
    if module.disable_adapters or module.merged:
        return Live(module.base_layer)
    names = [name for name in module.active_adapters if name in module.lora_A]
    adapters: list[LoRA] = []
    tensors: list[tuple[Tensor, Tensor, Tensor | None]] = []
    for name in names:
        variant = module.lora_variant.get(name)
        if variant is not None:
            raise TypeError(f"the adapter {name!r} is a {type(variant).__name__}")
        a, b, dropout = module.lora_A[name], module.lora_B[name], module.lora_dropout[name]
        if type(a) is not nn.Linear or type(b) is not nn.Linear or a.bias is not None:
            raise TypeError(
                f"the adapter {name!r} is made of {type(a).__name__} and {type(b).__name__}"
            )
        if type(dropout) not in (nn.Identity, nn.Dropout):
            raise TypeError(f"the adapter {name!r} has a {type(dropout).__name__} for its dropout")
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        scale = float(module.scaling[name])
        if torch.compiler.is_compiling():  # with dynamic=True these are symbols, and an operator's
            p, scale = _number(p), _number(scale)  # text holds numbers
        adapters.append(_lora(a.weight.shape[0], scale, p, b.bias is not None, name))
        tensors.append((a.weight, b.weight, b.bias))
    return Live(module.base_layer, tuple(adapters), tuple(tensors))
