"""backfuse's ways to compute the problems, by policy.

Blocks, halves and attention are called as users call them. Norms and rotary embedding are parts of
a block that nobody calls alone: a small autograd function stands around each.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import backfuse
from backfuse import BlockSpec, BlockStack
from backfuse.kernels import reference
from backfuse.kernels.dispatch import Operations, operations
from backfuse.kernels.reference.norm import NormSpec, accumulate_dtype
from backfuse.kernels.reference.qk_rope import QKSpec

from .model import ByteModel
from .plain import rotary_of
from .problem import Case, Contender, Problem, Run

POLICIES = ("keep", "selective", "lean", "full")


def operations_for(case: Case) -> Operations:
    """What `impl="auto"` chooses."""
    spec = case.spec
    width = max(spec.hidden_size, spec.q_size)
    return operations("auto", torch.device(case.device), case.torch_dtype, width, spec.head_dim)


def own_name(case: Case) -> str:
    """Our name in a row, which says what ran."""
    return f"backfuse-{'reference' if operations_for(case) is reference else 'triton'}"


def _contender(problem: Problem, run: Run, policy: str = "", **options: Any) -> Contender:
    weights = dict(problem.module.named_parameters())
    return Contender(own_name(problem.case), run, weights, policy, **options)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, ops: Operations
    ) -> Tensor:
        rows = x.flatten(0, -2)
        stats = rows.new_empty(spec.statistics, len(rows), dtype=accumulate_dtype(x.dtype))
        y = ops.norm_forward(rows, weight, bias, spec, stats, x.dtype)
        ctx.save_for_backward(rows, stats, weight, bias)
        ctx.spec, ctx.ops = spec, ops
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, stats, weight, bias = ctx.saved_tensors
        dy, dx = grads[0].flatten(0, -2), torch.empty_like(rows)
        dweight, dbias = ctx.ops.norm_backward(
            dy, rows, stats, weight, bias, ctx.spec, dx=dx, need_dbias=bias is not None
        )
        like = [None if d is None else d.to(weight.dtype) for d in (dweight, dbias)]
        return dx.view(grads[0].shape), *like, None, None


def norm(problem: Problem, policy: str) -> Contender:
    """The norm kernels."""
    module, spec = problem.module, problem.case.spec.norm_spec
    weights = dict(module.named_parameters())
    ops = operations_for(problem.case)

    def run(x: Tensor) -> Tensor:
        return _Norm.apply(x, weights["weight"], weights.get("bias"), spec, ops)

    return _contender(problem, run)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, raw: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, tables: Any,
        spec: QKSpec, ops: Operations,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        out = torch.empty_like(raw)
        ops.qk_rope_forward(raw, *tables, q_weight, k_weight, spec, out)
        ctx.save_for_backward(raw if spec.qk_norm else None, q_weight, k_weight, *tables)
        ctx.spec, ctx.ops = spec, ops
        return tuple(out.split([spec.q_size, spec.kv_size], -1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        raw, q_weight, k_weight, cos, sin = ctx.saved_tensors
        draw = torch.cat(grads, -1)
        dweights = ctx.ops.qk_rope_backward(draw, raw, cos, sin, q_weight, k_weight, ctx.spec)
        like = [None if d is None else d.to(draw.dtype) for d in dweights]
        return draw, *like, None, None, None


def rope(problem: Problem, policy: str) -> Contender:
    """The kernels of qk-norm and RoPE."""
    case, module = problem.case, problem.module
    weights = dict(module.named_parameters())
    rotary, ops, spec = rotary_of(module), operations_for(case), case.spec.qk_spec
    assert rotary is not None
    tables = tuple(x.expand(case.batch_size, -1, -1).flatten(0, 1) for x in rotary)
    norms = [weights.get(f"{name}_norm.weight") for name in "qk"]

    def run(qk: Tensor) -> tuple[Tensor, ...]:
        parts = _Rope.apply(qk.flatten(0, 1), *norms, tables, spec, ops)
        heads = (-1, spec.head_dim)
        return tuple(part.unflatten(0, qk.shape[:2]).unflatten(-1, heads) for part in parts)

    return _contender(problem, run)


def attention(problem: Problem, policy: str) -> Contender:
    """The attention kernels; on a CPU PyTorch's, through our functions."""
    spec = problem.case.spec
    run = partial(backfuse.flash_attention, causal=spec.causal, scale=spec.attention_scale)
    return _contender(problem, run)


def ffn(problem: Problem, policy: str) -> Contender:
    """`backfuse.ffn`; kernels rebuild a pre-activation by two launches."""
    return _ffn(problem, policy, "auto" if operations_for(problem.case) is reference else "split")


def fused_ffn(problem: Problem, policy: str) -> Contender:
    """The same, a pre-activation being rebuilt in registers."""
    return replace(_ffn(problem, policy, "fused"), provider="backfuse-fused")


def _ffn(problem: Problem, policy: str, strategy: str) -> Contender:
    weights = dict(problem.module.named_parameters())
    options: dict[str, Any] = {"weights": weights, "spec": problem.case.spec}
    run = partial(backfuse.ffn, policy=policy, ffn_strategy=strategy, **options)
    return _contender(problem, run, policy)


def attention_half(problem: Problem, policy: str) -> Contender:
    """`backfuse.attention`."""
    module, spec = problem.module, problem.case.spec
    weights = dict(module.named_parameters())
    options: dict[str, Any] = {"weights": weights, "spec": spec, "policy": policy}
    run = partial(backfuse.attention, position_embeddings=rotary_of(module), **options)
    return _contender(problem, run, policy)


def needs_kernels(case: Case) -> str | None:
    """Why there is nothing to fuse."""
    if operations_for(case) is reference:
        return "the reference, which runs here, has one way to rebuild"
    return None


def _stack(case: Case, layers: Any, policy: str, offload_dir: Path | None = None) -> BlockStack:
    spec: BlockSpec = case.spec
    mine = BlockStack(spec, len(layers), policy, offload_dir=offload_dir, **case.factory)
    for own, theirs in zip(mine.layers, layers, strict=True):
        for name, parameter in theirs.named_parameters():
            owner, _, leaf = name.rpartition(".")
            setattr(own.get_submodule(owner), leaf, parameter)
    return mine


def stack(problem: Problem, policy: str, offload_dir: Path | None = None) -> Contender:
    """`BlockStack`, on the very weights of the others."""
    mine = _stack(problem.case, problem.module.layers, policy, offload_dir)
    rotary = rotary_of(problem.module)
    return _contender(problem, partial(mine, position_embeddings=rotary), policy)


def compiled_stack(problem: Problem, policy: str) -> Contender:
    """The same, through torch.compile as one graph."""
    mine = _stack(problem.case, problem.module.layers, policy)
    graph = torch.compile(mine, fullgraph=True, dynamic=False)
    run = partial(graph, position_embeddings=rotary_of(problem.module))
    contender = _contender(problem, run, policy)
    return replace(contender, provider=f"{contender.provider}-compile")


def train(problem: Problem, policy: str) -> Contender:
    """The same inside the model."""
    model = problem.module
    assert isinstance(model, ByteModel)
    mine = model.around(_stack(problem.case, model.stack.layers, policy))
    return _contender(problem, mine.loss, policy)
