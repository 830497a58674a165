"""The picture of a trade: bytes held on one axis, time on the other, every point labelled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .options import require

#: Families of points, in the order of the legend: colour, marker, whether a line joins them.
FAMILIES: dict[str, tuple[str, str, bool]] = {
    "backfuse": ("#c8323c", "o", True),
    "torch.compile": ("#3b6ea5", "s", True),
    "torch.utils.checkpoint": ("#5a7d3a", "^", True),
    "plain PyTorch": ("#444444", "D", False),
}


@dataclass(frozen=True)
class Point:
    """One way to train.

    Attributes:
        name: of a provider, as in the table.
        held: KiB per token and layer.
        time: relative to plain.
    """

    name: str
    held: float
    time: float

    @property
    def family(self) -> str:
        """Which of `FAMILIES` the name belongs to."""
        if self.name.startswith("backfuse"):
            return "backfuse"
        if self.name.startswith("compile"):
            return "torch.compile"
        return "plain PyTorch" if self.name == "plain" else "torch.utils.checkpoint"

    @property
    def label(self) -> str:
        """The name without what the legend says already."""
        return self.name.removeprefix("backfuse ").replace("compile-", "budget ")


def tradeoff(
    points: Sequence[Point], path: Path, *, title: str, subtitle: str, time_label: str
) -> None:
    """Draws the points into a PNG.

    Args:
        points: at least one.
        path: of the picture.
        title: what it shows.
        subtitle: the set-up, in smaller type.
        time_label: of the vertical axis.

    Raises:
        ModuleNotFoundError: without matplotlib, with the line that installs it.
        OSError: if the file cannot be written.
    """
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    ticker = require("matplotlib.ticker")

    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    for family, (colour, marker, joined) in FAMILIES.items():
        members = sorted((p for p in points if p.family == family), key=lambda p: p.held)
        if members:
            axes.plot(
                [point.held for point in members],
                [point.time for point in members],
                color=colour,
                marker=marker,
                markersize=7,
                linewidth=1.2 if joined else 0,
                linestyle="-" if family == "backfuse" else ":",
                label=family,
                zorder=3 if family == "backfuse" else 2,
            )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.margins(x=0.12, y=0.16)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("held for backward, KiB per token and layer (log scale)")
    axes.set_ylabel(time_label)
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
    axes.set_title(subtitle, loc="left", fontsize=8.5, color="#555555")
    axes.legend(frameon=False, fontsize=9)
    _label(figure, axes, points)
    figure.savefig(path)
    pyplot.close(figure)


def _label(figure: Any, axes: Any, points: Sequence[Point]) -> None:
    """Writes each point's label where it covers neither a marker nor another label."""
    transforms = require("matplotlib.transforms")
    figure.canvas.draw()
    scale = figure.dpi / 72
    markers = [axes.transData.transform((point.held, point.time)) for point in points]
    taken = [transforms.Bbox.from_bounds(x - 7, y - 7, 14, 14) for x, y in markers]
    taken.append(axes.get_legend().get_window_extent())
    frame = axes.get_window_extent()
    # Points of type away from the marker, the nearest places first.
    places = [
        (dx * reach, dy * reach)
        for reach in (1, 1.6, 2.3, 3.1, 4)
        for dx, dy in ((0, 11), (0, -11), (9, 6), (-9, 6), (9, -6), (-9, -6), (11, 0), (-11, 0))
    ]
    for point in sorted(points, key=lambda point: (point.held, point.time)):
        for dx, dy in places:
            text = axes.annotate(
                point.label,
                (point.held, point.time),
                xytext=(dx, dy),
                textcoords="offset points",
                ha="center" if dx == 0 else "left" if dx > 0 else "right",
                va="center" if dy == 0 or dx else "bottom" if dy > 0 else "top",
                fontsize=9,
                color=FAMILIES[point.family][0],
                arrowprops=(
                    {"arrowstyle": "-", "color": "#b0b0b0", "linewidth": 0.6, "shrinkB": 4}
                    if max(abs(dx), abs(dy)) > 15
                    else None
                ),
            )
            box = text.get_window_extent().padded(1.5 * scale)
            inside = frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1)
            if inside and not any(box.overlaps(other) for other in taken):
                break
            if (dx, dy) != places[-1]:
                text.remove()
        taken.append(box)
