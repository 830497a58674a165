"""Tokens for `pretrain.py`: a text byte by byte, shards of token ids, or a Hugging Face dataset.

All give random pieces of a stream of tokens; every process draws the same ones from the same
generator and keeps its share. Token shards are read through memory maps: they may be far larger
than memory. Two layouts of a `.bin` file are understood: bare uint16 or uint32 ids, and those
with llm.c's header of 256 int32: magic, version, number of ids, and zeros. Its magic and version
are 20240520 and 1 before uint16 ids, 20240801 and 7 before uint32.
"""

from __future__ import annotations

import hashlib
import importlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from backfuse.bench.data import VALIDATION_SHARE, VOCABULARY
from backfuse.bench.data import load as load_text

#: llm.c's headers: magic -> version, and the dtype of ids.
HEADERS = {20240520: (1, np.dtype("<u2")), 20240801: (7, np.dtype("<u4"))}
HEADER_BYTES = 1024

#: So many ids of a shard, evenly spaced, are in its fingerprint, beside 4,096 at each end.
SAMPLES = 1024

#: What a dataset's name begins with.
DATASET = "hf:"


@dataclass(frozen=True, eq=False)
class Tokens:
    """Parts of a stream, to train on and to validate on.

    Attributes:
        name: where they come from.
        train: arrays of token ids.
        validation: likewise.
        vocabulary: ids are below this.
        fingerprint: of the data, for a resumed run to compare.
    """

    name: str
    train: list[np.ndarray]
    validation: list[np.ndarray]
    vocabulary: int
    fingerprint: str

    def __str__(self) -> str:
        count = sum(map(len, self.train)) + sum(map(len, self.validation))
        return f"{self.name}: {count:,} tokens, fingerprint {self.fingerprint[:16]}"

    def pieces(self, split: str, count: int, seq_len: int, generator: torch.Generator) -> Tensor:
        """Random pieces, int64 `[count, seq_len + 1]`: inputs, and for each the one that follows.

        Raises:
            ValueError: for an id outside the vocabulary.
        """
        parts = self.train if split == "train" else self.validation
        windows = np.cumsum([max(0, len(part) - seq_len) for part in parts])
        starts = torch.randint(int(windows[-1]), (count,), generator=generator).numpy()
        which = np.searchsorted(windows, starts, side="right")
        before = np.concatenate([[0], windows])
        rows = [
            parts[w][s - before[w] : s - before[w] + seq_len + 1]
            for w, s in zip(which, starts, strict=True)
        ]
        pieces = np.stack(rows).astype(np.int64)
        if pieces.max() >= self.vocabulary:
            raise ValueError(
                f"data is {self.name}, which holds the token {pieces.max()}, expected ids below "
                f"the vocabulary ({self.vocabulary}); is token_dtype right?"
            )
        return torch.from_numpy(pieces)


def load(data: str, seq_len: int, vocabulary: int = 0, token_dtype: str = "uint16") -> Tokens:
    """The tokens that `--data` names.

    Args:
        data: a text file (empty: the Python standard library), a `.bin` file or a folder of
            them, or `hf:NAME[:COLUMN]`, a dataset with a column of text.
        seq_len: of the pieces that will be wanted.
        vocabulary: number of ids; 0: 256 for bytes; shards want it said.
        token_dtype: of ids in files without a header, `uint16` or `uint32`.

    Raises:
        ValueError: for data that cannot be read, are damaged, or are too short.
        ModuleNotFoundError: for a dataset without the package that reads it.
    """
    if token_dtype not in ("uint16", "uint32"):
        raise ValueError(f"token_dtype is {token_dtype!r}, expected uint16 or uint32")
    if data.startswith(DATASET):
        return _dataset(data, seq_len, vocabulary)
    path = Path(data)
    if data and (path.is_dir() or path.suffix == ".bin" and path.is_file()):
        return _shards(path, seq_len, vocabulary, np.dtype(token_dtype).newbyteorder("<"))
    corpus = load_text(data or None, seq_len)
    return Tokens(
        corpus.name, [corpus.train.numpy()], [corpus.validation.numpy()],
        _bytes_vocabulary(vocabulary), corpus.sha256,
    )  # fmt: skip


def _bytes_vocabulary(vocabulary: int) -> int:
    if vocabulary and vocabulary < VOCABULARY:
        raise ValueError(f"vocabulary is {vocabulary}, expected at least {VOCABULARY} for bytes")
    return vocabulary or VOCABULARY


def _shard(path: Path, dtype: np.dtype, vocabulary: int) -> np.ndarray:
    """One file's ids, mapped."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = np.frombuffer(file.read(HEADER_BYTES).ljust(HEADER_BYTES, b"\0"), dtype="<i4")
    offset = 0
    if int(head[0]) in HEADERS:
        version, dtype = HEADERS[int(head[0])]
        offset = HEADER_BYTES
        expected = HEADER_BYTES + dtype.itemsize * int(head[2])
        if head[1] != version or size != expected:
            raise ValueError(
                f"data: {path} is {size} bytes (version {head[1]}), expected {expected} (version "
                f"{version}) as its header says: truncated or damaged"
            )
    elif size >= HEADER_BYTES and head[:3].any() and not head[3:].any():
        raise ValueError(
            f"data: {path} begins with {head[0]} and zeros, expected ids, or a header with one of "
            f"{', '.join(map(str, HEADERS))}: damaged, or of another kind"
        )
    if not offset and vocabulary > np.iinfo(dtype).max + 1:
        raise ValueError(
            f"data: {path} has no header, and the vocabulary is {vocabulary}, more than "
            f"token_dtype {dtype.name} can tell apart: expected --token-dtype uint32"
        )
    if not size or (size - offset) % dtype.itemsize:
        raise ValueError(
            f"data: {path} is {size} bytes, expected a positive multiple of {dtype.itemsize} "
            f"({dtype.name}): truncated, or of another token_dtype"
        )
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


def _shards(folder: Path, seq_len: int, vocabulary: int, dtype: np.dtype) -> Tokens:
    """A `.bin`, or those of a folder; the last is validated on, or the end of the only one."""
    if vocabulary < 1:
        raise ValueError(
            f"vocabulary is {vocabulary}, expected the number of ids that {folder} may hold"
        )
    paths = sorted(folder.glob("*.bin")) if folder.is_dir() else [folder]
    if not paths:
        raise ValueError(f"data is {folder}, which holds no .bin files")
    digest = hashlib.sha256()
    parts = []
    for path in paths:
        part = _shard(path, dtype, vocabulary)
        digest.update(f"{part.dtype} {len(part)}".encode())
        digest.update(part[:4096].tobytes() + part[-4096:].tobytes())
        if len(part):
            digest.update(part[np.linspace(0, len(part) - 1, SAMPLES).astype(np.int64)].tobytes())
        parts.append(part)
    train, validation = parts[:-1], parts[-1:]
    if not train:
        cut = len(parts[0]) - max(int(len(parts[0]) * VALIDATION_SHARE), seq_len + 1)
        train, validation = [parts[0][: max(cut, 0)]], [parts[0][max(cut, 0) :]]
    for what, chosen in (("train", train), ("validate", validation)):
        if max(map(len, chosen)) <= seq_len:
            raise ValueError(
                f"data is {folder}, whose longest shard to {what} on has "
                f"{max(map(len, chosen))} tokens, expected at least seq_len + 1 ({seq_len + 1})"
            )
    return Tokens(str(folder), train, validation, vocabulary, digest.hexdigest())


def _dataset(data: str, seq_len: int, vocabulary: int) -> Tokens:
    """The bytes of a dataset's texts, a 0 after each: its documents' end."""
    name, _, column = data.removeprefix(DATASET).partition(":")
    try:
        datasets = importlib.import_module("datasets")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"data is {data!r}, which needs a package; this installs it: pip install datasets"
        ) from error
    column = column or "text"
    rows = datasets.load_dataset(name, split="train")
    if column not in rows.column_names:
        raise ValueError(f"data is {data!r}, expected a column {column} among {rows.column_names}")
    odd = next((row for row in rows[column] if not isinstance(row, str)), None)
    if odd is not None or None in rows[column]:
        raise ValueError(f"data is {data!r}, whose {column} holds {odd!r}, expected texts alone")
    text = b"".join(row.encode(errors="replace") + b"\0" for row in rows[column])
    ids = np.frombuffer(text, dtype=np.uint8)
    cut = len(ids) - max(int(len(ids) * VALIDATION_SHARE), seq_len + 1)
    if cut <= seq_len:
        raise ValueError(f"data is {data!r} with {len(ids)} bytes, expected {2 * (seq_len + 1)}")
    digest = hashlib.sha256(text).hexdigest()
    return Tokens(data, [ids[:cut]], [ids[cut:]], _bytes_vocabulary(vocabulary), digest)
