"""The best mix of policies for a stack of like layers: a mixed-integer program, and its bound.

Which layer takes which policy hardly matters, only how many do: `n` layers of each choice, integers
that add up to the layers. So 128 layers are no harder than two.

    minimise    sum n seconds + wait_forward + wait_backward
    kept        sum n kept                    <= budget
    peak        sum n' kept' + transient      <= peak budget, for every choice that is used:
                                                 n' are the layers in front of it, and its own
    host        sum n host                    <= host budget
    link        sum n link                    <= sum n forward  + wait_forward
                sum n link                    <= sum n backward + wait_backward

Layers stand in order of their transients, the largest first: backward comes to them last, when what
the layers behind them kept is gone. No other order has a lower peak (two neighbours that stand the
other way round can be exchanged without raising it).

A copy waits for no pass as a whole: that a layer's copy can only begin when the layer has run, and
has to be back before its turn, is not in the model. Solved by HiGHS through SciPy. Without
integers it is a linear program, and a bound on every plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from backfuse.blocks.policy import Policy

from .choices import Choice

#: Seconds that a second of the link is taken to cost even where it hides: of two plans that take
#: equally long, the one that ships less is better.
SHIPPING = 1e-3

#: Share of a step's time by which a mix may miss the best one: equally good mixes are many, and to
#: prove which is the best takes a hundred times as long.
GAP = 5e-4


class BudgetError(ValueError):
    """No plan is within the budget.

    Attributes:
        least: the smallest budget that a plan is within, in bytes.
    """

    def __init__(
        self, name: str, budget: int, least: int, what: str = "no mix of policies"
    ) -> None:
        super().__init__(name, budget, least, what)  # as given, so that it can be pickled
        self.least = least

    def __str__(self) -> str:
        name, budget, least, what = self.args
        return f"{name} is {budget:,} bytes, expected at least {least:,}: {what} gets by with less"


class Limits(NamedTuple):
    """Bytes that a plan may take; None for any number: see `optimal`."""

    budget: int | None
    peak_budget: int | None
    host_budget: int | None


@dataclass(frozen=True)
class Mix:
    """How many layers take each choice, in the order in which they stand.

    Attributes:
        choices: those that are used, by falling transient.
        counts: layers of each; fractions in a bound.
        keep: the choice that keeps everything, to compare with.
    """

    choices: tuple[Choice, ...]
    counts: tuple[float, ...]
    keep: Choice

    def _sum(self, name: str) -> float:
        pairs = zip(self.choices, self.counts, strict=True)
        return sum(count * getattr(choice, name) for choice, count in pairs)

    @property
    def kept_bytes(self) -> float:
        """On the device, of all layers, when the forward pass is over."""
        return self._sum("kept")

    @property
    def host_bytes(self) -> float:
        """On the host, of all layers."""
        return self._sum("host")

    @property
    def peak_bytes(self) -> float:
        """Kept bytes and transient where backward needs the most of both."""
        before, peak = 0.0, 0.0
        for choice, count in zip(self.choices, self.counts, strict=True):
            before += count * choice.kept
            peak = max(peak, before + choice.transient)
        return peak

    @property
    def seconds(self) -> float:
        """Of a step of all layers, with what it waits for the link."""
        link = self._sum("link")
        return max(self._sum("forward"), link) + max(self._sum("backward"), link)

    @property
    def overhead(self) -> float:
        """What a step takes longer than if everything were kept, as a fraction of that."""
        return self.seconds / (sum(self.counts) * self.keep.seconds) - 1

    @property
    def policies(self) -> tuple[Policy, ...]:
        """One policy a layer, the first layer first."""
        pairs = zip(self.choices, self.counts, strict=True)
        return tuple(choice.policy for choice, count in pairs for _ in range(round(count)))


def optimal(
    choices: Sequence[Choice],
    num_layers: int,
    *,
    budget: int | None = None,
    peak_budget: int | None = None,
    host_budget: int | None = None,
    relaxed: bool = False,
) -> Mix:
    """The mix of policies that takes the least time within the budgets, or `GAP` longer.

    Args:
        choices: what a layer can do, keeping everything first (see `layer_choices`).
        num_layers: how many there are.
        budget: bytes that may be kept on the device; None for any number.
        peak_budget: bytes that kept tensors and transients may take at any time of the backward
            pass; None for any number.
        host_budget: bytes that may be kept on the host; None for any number.
        relaxed: whether fractions of layers may differ: the linear bound. Of a choice's transient
            then only its fraction of the layers counts.

    Raises:
        BudgetError: if no mix is within the budgets; it knows the least `budget`, or `peak_budget`,
            that one is.
        ValueError: for a number of layers or bytes that is none.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}, expected at least 1")
    limits = Limits(budget, peak_budget, host_budget)
    for name, value in limits._asdict().items():
        if value is not None and value < 0:
            raise ValueError(f"{name} is {value}, expected at least 0 bytes")
    mix = _solve(choices, num_layers, limits, relaxed)
    if mix is None:
        raise _budget_error(choices, num_layers, limits, relaxed)
    return mix


def _budget_error(
    choices: Sequence[Choice], num_layers: int, limits: Limits, relaxed: bool
) -> BudgetError:
    """The budget that cannot be met, and the least of it that can, the others being as they are."""
    if limits.budget is not None:
        mix = _solve(choices, num_layers, limits._replace(budget=None), relaxed, "budget")
        if mix is not None:
            return BudgetError("budget", limits.budget, math.ceil(mix.kept_bytes))
    # then the peak cannot be met whatever is kept
    free = limits._replace(budget=None, peak_budget=None)
    mix = _solve(choices, num_layers, free, relaxed, "peak_budget")
    assert mix is not None and limits.peak_budget is not None  # all can be kept without a limit
    return BudgetError("peak_budget", limits.peak_budget, math.ceil(mix.peak_bytes))


def _solve(
    choices: Sequence[Choice],
    num_layers: int,
    limits: Limits,
    relaxed: bool,
    least: str | None = None,
) -> Mix | None:
    """The mix of least time; None if none is within the limits.

    The columns: layers of each choice, whether there are any, the waits of both passes, and the
    bytes of both budgets. Bytes are counted in their greatest common divisor, so that whole layers
    meet a budget exactly, and seconds in those of a layer.

    Args:
        choices: see `optimal`.
        num_layers: see `optimal`.
        limits: the budgets.
        relaxed: see `optimal`.
        least: minimise this budget instead of the time.
    """
    from scipy import optimize  # half a second, which only those who plan should wait for

    order = sorted(range(len(choices)), key=lambda i: -choices[i].transient)
    size, layer = len(choices), choices[0].seconds
    unit = math.gcd(*(c.kept for c in choices), *(c.transient for c in choices)) or 1
    host_unit = math.gcd(*(c.host for c in choices)) or 1

    def column(name: str, per: float) -> np.ndarray:
        return np.array([getattr(choice, name) / per for choice in choices])

    counts, used = slice(0, size), slice(size, 2 * size)
    wait_forward, wait_backward, kept_cap, peak_cap = range(2 * size, 2 * size + 4)
    width = 2 * size + 4
    rows: list[np.ndarray] = []
    ends: list[float] = []

    def at_most(limit: float) -> np.ndarray:
        """A new row, to be filled, whose sum is at most `limit`."""
        rows.append(np.zeros(width))
        ends.append(limit)
        return rows[-1]

    kept, link = column("kept", unit), column("link", layer)
    row = at_most(0)
    row[counts], row[kept_cap] = kept, -1
    for wait, name in ((wait_forward, "forward"), (wait_backward, "backward")):
        row = at_most(0)
        row[counts], row[wait] = link - column(name, layer), -1
    if limits.host_budget is not None:
        at_most(limits.host_budget // host_unit)[counts] = column("host", host_unit)
    if limits.peak_budget is not None or least == "peak_budget":
        before = np.zeros(size)
        for i in order:
            before[i] = kept[i]
            row = at_most(0)
            row[counts], row[peak_cap] = before, -1
            row[size + i] = choices[i].transient / unit
            row = at_most(0)
            row[i], row[size + i] = 1, -num_layers
    objective = np.zeros(width)
    if least:
        objective[kept_cap if least == "budget" else peak_cap] = 1
    else:
        shipping = 0.0 if relaxed else SHIPPING  # a bound has no taste
        objective[counts] = column("seconds", layer) + shipping * link
        objective[[wait_forward, wait_backward]] = 1
    upper = np.full(width, np.inf)
    upper[counts], upper[used] = num_layers, 1
    for cap, value in ((kept_cap, limits.budget), (peak_cap, limits.peak_budget)):
        if value is not None:
            upper[cap] = value // unit
    whole = np.zeros(width)
    whole[: 2 * size] = 0 if relaxed else 1
    layers = np.zeros(width)
    layers[counts] = 1
    found = optimize.milp(
        objective,
        integrality=whole,
        bounds=optimize.Bounds(0, upper),
        constraints=(
            optimize.LinearConstraint(np.array(rows), ub=np.array(ends)),
            optimize.LinearConstraint(layers, num_layers, num_layers),
        ),
        options={"mip_rel_gap": 0 if least else GAP},
    )
    if found.x is None:
        return None
    taken = [float(n) if relaxed else float(round(n)) for n in found.x[counts]]
    standing = [i for i in order if taken[i] > 0]
    return Mix(tuple(choices[i] for i in standing), tuple(taken[i] for i in standing), choices[0])
