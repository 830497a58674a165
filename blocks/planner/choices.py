"""What one layer can do: every policy, what it costs, and which are worth considering."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from backfuse.blocks.costs import BESIDE, BlockCosts, block_costs
from backfuse.blocks.devices import Device
from backfuse.blocks.devices import device as device_named
from backfuse.blocks.errors import nearest
from backfuse.blocks.lora import Adapters, AdaptersLike, parse_adapters
from backfuse.blocks.memory import kept_bytes, wanted_set
from backfuse.blocks.policy import ACTIVATION_NAMES, FP8_NAMES, KEEP, NAMED_POLICIES, Policy
from backfuse.blocks.spec import BlockSpec
from backfuse.blocks.stack import Segments, layers_in

from .schedules import inputs_held, replays
from .scratch import backward_scratch, default_chunk, gradient_bytes

#: Actions beside `keep` that a plan may use; `fp8` changes gradients.
ALLOWED = ("recompute", "offload", "fp8")


@dataclass(frozen=True)
class Choice:
    """A policy of one layer, and what it costs.

    Attributes:
        policy: the policy.
        kept: bytes that stay on the device from forward to backward.
        host: bytes that stay on the host.
        transient: bytes beside these while its backward runs: what it rebuilds, what came back
            from the host, and as much again on its way for the layer before. What every policy
            needs alike (gradients, a chunk's scratch) is left out, unless it is of a whole step.
        forward: seconds of its forward pass.
        backward: seconds of its backward pass, rebuilding included.
        link: seconds of the link, in each direction.
    """

    policy: Policy
    kept: int
    host: int
    transient: int
    forward: float
    backward: float
    link: float

    @property
    def seconds(self) -> float:
        """Of both passes, if the link keeps up."""
        return self.forward + self.backward


def _policies(allow: Collection[str]) -> Iterator[Policy]:
    """Every policy of these actions. `x` is not recomputed: that takes a segment of layers."""
    actions = []
    for name in ACTIVATION_NAMES:
        barred = {"recompute"} if name == "x" else set()
        barred |= set() if name in FP8_NAMES else {"fp8"}
        actions.append(["keep", *(a for a in ALLOWED if a in allow and a not in barred)])
    return itertools.starmap(Policy, itertools.product(*actions))


def _transient(costs: BlockCosts, policy: Policy, full: dict[str, int]) -> int:
    """Bytes as in `Choice`; `full` are those that the policy `keep` keeps.

    A rebuilt preact takes nothing: it is made a chunk at a time, where its gradient goes.
    """
    rebuilt = (
        size
        for name, size in full.items()
        if getattr(policy, BESIDE.get(name, name), "keep") == "recompute"
        and BESIDE.get(name, name) != "preact"
    )
    return sum(rebuilt) + 2 * costs.host_bytes


def layer_choice(
    spec: BlockSpec,
    policy: Policy,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.bfloat16,
    device: Device | str,
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | Adapters | None = None,
    whole: bool = False,
) -> Choice:
    """One policy of one layer, and what it costs; arguments and errors as `layer_choices`."""
    costs = block_costs(
        spec, policy, batch_size=batch_size, seq_len=seq_len, dtype=dtype, device=device,
        requires_grad=requires_grad, adapters=adapters,
    )  # fmt: skip
    full = kept_bytes(
        spec, KEEP, batch_size=batch_size, seq_len=seq_len, dtype=dtype,
        requires_grad=requires_grad, adapters=adapters,
    )  # fmt: skip
    if whole:
        transient = 2 * costs.host_bytes + backward_scratch(
            spec, policy, wanted_set(spec, requires_grad, adapters), tokens=batch_size * seq_len,
            dtype=dtype, chunk_size=default_chunk(costs.device.name),
            adapters=parse_adapters(spec, adapters),
        )  # fmt: skip
    else:
        transient = _transient(costs, policy, full)
    return Choice(
        policy,
        costs.kept_bytes,
        costs.host_bytes,
        transient,
        costs.forward,
        costs.backward + costs.recompute,
        costs.link,
    )


def segment_choice(spec: BlockSpec, part: Segments, **sizes: Any) -> Choice:
    """A segment of layers that keep nothing but the first one's `x`, as if it were one layer.

    Its transient holds the inputs that are rebuilt, its backward the layers that run again for
    them.

    Args:
        spec: the blocks.
        part: the segment.
        sizes: the other arguments of `layer_choice`.
    """
    policy = NAMED_POLICIES["full"]
    alone = layer_choice(spec, policy, **sizes)
    layers = layers_in(part)
    if layers == 1:
        return alone
    others = layer_choice(spec, policy.with_x("recompute"), **sizes)
    # a segment keeps its input even where no block reads its own: others are rebuilt from it
    adapters = parse_adapters(spec, sizes.get("adapters"))
    wanted = wanted_set(spec, sizes.get("requires_grad", True), adapters)
    tokens = sizes["batch_size"] * sizes["seq_len"]
    dtype = sizes.get("dtype", torch.bfloat16)
    x = tokens * spec.hidden_size * dtype.itemsize if wanted else 0
    rebuilt = (inputs_held([part]) - 1) * x
    if sizes.get("whole"):  # gradients appear while the inputs go
        rebuilt = max(rebuilt, (layers - 1) * gradient_bytes(spec, wanted, dtype, adapters))
    return Choice(
        policy,
        layers * others.kept + x,
        0,
        alone.transient + rebuilt,
        layers * alone.forward,
        layers * alone.backward + (replays([part]) * alone.forward if wanted else 0.0),
        0.0,
    )


def check_allow(allow: Collection[str]) -> None:
    """Raise a TypeError for a single name, a ValueError for actions that a plan cannot use."""
    if isinstance(allow, str):
        raise TypeError(f"allow is {allow!r}, expected a collection of actions")
    for action in allow:
        if action not in ALLOWED:
            raise ValueError(
                f"allow names {action!r}, expected actions among {', '.join(ALLOWED)}"
                + nearest(action, ALLOWED)
            )


def layer_choices(
    spec: BlockSpec,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.bfloat16,
    device: Device | str,
    allow: Collection[str] = ("recompute", "offload"),
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | Adapters | None = None,
    whole: bool = False,
) -> tuple[Choice, ...]:
    """What one layer can do, the policy `keep` first; what another beats in everything is left out.

    Args:
        spec: the block.
        batch_size: sequences.
        seq_len: tokens a sequence.
        dtype: of everything.
        device: it, or its name.
        allow: actions beside `keep`, of `ALLOWED`.
        requires_grad: names of what wants a gradient (see `kept_bytes`).
        adapters: projection -> its `LoRA`, or several.
        whole: whether transients are all that a layer's backward pass takes (see `scratch.py`).

    Raises:
        TypeError: for a spec, a dtype or names that are none.
        ValueError: for sizes, names, devices, dtypes or actions that do not exist or fit.
    """
    check_allow(allow)
    where = device if isinstance(device, Device) else device_named(device)
    found = [
        layer_choice(
            spec, policy, batch_size=batch_size, seq_len=seq_len, dtype=dtype, device=where,
            requires_grad=requires_grad, adapters=adapters, whole=whole,
        )
        for policy in _policies(allow)
    ]  # fmt: skip
    assert found[0].policy == KEEP
    return (found[0], *_undominated(found)[1:])


def _undominated(choices: list[Choice]) -> list[Choice]:
    """Those that no other, or an equal one before them, is at least as good as in everything."""

    def costs(choice: Choice) -> tuple[float, ...]:
        return choice.kept, choice.host, choice.transient, choice.seconds

    return [
        choice
        for index, choice in enumerate(choices)
        if not any(
            all(a <= b for a, b in zip(costs(other), costs(choice), strict=True))
            and (other_index < index or costs(other) != costs(choice))
            for other_index, other in enumerate(choices)
            if other_index != index
        )
    ]
