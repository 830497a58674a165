"""`patch` and `unpatch`: a model people have, its layers run as blocks.

What a layer is gets read from the layer (`recognise.py`) and held against its own numbers
(`verify.py`); then its class is swapped (`patched.py`). Everything is collected before anything is
changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from backfuse.blocks.devices import Device
from backfuse.blocks.inputs import check_chunk_size, check_impl, check_offload_dir
from backfuse.blocks.planner.make import plan as make_plan
from backfuse.blocks.planner.plan import Plan
from backfuse.blocks.policy import Policy, PolicyLike
from backfuse.blocks.split import is_split

from .live import read_layers
from .patched import State, obstacle, original_class, patched_class, state_of, swap, unswap
from .read import foreign_adapter, layers_of, not_understood, read
from .recipe import Recipe
from .report import PatchedLayer, PatchReport

#: What a layer is taken to keep if nobody says.
DEFAULT = "selective"


def patch(
    model: nn.Module,
    policy: PolicyLike | Sequence[PolicyLike] | None = None,
    *,
    budget: int | str | None = None,
    peak_budget: int | str | None = None,
    plan: Plan | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    device: Device | str | None = None,
    profile: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
    ffn_strategy: str = "auto",
    offload_dir: str | Path | None = None,
) -> PatchReport:
    """Let the layers of a live model keep for their backward pass what a policy says.

    The layers keep their parameters and names: `state_dict`, optimizers, PEFT and Trainer go on as
    before. A call that a block cannot do (generation with a cache, say) is run by the layer's own
    forward. A model that is patched already gets the new policy.

    Args:
        model: of transformers, or any module with transformer layers in it; or one such layer.
        policy: one for all layers (see `TransformerBlock`), or a sequence with one for each layer
            that is fused or half fused; None: `"selective"`, or what budget or plan say.
        budget: bytes that all layers together may keep on the device, an integer or text
            (`"40GiB"`, `"auto"`): as if `backfuse.plan(model, budget=...)` were applied, for
            `batch_size` and `seq_len`. It offloads nothing of a model on a CPU, unless to
            `offload_dir`.
        peak_budget: likewise of the peak of a whole step with AdamW; of the layers alone, where
            they are not between an embedding and a head.
        plan: a plan of these layers, made before.
        batch_size: sequences in a step, for budgets.
        seq_len: tokens a sequence, for budgets.
        device: whose rates the plan is made with, for budgets (see `plan`); None: the model's.
        profile: whether the layers are timed for the plan, for budgets (see `plan`).
        chunk_size: see `TransformerBlock`.
        impl: see `TransformerBlock`.
        ffn_strategy: see `TransformerBlock`.
        offload_dir: see `TransformerBlock`.

    Returns:
        What was fused, fused by half, or skipped and why; prints as a table.

    Raises:
        TypeError: for something that is no module, policy or plan.
        ValueError: for a model without a layer that is understood, saying why; for one that is
            sharded already; for policies, plans or budgets that do not fit. The model is then as
            it was.
    """
    _check_model(model)
    by_plan = budget is not None or peak_budget is not None
    if sum((policy is not None, plan is not None, by_plan)) > 1:
        raise ValueError("policy, budget and plan: more than one is given, expected one of them")
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if by_plan and value is None:
            raise ValueError(
                f"{name} is None, expected the number of a training step's: what a layer keeps "
                "for a budget depends on it"
            )
    of_plans = {
        "batch_size": batch_size, "seq_len": seq_len, "device": device, "profile": profile or None,
    }  # fmt: skip
    for name, given in of_plans.items():
        if not by_plan and given is not None:
            raise ValueError(f"{name} is {given!r} without a budget, which alone it is for")
    options: dict[str, Any] = {
        "chunk_size": check_chunk_size(chunk_size), "impl": impl, "ffn_strategy": ffn_strategy,
        "offload_dir": check_offload_dir(offload_dir),
    }  # fmt: skip
    check_impl(impl, ffn_strategy)
    layers = list(layers_of(model))
    found = read(layers)
    for name, layer in layers:  # what can fail is done before anything is changed
        if isinstance(found[name], Recipe):
            try:
                patched_class(original_class(layer))
            except Exception as error:  # whatever somebody's metaclass raises
                found[name] = f"no class can be made of its own: {type(error).__name__}: {error}"
    known = {name: recipe for name, recipe in found.items() if isinstance(recipe, Recipe)}
    if not known and layers and all(foreign_adapter(layer) for _, layer in layers):
        rows = [PatchedLayer(n, original_class(m).__name__, "skipped", None, str(found[n]))
                for n, m in layers]  # fmt: skip
        return PatchReport(rows)
    if not known:
        raise not_understood(model, found)
    if by_plan:
        assert batch_size is not None and seq_len is not None
        live = read_layers(model, known, tuple(name for name in found if name not in known))
        # on a CPU what is offloaded to host memory is still there
        here = live.place.type == "cpu" and options["offload_dir"] is None
        plan = make_plan(
            live, batch_size=batch_size, seq_len=seq_len, budget=budget,
            peak_budget=peak_budget, device=device, profile=profile,
            allow=("recompute",) if here else ("recompute", "offload"),
        )  # fmt: skip
    policies = _policies(known, policy, plan)
    rows = []
    for name, layer in layers:
        kind = original_class(layer).__name__
        recipe = found[name]
        if not isinstance(recipe, Recipe):
            if state_of(layer) is not None:
                unswap(layer)
            rows.append(PatchedLayer(name, kind, "skipped", None, recipe))
            continue
        swap(layer, State(recipe, policies[name], name or "the model", **options))
        why = obstacle(layer)
        reason = f"runs its own forward for now: {why}" if why else None
        if recipe.unreached and not why:
            reason = f"but for calls that reach {recipe.unreached}: its own forward runs them"
        status = "fused" if recipe.rest is None else "half"
        rows.append(PatchedLayer(name, kind, status, policies[name], reason))
    return PatchReport(rows)


def unpatch(model: nn.Module) -> int:
    """Give the patched layers of a model their classes back.

    Args:
        model: as given to `patch`.

    Returns:
        How many layers there were.

    Raises:
        TypeError: for something that is no module.
        ValueError: for a model that was sharded since.
    """
    _check_model(model)
    patched = [module for module in model.modules() if state_of(module) is not None]
    for layer in patched:
        unswap(layer)
    return len(patched)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    for name, module in model.named_modules():
        if any(kind.__name__.startswith(("FSDPModule", "FullyShardedDataParallel"))
               for kind in type(module).__mro__):  # fmt: skip
            raise ValueError(
                f"{name or 'model'} is sharded by FSDP, expected a model that is not yet: patch "
                "(and unpatch) first, shard then"
            )
    for name, parameter in model.named_parameters():
        if is_split(parameter):
            raise ValueError(
                f"{name} is a DTensor, expected a plain tensor: patch first, distribute then"
            )


def _policies(
    known: Mapping[str, Recipe], policy: PolicyLike | Sequence[PolicyLike] | None, plan: Plan | None
) -> dict[str, Policy]:
    """One a layer.

    Raises:
        TypeError: for something that is no policy or plan.
        ValueError: for one that does not fit the layers.
    """
    given: list[PolicyLike]
    if plan is not None:
        if not isinstance(plan, Plan):
            raise TypeError(f"plan is a {type(plan).__name__}, expected a Plan")
        for name, recipe in known.items():
            if recipe.unreached:
                raise ValueError(
                    f"plan is given, and calls that reach {recipe.unreached} of {name} keep what "
                    "they always kept: give policy"
                )
            if recipe.rest is not None:
                raise ValueError(
                    f"plan is given, and only the attention half of {name} is fused: give policy"
                )
        plan.check_fits({name: recipe.spec for name, recipe in known.items()})
        plan.check_unsegmented()
        given = list(plan.policies)
    elif isinstance(policy, Sequence) and not isinstance(policy, str):
        given = list(policy)
        if len(given) != len(known):
            raise ValueError(
                f"policy holds {len(given)} policies, expected one for each layer that is "
                f"understood ({len(known)})"
            )
    else:
        given = [DEFAULT if policy is None else policy] * len(known)
    parsed = [Policy.parse(one) for one in given]
    for one in parsed:
        one.check_available()
        if not one.keeps("x"):
            raise ValueError(
                f"policy is {one}, expected one that keeps x: the layers of a patched model are "
                "called one by one, and share no segments"
            )
    return dict(zip(known, parsed, strict=True))
