"""`backfuse bench kernels`: every kernel in every configuration, on a GPU, against the library.

Each is checked first, then all that are right are timed in rounds of alternating order; shares of
the library's rate are ratios within a round.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from backfuse.kernels.dispatch import operations

from . import measure
from .kernel_case import Case, Sizes
from .kernel_cases import cases
from .measure import Spread
from .options import (
    DTYPES,
    check_device,
    check_positive,
    check_seed,
    choose,
    parse_tokens,
    progress_bar,
    require,
    writable_folder,
)
from .rows import device_name, versions
from .run import first_line
from .shapes import ALL_SHAPES

#: What an H200 has to reach: the least share of the library's rate.
GOALS = {"ffn_up": 0.92, "ffn_dact": 0.90} | dict.fromkeys(
    ("norm_forward", "norm_apply", "norm_backward", "qk_rope_forward", "qk_rope_backward"), 0.85
)

#: Title of a column -> how a row's numbers look there.
COLUMNS = {
    "kernel": "{kernel} {variant}",
    "config": "{config}",
    "default": "{default}",
    "ms": "{ms:.3f} ({ms_p20:.3f}-{ms_p80:.3f})",
    "TFLOP/s": "{tflops:,.0f}",
    "GB/s": "{gbps:,.0f}",
    "share": "{share:.3f}",
    "time / split": "{time_vs_split:.3f}",
    "error": "{error:.1e}",
    "status": "{status}",
}


@dataclass
class Results:
    """What was found, as far as it came.

    Attributes:
        cases: the kernels and their baselines.
        failed: whether one fails or is wrong.
    """

    cases: list[Case] = field(default_factory=list)
    failed: bool = False

    def frame(self) -> pd.DataFrame:
        """One row a case; NaN for what was not measured."""
        return pd.DataFrame([_row(case) for case in self.cases])

    def table(self) -> str:
        """The frame as text for people; blank for what was not measured."""
        if not self.cases:
            return "nothing was measured"
        rows = self.frame().replace({"default": {True: "*", False: ""}}).to_dict("records")
        texts = {title: [form.format(**row) for row in rows] for title, form in COLUMNS.items()}
        return pd.DataFrame(texts).replace(r"^nan\b.*", "", regex=True).to_string(index=False)

    def figures(self) -> list[str]:
        """The best configuration of each kernel, held against `GOALS`."""
        frame = self.frame().query("status == 'ok'")
        goals = frame[frame["kernel"].isin(GOALS)].dropna(subset="share")
        lines = []
        for (kernel, variant), rows in goals.groupby(["kernel", "variant"], sort=False):
            best = rows.loc[rows["share"].idxmax()]
            config = f" with {best['config']}" if best["config"] else ""
            lines.append(
                f"{f'{kernel} {variant}'.strip()}: {best['share']:.3f} of {best['baseline']}"
                f"{config} (goal: at least {GOALS[kernel]:.2f})"
            )
        fused = frame.dropna(subset="time_vs_split")
        if not fused.empty:
            best = fused.loc[fused["time_vs_split"].idxmin()]
            lines.append(
                f"ffn_recompute {best['variant']}: {best['time_vs_split']:.3f} x the time of split "
                f"with {best['config']} (goal: below 1)"
            )
        return lines


def _row(case: Case) -> dict[str, Any]:
    names = ("kernel", "variant", "config", "default")
    row: dict[str, Any] = {name: getattr(case, name) for name in names}
    time = Spread.of(case.seconds or [math.nan])
    row |= {"ms": time.median * 1e3, "ms_p20": time.p20 * 1e3, "ms_p80": time.p80 * 1e3}
    baseline, rate = case.baseline or case, case.work / time.median
    row["tflops"] = math.nan if baseline.memory else rate / 1e12
    row["gbps"] = rate / 1e9 if baseline.memory else math.nan
    row["baseline"] = baseline.name
    scale = case.work / baseline.work
    row["share"] = _median([scale / ratio for ratio in _ratios(case, baseline)])
    row["time_vs_split"] = _median(_ratios(case, case.split))
    return row | {"error": case.error, "status": case.status}


def _ratios(mine: Case, to: Case | None) -> list[float]:
    """Times relative to another's, by round; who fails in a round runs in no later one."""
    return [a / b for a, b in zip(mine.seconds, to.seconds, strict=False)] if to else []


def _median(values: Sequence[float]) -> float:
    return Spread.of(values or [math.nan]).median


def measure_cases(
    results: Results, sizes: Sizes, rounds: int, deadline: float = math.inf
) -> None:
    """Checks and times every case; one that fails or is wrong says so in its row.

    Args:
        results: filled.
        sizes: of the cases.
        rounds: how often each is timed.
        deadline: in seconds of `time.monotonic()`; nothing starts after it.
    """
    results.cases = cases(sizes)
    named = {case.name: case for case in results.cases}
    with progress_bar(total=len(named) * (rounds + 1), unit="run") as bar:

        def attempt(case: Case, what: str, work: Callable[[Case], None]) -> None:
            bar.set_description(f"{case.name}: {what}")
            if case.status == "ok" and time.monotonic() < deadline:
                try:
                    work(case)
                except Exception as error:  # Triton's have no common base; the row says it
                    case.status = first_line(error)
            bar.update()

        def clock(case: Case) -> None:
            case.seconds.append(measure.kernel_seconds(case.call, sizes.device))

        for case in results.cases:
            attempt(case, "check", Case.verify)
        for index, name in measure.interleaved(list(named), rounds):
            attempt(named[name], f"round {index + 1} of {rounds}", clock)
    results.failed |= any(case.status not in ("ok", "does not fit") for case in results.cases)


def run(
    *,
    shape: str = "llama-3-8b",
    tokens: str = "8k",
    dtype: str = "bf16",
    rounds: int = 5,
    device: str = "cuda",
    seed: int = 0,
    csv: Path | None = None,
    deadline: float = math.inf,
) -> int:
    """The command: checks, measures, prints, writes.

    Args:
        shape: a name from `ALL_SHAPES`.
        tokens: rows of a call, such as `8k`.
        dtype: a name from `DTYPES`.
        rounds: how often everything is timed.
        device: a GPU.
        seed: of the operands.
        csv: file for the table.
        deadline: see `measure_cases`.

    Returns:
        The exit code: 0; 1 if a kernel fails or is wrong; 130 after Ctrl-C.

    Raises:
        OSError: if the file cannot be written.
        ValueError: for unknown names, numbers below 1, and devices without kernels.
    """
    choose("shape", shape, ALL_SHAPES)
    choose("dtype", dtype, DTYPES)
    rows = parse_tokens(tokens)
    if len(rows) != 1:
        raise ValueError(f"tokens is {tokens!r}, expected one number of rows")
    check_positive("rounds", rounds)
    check_seed(seed)
    if torch.device(device).type != "cuda":
        raise ValueError(
            f"device is {device!r}, expected a GPU; without one `backfuse bench static` says of "
            "the kernels what it can"
        )
    check_device(device)
    sizes = Sizes(ALL_SHAPES[shape], rows[0], DTYPES[dtype], device)
    operations("triton", torch.device(device), sizes.dtype, sizes.spec.hidden_size)
    require("tqdm")
    if csv:
        writable_folder(csv.parent)
    torch.manual_seed(seed)
    print(f"kernels of {shape}, {rows[0]:,} tokens, {dtype}, {device_name(device)}", flush=True)
    results, interrupted = Results(), False
    try:
        measure_cases(results, sizes, rounds, deadline)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: the table holds what was measured until then")
    print(results.table())
    if results.cases:
        for line in results.figures():
            print(f"figure: {line}")
        if csv:
            facts = versions(device) | {"shape": shape, "tokens": rows[0], "dtype": dtype}
            results.frame().assign(**facts, rounds=rounds).to_csv(csv, index=False)
            print(f"wrote {csv}")
    return 130 if interrupted else int(results.failed)
