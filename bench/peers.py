"""Other libraries' ways to compute the problems, each in the few lines its users would write.

All need a GPU. **None of this has been run**: it was written from the packages' sources (Liger
0.8.5, QuACK 0.6.5) and documentation (TransformerEngine, FlashAttention), and is checked here only
as far as a stand-in can. What a package does wrong or not at all becomes a row that says so.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from backfuse import BlockSpec

from .plain import rotary_of
from .problem import Case, Contender, Named, Problem, Run

#: Activations as QuACK calls them, with a gate and without.
QUACK_GATED = {"silu": "swiglu", "gelu_tanh": "geglu", "relu": "reglu"}
QUACK_PLAIN = {"gelu_tanh": "gelu_tanh_approx", "silu": "silu", "relu": "relu", "relu2": "relu_sq"}


def installed(module: str) -> bool:
    """Whether a module can be found."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


def _contender(problem: Problem, name: str, run: Run) -> Contender:
    return Contender(name, run, dict(problem.module.named_parameters()))


def liger_norm(problem: Problem, policy: str) -> Contender:
    """Liger's RMSNorm, told not to overwrite the gradient that everybody shares."""
    from liger_kernel.transformers.functional import liger_rms_norm

    weight, eps = problem.module.weight, problem.case.spec.norm_eps
    return _contender(problem, "liger", lambda x: liger_rms_norm(x, weight, eps, in_place=False))


def liger_rope(problem: Problem, policy: str) -> Contender:
    """Liger's RoPE, on `[B, heads, T, D]` as Hugging Face has it; rotates gradients in place."""
    from liger_kernel.transformers.functional import liger_rope as rotate

    spec, rotary = problem.case.spec, rotary_of(problem.module)
    assert rotary is not None

    def run(qk: Tensor) -> tuple[Tensor, ...]:
        q, k = (
            part.unflatten(-1, (-1, spec.head_dim)).transpose(1, 2)
            for part in qk.split([spec.q_size, spec.kv_size], -1)
        )
        return tuple(x.transpose(1, 2) for x in rotate(q, k, *rotary))

    return replace(_contender(problem, "liger", run), overwrites=True)


def liger_mlp(problem: Problem, policy: str, kind: str, name: str) -> Contender:
    """One of Liger's MLPs on the shared weights; norm and residual by PyTorch."""
    half: Any = problem.module
    mlp = liger_module(half.mlp, problem.case.spec, kind)

    def run(x: Tensor) -> Tensor:
        return x + mlp(half.post_attention_layernorm(x))

    return _contender(problem, name, run)


def liger_module(shared: Any, spec: BlockSpec, kind: str) -> nn.Module:
    """One of Liger's MLPs on the weights of another one."""
    config = SimpleNamespace(
        hidden_size=spec.hidden_size, intermediate_size=spec.intermediate_size, hidden_act="silu"
    )
    with torch.device("meta"):
        mlp: nn.Module = getattr(importlib.import_module("liger_kernel.transformers"), kind)(config)
    for part in ("gate_proj", "up_proj", "down_proj"):
        getattr(mlp, part).weight = getattr(shared, part).weight
    return mlp


def quack_norm(problem: Problem, policy: str) -> Contender:
    """QuACK's RMSNorm."""
    from quack.rmsnorm import rmsnorm

    weight, eps = problem.module.weight, problem.case.spec.norm_eps
    return _contender(problem, "quack", lambda x: rmsnorm(x, weight, eps=eps))


def quack_mlp(problem: Problem, policy: str, recompute: bool) -> Contender:
    """QuACK's fused GEMMs; its gate and up rows alternate in one matrix."""
    from quack.mlp import mlp_func

    half: Any = problem.module
    spec = problem.case.spec
    mlp: Any = half.mlp
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
    return Contender(name, run, named | {"first": first}, rename=rename)


def te_half(problem: Problem, policy: str, recompute: bool) -> Contender:
    """TransformerEngine's LayerNormMLP; gate and up stacked."""
    te = importlib.import_module("transformer_engine.pytorch")
    half: Any = problem.module
    spec = problem.case.spec
    mlp: Any = half.mlp
    module = te.LayerNormMLP(
        spec.hidden_size, spec.intermediate_size, eps=spec.norm_eps, bias=False,
        normalization="RMSNorm", activation="swiglu", params_dtype=problem.case.torch_dtype,
        device=problem.case.device, checkpoint=recompute,
    )  # fmt: skip
    names = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    with torch.no_grad():
        module.layer_norm_weight.copy_(half.post_attention_layernorm.weight)
        module.fc1_weight.copy_(torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]))
        module.fc2_weight.copy_(mlp.down_proj.weight)

    def rename(gradients: Named) -> Named:
        gate, up = gradients["fc1_weight"].chunk(2)
        return {
            "post_attention_layernorm.weight": gradients["layer_norm_weight"],
            "mlp.down_proj.weight": gradients["fc2_weight"],
            **dict(zip(names, (gate, up), strict=True)),
        }

    name = "te-checkpoint" if recompute else "te"
    weights = dict(module.named_parameters())
    return Contender(name, lambda x: x + module(x), weights, rename=rename)


def sdpa_backend(problem: Problem, policy: str, backend: str) -> Contender:
    """PyTorch's attention, held to one of its kernels: a name of `SDPBackend`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    chosen = getattr(SDPBackend, backend)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(chosen):
            return problem.module(q, k, v)

    return _contender(problem, f"sdpa-{backend.lower().removesuffix('_attention')}", run)


def flex(problem: Problem, policy: str) -> Contender:
    """flex_attention, compiled, with a block mask where it is causal."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = problem.case
    mask = None
    if case.spec.causal:
        sizes = (None, None, case.seq_len, case.seq_len)
        mask = create_block_mask(lambda b, h, i, j: i >= j, *sizes, device=case.device)
    call = torch.compile(partial(flex_attention, block_mask=mask, enable_gqa=True), dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        return call(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)

    return _contender(problem, "flex", run)


def flash_attention(problem: Problem, policy: str) -> Contender:
    """FlashAttention 2's own package."""
    from flash_attn import flash_attn_func

    return _contender(
        problem, "flash-attn", partial(flash_attn_func, causal=problem.case.spec.causal)
    )


def needs_gpu(case: Case) -> str | None:
    """Why it cannot run where the case does."""
    return None if case.cuda else "needs a CUDA device"


def needs_llama_ffn(case: Case) -> str | None:
    """Liger and TransformerEngine are asked for RMSNorm and SwiGLU without biases."""
    spec = case.spec
    plain_llama = spec.gated and spec.hidden_act == "silu" and not (spec.up_bias or spec.down_bias)
    if not plain_llama or spec.norm != "rmsnorm":
        return "is asked here for RMSNorm and SwiGLU without biases only"
    return needs_gpu(case)


def needs_quack_ffn(case: Case) -> str | None:
    """QuACK trains without biases, from compute capability 9.0 on."""
    spec = case.spec
    if spec.up_bias or spec.down_bias:
        return "has no biases in training"
    if spec.hidden_act not in (QUACK_GATED if spec.gated else QUACK_PLAIN):
        return f"has no {spec.hidden_act} of this kind"
    if case.cuda and torch.cuda.get_device_capability(case.device) < (9, 0):
        return "needs a compute capability of at least 9.0"
    return needs_gpu(case)


def needs_rmsnorm(case: Case) -> str | None:
    """Their norms are asked for RMSNorm."""
    return needs_gpu(case) if case.spec.norm == "rmsnorm" else "is asked here for RMSNorm only"


def needs_plain_rope(case: Case) -> str | None:
    """Liger's RoPE comes without qk-norm."""
    return "has no qk-norm with it" if case.spec.qk_norm else needs_gpu(case)


def needs_half(case: Case) -> str | None:
    """FlashAttention takes 16-bit operands."""
    return needs_gpu(case) if case.torch_dtype.itemsize == 2 else "takes bf16 and fp16 only"


