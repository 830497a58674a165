"""`plan`: what every layer of a stack keeps for a number of bytes, and what that will cost.

| strategy | what |
|---|---|
| `optimal` | the mix of policies, a layer at a time, that takes the least time (`optimal.py`) |
| `uniform` | every k-th layer keeps its `x`, with the smallest k that is within the budgets |
| `sqrt` | segments of about the square root of the number of layers |
| `recursive` | halves of halves: O(log layers) inputs at once |

The last three recompute everything but a segment's `x` (`schedules.py`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from backfuse.blocks.devices import Device
from backfuse.blocks.devices import device as device_named
from backfuse.blocks.keep import INPUT
from backfuse.blocks.lora import Adapters, AdaptersLike, parse_adapters
from backfuse.blocks.memory import wanted_set
from backfuse.blocks.policy import ACTIVATION_NAMES, KEEP, NAMED_POLICIES, Policy
from backfuse.blocks.spec import BlockSpec, choose
from backfuse.blocks.stack import BlockStack, Segments, layers_in, parse_segments

from . import plan_file, words
from .byte_sizes import parse_bytes
from .choices import Choice, check_allow, layer_choice, layer_choices, segment_choice
from .optimal import BudgetError, Limits, Mix, optimal
from .schedules import recursive, sqrt, uniform

STRATEGIES = ("optimal", "uniform", "sqrt", "recursive")

#: What the layers of a segment keep, apart from its first `x`.
FULL = NAMED_POLICIES["full"]


@dataclass(frozen=True)
class Plan:
    """One policy a layer, segments, and what they will cost; made by `plan`.

    Attributes:
        spec: each layer.
        batch_size: sequences.
        seq_len: tokens a sequence.
        dtype: of everything.
        requires_grad: names of what wants a gradient.
        device: where, as the cost model sees it.
        strategy: how the plan was made.
        allow: actions beside `keep` that it may use.
        budget: bytes that may be kept on the device; None for any number.
        peak_budget: likewise of `peak_bytes`.
        host_budget: likewise of `host_bytes`.
        policies: one a layer, the first layer first.
        segments: sizes of the segments that share one `x`, as `BlockStack` takes them.
        adapters: of each layer's projections.
    """

    spec: BlockSpec
    batch_size: int
    seq_len: int
    dtype: torch.dtype
    requires_grad: tuple[str, ...]
    device: Device
    strategy: str
    allow: tuple[str, ...]
    budget: int | None
    peak_budget: int | None
    host_budget: int | None
    policies: tuple[Policy, ...]
    segments: tuple[Segments, ...]
    adapters: Adapters = ()

    def __post_init__(self) -> None:
        choose("strategy", self.strategy, STRATEGIES)
        check_allow(self.allow)
        if not self.policies:
            raise ValueError("policies are none, expected one a layer")
        parse_segments(self.segments, self.policies)
        for part, policies in self.parts():
            if len(policies) > 1 and set(policies) != {FULL}:
                raise ValueError(f"the segment {part} has other policies than 'full'")

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.policies)

    @property
    def sizes(self) -> dict[str, Any]:
        """What costs depend on beside spec and policy, as keyword arguments."""
        return {
            "batch_size": self.batch_size, "seq_len": self.seq_len, "dtype": self.dtype,
            "device": self.device, "requires_grad": self.requires_grad,
            "adapters": self.adapters,
        }  # fmt: skip

    def parts(self) -> Iterator[tuple[Segments, tuple[Policy, ...]]]:
        """Each segment, and its layers' policies."""
        first = 0
        for part in self.segments:
            last = first + layers_in(part)
            yield part, self.policies[first:last]
            first = last

    @cached_property
    def mix(self) -> Mix:
        """What it costs, segment by segment."""

        @functools.cache
        def priced(part: Segments, policy: Policy) -> Choice:
            if layers_in(part) > 1:
                return segment_choice(self.spec, part, **self.sizes)
            return layer_choice(self.spec, policy, **self.sizes)

        choices = tuple(priced(part, policies[0]) for part, policies in self.parts())
        return Mix(choices, (1,) * len(choices), self.keep)

    @cached_property
    def keep(self) -> Choice:
        """What a layer costs that keeps everything."""
        return layer_choice(self.spec, KEEP, **self.sizes)

    @property
    def kept_bytes(self) -> int:
        """Bytes kept on the device when the forward pass is over: exact.

        The input of the first layer is counted, and taken to want a gradient if anything does.
        """
        return int(self.mix.kept_bytes)

    @property
    def host_bytes(self) -> int:
        """Bytes kept on the host (or in files): exact."""
        return int(self.mix.host_bytes)

    @property
    def peak_bytes(self) -> int:
        """Bytes that activations take at most while backward runs: modelled.

        What is still kept on the device, and of the layer or segment that is being differentiated
        what it rebuilds, what came back from the host, and as much on its way for the next. Not
        in it: parameters, their gradients, optimizer, embeddings, logits, gradients between layers
        and a chunk's scratch.
        """
        return int(self.mix.peak_bytes)

    @property
    def seconds(self) -> float:
        """Of a step's forward and backward pass over the stack, waits for the link included."""
        return self.mix.seconds

    @property
    def overhead(self) -> float:
        """What a step takes longer than if everything were kept, as a fraction of that."""
        return self.seconds / (self.num_layers * self.keep.seconds) - 1

    def runs(self) -> Iterator[tuple[int, int, Segments, Policy, Choice]]:
        """Runs of like segments: first layer, layers, segment, policy, what each segment costs."""
        rows = zip(self.segments, self.mix.choices, strict=True)
        first = 0
        for (part, choice), like in itertools.groupby(rows):
            layers = layers_in(part) * len(list(like))
            yield first, layers, part, choice.policy, choice
            first += layers

    def to_frame(self) -> pd.DataFrame:
        """A row for each run of like layers, the first layer first.

        Columns: `first` and `last` layer; `layers`; `segment`, how many layers share one `x`; an
        action for each of the five activations (of `x`: the segment's first); `kept_bytes`,
        `host_bytes` and `seconds` of the run, the latter without waits for the link.
        """
        rows = []
        for first, layers, part, policy, choice in self.runs():
            count = layers // layers_in(part)
            actions = {name: getattr(policy, name) for name in ACTIVATION_NAMES}
            rows.append({
                "first": first, "last": first + layers - 1, "layers": layers,
                "segment": layers_in(part), **actions, "kept_bytes": count * choice.kept,
                "host_bytes": count * choice.host, "seconds": count * choice.seconds,
            })  # fmt: skip
        return pd.DataFrame(rows)

    def within(self, **limits: Any) -> Plan:
        """The plan made anew in the same way under other budgets; those not named stay.

        Args:
            limits: `budget`, `peak_budget`, `host_budget`, in bytes or None.

        Raises:
            BudgetError: if no plan is within them.
        """
        return _search(replace(self, **limits))

    def explain(self) -> str:
        """In plain words: what is recomputed or offloaded and why, what would go next."""
        return words.explain(self)

    def save(self, path: str | Path) -> None:
        """Writes the plan as JSON; a file that is there is replaced whole or not at all.

        Raises:
            OSError: if it cannot be written.
        """
        plan_file.write(Path(path), self)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """The plan that a file holds.

        Raises:
            OSError: if it cannot be read.
            ValueError: for a damaged file, naming it and what is wrong.
        """
        try:
            content = plan_file.read(Path(path))
            plan = cls(**plan_file.fields_of(content))
            plan_file.check_numbers(content, plan)
        except KeyError as error:
            raise ValueError(f"{path} is a damaged plan: {error} is missing") from error
        except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
            raise ValueError(f"{path} is a damaged plan: {error}") from error
        return plan


def plan(
    spec: BlockSpec,
    *,
    num_layers: int,
    batch_size: int,
    seq_len: int,
    budget: int | str | None = None,
    peak_budget: int | str | None = None,
    host_budget: int | str | None = None,
    strategy: str = "optimal",
    allow: Collection[str] = ("recompute", "offload"),
    device: Device | str,
    dtype: torch.dtype = torch.bfloat16,
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | None = None,
) -> Plan:
    """What each layer of a stack keeps, so that it is within the budgets and takes little time.

    Costs come from arithmetic and a table of devices: nothing is run, and no GPU is needed.

    Args:
        spec: each layer.
        num_layers: how many.
        batch_size: sequences.
        seq_len: tokens a sequence.
        budget: bytes for kept activations on the device, an integer or text (`"40GiB"`, `"40GB"`);
            None for any number.
        peak_budget: likewise for `Plan.peak_bytes`, which says what it counts.
        host_budget: likewise for what is kept on the host.
        strategy: one of `STRATEGIES`; what `optimal` finds may take up to half a thousandth of a
            step longer than the best.
        allow: actions beside `keep`: `recompute`, `offload`, and `fp8`, which changes gradients.
        device: its name in `blocks/devices.py`, or a `Device`.
        dtype: of everything.
        requires_grad: names of what wants a gradient in each layer (see `kept_bytes`).
        adapters: projection -> its `LoRA`, or several, in each layer.

    Raises:
        BudgetError: (a ValueError) for a budget that no plan is within; it says the least that
            one is.
        TypeError: for a spec, budget, dtype or names that are none.
        ValueError: for sizes, names, strategies, devices, dtypes or actions that do not exist.
    """
    if not isinstance(spec, BlockSpec):
        raise TypeError(
            f"spec is a {type(spec).__name__}, expected a BlockSpec; that of a Hugging Face model "
            "is BlockSpec.from_config(model.config)"
        )
    if not isinstance(num_layers, int) or isinstance(num_layers, bool) or num_layers < 1:
        raise ValueError(f"num_layers is {num_layers!r}, expected a positive integer")
    limits = {
        name: None if value is None else parse_bytes(name, value)
        for name, value in zip(Limits._fields, (budget, peak_budget, host_budget), strict=True)
    }
    own = parse_adapters(spec, adapters)
    wanted = wanted_set(spec, requires_grad, own)
    return _search(
        Plan(
            spec=spec, batch_size=batch_size, seq_len=seq_len, dtype=dtype,
            requires_grad=tuple(sorted(wanted | {INPUT} if wanted else wanted)),
            device=device if isinstance(device, Device) else device_named(device),
            strategy=strategy, allow=tuple(allow), **limits,
            policies=(KEEP,) * num_layers, segments=(1,) * num_layers, adapters=own,
        )
    )  # fmt: skip


def _search(start: Plan) -> Plan:
    """The plan that the strategy of `start` finds, under its budgets."""
    limits = Limits(start.budget, start.peak_budget, start.host_budget)
    layers = start.num_layers
    if start.strategy == "optimal":
        choices = layer_choices(start.spec, **start.sizes, allow=start.allow)
        mix = optimal(choices, layers, **limits._asdict())
        return replace(start, policies=mix.policies, segments=(1,) * layers)
    if "recompute" not in start.allow:
        raise ValueError(
            f"allow is {start.allow}, expected 'recompute' among it: the strategy "
            f"{start.strategy!r} does nothing else"
        )
    schedules: Iterable[list[Segments]] = (
        (uniform(layers, every) for every in range(1, layers + 1))
        if start.strategy == "uniform"
        else [sqrt(layers) if start.strategy == "sqrt" else recursive(layers)]
    )
    tried = []
    for segments in schedules:
        found = replace(start, policies=(FULL,) * layers, segments=tuple(segments))
        over = (found.kept_bytes, limits.budget), (found.peak_bytes, limits.peak_budget)
        if all(limit is None or size <= limit for size, limit in over):
            return found
        tried.append(found)
    what = f"no schedule of the strategy {start.strategy!r}"
    kept = [one for one in tried if limits.budget is None or one.kept_bytes <= limits.budget]
    if not kept:
        assert limits.budget is not None
        least = min(one.kept_bytes for one in tried)
        raise BudgetError("budget", limits.budget, least, what)
    assert limits.peak_budget is not None
    least = min(one.peak_bytes for one in kept)
    raise BudgetError("peak_budget", limits.peak_budget, least, what)


def apply(stack: BlockStack, plan: Plan) -> tuple[list[Policy], list[Segments]]:
    """Makes a stack keep what a plan says.

    Args:
        stack: of the plan's spec and number of layers; its dtype and the sizes of its calls are
            the caller's business.
        plan: see `plan`.

    Returns:
        Policies and segments as they were: `stack.set_policy(*before)` puts them back.

    Raises:
        TypeError: for something else than a stack and a plan.
        ValueError: if the plan is of another spec or number of layers, naming the difference; the
            stack is as it was.
    """
    if not isinstance(stack, BlockStack):
        raise TypeError(f"stack is a {type(stack).__name__}, expected a BlockStack")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}, expected a Plan")
    if len(stack.layers) != plan.num_layers:
        raise ValueError(
            f"the plan has {plan.num_layers} layers, expected the stack's {len(stack.layers)}"
        )
    if stack.spec != plan.spec:
        name, planned, own = next(
            (name, value, getattr(stack.spec, name))
            for name, value in vars(plan.spec).items()
            if not name.startswith("_") and value != getattr(stack.spec, name)
        )
        raise ValueError(f"the plan's {name} is {planned!r}, expected the stack's: {own!r}")
    before = stack.policies, stack.segments
    stack.set_policy(plan.policies, plan.segments)
    return before
