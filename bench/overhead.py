"""`backfuse bench overhead`: what Python takes to launch a pass, the launches themselves left out.

Kernels and GEMMs are replaced by functions that do nothing; what is left is the launch path:
checks, plans, allocations, autograd. On a GPU that runs beside the kernels, unless they are
shorter. For comparison, an autograd function that only saves and returns tensors, as many as the
FFN half's; and one that makes the FFN half's tensors as well (`selective`, fused: scratch, outputs,
gradients), and does nothing to them. No launch path in Python can take less than that.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pandas as pd
import torch
from torch import Tensor

from backfuse import BlockSpec, TransformerBlock, attention, ffn

from .measure import Spread, no_collection
from .options import check_device, check_positive, progress_bar, writable_folder

#: A pass runs on these: small, so that allocations are; widths that descriptors can describe.
SPEC = BlockSpec(64, 128, 4, 2)
TOKENS = 128

Pass = Callable[[], Tensor]


class _NoLaunch:
    """Stands in a kernel's place, and counts."""

    def __init__(self, counts: Counter[str]) -> None:
        self.counts = counts

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        self.counts["kernels"] += 1
        return self._run

    @staticmethod
    def _run(*args: Any, **options: Any) -> None:
        pass


@contextmanager
def launches_stubbed() -> Iterator[Counter[str]]:
    """Kernels and GEMMs do nothing within; gives how many were called of each."""
    from triton import JITFunction
    from triton.runtime.interpreter import InterpretedFunction

    import backfuse.kernels

    counts: Counter[str] = Counter()

    def product(rows: Tensor, columns: Tensor, out: Tensor | None, dtype: Any) -> Tensor:
        counts["gemms"] += 1
        if out is not None:
            return out
        return rows.new_empty(rows.shape[0], columns.shape[1], dtype=dtype)

    def mm(a: Tensor, b: Tensor, out_dtype: Any = None, *, out: Tensor | None = None) -> Tensor:
        return product(a, b, out, out_dtype)

    def addmm(
        c: Tensor,
        a: Tensor,
        b: Tensor,
        out_dtype: Any = None,
        *,
        alpha: float = 1.0,
        out: Tensor | None = None,
    ) -> Tensor:
        return product(a, b, out, out_dtype)

    with ExitStack() as stack:
        for module in pkgutil.iter_modules(backfuse.kernels.__path__, "backfuse.kernels."):
            found = importlib.import_module(module.name)
            for name, value in list(vars(found).items()):
                own = isinstance(value, JITFunction | InterpretedFunction)
                if own and name.endswith("_kernel"):
                    stack.enter_context(mock.patch.object(found, name, _NoLaunch(counts)))
        stack.enter_context(mock.patch.object(torch, "mm", mm))
        stack.enter_context(mock.patch.object(torch, "addmm", addmm))
        yield counts


class _Empty(torch.autograd.Function):
    """Saves and returns; the least that any function written in Python takes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        z = torch.empty_like(x)
        ctx.save_for_backward(x, *weights)
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, ...]:
        return ctx.saved_tensors


class _Tensors(torch.autograd.Function):
    """Makes the tensors of the FFN half's passes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> Tensor:
        tokens = len(x)
        normed, z = torch.empty_like(x), torch.empty_like(x)
        hidden = x.new_empty(tokens, SPEC.intermediate_size)
        statistics = x.new_empty(1, tokens, dtype=torch.float32)
        ctx.save_for_backward(x, statistics, *weights)
        del normed, hidden
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, ...]:
        x, _, *weights = ctx.saved_tensors
        dpreact = x.new_empty(len(x), SPEC.preact_size)
        hidden = x.new_empty(len(x), SPEC.intermediate_size)
        normed, dnormed, dx = (torch.empty_like(x) for _ in range(3))
        rows = x.new_empty(1, SPEC.hidden_size, dtype=torch.float32)
        del dpreact, hidden, normed, dnormed, rows
        return dx, *(torch.empty_like(weight) for weight in weights)


def passes(device: torch.device) -> tuple[dict[str, Pass], list[Tensor]]:
    """The forward passes by name, and what they compute gradients of."""
    policies = ("keep", "selective", "full")
    blocks = {
        policy: TransformerBlock(
            SPEC, policy, impl="triton", ffn_strategy="fused", device=device, dtype=torch.bfloat16
        )
        for policy in policies
    }
    weights = dict(blocks["keep"].named_parameters())
    x = torch.randn(1, TOKENS, SPEC.hidden_size, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    saved = [weights[name] for name in SPEC.ffn_parameters()]

    def alone(function: type[_Empty | _Tensors]) -> Pass:
        return lambda: function.apply(x.flatten(0, 1), *saved).view(x.shape)

    def of_ffn(policy: str) -> Pass:
        return lambda: ffn(x, weights, SPEC, policy, impl="triton", ffn_strategy="fused")

    def of_attention(policy: str) -> Pass:
        return lambda: attention(x, weights, SPEC, policy, impl="triton")

    def of_block(policy: str) -> Pass:
        return lambda: blocks[policy](x)

    calls = {"empty function": alone(_Empty), "tensors of ffn": alone(_Tensors)}
    for policy in policies:
        calls[f"ffn {policy}"] = of_ffn(policy)
    for policy in policies:
        calls[f"attention {policy}"] = of_attention(policy)
    for policy in policies:
        calls[f"block {policy}"] = of_block(policy)
    return calls, [x, *(p for block in blocks.values() for p in block.parameters())]


def measure(device: torch.device, repeats: int) -> pd.DataFrame:
    """A row a pass: microseconds of forward and backward, kernels and GEMMs that were launched."""
    calls, leaves = passes(device)
    rows = []
    with launches_stubbed() as counts, progress_bar(total=len(calls), unit="pass") as bar:
        for name, call in calls.items():
            bar.set_description(name)
            rows.append({"pass": name, **_one(call, leaves, counts, repeats)})
            bar.update()
    return pd.DataFrame(rows)


def _one(call: Pass, leaves: list[Tensor], counts: Counter[str], repeats: int) -> dict[str, Any]:
    gradient = torch.ones_like(call())
    laps: dict[str, list[float]] = {"forward": [], "backward": []}
    launched: dict[str, int] = {}
    with no_collection():
        for _ in range(repeats):
            for leaf in leaves:
                leaf.grad = None
            counts.clear()
            start = time.perf_counter()
            z = call()
            middle = time.perf_counter()
            forward = dict(counts)
            z.backward(gradient)
            end = time.perf_counter()
            laps["forward"].append(middle - start)
            laps["backward"].append(end - middle)
            for what in ("kernels", "gemms"):
                launched[f"forward_{what}"] = forward.get(what, 0)
                launched[f"backward_{what}"] = counts[what] - forward.get(what, 0)
    row: dict[str, Any] = {}
    for name, seconds in laps.items():
        spread = Spread.of([1e6 * second for second in seconds[len(seconds) // 10 :]])
        row[f"{name}_us"] = round(spread.median, 1)
        row[f"{name}_us_p20"], row[f"{name}_us_p80"] = round(spread.p20, 1), round(spread.p80, 1)
    return {**row, **launched}


def run(device: str | None = None, repeats: int = 2000, csv: Path | None = None) -> int:
    """Measures and prints.

    Args:
        device: cpu or cuda; None: a GPU if there is one.
        repeats: passes of each kind.
        csv: where the table goes as well.

    Returns:
        0.
    """
    check_positive("repeats", repeats)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    if csv is not None:
        writable_folder(csv.parent)
    chosen = torch.device(device)
    if chosen.type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: kernels that need no GPU
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        table = measure(chosen, repeats)
    finally:
        torch.set_num_threads(threads)
    print(table.to_string(index=False))
    print(f"\nmicroseconds on the host of {chosen.type}, median and 20th to 80th percentile")
    if csv is not None:
        table.to_csv(csv, index=False)
        print(f"wrote {csv}")
    return 0
