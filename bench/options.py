"""What the commands share: checks of the user's values, and packages that may be missing."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from backfuse.blocks.errors import nearest

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}


def require(module: str) -> Any:
    """Imports a package that only the commands need.

    Raises:
        ModuleNotFoundError: if it is missing, with the line that installs it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f'{package} is not installed; this does it: pip install "backfuse[bench]"',
            name=package,
        ) from error


def progress_bar(**options: Any) -> Any:
    """A tqdm bar on standard error, gone when it is done; none where that is no terminal."""
    return require("tqdm").tqdm(leave=False, dynamic_ncols=True, disable=None, **options)


def check_positive(name: str, value: int) -> None:
    """Raises a ValueError unless `value` is at least 1."""
    if value < 1:
        raise ValueError(f"{name} is {value}, expected at least 1")


def check_seed(seed: int) -> None:
    """Raises a ValueError unless PyTorch takes the seed and the one after it."""
    if not 0 <= seed < 2**64 - 1:
        raise ValueError(f"seed is {seed}, expected 0 to {2**64 - 2}")


def choose(name: str, value: str, known: Iterable[str]) -> None:
    """Raises a ValueError, with the nearest known name, unless `value` is one of `known`."""
    known = list(known)
    if value in known:
        return
    raise ValueError(
        f"{name} is {value!r}, expected one of {', '.join(known)}{nearest(value, known)}"
    )


def compiler_missing(case: Any) -> str | None:
    """Why `torch.compile` cannot run a case here, in one line; None if it can."""
    if case.cuda:
        return None if importlib.util.find_spec("triton") else "compiling for CUDA needs triton"
    if any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        return None
    return "torch.compile on a CPU needs a C++ compiler (g++ or clang++)"


def parse_tokens(text: str) -> tuple[int, ...]:
    """Numbers of tokens from a list such as `2k,8k,100`; k stands for 1,024.

    Raises:
        ValueError: for something else, or numbers below 1.
    """
    numbers = []
    for part in text.split(","):
        digits = part.strip().lower()
        factor = 1024 if digits.endswith("k") else 1
        digits = digits.removesuffix("k")
        if not digits.isdecimal() or int(digits) < 1:
            raise ValueError(f"tokens is {text!r}, expected numbers such as 2k,8k or 4096")
        numbers.append(int(digits) * factor)
    return tuple(numbers)


def default_device() -> str:
    """`cuda` where there is such a device, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_device(device: str) -> None:
    """Raises a ValueError for a device that PyTorch does not know or does not have here."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, expected cpu or cuda") from error
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}, expected cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {device!r}, but PyTorch finds no CUDA device here")


def writable_folder(path: Path) -> None:
    """Makes the folder and proves that a file can be written there.

    Raises:
        OSError: if not, naming the folder.
    """
    probe = path / ".backfuse-write-test"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OSError(f"cannot write to {path}: {error.strerror}") from error
