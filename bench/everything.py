"""`backfuse bench all`: what matters most, in so many minutes. `backfuse bench check`: others'
published tables, measured again.

The jobs are in order of importance. None starts that cannot be expected to end in time, judged by
the longest so far; a deadline cuts rounds short, never a row in half. A job whose rows are in the
folder already is passed over, so that a second call goes on where the first one stopped. Before
anything is timed, every kernel that would run is checked: a wrong one stops the command.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from . import doctor
from .options import check_device, choose, default_device, require, writable_folder
from .rows import Table, device_folder, device_name, table
from .run import Bench, Outputs, Setup
from .shapes import CROSS_CHECKS, CrossCheck

#: Providers of a block that are compared in every table; all of them only once.
FEW = ("eager", "compile", "compile-0.5", "checkpoint", "sac-every-2nd-mm", "backfuse")

MODES = ("fwd", "bwd", "both")

#: On a GPU: after so many jobs every kernel and configuration is timed.
KERNELS_AFTER = 3


def jobs(device: str) -> list[Setup]:
    """What is measured, the most important first."""
    cuda = torch.device(device).type == "cuda"

    def job(op: str, **options: Any) -> Setup:
        return Setup(op, device=device, modes=MODES, rounds=5 if cuda else 3, **options)

    if not cuda:
        return [
            job("stack", tokens="2k", layers=4, providers=FEW),
            job("ffn", tokens="2k"),
            job("norm", tokens="8k"),
            job("rope", tokens="8k"),
            job("attention", tokens="2k"),
            job("attention-half", tokens="2k"),
            job("block", tokens="2k"),
            job("train", tokens="2k", layers=4),
            job("model", tokens="2k", layers=4),
            job("lora", tokens="2k", layers=4),
            job("offload", tokens="2k", layers=5),
            job("stack", tokens="2k", layers=4),
        ]
    return [
        job("ffn", tokens="8k"),
        job("block", tokens="8k", providers=FEW),
        job("attention", tokens="8k"),
        job("attention-half", tokens="8k"),
        job("norm", tokens="8k"),
        job("rope", tokens="8k"),
        job("stack", tokens="8k", providers=FEW),
        job("train", tokens="8k"),
        job("model", tokens="8k"),
        job("lora", tokens="8k"),
        job("offload", tokens="8k", layers=8),
        job("rope", shape=("qwen3-8b",), tokens="8k"),
        job("ffn", shape=("llama-3.2-1b", "qwen2.5-7b", "llama-3-70b"), tokens="8k"),
        *(cross_check_setup(case, device) for case in CROSS_CHECKS.values()),
        job("ffn", tokens="2k,32k", providers=("eager", "compile", "checkpoint", "backfuse")),
        job("attention", tokens="2k,32k"),
        job("block", tokens="2k,32k", providers=FEW),
        job("block", tokens="8k"),
        job("block", shape=("gpt2-xl", "vit-l"), tokens="8k", providers=FEW),
    ]


def cross_check_setup(case: CrossCheck, device: str) -> Setup:
    """A cross-check as something to measure."""
    layers = case.layers if case.op in ("ffn", "stack", "offload") else None
    return Setup(
        case.op, shape=(case.shape,), tokens=str(case.batch_size * case.seq_len),
        batch_size=case.batch_size, layers=layers, modes=MODES, providers=case.providers,
        device=device,
    )  # fmt: skip


def self_check(device: str) -> bool:
    """Whether all kernels that would run are right; says what is not."""
    for line in doctor.versions(device):
        print(line)
    for line in doctor.warnings(device):
        print(f"warning: {line}")
    reason = doctor.unchecked(device)
    if reason:
        print(f"no kernel was checked: {reason}", flush=True)
        return True
    wrong = count = 0
    for finding in doctor.findings(device, defaults_only=True):
        count += 1
        if not finding.right:
            wrong += 1
            print(finding, flush=True)
    print(f"{count - wrong} of {count} default configurations are right", flush=True)
    return not wrong


def run(minutes: float = 9.0, out: Path | None = None, device: str | None = None) -> int:
    """The command: checks, measures in order, ends with one table.

    Args:
        minutes: after which it stops.
        out: folder of `results.csv`; None: `bench/results/<device>`.
        device: `cpu` or `cuda`; None: the GPU if there is one.

    Returns:
        The exit code: 0; 1 if something of ours is wrong or fails; 130 after Ctrl-C.

    Raises:
        ValueError: for a time that is not positive, or a device that is not here.
        OSError: if the folder cannot be written to.
    """
    started = time.monotonic()
    if not minutes > 0:
        raise ValueError(f"minutes is {minutes}, expected more than 0")
    device = device or default_device()
    check_device(device)
    require("tqdm")
    out = out or Path("bench/results") / device_folder(device)
    writable_folder(out)
    rows = Table(out / "results.csv")
    deadline = started + 60 * minutes
    code = 0
    try:
        if not self_check(device):
            print("stopped before any timing: a kernel is wrong")
            return 1
        code = _measure(jobs(device), rows, deadline)
    except KeyboardInterrupt:
        print("interrupted: the table holds what was measured until then")
        code = 130
    print(f"\n{device_name(device)}, {(time.monotonic() - started) / 60:.1f} minutes")
    print(table(pd.DataFrame(rows.rows)))
    print(f"rows are in {rows.path}")
    return code


def _measure(setups: Sequence[Setup], rows: Table, deadline: float) -> int:
    """Jobs until the time is over."""
    longest, failed = 0.0, False
    cases = [(setup, case) for setup in setups for case in setup.cases()]
    assert rows.path is not None
    kernels_csv = rows.path.with_name("kernels.csv")
    for index, (setup, case) in enumerate(cases):
        start = time.monotonic()
        if start + longest > deadline:
            print(f"out of time: {len(cases) - index} of {len(cases)} jobs are left for next time")
            break
        if index == KERNELS_AFTER and setup.cuda and not kernels_csv.exists():
            failed |= _kernels(setup.device, kernels_csv, deadline)
        bench = Bench(setup, rows, Outputs(csv=rows.path), deadline)
        bench.measure(case)
        longest = max(longest, time.monotonic() - start)
        failed |= bench.failed
    return int(failed)


def _kernels(device: str, csv: Path, deadline: float) -> bool:
    """Every kernel and configuration; whether one is wrong. Ctrl-C ends all, not this alone."""
    from . import kernels  # needs Triton

    code = kernels.run(rounds=3, device=device, csv=csv, deadline=deadline)
    if code == 130:
        raise KeyboardInterrupt
    return code == 1


def cross_check(
    names: Sequence[str] = (), device: str | None = None, csv: Path | None = None
) -> int:
    """The command: measures the shapes of others' tables, and prints what those say.

    Args:
        names: from `CROSS_CHECKS`; none for all.
        device: `cpu` or `cuda`; None: the GPU if there is one.
        csv: file that rows are appended to.

    Returns:
        The exit code: 0; 1 if something of ours is wrong or fails; 130 after Ctrl-C.

    Raises:
        ValueError: for a name that is not known, or a device that is not here.
        OSError: if the file cannot be written.
    """
    for name in names:
        choose("table", name, CROSS_CHECKS)
    device = device or default_device()
    check_device(device)
    outputs = Outputs(csv=csv)
    outputs.check(device)
    failed = False
    for name, case in CROSS_CHECKS.items():
        if names and name not in names:
            continue
        rows = Table(csv)
        setup = cross_check_setup(case, device)
        bench = Bench(replace(setup, modes=("both",)), rows, outputs)
        code = 0
        try:
            bench.run()
        except KeyboardInterrupt:
            code = 130
        print(f"{table(pd.DataFrame(rows.rows))}\n{name} as published: {case.counts}\n", flush=True)
        if code:
            return code
        failed |= bench.failed
    return int(failed)
