"""Costs by profile: one real block of each kind, timed on the device that is here, and remembered.

A block with random weights, all of which want a gradient, runs forward and backward under `keep`
and under each policy that rebuilds one activation. Rounds are interleaved, and of each policy the
fastest counts. What a policy takes longer than `keep` is the price of its activation, never less
than nothing. Divided by what arithmetic says of the same parts these are the `Factors` of the
block, which `block_costs` multiplies by: under the policies that were timed it then says what was
measured, and scales that to other policies, sizes and frozen weights.

A block runs at the size that is asked for, unless a step of it would take longer than `LIMIT`
seconds by arithmetic, or keep more than `ROOM` of the memory that is free. Then the batch is halved
until neither is so, and after that the sequence.

The link of a GPU is timed in both directions, pinned memory, and the slower counts; a CPU's is the
copy in memory that `measure_cpu` times in each process.

Records are files in `$BACKFUSE_CACHE/profiles`, one for a block or a link: seconds, by device,
versions, spec, dtype and sizes. One that cannot be read is measured anew.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from backfuse.blocks.block import TransformerBlock
from backfuse.blocks.costs import BlockCosts, block_costs
from backfuse.blocks.devices import MIB, Device, device_at, fastest, free_bytes, is_here
from backfuse.blocks.devices import device as device_named
from backfuse.blocks.memory import check_dtype
from backfuse.blocks.policy import Policy
from backfuse.blocks.profiled import REBUILT, Factors, ProfiledDevice, owner
from backfuse.blocks.spec import BlockSpec
from backfuse.kernels.cache import cache_folder
from backfuse.kernels.reference.rope import rope_cos_sin

#: Goes up when old records would mean something else.
FORMAT = 1

#: Seconds by arithmetic that a timed step may take, and the share of free memory it may keep.
LIMIT, ROOM = 1.0, 0.25

#: Seconds that a block's rounds may take, and the least and most rounds.
SECONDS, LEAST, MOST = 4.0, 5, 100

#: Bytes of a copy over the link.
LINK_BYTES = 64 * MIB

T = TypeVar("T")


class Times(NamedTuple):
    """Seconds of a block's passes.

    Attributes:
        batch_size: sequences.
        seq_len: tokens of each.
        forward: of a forward pass under `keep`.
        steps: of a forward and backward pass, under `keep` and under each policy that rebuilds the
            activation of that name alone.
    """

    batch_size: int
    seq_len: int
    forward: float
    steps: dict[str, float]

    @classmethod
    def parse(cls, content: Any) -> Times:
        """Times from their record.

        Raises:
            KeyError, TypeError, ValueError: for anything that is none.
        """
        times = cls(**content)
        sizes, seconds = times[:2], [times.forward, *times.steps.values()]
        if not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"sizes are {sizes}, expected positive integers")
        if not all(type(one) is float and 0 < one < math.inf for one in seconds):
            raise ValueError(f"seconds are {seconds}, expected positive numbers")
        if not times.forward < times.steps["keep"] or not set(times.steps) <= {"keep", *REBUILT}:
            raise ValueError(f"steps are {times.steps}, expected longer ones, by activation")
        return times


def device_here(device: Device | str | None, dtype: torch.dtype) -> Device:
    """The device that layers can be timed on.

    Args:
        device: it, its name, or None: the current GPU, else the CPU.
        dtype: of everything.

    Raises:
        TypeError: for a dtype that is none.
        ValueError: for a device that is not here, and for a GPU of unknown rates.
    """
    check_dtype("dtype", dtype)
    cuda = torch.cuda.is_available()
    here = torch.cuda.get_device_name() if cuda else "a CPU"
    if device is None:
        found = device_at(torch.device("cuda" if cuda else "cpu"), dtype)
        if found is None:
            raise ValueError(
                f"device is None and {here} is in no table, expected a Device named after it"
            )
        return found
    if device == "cpu":
        found = device_at(torch.device("cpu"), dtype)
        assert found is not None
        return found
    where = device if isinstance(device, Device) else device_named(device)
    if not is_here(where):
        raise ValueError(
            f"device is {where.name!r} with profile=True, expected what is here ({here}), or None: "
            "layers are timed by running them"
        )
    return where.table_row if isinstance(where, ProfiledDevice) else where


def profiled(
    specs: Sequence[BlockSpec], where: Device, *, batch_size: int, seq_len: int, dtype: torch.dtype
) -> ProfiledDevice:
    """The device with the factors of each unlike spec, timed now or before.

    Args:
        specs: blocks.
        where: see `device_here`.
        batch_size: sequences.
        seq_len: tokens a sequence.
        dtype: of everything; one whose rate the device has.
    """
    base, prefix = where, _prefix(where)
    if where.name != "cpu":
        link = _remembered(f"{prefix}|link", _parse_bandwidth, _link)
        base = replace(where, link_bandwidth=link)
    sizes: dict[str, Any] = {"batch_size": batch_size, "seq_len": seq_len, "dtype": dtype}
    kinds = list(dict.fromkeys(specs))
    blocks = []
    for index, spec in enumerate(kinds):
        times = _remembered(
            f"{prefix}|{dtype}|{batch_size} x {seq_len}|{spec.text}",
            Times.parse,
            lambda spec=spec, index=index: measure(  # type: ignore[misc]
                spec, base, **sizes, title=f"timing layer {index + 1} of {len(kinds)}"
            )._asdict(),
        )
        blocks.append((spec, factors(times, spec, base, dtype)))
    return ProfiledDevice(**vars(base), blocks=tuple(blocks))


def factors(times: Times, spec: BlockSpec, where: Device, dtype: torch.dtype) -> Factors:
    """What the parts of a block took, divided by what arithmetic says of them."""

    def costs(policy: dict[str, str]) -> BlockCosts:
        return block_costs(
            spec, policy, batch_size=times.batch_size, seq_len=times.seq_len, dtype=dtype,
            device=where,
        )  # fmt: skip

    keep, step = costs({}), times.steps["keep"]
    forward = times.forward / keep.forward
    backward = (step - times.forward) / (keep.backward + keep.recompute)
    found = {}
    for name in REBUILT:
        if name in times.steps:
            one = costs({name: "recompute"})
            own = _own(one, name)
            rest = forward * one.forward + backward * (one.backward + one.recompute - own)
            found[name] = max(0.0, max(step, times.steps[name]) - rest) / own
    return Factors(times.batch_size, times.seq_len, forward, backward, **found)


def _own(costs: BlockCosts, name: str) -> float:
    """Seconds of what is rebuilt for the sake of an activation."""
    return sum(
        part.seconds
        for part in costs.parts
        if part.phase == "recompute" and owner(part.name) == name
    )


def measure(
    spec: BlockSpec,
    where: Device,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    title: str,
) -> Times:
    """Times a block at the size asked for, or at a smaller one (see above).

    Args:
        spec: it.
        where: the device, which is here.
        batch_size: sequences.
        seq_len: tokens a sequence.
        dtype: of everything.
        title: for the progress bar.
    """
    batch, tokens = _within_limits(spec, where, batch_size, seq_len, dtype)
    sizes: dict[str, Any] = {"batch_size": batch, "seq_len": tokens, "dtype": dtype}
    policies = {"keep": Policy()}
    for name in REBUILT:
        policy = Policy(**{name: "recompute"})
        if _own(block_costs(spec, policy, device=where, **sizes), name):
            policies[name] = policy
    place = torch.device("cpu" if where.name == "cpu" else "cuda")
    with (
        torch.random.fork_rng([] if place.type == "cpu" else [torch.cuda.current_device()]),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(place.type, enabled=False),
    ):
        block = TransformerBlock(spec, device=place, dtype=dtype)
        shape = batch, tokens, spec.hidden_size
        x, grad = (torch.randn(shape, device=place, dtype=dtype) for _ in range(2))
        x.requires_grad_()
        angles = None
        if spec.rope is not None:
            positions = torch.arange(tokens, device=place)[None]
            angles = rope_cos_sin(positions, spec.rotary_dim, layout=spec.rope)

        def one_round() -> dict[str, tuple[float, float]]:
            found = {}
            for name, policy in policies.items():
                block.policy = policy
                found[name] = step_seconds(block, x, grad, angles)
            return found

        one_round()  # compiles, and fills caches
        seconds = sum(step for _, step in one_round().values())
        count = int(min(max(LEAST, SECONDS / seconds), MOST))
        rounds = [one_round() for _ in _progress(range(count), title)]
    steps = {name: min(found[name][1] for found in rounds) for name in policies}
    return Times(batch, tokens, min(found["keep"][0] for found in rounds), steps)


def _within_limits(
    spec: BlockSpec, where: Device, batch: int, tokens: int, dtype: torch.dtype
) -> tuple[int, int]:
    """Sequences, and tokens of each, that are timed."""
    room = ROOM * free_bytes(where)
    while batch * tokens > 1:
        costs = block_costs(
            spec, "keep", batch_size=batch, seq_len=tokens, dtype=dtype, device=where
        )
        if costs.step <= LIMIT and costs.kept_bytes <= room:
            break
        batch, tokens = (batch // 2, tokens) if batch > 1 else (1, tokens // 2)
    return batch, tokens


def step_seconds(
    block: TransformerBlock, x: Tensor, grad: Tensor, angles: tuple[Tensor, Tensor] | None
) -> tuple[float, float]:
    """Seconds of a forward pass, and of a forward and backward pass."""
    for leaf in (x, *block.parameters()):
        leaf.grad = None
    start = _now(x.device)
    y = block(x, position_embeddings=angles)
    middle = _now(x.device)
    y.backward(grad)
    return middle - start, _now(x.device) - start


def _now(place: torch.device) -> float:
    """Seconds, once the device has done what it was told."""
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()


def _link() -> float:
    """Bytes per second of the slower direction between pinned memory and the GPU."""
    host = torch.zeros(LINK_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.zeros(LINK_BYTES, dtype=torch.uint8, device="cuda")

    def copied(target: Tensor, source: Tensor) -> float:
        def copy() -> None:
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()

        return fastest(copy)

    return LINK_BYTES / max(copied(host, there), copied(there, host))


def _progress(rounds: range, title: str) -> Iterable[int]:
    """The same with a bar on a terminal, where tqdm is installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return rounds
    return tqdm(rounds, desc=title, leave=False, dynamic_ncols=True, disable=None)


def _prefix(where: Device) -> str:
    """What every record of a device depends on."""
    if where.name == "cpu":
        here = f"cpu, {torch.get_num_threads()} threads, {platform.machine()}, {platform.node()}"
    else:
        here = torch.cuda.get_device_name()
    versions = []
    for package in ("torch", "triton", "backfuse"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {package}")
    return "|".join([str(FORMAT), here, *versions])


def _parse_bandwidth(content: Any) -> float:
    if type(content) is not float or not 0 < content < math.inf:
        raise ValueError(f"the bandwidth is {content!r}, expected a positive number")
    return content


def _remembered(key: str, parse: Callable[[Any], T], ask: Callable[[], Any]) -> T:
    """What the record of that key says, or the answer, which is then kept."""
    name = hashlib.sha256(key.encode()).hexdigest()[:32]
    path = cache_folder() / "profiles" / f"{name}.json"
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["key"] != key:
            raise ValueError(f"it is the record of {content['key']!r}")
        return parse(content["value"])
    except FileNotFoundError:
        pass
    except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        warnings.warn(f"{path} is ignored and measured anew: {error}", stacklevel=2)
    value = ask()
    try:
        _write(path, json.dumps({"key": key, "value": value}, indent=1))
    except OSError as error:
        warnings.warn(f"what was measured is not kept in {path}: {error}", stacklevel=2)
    return parse(value)


def _write(path: Path, text: str) -> None:
    """Writes a record whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, "utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
