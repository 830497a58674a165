"""What was measured on a device: tile sizes, how a pre-activation is rebuilt, attention cores.

`backfuse tune` measures and saves; the launchers ask `config_for` and `strategy_for`, which fall
back on the tables in `configs.py` and on `split`. A record belongs to a device, the version of
Triton and of the records themselves, and a class of shapes: the widths, the dtype, gated or not.
The number of tokens is no part of it.

Times of attention cores (`attention_times`, asked by `cores/choose.py`) belong also to the version
of PyTorch, the head dims, the kind of mask and the length up to the next power of two.

Records are kept in `$BACKFUSE_CACHE/tuning.json` (default: `~/.cache/backfuse`).
"""

from __future__ import annotations

import functools
import json
import os
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .cache import cache_folder
from .configs import CONFIGS, Config, architecture, choose, fits, table_of
from .launch import Layout, forget_plans, planned
from .reference.attention_request import AttentionRequest

#: Goes up when old records would mean something else: kernels or their arguments changed.
FORMAT = 1


@dataclass(frozen=True)
class Shape:
    """A class of shapes.

    Attributes:
        hidden_size: width of the residual stream.
        intermediate_size: width of the FFN.
        gated: whether it has a gate.
        dtype: of the operands.
    """

    hidden_size: int
    intermediate_size: int
    gated: bool
    dtype: torch.dtype

    def key(self, device: torch.device) -> str:
        """The name of its record on a device."""
        gate = "gated" if self.gated else "plain"
        sizes = f"{self.hidden_size}x{self.intermediate_size}"
        return f"{_prefix(device, self.dtype)}|{sizes}|{gate}"


def _prefix(device: torch.device, dtype: torch.dtype) -> str:
    """How the name of every record begins."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{FORMAT}|{name}|triton {triton.__version__}|{str(dtype).removeprefix('torch.')}"


class AttentionClass(NamedTuple):
    """A class of requests whose times are alike.

    Attributes:
        dtype: of q, k and v.
        head_dims: of q and k, and of v.
        kind: causal or full, and what is asked for beside that.
        length: the longest sequence's, up to a power of two.
    """

    dtype: torch.dtype
    head_dims: tuple[int, int]
    kind: str
    length: int

    @classmethod
    def of(cls, request: AttentionRequest) -> AttentionClass:
        """The class a request belongs to."""
        return cls(
            request.dtype,
            (request.head_dim, request.v_head_dim or request.head_dim),
            ", ".join(["causal" if request.mask.causal else "full", *request.extras()]),
            1 << (request.longest - 1).bit_length(),
        )

    def key(self, device: torch.device) -> str:
        """The name of its record on a device."""
        dims = "x".join(map(str, self.head_dims))
        prefix = f"{_prefix(device, self.dtype)}|torch {torch.__version__}"
        return f"{prefix}|attention|{dims}|{self.kind}|{self.length}"


@dataclass(frozen=True)
class Tuning:
    """What is best for a class of shapes.

    Attributes:
        strategy: `"split"` or `"fused"`.
        configs: kernel -> configuration; the table's default for those that are missing.
    """

    strategy: str = "split"
    configs: dict[str, Config] = field(default_factory=dict)

    @classmethod
    def parse(cls, record: Any) -> Tuning:
        """A tuning from its record.

        Raises:
            ValueError: for anything that is not one; the values are checked as well.
        """
        try:
            strategy = record["strategy"]
            configs = {name: Config(**sizes) for name, sizes in record["configs"].items()}
            known = {
                (name, str(c))
                for name, table in CONFIGS.items()
                for cs in table.values()
                for c in cs
            }
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a record of a tuning: {error!r}") from None
        if strategy not in ("split", "fused"):
            raise ValueError(f"strategy is {strategy!r}, expected 'split' or 'fused'")
        for name, config in configs.items():
            if (name, str(config)) not in known:  # as text: 128.0 and [128] are no block sizes
                raise ValueError(f"{name} has {config}, expected one of its configurations")
        return cls(strategy, configs)


def cache_file() -> Path:
    """Where records are kept."""
    return cache_folder() / "tuning.json"


@functools.cache
def _records(path: Path) -> dict[str, Any]:
    """The file's records; none, with a warning, where it cannot be read."""
    try:
        records = json.loads(path.read_text())
        if isinstance(records, dict):
            return records
        raise ValueError("not a table of records")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        warnings.warn(f"{path} is ignored: {error}; `backfuse tune` writes it anew", stacklevel=2)
        return {}


@planned
def tuning(shape: Shape, device: torch.device) -> Tuning:
    """What was measured, or the defaults."""
    record = _records(cache_file()).get(shape.key(device))
    if record is None:
        return Tuning()
    try:
        return Tuning.parse(record)
    except ValueError as error:
        warnings.warn(f"a record in {cache_file()} is ignored: {error}", stacklevel=2)
        return Tuning()


@planned
def _attention_times(kind: AttentionClass, device: torch.device) -> dict[str, float]:
    record = _records(cache_file()).get(kind.key(device), {})
    if isinstance(record, dict) and all(
        isinstance(ms, float | int) and not isinstance(ms, bool) and 0 < ms < float("inf")
        for ms in record.values()
    ):
        return record
    message = f"a record in {cache_file()} is ignored: {record!r} has no milliseconds by core"
    warnings.warn(message, stacklevel=2)
    return {}


def attention_times(request: AttentionRequest) -> dict[str, float]:
    """Milliseconds of forward and backward by core, as measured; empty where nothing was."""
    return _attention_times(AttentionClass.of(request), request.device)


def save_attention(request: AttentionRequest, times: dict[str, float]) -> Path:
    """Keep the times of a request's class; they count from now on. As `save`."""
    return _write(AttentionClass.of(request).key(request.device), times)


def save(shape: Shape, device: torch.device, best: Tuning) -> Path:
    """Keep a tuning, beside those of other shapes; it is used from now on.

    Raises:
        OSError: if the file cannot be written; the old one is then as it was.
    """
    return _write(shape.key(device), asdict(best))


def _write(key: str, record: Any) -> Path:
    """Keep a record; the file is replaced whole or not at all."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    _records.cache_clear()
    records = {**_records(path), key: record}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(records, indent=1, sort_keys=True))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    forget()
    return path


def forget() -> None:
    """Read the file again at the next call."""
    _records.cache_clear()
    forget_plans()


@planned
def _config_for(
    kernel: str, shape: Shape, device: torch.device, block_n: int | None, aligned: bool
) -> Config:
    config = tuning(shape, device).configs.get(kernel)
    name, size = architecture(device), shape.dtype.itemsize
    if (
        config is not None
        and aligned
        and block_n in (None, config.block_n)
        and fits(kernel, config, table_of(name, size), size, shape.gated)
    ):
        return config
    return choose(kernel, name, size, shape.gated, block_n, aligned)


def config_for(
    kernel: str,
    x: torch.Tensor | Layout,
    f: int,
    gated: bool,
    block_n: int | None = None,
    aligned: bool = True,
) -> Config:
    """The configuration an FFN kernel runs with.

    Args:
        kernel: a key of `CONFIGS`.
        x: `[rows, h]`, an operand.
        f: width of the FFN.
        gated: whether it has a gate.
        block_n: what `block_n` has to be; None for anything.
        aligned: whether descriptors could describe the operands.

    Raises:
        ValueError: if none fits the device.
    """
    return _config_for(kernel, Shape(x.shape[1], f, gated, x.dtype), x.device, block_n, aligned)


def strategy_for(x: torch.Tensor | Layout, f: int, gated: bool) -> str:
    """How a pre-activation is rebuilt: `"split"` or `"fused"`. Arguments as `config_for`."""
    return tuning(Shape(x.shape[1], f, gated, x.dtype), x.device).strategy
