"""`plan`: the plan that a user asks for, from a live model or from what its layers are."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from backfuse.blocks.adapters.live import LiveLayers, live_layers
from backfuse.blocks.devices import Device
from backfuse.blocks.devices import device as device_named
from backfuse.blocks.lora import AdaptersLike, parse_adapters
from backfuse.blocks.policy import KEEP, Policy
from backfuse.blocks.spec import BlockSpec
from backfuse.blocks.stack import Segments

from .arguments import budget_bytes, specs_of, wanted_by
from .choices import check_allow
from .optimal import Limits
from .plan import Plan
from .profile import device_here, profiled
from .search import Manual, manual, search
from .step import ModelSpec


def plan(
    model_or_spec: nn.Module | BlockSpec | Sequence[BlockSpec] | LiveLayers,
    *,
    num_layers: int | None = None,
    batch_size: int,
    seq_len: int,
    budget: int | str | None = None,
    peak_budget: int | str | None = None,
    host_budget: int | str | None = None,
    strategy: str = "optimal",
    policies: Manual | None = None,
    allow: Collection[str] = ("recompute", "offload"),
    device: Device | str | None = None,
    profile: bool = False,
    dtype: torch.dtype | None = None,
    requires_grad: bool | Collection[str] | Sequence[bool | Collection[str]] | None = None,
    adapters: AdaptersLike | None = None,
    model: ModelSpec | None = None,
) -> Plan:
    """What each layer of a model keeps, so that it is within the budgets and takes little time.

    Costs come from arithmetic and a table of devices: nothing is run, and no GPU is needed. With
    `profile` they come from real layers that are run here, once (see `profile.py`).

    Args:
        model_or_spec: a live model: its layers are its `TransformerBlock`s, or what `patch`
            understands (patched already or not; on any device, `meta` too); or each layer's spec;
            or a sequence of specs, one a layer.
        num_layers: how many, of one spec.
        batch_size: sequences.
        seq_len: tokens a sequence.
        budget: bytes for kept activations on the device, an integer or text (`"40GiB"`, `"40GB"`);
            `"auto"`: what is free on the device, less a tenth (of a device that is not here, its
            memory); None for any number.
        peak_budget: likewise for `Plan.peak_bytes`, which says what it counts.
        host_budget: likewise for what is kept on the host.
        strategy: one of `STRATEGIES`; what `optimal` finds may take up to half a thousandth of a
            step longer than the best.
        policies: with the strategy `manual`: one a layer, or rules, such as
            `{0: "keep", "layers.[1-3]": "lean"}` (the first that names a layer counts; layers that
            none names keep everything). `allow` does not matter then.
        allow: actions beside `keep`: `recompute`, `offload`, and `fp8`, which changes gradients.
        device: its name in `blocks/devices.py`, or a `Device`; with `profile` it has to be this
            machine's, and may be None: the current GPU, else the CPU. None: a live model's.
        profile: whether costs are measured on the device. What was measured before, with the same
            versions, layers and sizes, is read from `$BACKFUSE_CACHE/profiles`.
        dtype: of everything; None: a live model's, else bf16.
        requires_grad: names of what wants a gradient in each layer (see `kept_bytes`); None: what
            does in a live model, else everything; or a
            sequence of such, one a layer. Beside layers that name `hidden_states`, the input of the
            first is taken to want one if that layer does, that of another if a layer before does.
        adapters: projection -> its `LoRA`, or several, in each layer; None: a live model's.
        model: what surrounds the layers; peaks are then those of a whole step. None: of a live
            model `ModelSpec.from_model` where it has an embedding and a head, and no layer that is
            not understood; else nothing.

    Raises:
        BudgetError: (a ValueError) for a budget that no plan is within; it says the least that
            one is.
        TypeError: for a model, spec, budget, dtype or names that are none.
        ValueError: for sizes, names, strategies, devices, dtypes or actions that do not exist, and
            for a live model whose layers are not understood, as a whole and all alike in adapters.
    """
    check_allow(allow)
    given = model_or_spec
    live = live_layers(given) if isinstance(given, nn.Module) else given
    if isinstance(live, LiveLayers):
        specs = specs_of(list(live.specs.values()), num_layers)
        dtype = live.dtype if dtype is None else dtype
        requires_grad = live.requires_grad if requires_grad is None else requires_grad
        adapters = dict(live.adapters) if adapters is None else adapters
        model = live.model if model is None else model
        device = live.device if device is None else device
        if live.skipped and peak_budget is not None:
            raise ValueError(
                f"peak_budget is given, and {live.skipped[0]} is a layer that is not understood, "
                "expected budget: what that layer keeps is in no plan"
            )
    else:
        specs = specs_of(live, num_layers)
    dtype = torch.bfloat16 if dtype is None else dtype
    requires_grad = True if requires_grad is None else requires_grad
    layers = len(specs)
    if profile:
        where = device_here(device, dtype)
    elif device is None:
        raise ValueError("device is None, expected its name or a Device; None is for profile=True")
    else:
        where = device if isinstance(device, Device) else device_named(device)
    limits = {
        name: None if value is None else budget_bytes(name, value, where)
        for name, value in zip(Limits._fields, (budget, peak_budget, host_budget), strict=True)
    }
    own = parse_adapters(specs[0], adapters)
    if model is not None and not isinstance(model, ModelSpec):
        raise TypeError(f"model is a {type(model).__name__}, expected a ModelSpec or None")
    if (policies is not None) != (strategy == "manual"):
        raise ValueError(
            f"policies is {policies!r} with the strategy {strategy!r}, expected them together "
            "with 'manual', and only there"
        )
    said: tuple[Policy, ...] = (KEEP,) * layers
    parts: tuple[Segments, ...] = (1,) * layers
    if policies is not None:
        said, parts = manual(policies, layers)
    start = Plan(
        specs=specs, batch_size=batch_size, seq_len=seq_len, dtype=dtype,
        requires_grad=wanted_by(specs, requires_grad, own), device=where,
        strategy=strategy, allow=tuple(allow), **limits,
        policies=said, segments=parts, model=model, adapters=own,
    )  # fmt: skip
    if profile:
        search(start)  # what cannot be met is refused before anything runs
        sizes: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "dtype": dtype}
        start = replace(start, device=profiled(specs, where, **sizes))
    return search(start)
