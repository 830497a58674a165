"""One operation at one size: what everybody who computes it shares, and one step of each.

A `Case` says what is asked, a `Problem` holds the module in plain PyTorch, its inputs and its
output's gradients, a `Contender` is one way to compute it with those very weights and inputs. A
`Step` runs contenders: forward, backward and, where there is one, the optimizer; and examines
them: what they hold for backward, how high they peak, how far they are from an exact run.
"""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from backfuse import BlockSpec, kept_bytes

from . import measure
from .options import DTYPES
from .ways import Way, checkpointed, eager

Run = Callable[..., Any]
Named = dict[str, Tensor]

#: FLOPs up to which the exact run is in fp64, by the kind of device.
EXACT_FLOPS = {"cpu": 3e11, "cuda": 3e13}

#: Seconds a contender runs in each round on a GPU, and how often it does so.
ROUND_SECONDS, LEAST_REPEATS, MOST_REPEATS = 0.1, 3, 100

MODES = ("fwd", "bwd", "both")


@dataclass(frozen=True)
class Case:
    """What is asked.

    Attributes:
        op: name of the operation.
        shape: name of the shape.
        spec: the block of that name.
        layers: blocks, where there are several.
        batch_size: sequences.
        seq_len: tokens of each.
        dtype: a name from `DTYPES`.
        device: `cpu` or `cuda`.
        seed: of weights and inputs.
    """

    op: str
    shape: str
    spec: BlockSpec
    layers: int
    batch_size: int
    seq_len: int
    dtype: str
    device: str
    seed: int = 0

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.batch_size * self.seq_len

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype."""
        return DTYPES[self.dtype]

    @property
    def factory(self) -> dict[str, Any]:
        """Keyword arguments that make tensors."""
        return {"device": self.device, "dtype": self.torch_dtype}

    @property
    def cuda(self) -> bool:
        """Whether it runs on a GPU."""
        return torch.device(self.device).type == "cuda"

    def title(self) -> str:
        """One line that says what is measured."""
        blocks = f", {self.layers} blocks" if self.layers > 1 else ""
        return (
            f"{self.op} {self.shape}{blocks}, {self.batch_size} x {self.seq_len:,} tokens, "
            f"{self.dtype}"
        )

    def kept(self, policy: str) -> int:
        """Bytes that a block keeps for backward under a policy of ours."""
        kept = kept_bytes(
            self.spec, policy, batch_size=self.batch_size, seq_len=self.seq_len,
            dtype=self.torch_dtype,
        )  # fmt: skip
        return sum(kept.values())


@dataclass
class Problem:
    """What all contenders share.

    Attributes:
        case: what is asked.
        module: the operation in plain PyTorch, with the weights that all share.
        inputs: by name; floating ones want gradients.
        kind: what the module is.
        precise: makes a copy of the module in a dtype that computes in nothing less.
        apply: given a way and the module (or a copy of it), the function of the inputs that runs
            it in that way.
        attention: FLOPs of the attention cores' forward pass.
        moved: bytes that forward and backward have to read and write, for an operation that is
            bound by them; None for others.
        train: whether a step includes one of AdamW.
    """

    case: Case
    module: nn.Module
    inputs: Named
    kind: str = "PyTorch modules"
    precise: Callable[[Any, torch.dtype], nn.Module] = lambda module, dtype: copy.deepcopy(
        module
    ).to(dtype)
    apply: Callable[[Way, Any], Run] = lambda way, module: way(module)
    attention: float = 0.0
    moved: tuple[float, float] | None = None
    train: bool = False

    @cached_property
    def douts(self) -> tuple[Tensor | None, ...]:
        """The output's gradients, random; None for a loss."""
        with torch.no_grad():
            outputs = as_tuple(self.apply(eager, self.module)(*self.inputs.values()))
        return tuple(None if out.ndim == 0 else torch.randn_like(out) for out in outputs)

    def flops(self, mode: str) -> float:
        """Of the GEMMs of a step that recomputes nothing; causal attention counts at half."""
        tables = {id(m.weight) for m in self.module.modules() if isinstance(m, nn.Embedding)}
        matrices = [p for p in self.module.parameters() if p.ndim == 2 and id(p) not in tables]
        passes = 2.0 * self.case.tokens
        linear = passes * sum(p.numel() for p in matrices)
        weights = passes * sum(p.numel() for p in matrices if p.requires_grad)
        forward, backward = linear + self.attention, linear + weights + 2.5 * self.attention
        return {"fwd": forward, "bwd": backward, "both": forward + backward}[mode]

    def bytes_moved(self, mode: str) -> float:
        """See `moved`; NaN for other operations."""
        if self.moved is None:
            return math.nan
        return {"fwd": self.moved[0], "bwd": self.moved[1], "both": sum(self.moved)}[mode]


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """One output, or several, as several."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


@dataclass
class Contender:
    """One way to compute a problem, and what was measured of it.

    Attributes:
        provider: whose it is.
        run: the forward pass.
        parameters: what gets gradients besides the inputs.
        policy: of ours; "" where there is none.
        rename: from its gradients to those of the module's parameters.
        overwrites: whether it writes over the outputs' gradients, and needs its own.
        note: what is to be said in the row.
        kept_bytes: after a forward pass, for its backward.
        peak_bytes: of forward and backward, above inputs and weights; gradients count.
        gemms: of forward and backward, calls; NaN where some are inside kernels.
        flops: of GEMMs and attention as they ran, what is recomputed included; NaN likewise.
        errors: of output and gradients, relative norms.
        status: `ok`, `WRONG`, `failed` or `skipped`.
        timeline: milliseconds and bytes of a step, for the picture; empty without one.
        repeats: steps in each round.
        laps: by round and step, seconds of forward, backward and what follows.
    """

    provider: str
    run: Run
    parameters: Mapping[str, Tensor]
    policy: str = ""
    rename: Callable[[Named], Named] = dict
    overwrites: bool = False
    note: str = ""
    kept_bytes: float = math.nan
    peak_bytes: float = math.nan
    gemms: float = math.nan
    flops: float = math.nan
    errors: dict[str, float] = field(default_factory=dict)
    status: str = "ok"
    timeline: list[tuple[float, int]] = field(default_factory=list)
    repeats: int = 1
    laps: list[list[list[float]]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Provider and policy."""
        return f"{self.provider} {self.policy}".rstrip()

    @property
    def compiled(self) -> bool:
        """Whether its first run compiles, and a dispatch mode would see nothing of it."""
        return self.provider.startswith(("compile", "flex")) or self.provider.endswith("-compile")

    @property
    def opaque(self) -> bool:
        """Whether it multiplies in kernels that PyTorch does not see into."""
        opaque = ("backfuse-triton", "backfuse-fused", "flash", "flex", "liger", "quack", "te")
        return self.provider.startswith(opaque)

    def rounds(self, mode: str) -> list[float]:
        """Seconds of the median step of each round."""
        part: Callable[[list[float]], float] = {
            "fwd": lambda laps: laps[0],
            "bwd": lambda laps: laps[1],
            "both": sum,
        }[mode]
        return [statistics.median(map(part, steps)) for steps in self.laps]

    def steps(self, mode: str) -> list[float]:
        """Seconds of every step."""
        flat = Contender("", self.run, {}, laps=[[step] for steps in self.laps for step in steps])
        return flat.rounds(mode)


class Step:
    """Forward and backward of a contender on the problem's inputs."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.device = problem, torch.device(problem.case.device)
        self.inputs = problem.inputs
        self.leaves = {n: x for n, x in self.inputs.items() if x.is_floating_point()}
        for leaf in self.leaves.values():
            leaf.requires_grad_()
        self._optimizers: dict[str, torch.optim.Optimizer] = {}

    def clear(self, contender: Contender) -> None:
        """Drops every gradient, so that the next step makes its own."""
        for owner in (*self.leaves.values(), *contender.parameters.values()):
            owner.grad = None

    def __call__(self, contender: Contender, mark: Callable[[], None] = lambda: None) -> Any:
        """The outputs; `mark` is called before, between and after the parts."""
        self.clear(contender)
        douts = self.problem.douts
        if contender.overwrites:
            douts = tuple(None if dout is None else dout.clone() for dout in douts)
        mark()
        outputs = as_tuple(contender.run(*self.inputs.values()))
        mark()
        torch.autograd.backward(outputs, douts)
        mark()
        if self.problem.train:
            self._optimizer(contender).step()
            mark()
        return outputs

    def _optimizer(self, contender: Contender) -> torch.optim.Optimizer:
        """AdamW that moves nothing, at the cost of one that does: the weights are everybody's."""
        if contender.name not in self._optimizers:
            parameters = list(contender.parameters.values())
            self._optimizers[contender.name] = torch.optim.AdamW(parameters, lr=0.0)
        return self._optimizers[contender.name]

    def results(self, contender: Contender, outputs: tuple[Tensor, ...]) -> Named:
        """Outputs and gradients after a step, by name."""
        owners = contender.parameters.items()
        found = contender.rename({name: p.grad for name, p in owners if p.grad is not None})
        found |= {name: x.grad for name, x in self.leaves.items() if x.grad is not None}
        return found | {f"output {i}": out.detach() for i, out in enumerate(outputs)}

    def exact(self) -> Named:
        """The same from a run in fp64, or in fp32 where that would take too long or too much."""
        problem = self.problem
        case = problem.case
        # PyTorch's only fp64 attention on CUDA writes out all scores.
        large = problem.flops("both") > EXACT_FLOPS[self.device.type]
        short = large or (case.cuda and problem.attention > 0)
        dtype = torch.float64 if case.dtype == "fp64" or not short else torch.float32
        module = problem.precise(problem.module, dtype)
        inputs = {
            name: x.detach().to(dtype).requires_grad_() if x.is_floating_point() else x
            for name, x in self.inputs.items()
        }
        outputs = as_tuple(problem.apply(checkpointed, module)(*inputs.values()))
        douts = [None if dout is None else dout.to(dtype) for dout in problem.douts]
        torch.autograd.backward(outputs, douts)
        owners = dict(module.named_parameters()) | inputs
        gradients = {name: owner.grad for name, owner in owners.items() if owner.grad is not None}
        return gradients | {f"output {i}": out.detach() for i, out in enumerate(outputs)}

    def examine(self, contender: Contender, exact: Named | None) -> None:
        """Measures bytes and errors, after a warm-up where a first run allocates more."""
        self.clear(contender)
        if self.problem.case.cuda or contender.compiled:
            self(contender)
            self.clear(contender)
        inputs = self.inputs.values()
        contender.kept_bytes = measure.held_bytes(contender.run, *inputs, device=self.device)
        outputs: list[tuple[Tensor, ...]] = []
        train, self.problem.train = self.problem.train, False  # peaks without optimizer states
        counter = measure.GemmCounter()
        try:
            with nullcontext() if contender.compiled else counter:
                trace = measure.allocator_trace(
                    lambda: outputs.append(self(contender)), self.device
                )
        finally:
            self.problem.train = train
        contender.peak_bytes, contender.timeline = trace.peak_bytes, trace.timeline
        seen = trace if contender.compiled else counter
        if not contender.opaque:
            contender.gemms, contender.flops = seen.gemms, seen.flops
        if exact is not None:
            contender.errors = errors(self.results(contender, outputs[0]), exact)
        if self.problem.train:
            self(contender)  # makes the optimizer's state
        if self.problem.case.cuda:
            [passes] = measure.laps(partial(self, contender), self.device)
            repeats = int(ROUND_SECONDS / max(sum(passes), 1e-6))
            contender.repeats = min(max(repeats, LEAST_REPEATS), MOST_REPEATS)
        self.clear(contender)

    def time(self, contender: Contender) -> None:
        """One round."""
        laps = measure.laps(partial(self, contender), self.device, contender.repeats)
        contender.laps.append(laps)
        self.clear(contender)


def plain(problem: Problem, way: Way = eager, name: str = "eager") -> Contender:
    """The problem's own module, run in one of PyTorch's ways."""
    parameters = dict(problem.module.named_parameters())
    return Contender(name, problem.apply(way, problem.module), parameters, note=problem.kind)


def relative_error(found: Tensor, exact: Tensor, least: float = 0.0) -> float:
    """The norm of the difference, as a share of the exact one's or `least`; infinite for NaN."""
    norm = torch.linalg.vector_norm
    error = float(norm(found.to(exact.dtype) - exact) / norm(exact).clamp_min(max(least, 1e-30)))
    return error if error < math.inf else math.inf


def errors(found: Named, exact: Named) -> dict[str, float]:
    """The error of each tensor; infinite for one that is on one side only.

    A gradient that is nothing but rounding (that of a key's bias: softmax does not see it) has no
    relative error: none is held to less than a tenth of an average gradient's size.
    """
    gradients = [x for name, x in exact.items() if not name.startswith("output")]
    elements = sum(x.numel() for x in gradients)
    mean_square = sum(float(x.square().sum()) for x in gradients) / max(elements, 1)
    result = {}
    for name in sorted(found.keys() | exact.keys()):
        if name in found and name in exact:
            least = 0.1 * (mean_square * exact[name].numel()) ** 0.5
            result[name] = relative_error(found[name], exact[name], least)
        else:
            result[name] = math.inf
    return result


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The error that rounding explains: of a few operations, and of a sum of so many terms."""
    eps = torch.finfo(dtype).eps
    sums = min(eps, torch.finfo(torch.float32).eps)  # the dtype that sums are taken in
    return 4 * eps + 2 * terms**0.5 * sums
