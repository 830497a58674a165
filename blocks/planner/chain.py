"""The best choices for a chain of unlike layers, in order: a dynamic program over bytes.

    time[i][m]   the least seconds of the layers before i, which keep at most m units of bytes
    time[j][m + kept] <- time[i][m] + seconds    for each way to run the layers i to j - 1, if
                                                 m + kept <= budget, m + kept + transient <= peak

A way is a choice of one layer, or a segment of several that share one `x`. Bytes are counted in
units, rounded up: what it finds is within the budgets, and it is the best where the units divide
all sizes. Copies to the host are not in it. Sources: Chen et al. 2016; Beaumont et al. 2019.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from .choices import Choice
from .optimal import BudgetError

#: Units of the budget, where the sizes' greatest common divisor would give more.
UNITS = 4096

#: First layer and the one after the last -> how to run them.
Ways = Mapping[tuple[int, int], Sequence[Choice]]


def chain(
    ways: Ways, num_layers: int, *, budget: int | None = None, peak_budget: int | None = None
) -> list[tuple[int, Choice]]:
    """The ways that take the least time within the budgets, from the first layer to the last.

    Args:
        ways: for each layer, `(i, i + 1)`, at least one; for segments what there is.
        num_layers: so many.
        budget: bytes that may be kept; None for any number.
        peak_budget: bytes that what is kept so far and a way's transient may take; None likewise.

    Returns:
        How many layers, and how they run.

    Raises:
        BudgetError: if none is within the budgets; it knows the least that one is.
    """
    least = _least_kept(ways, num_layers, peak_budget)
    if least is None:
        assert peak_budget is not None
        raise BudgetError("peak_budget", peak_budget, _least_peak(ways, num_layers), "no chain")
    kept = sum(choice.kept for _, choice in least)
    if budget is not None and kept > budget:
        raise BudgetError("budget", budget, kept, "no chain")
    # in whole units it may be that nothing fits
    return _least_time(ways, num_layers, budget, peak_budget) or least


def _least_kept(
    ways: Ways, num_layers: int, peak_budget: int | None
) -> list[tuple[int, Choice]] | None:
    """Those that keep the least bytes; None if the peak cannot be met."""
    # to keep less is never worse for the layers behind
    best: dict[int, int] = {0: 0}
    taken: dict[int, tuple[int, Choice]] = {}
    for (start, stop), choices in sorted(ways.items()):
        for choice in choices if start in best else ():
            kept = best[start] + choice.kept
            if peak_budget is not None and kept + choice.transient > peak_budget:
                continue
            if kept < best.get(stop, kept + 1):
                best[stop], taken[stop] = kept, (start, choice)
    return _walk(taken, num_layers) if num_layers in best else None


def _walk(taken: Mapping[int, tuple[int, Choice]], stop: int) -> list[tuple[int, Choice]]:
    found: list[tuple[int, Choice]] = []
    while stop:
        start, choice = taken[stop]
        found.append((stop - start, choice))
        stop = start
    return found[::-1]


def _least_peak(ways: Ways, num_layers: int) -> int:
    """The least peak budget that can be met."""
    low, high = 0, sum(ways[i, i + 1][0].kept for i in range(num_layers))
    high += max(ways[i, i + 1][0].transient for i in range(num_layers))
    while low < high:
        middle = (low + high) // 2
        if _least_kept(ways, num_layers, middle) is None:
            low = middle + 1
        else:
            high = middle
    return low


def _least_time(
    ways: Ways, num_layers: int, budget: int | None, peak_budget: int | None
) -> list[tuple[int, Choice]] | None:
    most = sum(
        max(c.kept for (start, _), choices in ways.items() if start == i for c in choices)
        for i in range(num_layers)
    )
    for limit in (budget, peak_budget):
        most = most if limit is None else min(most, limit)
    divisor = math.gcd(*(c.kept for choices in ways.values() for c in choices)) or 1
    unit = divisor if most // divisor <= UNITS else -(-most // UNITS)
    room = most // unit
    time = np.full((num_layers + 1, room + 1), np.inf)
    time[0] = 0.0
    listed = [(key, choice) for key, choices in sorted(ways.items()) for choice in choices]
    taken = np.zeros((num_layers + 1, room + 1), np.int32)
    for index, ((start, stop), choice) in enumerate(listed):
        kept, last = -(-choice.kept // unit), room
        if peak_budget is not None:
            last = min(last, (peak_budget - choice.transient) // unit)
        if last < kept:
            continue
        value = time[start, : last + 1 - kept] + choice.seconds
        better = value < time[stop, kept : last + 1]
        time[stop, kept : last + 1][better] = value[better]
        taken[stop, kept : last + 1][better] = index
    at, stop = int(np.argmin(time[num_layers])), num_layers
    if not np.isfinite(time[stop, at]):
        return None
    found: list[tuple[int, Choice]] = []
    while stop:
        (start, _), choice = listed[taken[stop, at]]
        found.append((stop - start, choice))
        at -= -(-choice.kept // unit)
        stop = start
    return found[::-1]
