"""The picture of a trade: bytes held on one axis, time on the other, every point labelled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import require

#: Families of points, in the order of the legend: colour (Okabe and Ito's, which the colour-blind
#: can tell apart), marker, whether a line joins them.
FAMILIES: dict[str, tuple[str, str, bool]] = {
    "backfuse": ("#d55e00", "o", True),
    "torch.compile": ("#0072b2", "s", True),
    "torch.utils.checkpoint": ("#009e73", "^", True),
    "torch_remat": ("#56b4e9", "P", False),
    "Liger, QuACK, TransformerEngine": ("#cc79a7", "v", False),
    "attention libraries": ("#e69f00", "X", False),
    "plain PyTorch": ("#333333", "D", False),
}

#: How a provider's name begins -> its family.
PREFIXES = {
    "backfuse": "backfuse",
    "compile": "torch.compile",
    "torch-remat": "torch_remat",
    "liger": "Liger, QuACK, TransformerEngine",
    "quack": "Liger, QuACK, TransformerEngine",
    "te": "Liger, QuACK, TransformerEngine",
    "sdpa": "attention libraries",
    "flex": "attention libraries",
    "flash": "attention libraries",
    "eager": "plain PyTorch",
}

LABELS = {
    "checkpoint": "default",
    "compile": "no recompute",
    "compile-checkpoint": "with checkpoint",
    "sac-attention": "save attention",
    "sac-every-2nd-mm": "save every 2nd matmul",
}


@dataclass(frozen=True)
class Point:
    """One way to train.

    Attributes:
        name: of a provider and its policy, as in the table.
        held: KiB per token (and layer).
        time: relative to plain PyTorch.
    """

    name: str
    held: float
    time: float

    @property
    def family(self) -> str:
        """Which of `FAMILIES` the name belongs to."""
        return family(self.name)

    @property
    def label(self) -> str:
        """The name without what the legend says already."""
        return label(self.name)


def family(name: str) -> str:
    """Which of `FAMILIES` a provider belongs to."""
    known = (PREFIXES[prefix] for prefix in PREFIXES if name.startswith(prefix))
    return next(known, "torch.utils.checkpoint")


def label(name: str) -> str:
    """A provider's and policy's name without its family's."""
    provider, _, policy = name.partition(" ")
    if provider.startswith("backfuse"):
        fused = " (fused)" if provider.endswith("fused") else ""
        return (policy or provider) + fused
    return LABELS.get(name) or name.replace("compile-", "budget ")


def frontier(points: Sequence[Point]) -> list[Point]:
    """Those that nobody beats in both bytes and time, from the fewest bytes on.

    Bytes within a hundredth are the same bytes: a checkpoint also holds the state of a generator.
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.held, p.time)):
        if best and point.time >= best[-1].time:
            continue
        if best and point.held <= 1.01 * best[-1].held:
            best.pop()
        best.append(point)
    return best


def head(axes: Any, title: str, subtitle: str) -> None:
    """Title of a picture and, in smaller type, lines below it."""
    lines = subtitle.count("\n") + 1
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=8 + 14 * lines)
    small = {"fontsize": 8.5, "color": "#555555", "linespacing": 1.4, "in_layout": False}
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, **small)


def tradeoff(
    points: Sequence[Point],
    path: Path,
    *,
    title: str,
    subtitle: str,
    time_label: str,
    held_label: str = "held for backward, KiB per token and layer (log scale)",
) -> None:
    """Draws the points and their frontier into a PNG.

    Args:
        points: at least one.
        path: of the picture.
        title: what it shows.
        subtitle: the set-up, in smaller type.
        time_label: of the vertical axis.
        held_label: of the horizontal one.

    Raises:
        ModuleNotFoundError: without matplotlib, with the line that installs it.
        OSError: if the file cannot be written.
    """
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    ticker = require("matplotlib.ticker")

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    lines = []
    for name, (colour, marker, joined) in FAMILIES.items():
        members = sorted((p for p in points if p.family == name), key=lambda p: p.held)
        if not members:
            continue
        lines += axes.plot(
            [point.held for point in members],
            [point.time for point in members],
            color=colour,
            marker=marker,
            markersize=7,
            linewidth=1.2 if joined else 0,
            linestyle="-" if name == "backfuse" else ":",
            label=name,
            zorder=3 if name == "backfuse" else 2,
        )
    best = frontier(points)
    if len(best) > 1:
        axes.step(
            [point.held for point in best], [point.time for point in best], where="post",
            color="#bbbbbb", linewidth=5, alpha=0.5, zorder=1, label="frontier",
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12, y=0.16)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel(held_label)
    axes.set_ylabel(time_label)
    head(axes, title, subtitle)
    axes.legend(frameon=False, fontsize=9)
    told = [(p.label, p.held, p.time, FAMILIES[p.family][0]) for p in points]
    label_points(figure, axes, told, lines)
    figure.savefig(path)
    pyplot.close(figure)


def label_points(
    figure: Any,
    axes: Any,
    points: Sequence[tuple[str, float, float, str]],
    lines: Sequence[Any],
) -> None:
    """Writes each point's label where it covers no marker and no label, and hardly a line.

    Args:
        figure: with its layout and legend as they will be.
        axes: of the points.
        points: label, both coordinates, colour.
        lines: of matplotlib's, to be left free where that is possible.
    """
    transforms = require("matplotlib.transforms")
    figure.canvas.draw()
    pixels = figure.dpi / 72
    markers = [axes.transData.transform((x, y)) for _, x, y, _ in points]
    half = 5 * pixels
    taken = [transforms.Bbox([[x - half, y - half], [x + half, y + half]]) for x, y in markers]
    if axes.get_legend() is not None:
        taken.append(axes.get_legend().get_window_extent())
    paths = [axes.transData.transform_path(line.get_path()) for line in lines]
    frame = axes.get_window_extent()
    # In points of type, the nearest places first.
    places = [
        (dx * reach, dy * reach)
        for reach in (1, 1.7, 2.5, 3.4, 5, 7)
        for dx, dy in ((0, 8), (0, -8), (8, 5), (-8, 5), (8, -5), (-8, -5), (9, 0), (-9, 0))
    ]
    for told, x, y, colour in points:
        text = axes.annotate(
            told, (x, y), textcoords="offset points", xytext=(0, 0), fontsize=9, color=colour,
            zorder=4,
        )  # fmt: skip

        def put(dx: float, dy: float, text: Any = text) -> Any:
            text.set_position((dx, dy))
            text.set_ha("center" if dx == 0 else "left" if dx > 0 else "right")
            text.set_va("center" if dx else "bottom" if dy > 0 else "top")
            return text.get_window_extent().padded(pixels)

        def badness(place: tuple[float, float]) -> tuple[int, int]:
            box = put(*place)
            outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
            covers = len(taken) * outside + sum(box.overlaps(other) for other in taken)
            return covers, sum(path.intersects_bbox(box, filled=False) for path in paths)

        dx, dy = min(places, key=badness)
        taken.append(put(dx, dy))
        if math.hypot(dx, dy) > 15:  # too far off to be told whose it is
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkB": 4}
            axes.annotate(
                "", (x, y), textcoords="offset points", xytext=(dx, dy), arrowprops=line
            )
