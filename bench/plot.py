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
    "Liger, QuACK": ("#8a5fa8", "v", False),
    "plain PyTorch": ("#444444", "D", False),
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
        name: of a provider, as in the table.
        held: KiB per token (and layer).
        time: relative to plain PyTorch.
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
        if self.name.startswith(("liger", "quack")):
            return "Liger, QuACK"
        return "plain PyTorch" if self.name in ("plain", "eager") else "torch.utils.checkpoint"

    @property
    def label(self) -> str:
        """The name without what the legend says already."""
        return LABELS.get(self.name) or self.name.removeprefix("backfuse ").replace(
            "compile-", "budget "
        )


def tradeoff(
    points: Sequence[Point],
    path: Path,
    *,
    title: str,
    subtitle: str,
    time_label: str,
    held_label: str = "held for backward, KiB per token and layer (log scale)",
) -> None:
    """Draws the points into a PNG.

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
    for family, (colour, marker, joined) in FAMILIES.items():
        members = sorted((p for p in points if p.family == family), key=lambda p: p.held)
        if not members:
            continue
        lines += axes.plot(
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
    axes.set_xlabel(held_label)
    axes.set_ylabel(time_label)
    axes.set_title(title, loc="left", fontsize=13, fontweight="bold", pad=22)
    axes.text(0, 1.02, subtitle, transform=axes.transAxes, fontsize=8.5, color="#555555")
    axes.legend(frameon=False, fontsize=9)
    _label(figure, axes, points, lines)
    figure.savefig(path)
    pyplot.close(figure)


def _label(figure: Any, axes: Any, points: Sequence[Point], lines: Sequence[Any]) -> None:
    """Writes each point's label where it covers no marker and no label, and hardly a line."""
    transforms = require("matplotlib.transforms")
    figure.canvas.draw()
    pixels = figure.dpi / 72
    markers = [axes.transData.transform((point.held, point.time)) for point in points]
    half = 5 * pixels
    taken = [transforms.Bbox([[x - half, y - half], [x + half, y + half]]) for x, y in markers]
    taken.append(axes.get_legend().get_window_extent())
    paths = [axes.transData.transform_path(line.get_path()) for line in lines]
    frame = axes.get_window_extent()
    # In points of type, the nearest places first.
    places = [
        (dx * reach, dy * reach)
        for reach in (1, 1.7, 2.5, 3.4)
        for dx, dy in ((0, 8), (0, -8), (8, 5), (-8, 5), (8, -5), (-8, -5), (9, 0), (-9, 0))
    ]
    for point in points:
        text = axes.annotate(
            point.label,
            (point.held, point.time),
            textcoords="offset points",
            xytext=(0, 0),
            fontsize=9,
            color=FAMILIES[point.family][0],
            zorder=4,
        )

        def put(dx: float, dy: float, text: Any = text) -> Any:
            text.set_position((dx, dy))
            text.set_ha("center" if dx == 0 else "left" if dx > 0 else "right")
            text.set_va("center" if dx else "bottom" if dy > 0 else "top")
            return text.get_window_extent().padded(pixels)

        def badness(place: tuple[float, float]) -> tuple[bool, int]:
            box = put(*place)
            outside = not (frame.contains(box.x0, box.y0) and frame.contains(box.x1, box.y1))
            covers = outside or any(box.overlaps(other) for other in taken)
            return covers, sum(path.intersects_bbox(box, filled=False) for path in paths)

        taken.append(put(*min(places, key=badness)))
