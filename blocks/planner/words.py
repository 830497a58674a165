"""A plan in plain words: what is given up, what that frees and costs, and what would go next."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from backfuse.blocks.costs import activation_costs
from backfuse.blocks.policy import ACTIVATION_NAMES

from .byte_sizes import format_bytes
from .optimal import BudgetError
from .schedules import replays

if TYPE_CHECKING:
    from .plan import Plan

DONE = {"recompute": "recomputed", "offload": "offloaded", "fp8": "kept in eight bits"}


def _given_up(plan: Plan) -> Counter[tuple[str, str]]:
    """Activation and action -> in how many layers, where the action is not `keep`."""
    return Counter(
        (name, action)
        for policy in plan.policies
        for name in ACTIVATION_NAMES
        if (action := getattr(policy, name)) != "keep"
    )


def summary(plan: Plan) -> str:
    """Totals, in two sentences."""
    tokens = f"{plan.batch_size} x {plan.seq_len:,} tokens in {str(plan.dtype)[6:]}"
    kept, host, peak, everything = map(
        format_bytes,
        (plan.kept_bytes, plan.host_bytes, plan.peak_bytes, plan.num_layers * plan.keep.kept),
    )
    return (
        f"{plan.num_layers} layers on {plan.device.name}, {tokens}: {kept} kept on the device of "
        f"{everything}, {host} on the host; at most {peak} with what backward rebuilds or fetches. "
        f"By arithmetic a step takes {1e3 * plan.seconds:,.1f} ms, {plan.overhead:.2%} longer than "
        "with everything kept."
    )


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def explain(plan: Plan) -> str:
    """See `Plan.explain`."""
    lines = [summary(plan)]
    costs = activation_costs(plan.spec, **plan.sizes)
    for (name, action), layers in sorted(_given_up(plan).items(), key=lambda item: -item[1]):
        cost = costs[name]
        price = {
            "recompute": f"{1e3 * cost.recompute:,.2f} ms of a backward pass",
            "offload": f"{1e3 * cost.offload:,.2f} ms of the link in each direction",
            "fp8": "rounded gradients",
        }[action]
        frees = format_bytes(cost.bytes / 2 if action == "fp8" else cost.bytes)
        lines.append(
            f"{name} is {DONE[action]} in {_layers(layers)}: that frees {frees} a layer for "
            f"{price}."
        )
    again = replays(plan.segments)
    if again:
        lines.append(
            f"{len(plan.segments)} of {plan.num_layers} layers keep x; backward runs {again} "
            "layers again to rebuild the others'."
        )
    if plan.host_bytes:
        waits = plan.seconds - sum(choice.seconds for choice in plan.mix.choices)
        lines.append(
            "The copies hide behind the passes."
            if waits < 1e-3 * plan.seconds
            else f"The passes wait {1e3 * waits:,.1f} ms for the copies."
        )
    return "\n".join([*lines, _next(plan)])


def _next(plan: Plan) -> str:
    """What one layer's share of the kept bytes less would change."""
    budget = plan.kept_bytes - max(1, plan.kept_bytes // plan.num_layers)
    try:
        other = plan.within(budget=max(0, budget))
    except BudgetError as error:
        return f"Nothing is left to give up: {error}."
    if other.kept_bytes >= plan.kept_bytes:
        return "Nothing is left to give up: nothing is kept."
    now, then = _given_up(plan), _given_up(other)
    changes = [
        f"{name} {DONE[action]} in {_layers(then[name, action])} instead of {now[name, action]}"
        for name, action in sorted(now.keys() | then.keys())
        if now[name, action] != then[name, action]
    ]
    if len(other.segments) != len(plan.segments):
        changes.append(f"{len(other.segments)} layers keep x instead of {len(plan.segments)}")
    return (
        f"To keep {format_bytes(plan.kept_bytes - other.kept_bytes)} less, next: "
        f"{', '.join(changes)}; {other.overhead:.2%} longer than with everything kept."
    )
