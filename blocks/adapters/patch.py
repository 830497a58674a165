"""`patch` and `unpatch`: a model people have, its layers run as blocks.

What a layer is gets read from the layer (`recognise.py`) and held against its own numbers
(`verify.py`); then its class is swapped (`patched.py`). Everything is collected before anything is
changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.devices import DEVICES, Device, device_at
from backfuse.blocks.inputs import check_chunk_size, check_impl, check_offload_dir
from backfuse.blocks.keep import INPUT
from backfuse.blocks.lora import Adapters
from backfuse.blocks.planner.plan import Plan
from backfuse.blocks.planner.plan import plan as make_plan
from backfuse.blocks.policy import Policy, PolicyLike

from .attributes import NotUnderstood
from .calls import weights_of
from .facts import alike
from .liger import is_ligers
from .norms import is_norm
from .patched import State, obstacle, original_class, state_of, swap, unswap
from .projections import projection
from .recipe import OwnForward, Recipe
from .report import PatchedLayer, PatchReport
from .verify import same_but_for_number, understand

#: What a layer is taken to keep if nobody says.
DEFAULT = "selective"


def patch(
    model: nn.Module,
    policy: PolicyLike | Sequence[PolicyLike] | None = None,
    *,
    budget: int | str | None = None,
    plan: Plan | None = None,
    batch_size: int | None = None,
    seq_len: int | None = None,
    device: Device | str | None = None,
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
            (`"40GiB"`): `backfuse.plan` chooses the policies, for `batch_size` and `seq_len`. It
            offloads nothing of a model on a CPU, unless to `offload_dir`.
        plan: a plan of these layers, made before.
        batch_size: sequences in a step, for budget.
        seq_len: tokens a sequence, for budget.
        device: whose rates the plan is made with, for budget (see `plan`); None: the model's.
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
    if sum(given is not None for given in (policy, budget, plan)) > 1:
        raise ValueError("policy, budget and plan: more than one is given, expected one of them")
    options: dict[str, Any] = {
        "chunk_size": check_chunk_size(chunk_size), "impl": impl, "ffn_strategy": ffn_strategy,
        "offload_dir": check_offload_dir(offload_dir),
    }  # fmt: skip
    check_impl(impl, ffn_strategy)
    layers = list(_layers(model))
    read = _read(layers)
    known = {name: recipe for name, recipe in read.items() if isinstance(recipe, Recipe)}
    if not known and layers and all(_foreign_adapter(layer) for _, layer in layers):
        rows = [PatchedLayer(n, original_class(m).__name__, "skipped", None, str(read[n]))
                for n, m in layers]  # fmt: skip
        return PatchReport(rows)
    if not known:
        told = "; ".join(f"{name or 'the model'}: {why}" for name, why in list(read.items())[:3])
        raise ValueError(
            f"model is a {type(model).__name__} with no layer that is understood"
            + (f" ({told})" if told else ": nothing in it has a norm and projections")
        )
    if budget is not None:
        files = options["offload_dir"] is not None
        plan = _planned(model, known, budget, batch_size, seq_len, device, files)
    policies = _policies(known, policy, plan)
    rows = []
    for name, layer in layers:
        kind = original_class(layer).__name__
        recipe = read[name]
        if not isinstance(recipe, Recipe):
            if state_of(layer) is not None:
                unswap(layer)
            rows.append(PatchedLayer(name, kind, "skipped", None, recipe))
            continue
        swap(layer, State(recipe, policies[name], name or "the model", **options))
        why = obstacle(layer)
        reason = f"runs its own forward for now: {why}" if why else None
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
        if type(parameter.data) is not Tensor:
            raise ValueError(
                f"{name} is a {type(parameter.data).__name__}, expected a plain tensor: patch "
                "first, distribute then"
            )


def _has_parts(module: nn.Module) -> bool:
    """Whether a module might be a transformer layer: a norm, and projections."""
    inner = [child for child in module.modules() if child is not module]
    count = sum(isinstance(m, nn.Linear) or projection(m) is not None for m in inner)
    return count >= 2 and any(is_norm(m) for m in inner)


def _layers(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
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


def _read(layers: Sequence[tuple[str, nn.Module]]) -> dict[str, Recipe | str]:
    """The recipe of each layer by its name, or why there is none.

    Of layers that are alike but for their weights and number, the first is read. Another is too, if
    its number changes what is computed.
    """
    groups: dict[object, list[tuple[str, nn.Module]]] = {}
    for name, layer in layers:
        groups.setdefault(alike(layer, original_class(layer)), []).append((name, layer))
    read: dict[str, Recipe | str] = {}
    for group in groups.values():
        inner = [layer for _, layer in group]
        first = _read_one(inner[0])
        if isinstance(first, Recipe):
            shared = _same(inner, first)
        else:
            shared = [first == _read_one(inner[-1])] * len(inner)
        for (name, layer), same in zip(group, shared, strict=True):
            read[name] = _own_obstacle(layer) or (first if same else _read_one(layer))
    return read


def _same(layers: Sequence[nn.Module], recipe: Recipe) -> list[bool]:
    """Which of the layers, all alike, are run as the first of them is."""
    first, *others = layers
    try:
        return [True, *same_but_for_number(first, others, recipe, original_class(first))]
    except Exception:  # whatever somebody's module raises, each is read
        return [True, *[False] * len(others)]


def _own_obstacle(layer: nn.Module) -> str | None:
    """Why a layer cannot be patched whatever it is."""
    if "forward" in vars(layer):
        return "its forward was replaced on the instance (by hooks of accelerate, say)"
    for path, module in layer.named_modules():
        if is_ligers(type(module)):
            return (
                f"{path} is Liger's {type(module).__name__}, which no CPU runs: apply Liger to the "
                "model that is there (model=..., or Trainer's use_liger_kernel)"
            )
    return _foreign_adapter(layer)


def _foreign_adapter(layer: nn.Module) -> str | None:
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
        _check_plan(plan, known)
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


def _check_whole(known: Mapping[str, Recipe], what: str) -> None:
    """Raise a ValueError for a layer of which only a half is a block's."""
    for name, recipe in known.items():
        if recipe.rest is not None:
            raise ValueError(
                f"{what} is given, and only the attention half of {name} is fused: give policy"
            )


def _check_plan(plan: object, known: Mapping[str, Recipe]) -> None:
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}, expected a Plan")
    _check_whole(known, "plan")
    if plan.num_layers != len(known):
        raise ValueError(f"the plan has {plan.num_layers} layers, expected {len(known)}")
    for (name, recipe), spec in zip(known.items(), plan.specs, strict=True):
        if spec != recipe.spec:
            raise ValueError(f"the plan has {spec} for {name}, expected {recipe.spec}")
    if any(part != 1 for part in plan.segments):
        raise ValueError(
            f"the plan has segments {plan.segments}, expected none: the layers of a patched model "
            "are called one by one (strategy='optimal')"
        )


def _planned(
    model: nn.Module,
    known: Mapping[str, Recipe],
    budget: int | str,
    batch_size: int | None,
    seq_len: int | None,
    device: Device | str | None,
    files: bool,
) -> Plan:
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value is None:
            raise ValueError(
                f"{name} is None, expected the number of a training step's: what a layer keeps "
                "for budget depends on it"
            )
    assert batch_size is not None and seq_len is not None
    _check_whole(known, "budget")
    wanted: list[set[str]] = []
    beside: set[Adapters] = set()
    for name, recipe in known.items():
        try:
            weights, adapters = weights_of(model.get_submodule(name), recipe)
        except OwnForward as reason:
            raise ValueError(
                f"budget is given, and {name} runs its own forward for now: {reason}; give policy"
            ) from reason
        wanted.append({name for name, weight in weights.items() if weight.requires_grad})
        beside.add(adapters)
    if len(beside) > 1:
        raise ValueError("budget is given, and the layers have unlike adapters: give policy")
    wanted[0].add(INPUT)  # what comes before the layers may be trained
    sample = next(model.get_submodule(next(iter(known))).parameters())
    return make_plan(
        [recipe.spec for recipe in known.values()],
        batch_size=batch_size,
        seq_len=seq_len,
        budget=budget,
        device=_device(sample) if device is None else device,
        dtype=sample.dtype,
        requires_grad=wanted,
        adapters=dict(beside.pop()),
        # on a CPU what is offloaded to host memory is still there
        allow=("recompute", "offload") if files or not sample.is_cpu else ("recompute",),
    )


def _device(sample: Tensor) -> Device:
    """The entry of the table for where a parameter is."""
    entry = device_at(sample.device, sample.dtype)
    if entry is None:
        named = torch.cuda.get_device_name(sample.device) if sample.is_cuda else "unknown"
        raise ValueError(
            f"device is None and the model is on {sample.device} ({named}), expected one of "
            f"{', '.join(DEVICES)}, or a Device"
        )
    return entry
