"""`backfuse bench ffn`: the FFN half against its rivals, the kernels against the library.

Two tables:

    half      forward and backward with all gradients: time, held bytes, peak, errors
    kernels   on a GPU: each kernel in each configuration against the library (`ffn_kernels.py`)

Rounds run in alternating order, ratios are taken within a round. Errors are relative norms against
a run of PyTorch's own operations in higher precision; what is too far away is marked WRONG.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from backfuse.kernels.dispatch import operations

from . import measure
from .ffn_results import Results, Setup, first_line
from .ffn_rivals import (
    WAYS,
    Contender,
    PlainHalf,
    Step,
    Way,
    missing,
    own_ways,
    rounding,
    use_kernels,
)
from .options import progress_bar, require, writable_folder


def build(setup: Setup, results: Results) -> dict[str, Way]:
    """The contenders that can run here, unbuilt; eager first. Notes go to `results`."""
    ways: dict[str, Way] = {}
    for name, way in WAYS.items():
        if name != "eager" and name not in setup.providers:
            continue
        reason = missing(name, setup.spec, setup.device)
        if reason:
            results.notes.append(f"{name} left out: {reason}")
        else:
            ways[name] = way
    if "backfuse" in setup.providers:
        kernels = use_kernels(setup.spec, setup.device, setup.torch_dtype)
        if not kernels:
            results.notes.append(
                "backfuse runs its reference here, which has one way to rebuild: no split and fused"
            )
        ways |= own_ways(kernels)
    return ways


def bench_half(results: Results) -> None:
    """Measures every contender; one that fails becomes a note."""
    setup = results.setup
    torch.manual_seed(setup.seed)
    half = PlainHalf(setup.spec, device=setup.device, dtype=setup.torch_dtype)
    results.flops = half.flops(setup.rows)
    step = Step(half, setup.rows, setup.spec.hidden_size, setup.device, setup.torch_dtype)
    ways = build(setup, results)
    with progress_bar(total=len(ways) * (setup.rounds + 1), unit="run") as bar:
        bar.set_description("exact gradients")
        exact = step.exact()
        for name, way in ways.items():
            bar.set_description(f"{name}: bytes")
            try:
                contender = way(half, setup.spec)
                step.examine(contender, exact)
            except Exception as error:  # any rival, any compiler
                _failed(results, name, error)
                bar.update(setup.rounds + 1)
                continue
            results.contenders.append(contender)
            _judge(results, contender)
            bar.update()
        exact.clear()
        named = {contender.name: contender for contender in results.contenders}
        for index, name in measure.interleaved(list(named), setup.rounds):
            bar.set_description(f"{name}: round {index + 1} of {setup.rounds}")
            if named[name].status != "failed":
                try:
                    step.time(named[name])
                except Exception as error:
                    named[name].status = "failed"
                    _failed(results, name, error)
            bar.update()


def _failed(results: Results, name: str, error: Exception) -> None:
    results.notes.append(f"{name} failed: {first_line(error)}")
    results.failed |= name.startswith("backfuse")


def _judge(results: Results, contender: Contender) -> None:
    """Marks a contender that is further from the exact run than rounding explains."""
    setup, eager = results.setup, results.contender("eager")
    terms = max(setup.rows, setup.spec.hidden_size, setup.spec.intermediate_size)
    for what in ("output", "gradient"):
        error = getattr(contender, f"{what}_error")
        allowed = rounding(setup.torch_dtype, terms)
        if eager and eager is not contender:
            allowed += 3 * getattr(eager, f"{what}_error")
        if not error <= allowed:
            contender.status = "WRONG"
            results.failed |= contender.ours
            results.notes.append(
                f"{contender.name} is WRONG: {what} error {error:.1e}, expected at most "
                f"{allowed:.1e}"
            )


def bench_kernels(results: Results) -> None:
    """Measures every kernel where they run; elsewhere a note says why not."""
    setup = results.setup
    try:
        if not setup.cuda:
            raise ValueError(
                "the kernels need a GPU; without one `backfuse bench static` says what it can"
            )
        operations("triton", torch.device(setup.device), setup.torch_dtype, setup.spec.hidden_size)
    except ValueError as error:
        results.notes.append(f"kernels not measured: {error}")
        return
    from . import ffn_kernels  # needs Triton

    ffn_kernels.bench_kernels(results)


def csv_paths(csv: Path, tables: Sequence[str]) -> dict[str, Path]:
    """File of each table: the path itself for one table, else with the table's name added."""
    stem = csv.name.removesuffix(".csv")
    names = {table: f"{stem}-{table}" if len(tables) > 1 else stem for table in tables}
    return {table: csv.with_name(f"{name}.csv") for table, name in names.items()}


def run(setup: Setup, csv: Path | None = None, plot: Path | None = None) -> int:
    """The command: measures, prints, writes; each table as soon as it is there.

    Args:
        setup: what to measure.
        csv: file for the table, or what the names of several tables' files begin with; None for
            no file.
        plot: file for the picture of the half; None for no file.

    Returns:
        The exit code: 0; 1 if something of ours failed or is wrong; 130 after Ctrl-C.

    Raises:
        OSError: if a file cannot be written.
    """
    require("tqdm")
    if plot:
        require("matplotlib")
    for path in (csv, plot):
        if path:
            writable_folder(path.parent)
    if setup.cuda and torch.device(setup.device).index is not None:
        torch.cuda.set_device(setup.device)
    files = csv_paths(csv, setup.tables) if csv else {}
    print(setup.title(), flush=True)
    results = Results(setup)
    for table, bench in (("half", bench_half), ("kernels", bench_kernels)):
        if table not in setup.tables or results.interrupted:
            continue
        try:
            bench(results)
        except KeyboardInterrupt:
            results.interrupted = True
            results.notes.append("interrupted: the table holds what was measured until then")
        measured = results.contenders if table == "half" else results.cases
        if measured:
            print(results.table(table))
        for note in results.notes:
            print(f"note: {note}", flush=True)
        results.notes.clear()
        if measured and table in files:
            results.save_csv(table, files[table])
            print(f"wrote {files[table]}", flush=True)
        if plot and table == "half" and any(contender.laps for contender in results.contenders):
            results.save_plot(plot)
            print(f"wrote {plot}", flush=True)
    if setup.cuda:
        for line in results.figures():
            print(f"figure: {line}")
    return 130 if results.interrupted else int(results.failed)
