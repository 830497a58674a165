"""`backfuse bench plans`: steps of a stack under its plans, against other ways to meet the budget.

At each of some budgets of kept bytes: the `optimal` plan, the other strategies of `plan`, and
`torch.utils.checkpoint` (its defaults) around every k-th layer of plain PyTorch, with the largest k
that is within the budget; `compile-B` too where it is asked for, the compiler's
`activation_memory_budget`. Bytes are measured, all from one run: a step counts only where what it
keeps is within the budget.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from backfuse import BlockSpec, BlockStack, Plan, plan, rope_cos_sin
from backfuse import apply as apply_plan
from backfuse.blocks.planner.byte_sizes import format_bytes
from backfuse.blocks.planner.optimal import BudgetError

from .measure import Spread, held_bytes, interleaved, kept_bytes_measured, seconds
from .options import check_positive, choose, progress_bar, require, writable_folder
from .plain import PlainBlock, PlainStack
from .shapes import ALL_SHAPES
from .ways import BUDGETS, checkpointed, eager, make_way

#: Strategies that are held against `optimal`.
STRATEGIES = ("optimal", "uniform", "sqrt", "recursive", "chain", "selective")

#: Those that choose layer by layer and tensor by tensor: no rivals of `optimal`.
OURS = ("optimal", "chain", "selective")

Call = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Contender:
    """A way to run a stack.

    Attributes:
        name: for tables.
        call: the forward pass.
        kept_bytes: what it keeps for backward, measured.
    """

    name: str
    call: Call
    kept_bytes: int


def _every(stack: PlainStack, k: int, angles: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    """Every k-th layer checkpointed, the first among them; 0: none."""
    for index, layer in enumerate(stack.layers):
        way = checkpointed if k and index % k == 0 else eager
        x = way(layer)(x, position_embeddings=angles)
    return x


def _planned(stack: BlockStack, made: Plan, angles: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    apply_plan(stack, made)
    return stack(x, position_embeddings=angles)


def _contender(name: str, call: Call, x: Tensor) -> Contender:
    return Contender(name, call, kept_bytes_measured(call, x))


class _Setting:
    """Stacks of one shape, and all that is held against each other on them."""

    def __init__(self, spec: BlockSpec, layers: int, seq_len: int, compiled: bool) -> None:
        self.spec, self.num_layers, self.seq_len = spec, layers, seq_len
        torch.manual_seed(0)
        self.stack = BlockStack(spec, layers)
        self.plain = PlainStack([PlainBlock(spec) for _ in range(layers)])
        self.x = torch.randn(1, seq_len, spec.hidden_size, requires_grad=True)
        self.angles = rope_cos_sin(torch.arange(seq_len)[None], spec.rotary_dim)
        everys = [0, *range(layers, 0, -1)]
        self.rivals = [
            _contender(
                "eager" if k == 0 else f"checkpoint every {k}" if k > 1 else "checkpoint",
                functools.partial(_every, self.plain, k, self.angles), self.x,
            )
            for k in everys
        ]  # fmt: skip
        for share in BUDGETS if compiled else ():
            way = make_way(f"compile-{share}")
            layers_ = PlainStack(self.plain.layers, way)
            call = functools.partial(layers_, position_embeddings=self.angles)
            call(self.x)  # compiles
            kept = held_bytes(call, self.x)  # what is compiled only the allocator sees
            self.rivals.append(Contender(f"compile-{share}", call, kept))

    def plans(self, budget: int | None) -> Iterator[Contender]:
        """Of each strategy that meets the budget, the plan."""
        for strategy in STRATEGIES:
            try:
                made = plan(
                    self.spec, num_layers=self.num_layers, batch_size=1, seq_len=self.seq_len,
                    budget=budget, strategy=strategy, device="cpu", dtype=torch.float32,
                    allow=("recompute",),
                )  # fmt: skip
            except BudgetError:
                continue
            call = functools.partial(_planned, self.stack, made, self.angles)
            yield _contender(strategy, call, self.x)

    def within(self, budget: int) -> list[Contender]:
        """What meets the budget; of a family of rivals the one that keeps the most."""
        found = list(self.plans(budget))
        for family in ("eager", "checkpoint", "compile"):
            fits = [
                one for one in self.rivals
                if one.name.startswith(family) and one.kept_bytes <= budget
            ]  # fmt: skip
            if fits:
                found.append(max(fits, key=lambda one: one.kept_bytes))
        return [one for one in found if one.kept_bytes <= budget]

    def step(self, contender: Contender) -> None:
        """Forward and backward."""
        y = contender.call(self.x)
        y.backward(torch.ones_like(y))
        for module in (self.stack, self.plain):
            module.zero_grad(set_to_none=True)
        self.x.grad = None


def measure(
    spec: BlockSpec, *, layers: int, seq_len: int, budgets: int, rounds: int, compiled: bool
) -> pd.DataFrame:
    """A row for each budget and contender.

    Args:
        spec: each layer.
        layers: how many.
        seq_len: tokens of one sequence.
        budgets: how many, evenly from the least that the policy `full` meets to all.
        rounds: steps of each contender, interleaved; one more is not timed.
        compiled: whether to compile as well.
    """
    setting = _Setting(spec, layers, seq_len, compiled)
    sizes: dict[str, Any] = {
        "num_layers": layers,
        "batch_size": 1,
        "seq_len": seq_len,
        "device": "cpu",
    }
    low, high = (
        plan(
            spec, strategy="manual", policies=[policy] * layers, dtype=torch.float32, **sizes
        ).kept_bytes
        for policy in ("full", "keep")
    )  # fmt: skip
    rows = []
    for index in progress_bar(iterable=range(budgets), desc="budgets"):
        budget = low + (high - low) * index // max(1, budgets - 1)
        found = {one.name: one for one in setting.within(budget)}
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn, name in interleaved(list(found), rounds + 1):
            took = seconds(functools.partial(setting.step, found[name]))
            if turn:
                times[name].append(took)
        for name, one in found.items():
            spread = Spread.of([1e3 * value for value in times[name]])
            rows.append({
                "budget": budget, "contender": name, "kept_bytes": one.kept_bytes,
                "ms": spread.median, "ms_p20": spread.p20, "ms_p80": spread.p80,
            })  # fmt: skip
    return pd.DataFrame(rows)


def draw(rows: pd.DataFrame, path: Path, title: str) -> None:
    """Step times against budgets, a line a contender, into a PNG."""
    require("matplotlib").use("Agg")
    pyplot = require("matplotlib.pyplot")
    figure, axes = pyplot.subplots(figsize=(8, 5), dpi=150, layout="constrained")
    colors = ["#0072b2", "#e69f00", "#009e73", "#56b4e9", "#cc79a7", "#777777", "#000000"]
    axes.set_prop_cycle(color=colors)
    families = rows["contender"].str.replace(r"( every .*|-[0-9.]+)$", "", regex=True)
    for family, own in rows.groupby(families, sort=False):
        first = family == "optimal"
        axes.errorbar(
            own["budget"] / 2**20, own["ms"],
            [own["ms"] - own["ms_p20"], own["ms_p80"] - own["ms"]],
            marker="o", markersize=4, linewidth=2.4 if first else 1.2, label=family, capsize=2,
            color="#c8323c" if first else None, zorder=3 if first else 2,
        )  # fmt: skip
    axes.set_xlabel("MiB that may be kept")
    axes.set_ylabel("ms of forward and backward")
    axes.set_title(title, loc="left", fontsize=11, fontweight="bold")
    axes.grid(color="#e4e4e4", linewidth=0.7)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    figure.savefig(path)
    pyplot.close(figure)


def run(
    *,
    shape: str = "small-512",
    layers: int = 8,
    seq_len: int = 1024,
    budgets: int = 8,
    rounds: int = 7,
    compiled: bool = False,
    out: Path | None = None,
) -> int:
    """The command: measures on the CPU, prints, and writes `plans.csv` and `plans.png`.

    Args:
        shape: a name of `ALL_SHAPES`.
        layers: see `measure`, and so seq_len, budgets, rounds and compiled.
        seq_len: see layers.
        budgets: see layers.
        rounds: see layers.
        compiled: see layers.
        out: a folder for the files; None: none are written.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for an unknown shape and numbers below 1.
        OSError: if the folder cannot be written.
    """
    choose("shape", shape, ALL_SHAPES)
    for name, value in (
        ("layers", layers), ("seq_len", seq_len), ("budgets", budgets), ("rounds", rounds)
    ):  # fmt: skip
        check_positive(name, value)
    if out is not None:
        writable_folder(out)
    rows = measure(
        ALL_SHAPES[shape], layers=layers, seq_len=seq_len, budgets=budgets, rounds=rounds,
        compiled=compiled,
    )  # fmt: skip
    shown = rows.assign(
        budget=rows["budget"].map(format_bytes), kept_bytes=rows["kept_bytes"].map(format_bytes)
    )
    print(shown.to_string(index=False, float_format="{:.1f}".format))
    for budget, own in rows.groupby("budget"):
        ours = own[own["contender"] == "optimal"]["ms"]
        others = own[~own["contender"].isin(OURS)].sort_values("ms")
        if len(ours) and len(others):
            best = others.iloc[0]
            ratio = ours.iloc[0] / best["ms"]
            print(f"{format_bytes(budget)}: optimal takes {ratio:.3f} of {best['contender']}")
    if out is not None:
        rows.to_csv(out / "plans.csv", index=False)
        title = f"{layers} layers of {shape}, {seq_len:,} tokens, fp32 on a CPU"
        draw(rows, out / "plans.png", title)
        print(f"wrote {out / 'plans.csv'} and {out / 'plans.png'}")
    return 0
