"""`backfuse plan`: a plan as a table, and its place among others in a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from backfuse import BlockSpec, Plan, plan
from backfuse.blocks.planner.byte_sizes import format_bytes
from backfuse.blocks.planner.optimal import BudgetError

from .frontier import Setting, draw
from .options import DTYPES, choose
from .shapes import ALL_SHAPES


def _spec(shape: str | None, sizes: dict[str, int | None]) -> BlockSpec:
    """The block of that name, or of these sizes.

    Raises:
        ValueError: for an unknown name, both, or neither.
    """
    given: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    if shape is not None and not given:
        choose("shape", shape, ALL_SHAPES)
        return ALL_SHAPES[shape]
    needed = ("hidden_size", "intermediate_size", "num_attention_heads")
    if shape is not None or any(name not in given for name in needed):
        raise ValueError(
            f"shape is {shape!r} with the sizes {', '.join(given) or 'none'}, expected either the "
            f"name of a shape or {', '.join(needed)}"
        )
    return BlockSpec(**given)


def table(made: Plan) -> str:
    """A row for each run of like layers."""
    frame = made.to_frame()
    layers = frame["first"].astype(str) + "-" + frame["last"].astype(str)
    shown = pd.DataFrame({"layers": layers})
    if frame["segment"].gt(1).any():
        shown["segment"] = frame["segment"]
    for name in ("x", "qkv", "attn_out", "mid", "preact"):
        shown[name] = frame[name]
    shown["kept"] = frame["kept_bytes"].map(format_bytes)
    shown["host"] = frame["host_bytes"].map(format_bytes)
    shown["ms"] = (1e3 * frame["seconds"]).map("{:,.1f}".format)
    return shown.to_string(index=False)


def scaled(made: Plan) -> list[str]:
    """What half and double the budget would cost; nothing without a budget."""
    name = "budget" if made.budget is not None else "peak_budget"
    budget = getattr(made, name)
    lines = []
    for limit in () if budget is None else (budget // 2, 2 * budget):
        try:
            said = f"{made.within(**{name: limit}).overhead:.2%} longer than with everything kept"
        except BudgetError as error:
            said = f"cannot be met: the least is {format_bytes(error.least)}"
        lines.append(f"{name} of {format_bytes(limit)}: {said}")
    return lines


def _points(made: Plan) -> dict[str, tuple[float, float]]:
    """The plan and the schedules -> KiB per token and layer, and extra time."""
    plans = {"this plan": made}
    if "recompute" in made.allow:
        for name in ("sqrt", "recursive"):
            free = plan(
                made.spec,
                num_layers=made.num_layers,
                strategy=name,
                allow=made.allow,
                **made.own_sizes,
            )
            plans[name] = free
    per = made.num_layers * made.batch_size * made.seq_len * 1024
    return {name: (one.kept_bytes / per, one.overhead) for name, one in plans.items()}


def run(
    *,
    shape: str | None,
    layers: int,
    seq_len: int,
    batch_size: int,
    device: str,
    dtype: str | None,
    budget: str | None,
    peak_budget: str | None,
    host_budget: str | None,
    strategy: str,
    allow: Sequence[str],
    json: Path | None,
    plot: Path | None,
    **sizes: int | None,
) -> int:
    """The command: prints the plan, what it would be under other budgets, and writes files.

    Args:
        shape: a name of `ALL_SHAPES`, or None.
        layers: how many.
        seq_len: tokens a sequence.
        batch_size: sequences.
        device: its name.
        dtype: a key of `DTYPES`; None: bf16, on a CPU fp32.
        budget: see `plan`; so `peak_budget`, `host_budget`, `strategy` and `allow`.
        peak_budget: see budget.
        host_budget: see budget.
        strategy: see budget.
        allow: see budget.
        json: where to save the plan; None: nowhere.
        plot: where to draw; None: nowhere.
        sizes: of a block without a name.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for what `plan` refuses, and unknown names.
        OSError: if a file cannot be written.
    """
    name = dtype or ("fp32" if device == "cpu" else "bf16")
    choose("dtype", name, DTYPES)
    spec = _spec(shape, sizes)
    made = plan(
        spec, num_layers=layers, batch_size=batch_size, seq_len=seq_len, budget=budget,
        peak_budget=peak_budget, host_budget=host_budget, strategy=strategy, allow=allow,
        device=device, dtype=DTYPES[name],
    )  # fmt: skip
    print(f"{table(made)}\n\n{made.explain()}")
    print("\n".join(scaled(made)))
    if json:
        made.save(json)
        print(f"wrote {json}")
    if plot:
        title = shape or f"hidden {spec.hidden_size}"
        setting = Setting(title, seq_len, made.device, spec, batch_size, made.dtype)
        draw([setting], plot, _points(made))
        print(f"wrote {plot}")
    return 0
