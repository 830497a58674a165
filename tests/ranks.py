"""Several processes on this machine, talking through gloo, for tests of what is distributed.

One group runs all checks of a module: functions whose names begin with `check_`, which every rank
calls at the same time. Nothing hangs: collectives and the group have time limits.
"""

import datetime
import importlib
import json
import os
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 4

#: Seconds that the whole group may take, and that one collective may.
LIMIT, COLLECTIVE_LIMIT = 240, 60


def names(module):
    """Every check of a module, in order; those that the variable CHECKS names, if it is set."""
    found = [name for name in vars(importlib.import_module(module)) if name.startswith("check_")]
    wanted = os.environ.get("CHECKS", "")
    return [name for name in found if any(part in name for part in wanted.split(","))]


def _work(rank, folder, module, checks):
    """One rank: runs the checks in turn, and writes how each went; stops at the first that fails,
    because the other ranks may then be anywhere."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=COLLECTIVE_LIMIT),
    )
    went = {}
    for check in checks:
        torch.manual_seed(0)
        try:
            getattr(importlib.import_module(module), check)()
            dist.barrier()
        except BaseException:
            went[check] = traceback.format_exc()
            break
        finally:
            Path(folder, f"{rank}.json").write_text(json.dumps(went | {check: went.get(check, "")}))
        went[check] = ""
    if not any(went.values()):
        dist.destroy_process_group()
    os._exit(0)  # a rank that waits in a thread of gloo's would not end


def run(folder, module):
    """Runs a module's checks; for each, what went wrong: nothing if it is an empty text."""
    context, checks = mp.get_context("spawn"), names(module)
    ranks = [
        context.Process(target=_work, args=(rank, str(folder), module, checks))
        for rank in range(WORLD)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + LIMIT
    while any(process.is_alive() for process in ranks) and time.monotonic() < deadline:
        time.sleep(0.2)
        if any(process.exitcode not in (None, 0) for process in ranks):
            break
    for process in ranks:
        process.join(2)
        process.kill()
    went = {}
    for check in checks:
        said = []
        for rank in range(WORLD):
            path = Path(folder, f"{rank}.json")
            report = json.loads(path.read_text()) if path.exists() else {}
            text = report.get(check, "not reached")
            said += [f"rank {rank}: {text}"] if text else []
        went[check] = "\n".join(said)
    return went
