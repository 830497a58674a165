"""`flash_attention` under autograd, in eager mode and as an operator of PyTorch.

    backfuse::flash_attention_forward     the output and LSE
    backfuse::flash_attention_backward    the wanted gradients, of q, k, v and sinks

As the operators of `ops.py`: to a compiler each is opaque, and both run the lines that
`FlashAttentionFunction` runs in eager mode, where the boundary is bypassed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from backfuse.kernels.cores.choose import Core
from backfuse.kernels.dispatch import Operations, attention_core, operations
from backfuse.kernels.reference.attention_inputs import check_attention, check_offsets
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.cpu_attention import CPU
from backfuse.kernels.reference.explicit_attention import AttentionMask, score_flops
from backfuse.kernels.reference.norm import accumulate_dtype
from backfuse.kernels.reference.qk_rope import QKSpec

from .function import no_autocast


class Given(NamedTuple):
    """The tensors of a call: q, k and v are `[batch, rows, heads, channels]`."""

    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    cu_seqlens: Tensor | None
    cu_seqlens_k: Tensor | None
    seed: Tensor | None


class Job(NamedTuple):
    """What one call does, besides its tensors.

    Attributes:
        request: what is asked for; its mask says what is visible.
        ops: the kernels, or their reference.
        core: whose attention runs.
    """

    request: AttentionRequest
    ops: Operations
    core: Operations | Core


def _request(given: Given, mask: AttentionMask) -> AttentionRequest:
    q, k, v, sinks, cu_seqlens, cu_seqlens_k, _ = given
    return AttentionRequest(
        mask, q.dtype, q.device, q.shape[1], q.shape[3], v.shape[3],
        packed=cu_seqlens is not None, sinks=sinks is not None,
        unlike=cu_seqlens_k is not None or k.shape[1] != q.shape[1],
    )  # fmt: skip


def make_job(given: Given, mask: AttentionMask, impl: str) -> Job:
    """The job, for tensors that belong together."""
    q, v = given.q, given.v
    check_attention(*given[:3], mask, *given[3:])
    ops = operations(impl, q.device, q.dtype, 0, max(q.shape[3], v.shape[3]))
    request = _request(given, mask)
    return Job(request, ops, attention_core(impl, ops, request))


def _readable(x: Tensor) -> Tensor:
    """x, or a copy whose strides every path can read: channels side by side, rows evenly apart."""
    batch, rows, *_ = x.shape
    even = batch == 1 or (rows > 1 and x.stride(0) == rows * x.stride(1))
    return x if even and x.stride(-1) == 1 else x.contiguous()


def _forward(job: Job, given: Given) -> tuple[Tensor, Tensor]:
    """The output, and LSE `[batch, heads, rows]`."""
    q, k, v, sinks, cu_seqlens, cu_seqlens_k, seed = given
    with no_autocast(q):
        out, lse = job.core.attention_forward(
            _readable(q), _readable(k), _readable(v), job.request.mask, sinks=sinks,
            cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, seed=seed,
        )  # fmt: skip
    return out, lse


def _backward(
    job: Job, given: Given, out: Tensor, lse: Tensor, dout: Tensor, wanted: Sequence[bool]
) -> list[Tensor | None]:
    """Gradients of q, k, v and sinks, None where not wanted."""
    q, k, v, sinks, cu_seqlens, cu_seqlens_k, seed = given
    with no_autocast(q):
        q, k, v, dout, out = map(_readable, (q, k, v, dout, out))
        delta = _delta(job, out, dout) if job.core.needs_delta(job.request) else None
        *grads, dsinks = job.core.attention_backward(
            dout, q, k, v, out, lse, job.request.mask, delta=delta, sinks=sinks,
            cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, seed=seed, need_dsinks=wanted[3],
            need_dq=wanted[0], need_dkv=wanted[1] or wanted[2],
        )  # fmt: skip
    if sinks is not None and dsinks is not None:
        dsinks = dsinks.to(sinks.dtype)
    return [g if want else None for g, want in zip((*grads, dsinks), wanted, strict=True)]


def _refuse_second_derivative() -> None:
    """Raise a ValueError in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise ValueError(
            "create_graph is True, expected False: backfuse.flash_attention differentiates by "
            "hand and cannot be differentiated twice. For a second derivative use "
            "torch.nn.functional.scaled_dot_product_attention with its math backend."
        )


class FlashAttentionFunction(torch.autograd.Function):
    """Attention under autograd."""

    @staticmethod
    def forward(ctx: Any, job: Job, *given: Any) -> tuple[Tensor, Tensor]:
        """The output, and LSE `[batch, heads, rows]`."""
        out, lse = _forward(job, Given(*given))
        ctx.job = job
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(*given, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Gradients of q, k, v and sinks."""
        _refuse_second_derivative()
        *given, out, lse = ctx.saved_tensors
        wanted = ctx.needs_input_grad[1:5]
        return None, *_backward(ctx.job, Given(*given), out, lse, dout, wanted), None, None, None


def _delta(job: Job, out: Tensor, dout: Tensor) -> Tensor:
    """rowsum(out o dout), `[batch, heads, rows]`."""
    batch, rows, heads, width = out.shape
    delta = out.new_empty(heads, batch * rows, dtype=accumulate_dtype(out.dtype)).t()
    flat = (x.reshape(batch * rows, heads * width) for x in (out, dout))
    job.ops.attention_delta(*flat, delta, QKSpec(heads * width, heads * width, width))
    return rearrange(delta, "(b t) n -> b n t", b=batch)


def _check_offsets(
    name: str, offsets: Tensor, longest_name: str, longest: int | None, rows: int, like: Tensor
) -> None:
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{name} is {offsets!r}, expected an int32 tensor of offsets")
    check_offsets(name, offsets, rows, like.device)
    if longest is not None and not offsets.is_cpu:
        return
    if not offsets.is_cpu:
        check_offsets(name, offsets.cpu(), rows, torch.device("cpu"))
    least = int(offsets.diff().max())
    if longest is not None and longest < least:
        raise ValueError(
            f"{longest_name} is {longest}, expected at least the longest sequence ({least})"
        )


def check_packed(given: Given, longest: int | None, longest_k: int | None) -> None:
    """Raise unless offsets are those of packed sequences, the longest of them as is said.

    On a GPU they are read, which waits for it, only where nothing is said.
    """
    q, k, _, _, cu_seqlens, cu_seqlens_k, _ = given
    if cu_seqlens is not None:
        _check_offsets("cu_seqlens_q", cu_seqlens, "max_seqlen_q", longest, q.shape[1], q)
    if cu_seqlens_k is not None:
        _check_offsets("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", longest_k, k.shape[1], q)


def mask_of(
    causal: bool, window: int | None, softcap: float | None, scale: float, dropout: float,
    max_seqlen_q: int | None,
) -> AttentionMask:  # fmt: skip
    return AttentionMask(
        causal=causal, window=window, softcap=softcap, scale=scale, dropout=dropout,
        max_seqlen=max_seqlen_q,
    )  # fmt: skip


@torch.library.custom_op("backfuse::flash_attention_forward", mutates_args=())
def forward_op(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None, seed: Tensor | None, causal: bool, window: int | None,
    softcap: float | None, scale: float, dropout: float, max_seqlen_q: int | None,
    max_seqlen_k: int | None, impl: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The output and LSE, contiguous; arguments as those of `flash_attention`, with a batch."""
    given = Given(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, seed)
    check_packed(given, max_seqlen_q, max_seqlen_k)
    mask = mask_of(causal, window, softcap, scale, dropout, max_seqlen_q)
    out, lse = _forward(make_job(given, mask, impl), given)
    return out.contiguous(), lse.contiguous()


@forward_op.register_fake
def _forward_fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    batch, rows, heads = q.shape[:3]
    high = accumulate_dtype(q.dtype)
    return q.new_empty(batch, rows, heads, v.shape[3]), q.new_empty(batch, heads, rows, dtype=high)


@torch.library.custom_op("backfuse::flash_attention_backward", mutates_args=())
def backward_op(
    dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool], q: Tensor, k: Tensor,
    v: Tensor, sinks: Tensor | None, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None,
    seed: Tensor | None, causal: bool, window: int | None, softcap: float | None, scale: float,
    dropout: float, max_seqlen_q: int | None, max_seqlen_k: int | None, impl: str,
) -> list[Tensor]:  # fmt: skip
    """The wanted ones of the gradients of q, k, v and sinks, contiguous."""
    given = Given(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, seed)
    mask = mask_of(causal, window, softcap, scale, dropout, max_seqlen_q)
    grads = _backward(make_job(given, mask, impl), given, out, lse, dout, wanted)
    return [grad.contiguous() for grad in grads if grad is not None]


@backward_op.register_fake
def _backward_fake(
    dout: Tensor, out: Tensor, lse: Tensor, wanted: Sequence[bool], q: Tensor, k: Tensor,
    v: Tensor, sinks: Tensor | None, *_: Any,
) -> list[Tensor]:  # fmt: skip
    like = zip((q, k, v, sinks), wanted, strict=True)
    return [x.new_empty(x.shape) for x, want in like if want and x is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    count = len(Given._fields)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:count], *output)
    ctx.options = inputs[count:]


def _differentiate(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
    _refuse_second_derivative()
    *given, out, lse = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:4])
    grads = iter(backward_op(dout, out, lse, wanted, *given, *ctx.options))
    nothing = (None,) * (len(given) - 4 + len(ctx.options))
    return *(next(grads) if want else None for want in wanted), *nothing


forward_op.register_autograd(_differentiate, setup_context=_save)


def _products(q: Any, k: Any, v: Any, options: Sequence[Any]) -> tuple[int, int, bool]:
    """FLOPs of `Q K^T` and of `P V`, and whether PyTorch's CPU kernel runs; packed sequences count
    as one.

    Args:
        q: its shape, and so k and v.
        k: see q.
        v: see q.
        options: what follows them, shapes in the place of tensors.
    """
    sinks, cu_seqlens, cu_seqlens_k, _, *rest = options
    mask = mask_of(*rest[:6])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    unlike = cu_seqlens_k is not None or k[1] != q[1]
    request = AttentionRequest(
        mask, torch.float32, device, q[1], q[3], v[3], packed=cu_seqlens is not None,
        sinks=sinks is not None, unlike=unlike,
    )  # fmt: skip
    library = CPU.obstacle(request) is None
    scores, weighted = (
        q[0] * score_flops(q[1], None, q[2] * width, mask, library, False, k[1])
        for width in (q[3], v[3])
    )
    return scores, weighted, library


@register_flop_formula(torch.ops.backfuse.flash_attention_forward)
def forward_flops(q: Any, k: Any, v: Any, *options: Any, **_: Any) -> int:
    """Of the forward operator, from its arguments: shapes in the place of tensors."""
    return sum(_products(q, k, v, options)[:2])


@register_flop_formula(torch.ops.backfuse.flash_attention_backward)
def backward_flops(
    dout: Any, out: Any, lse: Any, wanted: Sequence[bool], q: Any, k: Any, v: Any, *options: Any,
    **_: Any,
) -> int:  # fmt: skip
    """Of the backward operator, likewise."""
    scores, weighted, library = _products(q, k, v, options)
    need_dq, need_dkv = library or wanted[0], library or wanted[1] or wanted[2]
    if not need_dq and not need_dkv:
        return 0
    return scores * (1 + need_dq + need_dkv) + weighted * (1 + need_dkv)


#: What a selective checkpoint saves, so that the attention is not run twice.
SAVE_OP = torch.ops.backfuse.flash_attention_forward.default
