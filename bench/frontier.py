"""The frontier of memory against time, modelled: a curve for each set of actions, and a picture.

Each point is the linear bound of `planner/optimal.py`: fractions of layers, so that it holds for
any number of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from backfuse import BlockSpec
from backfuse.blocks.costs import block_costs
from backfuse.blocks.devices import Device
from backfuse.blocks.planner.choices import Choice, layer_choices
from backfuse.blocks.planner.optimal import BudgetError, Mix, optimal
from backfuse.blocks.planner.step import Event
from backfuse.blocks.policy import NAMED_POLICIES

from .options import require
from .plot import label_points
from .shapes import SHAPES

#: Curve -> the actions beside `keep` that it may use, and its colour.
CURVES = {
    "recompute": (("recompute",), "#3b6ea5"),
    "recompute and offload": (("recompute", "offload"), "#c8323c"),
}


#: What a point is -> its marker and colour; those behind cover those before.
MARKS = {
    "a policy in every layer": ("o", "#333333"),
    "torch.utils.checkpoint": ("^", "#009e73"),
    "a strategy": ("s", "#7a5195"),
    "this plan": ("D", "#d08700"),
}


@dataclass(frozen=True)
class Setting:
    """What a frontier is of.

    Attributes:
        shape: a key of `SHAPES`, or what to call `spec`.
        seq_len: tokens of a sequence.
        device: a key of `DEVICES`, or the device.
        spec: the block; None: the shape of that name.
        batch_size: sequences.
        dtype: of everything.
    """

    shape: str
    seq_len: int
    device: str | Device
    spec: BlockSpec | None = None
    batch_size: int = 1
    dtype: torch.dtype = torch.bfloat16

    @property
    def title(self) -> str:
        """How tables and pictures call it."""
        return f"{self.shape}, {self.tokens:,} tokens"

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.batch_size * self.seq_len

    @property
    def block(self) -> BlockSpec:
        """What each layer is."""
        return self.spec or SHAPES[self.shape]

    @property
    def _sizes(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size, "seq_len": self.seq_len, "device": self.device,
            "dtype": self.dtype,
        }  # fmt: skip

    def choices(self, allow: Sequence[str]) -> tuple[Choice, ...]:
        """What a layer can do."""
        return layer_choices(self.block, **self._sizes, allow=allow)

    def mix(self, choices: Sequence[Choice], kib: float) -> Mix | None:
        """The best mix that keeps so many KiB per token and layer; None if none does."""
        try:
            return optimal(choices, 1, budget=int(kib * 1024 * self.tokens), relaxed=True)
        except BudgetError:
            return None

    def policy(self, name: str) -> tuple[float, float]:
        """KiB per token and layer, and extra time as a fraction of the step, of a named policy."""
        costs, keep = (block_costs(self.block, policy, **self._sizes) for policy in (name, "keep"))
        waits = (max(0.0, costs.link - span) for span in
                 (costs.forward, costs.backward + costs.recompute))  # fmt: skip
        extra = (costs.step + sum(waits)) / keep.step - 1
        return costs.kept_bytes / self.tokens / 1024, extra

    def rivals(self) -> dict[str, tuple[float, float, str]]:
        """The same of `torch.utils.checkpoint` around each layer, or around every k layers.

        It replays the forward pass, but for what its early stop leaves out: the last down
        projection. Around several layers it keeps their first input alone, and while they are
        differentiated everything that they keep: that is no part of what is plotted.
        """
        keep = block_costs(self.block, "keep", **self._sizes)
        down = sum(
            part.seconds for part in keep.parts if (part.phase, part.name) == ("forward", "down")
        )
        x = keep.kept["x"] / self.tokens / 1024
        return {
            f"checkpoint{f' every {k}' if k > 1 else ''}": (
                x / k, (keep.forward - down / k) / keep.step, "torch.utils.checkpoint"
            )
            for k in (1, 2, 4)
        }  # fmt: skip


def draw(
    settings: Sequence[Setting],
    path: Path,
    points: Mapping[str, tuple[float, float, str]] | None = None,
    timeline: Sequence[Event] | None = None,
) -> None:
    """Draws a panel for each setting, side by side, into a PNG.

    Args:
        settings: what of.
        path: the file.
        points: label -> KiB per token and layer, extra time, and a key of `MARKS`, of what to show
            as well.
        timeline: a step's events, for one more panel.

    Raises:
        ModuleNotFoundError: without matplotlib, with the line that installs it.
        OSError: if the file cannot be written.
    """
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    count = len(settings) + (timeline is not None)
    figure, panels = pyplot.subplots(
        1, count, figsize=(6 * count, 5), dpi=150, layout="constrained", squeeze=False,
        sharey=timeline is None,
    )  # fmt: skip
    if timeline is not None:
        _step(panels[0][-1], timeline)
    drawn = [
        (axes, *_panel(axes, setting, points or {}))
        for axes, setting in zip(panels[0], settings, strict=False)
    ]
    panels[0][0].set_ylabel("extra time of a step, %")
    panels[0][len(settings) - 1].legend(frameon=False, fontsize=9, loc="upper right")
    lines = "Held on the device against time:", "a model, nothing here was measured"
    figure.suptitle(
        ("\n" if count == 1 else " ").join(lines),
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    for axes, told, curves in drawn:
        label_points(figure, axes, told, curves)
    figure.savefig(path)
    pyplot.close(figure)


def _panel(
    axes: Any, setting: Setting, points: Mapping[str, tuple[float, float, str]]
) -> tuple[list[tuple[str, float, float, str]], list[Any]]:
    """Draws curves and points; returns what `label_points` takes: points that coincide are one."""
    top = setting.policy("keep")[0]
    lines: list[Any] = []
    for label, (allow, colour) in CURVES.items():
        choices = setting.choices(allow)
        curve = []
        for step in range(201):
            kib = top * (step / 200) ** 2  # the closer together, the less is held
            mix = setting.mix(choices, kib)
            if mix is not None:
                curve.append((kib, 100 * mix.overhead))
        lines += axes.plot(*zip(*curve, strict=True), color=colour, linewidth=1.8, label=label)
    shown = {name: (*setting.policy(name), "a policy in every layer") for name in NAMED_POLICIES}
    shown |= points
    highest = max(extra for _, extra, _ in shown.values())
    told: dict[tuple[float, float], tuple[list[str], str]] = {}
    for mark, (marker, colour) in MARKS.items():
        own = {name: (kib, extra) for name, (kib, extra, m) in shown.items() if m == mark}
        for name, (kib, extra) in own.items():
            near = (
                place for place in told
                if abs(place[0] - kib) < 0.01 * top and abs(place[1] - extra) < 0.01 * highest
            )  # fmt: skip
            told.setdefault(next(near, (kib, extra)), ([], colour))[0].append(name)
        if own:
            axes.plot(
                *zip(*((kib, 100 * extra) for kib, extra in own.values()), strict=True), marker,
                color=colour, markersize=6, zorder=3, label=mark,
            )  # fmt: skip
    device = setting.device if isinstance(setting.device, str) else setting.device.name
    axes.set_title(f"{setting.title}, one layer on {device}", loc="left", fontsize=10)
    axes.set_xscale("symlog", base=2, linthresh=1)  # what is offloaded holds next to nothing
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("KiB per token and layer on the device (log scale from 1)")
    axes.margins(x=0.06, y=0.1)
    _plain(axes)
    labels = [(", ".join(names), x, 100 * y, colour) for (x, y), (names, colour) in told.items()]
    return labels, lines


def _step(axes: Any, events: Sequence[Event]) -> None:
    """Bytes against the events of a step."""
    gib = [event.bytes / 2**30 for event in events]
    axes.fill_between(range(len(gib)), gib, step="mid", color="#3b6ea5", alpha=0.25, linewidth=0)
    axes.step(range(len(gib)), gib, where="mid", color="#3b6ea5", linewidth=1.5)
    top = max(range(len(gib)), key=gib.__getitem__)
    axes.plot(top, gib[top], "o", color="#c8323c", markersize=5, zorder=3)
    axes.annotate(
        f"{gib[top]:,.2f} GiB", (top, gib[top]), textcoords="offset points", xytext=(0, 7),
        ha="right" if top > len(gib) / 2 else "left", fontsize=9,
    )  # fmt: skip
    names = [n for n in dict.fromkeys(event.name for event in events) if n != "embedding"]
    places = [[i for i, event in enumerate(events) if event.name == name] for name in names]
    axes.set_xticks([sum(own) / len(own) for own in places], names, fontsize=9)
    axes.set_title("Predicted bytes of a step", loc="left", fontsize=10)
    axes.set_ylabel("GiB on the device")
    axes.set_ylim(0, 1.12 * max(gib))
    axes.margins(x=0.02)
    _plain(axes)


def _plain(axes: Any) -> None:
    """Grid and two spines."""
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
