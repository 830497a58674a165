"""The FFN half of a block (norm, FFN, residual): the ways to train it, and one step of each.

    eager                plain PyTorch modules that round where Hugging Face's do
    compile              torch.compile of that, nothing recomputed
    checkpoint           torch.utils.checkpoint around it, its defaults (early stop)
    compile-checkpoint   torch.compile of the checkpointed half
    liger                LigerSwiGLUMLP; norm and residual by PyTorch
    quack                QuACK's MLP, likewise
    quack-recompute      the same with recompute=True
    backfuse             policy keep; selective, with the rebuild split and fused

All share one set of weights, but for QuACK's, whose gate and up rows alternate in one matrix.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import backfuse
from backfuse import BlockSpec
from backfuse.kernels import reference
from backfuse.kernels.dispatch import operations

from . import measure, rivals

Run = Callable[[Tensor], Tensor]
Named = dict[str, Tensor]
Way = Callable[["PlainHalf", BlockSpec], "Contender"]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}

#: QuACK's names of activations, with a gate and without.
QUACK_GATED = {"silu": "swiglu", "gelu_tanh": "geglu", "relu": "reglu"}
QUACK_PLAIN = {"gelu_tanh": "gelu_tanh_approx", "silu": "silu", "relu": "relu", "relu2": "relu_sq"}

#: Tokens that the exact run takes at a time.
CHUNK = 1024

#: FLOPs up to which the exact run is in fp64, by the kind of device.
EXACT_FLOPS = {"cpu": 3e11, "cuda": 3e13}

#: Seconds a contender runs in each round on a GPU, and how often it does so.
ROUND_SECONDS, LEAST_REPEATS, MOST_REPEATS = 0.1, 3, 100


class PlainNorm(nn.Module):
    """RMSNorm in fp32 (fp64 for fp64), cast back before the weight, as Llama does."""

    def __init__(self, size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class PlainFFN(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))`."""

    def __init__(self, spec: BlockSpec, **factory: Any) -> None:
        super().__init__()
        h, f = spec.hidden_size, spec.intermediate_size
        self.gated = spec.gated
        self.act = ACTIVATIONS[spec.hidden_act]
        if self.gated:
            self.gate_proj = nn.Linear(h, f, bias=spec.up_bias, **factory)
        self.up_proj = nn.Linear(h, f, bias=spec.up_bias, **factory)
        self.down_proj = nn.Linear(f, h, bias=spec.down_bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act(self.up_proj(x)))


class PlainHalf(nn.Module):
    """The half in ordinary PyTorch, with a block's parameter names.

    Args:
        spec: a block with a norm before its FFN, and separate gate and up.
        device, dtype: of the parameters.
    """

    def __init__(self, spec: BlockSpec, **factory: Any) -> None:
        super().__init__()
        if spec.norm == "layernorm":
            norm: nn.Module = nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps, **factory)
        else:
            norm = PlainNorm(spec.hidden_size, spec.norm_eps, **factory)
        self.post_attention_layernorm = norm
        self.mlp = PlainFFN(spec, **factory)
        with torch.no_grad():
            for parameter in norm.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))

    def flops(self, tokens: int) -> int:
        """Matmul FLOPs of a step that recomputes nothing: what every contender has to do."""
        return 6 * tokens * sum(p.numel() for p in self.parameters() if p.ndim == 2)


@dataclass
class Contender:
    """One way to train the half, and what was measured of it.

    Attributes:
        name: of the row.
        run: the forward pass.
        parameters: what gets gradients.
        rename: from its gradients to those of `PlainHalf`'s parameters.
        ours: whether it is backfuse.
        held_bytes: after a forward pass, for its backward.
        peak_bytes: of a step, above input, weights and their gradients.
        output_error: relative norm of the output's difference from the exact one.
        gradient_error: the same of the gradients, the largest of all tensors.
        status: `ok` or `WRONG`.
        repeats: steps in each round.
        laps: by round and step, seconds of forward and backward.
    """

    name: str
    run: Run
    parameters: dict[str, nn.Parameter]
    rename: Callable[[Named], Named] = dict
    ours: bool = False
    held_bytes: int = 0
    peak_bytes: int = 0
    output_error: float = math.nan
    gradient_error: float = math.nan
    status: str = "ok"
    repeats: int = 1
    laps: list[list[list[float]]] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        """The median step of each round."""
        return [statistics.median(map(sum, steps)) for steps in self.laps]


def _checkpointed(half: nn.Module) -> Run:
    def run(x: Tensor) -> Tensor:
        return checkpoint(half, x, use_reentrant=False)

    return run


def eager(half: PlainHalf, spec: BlockSpec) -> Contender:
    """Autograd keeps what it likes."""
    return Contender("eager", half, dict(half.named_parameters()))


def compiled(half: PlainHalf, spec: BlockSpec) -> Contender:
    """One graph; its partitioner decides what is kept, at no cost in GEMMs."""
    run = torch.compile(half, fullgraph=True, dynamic=False)
    return Contender("compile", run, dict(half.named_parameters()))


def checkpointed(half: PlainHalf, spec: BlockSpec) -> Contender:
    """Only the input is kept."""
    return Contender("checkpoint", _checkpointed(half), dict(half.named_parameters()))


def compiled_checkpoint(half: PlainHalf, spec: BlockSpec) -> Contender:
    """The checkpoint inside the graph, as torchtitan has it."""
    run = torch.compile(_checkpointed(half), fullgraph=True, dynamic=False)
    return Contender("compile-checkpoint", run, dict(half.named_parameters()))


def liger(half: PlainHalf, spec: BlockSpec) -> Contender:
    """Liger's elementwise kernel between PyTorch's GEMMs."""
    from liger_kernel.transformers import LigerSwiGLUMLP

    config = SimpleNamespace(
        hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size, hidden_act="silu"
    )
    with torch.device("meta"):
        mlp = LigerSwiGLUMLP(config)
    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(getattr(mlp, name), "weight", getattr(half.mlp, name).weight)  # noqa: B010

    def run(x: Tensor) -> Tensor:
        return x + mlp(half.post_attention_layernorm(x))

    return Contender("liger", run, dict(half.named_parameters()))


def quack(half: PlainHalf, spec: BlockSpec, recompute: bool = False) -> Contender:
    """QuACK's fused GEMMs."""
    from quack.mlp import mlp_func

    mlp = half.mlp
    named = dict(half.named_parameters())
    names = [f"mlp.{name}_proj.weight" for name in (("gate", "up") if spec.gated else ("up",))]
    ups = [named.pop(name) for name in names]
    first = nn.Parameter(torch.stack([up.detach() for up in ups], 1).flatten(0, 1))
    activation = (QUACK_GATED if spec.gated else QUACK_PLAIN)[spec.hidden_act]

    def run(x: Tensor) -> Tensor:
        normed = half.post_attention_layernorm(x)
        down = mlp.down_proj.weight
        return x + mlp_func(normed, first, down, activation, recompute=recompute)

    def rename(gradients: Named) -> Named:
        found = dict(gradients)
        rows = found.pop("first").unflatten(0, (-1, len(names))).unbind(1)
        return found | dict(zip(names, rows, strict=True))

    name = "quack-recompute" if recompute else "quack"
    return Contender(name, run, named | {"first": first}, rename)


def ours(
    half: PlainHalf, spec: BlockSpec, name: str, policy: str, strategy: str = "auto"
) -> Contender:
    """`backfuse.ffn`."""
    weights = dict(half.named_parameters())
    run = partial(backfuse.ffn, weights=weights, spec=spec, policy=policy, ffn_strategy=strategy)
    return Contender(name, run, weights, ours=True)


#: Name of a rival -> how to make it.
WAYS: dict[str, Way] = {
    "eager": eager,
    "compile": compiled,
    "checkpoint": checkpointed,
    "compile-checkpoint": compiled_checkpoint,
    "liger": liger,
    "quack": quack,
    "quack-recompute": partial(quack, recompute=True),
}


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def missing(name: str, spec: BlockSpec, device: torch.device | str) -> str | None:
    """Why the rival `name` cannot run this half here, in one line; None if it can."""
    if name not in ("liger", "quack", "quack-recompute"):
        return rivals.missing(name, device)
    package, module = {"liger": ("liger-kernel", "liger_kernel")}.get(
        name, ("quack-kernels", "quack.mlp")
    )
    if not _installed(module):
        return f"{package} is not installed"
    if torch.device(device).type != "cuda":
        return f"{package} needs a GPU"
    if spec.up_bias or spec.down_bias:
        return f"{package} has no biases here"
    if name == "liger":
        gated_silu = spec.gated and spec.hidden_act == "silu"
        return None if gated_silu else "LigerSwiGLUMLP is a gated silu"
    if spec.hidden_act not in (QUACK_GATED if spec.gated else QUACK_PLAIN):
        return f"{package} has no {spec.hidden_act} of this kind"
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"{package} needs a compute capability of at least 9.0"
    return None


def use_kernels(spec: BlockSpec, device: torch.device | str, dtype: torch.dtype) -> bool:
    """Whether `backfuse.ffn` runs the Triton kernels here."""
    return operations("auto", torch.device(device), dtype, spec.hidden_size) is not reference


def own_ways(kernels: bool) -> dict[str, Way]:
    """Name of a row of ours -> how to make it."""
    ways: dict[str, Way] = {"backfuse keep": partial(ours, name="backfuse keep", policy="keep")}
    for strategy in ("split", "fused") if kernels else ("auto",):
        name = "backfuse selective" + (f" ({strategy})" if kernels else "")
        ways[name] = partial(ours, name=name, policy="selective", strategy=strategy)
    return ways


class Step:
    """Forward and backward of a contender on one fixed input `[1, tokens, h]`."""

    def __init__(
        self, half: PlainHalf, tokens: int, hidden_size: int, device: str, dtype: torch.dtype
    ) -> None:
        shape = (1, tokens, hidden_size)
        self.x, self.dy = (torch.randn(shape, device=device, dtype=dtype) for _ in range(2))
        self.x.requires_grad_()
        self.half, self.device = half, torch.device(device)

    def clear(self, contender: Contender) -> None:
        """Drops every gradient, so that the next step makes its own."""
        self.x.grad = None
        for parameter in contender.parameters.values():
            parameter.grad = None

    def __call__(self, contender: Contender, mark: Callable[[], None] = lambda: None) -> Tensor:
        """The output; `mark` is called before, between and after the two passes."""
        self.clear(contender)
        mark()
        z = contender.run(self.x)
        mark()
        z.backward(self.dy)
        mark()
        return z

    def results(self, contender: Contender, z: Tensor) -> Named:
        """Output and gradients after a step, by name."""
        owners = contender.parameters.items()
        found = contender.rename({name: p.grad for name, p in owners if p.grad is not None})
        if self.x.grad is not None:
            found["x"] = self.x.grad
        return found | {"output": z.detach()}

    def exact(self) -> Named:
        """The same from a run in fp64, or in fp32 where that would take too long."""
        flops, most = self.half.flops(self.x.shape[1]), EXACT_FLOPS[self.device.type]
        short = self.x.dtype != torch.float64 and flops > most
        dtype = torch.float32 if short else torch.float64
        wide = copy.deepcopy(self.half).to(dtype)
        outputs, inputs = [], []
        for part, dy in zip(self.x.split(CHUNK, 1), self.dy.split(CHUNK, 1), strict=True):
            leaf = part.detach().to(dtype).requires_grad_()
            z = wide(leaf)
            z.backward(dy.to(dtype))
            outputs.append(z.detach())
            assert leaf.grad is not None
            inputs.append(leaf.grad)
        gradients = {name: p.grad for name, p in wide.named_parameters() if p.grad is not None}
        return gradients | {"x": torch.cat(inputs, 1), "output": torch.cat(outputs, 1)}

    def examine(self, contender: Contender, exact: Named) -> None:
        """Measures bytes and errors, after a warm-up where a first run allocates more."""
        self.clear(contender)
        cuda = self.device.type == "cuda"
        if cuda or contender.name.startswith("compile"):
            self(contender)
            self.clear(contender)
        contender.held_bytes = measure.held_bytes(contender.run, self.x, device=self.device)
        outputs: list[Tensor] = []
        step = measure.allocator_trace(lambda: outputs.append(self(contender)), self.device)
        found = self.results(contender, outputs[0])
        weights = sum(p.grad.nbytes for p in contender.parameters.values() if p.grad is not None)
        contender.peak_bytes = step.peak_bytes - weights
        contender.output_error = relative_error(found.pop("output"), exact["output"])
        contender.gradient_error = largest_error(found, exact)
        if cuda:
            [passes] = measure.laps(partial(self, contender), self.device)
            repeats = int(ROUND_SECONDS / max(sum(passes), 1e-6))
            contender.repeats = min(max(repeats, LEAST_REPEATS), MOST_REPEATS)
        self.clear(contender)

    def time(self, contender: Contender) -> None:
        """One round."""
        contender.laps.append(
            measure.laps(partial(self, contender), self.device, contender.repeats)
        )
        self.clear(contender)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference, as a share of the exact one's norm; infinite for NaN."""
    norm = torch.linalg.vector_norm
    error = float(norm(found.to(exact.dtype) - exact) / norm(exact).clamp_min(1e-30))
    return error if error < math.inf else math.inf


def largest_error(found: Named, exact: Named) -> float:
    """The largest of the gradients' errors; infinite if there is a gradient on one side only."""
    if found.keys() != exact.keys() - {"output"}:
        return math.inf
    return max(relative_error(found[name], exact[name]) for name in found)


def rounding(dtype: torch.dtype, terms: int) -> float:
    """The error that rounding explains: of a few operations, and of a sum of so many terms."""
    eps = torch.finfo(dtype).eps
    sums = min(eps, torch.finfo(torch.float32).eps)  # the dtype that sums are taken in
    return 4 * eps + 2 * terms**0.5 * sums
