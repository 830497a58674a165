"""What each strategy of `plan` makes of a start: policies and segments within the budgets."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from backfuse.blocks.costs import activation_costs
from backfuse.blocks.policy import KEEP, NAMED_POLICIES, Policy, PolicyLike
from backfuse.blocks.stack import Segments, parse_segments

from .chain import chain
from .choices import Choice, layer_choices
from .optimal import ALONE, Around, BudgetError, Limits, optimal, optimal_kinds
from .schedules import recursive, sqrt, uniform

if TYPE_CHECKING:
    from .plan import Plan

#: What the layers of a segment keep, apart from its first `x`.
FULL = NAMED_POLICIES["full"]

#: One policy a layer; or rules: an index, or a pattern of names such as `"layers.[0-3]"`.
Manual = Sequence[PolicyLike] | Mapping[int | str, PolicyLike]


def search(start: Plan) -> Plan:
    """The plan that the strategy of `start` finds, under its budgets.

    Raises:
        BudgetError: if it finds none.
        ValueError: for a strategy that the layers or the allowed actions do not fit.
    """
    if start.strategy == "optimal":
        return _optimal(start)
    if start.strategy == "manual":
        return _first_within(start, [start])
    if "recompute" not in start.allow:
        raise ValueError(
            f"allow is {start.allow}, expected 'recompute' among it: the strategy "
            f"{start.strategy!r} does nothing else"
        )
    if start.strategy == "chain":
        return _chain(start)
    if start.strategy == "selective":
        return _first_within(start, _selective(start))
    if len(start.kinds) > 1:
        raise ValueError(
            f"strategy is {start.strategy!r} and the layers are unlike, expected 'optimal', "
            "'chain', 'selective' or 'manual': segments are of like layers"
        )
    layers = start.num_layers
    schedules: Iterable[list[Segments]] = (
        (uniform(layers, every) for every in range(1, layers + 1))
        if start.strategy == "uniform"
        else [sqrt(layers) if start.strategy == "sqrt" else recursive(layers)]
    )
    plans = (
        replace(start, policies=(FULL,) * layers, segments=tuple(segments))
        for segments in schedules
    )
    return _first_within(start, plans)


def _first_within(start: Plan, plans: Iterable[Plan]) -> Plan:
    """The first plan that is within the budgets of `start`."""
    tried = []
    for found in plans:
        over = (
            (found.kept_bytes, start.budget), (found.host_bytes, start.host_budget),
            (found.peak_bytes if start.peak_budget is not None else 0, start.peak_budget),
        )  # fmt: skip
        if all(limit is None or size <= limit for size, limit in over):
            return found
        tried.append(found)
    what = f"no schedule of the strategy {start.strategy!r}"
    for name, size in (("budget", "kept_bytes"), ("host_budget", "host_bytes")):
        limit = getattr(start, name)
        within = [one for one in tried if limit is None or getattr(one, size) <= limit]
        if not within:
            raise BudgetError(name, limit, min(getattr(one, size) for one in tried), what)
        tried = within
    assert start.peak_budget is not None
    raise BudgetError("peak_budget", start.peak_budget, min(p.peak_bytes for p in tried), what)


def _around(start: Plan) -> tuple[Around, Limits]:
    """What else a step needs, and the budgets less what is there throughout."""
    limits = Limits(start.budget, start.peak_budget, start.host_budget)
    if start.model is None:
        return ALONE, limits
    fixed = start.fixed
    there = fixed.floor + fixed.head
    alone = start.model.in_flight > 1  # gradients are in the floor
    grads = [0 if alone else part.gradients for part in start.layer_bytes]
    parts = start.model.world_size
    around = Around(
        -(-grads[0] // parts), sum(-(-g // parts) for g in grads), max(0, fixed.loss - fixed.head),
        start.model.in_flight,
    )  # fmt: skip
    if limits.peak_budget is not None:
        # with nothing kept there is this much all the same
        least = max(e.bytes for e in start.timeline() if e.name in ("start", "embedding", "update"))
        if limits.peak_budget < least:
            try:  # of what can be chosen, that much may not be enough either
                search(replace(start, peak_budget=least))
            except BudgetError as error:
                least = error.least if error.of_peak else least
            raise BudgetError("peak_budget", limits.peak_budget, least, "no policy of the layers")
        limits = limits._replace(peak_budget=max(0, limits.peak_budget - there))
    return around, limits


def _whole(start: Plan, error: BudgetError) -> BudgetError:
    """The error in bytes of the whole step."""
    if start.model is None or start.peak_budget is None or not error.of_peak:
        return error
    there = start.fixed.floor + start.fixed.head
    return BudgetError("peak_budget", start.peak_budget, error.least + there)


def _optimal(start: Plan) -> Plan:
    layers, kinds = start.num_layers, start.kinds
    around, limits = _around(start)
    choices = [
        layer_choices(spec, **start.sizes, requires_grad=wanted, allow=start.allow)
        for spec, wanted in kinds
    ]
    try:
        if len(kinds) == 1:
            mix = optimal(choices[0], layers, around=around, **limits._asdict())
            return replace(start, policies=mix.policies, segments=(1,) * layers)
        own = [start.kind_of.count(index) for index in range(len(kinds))]
        found = optimal_kinds(list(zip(choices, own, strict=True)), limits, around)
    except BudgetError as error:
        raise _whole(start, error) from None
    rest = [iter(one) for one in found]
    policies = tuple(next(rest[index]).policy for index in start.kind_of)
    return replace(start, policies=policies, segments=(1,) * layers)


def _chain(start: Plan) -> Plan:
    around, limits = _around(start)
    kinds, kind_of, layers = start.kinds, start.kind_of, start.num_layers
    choices = [
        layer_choices(spec, **start.sizes, requires_grad=wanted, allow=("recompute",))
        for spec, wanted in kinds
    ]
    ways: dict[tuple[int, int], Sequence[Choice]] = {}
    grads = [0 if around.gradients == 0 else part.gradients for part in start.layer_bytes]
    behind = [*itertools.accumulate(reversed(grads), initial=0)][::-1]  # of the layers from there
    for first in range(layers):
        for last in range(first, layers):
            if kind_of[last] != kind_of[first]:
                break
            own = choices[kind_of[first]]
            if last > first:
                own = (start.priced(kind_of[first], last - first + 1, FULL),)
            there = behind[last + 1]
            ways[first, last + 1] = [replace(c, transient=c.transient + there) for c in own]
    budget, peak = limits.budget, limits.peak_budget
    if peak is not None and start.model is not None:
        if around.in_flight > 1:
            raise ValueError("in_flight is above 1 with a peak_budget, expected strategy='optimal'")
        room = max(0, peak - around.loss)
        budget = room if budget is None else min(budget, room)
    try:
        found = chain(ways, layers, budget=budget, peak_budget=peak)
    except BudgetError as error:
        raise _whole(start, error) from None
    policies = [choice.policy for count, choice in found for _ in range(count)]
    return replace(start, policies=tuple(policies), segments=tuple(count for count, _ in found))


def _selective(start: Plan) -> Iterator[Plan]:
    """Plans that recompute one tensor more each: those with the most bytes a second first."""
    worth = []
    for index, (spec, wanted) in enumerate(start.kinds):
        costs = activation_costs(spec, **start.own_sizes, requires_grad=wanted)
        kept = start.priced(index, 1, KEEP).kept
        for name in ("qkv", "attn_out", "mid", "preact"):
            # what goes with it as well: attn_out's LSE
            freed = kept - start.priced(index, 1, replace(KEEP, **{name: "recompute"})).kept
            seconds = costs[name].recompute
            if freed > 0:
                value = freed / seconds if seconds else float("inf")
                worth += [(-value, i, name) for i, k in enumerate(start.kind_of) if k == index]
    policies = [KEEP] * start.num_layers
    yield replace(start, policies=tuple(policies), segments=(1,) * start.num_layers)
    for _, layer, name in sorted(worth):
        policies[layer] = replace(policies[layer], **{name: "recompute"})
        yield replace(start, policies=tuple(policies))


def manual(policies: Manual | None, layers: int) -> tuple[tuple[Policy, ...], tuple[Segments, ...]]:
    """One policy a layer, and segments, from what a user says.

    Args:
        policies: one a layer; or rules, of which a layer takes the first that names it: its index
            (from the end where it is negative), or a pattern of its name, `layers.<index>`. Layers
            that no rule names keep everything.
        layers: how many.

    Raises:
        TypeError: for something else.
        ValueError: for a wrong number of policies, or a rule that no layer follows.
    """
    if isinstance(policies, Mapping):
        named: list[Policy | None] = [None] * layers
        for rule, policy in policies.items():
            if isinstance(rule, str):
                own = [i for i in range(layers) if fnmatch.fnmatchcase(f"layers.{i}", rule)]
            elif isinstance(rule, int) and not isinstance(rule, bool):
                own = [rule % layers] if -layers <= rule < layers else []
            else:
                raise TypeError(f"policies has the rule {rule!r}, expected an index or a pattern")
            if not own:
                raise ValueError(
                    f"policies has the rule {rule!r}, expected one that names a layer: they are "
                    f"layers.0 to layers.{layers - 1}"
                )
            for i in own:
                named[i] = named[i] or Policy.parse(policy)
        parsed = [one or KEEP for one in named]
    elif isinstance(policies, Sequence) and not isinstance(policies, str):
        if len(policies) != layers:
            raise ValueError(
                f"policies holds {len(policies)}, expected one for each layer ({layers})"
            )
        parsed = [Policy.parse(one) for one in policies]
    else:
        raise TypeError(
            f"policies is {policies!r}, expected one a layer, or a mapping from layers to policies"
        )
    for one in parsed:
        one.check_available()
    parts = parse_segments(None, parsed)
    parsed = [one if one.keeps("x") else one.with_x("keep") for one in parsed]
    return tuple(parsed), tuple(itertools.chain(parts))
