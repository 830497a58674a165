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
from backfuse.blocks.policy import NAMED_POLICIES

from .options import require
from .shapes import SHAPES

#: Curve -> the actions beside `keep` that it may use, and its colour.
CURVES = {
    "recompute": (("recompute",), "#3b6ea5"),
    "recompute and offload": (("recompute", "offload"), "#c8323c"),
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


def draw(
    settings: Sequence[Setting],
    path: Path,
    points: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draws a panel for each setting, side by side, into a PNG.

    Args:
        settings: what of.
        path: the file.
        points: label -> KiB per token and layer, and extra time, of plans to show as well.

    Raises:
        ModuleNotFoundError: without matplotlib, with the line that installs it.
        OSError: if the file cannot be written.
    """
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, panels = pyplot.subplots(
        1, len(settings), figsize=(5.2 * len(settings), 4.4), dpi=150, layout="constrained",
        squeeze=False, sharey=True,
    )  # fmt: skip
    for axes, setting in zip(panels[0], settings, strict=True):
        _panel(axes, setting)
        for name, (kib, extra) in (points or {}).items():
            axes.plot(kib, 100 * extra, "D", color="#5b8c3a", markersize=5, zorder=3)
            axes.annotate(
                name, (kib, 100 * extra), textcoords="offset points", xytext=(7, 3), fontsize=9,
            )  # fmt: skip
    panels[0][0].set_ylabel("extra time of a step, %")
    panels[0][-1].legend(frameon=False, fontsize=9, loc="upper right")
    lines = "Held on the device against time:", "a model, nothing here was measured"
    figure.suptitle(
        ("\n" if len(settings) == 1 else " ").join(lines),
        x=0.01, ha="left", fontsize=12, fontweight="bold",
    )  # fmt: skip
    figure.savefig(path)
    pyplot.close(figure)


def _panel(axes: Any, setting: Setting) -> None:
    top = setting.policy("keep")[0]
    for label, (allow, colour) in CURVES.items():
        choices = setting.choices(allow)
        points = []
        for step in range(201):
            kib = top * step / 200
            mix = setting.mix(choices, kib)
            if mix is not None:
                points.append((kib, 100 * mix.overhead))
        axes.plot(*zip(*points, strict=True), color=colour, linewidth=1.8, label=label)
    for name in NAMED_POLICIES:
        kib, extra = setting.policy(name)
        axes.plot(kib, 100 * extra, "o", color="#333333", markersize=5, zorder=3)
        place, side = {"offload": ((5, -12), "left"), "keep": ((0, -14), "right")}.get(
            name, ((7, 3), "left")
        )
        axes.annotate(
            name, (kib, 100 * extra), textcoords="offset points", xytext=place, ha=side, fontsize=9,
        )  # fmt: skip
    device = setting.device if isinstance(setting.device, str) else setting.device.name
    axes.set_title(f"{setting.title}, one layer on {device}", loc="left", fontsize=10)
    axes.set_xlabel("KiB per token and layer on the device")
    axes.margins(x=0.06, y=0.1)
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
