"""Blocks as operators of PyTorch: what torch.compile and selective checkpoints see of them.

    backfuse::block_forward       a run of blocks: its output, then what it keeps
    backfuse::block_backward      the wanted gradients: of x, then of the weights
    backfuse::attention_forward, attention_backward, ffn_forward, ffn_backward: a half alone

They run the jobs that `RecomputeFunction` runs in eager mode, where this boundary is bypassed: it
costs time. To a compiler each is opaque: nothing inside is merged with anything else, or taken for
a reason to keep more. What is kept are outputs, marked so that no partitioner computes them again.

Lists, not tuples, come back: how many tensors are kept is the policy's business.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import traceback
from torch.utils.checkpoint import CheckpointPolicy
from torch.utils.flop_counter import register_flop_formula

from backfuse.kernels.reference.dropout import draw_seed

from .call import Inputs
from .flash_attention_op import SAVE_OP
from .function import Job, no_autocast, refuse_second_derivative
from .inputs import check_cu_seqlens
from .op_flops import backward_flops, forward_flops
from .told import KINDS, Told, kind_of, read, write

_SIDE = (
    "Tensor? cos, Tensor? sin, Tensor? attention_mask, Tensor? cu_seqlens, Tensor? seed, "
    "SymInt batch_size, SymInt? max_seqlen, str job"
)
_SCHEMAS = {
    "forward": f"(Tensor x, Tensor[] weights, {_SIDE}) -> Tensor[]",
    "backward": f"(Tensor dz, Tensor? x, Tensor[] kept, Tensor[] weights, {_SIDE}) -> Tensor[]",
}
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)

_library = torch.library.Library("backfuse", "DEF")  # noqa: TOR901


def _forward(x: Tensor, weights: list[Tensor], *side: Any) -> list[Tensor]:
    *tensors, batch_size, max_seqlen, text = side
    told, inputs = read(text), Inputs(*tensors)
    if inputs.cu_seqlens is not None:
        rows = x.view(batch_size, -1, x.shape[-1])
        whole = told.context.whole(rows) if told.context else rows
        check_cu_seqlens(inputs.cu_seqlens, max_seqlen, whole)
    with no_autocast(x):
        z, kept = told.job(x, inputs, batch_size, max_seqlen).forward(
            x,
            weights[: len(told.wanted)],
            inputs,  # an anchor may stand behind them
        )
    return [z, *[kept[name].contiguous() for name in told.keeps]]


def _forward_fake(x: Tensor, weights: list[Tensor], *side: Any) -> list[Tensor]:
    *_, batch_size, _, text = side
    told = read(text)
    layouts = [told.layout(name, x.shape[0], batch_size, x.dtype) for name in told.keeps]
    return [
        torch.empty_like(x, memory_format=torch.contiguous_format),
        *[x.new_empty(shape, dtype=dtype) for shape, dtype in layouts],
    ]


def _backward(
    dz: Tensor, x: Tensor | None, kept: list[Tensor], weights: list[Tensor], *side: Any
) -> list[Tensor]:
    *tensors, batch_size, max_seqlen, text = side
    told, inputs = read(text), Inputs(*tensors)
    named = dict(zip(told.keeps, kept, strict=True))
    if x is not None:
        named[told.input_name] = x
    job = told.job(dz, inputs, batch_size, max_seqlen)
    with no_autocast(dz):
        dx, grads = job.backward(dz.contiguous(), weights, inputs, named)
    wanted = [told.wants_input, *told.wanted]
    found = [grad for grad, want in zip((dx, *grads), wanted, strict=True) if want]
    given = [grad for grad in found if grad is not None]
    assert len(given) == len(found)
    return given


def _backward_fake(
    dz: Tensor, x: Tensor | None, kept: list[Tensor], weights: list[Tensor], *side: Any
) -> list[Tensor]:
    told = read(side[-1])
    like = [weight for weight, wanted in zip(weights, told.wanted, strict=True) if wanted]
    return [
        torch.empty_like(one, memory_format=torch.contiguous_format)
        for one in ([dz, *like] if told.wants_input else like)
    ]


def _op(kind: str, direction: str) -> Any:
    return getattr(torch.ops.backfuse, f"{kind}_{direction}").default


@contextmanager
def _never_again() -> Iterator[None]:
    """What a graph takes down within is saved for the backward pass, not computed again there."""
    if not traceback.has_preserved_node_meta():
        yield
        return
    meta = traceback.get_current_meta()
    before = dict(meta)
    meta["recompute"] = CheckpointPolicy.MUST_SAVE
    try:
        yield
    finally:
        meta.clear()
        meta.update(before)


def _anchor(x: Tensor) -> list[Tensor]:
    """A reason for the partitioner to look for what to save, where a memory budget is set.

    Under a budget it saves, of a graph in which it may compute everything else again, each marked
    operator itself, not its outputs, which fails. A small result of a large tensor is what it may
    not compute again and does not count as marked.

    Raises:
        ValueError: for a budget of 0, under which no mark counts.
    """
    if not traceback.has_preserved_node_meta():  # nobody traces
        return []
    _check_budget()
    if torch._functorch.config.activation_memory_budget == 1:
        return []
    return [torch.ops.backfuse.anchor(x)]


def _check_budget() -> None:
    """Raise a ValueError for a budget of 0, under which no mark counts."""
    if torch._functorch.config.activation_memory_budget == 0:
        raise ValueError(
            "torch._functorch.config.activation_memory_budget is 0, expected more: at 0 all is "
            "computed again, what a block recomputes even twice, and dropout drawn anew. Under any "
            "other budget blocks keep what their policies say; policy='full' keeps least"
        )


class OpFunction(torch.autograd.Function):
    """An operator under autograd."""

    @staticmethod
    def forward(
        ctx: Any, side: tuple[Any, ...], inputs: Inputs, x: Tensor, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        """The operator's outputs; all but the first have no gradient."""
        told = read(side[-1])
        with torch._C._AutoDispatchBelowAutograd():
            differentiated = told.wants_input or any(told.wanted)
            anchored = [*weights, *(_anchor(x) if differentiated else [])]
            with _never_again():
                z, *kept = _op(told.kind, "forward")(x, anchored, *inputs, *side)
        ctx.told, ctx.side = told, side
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*kept)
        ctx.save_for_backward(*inputs, x if told.keeps_input else None, *weights, *kept)
        return z, *kept

    @staticmethod
    def backward(ctx: Any, dz: Tensor | None, *_: None) -> tuple[Any, ...]:
        """By the backward operator."""
        refuse_second_derivative()
        told: Told = ctx.told
        if dz is None:
            return (None,) * (3 + len(told.wanted))
        count = len(Inputs._fields)
        saved = ctx.saved_tensors
        inputs, x, split = saved[:count], saved[count], count + 1 + len(told.wanted)
        weights, kept = list(saved[count + 1 : split]), list(saved[split:])
        grads = iter(_op(told.kind, "backward")(dz, x, kept, weights, *inputs, *ctx.side))
        dx = next(grads) if told.wants_input else None
        return None, None, dx, *[next(grads) if wanted else None for wanted in told.wanted]


def _forward_autograd(x: Tensor, weights: list[Tensor], *side: Any) -> list[Tensor]:
    count = len(Inputs._fields)
    return list(OpFunction.apply(side[count:], Inputs(*side[:count]), x, *weights))


def _backward_autograd(dz: Tensor, *rest: Any) -> list[Tensor]:
    *_, text = rest
    with torch._C._AutoDispatchBelowAutograd():  # what it does inside is not recorded
        grads: list[Tensor] = _op(read(text).kind, "backward")(dz, *rest)
    return grads


def _draw_seed(like: Tensor, layers: int) -> Tensor:
    if traceback.has_preserved_node_meta() and torch.is_grad_enabled():
        _check_budget()
    with _never_again():
        return draw_seed(like, layers)


def _anchor_kernel(x: Tensor) -> Tensor:
    return x.new_zeros(())


def _register() -> None:
    for kind in KINDS:
        for direction, schema in _SCHEMAS.items():
            _library.define(f"{kind}_{direction}{schema}", tags=_TAGS)
        for name, kernel, autograd, fake, flops in (
            (f"{kind}_forward", _forward, _forward_autograd, _forward_fake, forward_flops),
            (f"{kind}_backward", _backward, _backward_autograd, _backward_fake, backward_flops),
        ):
            _library.impl(name, kernel, "CompositeExplicitAutograd")
            _library.impl(name, autograd, "Autograd")
            torch.library.register_fake(f"backfuse::{name}", fake, lib=_library)
            register_flop_formula(getattr(torch.ops.backfuse, name))(flops)
    _library.define("anchor(Tensor x) -> Tensor", tags=_TAGS)
    _library.impl("anchor", _anchor_kernel, "CompositeExplicitAutograd")
    torch.library.register_fake("backfuse::anchor", _anchor_kernel, lib=_library)
    # A composite: what a graph holds is PyTorch's own random operator, which none takes for pure.
    _library.define("draw_seed(Tensor like, SymInt layers) -> Tensor", tags=_TAGS[:1])
    _library.impl("draw_seed", _draw_seed, "CompositeImplicitAutograd")


_register()

#: What a selective checkpoint's policy should save, so that a block is not run twice.
SAVE_OPS = frozenset([*(_op(kind, "forward") for kind in KINDS), SAVE_OP])


def call_op(job: Job, inputs: Inputs, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Run a job as an operator, on `[tokens, h]`."""
    call = job.call
    op = _op(kind_of(job), "forward")
    z: Tensor = op(x, list(weights), *inputs, call.batch_size, call.max_seqlen, write(job))[0]
    return z
