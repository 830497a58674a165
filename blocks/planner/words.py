"""A plan in plain words: what is given up, what that frees and costs, and what would go next."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from backfuse.blocks.costs import activation_costs
from backfuse.blocks.policy import ACTIVATION_NAMES
from backfuse.blocks.profiled import ProfiledDevice

from .byte_sizes import format_bytes
from .optimal import BudgetError
from .schedules import replays

if TYPE_CHECKING:
    from .plan import Plan

DONE = {"recompute": "recomputed", "offload": "offloaded", "fp8": "kept in eight bits"}


def _given_up(plan: Plan, kind: int | None = None) -> Counter[tuple[str, str]]:
    """Activation and action -> in how many layers (of a kind), where the action is not `keep`."""
    return Counter(
        (name, action)
        for own, policy in zip(plan.kind_of, plan.policies, strict=True)
        if kind in (None, own)
        for name in ACTIVATION_NAMES
        if (action := getattr(policy, name)) != "keep"
    )


def _source(plan: Plan) -> str:
    """Where the seconds come from."""
    if not isinstance(plan.device, ProfiledDevice):
        return "By arithmetic"
    sizes = {(f.batch_size, f.seq_len): None for _, f in plan.device.blocks}
    timed = " and ".join(f"{batch} x {tokens:,} tokens" for batch, tokens in sizes)
    return f"By a profile of these layers (timed with {timed})"


def summary(plan: Plan) -> str:
    """Totals, in two sentences."""
    tokens = f"{plan.batch_size} x {plan.seq_len:,} tokens in {str(plan.dtype)[6:]}"
    kept, host, peak, everything = map(
        format_bytes,
        (plan.kept_bytes, plan.host_bytes, plan.peak_bytes, plan.keep[0]),
    )
    of = "with what backward rebuilds or fetches" if plan.model is None else "in a whole step"
    return (
        f"{plan.num_layers} layers on {plan.device.name}, {tokens}: {kept} kept on the device of "
        f"{everything}, {host} on the host; at most {peak} {of}. "
        f"{_source(plan)} a step takes {1e3 * plan.seconds:,.1f} ms, {plan.overhead:.2%} longer "
        "than with everything kept."
    )


def _layers(count: int) -> str:
    return "1 layer" if count == 1 else f"{count} layers"


def explain(plan: Plan) -> str:
    """See `Plan.explain`."""
    lines = [summary(plan)]
    for index in range(len(plan.kinds)):
        lines += _of_kind(plan, index)
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


def _of_kind(plan: Plan, index: int) -> list[str]:
    """What layers of a kind do not keep, and what for."""
    spec, wanted = plan.kinds[index]
    costs = activation_costs(spec, **plan.own_sizes, requires_grad=wanted)
    like = f" like layer {plan.kind_of.index(index)}" if len(plan.kinds) > 1 else ""
    lines = []
    given_up = _given_up(plan, index)
    for (name, action), layers in sorted(given_up.items(), key=lambda item: -item[1]):
        cost = costs[name]
        price = {
            "recompute": f"{1e3 * cost.recompute:,.2f} ms of a backward pass",
            "offload": f"{1e3 * cost.offload:,.2f} ms of the link in each direction",
            "fp8": "rounded gradients",
        }[action]
        frees = format_bytes(cost.bytes / 2 if action == "fp8" else cost.bytes)
        lines.append(
            f"{name} is {DONE[action]} in {_layers(layers)}{like}: that frees {frees} a layer for "
            f"{price}."
        )
    return lines


def _next(plan: Plan) -> str:
    """What one layer's share of the kept bytes less would change."""
    if plan.strategy == "manual":
        return "What would go next is the user's business: the plan is manual."
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
