"""What the benchmark of an FFN half and its kernels is asked, and what it found."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from backfuse import BlockSpec

from .block_results import machine
from .ffn_rivals import WAYS, Contender
from .measure import KIB, MIB, Spread
from .options import DTYPES, check_device, check_positive, check_seed, choose, default_device
from .plot import Point, tradeoff
from .shapes import SHAPES, SMALL

#: What an H200 has to reach: ours, whom it is held against, what, and at most how much of it.
GOALS = (
    ("backfuse keep", "compile", "time", 1.00),
    ("backfuse keep", "compile", "held bytes", 0.70),
    ("backfuse selective", "compile", "time", 1.20),
    ("backfuse selective", "compile-checkpoint", "time", 0.97),
    ("backfuse selective", "quack-recompute", "time", 1.05),
    ("backfuse selective", "quack-recompute", "peak bytes", 0.60),
)

#: The same of the kernels: the least share of the library's rate.
KERNEL_GOALS = {"ffn_up": 0.92, "ffn_dact": 0.90} | dict.fromkeys(
    ("norm_forward", "norm_apply", "norm_backward", "qk_rope_forward", "qk_rope_backward"), 0.85
)


def _with_spread(name: str, digits: int) -> str:
    return f"{{{name}:.{digits}f}} ({{{name}_p20:.{digits}f}}-{{{name}_p80:.{digits}f}})"


#: Table -> title of a column -> how a row's numbers look there.
COLUMNS = {
    "half": {
        "provider": "{provider}",
        "forward ms": _with_spread("forward_ms", 2),
        "backward ms": _with_spread("backward_ms", 2),
        "both ms": _with_spread("both_ms", 2),
        "time / eager": _with_spread("time_vs_eager", 3),
        "held KiB/token": "{held_kib_per_token:.2f}",
        "peak MiB": "{peak_mib:,.1f}",
        "TFLOP/s": "{tflops:.3g}",
        "gradient error": "{gradient_error:.1e}",
        "status": "{status}",
    },
    "kernels": {
        "kernel": "{kernel} {variant}",
        "config": "{config}",
        "default": "{default}",
        "ms": _with_spread("ms", 3),
        "TFLOP/s": "{tflops:,.0f}",
        "GB/s": "{gb_s:,.0f}",
        "share": "{share:.3f}",
        "time / split": "{time_vs_split:.3f}",
        "error": "{error:.1e}",
        "status": "{status}",
    },
}

PROVIDERS = (*WAYS, "backfuse")
TABLES = tuple(COLUMNS)


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        shape: a name from `SHAPES`; None: llama-3-8b on a GPU, a small Llama on a CPU.
        hidden_size, intermediate_size: instead of the shape's.
        tokens: of a step; None: 8192 on a GPU, 2048 on a CPU.
        dtype: `fp32`, `bf16`, `fp16` or `fp64`; None: bf16 on a GPU, fp32 on a CPU.
        device: `cpu` or `cuda`; the GPU if there is one.
        rounds: how often everything is timed.
        providers: names from `PROVIDERS`; eager always runs.
        tables: names from `TABLES`.
        seed: of weights and inputs.

    Raises:
        ValueError: for names that are not known, sizes below 1 and an unusable seed.
    """

    shape: str | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    tokens: int | None = None
    dtype: str | None = None
    device: str = field(default_factory=default_device)
    rounds: int = 5
    providers: tuple[str, ...] = PROVIDERS
    tables: tuple[str, ...] = TABLES
    seed: int = 0

    def __post_init__(self) -> None:
        check_device(self.device)
        if self.shape is not None:
            choose("shape", self.shape, SHAPES)
        for name in ("hidden_size", "intermediate_size", "tokens", "rounds"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if self.dtype is not None:
            choose("dtype", self.dtype, DTYPES)
        check_seed(self.seed)
        for name in self.providers:
            choose("provider", name, PROVIDERS)
        for name in self.tables:
            choose("table", name, TABLES)
        if not self.tables:
            raise ValueError(f"tables is empty, expected {', '.join(TABLES)}, or one of them")

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return torch.device(self.device).type == "cuda"

    @property
    def rows(self) -> int:
        """Tokens, resolved."""
        return self.tokens or (8192 if self.cuda else 2048)

    @property
    def dtype_name(self) -> str:
        """The dtype's name, resolved."""
        return self.dtype or ("bf16" if self.cuda else "fp32")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return DTYPES[self.dtype_name]

    @cached_property
    def spec(self) -> BlockSpec:
        """The block whose half it is."""
        default = SHAPES["llama-3-8b"] if self.cuda else SMALL
        sizes = {"hidden_size": self.hidden_size, "intermediate_size": self.intermediate_size}
        changes = {name: size for name, size in sizes.items() if size is not None}
        return (SHAPES[self.shape] if self.shape else default).replace(**changes)

    def title(self) -> str:
        """One line that says what was measured."""
        spec = self.spec
        kind = f" ({spec.hidden_act}, {'gated' if spec.gated else 'plain'}, {spec.norm})"
        return (
            f"FFN half{f' of {self.shape}' if self.shape else ''}: hidden {spec.hidden_size}, "
            f"FFN {spec.intermediate_size}{'' if self.shape else kind}, {self.rows:,} tokens, "
            f"{self.dtype_name}"
        )


@dataclass
class Case:
    """One kernel in one configuration, and what was measured of it.

    Attributes:
        kernel: its name.
        variant: what it is asked to write, and from what.
        call: runs it.
        work: FLOPs, or bytes, of a call.
        baseline: whose rate it is held against; None for its own.
        check: gives its error, the largest relative norm of a result's difference from fp32; None
            where there is nothing to prove.
        limit: the error above which it is WRONG.
        split: of a fused rebuild: the same work by `split`.
        memory: of a baseline: whether `work` is bytes.
        config: its configuration, as text.
        default: whether the launcher would choose that one.
        error: see `check`.
        status: `ok`, `WRONG`, or why there is no time.
        seconds: one a round.
    """

    kernel: str
    variant: str
    call: Callable[[], Any]
    work: float
    baseline: Case | None = None
    check: Callable[[], float] | None = None
    limit: float = math.inf
    split: Case | None = None
    memory: bool = False
    config: str = ""
    default: bool = True
    error: float = math.nan
    status: str = "ok"
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Kernel, variant and configuration."""
        return " ".join(filter(None, (self.kernel, self.variant, self.config)))


@dataclass
class Results:
    """What a benchmark found, as far as it came.

    Attributes:
        setup: what was asked for.
        contenders: of the half; eager first.
        cases: of the kernels.
        flops: of a step of the half, without what is recomputed.
        notes: lines about what is missing or odd.
        failed: whether something of ours failed or is wrong.
        interrupted: whether the user stopped it.
    """

    setup: Setup
    contenders: list[Contender] = field(default_factory=list)
    cases: list[Case] = field(default_factory=list)
    flops: int = 0
    notes: list[str] = field(default_factory=list)
    failed: bool = False
    interrupted: bool = False

    def contender(self, name: str) -> Contender | None:
        """The contender of that name, if it could be examined."""
        return next((found for found in self.contenders if found.name == name), None)

    def frame(self, table: str) -> pd.DataFrame:
        """One row a contender, or a case: numbers and names; NaN for what was not measured."""
        if table == "half":
            return pd.DataFrame([self._half_row(contender) for contender in self.contenders])
        return pd.DataFrame([_kernel_row(case) for case in self.cases])

    def _half_row(self, contender: Contender) -> dict[str, Any]:
        steps = [step for laps in contender.laps for step in laps]
        row: dict[str, Any] = {"provider": contender.name}
        row |= _spread("time_vs_eager", _ratios(contender, self.contender("eager")))
        row |= _spread("forward_ms", [forward * 1e3 for forward, _ in steps])
        row |= _spread("backward_ms", [backward * 1e3 for _, backward in steps])
        row |= _spread("both_ms", [sum(step) * 1e3 for step in steps])
        return row | {
            "held_kib_per_token": contender.held_bytes / self.setup.rows / KIB,
            "peak_mib": contender.peak_bytes / MIB,
            "tflops": self.flops / row["both_ms"] / 1e9,
            "output_error": contender.output_error,
            "gradient_error": contender.gradient_error,
            "status": contender.status,
        }

    def table(self, table: str) -> str:
        """The frame as text for people; blank for what was not measured."""
        rows = self.frame(table).replace({"default": {True: "*", False: ""}}).to_dict("records")
        texts = {
            title: [form.format(**row) for row in rows] for title, form in COLUMNS[table].items()
        }
        return pd.DataFrame(texts).replace(r"^nan\b.*", "", regex=True).to_string(index=False)

    def save_csv(self, table: str, path: Path) -> None:
        """Writes the frame with the set-up and the versions in every row."""
        setup = self.setup
        names = ("hidden_size", "intermediate_size", "hidden_act", "gated")
        facts = {
            "shape": setup.shape or "",
            **{name: getattr(setup.spec, name) for name in names},
            "tokens": setup.rows,
            "dtype": setup.dtype_name,
            "device": setup.device,
            "rounds": setup.rounds,
            "seed": setup.seed,
            **machine(setup.device),
            "triton": _triton_version(),
        }
        self.frame(table).assign(**facts).to_csv(path, index=False)

    def save_plot(self, path: Path) -> None:
        """Writes a picture of held bytes against time.

        Raises:
            ModuleNotFoundError: without matplotlib, with the line that installs it.
            OSError: if the file cannot be written.
        """
        frame = self.frame("half").dropna(subset="time_vs_eager")
        columns = (frame[name] for name in ("provider", "held_kib_per_token", "time_vs_eager"))
        facts = machine(self.setup.device)
        tradeoff(
            [Point(*values) for values in zip(*columns, strict=True)],
            path,
            title="What a step of an FFN half costs, and what it holds for backward",
            subtitle=f"{self.setup.title()}; {facts['device_name']}, torch {facts['torch']}",
            time_label="time of forward and backward, relative to eager PyTorch",
            held_label="held for backward, KiB per token (log scale)",
        )

    def figures(self) -> list[str]:
        """Lines that hold what was measured against `GOALS` and `KERNEL_GOALS`."""
        return [*self._half_figures(), *self._kernel_figures()]

    def _half_figures(self) -> Iterator[str]:
        for mine, theirs, what, limit in GOALS:
            rival = self.contender(theirs)
            if rival is None or rival.status != "ok":
                continue
            for contender in self.contenders:
                if not contender.name.startswith(mine) or contender.status != "ok":
                    continue
                if what == "time":
                    ratio = _median(_ratios(contender, rival))
                else:
                    name = what.replace(" ", "_")
                    ratio = getattr(contender, name) / max(getattr(rival, name), 1)
                if not math.isnan(ratio):
                    where = " at 32,768 tokens" if what == "peak bytes" else ""
                    yield (
                        f"{contender.name}: {ratio:.3f} x the {what} of {theirs} "
                        f"(goal: at most {limit:.2f}{where})"
                    )

    def _kernel_figures(self) -> Iterator[str]:
        if not self.cases:
            return
        frame = self.frame("kernels").query("status == 'ok'")
        goals = frame[frame["kernel"].isin(KERNEL_GOALS)].dropna(subset="share")
        for (kernel, variant), rows in goals.groupby(["kernel", "variant"], sort=False):
            best = rows.loc[rows["share"].idxmax()]
            config = f" with {best['config']}" if best["config"] else ""
            yield (
                f"{f'{kernel} {variant}'.strip()}: {best['share']:.3f} of {best['baseline']}"
                f"{config} (goal: at least {KERNEL_GOALS[kernel]:.2f})"
            )
        fused = frame.dropna(subset="time_vs_split")
        if not fused.empty:
            best = fused.loc[fused["time_vs_split"].idxmin()]
            yield (
                f"ffn_recompute {best['variant']}: {best['time_vs_split']:.3f} x the time of split "
                f"with {best['config']} (goal: below 1)"
            )


def _kernel_row(case: Case) -> dict[str, Any]:
    names = ("kernel", "variant", "config", "default")
    row: dict[str, Any] = {name: getattr(case, name) for name in names}
    row |= _spread("ms", [seconds * 1e3 for seconds in case.seconds])
    baseline, rate = case.baseline or case, case.work / row["ms"]
    row["tflops"] = math.nan if baseline.memory else rate / 1e9
    row["gb_s"] = rate / 1e6 if baseline.memory else math.nan
    row["baseline"] = baseline.name
    scale = case.work / baseline.work
    row |= _spread("share", [scale / ratio for ratio in _ratios(case, baseline)])
    row["time_vs_split"] = _median(_ratios(case, case.split))
    return row | {"error": case.error, "status": case.status}


def _ratios(mine: Contender | Case, to: Contender | Case | None) -> list[float]:
    """Times relative to another's, by round; who fails in a round runs in no later one."""
    return [a / b for a, b in zip(mine.seconds, to.seconds, strict=False)] if to else []


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    """Median and percentiles as columns; NaN for no values."""
    spread = Spread.of(values or [math.nan])
    return {name: spread.median, f"{name}_p20": spread.p20, f"{name}_p80": spread.p80}


def _median(values: Sequence[float]) -> float:
    return Spread.of(values or [math.nan]).median


def first_line(error: BaseException) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def _triton_version() -> str:
    try:
        import triton
    except ImportError:
        return ""
    return str(triton.__version__)
