"""One kernel in one configuration, and the operands that the cases of a size share.

What a case runs is a function of the operations (the kernels or the reference), a cast of its
operands, and its outputs: run with the reference and operands in higher precision, it says how far
the kernel is off.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backfuse import BlockSpec
from backfuse.kernels import reference
from backfuse.kernels.configs import Config

from .problem import relative_error, rounding

Cast = Callable[[Any], Any]
Outputs = dict[str, Tensor]
Run = Callable[..., Any]


@dataclass
class Case:
    """One kernel in one configuration, and what was measured of it.

    Attributes:
        kernel: its name.
        variant: what it is asked to write, and from what.
        call: runs it.
        work: FLOPs, or bytes, of a call.
        baseline: whose rate it is held against; None for its own.
        check: gives its error, the largest relative norm of a result's difference from the
            reference's; None where there is nothing to prove.
        limit: the error above which it is WRONG.
        split: of a fused rebuild: the same work by `split`.
        memory: of a baseline: whether `work` is bytes.
        config: its configuration, as text.
        default: whether the launcher would choose that one.
        error: see `check`.
        status: `ok`, `WRONG`, or why there is no time.
        seconds: one a round.
    """

    kernel: str
    variant: str
    call: Callable[[], Any]
    work: float
    baseline: Case | None = None
    check: Callable[[], float] | None = None
    limit: float = math.inf
    split: Case | None = None
    memory: bool = False
    config: str = ""
    default: bool = True
    error: float = math.nan
    status: str = "ok"
    seconds: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Kernel, variant and configuration."""
        return " ".join(filter(None, (self.kernel, self.variant, self.config)))

    def verify(self) -> None:
        """Runs the check, or the case itself where there is none; marks what is WRONG."""
        if self.check is None:
            self.call()
            return
        self.error = self.check()
        if not self.error <= self.limit:
            self.status = "WRONG"


@dataclass(frozen=True)
class Sizes:
    """What the cases are made for.

    Attributes:
        spec: the block.
        tokens: rows of a call.
        dtype: of the operands.
        device: where they are.
        exact: dtype of the reference.
    """

    spec: BlockSpec
    tokens: int
    dtype: torch.dtype
    device: str
    exact: torch.dtype = torch.float32


class Operands:
    """Random tensors that the cases of one size share.

    Attributes:
        x, dy, residual: `[M, h]`.
        hidden: `[M, f]`.
        preact, dpreact: `[M, 2 f or f]`; the second is written.
        stacked: the first projections' weights `[2 f or f, h]`.
        bias: theirs, or None.
        down: `[h, f]`.
        act: the activation, and whether there is a gate.
        layouts: whether the first projections' weights are one tensor.
    """

    def __init__(self, sizes: Sizes) -> None:
        self.spec, self.M = sizes.spec, sizes.tokens
        self.device, self.dtype = torch.device(sizes.device), sizes.dtype
        self.exact = sizes.exact
        h, f, width = self.spec.hidden_size, self.spec.intermediate_size, self.spec.preact_size
        self.x, self.dy, self.residual = (self.make(self.M, h) for _ in range(3))
        self.hidden, self.preact = self.make(self.M, f), self.make(self.M, width)
        self.dpreact = torch.empty_like(self.preact)
        self.stacked = self.make(width, h, scale=h**-0.5)
        self.bias = self.make(width) if self.spec.up_bias else None
        self.down = self.make(h, f, scale=f**-0.5)
        self.act = (self.spec.hidden_act, self.spec.gated)
        self.layouts = (False, True) if self.spec.gated else (False,)

    def make(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers, never zeros: those would need less power, and run faster."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype).mul_(scale)

    def up(self, stacked: bool, cast: Cast) -> tuple[Any, ...]:
        """Arguments of the first projections, whose weights are one tensor or one each."""
        width = self.spec.preact_size if stacked else self.spec.intermediate_size
        weights = [cast(weight) for weight in self.stacked.split(width)]
        biases = len(weights) * [None] if self.bias is None else self.bias.split(width)
        return cast(self.x), weights, [cast(bias) for bias in biases], *self.act

    def flops(self, width: int) -> float:
        """Of a GEMM between the residual stream and so many columns."""
        return 2.0 * self.M * self.spec.hidden_size * width

    def case(
        self,
        kernel: str,
        variant: str,
        run: Run,
        ops: Any,
        outputs: Outputs,
        work: float,
        baseline: Case,
        terms: int,
        split: Case | None = None,
        **options: Any,
    ) -> Case:
        """The case that times `run(ops, cast, outputs, **options)`, which sums over `terms`."""
        call = partial(run, ops, same, outputs, **options)
        check = partial(error_of, run, ops, outputs, options, self.exact)
        limit = rounding(self.dtype, terms)
        return Case(kernel, variant, call, work, baseline, check, limit, split)


def same(x: Tensor | None) -> Tensor | None:
    """The cast of what is timed."""
    return x


def wide(exact: torch.dtype) -> Cast:
    """The cast of what it is held against."""
    return lambda x: None if x is None else x.to(exact)


def error_of(
    run: Run, ops: Any, outputs: Outputs, options: dict[str, Any], exact: torch.dtype
) -> float:
    """The largest relative error of what `run` returns and writes."""
    for x in outputs.values():
        x.fill_(math.nan)  # what a kernel leaves out shows
    right_outputs = {name: torch.empty_like(x, dtype=exact) for name, x in outputs.items()}
    results = run(ops, same, outputs, **options)
    right = run(reference, wide(exact), right_outputs)
    pairs = list(zip(outputs.values(), right_outputs.values(), strict=True))
    if isinstance(results, tuple):
        pairs += zip(results, right, strict=True)
    else:
        pairs.append((results, right))
    return max(relative_error(a, b) for a, b in pairs if b is not None)


def config_text(config: Config) -> str:
    """A configuration in a few characters: tile and epilogue parts, warps, stages."""
    tile = f"{config.block_m}x{config.block_n}x{config.block_k}/{config.split}"
    return f"{tile} {config.num_warps}w {config.num_stages}s"
