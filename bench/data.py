"""Text to train on, byte by byte: the Python standard library's own source, or any file.

The standard library is always there, offline, in the same order every time: about 12 MB without
its tests. Its bytes depend on the Python version, so the size and the hash go into every report.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

#: Folders of the standard library's place that are tests, or not the standard library.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}

#: Share of the text, at its end, that is not trained on.
VALIDATION_SHARE = 0.05

VOCABULARY = 256


@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes to train on and bytes to validate on.

    Attributes:
        name: where they came from.
        train: uint8 [N].
        validation: uint8 [M], the end of the text.
        sha256: of the whole text, in hexadecimal.
    """

    name: str
    train: Tensor
    validation: Tensor
    sha256: str

    def __str__(self) -> str:
        size = len(self.train) + len(self.validation)
        return f"{self.name}: {size:,} bytes, sha256 {self.sha256[:16]}"

    def batch(
        self,
        split: str,
        batch_size: int,
        seq_len: int,
        generator: torch.Generator,
        device: torch.device | str = "cpu",
    ) -> tuple[Tensor, Tensor]:
        """Random pieces of the text and, for each byte, the one that follows.

        Args:
            split: `train` or `validation`.
            batch_size: pieces.
            seq_len: bytes of a piece.
            generator: of the CPU; chooses the pieces.
            device: where the result goes.

        Returns:
            Inputs and targets, int64 [batch_size, seq_len].
        """
        text = self.train if split == "train" else self.validation
        starts = torch.randint(len(text) - seq_len, (batch_size, 1), generator=generator)
        pieces = text[starts + torch.arange(seq_len + 1)].long().to(device)
        return pieces[:, :-1], pieces[:, 1:]


def load(path: str | os.PathLike[str] | None = None, seq_len: int = 1) -> Corpus:
    """Reads the text and splits it.

    Args:
        path: any text file; None for the standard library.
        seq_len: bytes of the pieces that will be wanted, so that a text too short is noticed.

    Raises:
        ValueError: if the file cannot be read, is no regular file, or is too short for one piece
            to train on and one to validate on.
    """
    if path is None:
        name, text = "Python standard library", standard_library()
    else:
        name, text = str(path), _read(Path(path))
    validation = max(int(len(text) * VALIDATION_SHARE), seq_len + 1)
    least = 2 * (seq_len + 1)
    if len(text) < least:
        raise ValueError(
            f"data is {name} with {len(text)} bytes, expected at least {least}: "
            f"{seq_len + 1} to train on and as many to validate on"
        )
    digest = hashlib.sha256(text).hexdigest()
    both = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return Corpus(name, both[:-validation], both[-validation:], digest)


def _read(path: Path) -> bytes:
    if path.exists() and not path.is_file():
        raise ValueError(f"data is {path}, which is not a regular file, expected a text file")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"data is {path}, which cannot be read: {error.strerror}") from error


def standard_library() -> bytes:
    """The source of the running Python's standard library, without its tests, sorted by path.

    Raises:
        ValueError: if this Python does not come with its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, bytes] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT]
        for name in files:
            # The name of the one generated file tells the machine that Python was built on.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = path.read_bytes()
    if not found:
        raise ValueError(f"no Python source below {root}; name a text file instead: --data PATH")
    return b"".join(found[name] for name in sorted(found))
