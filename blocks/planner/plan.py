"""`Plan`: what every layer of a model keeps for a number of bytes, and what that will cost.

| strategy | what |
|---|---|
| `optimal` | the mix of policies, a layer at a time, that takes the least time (`optimal.py`) |
| `uniform` | every k-th layer keeps its `x`, with the smallest k that is within the budgets |
| `sqrt` | segments of about the square root of the number of layers |
| `recursive` | halves of halves: O(log layers) inputs at once |
| `chain` | a dynamic program over the layers in order, segments among them (`chain.py`) |
| `selective` | recompute the tensors with the most bytes a second, one after the other |
| `manual` | what the user says, layer by layer |

`uniform`, `sqrt` and `recursive` recompute everything but a segment's `x` (`schedules.py`).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from backfuse.blocks.devices import Device
from backfuse.blocks.lora import Adapters
from backfuse.blocks.policy import ACTIVATION_NAMES, KEEP, Policy
from backfuse.blocks.spec import BlockSpec, choose
from backfuse.blocks.stack import Segments, layers_in, parse_segments

from . import plan_file, words
from .byte_sizes import parse_bytes
from .choices import Choice, check_allow, layer_choice, segment_choice
from .optimal import BudgetError, Limits, Mix
from .scratch import default_chunk
from .search import FULL, search
from .step import Event, Fixed, LayerBytes, ModelSpec, fixed, layer_bytes, timeline

STRATEGIES = ("optimal", "uniform", "sqrt", "recursive", "chain", "selective", "manual")

#: For a budget: as the plan has it.
SAME = "same"

#: Tokens or sequences beyond which `Plan.max_seq_len` and `max_batch_size` do not look.
MOST = 2**24


@dataclass(frozen=True)
class Plan:
    """One policy a layer, segments, and what they will cost; made by `plan`.

    Attributes:
        specs: one a layer.
        batch_size: sequences.
        seq_len: tokens a sequence.
        dtype: of everything.
        requires_grad: names of what wants a gradient, for each layer.
        device: where, as the cost model sees it; a `ProfiledDevice` if its layers were timed.
        strategy: how the plan was made.
        allow: actions beside `keep` that it may use.
        budget: bytes that may be kept on the device; None for any number.
        peak_budget: likewise of `peak_bytes`.
        host_budget: likewise of `host_bytes`.
        policies: one a layer, the first layer first.
        segments: sizes of the segments that share one `x`, as `BlockStack` takes them.
        adapters: of each layer's projections.
        model: what surrounds the layers: `peak_bytes` is then that of a whole step; None for the
            layers alone.
    """

    specs: tuple[BlockSpec, ...]
    batch_size: int
    seq_len: int
    dtype: torch.dtype
    requires_grad: tuple[tuple[str, ...], ...]
    device: Device
    strategy: str
    allow: tuple[str, ...]
    budget: int | None
    peak_budget: int | None
    host_budget: int | None
    policies: tuple[Policy, ...]
    segments: tuple[Segments, ...]
    adapters: Adapters = ()
    model: ModelSpec | None = None

    def __post_init__(self) -> None:
        choose("strategy", self.strategy, STRATEGIES)
        check_allow(self.allow)
        if not self.policies:
            raise ValueError("policies are none, expected one a layer")
        if not len(self.specs) == len(self.requires_grad) == len(self.policies):
            raise ValueError(
                f"there are {len(self.specs)} specs, {len(self.requires_grad)} requires_grad and "
                f"{len(self.policies)} policies, expected one of each a layer"
            )
        parse_segments(self.segments, self.policies)
        for part, policies in self.parts():
            if len(policies) > 1 and set(policies) != {FULL}:
                raise ValueError(f"the segment {part} has other policies than 'full'")

    @property
    def num_layers(self) -> int:
        """How many layers there are."""
        return len(self.policies)

    @property
    def spec(self) -> BlockSpec:
        """Each layer.

        Raises:
            ValueError: if they are unlike.
        """
        if len(set(self.specs)) > 1:
            raise ValueError("the plan's layers are unlike, expected like ones: see specs")
        return self.specs[0]

    @property
    def own_sizes(self) -> dict[str, Any]:
        """What costs depend on beside spec, gradients and policy, as keyword arguments."""
        return {
            "batch_size": self.batch_size, "seq_len": self.seq_len, "dtype": self.dtype,
            "device": self.device, "adapters": self.adapters,
        }  # fmt: skip

    @property
    def sizes(self) -> dict[str, Any]:
        """The same, and whether transients are those of a whole step."""
        return self.own_sizes | {"whole": self.model is not None}

    @cached_property
    def kinds(self) -> list[tuple[BlockSpec, tuple[str, ...]]]:
        """Spec and wanted names of each kind of layer, in order of appearance."""
        return list(dict.fromkeys(zip(self.specs, self.requires_grad, strict=True)))

    @cached_property
    def kind_of(self) -> list[int]:
        """Each layer's place in `kinds`."""
        index = {kind: i for i, kind in enumerate(self.kinds)}
        return [index[kind] for kind in zip(self.specs, self.requires_grad, strict=True)]

    def parts(self) -> Iterator[tuple[Segments, tuple[Policy, ...]]]:
        """Each segment, and its layers' policies."""
        first = 0
        for part in self.segments:
            last = first + layers_in(part)
            yield part, self.policies[first:last]
            first = last

    def priced(self, kind: int, part: Segments, policy: Policy) -> Choice:
        """What a segment of a kind of layers costs."""
        spec, wanted = self.kinds[kind]
        return _priced(spec, wanted, part, policy, tuple(self.sizes.items()))

    @cached_property
    def mix(self) -> Mix:
        """What it costs, segment by segment."""
        choices, first = [], 0
        for part, policies in self.parts():
            choices.append(self.priced(self.kind_of[first], part, policies[0]))
            first += layers_in(part)
        return Mix(tuple(choices), (1,) * len(choices), choices[0])

    @cached_property
    def keep(self) -> tuple[int, float]:
        """Bytes and seconds of all layers if they kept everything."""
        alone = [self.priced(kind, 1, KEEP) for kind in self.kind_of]
        return sum(one.kept for one in alone), sum(one.seconds for one in alone)

    @cached_property
    def layer_bytes(self) -> list[LayerBytes]:
        """What a whole step needs to know of each segment."""
        found, first = [], 0
        for (part, policies), choice in zip(self.parts(), self.mix.choices, strict=True):
            spec, wanted = self.kinds[self.kind_of[first]]
            found.append(layer_bytes(
                spec, policies[0], frozenset(wanted), choice, layers_in(part),
                tokens=self.batch_size * self.seq_len, dtype=self.dtype,
                chunk_size=default_chunk(self.device.name), adapters=self.adapters,
            ))  # fmt: skip
            first += layers_in(part)
        return found

    @cached_property
    def fixed(self) -> Fixed:
        """What surrounds the layers, in bytes.

        Raises:
            ValueError: without a model.
        """
        if self.model is None:
            raise ValueError("model is None, expected a ModelSpec: the rest of a step is unknown")
        return fixed(
            self.model, self.layer_bytes, tokens=self.batch_size * self.seq_len,
            hidden_size=self.specs[0].hidden_size, dtype=self.dtype,
            foreach=self.device.name != "cpu",
        )  # fmt: skip

    def timeline(self) -> list[Event]:
        """Bytes on the device, event by event of a whole step.

        Raises:
            ValueError: for a plan without a model.
        """
        around = self.fixed
        assert self.model is not None
        return timeline(self.model, self.layer_bytes, around)

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
        """Bytes at most: of a whole step with a model, else of activations while backward runs.

        With a model: see `step.py`. Without: what is still kept on the device, and of the layer or
        segment that is being differentiated what it rebuilds, what came back from the host, and as
        much on its way for the next. Not in it then: parameters, their gradients, optimizer,
        embeddings, logits, gradients between layers and a chunk's scratch.
        """
        if self.model is not None:
            return max(event.bytes for event in self.timeline())
        return int(self.mix.peak_bytes)

    @property
    def seconds(self) -> float:
        """Of a step's forward and backward pass over the stack, waits for the link included."""
        return self.mix.seconds

    @property
    def overhead(self) -> float:
        """What a step takes longer than if everything were kept, as a fraction of that."""
        return max(0.0, self.seconds / self.keep[1] - 1) if self.keep[1] else 0.0

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

    def check_fits(self, specs: Mapping[str, BlockSpec]) -> None:
        """Raise a ValueError unless the plan is of these layers, naming the difference.

        Args:
            specs: by the layers' names, the first layer first.
        """
        if self.num_layers != len(specs):
            raise ValueError(f"the plan has {self.num_layers} layers, expected {len(specs)}")
        for (layer, spec), planned in zip(specs.items(), self.specs, strict=True):
            if spec != planned:
                name, value, own = next(
                    (name, value, getattr(spec, name))
                    for name, value in vars(planned).items()
                    if not name.startswith("_") and value != getattr(spec, name)
                )
                raise ValueError(
                    f"the plan's {name} is {value!r}, expected {own!r}, as {layer or 'the model'} "
                    "has it"
                )

    def check_unsegmented(self) -> None:
        """Raise a ValueError for segments of several layers."""
        if any(part != 1 for part in self.segments):
            raise ValueError(
                f"the plan has segments {self.segments}, expected none: the layers of this model "
                "are called one by one (strategy='optimal')"
            )

    def within(self, **limits: Any) -> Plan:
        """The plan made anew in the same way under other budgets; those not named stay.

        Args:
            limits: `budget`, `peak_budget`, `host_budget`, in bytes or None.

        Raises:
            BudgetError: if no plan is within them.
        """
        return search(replace(self, **limits))

    def max_seq_len(
        self,
        budget: int | str | None = SAME,
        *,
        peak_budget: int | str | None = SAME,
        host_budget: int | str | None = SAME,
    ) -> int:
        """The longest sequences, up to `MOST`, for which there is such a plan, made anew for each.

        A plan that may offload everything keeps next to nothing on the device: what ends it then
        is `peak_budget` or `host_budget`.

        Args:
            budget: bytes as for `plan`, None for any number; `"same"`: the plan's own.
            peak_budget: likewise.
            host_budget: likewise.

        Raises:
            BudgetError: if there is none even for one token.
            TypeError, ValueError: without any budget, and for one that is none.
        """
        return self._largest("seq_len", (budget, peak_budget, host_budget))

    def max_batch_size(
        self,
        budget: int | str | None = SAME,
        *,
        peak_budget: int | str | None = SAME,
        host_budget: int | str | None = SAME,
    ) -> int:
        """The same for sequences in a batch."""
        return self._largest("batch_size", (budget, peak_budget, host_budget))

    def _largest(self, name: str, budgets: tuple[int | str | None, ...]) -> int:
        limits = {
            n: None if v is None else parse_bytes(n, v)
            for n, v in zip(Limits._fields, budgets, strict=True)
            if v != SAME
        }
        start = replace(self, **limits)  # type: ignore[arg-type]
        if start.budget is None and start.peak_budget is None:
            raise ValueError("budget and peak_budget are None, expected one of them")
        start = _bare(start)

        def fits(value: int) -> bool:
            try:
                search(replace(start, **{name: value}))  # type: ignore[arg-type]
            except BudgetError:
                return False
            return True

        search(replace(start, **{name: 1}))  # type: ignore[arg-type]
        low, high = 1, 2
        while high <= MOST and fits(high):
            low, high = high, 2 * high
        if high > MOST:  # where all can be offloaded nothing on the device ends it
            return low
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low

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


@functools.lru_cache(maxsize=4096)
def _priced(
    spec: BlockSpec,
    wanted: tuple[str, ...],
    part: Segments,
    policy: Policy,
    sizes: tuple[tuple[str, Any], ...],
) -> Choice:
    if layers_in(part) > 1:
        return segment_choice(spec, part, **dict(sizes), requires_grad=wanted)
    return layer_choice(spec, policy, **dict(sizes), requires_grad=wanted)


def _bare(start: Plan) -> Plan:
    """The plan before its strategy has done anything; a manual one is as it is."""
    if start.strategy == "manual":
        return start
    layers = start.num_layers
    return replace(start, policies=(KEEP,) * layers, segments=(1,) * layers)
