"""Pictures: bytes against time, rate against tokens, bytes by activation, memory over time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from backfuse import BlockSpec, kept_bytes

from .measure import KIB, MIB
from .options import require
from .plot import FAMILIES, Point, family, head, label, tradeoff

POLICIES = ("keep", "selective", "lean", "full")

#: The five activations, in the order of a pass, and what is small: colours as in `plot.FAMILIES`.
ACTIVATIONS = {
    "x": "#0072b2", "qkv": "#e69f00", "attn_out": "#009e73", "mid": "#56b4e9",
    "preact": "#d55e00", "rest": "#999999",
}  # fmt: skip

#: Lines of one family are told apart by these.
STYLES = ("-", "--", "-.", ":", (0, (1, 1)), (0, (5, 1)), (0, (3, 1, 1, 1)))


@contextmanager
def _figure(path: Path, title: str, subtitle: str, height: float = 5.0) -> Iterator[Any]:
    """Axes of a picture that is written at the end."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, height), dpi=150, layout="constrained")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    head(axes, title, subtitle)
    yield axes
    figure.savefig(path)
    pyplot.close(figure)


def name_of(row: Any) -> str:
    """Provider and policy of a row."""
    return f"{row['provider']} {row['policy']}".rstrip()


def describe(row: Any, tokens: bool = True) -> str:
    """The size that a row is of, and where it was measured, in two lines."""
    blocks = f"{row['layers']:.0f} x " if row["layers"] > 1 else ""
    sequences = f"{row['batch_size']:.0f} x {row['tokens'] / row['batch_size']:,.0f} tokens, "
    return (
        f"{row['op']}: {blocks}{row['shape']} (hidden {row['hidden_size']:.0f}, FFN "
        f"{row['intermediate_size']:.0f}, {row['heads']:.0f}/{row['kv_heads']:.0f} heads), "
        f"{sequences if tokens else ''}{row['dtype']}\n"
        f"{row['device']}, torch {row['torch']}, {row['date']}"
    )


def plot_tradeoff(rows: pd.DataFrame, path: Path) -> None:
    """Bytes kept against time, of the rows of one size in the mode `both`."""
    timed = rows.dropna(subset=["vs_eager", "kept_bytes"])
    timed = timed[timed["kept_bytes"] > 0]
    points = [
        Point(name_of(row), row["kept_bytes"] / row["tokens"] / row["layers"] / KIB,
              row["vs_eager"])
        for _, row in timed.iterrows()
    ]  # fmt: skip
    if points:
        tradeoff(
            points, path,
            title="What a step costs, and what it holds for its backward pass",
            subtitle=describe(timed.iloc[0]),
            time_label="time of forward and backward, relative to plain PyTorch",
        )  # fmt: skip


def plot_rate(rows: pd.DataFrame, path: Path) -> None:
    """TFLOP/s, or GB/s, against tokens, of the rows of one operation and shape."""
    what, share = ("tflops", "gemm_share")
    unit, ceiling = "TFLOP/s", "library GEMM"
    if rows["tflops"].isna().all():
        what, share, unit, ceiling = "gbps", "copy_share", "GB/s", "copy"
    rows = rows.dropna(subset=what).sort_values("tokens")
    title = f"{unit} of forward and backward, recomputing not counted"
    with _figure(path, title, describe(rows.iloc[0], tokens=False)) as axes:
        most = (rows[what] / rows[share]).groupby(rows["tokens"]).median()
        axes.plot(most.index, most, color="#bbbbbb", linewidth=5, label=ceiling, zorder=1)
        _lines(axes, rows, "tokens", what, marker=True)
        axes.set_xscale("log", base=2)
        ticks = sorted(set(rows["tokens"]))
        axes.set_xticks(ticks, [f"{tokens / 1024:g}k" for tokens in ticks])
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of a step")
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def plot_slopes(rows: pd.DataFrame, slopes: pd.DataFrame, path: Path, subtitle: str) -> None:
    """Peaks of a stack against tokens, slopes in the legend: see `long.py`.

    Args:
        rows: of one shape and number of layers, several numbers of tokens.
        slopes: of each contender, as `long.slopes` gives them.
        path: of the picture.
        subtitle: the set-up.
    """
    rows = rows.sort_values("tokens")
    title = "Device memory of a step, by the length of the sequence"
    seen = dict.fromkeys(FAMILIES, 0)
    with _figure(path, title, subtitle, height=6.0) as axes:
        for _, one in slopes.iterrows():
            own = (rows["provider"] == one["provider"]) & (rows["policy"] == one["policy"])
            group = family(one["provider"])
            colour, marker, _ = FAMILIES[group]
            style, seen[group] = STYLES[seen[group] % len(STYLES)], seen[group] + 1
            axes.plot(
                rows[own]["tokens"], rows[own]["peak_bytes"] / MIB, color=colour,
                marker=marker, markersize=5, linestyle=style,
                label=f"{name_of(one)}: {one['once']:,.0f} and {one['per_layer']:,.0f} a layer",
            )  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        ticks = sorted(set(rows["tokens"]))
        axes.set_xticks(ticks, [f"{tokens / 1024:g}k" for tokens in ticks])
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.minorticks_off()
        axes.set_xlabel("tokens of the sequence")
        axes.set_ylabel("peak above weights and inputs, MiB")
        axes.legend(frameon=False, fontsize=8.5, title="slope of the peak, bytes per token")


def plot_timeline(lines: pd.DataFrame, path: Path, subtitle: str) -> None:
    """Memory above weights and inputs over a step, from a timeline file's rows of one size."""
    lines = lines.copy()
    ends = lines.groupby(["provider", "policy"])["ms"].transform("max")
    lines["percent"], lines["mib"] = 100 * lines["ms"] / ends, lines["bytes"] / MIB
    title = "Memory over one step, above weights and inputs"
    with _figure(path, title, subtitle) as axes:
        _lines(axes, lines, "percent", "mib")
        axes.set_xlim(0, 100)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("time of the step, %")
        axes.set_ylabel("MiB, weights' gradients included")
        axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _lines(axes: Any, rows: pd.DataFrame, x: str, y: str, marker: bool = False) -> None:
    """One line a contender, coloured by family."""
    seen = dict.fromkeys(FAMILIES, 0)
    for (provider, policy), line in rows.groupby(["provider", "policy"], sort=False):
        name = f"{provider} {policy}".rstrip()
        group = family(name)
        colour, shape, _ = FAMILIES[group]
        style, seen[group] = STYLES[seen[group] % len(STYLES)], seen[group] + 1
        shown = label(name)
        if group in ("backfuse", "torch.compile", "torch.utils.checkpoint"):
            shown = f"{group.removeprefix('torch.utils.')}: {shown}"
        axes.plot(
            line[x], line[y], color=colour, linestyle=style, linewidth=1.4, label=shown,
            marker=shape if marker else None, markersize=5, zorder=3 if group == "backfuse" else 2,
        )  # fmt: skip


def plot_activations(name: str, spec: BlockSpec, path: Path, tokens: int = 8192) -> None:
    """Bytes per token that a block keeps, by activation and policy: arithmetic, not measured.

    Args:
        name: of the shape.
        spec: the block.
        path: of the picture.
        tokens: of a sequence.
    """
    sizes: dict[str, Any] = {"batch_size": 1, "seq_len": tokens, "dtype": torch.bfloat16}
    by_policy = {
        policy: _by_activation(kept_bytes(spec, policy, **sizes), tokens) for policy in POLICIES
    }
    subtitle = f"one block of {name}, bf16, by arithmetic (kept_bytes)"
    title = "What each policy keeps for backward, by activation"
    with _figure(path, title, subtitle, height=3.2) as axes:
        for y, parts in enumerate(by_policy.values()):
            left = 0.0
            for part, kib in parts.items():
                bar = {"left": left, "color": ACTIVATIONS[part], "height": 0.62}
                axes.barh(y, kib, **bar, label=part if y == 0 else None)
                left += kib
            axes.text(left + 0.8, y, f"{left:.1f}", va="center", fontsize=9)
        axes.set_yticks(range(len(by_policy)), list(by_policy))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("KiB per token")
        axes.margins(x=0.08)
        axes.legend(frameon=False, fontsize=9, ncol=2, loc="lower right")


def _by_activation(kept: dict[str, int], tokens: int) -> dict[str, float]:
    parts = {name: kept.get(name, 0) / tokens / KIB for name in ACTIVATIONS if name != "rest"}
    rest = sum(kept.values()) / tokens / KIB - sum(parts.values())
    return parts | {"rest": rest}


def plot_rows(rows: pd.DataFrame, path: Path) -> list[Path]:
    """Pictures of a command's rows: bytes against time; rate against tokens if there are several.

    Returns:
        The files: the path itself, or, for rows of several sizes, the path with each one's name.
    """
    timed = rows.dropna(subset="ms_median")
    timed = timed[timed["mode"] == "both"] if "both" in set(timed["mode"]) else timed
    names = ["op", "shape", "dtype"]
    several = timed.groupby([*names, "tokens"]).ngroups > 1
    written = []
    for (op, shape, dtype), group in timed.groupby(names, sort=False):
        for tokens, rows_of_size in group.groupby("tokens"):
            where = path
            if several:
                where = path.with_name(f"{path.stem}-{op}-{shape}-{dtype}-{tokens}.png")
            plot_tradeoff(rows_of_size, where)
            if where.exists():
                written.append(where)
        if group["tokens"].nunique() > 1:
            where = path.with_name(f"{path.stem}-{op}-{shape}-{dtype}-rate.png")
            plot_rate(group, where)
            written.append(where)
    return written
