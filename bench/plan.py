"""`backfuse plan`: a plan as a table, and its place among others in a picture."""

from __future__ import annotations

import json as json_module
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from backfuse import BlockSpec, ModelSpec, Plan, plan
from backfuse.blocks.planner.byte_sizes import format_bytes
from backfuse.blocks.planner.optimal import BudgetError
from backfuse.blocks.planner.schedules import recursive, sqrt, uniform
from backfuse.blocks.planner.search import FULL
from backfuse.blocks.stack import Segments

from .frontier import Setting, draw
from .options import DTYPES, choose, default_device, require
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


def from_config(path: Path) -> tuple[list[BlockSpec], dict[str, Any]]:
    """The blocks of a Hugging Face configuration, and what surrounds them.

    Args:
        path: of a `config.json`; nothing is downloaded.

    Returns:
        A spec a layer, and `vocab_size` and `tied` where the file says them.

    Raises:
        ModuleNotFoundError: without transformers, with the line that installs it.
        OSError: if the file cannot be read.
        ValueError: for one that is no configuration, or of a family that a block cannot represent.
    """
    transformers = require("transformers")
    try:
        content = json_module.loads(path.read_text("utf-8"))
        config = transformers.AutoConfig.for_model(**content).get_text_config()
    except (TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{path} is no Hugging Face configuration: {reason}") from error
    specs = [BlockSpec.from_config(config, index) for index in range(config.num_hidden_layers)]
    found = {"vocab_size": config.vocab_size, "tied": bool(config.tie_word_embeddings)}
    return specs, found


def _model(found: dict[str, Any], **given: Any) -> ModelSpec | None:
    """What surrounds the layers, as far as flags and configuration say; None without a vocabulary.

    Raises:
        ValueError: for other flags where nobody says the vocabulary.
    """
    said = found | {name: value for name, value in given.items() if value is not None}
    if "vocab_size" in said:
        return ModelSpec(**said)
    if said:
        raise ValueError(
            f"{', '.join(said)} is given without a vocab_size, expected --vocab-size or a --config"
        )
    return None


def steps(made: Plan) -> str:
    """The whole step in a line: bytes at its events, of the layers' passes the highest."""
    highest: dict[str, int] = {}
    for event in made.timeline():
        highest[event.name] = max(event.bytes, highest.get(event.name, 0))
    parts = (f"{name} {format_bytes(size)}" for name, size in highest.items())
    return f"Bytes of a step: {', '.join(parts)}."


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


def _points(made: Plan) -> dict[str, tuple[float, float, str]]:
    """The plan and the strategies, for a picture: see `draw`.

    What has no choice (`sqrt`, `recursive`, `uniform` of 2 and 4 layers) is shown whatever the
    budgets, the other strategies under those of the plan.
    """
    plans = {}
    free = replace(made, budget=None, peak_budget=None, host_budget=None)
    if len(made.kinds) == 1:
        layers = made.num_layers
        schedules: dict[str, Sequence[Segments]] = {
            "uniform 2": uniform(layers, 2), "uniform 4": uniform(layers, 4),
            "sqrt": sqrt(layers), "recursive": recursive(layers),
        }  # fmt: skip
        for name, parts in schedules.items():
            plans[name] = replace(free, policies=(FULL,) * layers, segments=tuple(parts))
    limits = {name: getattr(made, name) for name in ("budget", "peak_budget", "host_budget")}
    for name in ("chain", "selective"):
        try:
            start = replace(free, allow=("recompute",), strategy=name)
            plans[f"strategy {name}"] = start.within(**limits)
        except ValueError:  # beyond its means
            continue
    per = made.num_layers * made.batch_size * made.seq_len * 1024
    points = {n: (one.kept_bytes / per, one.overhead, "a strategy") for n, one in plans.items()}
    return points | {"this plan": (made.kept_bytes / per, made.overhead, "this plan")}


def run(
    *,
    shape: str | None,
    layers: int | None,
    config: Path | None,
    vocab_size: int | None,
    tied: bool,
    optimizer: str | None,
    world_size: int | None,
    in_flight: int | None,
    loss_tokens: int | None,
    seq_len: int,
    batch_size: int,
    device: str | None,
    profile: bool,
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
        layers: how many; None: as many as the configuration says.
        config: a Hugging Face configuration, instead of a shape; None: none.
        vocab_size: see `ModelSpec`, and so the five after it; peaks are then those of
            a whole step.
        tied: see vocab_size.
        optimizer: see vocab_size.
        world_size: see vocab_size.
        in_flight: see vocab_size.
        loss_tokens: see vocab_size.
        seq_len: tokens a sequence.
        batch_size: sequences.
        device: its name; None: this machine's, with `profile`.
        profile: see `plan`.
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
    on_cpu = default_device() == "cpu" if device is None else device == "cpu"
    name = dtype or ("fp32" if on_cpu else "bf16")
    choose("dtype", name, DTYPES)
    found: dict[str, Any] = {}
    if config is not None:
        if shape is not None or any(size is not None for size in sizes.values()):
            raise ValueError("config is given with a shape or sizes, expected one of them")
        specs, found = from_config(config)
        specs = specs if layers is None else [specs[i % len(specs)] for i in range(layers)]
    elif layers is None:
        raise ValueError("layers is None, expected --layers, or a --config that says it")
    else:
        specs = [_spec(shape, sizes)] * layers
    model = _model(
        found, vocab_size=vocab_size, tied=tied or None, optimizer=optimizer, world_size=world_size,
        in_flight=in_flight, loss_tokens=loss_tokens,
    )  # fmt: skip
    made = plan(
        specs, model=model, batch_size=batch_size, seq_len=seq_len, budget=budget,
        peak_budget=peak_budget, host_budget=host_budget, strategy=strategy, allow=allow,
        device=device, profile=profile, dtype=DTYPES[name],
    )  # fmt: skip
    print(f"{table(made)}\n\n{made.explain()}")
    print("\n".join(scaled(made)))
    if model is not None:
        print(steps(made))
    if json:
        made.save(json)
        print(f"wrote {json}")
    if plot:
        title = shape or (f"hidden {specs[0].hidden_size}" if config is None else config.stem)
        setting = Setting(title, seq_len, made.device, specs[0], batch_size, made.dtype)
        draw([setting], plot, setting.rivals() | _points(made), made.timeline() if model else None)
        print(f"wrote {plot}")
    return 0
