"""What `pretrain.py` writes down and listens to: figures, a profiler's trace, signals."""

from __future__ import annotations

import csv
import importlib.util
import os
import resource
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from pretrain_config import Config


class Log:
    """Figures as CSV, for TensorBoard and wandb where asked; only of the first process.

    `kept_bytes` is what its blocks keep for backward; embedding, head and loss are not counted.
    """

    COLUMNS = ("step", "loss", "norm", "rate", "tokens_per_second", "mfu", "kept_bytes",
               "peak_bytes", "validation_loss")  # fmt: skip

    def __init__(self, config: Config, step: int) -> None:
        self.path = Path(config.out) / "log.csv"
        rows = []
        if config.resume and self.path.exists():  # lines that a crash left torn are dropped
            text = self.path.read_text(errors="replace").replace("\0", "")
            for row in csv.DictReader(text.splitlines()):
                torn = set(row) != {*self.COLUMNS} or None in row.values()
                if not torn and row["step"].isdigit() and int(row["step"]) <= step:
                    rows.append(row)
        with open(self.path, "w", newline="") as file:
            writer = csv.DictWriter(file, self.COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        self.board = self.wandb = None
        if config.tensorboard:  # the imports take seconds
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(config.out, purge_step=step + 1)
        if config.wandb:
            import wandb

            self.wandb = wandb.init(project=config.wandb, dir=config.out, config=asdict(config))

    def write(self, *figures: Any) -> None:
        """One step's figures, in the order of the columns."""
        row = dict(zip(self.COLUMNS, figures, strict=True))
        with open(self.path, "a", newline="") as file:
            csv.DictWriter(file, self.COLUMNS).writerow(row)
        for name, value in row.items() if self.board else ():
            if name != "step" and value != "":
                self.board.add_scalar(name, value, row["step"])
        if self.wandb:
            self.wandb.log(row, step=row["step"])

    def close(self) -> None:
        """Hands over what is still in memory."""
        if self.board:
            self.board.close()
        if self.wandb:
            self.wandb.finish()


class Interrupt:
    """Notices Ctrl-C and SIGTERM, so that a step is never torn.

    A second Ctrl-C stops at once; a second SIGTERM, as torchrun may send, does nothing.
    """

    def __init__(self) -> None:
        self.signal = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with suppress(OSError, RuntimeError):  # who listened may be gone: nothing is raised here
            text = "\nfinishing this step, then saving; Ctrl-C again to stop at once"
            print(text, file=sys.stderr, flush=True)


def tell(*words: str) -> None:
    """Prints at once; once nobody listens any more (`| head`), nothing."""
    try:
        print(*words, flush=True)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def peak_bytes(device: str) -> int:
    """The most that this process has held: on its GPU, or in memory altogether."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def check_installed(config: Config) -> None:
    """Raises what is wrong with the flags of this file, before any work."""
    for name, package in (("tensorboard", "tensorboard"), ("wandb", "wandb")):
        if getattr(config, name) and not importlib.util.find_spec(package):
            raise ModuleNotFoundError(
                f"{name} is {getattr(config, name)}, which needs a package; this installs it: "
                f"pip install {package}"
            )
    if config.memory_snapshot and not torch.cuda.is_available():
        raise ValueError("memory_snapshot is True, expected False: it is CUDA's, and there is none")


@contextmanager
def memory_snapshot(config: Config, done: int) -> Iterator[None]:
    """Every allocation of the third step since the start, for pytorch.org/memory_viz."""
    asked = config.memory_snapshot and done == 2
    if asked:
        torch.cuda.memory._record_memory_history()
    yield
    if asked:
        path = Path(config.out) / f"memory-{dist.get_rank()}.pickle"
        torch.cuda.memory._dump_snapshot(str(path))
        torch.cuda.memory._record_memory_history(enabled=None)


def profiler(config: Config) -> Any:
    """PyTorch's, over the second and third step since the start, or nothing."""
    if not config.trace:
        return nullcontext()
    path = Path(config.out) / f"trace-{dist.get_rank()}.json"
    return torch.profiler.profile(
        schedule=torch.profiler.schedule(wait=0, warmup=1, active=2, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(path)),
        profile_memory=True,
    )
