"""`backfuse bench long`: how device memory of a stack grows with the sequence, and with its layers.

Bytes of a step (the most above weights and inputs; what is kept for backward) at several numbers
of tokens T and of layers L, and by least squares

    bytes = a + b L + c T + d T L

`d` is what each layer adds for a token, `c` what a token takes once, in the layer that is at work:
attention's operands, and what of the rest is not cut into tiles. Nothing is timed.

What goes to the host memory of a GPU goes to files here on a CPU, so that device memory is what
the allocator sees; `save_on_cpu`, which on a CPU moves nothing, is then the same hooks with files.
The others' tiled MLPs stand in layers that are checkpointed, their inputs on the host: what their
documentation recommends for long sequences.
"""

from __future__ import annotations

import gc
import importlib
import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from backfuse.blocks.call import CHUNK_SIZE

from . import away, operations, own, peers
from .measure import MIB
from .options import (
    DTYPES,
    check_device,
    check_positive,
    choose,
    default_device,
    parse_tokens,
    progress_bar,
    require,
)
from .own import own_name
from .pictures import describe, name_of, plot_slopes
from .problem import Case, Contender, Problem, Step, plain
from .registry import Provider
from .rows import Row, Table, device_name, empty_row, key_of, read
from .run import Outputs, first_line
from .shapes import ALL_SHAPES
from .ways import checkpointed

POLICIES = ("full", "lean", "offload")

#: An MLP and hidden states `[B, T, h]` -> its output.
CallMLP = Callable[[nn.Module, Tensor], Tensor]


class _CalledMLP(nn.Module):
    """An MLP that is called in somebody's way."""

    def __init__(self, mlp: nn.Module, call: CallMLP) -> None:
        super().__init__()
        self.mlp, self.call = mlp, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.mlp, x)


def _by_checkpoints(mlp: nn.Module, x: Tensor) -> Tensor:
    """PyTorch alone: each tile is checkpointed; tiles are as long as our chunks."""
    tiles = x.split(CHUNK_SIZE[x.device.type], dim=1)
    return torch.cat([checkpointed(mlp)(tile) for tile in tiles], dim=1)


def _by_deepspeed(mlp: nn.Module, x: Tensor) -> Tensor:
    """DeepSpeed's function, with as many tiles as its documentation has."""
    module = importlib.import_module("deepspeed.runtime.sequence_parallel.ulysses_sp")
    tiles = math.ceil(x.shape[1] / x.shape[2])
    weights = list(mlp.parameters())  # of 0.19 it makes a list, though it says None will do
    out: Tensor = module.TiledMLP.apply(lambda mlp, tile: mlp(tile), mlp, x, tiles, weights)
    return out


def _in_their_way(call: CallMLP, case: Case, mlp: nn.Module) -> nn.Module:
    return _CalledMLP(mlp, call)


def _ligers(case: Case, mlp: nn.Module) -> nn.Module:
    return peers.liger_module(mlp, case.spec, "LigerTiledSwiGLUMLP")


def _checkpoint(problem: Problem, policy: str) -> Contender:
    return plain(problem, checkpointed, "checkpoint")


def providers(directory: Path | None) -> dict[str, Provider]:
    """Who takes part, by name.

    Args:
        directory: of files that stand for host memory; None for host memory.
    """

    def on_cpu(name: str, mlp: Any = None, **needs: Any) -> Provider:
        make = partial(away.on_cpu, name=name, directory=directory, mlp=mlp)
        return Provider(make, keeps_all=False, **needs)

    liger = {"package": "liger-kernel", "module": "liger_kernel"}
    deepspeed = {"package": "deepspeed", "module": "deepspeed"}
    return {
        "checkpoint": Provider(_checkpoint, keeps_all=False),
        "checkpoint-on-cpu": on_cpu("checkpoint-on-cpu"),
        "checkpoint-on-cpu-tiled": on_cpu(
            "checkpoint-on-cpu-tiled", partial(_in_their_way, _by_checkpoints)
        ),
        "liger-tiled": on_cpu(
            "liger-tiled", _ligers, obstacle=peers.needs_llama_ffn, **liger
        ),
        "deepspeed-tiled": on_cpu(
            "deepspeed-tiled", partial(_in_their_way, _by_deepspeed), **deepspeed
        ),
        "backfuse": Provider(
            partial(own.stack, offload_dir=directory), POLICIES, keeps_all=False
        ),
    }  # fmt: skip


def slopes(rows: pd.DataFrame) -> pd.DataFrame:
    """`c` and `d` of each contender, of its peak and of what it keeps.

    Args:
        rows: with `provider`, `policy`, `tokens`, `layers`, `peak_bytes` and `kept_bytes`; of each
            contender at least two numbers of tokens at each of at least two numbers of layers.

    Returns:
        A row a contender: `provider`, `policy`, `once` and `per_layer` of the peak, bytes per
        token; `kept_per_layer`.
    """
    found = []
    for (provider, policy), one in rows.groupby(["provider", "policy"], sort=False):
        depths = one.groupby("tokens")["layers"].transform("nunique")
        one = one[depths == depths.max()]  # a number of tokens at one depth would bend the rest
        tokens = one["tokens"].to_numpy(float)
        layers = one["layers"].to_numpy(float)
        terms = np.stack([np.ones_like(tokens), layers, tokens, tokens * layers], axis=1)
        if np.linalg.matrix_rank(terms) < terms.shape[1]:  # some of its runs have failed
            continue
        sizes = one[["peak_bytes", "kept_bytes"]].to_numpy(float)
        fitted: Any = np.linalg.lstsq(terms, sizes, rcond=None)[0]
        _, _, once, per_layer = fitted.round(3) + 0.0  # which makes of -0 a 0
        found.append({
            "provider": provider, "policy": policy, "once": once[0], "per_layer": per_layer[0],
            "kept_per_layer": per_layer[1],
        })  # fmt: skip
    names = ["provider", "policy", "once", "per_layer", "kept_per_layer"]
    return pd.DataFrame(found, columns=names)


def of_one_depth(rows: pd.DataFrame) -> pd.DataFrame:
    """Those of the stacks that were measured most often, of several depths the deepest."""
    counts = rows["layers"].value_counts().sort_index()
    return rows[rows["layers"] == counts[counts == counts.max()].index[-1]]


def text(rows: pd.DataFrame) -> str:
    """The rows for people: peaks of the stacks of one depth, and slopes."""
    shown = of_one_depth(rows)
    lines = []
    for _, one in slopes(rows).iterrows():
        own = (shown["provider"] == one["provider"]) & (shown["policy"] == one["policy"])
        peaks = {
            f"{row['tokens'] / 1024:g}k": f"{row['peak_bytes'] / MIB:,.1f}"
            for _, row in shown[own].sort_values("tokens").iterrows()
        }
        numbers = {
            "B/token, layer": one["per_layer"], "B/token, once": one["once"],
            "kept B/token, layer": one["kept_per_layer"],
        }  # fmt: skip
        lines.append({
            "": name_of(one), **peaks, **{name: f"{v:,.1f}" for name, v in numbers.items()}
        })  # fmt: skip
    if not lines:
        return "too little was measured for a slope"
    head = f"peak of {shown['layers'].iloc[0]} layers in MiB, by tokens; slopes of the peak"
    return f"{head}\n{pd.DataFrame(lines).fillna('').to_string(index=False)}"


class _Long:
    """Measures cases and fills a table."""

    def __init__(self, table: Table, who: dict[str, Provider]) -> None:
        self.table, self.who = table, who
        self.asked: set[tuple[str, ...]] = set()
        self.failed = False

    def missing(self, case: Case) -> None:
        """Says who cannot run, and leaves them out."""
        for name, provider in list(self.who.items()):
            reason = provider.missing(case)
            if reason:
                print(f"  {name} left out: {reason}", flush=True)
                del self.who[name]

    def measure(self, case: Case, bar: Any) -> None:
        """One case, as far as the table does not have it."""
        todo: list[tuple[Provider, Row]] = []
        for name, provider in self.who.items():
            shown = own_name(case) if name == "backfuse" else name
            for policy in provider.policies:
                row = empty_row(case, shown, policy, "ok", "")
                self.asked.add(key_of(row))
                if self.table.has(row):
                    bar.update()
                else:
                    todo.append((provider, row))
        if not todo:
            return
        torch.manual_seed(case.seed)
        step = Step(operations.stack(case))
        for provider, row in todo:
            bar.set_description(f"{case.tokens} tokens, {case.layers} layers, {name_of(row)}")
            self.table.add(row | self._bytes(step, provider, row))
            gc.collect()
            bar.update()

    def _bytes(self, step: Step, provider: Provider, row: Row) -> Row:
        try:
            contender = provider.make(step.problem, row["policy"])
            step.examine(contender, None)
        except Exception as error:  # any peer
            note = first_line(error)
            memory = isinstance(error, torch.OutOfMemoryError)
            print(f"  {name_of(row)} failed at {row['tokens']} tokens: {note}", flush=True)
            self.failed |= row["provider"].startswith("backfuse") and not memory
            return {"status": "skipped" if memory else "failed", "note": note}
        sizes = {"kept_bytes": contender.kept_bytes, "peak_bytes": contender.peak_bytes}
        return {**sizes, "note": contender.note}


def _several(name: str, values: Sequence[int]) -> None:
    for value in values:
        check_positive(name, value)
    if len(set(values)) < 2:
        shown = ", ".join(map(str, values))
        raise ValueError(f"{name} is {shown}, expected two different numbers: slopes are asked for")


def run(
    *,
    shape: str | None = None,
    tokens: str | None = None,
    layers: tuple[int, ...] = (4, 5),
    dtype: str | None = None,
    provider: tuple[str, ...] | None = None,
    device: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    csv: Path | None = None,
    plot: Path | None = None,
) -> int:
    """The command: measures, prints, writes.

    Args:
        shape: a name of `ALL_SHAPES`; None: llama-3.2-1b on a GPU, small-64 on a CPU.
        tokens: of one sequence, at least two numbers; None: 4k to 64k on a GPU, to 16k on a CPU.
        layers: at least two numbers. The last three calls before a backward pass never leave the
            device, so that fewer than four layers offload nothing.
        dtype: a name; None: bf16 on a GPU, fp32 on a CPU.
        provider: names of `providers`; None for all.
        device: `cpu` or `cuda`; None: the GPU if there is one.
        seed: of weights and inputs.
        threads: of PyTorch on a CPU; None for its own choice.
        csv: rows are appended there; what is there is not measured again.
        plot: of a picture.

    Returns:
        The exit code: 0; 1 if something of ours failed; 130 after Ctrl-C.

    Raises:
        OSError: if a file cannot be written.
        ValueError: for names that are not known, numbers below 1 or only one of them, or a CSV
            that is none of ours.
    """
    device = device or default_device()
    check_device(device)
    cuda = torch.device(device).type == "cuda"
    shape = shape or ("llama-3.2-1b" if cuda else "small-64")
    dtype = dtype or ("bf16" if cuda else "fp32")
    choose("shape", shape, ALL_SHAPES)
    choose("dtype", dtype, DTYPES)
    for name in provider or ():
        choose("provider", name, providers(None))
    lengths = parse_tokens(tokens or ("4k,8k,16k,32k,64k" if cuda else "4k,8k,16k"))
    _several("tokens", lengths)
    _several("layers", layers)
    Outputs(csv=csv, plot=plot).check(device)
    require("tqdm")
    if threads is not None:
        check_positive("threads", threads)
        torch.set_num_threads(threads)
    table = Table(csv)
    case = Case("long", shape, ALL_SHAPES[shape], 1, 1, 1, dtype, device, seed)
    print(device_name(device), f"torch {torch.__version__}", sep=", ")
    code = 0
    with tempfile.TemporaryDirectory(prefix="backfuse-long-") as folder:
        who = providers(None if cuda else Path(folder))
        long = _Long(table, {n: p for n, p in who.items() if provider is None or n in provider})
        long.missing(case)
        cases = [replace(case, layers=n, seq_len=t) for t in sorted(set(lengths)) for n in layers]
        total = len(cases) * sum(len(one.policies) for one in long.who.values())
        try:
            with progress_bar(total=total, unit="run") as bar:
                for one in cases:
                    long.measure(one, bar)
        except KeyboardInterrupt:
            print("interrupted: the table holds what was measured until then")
            code = 130
    rows = read([csv]) if csv and csv.exists() else pd.DataFrame(table.rows)
    if not rows.empty:
        rows = rows[[key_of(row) in long.asked for _, row in rows.iterrows()]]
        rows = rows.dropna(subset=["peak_bytes", "kept_bytes"])
    if rows.empty:
        print("nothing was measured")
        return code or int(long.failed)
    print(text(rows))
    if csv:
        print(f"wrote {csv}")
    if plot:
        shown = of_one_depth(rows)
        plot_slopes(shown, slopes(rows), plot, describe(shown.iloc[0], tokens=False))
        print(f"wrote {plot}")
    return code or int(long.failed)
