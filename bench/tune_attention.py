"""The attention part of `backfuse tune`: every core that can do what is asked, on this GPU.

Forward and backward of each, at lengths that stand for their powers of two. Flash counts twice, as
it is and under `torch.use_deterministic_algorithms(True)`. A core of which `auto` expects the same
bits each time is remembered only if it gave them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
import torch.utils.deterministic
from torch import Tensor

from backfuse import BlockSpec
from backfuse.kernels.attention_delta import attention_delta
from backfuse.kernels.cores.abilities import obstacle
from backfuse.kernels.cores.choose import load
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask
from backfuse.kernels.reference.qk_rope import QKSpec

#: Names of the records, and the core each one is of (see `cores/choose.py`).
NAMES = {
    "triton": "triton",
    "flash": "flash",
    "flash deterministic": "flash",
    "cudnn": "cudnn",
    "fa3": "fa3",
    "fa4": "fa4",
}

#: Those that need not give the same bits: `auto` leaves them out, `sdpa` does not.
LOOSE = ("flash", "cudnn")

#: Tokens of a call, in as many sequences as that makes.
TOKENS = 16384

#: How often bits are compared.
REPEATS = 3


def request_of(
    spec: BlockSpec,
    dtype: torch.dtype,
    device: torch.device,
    length: int,
    *,
    window: int | None = None,
    packed: bool = False,
) -> AttentionRequest:
    """What a block would ask for.

    Args:
        spec: the block.
        dtype: of q, k and v.
        device: where they are.
        length: tokens of a sequence.
        window: instead of the block's.
        packed: whether sequences stand behind each other.
    """
    mask = AttentionMask(
        causal=spec.causal,
        window=spec.sliding_window if window is None else window,
        softcap=spec.attn_logit_softcapping,
        scale=spec.attention_scale,
        max_seqlen=length if packed else None,
    )
    tokens = length * max(1, TOKENS // length) if packed else length
    return AttentionRequest(mask, dtype, device, tokens, spec.head_dim, packed=packed)


class Step:
    """Random tensors, and a forward and backward pass over them.

    Args:
        request: what is asked for.
        heads: of q.
        kv_heads: of k and v.
    """

    def __init__(self, request: AttentionRequest, heads: int, kv_heads: int) -> None:
        self.request = request
        dim = request.head_dim
        batch = 1 if request.packed else max(1, TOKENS // request.tokens)
        shape = (batch, request.tokens, heads + 2 * kv_heads, dim)
        # q, k and v side by side in one buffer, as a block has them
        buffer = torch.randn(shape, device=request.device).to(request.dtype)
        self.heads = buffer.split([heads, kv_heads, kv_heads], 2)
        self.dout = torch.randn_like(self.heads[0])
        self.cu_seqlens = None
        if request.packed:
            self.cu_seqlens = torch.arange(
                0, request.tokens + 1, request.longest, dtype=torch.int32, device=request.device
            )
        self.spec = QKSpec(heads * dim, kv_heads * dim, dim)

    def run(self, core: str) -> list[Tensor]:
        """Output, LSE and gradients."""
        functions: Any = load(core)
        mask = self.request.mask
        options = {"cu_seqlens": self.cu_seqlens}
        out, lse = functions.attention_forward(*self.heads, mask, **options)
        delta = None
        if functions.needs_delta(self.request):
            batch, tokens, heads, _ = out.shape
            rows = torch.empty(batch * tokens, heads, device=out.device)
            flat, dflat = (x.flatten(2).flatten(0, 1) for x in (out, self.dout))
            attention_delta(flat, dflat, rows, self.spec)
            delta = rows.view(batch, tokens, heads).transpose(1, 2)
        *grads, _ = functions.attention_backward(
            self.dout, *self.heads, out, lse, mask, delta=delta, **options
        )
        return [out, lse, *grads]


@dataclass
class AttentionRow:
    """One measurement.

    Attributes:
        length: tokens of a sequence.
        name: a key of `NAMES`.
        ms: milliseconds of forward and backward; NaN if it did not run.
        note: what is to be said of it.
        kept: whether it is to be remembered.
    """

    length: int
    name: str
    ms: float = float("nan")
    note: str = ""
    kept: bool = False


@contextlib.contextmanager
def determinism(on: bool) -> Iterator[None]:
    """PyTorch's flag, without its filling of fresh memory, which would be timed too."""
    settings: Any = torch.utils.deterministic
    fills, mode = settings.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    settings.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(on)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        settings.fill_uninitialized_memory = fills


def measure(
    request: AttentionRequest,
    heads: int,
    kv_heads: int,
    *,
    timer: Callable[[Callable[[], Any]], float],
    bar: Any,
) -> list[AttentionRow]:
    """Measure all cores that can do what is asked.

    Args:
        request: what is asked for.
        heads: of q.
        kv_heads: of k and v.
        timer: how a call is timed, in milliseconds.
        bar: is told of each of them.
    """
    step = Step(request, heads, kv_heads)
    rows = []
    for name, core in NAMES.items():
        bar.set_description(f"{name}, {request.longest} tokens")
        row = AttentionRow(request.longest, name)
        rows.append(row)
        with determinism(name == "flash deterministic"):
            row.note = obstacle(core, request) or ""
            if not row.note:
                _measure(row, partial(step.run, core), timer)
        bar.update()
    able = [row for row in rows if row.kept and row.name not in (*LOOSE, "flash deterministic")]
    if able:
        min(able, key=lambda row: row.ms).note = "auto"
    return rows


def _measure(
    row: AttentionRow,
    run: Callable[[], list[Tensor]],
    timer: Callable[[Callable[[], Any]], float],
) -> None:
    """Fill a row in: whether it runs, gives the same bits, and how long it takes."""
    try:
        first = run()
        same = all(
            torch.equal(a, b) for _ in range(REPEATS) for a, b in zip(first, run(), strict=True)
        )
        row.ms = timer(run)
    except (RuntimeError, AssertionError) as error:  # a library's own: the others may do
        row.note = str(error).splitlines()[0] if str(error) else repr(error)
        return
    row.kept = same or row.name in LOOSE
    if not same:
        row.note = "other bits each time"


def frame(rows: list[AttentionRow]) -> pd.DataFrame:
    """The measurements as a table."""
    return pd.DataFrame(
        {
            "tokens": row.length,
            "attention core": row.name,
            "ms": f"{row.ms:.3f}" if row.ms == row.ms else "",
            "": row.note,
        }
        for row in rows
    )
