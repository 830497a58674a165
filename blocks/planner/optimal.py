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

Layers that are unlike are of several kinds: each has its choices, and its number of layers. They
stand as the model has them, so that the peak is then bounded from above: all that is kept, and the
largest transient. Of a whole step (`Around`), gradients appear as kept bytes go, and the loss needs
room beside all that is kept.

A copy waits for no pass as a whole: that a layer's copy can only begin when the layer has run, and
has to be back before its turn, is not in the model. Solved by HiGHS through SciPy. Without
integers it is a linear program, and a bound on every plan.
"""

from __future__ import annotations

import itertools
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


#: What a layer can do, and how many such layers there are.
Kind = tuple[Sequence[Choice], int]

#: Layers of each choice of each kind.
Counts = list[list[float]]


class BudgetError(ValueError):
    """No plan is within the budget.

    Attributes:
        least: the smallest budget that a plan is within, in bytes.
        of_peak: whether it is the budget of the peak.
    """

    def __init__(
        self, name: str, budget: int, least: int, what: str = "no mix of policies"
    ) -> None:
        super().__init__(name, budget, least, what)  # as given, so that it can be pickled
        self.least = least
        self.of_peak = name == "peak_budget"

    def __str__(self) -> str:
        name, budget, least, what = self.args
        mib = -(-least // 2**20)  # rounded up: what is said here is enough
        return (
            f"{name} is {budget:,} bytes, expected at least {least:,} ({mib}MiB): {what} gets by "
            "with less"
        )


class Limits(NamedTuple):
    """Bytes that a plan may take; None for any number: see `optimal`."""

    budget: int | None
    peak_budget: int | None
    host_budget: int | None


class Around(NamedTuple):
    """What else is there in a step, beside what layers keep and their transients.

    Attributes:
        gradient: bytes that each layer's backward pass leaves behind.
        gradients: the same of all layers.
        loss: bytes beside all that is kept, when the loss is computed; less those that are there
            when backward begins.
        in_flight: micro-batches whose kept bytes are there.
    """

    gradient: int = 0
    gradients: int = 0
    loss: int = 0
    in_flight: int = 1


#: The layers and nothing else.
ALONE = Around()


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
    around: Around = ALONE

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
        around = self.around
        others = (around.in_flight - 1) * self.kept_bytes
        left, before, peak = sum(self.counts), 0.0, self.kept_bytes + around.loss
        for choice, count in zip(self.choices, self.counts, strict=True):
            first = before + choice.kept * min(1, count) + (left - 1) * around.gradient
            before += count * choice.kept
            left -= count
            peak = max(peak, first + choice.transient)
            peak = max(peak, before + left * around.gradient + choice.transient)
        return others + peak

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
    around: Around = ALONE,
    budget: int | None = None,
    peak_budget: int | None = None,
    host_budget: int | None = None,
    relaxed: bool = False,
) -> Mix:
    """The mix of policies that takes the least time within the budgets, or `GAP` longer.

    Args:
        choices: what a layer can do, keeping everything first (see `layer_choices`).
        num_layers: how many there are.
        around: what else a step needs; the peak budget is of both.
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
    found = _solve([(choices, num_layers)], limits, around, relaxed)
    if found is None:
        raise _budget_error([(choices, num_layers)], limits, around, relaxed)
    order = sorted(range(len(choices)), key=lambda i: -choices[i].transient)
    standing = [i for i in order if found[0][i] > 0]
    counts = tuple(found[0][i] for i in standing)
    return Mix(tuple(choices[i] for i in standing), counts, choices[0], around)


def optimal_kinds(
    kinds: Sequence[Kind], limits: Limits, around: Around = ALONE
) -> list[list[Choice]]:
    """The same for layers of several kinds.

    Args:
        kinds: what a layer of each kind can do, and how many there are of it.
        limits: the budgets.
        around: see `optimal`.

    Returns:
        For each kind a choice a layer, by falling transient.

    Raises:
        BudgetError: see `optimal`; of a peak it names a bound from above.
    """
    found = _solve(kinds, limits, around, False)
    if found is None:
        raise _budget_error(kinds, limits, around, False)
    return [
        sorted(
            (choice for choice, n in zip(choices, counts, strict=True) for _ in range(round(n))),
            key=lambda choice: -choice.transient,
        )
        for (choices, _), counts in zip(kinds, found, strict=True)
    ]


def _budget_error(
    kinds: Sequence[Kind], limits: Limits, around: Around, relaxed: bool
) -> BudgetError:
    """The budget that cannot be met, and the least of it that can, the others being as they are."""

    def least(name: str, among: Limits) -> int | None:
        found = _solve(kinds, among, around, relaxed, name)
        return None if found is None else math.ceil(_reached(kinds, found, around, name))

    if limits.budget is not None:
        bytes_ = least("budget", limits._replace(budget=None))
        if bytes_ is not None:
            return BudgetError("budget", limits.budget, bytes_)
    # then the peak cannot be met whatever is kept
    bytes_ = least("peak_budget", limits._replace(budget=None, peak_budget=None))
    assert bytes_ is not None and limits.peak_budget is not None  # all can be kept without a limit
    return BudgetError("peak_budget", limits.peak_budget, bytes_)


def _reached(kinds: Sequence[Kind], found: Counts, around: Around, name: str) -> float:
    """The kept bytes or the peak of what was found; of several kinds a bound of the peak."""
    if len(kinds) == 1:
        choices = kinds[0][0]
        order = sorted(range(len(choices)), key=lambda i: -choices[i].transient)
        used = [i for i in order if found[0][i] > 0]
        counts = tuple(found[0][i] for i in used)
        mix = Mix(tuple(choices[i] for i in used), counts, choices[0], around)
        return mix.kept_bytes if name == "budget" else mix.peak_bytes
    pairs = [
        (choice, n)
        for (choices, _), counts in zip(kinds, found, strict=True)
        for choice, n in zip(choices, counts, strict=True)
        if n > 0
    ]
    kept = sum(n * choice.kept for choice, n in pairs)
    if name == "budget":
        return kept
    beside = max(around.gradients + max(choice.transient for choice, _ in pairs), around.loss)
    return around.in_flight * kept + beside


def _solve(
    kinds: Sequence[Kind],
    limits: Limits,
    around: Around,
    relaxed: bool,
    least: str | None = None,
) -> Counts | None:
    """Layers of each choice of each kind, in the least time; None if none are within the limits.

    The columns: layers of each choice, whether there are any, the waits of both passes, and the
    bytes of both budgets. Bytes are counted in their greatest common divisor, so that whole layers
    meet a budget exactly, and seconds in those of a layer.

    Args:
        kinds: see `optimal_kinds`.
        limits: the budgets.
        around: see `optimal`.
        relaxed: see `optimal`.
        least: minimise this budget instead of the time.
    """
    from scipy import optimize  # half a second, which only those who plan should wait for

    choices = [choice for own, _ in kinds for choice in own]
    num_layers = sum(layers for _, layers in kinds)
    order = sorted(range(len(choices)), key=lambda i: -choices[i].transient)
    size, layer = len(choices), choices[0].seconds
    bare = around == ALONE  # whole layers then meet a peak exactly
    unit = math.gcd(*(c.kept for c in choices), *(c.transient for c in choices if bare)) or 1
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
        others = (around.in_flight - 1) * kept
        gradient = around.gradient / unit
        at_most(-around.loss / unit)[[*range(size), peak_cap]] = [*(others + kept), -1]
        before, left = np.zeros(size), np.full(size, gradient)
        for i in order:
            row = at_most(0)
            row[i], row[size + i] = 1, -num_layers
            transient = choices[i].transient / unit
            if len(kinds) > 1:  # as they stand, which is not by transient
                row = at_most(-around.gradients / unit)
                row[counts], row[peak_cap], row[size + i] = others + kept, -1, transient
                continue
            if gradient > kept[i]:  # the most when the first of these layers is differentiated
                row = at_most(gradient * (1 - num_layers))
                row[counts], row[peak_cap] = others + before - (gradient - left), -1
                row[size + i] = kept[i] + transient
            before[i], left[i] = kept[i], 0
            row = at_most(-gradient * num_layers)
            row[counts], row[peak_cap] = others + before - (gradient - left), -1
            row[size + i] = transient
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
            upper[cap] = value / unit
    whole = np.zeros(width)
    whole[: 2 * size] = 0 if relaxed else 1
    layers = np.zeros((len(kinds), width))
    start = 0
    for index, (own, _) in enumerate(kinds):
        layers[index, start : start + len(own)] = 1
        start += len(own)
    each = [n for _, n in kinds]
    found = optimize.milp(
        objective,
        integrality=whole,
        bounds=optimize.Bounds(0, upper),
        constraints=(
            optimize.LinearConstraint(np.array(rows), ub=np.array(ends)),
            optimize.LinearConstraint(layers, each, each),
        ),
        options={"mip_rel_gap": 0 if least else GAP},
    )
    if found.x is None:
        return None
    taken = iter(float(n) if relaxed else float(round(n)) for n in found.x[counts])
    return [list(itertools.islice(taken, len(own))) for own, _ in kinds]
