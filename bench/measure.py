"""Bytes and seconds: what a forward holds for backward, how high a step peaks, how long it runs.

Two ways to count bytes, because neither sees everything:

    kept_bytes_measured   storages made by PyTorch operations and still alive after the forward;
                          exact, on any device, right under checkpoints; blind inside compiled code
    allocator_trace       the allocator's own events; sees compiled code, scratch inside operators
                          and a checkpoint's saved RNG state; on CUDA rounded up to its granularity
"""

from __future__ import annotations

import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import backfuse.blocks.flops  # noqa: F401  gives PyTorch the formulas it lacks

GIB = 2**30
MIB = 2**20
KIB = 2**10

#: PyTorch's operators that are one matrix multiplication, or a batch of them -> how many of their
#: arguments say how large it is.
GEMMS = {
    "aten::mm": 2, "aten::addmm": 3, "aten::bmm": 2, "aten::baddbmm": 3, "aten::_scaled_mm": 2,
    "mkldnn::_linear_pointwise": 2,
}  # fmt: skip

#: The same of its attention kernels.
ATTENTION = {
    f"aten::_scaled_dot_product_{kernel}{backward}": 4 if backward else 3
    for kernel in (
        "flash_attention", "efficient_attention", "cudnn_attention", "flash_attention_for_cpu"
    )
    for backward in ("", "_backward")
}  # fmt: skip

#: Bytes that are written before a step: more than any L2 cache, some 0.3 ms on an H200.
FLUSH_BYTES = 1024 * MIB

#: Bytes of the copy that memory-bound work is held against, by the kind of device.
COPY_BYTES = {"cuda": 2**30, "cpu": 2**27}

#: Seconds that a kernel runs each time it is timed.
KERNEL_SECONDS = 0.05


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that an operation returns while active, without keeping it alive.

    A view shares its base's storage, so nothing counts twice. A storage that an operation only
    reads (a weight, an input made before) does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._older: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for storage in _storages((args, kwargs)):
            if storage._cdata not in self._seen:
                self._older.add(storage._cdata)
        out = func(*args, **kwargs)
        for storage in _storages(out):
            self._remember(storage)
        return out

    def _remember(self, storage: torch.UntypedStorage) -> None:
        known = self._seen.get(storage._cdata)
        if known is None and storage._cdata in self._older:
            return
        # A weak reference holds the address, so a dead storage's is not given to another one.
        reference = known[0] if known else StorageWeakRef(storage)
        self._seen[storage._cdata] = (reference, storage.nbytes())

    def live_bytes(self) -> int:
        """Bytes of the remembered storages that are still alive."""
        return sum(size for reference, size in self._seen.values() if not reference.expired())


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf.untyped_storage()


def kept_bytes_measured(call: Callable[..., Any], *inputs: Tensor) -> int:
    """Bytes that `call(*inputs)` holds for its backward pass.

    The inputs are copied first, so an input that is kept counts as one that nobody else holds;
    the result counts only where the graph keeps it. What `call` closes over (weights, rotary
    tables) was there before and does not count.

    Args:
        call: a forward pass; its result must require grad.
        inputs: floating-point tensors.

    Raises:
        ValueError: if the result has no graph, so that nothing could be held.
    """
    with LiveStorages() as live:
        graph = _graph_of(call, inputs)
    gc.collect()
    held = live.live_bytes()
    del graph
    return held


def _graph_of(call: Callable[..., Any], inputs: Sequence[Tensor]) -> Any:
    """The backward graph of `call` on copies of `inputs`, and nothing else of it."""
    result = call(*(tensor.clone() for tensor in inputs))
    results = (result,) if isinstance(result, Tensor) else result
    if all(part.grad_fn is None for part in results):
        raise ValueError("the result has no graph: neither an input nor a weight requires grad")
    return [part.grad_fn for part in results]


class GemmCounter(TorchDispatchMode):
    """Counts matrix multiplications that PyTorch runs while active; blind inside compiled code.

    Attributes:
        gemms: so many.
        flops: theirs and attention's; attention counts as if it were not causal.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gemms = self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.gemms += str(func._schema.name) in GEMMS
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out


def _event_flops(event: Any) -> int:
    """The same of an operator that the profiler saw, from the shapes of what it was given."""
    operands = (GEMMS | ATTENTION).get(event.name())
    if operands is None:
        return 0
    namespace, _, name = event.name().partition("::")
    formula = flop_registry[getattr(getattr(torch.ops, namespace), name)]
    return formula(*event.shapes()[:operands])


@dataclass(frozen=True)
class Allocations:
    """What a call did to memory, in bytes above what was live when it began.

    Attributes:
        peak_bytes: the most at any one time.
        live_bytes: what is left while the call's result is still held.
        gemms: matrix multiplications that PyTorch was asked for, in compiled code too. Those
            inside Triton kernels are not among them; one that a checkpoint stops before it runs is.
        flops: theirs and attention's.
        timeline: milliseconds and bytes after each allocation and release.
    """

    peak_bytes: int
    live_bytes: int
    gemms: int = 0
    flops: int = 0
    timeline: list[tuple[float, int]] = field(default_factory=list)


def allocator_trace(call: Callable[[], Any], device: torch.device | str = "cpu") -> Allocations:
    """Runs `call` once and returns what the allocator of `device` saw.

    `call` should free nothing that was there before: on CUDA that would count against the peak,
    on a CPU the profiler does not know its size and leaves it out.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    profiler = torch.autograd.profiler.profile(profile_memory=True, record_shapes=True)
    with _silent_stderr():
        profiler.__enter__()
    try:
        result = call()
        gc.collect()
    finally:
        with _silent_stderr():
            profiler.__exit__(None, None, None)
    trace: Any = profiler.kineto_results
    here = DeviceType.CUDA if cuda else DeviceType.CPU
    changes, gemms, flops = [], 0, 0
    for event in trace.events():
        if event.device_type() == DeviceType.CPU:
            gemms += event.name() in GEMMS
            flops += _event_flops(event)
        if event.name() == "[memory]" and event.device_type() == here:
            changes.append((event.start_ns() / 1e6, event.nbytes()))
    changes.sort(key=lambda change: change[0])
    levels = list(itertools.accumulate((size for _, size in changes), initial=0))
    timeline = [(t - changes[0][0], n) for (t, _), n in zip(changes, levels[1:], strict=True)]
    peak, live = max(levels), levels[-1]
    if cuda:  # the allocator's own figures, whatever the profiler missed
        torch.cuda.synchronize(device)
        live = torch.cuda.memory_allocated(device) - before
        peak = torch.cuda.max_memory_allocated(device) - before
    del result
    return Allocations(peak, live, gemms, flops, timeline)


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Drops what libraries write to the process's standard error, for a moment.

    The profiler reports its start and stop there, and reads the variable that would turn that off
    only while torch is being imported.
    """
    sys.stderr.flush()
    saved = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)


def held_bytes(
    call: Callable[..., Any], *inputs: Tensor, device: torch.device | str = "cpu"
) -> int:
    """Like `kept_bytes_measured`, by `allocator_trace`: compiled code and RNG states count too."""
    return allocator_trace(lambda: _graph_of(call, inputs), device).live_bytes


def count_flops(call: Callable[[], Any]) -> int:
    """Matmul FLOPs of `call`, attention included on every device.

    Attention counts as if it were not causal, which is what the fused operators' formulas do.
    """
    counter = FlopCounterMode(display=False)
    with counter:
        call()
    return counter.get_total_flops()


def synchronize(device: torch.device | str) -> None:
    """Waits until `device` has done what it was given."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def laps(
    step: Callable[[Callable[[], None]], Any],
    device: torch.device | str = "cpu",
    repeats: int = 1,
) -> list[list[float]]:
    """Seconds of the parts of a step, `repeats` times: by CUDA events, or the clock of a CPU.

    On a GPU each step waits for a flush of the L2 cache, long enough for the host to get ahead; the
    queue is not waited for in between.

    Args:
        step: is given a function, which it calls before, between and after its parts.
        device: where it runs.
        repeats: steps.
    """
    device = torch.device(device)
    cuda = device.type == "cuda"
    marks: list[list[Any]] = []
    flush = torch.empty(FLUSH_BYTES if cuda else 0, dtype=torch.int8, device=device)

    def mark() -> None:
        if cuda:
            marks[-1].append(torch.cuda.Event(enable_timing=True))
            marks[-1][-1].record()
        else:
            marks[-1].append(time.perf_counter())

    with no_collection():
        synchronize(device)
        for _ in range(repeats):
            marks.append([])
            flush.zero_()
            step(mark)
        synchronize(device)
    return [
        [a.elapsed_time(b) / 1e3 if cuda else b - a for a, b in itertools.pairwise(of_step)]
        for of_step in marks
    ]


def kernel_seconds(call: Callable[[], Any], device: torch.device | str) -> float:
    """Median seconds of many runs of `call`, which has run before.

    Unlike `triton.testing.do_bench`, it leaves the host the time to launch before the GPU gets
    there: a short kernel's time is then not the launcher's.
    """

    def step(mark: Callable[[], None]) -> None:
        mark()
        call()
        mark()

    [[once]] = laps(step, device)
    repeats = min(max(int(KERNEL_SECONDS / max(once, 1e-6)), 5), 100)
    return statistics.median(seconds for [seconds] in laps(step, device, repeats))


def seconds(call: Callable[[], Any], device: torch.device | str = "cpu") -> float:
    """Wall-clock seconds of one `call`, the device being idle before and after."""
    with no_collection():
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        return time.perf_counter() - start


@contextmanager
def no_collection() -> Iterator[None]:
    """Keeps the garbage collector from falling into somebody's measurement."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def interleaved(names: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Pairs of round and name: every name once a round, every second round in reverse.

    A fixed order misleads: the caches and the clock that one contender leaves are the next one's.
    """
    for index in range(rounds):
        for name in names if index % 2 == 0 else reversed(names):
            yield index, name


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of one or more values.

        Raises:
            ValueError: for no values at all.
        """
        if not values:
            raise ValueError("values is empty, expected at least one measurement")
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        fifths = statistics.quantiles(values, n=5, method="inclusive")
        return cls(statistics.median(values), fifths[0], fifths[3])
