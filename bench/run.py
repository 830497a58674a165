"""`backfuse bench OP`: measures an operation at one or several sizes.

At each size all contenders share weights, inputs and output gradients. Each is examined alone
(bytes, GEMMs, error against an exact run); then all are timed in rounds of alternating order, with
the library's GEMM and a copy among them. Times relative to eager, and shares of the two ceilings,
are ratios within a round. Rows are written when a size is done, or cut short by Ctrl-C or by a
deadline.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from . import measure
from .measure import COPY_BYTES, GIB, KIB
from .operations import PROBLEMS
from .options import (
    DTYPES,
    check_device,
    check_positive,
    check_seed,
    choose,
    default_device,
    parse_tokens,
    progress_bar,
    require,
    writable_folder,
)
from .own import own_name
from .problem import MODES, Case, Contender, Problem, Step, rounding
from .registry import OPERATIONS, Provider, choose_providers
from .rows import Table, case_columns, device_name, empty_row, measured_row
from .shapes import ALL_SHAPES

#: Operations of several blocks, where the user says so.
SEVERAL = ("ffn", "stack", "offload", "train", "model", "lora")


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        op: a name from `OPERATIONS`.
        shape: names from `ALL_SHAPES`; None: llama-3-8b on a GPU, small-512 on a CPU.
        tokens: of a step, all sequences together; several sizes make several groups of rows.
        batch_size: sequences.
        layers: blocks of a stack, FFN halves in a row; None: 4 on a GPU, 8 on a CPU for `stack`
            and `train`, 1 for `ffn`.
        dtype: names; None: bf16 on a GPU, fp32 on a CPU.
        modes: of `fwd`, `bwd` and `both`.
        providers: names; None for all. eager always runs.
        policies: of ours; None for all.
        rounds: how often everything is timed.
        device: `cpu` or `cuda`; the GPU if there is one.
        seed: of weights and inputs.

    Raises:
        ValueError: for names that are not known, sizes that do not fit each other, an unusable
            seed.
    """

    op: str
    shape: tuple[str, ...] | None = None
    tokens: str | None = None
    batch_size: int = 1
    layers: int | None = None
    dtype: tuple[str, ...] | None = None
    modes: tuple[str, ...] = ("both",)
    providers: tuple[str, ...] | None = None
    policies: tuple[str, ...] | None = None
    rounds: int = 5
    device: str = field(default_factory=default_device)
    seed: int = 0

    def __post_init__(self) -> None:
        choose("operation", self.op, OPERATIONS)
        check_device(self.device)
        check_seed(self.seed)
        for name in ("batch_size", "rounds"):
            check_positive(name, getattr(self, name))
        if self.layers is not None:
            check_positive("layers", self.layers)
            if self.layers > 1 and self.op not in SEVERAL:
                raise ValueError(f"layers is {self.layers}, but {self.op} is always one")
        for name, values, known in (
            ("shape", self.shape, ALL_SHAPES), ("dtype", self.dtype, DTYPES),
            ("mode", self.modes, MODES),
        ):  # fmt: skip
            for value in values or ():
                choose(name, value, known)
        providers = choose_providers(self.op, self.providers)
        policies = {p for name in providers for p in OPERATIONS[self.op].providers[name].policies}
        for policy in self.policies or ():
            choose("policy", policy, sorted(policies - {""}))
        list(self.cases())

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return torch.device(self.device).type == "cuda"

    def cases(self) -> Iterator[Case]:
        """Shapes, dtypes and numbers of tokens, each with each."""
        several = self.op in SEVERAL and self.op != "ffn"
        layers = self.layers or ((4 if self.cuda else 8) if several else 1)
        tokens = parse_tokens(self.tokens or ("8k" if self.cuda else "2k"))
        for shape in self.shape or ("llama-3-8b" if self.cuda else "small-512",):
            spec = ALL_SHAPES[shape]
            if self.op == "rope" and spec.rope is None:
                raise ValueError(f"shape is {shape!r}, which has no rotary embedding")
            for dtype in self.dtype or ("bf16" if self.cuda else "fp32",):
                for count in tokens:
                    if count % self.batch_size:
                        raise ValueError(
                            f"tokens is {count}, expected a multiple of batch_size "
                            f"({self.batch_size})"
                        )
                    seq_len = count // self.batch_size
                    yield Case(
                        self.op, shape, spec, layers, self.batch_size, seq_len, dtype,
                        self.device, self.seed,
                    )  # fmt: skip


@dataclass(frozen=True)
class Outputs:
    """What is written besides the table on the screen.

    Attributes:
        csv: rows are appended there, and what memory did to `<csv>-timeline.csv`.
        plot: a picture of bytes against time.
        trace: folder for a chrome trace of one step of each contender.
        snapshot: a CUDA allocator history, for pytorch.org/memory_viz.
    """

    csv: Path | None = None
    plot: Path | None = None
    trace: Path | None = None
    snapshot: Path | None = None

    def check(self, device: str) -> None:
        """Proves before any work that all of it can be written.

        Raises:
            OSError: if not.
            ValueError: for a snapshot without CUDA.
        """
        if self.snapshot and torch.device(device).type != "cuda":
            raise ValueError(
                f"snapshot is {str(self.snapshot)!r}, but only a CUDA device has an allocator "
                "history; without one the CSV's timeline says what memory did"
            )
        for path in (self.csv, self.plot, self.snapshot):
            if path:
                writable_folder(path.parent)
                if path.is_dir() or (path.exists() and not os.access(path, os.W_OK)):
                    raise OSError(f"cannot write to {path}: expected a file")
        if self.trace:
            writable_folder(self.trace)
        if self.plot:
            require("matplotlib")


def free_bytes(device: str) -> int:
    """Memory that is still to be had."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:  # not Linux: let it try
        return 2**63
    sizes = dict(line.split(":") for line in text.splitlines())
    return int(sizes["MemAvailable"].split()[0]) * KIB


def needed_bytes(case: Case, provider: Provider, policy: str) -> int:
    """About what a step takes at least: weights, their gradients, what is kept, a layer's work."""
    if case.op in ("norm", "rope", "attention"):
        return case.kept("full")
    elements = sum(map(math.prod, case.spec.parameters().values())) * case.layers
    layer = 2 * case.kept("keep")  # eager PyTorch keeps twice what ours can
    kept = layer if provider.keeps_all else case.kept(policy or "full")
    return 2 * elements * case.torch_dtype.itemsize + (case.layers - 1) * kept + layer


class Ceilings:
    """The library's GEMM of the case's sizes and a copy on its device: what can be had."""

    def __init__(self, case: Case) -> None:
        spec = case.spec
        h, f, rows = spec.hidden_size, spec.intermediate_size, case.tokens
        x, weight = (torch.randn(*size, **case.factory) for size in ((rows, h), (f, h)))
        source = torch.randn(COPY_BYTES[torch.device(case.device).type] // 4, device=case.device)
        target = torch.empty_like(source)
        self._device = case.device
        self._runs: dict[str, tuple[float, Callable[[], object]]] = {
            "gemm": (2.0 * rows * h * f, lambda: torch.mm(x, weight.T)),
            "copy": (2.0 * source.nbytes, lambda: target.copy_(source)),
        }
        self.rates: dict[str, list[float]] = {name: [] for name in self._runs}
        for _, call in self._runs.values():
            call()

    def time(self, name: str) -> None:
        """One round."""
        work, call = self._runs[name]
        self.rates[name].append(work / measure.kernel_seconds(call, self._device))


class Bench:
    """Measures cases and fills a table.

    Args:
        setup: what is measured.
        table: where rows go.
        outputs: what is written besides.
        deadline: in seconds of `time.monotonic()`; no round starts after it.
    """

    def __init__(
        self,
        setup: Setup,
        table: Table,
        outputs: Outputs | None = None,
        deadline: float = float("inf"),
    ) -> None:
        self.setup, self.table, self.outputs = setup, table, outputs or Outputs()
        self.deadline = deadline
        self.failed = False

    def run(self) -> None:
        """All cases.

        Raises:
            KeyboardInterrupt: after the rows of what was done are written.
        """
        for case in self.setup.cases():
            if time.monotonic() < self.deadline:
                self.measure(case)

    def measure(self, case: Case) -> None:
        """One case: all of its contenders that have no rows yet, and eager."""
        print(case.title(), flush=True)
        wanted = list(self._wanted(case))
        if all(name == "eager" and self._there(case, name, "") for name, _, _ in wanted):
            return
        torch.manual_seed(case.seed)
        done: list[Contender] = []
        ceilings: Ceilings | None = None
        try:
            problem = PROBLEMS[case.op](case)
            step = Step(problem)
            with progress_bar(total=len(wanted) * (self.setup.rounds + 1), unit="run") as bar:
                try:
                    self._examine(step, wanted, done, bar)
                    ceilings = Ceilings(case)
                    self._time(step, done, ceilings, bar)
                    self._trace(step, done)
                finally:
                    self._write(problem, done, ceilings)
        except torch.OutOfMemoryError as error:
            self._leave_out(case, "eager", "", "skipped", first_line(error))
        finally:
            done.clear()
            gc.collect()

    def _wanted(self, case: Case) -> Iterator[tuple[str, str, Provider]]:
        """Who is to run; who cannot gets a row, or a line, that says why."""
        free = free_bytes(case.device)
        for name in choose_providers(case.op, self.setup.providers):
            provider = OPERATIONS[case.op].providers[name]
            missing = provider.missing(case)
            if missing:
                print(f"  {name} left out: {missing}", flush=True)
                continue
            for policy in provider.policies:
                if policy and self.setup.policies and policy not in self.setup.policies:
                    continue
                needed = needed_bytes(case, provider, policy)
                if name != "eager" and self._there(case, name, policy):
                    print(f"  {name} {policy}".rstrip() + ": there already", flush=True)
                elif needed > free:
                    sizes = f"{needed / GIB:,.1f} GiB, {free / GIB:,.1f} GiB are free"
                    self._leave_out(case, name, policy, "skipped", f"needs about {sizes}")
                else:
                    yield name, policy, provider

    def _there(self, case: Case, name: str, policy: str) -> bool:
        """Whether the table has all rows of a contender."""
        row = case_columns(case) | {"provider": _shown(name, case), "policy": policy}
        return all(self.table.has(row | {"mode": mode}) for mode in self.setup.modes)

    def _leave_out(self, case: Case, name: str, policy: str, status: str, note: str) -> None:
        """Rows that say why there are no numbers."""
        print(f"  {name} {policy}".rstrip() + f" {status}: {note}", flush=True)
        for mode in self.setup.modes:
            row = empty_row(case, _shown(name, case), policy, status, note)
            self.table.add(row | {"mode": mode})

    def _examine(
        self,
        step: Step,
        wanted: list[tuple[str, str, Provider]],
        done: list[Contender],
        bar: Any,
    ) -> None:
        case = step.problem.case
        bar.set_description("exact gradients")
        try:
            exact = step.exact()
        except torch.OutOfMemoryError:
            exact = None
            print("  no room for an exact run: errors are not known", flush=True)
        for name, policy, provider in wanted:
            if time.monotonic() > self.deadline:
                break
            bar.set_description(f"{name} {policy}: bytes")
            contender = None
            try:
                contender = provider.make(step.problem, policy)
                step.examine(contender, exact)
            except Exception as error:  # any peer, any compiler
                memory = isinstance(error, torch.OutOfMemoryError)
                status = "skipped" if memory else "failed"
                self._leave_out(case, name, policy, status, first_line(error))
                self.failed |= name.startswith("backfuse") and not memory
                del contender
                gc.collect()
            else:
                done.append(contender)
                self._judge(case, contender, done[0])
            bar.update()

    def _judge(self, case: Case, contender: Contender, eager: Contender) -> None:
        """Marks a contender that is further from the exact run than rounding and eager explain."""
        terms = max(case.tokens, case.spec.hidden_size, case.spec.intermediate_size)
        least = case.layers * rounding(case.torch_dtype, terms)
        allowed = {
            name: least + (0.0 if contender is eager else 3 * eager.errors.get(name, 0.0))
            for name in contender.errors
        }
        excess = {name: error / allowed[name] for name, error in contender.errors.items()}
        if max(excess.values(), default=0.0) > 1:
            worst = max(excess, key=lambda name: excess[name])
            error = contender.errors[worst]
            contender.status = "WRONG"
            contender.note = f"error of {worst} {error:.1e}, expected at most {allowed[worst]:.1e}"
            print(f"  {contender.name} is WRONG: {contender.note}", flush=True)
            self.failed |= contender.provider.startswith("backfuse")

    def _time(self, step: Step, done: list[Contender], ceilings: Ceilings, bar: Any) -> None:
        named = {contender.name: contender for contender in done}
        for index, name in measure.interleaved([*ceilings.rates, *named], self.setup.rounds):
            if time.monotonic() > self.deadline and index:
                break
            bar.set_description(f"{name}: round {index + 1} of {self.setup.rounds}")
            if name in ceilings.rates:
                ceilings.time(name)
                continue
            contender = named[name]
            if contender.status != "failed":
                try:
                    step.time(contender)
                except Exception as error:
                    contender.status, contender.note = "failed", first_line(error)
                    self.failed |= contender.provider.startswith("backfuse")
            bar.update()

    def _trace(self, step: Step, done: list[Contender]) -> None:
        if self.outputs.trace is None:
            return
        for contender in done:
            with torch.profiler.profile() as profiler:
                step(contender)
                measure.synchronize(step.device)
            case = step.problem.case
            parts = (case.op, case.shape, str(case.tokens), case.dtype, contender.name)
            name = "-".join(parts).replace(" ", "-")
            profiler.export_chrome_trace(str(self.outputs.trace / f"{name}.json"))
            step.clear(contender)

    def _write(self, problem: Problem, done: list[Contender], ceilings: Ceilings | None) -> None:
        """Rows of all that was timed."""
        eager = next((c for c in done if c.provider == "eager"), None)
        rates = ceilings.rates if ceilings else {}
        for contender in done:
            if contender.laps:
                for mode in self.setup.modes:
                    self.table.add(measured_row(problem, contender, mode, eager, rates))
        if self.outputs.csv:
            save_timelines(self.outputs.csv, problem.case, done)


def _shown(name: str, case: Case) -> str:
    """A provider's name in a row: ours says what runs."""
    return own_name(case) if name == "backfuse" else name


def timeline_file(csv: Path) -> Path:
    """Where the timelines of a table are."""
    return csv.with_name(f"{csv.stem}-timeline.csv")


def save_timelines(csv: Path, case: Case, done: list[Contender]) -> None:
    """Appends what memory did in a step of each contender: the most in each of 200 parts of it."""
    path = timeline_file(csv)
    names = ("op", "shape", "layers", "batch_size", "tokens", "dtype")
    facts = {name: value for name, value in case_columns(case).items() if name in names}
    old = pd.read_csv(path, keep_default_na=False) if path.exists() else pd.DataFrame()
    same = old.loc[(old[list(facts)] == list(facts.values())).all(axis=1)] if len(old) else old
    there = set(zip(same["provider"], same["policy"], strict=True)) if len(same) else set()
    frames = [old] if len(old) else []
    for contender in done:
        drawn = (contender.provider, contender.policy) in there
        if contender.laps and contender.timeline and not drawn:
            line = pd.DataFrame(contender.timeline, columns=["ms", "bytes"])
            line["part"] = (line["ms"] / max(line["ms"].iloc[-1], 1e-9) * 200).astype(int)
            line = line.groupby("part").max().reset_index(drop=True).round(3)
            who = {"provider": contender.provider, "policy": contender.policy}
            frames.append(line.assign(**facts, **who))
    if frames:
        pd.concat(frames).to_csv(path, index=False)


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def run(setup: Setup, outputs: Outputs | None = None, threads: int | None = None) -> int:
    """The command: measures, prints, writes.

    Args:
        setup: what to measure.
        outputs: what to write.
        threads: of PyTorch; None for its own choice.

    Returns:
        The exit code: 0; 1 if something of ours failed or is wrong; 130 after Ctrl-C.

    Raises:
        OSError: if a file cannot be written.
        ValueError: for a snapshot without CUDA, or a CSV that is none of ours.
    """
    outputs = outputs or Outputs()
    require("tqdm")
    outputs.check(setup.device)
    if threads is not None:
        check_positive("threads", threads)
        torch.set_num_threads(threads)
    if setup.cuda and torch.device(setup.device).index is not None:
        torch.cuda.set_device(setup.device)
    table = Table(outputs.csv)
    bench = Bench(setup, table, outputs)
    print(device_name(setup.device), f"torch {torch.__version__}", sep=", ")
    if outputs.snapshot:
        torch.cuda.memory._record_memory_history()
    try:
        bench.run()
        code = int(bench.failed)
    except KeyboardInterrupt:
        print("interrupted: the table holds what was measured until then")
        code = 130
    if outputs.snapshot:
        torch.cuda.memory._dump_snapshot(str(outputs.snapshot))
        print(f"wrote {outputs.snapshot}")
    print(table.text())
    if outputs.csv and table.rows:
        print(f"wrote {outputs.csv}")
    if outputs.plot and table.rows:
        from .pictures import plot_rows

        for path in plot_rows(pd.DataFrame(table.rows), outputs.plot):
            print(f"wrote {path}")
    return code
