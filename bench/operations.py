"""The problems: what each operation computes, on which inputs, in plain PyTorch.

norm            [tokens, h] to the same
rope            qk-norm, where the block has it, and RoPE: the projections' output to q and k
ffn             the FFN half, x + mlp(norm(x))
attention       the attention core, softmax(q kᵀ) v
attention-half  x + self_attn(norm(x))
block           a transformer block
stack           several of them
train           a training step of a small language model around a stack: loss, gradients, AdamW
model, lora     a whole Hugging Face model: see `hf_model.py`
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import hf_model
from .model import ByteModel
from .plain import (
    PlainAttentionHalf,
    PlainBlock,
    PlainCore,
    PlainHalf,
    PlainRope,
    PlainStack,
    make_layers,
    norm_of,
    rotary_of,
    rotary_tables,
)
from .problem import Case, Contender, Named, Problem, Run
from .ways import Way


def _random(case: Case, *shape: int) -> Tensor:
    """Random numbers, never zeros: those would need less power, and run faster."""
    return torch.randn(case.batch_size, case.seq_len, *shape, **case.factory)


def _stir(module: nn.Module) -> nn.Module:
    """Norms' weights other than 1, so that forgetting them shows."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return module


def _rotary(case: Case) -> tuple[Tensor, Tensor] | None:
    spec = case.spec
    if spec.rope is None:
        return None
    theta = spec.rope_theta or 10000.0
    return rotary_tables(case.seq_len, spec.head_dim, theta, **case.factory)


def _core_flops(case: Case) -> float:
    """FLOPs of one attention core's forward pass, at half where it is causal."""
    full = 4.0 * case.batch_size * case.seq_len**2 * case.spec.q_size
    return full / 2 if case.spec.causal else full


def norm(case: Case) -> Problem:
    """The rows of a block's norm."""
    x = _random(case, case.spec.hidden_size)
    module = _stir(norm_of(case.spec, **case.factory))
    return Problem(case, module, {"x": x}, moved=(2.0 * x.nbytes, 3.0 * x.nbytes))


def rope(case: Case) -> Problem:
    """The rotation of q and k.

    Raises:
        ValueError: for a block without RoPE.
    """
    rotary = _rotary(case)
    if rotary is None:
        raise ValueError(f"shape {case.shape!r} has no rotary embedding")
    qk = _random(case, case.spec.q_size + case.spec.kv_size)
    module = _stir(PlainRope(case.spec, rotary, **case.factory))
    passes = 3.0 if case.spec.qk_norm else 2.0
    return Problem(case, module, {"qk": qk}, moved=(2.0 * qk.nbytes, passes * qk.nbytes))


def chain(calls: Iterable[Run]) -> Run:
    """One after the other."""
    calls = list(calls)

    def run(x: Tensor) -> Tensor:
        for call in calls:
            x = call(x)
        return x

    return run


def ffn(case: Case) -> Problem:
    """The FFN half; or several in a row, as others' benchmarks have it."""
    halves = [PlainHalf(case.spec, **case.factory) for _ in range(case.layers)]

    def apply(way: Way, module: Any) -> Run:
        return chain(map(way, module))

    module = _stir(nn.Sequential(*halves))
    return Problem(case, module, {"x": _random(case, case.spec.hidden_size)}, apply=apply)


def each_half(make: Callable[[Problem, str], Contender]) -> Callable[[Problem, str], Contender]:
    """From the contender of one half to that of all of a problem's."""

    def make_all(problem: Problem, policy: str) -> Contender:
        halves = list(problem.module.children())
        parts = [make(replace(problem, module=half), policy) for half in halves]

        def rename(gradients: Named) -> Named:
            found: Named = {}
            for i, part in enumerate(parts):
                names = [name for name in part.parameters if f"{i}.{name}" in gradients]
                mine = part.rename({name: gradients[f"{i}.{name}"] for name in names})
                found |= {f"{i}.{name}": grad for name, grad in mine.items()}
            return found

        parameters = {
            f"{i}.{name}": p for i, part in enumerate(parts) for name, p in part.parameters.items()
        }
        run = chain(part.run for part in parts)
        return replace(parts[0], run=run, parameters=parameters, rename=rename)

    return make_all


def attention(case: Case) -> Problem:
    """The attention core, on q, k and v `[B, T, heads, head_dim]`."""
    spec = case.spec
    heads = {"q": spec.num_attention_heads, "k": spec.num_key_value_heads}
    heads["v"] = spec.num_key_value_heads
    inputs = {name: _random(case, count, spec.head_dim) for name, count in heads.items()}
    return Problem(case, PlainCore(spec), inputs, attention=_core_flops(case))


def attention_half(case: Case) -> Problem:
    """The attention half."""
    module = _stir(PlainAttentionHalf(case.spec, _rotary(case), **case.factory))
    x = _random(case, case.spec.hidden_size)
    return Problem(case, module, {"x": x}, attention=_core_flops(case))


def _precise_layers(case: Case, layers: Iterable[nn.Module], dtype: torch.dtype) -> list[nn.Module]:
    """The same blocks in a higher dtype. Hugging Face's norms compute in fp32, whatever theirs."""
    copies: list[nn.Module] = []
    for layer in layers:
        copies.append(PlainBlock(case.spec, device=case.device, dtype=dtype))
        copies[-1].load_state_dict(layer.state_dict())
    return copies


def stack(case: Case) -> Problem:
    """Blocks in a row; one of them for `block`."""
    layers, kind = make_layers(case.spec, case.layers, **case.factory)
    module = _stir(PlainStack(layers, rotary=_rotary(case)))

    def apply(way: Way, stack: PlainStack) -> Run:
        return PlainStack(stack.layers, way, rotary_of(stack))

    def precise(stack: PlainStack, dtype: torch.dtype) -> nn.Module:
        layers = _precise_layers(case, stack.layers, dtype)
        return PlainStack(layers, rotary=rotary_of(stack)).to(dtype)

    x = _random(case, case.spec.hidden_size)
    flops = case.layers * _core_flops(case)
    return Problem(case, module, {"x": x}, kind, precise, apply, attention=flops)


def train(case: Case) -> Problem:
    """A step of training on random bytes."""
    layers, kind = make_layers(case.spec, case.layers, **case.factory)
    module = ByteModel(case.spec, case.seq_len, PlainStack(layers)).to(**case.factory)
    _stir(module)

    def apply(way: Way, model: ByteModel) -> Run:
        assert isinstance(model.stack, PlainStack)
        return model.around(PlainStack(model.stack.layers, way)).loss

    def precise(model: ByteModel, dtype: torch.dtype) -> nn.Module:
        assert isinstance(model.stack, PlainStack)
        stack = PlainStack(_precise_layers(case, model.stack.layers, dtype))
        return copy.deepcopy(model.around(stack)).to(dtype)

    shape = (case.batch_size, case.seq_len)
    names = ("inputs", "targets")
    inputs = {name: torch.randint(256, shape, device=case.device) for name in names}
    flops = case.layers * _core_flops(case)
    return Problem(case, module, inputs, kind, precise, apply, attention=flops, train=True)


#: Operation -> makes its problem.
PROBLEMS: dict[str, Callable[[Case], Problem]] = {
    "norm": norm,
    "rope": rope,
    "ffn": ffn,
    "attention": attention,
    "attention-half": attention_half,
    "block": stack,
    "stack": stack,
    "offload": stack,
    "train": train,
    "model": hf_model.problem,
    "lora": hf_model.lora,
}
