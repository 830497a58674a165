"""`backfuse tune`: measures the FFN kernels' configurations and strategies, and attention cores.

The fastest configuration of every kernel, and `fused` instead of `split` where that is faster *and*
gives the same bits: only then do policies that keep and policies that rebuild agree. What is found
goes to the file that the launchers read (see `kernels/tuning.py`). Attention: `tune_attention.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from backfuse.kernels import fused
from backfuse.kernels.configs import CONFIGS, Config, architecture, fits, table_of
from backfuse.kernels.ffn_up import ffn_up
from backfuse.kernels.launch import DTYPES as KERNEL_DTYPES
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.tuning import Shape, Tuning, save, save_attention

from . import tune_attention
from .measure import kernel_seconds
from .options import DTYPES, check_device, check_positive, choose, progress_bar
from .shapes import SHAPES

PARTS = ("ffn", "attention")

#: Lengths that attention is measured at.
SEQ_LENS = (1024, 2048, 4096, 8192, 16384, 32768)

#: Milliseconds of a call.
Timer = Callable[[Callable[[], Any]], float]


def device_milliseconds(call: Callable[[], Any]) -> float:
    """The median of many calls on the current GPU (see `measure.kernel_seconds`)."""
    return kernel_seconds(call, "cuda") * 1e3


class Operands:
    """Random tensors of one FFN.

    Args:
        shape: the class of shapes.
        kind: the activation.
        tokens: rows.
        device: where they are.
    """

    def __init__(self, shape: Shape, kind: str, tokens: int, device: torch.device) -> None:
        h, f = shape.hidden_size, shape.intermediate_size

        def make(*size: int) -> Tensor:
            return torch.randn(size, device=device).mul_(h**-0.5).to(shape.dtype)

        count = 2 if shape.gated else 1
        self.activation = (kind, shape.gated)
        self.x, self.dy = make(tokens, h) * h**0.5, make(tokens, h)
        self.down = make(h, f)
        self.ups = (self.x, [make(f, h) for _ in range(count)], [None] * count, *self.activation)
        self.preact, self.dpreact = (self.x.new_empty(tokens, f * count) for _ in range(2))

    def up(self, config: Config) -> None:
        """The forward kernel, and the rebuild of `split`: both write preact here."""
        ffn_up(*self.ups, preact=self.preact, config=config)

    def dact(self, config: Config) -> Any:
        """The backward kernel of a pre-activation that is there."""
        return fused.ffn_dact(
            self.dy, self.down, self.preact, *self.activation, self.dpreact, config=config
        )

    def recompute(self, config: Config) -> Any:
        """The backward kernel that rebuilds."""
        return fused.ffn_recompute_dact(
            *self.ups, self.dy, self.down, self.dpreact, strategy="fused", config=config
        )

    def split(self, up: Config, dact: Config) -> Any:
        """What `split` runs in a backward pass."""
        ffn_up(*self.ups, preact=self.preact, need_hidden=False, config=up)
        return self.dact(dact)


@dataclass
class Row:
    """One measurement.

    Attributes:
        kernel: what ran; `split` for the pair of kernels.
        config: its configuration; that of the first one of the pair.
        ms: milliseconds; NaN if it failed.
        note: what is to be said of it.
    """

    kernel: str
    config: Config
    ms: float
    note: str = ""


def tune(
    shape: Shape,
    device: torch.device,
    *,
    kind: str = "silu",
    tokens: int = 4096,
    timer: Timer = device_milliseconds,
) -> tuple[Tuning, list[Row]]:
    """Measure all configurations that fit, and both strategies.

    Args:
        shape: the class of shapes.
        device: a GPU.
        kind: the activation, as the kernels call it.
        tokens: rows of a call; a chunk's worth.
        timer: how a call is timed.

    Returns:
        What is best, and every measurement.

    Raises:
        RuntimeError: if no configuration of a kernel runs.
    """
    operands = Operands(shape, kind, tokens, device)
    table = table_of(architecture(device), shape.dtype.itemsize)
    rows: list[Row] = []
    best: dict[str, Row] = {}
    cases = [
        (kernel, config)
        for kernel in ("ffn_up", "ffn_dact", "ffn_recompute")
        for config in CONFIGS[kernel][table]
        if fits(kernel, config, table, shape.dtype.itemsize, shape.gated)
    ]
    runs: dict[str, Callable[[Config], Any]] = {
        "ffn_up": operands.up,
        "ffn_dact": operands.dact,
        "ffn_recompute": operands.recompute,
    }
    with progress_bar(total=len(cases) + 1, unit="kernel") as bar:
        expected: list[Tensor] = []
        for kernel, config in cases:
            bar.set_description(kernel)
            row = Row(kernel, config, float("nan"))
            rows.append(row)
            bar.update()
            try:
                if kernel == "ffn_recompute" and not expected:
                    hidden, _ = operands.split(best["ffn_up"].config, best["ffn_dact"].config)
                    expected = [operands.dpreact.clone(), hidden]
                result = runs[kernel](config)
                if expected and not (
                    torch.equal(operands.dpreact, expected[0])
                    and torch.equal(result[0], expected[1])
                ):
                    row.note = "other bits than split"
                    continue
                row.ms = timer(partial(runs[kernel], config))
            except RuntimeError as error:  # a compiler's or a driver's: the others may do
                row.note = str(error).splitlines()[0]
                continue
            if kernel not in best or row.ms < best[kernel].ms:
                best[kernel] = row
        missing = {"ffn_up", "ffn_dact"} - best.keys()
        if missing:
            notes = "; ".join(f"{row.kernel}: {row.note}" for row in rows if row.note)
            raise RuntimeError(f"no configuration of {', '.join(sorted(missing))} runs: {notes}")
        bar.set_description("split")
        pair = best["ffn_up"].config, best["ffn_dact"].config
        rows.append(Row("split", pair[0], timer(partial(operands.split, *pair))))
        bar.update()
    wins = "ffn_recompute" in best and best["ffn_recompute"].ms < rows[-1].ms
    configs = {kernel: row.config for kernel, row in best.items()}
    for row in best.values():
        row.note = "best"
    return Tuning("fused" if wins else "split", configs), rows


def run(
    *,
    shape: str = "llama-3-8b",
    parts: Sequence[str] = PARTS,
    hidden_size: int | None = None,
    intermediate_size: int | None = None,
    dtype: str = "bf16",
    tokens: int = 4096,
    seq_lens: Sequence[int] = SEQ_LENS,
    window: int | None = None,
    packed: bool = False,
    device: str = "cuda",
    timer: Timer = device_milliseconds,
) -> int:
    """The command: measures, prints, keeps. What is done when it is interrupted is kept.

    Args:
        shape: a name from `SHAPES`.
        parts: names from `PARTS`: what is measured.
        hidden_size: of the FFN, instead of the shape's.
        intermediate_size: likewise.
        dtype: a name from `DTYPES`.
        tokens: rows of a call of the FFN.
        seq_lens: of attention; each stands for the lengths up to the next power of two.
        window: of attention, instead of the shape's.
        packed: whether attention is over packed sequences.
        device: a GPU.
        timer: how a call is timed.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for sizes below 1, unknown names, or a device that is no GPU.
        OSError: if the file cannot be written.
    """
    choose("shape", shape, SHAPES)
    for part in parts:
        choose("parts", part, PARTS)
    spec = SHAPES[shape]
    h = spec.hidden_size if hidden_size is None else hidden_size
    f = spec.intermediate_size if intermediate_size is None else intermediate_size
    sizes = [("hidden_size", h), ("intermediate_size", f), ("tokens", tokens)]
    sizes += [("seq_lens", length) for length in seq_lens]
    sizes += [] if window is None else [("window", window)]
    for name, value in sizes:
        check_positive(name, value)
    choose("dtype", dtype, [name for name, d in DTYPES.items() if d in KERNEL_DTYPES])
    check_device(device)
    if torch.device(device).type != "cuda":
        raise ValueError("device is 'cpu', expected 'cuda': a CPU has no kernels to tune")
    place = torch.device("cuda", torch.cuda.current_device())
    if "ffn" in parts:
        measured = Shape(h, f, spec.gated, DTYPES[dtype])
        best, rows = tune(measured, place, kind=spec.hidden_act, tokens=tokens, timer=timer)
        print(frame(rows).to_string(index=False))
        print(f"a dropped preact is rebuilt by: {best.strategy}")
        print(f"wrote {save(measured, place, best)}")
    if "attention" in parts:
        requests = [
            tune_attention.request_of(
                spec, DTYPES[dtype], place, length, window=window, packed=packed
            )
            for length in seq_lens
        ]
        tune_cores(requests, spec.num_attention_heads, spec.num_key_value_heads, timer=timer)
    return 0


def tune_cores(
    requests: Sequence[AttentionRequest],
    heads: int,
    kv_heads: int,
    *,
    timer: Timer = device_milliseconds,
) -> None:
    """Measure attention cores, print the table, and keep each request's times once they are there.

    Args:
        requests: what is asked for.
        heads: of q.
        kv_heads: of k and v.
        timer: how a call is timed.
    """
    rows: list[tune_attention.AttentionRow] = []
    path = None
    total = len(requests) * len(tune_attention.NAMES)
    try:
        with progress_bar(total=total, unit="core") as bar:
            for request in requests:
                found = tune_attention.measure(request, heads, kv_heads, timer=timer, bar=bar)
                path = save_attention(request, {row.name: row.ms for row in found if row.kept})
                rows += found
    finally:
        if rows:
            print(tune_attention.frame(rows).to_string(index=False))
            print(f"wrote {path}")


def frame(rows: list[Row]) -> pd.DataFrame:
    """The measurements as a table."""
    return pd.DataFrame(
        {
            "kernel": row.kernel,
            "tile": f"{row.config.block_m}x{row.config.block_n}x{row.config.block_k}",
            "warps": row.config.num_warps,
            "stages": row.config.num_stages,
            "ms": f"{row.ms:.3f}",
            "": row.note,
        }
        for row in rows
    )
