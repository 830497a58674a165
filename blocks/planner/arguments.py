"""What users say to `plan`, made plain: specs, wanted gradients and budgets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from backfuse.blocks.devices import Device, free_bytes
from backfuse.blocks.keep import INPUT
from backfuse.blocks.lora import Adapters
from backfuse.blocks.memory import wanted_set
from backfuse.blocks.spec import BlockSpec

from .byte_sizes import parse_bytes

#: Share of the memory that is free which `"auto"` takes: the rest is for what fragments.
AUTO_SHARE = 0.9


def specs_of(spec: object, num_layers: int | None) -> tuple[BlockSpec, ...]:
    """One a layer, from one and a number, or from a sequence.

    Raises:
        TypeError: for something else.
        ValueError: for a number that is none or does not fit, and for several hidden sizes.
    """
    if isinstance(spec, Sequence) and spec and all(isinstance(s, BlockSpec) for s in spec):
        if num_layers not in (None, len(spec)):
            raise ValueError(
                f"num_layers is {num_layers!r}, expected {len(spec)}: so many layers are given"
            )
        if len({one.hidden_size for one in spec}) > 1:
            raise ValueError("model_or_spec holds blocks of several hidden sizes, expected one")
        return tuple(spec)
    if not isinstance(spec, BlockSpec):
        raise TypeError(
            f"model_or_spec is a {type(spec).__name__}, expected a live model (a torch.nn.Module), "
            "a BlockSpec, or one a layer"
        )
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise ValueError(f"num_layers is {num_layers!r}, expected a positive integer")
    return (spec,) * num_layers


def wanted_by(
    specs: Sequence[BlockSpec], requires_grad: Any, adapters: Adapters = ()
) -> tuple[tuple[str, ...], ...]:
    """Names for each layer, its input's among them where that wants a gradient.

    Args:
        specs: one a layer.
        requires_grad: see `plan`.
        adapters: of each layer's projections.

    Raises:
        TypeError, ValueError: see `wanted_set`; and for a sequence of another length.
    """
    one_each = (
        isinstance(requires_grad, Sequence) and not isinstance(requires_grad, str)
        and len(requires_grad) > 0 and not any(isinstance(name, str) for name in requires_grad)
    )  # fmt: skip
    each = requires_grad if one_each else [requires_grad] * len(specs)
    if len(each) != len(specs):
        raise ValueError(f"requires_grad holds {len(each)}, expected one a layer ({len(specs)})")
    found: list[tuple[str, ...]] = []
    for index, (spec, own) in enumerate(zip(specs, each, strict=True)):
        wanted = wanted_set(spec, own, adapters)
        said = not isinstance(own, bool) and INPUT in own
        flows = said or (any(found) if index else bool(wanted))
        wanted = wanted | {INPUT} if flows else wanted - {INPUT}
        found.append(tuple(sorted(wanted)))
    return tuple(found)


def budget_bytes(name: str, value: int | str, where: Device) -> int:
    """A budget: bytes, or those that `"auto"` finds.

    Args:
        name: of the budget.
        value: see `plan`.
        where: the device.

    Raises:
        TypeError, ValueError: see `parse_bytes`; and for a host budget of `"auto"`.
    """
    if value != "auto":
        return parse_bytes(name, value)
    if name == "host_budget":
        raise ValueError("host_budget is 'auto', expected bytes: what is free changes with the day")
    return int(AUTO_SHARE * free_bytes(where))
