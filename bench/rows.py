"""What was measured, as rows of one tidy table, and the CSV file that holds them.

A row is one contender at one size in one mode. Rows are appended to the file of a device and
written through at once: what is there is never measured again by the same versions.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import math
import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch

import backfuse

from .measure import KIB, MIB, Spread
from .problem import Case, Contender, Problem

Row = dict[str, Any]

#: What makes two rows the same measurement.
KEY = (
    "op", "provider", "policy", "shape", "layers", "batch_size", "tokens", "dtype", "mode",
    "device", "backfuse", "torch", "triton",
)  # fmt: skip

COLUMNS = (
    "date", "device", "backfuse", "torch", "triton", "op", "provider", "policy", "shape",
    "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "layers", "batch_size",
    "tokens", "dtype", "mode", "rounds", "ms_median", "ms_p20", "ms_p80", "vs_eager",
    "vs_eager_p20", "vs_eager_p80", "tflops", "gemm_share", "gbps", "copy_share", "kept_bytes",
    "peak_bytes", "gemms", "flops", "error", "status", "note",
)  # fmt: skip


#: Columns that are never numbers, whatever they look like.
TEXTS = ("backfuse", "torch", "triton", "provider", "policy", "status", "note")


def device_name(device: str) -> str:
    """Of a GPU its name, of a CPU its name too and how many threads PyTorch uses."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''} {_processor()}"


def _processor() -> str:
    """The processor's name as Linux knows it, else what Python knows of it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def device_folder(device: str) -> str:
    """A folder's name for a device: `cpu`, or the GPU's in small letters."""
    if torch.device(device).type == "cpu":
        return "cpu"
    name = torch.cuda.get_device_name(device).lower()
    return "-".join("".join(c if c.isalnum() else " " for c in name).split())


def versions(device: str) -> Row:
    """What a number depends on besides the case."""
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "date": datetime.date.today().isoformat(),
        "device": device_name(device),
        "backfuse": backfuse.__version__,
        "torch": torch.__version__,
        "triton": triton,
    }


def case_columns(case: Case) -> Row:
    """The case's part of a row."""
    spec = case.spec
    return versions(case.device) | {
        "op": case.op,
        "shape": case.shape,
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "heads": spec.num_attention_heads,
        "kv_heads": spec.num_key_value_heads,
        "head_dim": spec.head_dim,
        "layers": case.layers,
        "batch_size": case.batch_size,
        "tokens": case.tokens,
        "dtype": case.dtype,
    }


def empty_row(case: Case, provider: str, policy: str, status: str, note: str) -> Row:
    """A row of something that was not measured, and why."""
    row: Row = dict.fromkeys(COLUMNS, math.nan)
    row |= {"mode": "both", "rounds": 0, "policy": policy, "provider": provider}
    return row | {"status": status, "note": note} | case_columns(case)


def measured_row(
    problem: Problem,
    contender: Contender,
    mode: str,
    eager: Contender | None,
    ceilings: Mapping[str, Sequence[float]],
) -> Row:
    """A contender's row in a mode.

    Args:
        problem: what it computed.
        contender: as far as it was measured.
        mode: `fwd`, `bwd` or `both`.
        eager: what its times are held to.
        ceilings: rates by round: FLOP/s of the library's `gemm`, bytes/s of a `copy`.
    """
    row = empty_row(problem.case, contender.provider, contender.policy, contender.status, "")
    mine, moved, flops = contender.rounds(mode), problem.bytes_moved(mode), problem.flops(mode)
    time = _spread(contender.steps(mode))
    ratio = _spread(_ratios(mine, eager.rounds(mode) if eager else []))
    memory_bound = not math.isnan(moved)
    rate = (moved if memory_bound else flops) / time.median if flops or memory_bound else math.nan
    ceiling = ceilings.get("copy" if memory_bound else "gemm", [])
    work = moved if memory_bound else flops
    share = _spread([work / seconds / most for seconds, most in zip(mine, ceiling, strict=False)])
    names = ("gbps", "copy_share") if memory_bound else ("tflops", "gemm_share")
    row |= {names[0]: rate / (1e9 if memory_bound else 1e12), names[1]: share.median}
    return row | {
        "mode": mode,
        "rounds": len(mine),
        "ms_median": time.median * 1e3,
        "ms_p20": time.p20 * 1e3,
        "ms_p80": time.p80 * 1e3,
        "vs_eager": ratio.median,
        "vs_eager_p20": ratio.p20,
        "vs_eager_p80": ratio.p80,
        "kept_bytes": contender.kept_bytes,
        "peak_bytes": contender.peak_bytes,
        "gemms": contender.gemms,
        "flops": contender.flops,
        "error": max(contender.errors.values(), default=math.nan),
        "note": contender.note,
    }


def _ratios(mine: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """By round; who fails in a round runs in no later one."""
    return [a / b for a, b in zip(mine, theirs, strict=False)]


def _spread(values: Sequence[float]) -> Spread:
    """Of no values: NaN."""
    return Spread.of(values or [math.nan])


def read(paths: Iterable[Path]) -> pd.DataFrame:
    """The rows of files.

    Raises:
        ValueError: for a file that is no such table.
    """
    frames = []
    for path in paths:
        frame = pd.read_csv(path, dtype=dict.fromkeys(TEXTS, str))
        missing = set(COLUMNS) - set(frame.columns)
        if missing:
            raise ValueError(f"{path} has no column {', '.join(sorted(missing))}")
        frames.append(frame.fillna(dict.fromkeys(TEXTS, "")).assign(file=path.name))
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=[*COLUMNS])


def key_of(row: Any) -> tuple[str, ...]:
    """What `KEY` says of a row, as text."""
    return tuple(str(row[name]) for name in KEY)


class Table:
    """Rows in memory and, if there is a path, at the end of a CSV file.

    Args:
        path: of the file, which may be there already; None for no file.

    Raises:
        ValueError: for a file that is no such table.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.rows: list[Row] = []
        old = read([path]) if path and path.exists() and path.stat().st_size else read([])
        self._there = {key_of(row) for _, row in old.iterrows()}

    def has(self, row: Row) -> bool:
        """Whether that measurement is there already."""
        return key_of(row) in self._there

    def add(self, row: Row) -> None:
        """A row, in the file too unless it is there."""
        self.rows.append(row)
        if self.path is None or self.has(row):
            return
        fresh = not self.path.exists() or not self.path.stat().st_size
        with open(self.path, "a", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerow({name: _text(row[name]) for name in COLUMNS})
        self._there.add(key_of(row))

    def text(self) -> str:
        """The rows for people."""
        return table(pd.DataFrame(self.rows, columns=[*COLUMNS]))


def _text(value: Any) -> Any:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.6g}"
    return value


def milliseconds(value: float) -> str:
    """Three digits, or all before the point; nothing for NaN."""
    return "" if pd.isna(value) else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _column(form: str, scale: float = 1.0) -> Callable[[float], str]:
    return lambda value: "" if pd.isna(value) else form.format(value / scale)


def table(frame: pd.DataFrame) -> str:
    """Rows as text for people; blank for what was not measured."""
    if frame.empty:
        return "nothing was measured"
    f = frame
    spread = [
        "-".join(map(milliseconds, pair)).strip("-")
        for pair in zip(f["ms_p20"], f["ms_p80"], strict=True)
    ]
    several = ("op", "shape", "tokens", "dtype")
    columns = {name: f[name] for name in several if f[name].nunique() > 1}
    columns |= {
        "provider": f["provider"] + (" " + f["policy"]).str.rstrip(),
        "mode": f["mode"],
        "ms": f["ms_median"].map(milliseconds),
        "p20-p80": spread,
        "/ eager": f["vs_eager"].map(_column("{:.3f}")),
        "TFLOP/s": f["tflops"].map(_column("{:,.3g}")),
        "of GEMM": f["gemm_share"].map(_column("{:.0%}")),
        "GB/s": f["gbps"].map(_column("{:,.3g}")),
        "of copy": f["copy_share"].map(_column("{:.0%}")),
        "kept KiB/token": (f["kept_bytes"] / f["tokens"]).map(_column("{:,.2f}", KIB)),
        "peak MiB": f["peak_bytes"].map(_column("{:,.1f}", MIB)),
        "GEMMs": f["gemms"].map(_column("{:.0f}")),
        "GFLOP": f["flops"].map(_column("{:,.4g}", 1e9)),
        "error": f["error"].map(_column("{:.1e}")),
        "status": f["status"],
    }
    shown = pd.DataFrame(columns)
    kept = [name for name in shown if (shown[name] != "").any()]
    return shown[kept].to_string(index=False)
