"""`flash_attention`: attention by itself, for models whose attention is no block of ours.

    out = softmax(scale q k^T) v        LSE = log(sum exp (scale q k^T) [+ exp sink])

| kept | recomputed | GEMMs in backward |
|---|---|---|
| q, k, v as they were given, out, LSE (fp32, one a row and head) | the softmax | 5; 7 in the
kernels, which rebuild it twice |

Multi-head latent attention (heads of v narrower than those of k), cross-attention and decoding
(other numbers of keys than of queries) come here; a block keeps less than this can.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from backfuse.kernels.cores.choose import Core
from backfuse.kernels.dispatch import Operations, attention_core, operations
from backfuse.kernels.reference.attention_inputs import check_attention, check_offsets
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask
from backfuse.kernels.reference.norm import accumulate_dtype
from backfuse.kernels.reference.qk_rope import QKSpec

from .function import no_autocast
from .inputs import check_impl


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


def _readable(x: Tensor) -> Tensor:
    """x, or a copy whose strides every path can read: channels side by side, rows evenly apart."""
    batch, rows, *_ = x.shape
    even = batch == 1 or (rows > 1 and x.stride(0) == rows * x.stride(1))
    return x if even and x.stride(-1) == 1 else x.contiguous()


class FlashAttentionFunction(torch.autograd.Function):
    """Attention under autograd, on `[batch, rows, heads, channels]`."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        cu_seqlens: Tensor | None,
        cu_seqlens_k: Tensor | None,
        seed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """The output, and LSE `[batch, heads, rows]`."""
        with no_autocast(q):
            out, lse = job.core.attention_forward(
                _readable(q), _readable(k), _readable(v), job.request.mask, sinks=sinks,
                cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k, seed=seed,
            )  # fmt: skip
        ctx.job = job
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, sinks, cu_seqlens, cu_seqlens_k, seed, out, lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Any, ...]:
        """Gradients of q, k, v and sinks."""
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph is True, expected False: backfuse.flash_attention differentiates by "
                "hand and cannot be differentiated twice. For a second derivative use "
                "torch.nn.functional.scaled_dot_product_attention with its math backend."
            )
        job, (q, k, v, sinks, cu_seqlens, cu_seqlens_k, seed, out, lse) = ctx.job, ctx.saved_tensors
        with no_autocast(q):
            q, k, v, dout, out = map(_readable, (q, k, v, dout, out))
            delta = _delta(job, out, dout) if job.core.needs_delta(job.request) else None
            *grads, dsinks = job.core.attention_backward(
                dout, q, k, v, out, lse, job.request.mask, delta=delta, sinks=sinks,
                cu_seqlens=cu_seqlens,
                cu_seqlens_k=cu_seqlens_k, seed=seed, need_dsinks=ctx.needs_input_grad[4],
            )  # fmt: skip
        wanted = zip(grads, ctx.needs_input_grad[1:4], strict=True)
        dsinks = None if dsinks is None else dsinks.to(sinks.dtype)
        return None, *(g if want else None for g, want in wanted), dsinks, None, None, None


def _delta(job: Job, out: Tensor, dout: Tensor) -> Tensor:
    """rowsum(out o dout), `[batch, heads, rows]`."""
    batch, rows, heads, width = out.shape
    delta = out.new_empty(heads, batch * rows, dtype=accumulate_dtype(out.dtype)).t()
    flat = (x.reshape(batch * rows, heads * width) for x in (out, dout))
    job.ops.attention_delta(*flat, delta, QKSpec(heads * width, heads * width, width))
    return rearrange(delta, "(b t) n -> b n t", b=batch)


def _check_packed(
    name: str, offsets: Tensor, longest_name: str, longest: int | None, rows: int, like: Tensor
) -> None:
    """Raise unless these are offsets of packed sequences, the longest of them as is said.

    On a GPU they are read, which waits for it, only where nothing is said.
    """
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


def _check_numbers(
    window: Any, softcap: Any, scale: Any, dropout: Any, max_seqlen_q: Any, max_seqlen_k: Any
) -> None:
    whole = {"window": window, "max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}
    for name, value in whole.items():
        right = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if value is not None and not right:
            raise ValueError(f"{name} is {value!r}, expected a positive integer, or None")
    for name, value in (("softcap", softcap), ("scale", scale)):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (number and 0 < value < float("inf")):
            raise ValueError(f"{name} is {value!r}, expected a positive number, or None")
    if not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout!r}, expected 0 <= p < 1")


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    impl: str = "auto",
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of q over k and v, differentiable in q, k, v and sinks.

    Where there are not as many keys as queries, the last query stands beside the last key, as in
    FlashAttention from 2.1 on: with `shift = keys - queries`, query i stands where key `i + shift`
    does. Queries that see no key give 0.

    Args:
        q: `[batch, queries, heads, head_dim]`; with `cu_seqlens_q` `[queries, heads, head_dim]`.
            Any strides; so are k and v.
        k: `[batch, keys, kv_heads, head_dim]`, or without the batch; kv_heads divides heads.
        v: `[batch, keys, kv_heads, v_head_dim]`, or without the batch.
        causal: query i sees keys j <= i + shift.
        window: query i sees keys with |i + shift - j| < window; None: all.
        softcap: scores become `softcap * tanh(score / softcap)`; None: they stay.
        scale: factor on the scores; None: `head_dim ** -0.5`.
        sinks: `[heads]`, any floating-point dtype: a logit in each row's softmax that no value
            belongs to (GPT-OSS); neither scaled nor capped nor dropped.
        dropout: probability that a softmax weight is dropped, drawn from PyTorch's generator.
        cu_seqlens_q: int32 or int64 `[sequences + 1]`: where packed sequences begin, and the end.
        cu_seqlens_k: the same of the keys; None: as the queries'.
        max_seqlen_q: the longest sequence, which spares a GPU a host synchronisation; for the same
            reason offsets on a GPU are then not looked at.
        max_seqlen_k: the longest sequence of keys, likewise.
        impl: which operations run (see `TransformerBlock`).
        return_lse: whether LSE comes too.

    Returns:
        `[batch, queries, heads, v_head_dim]`, or without the batch; and LSE, fp32 (fp64 for fp64),
        `[batch, heads, queries]` or `[heads, queries]`, through which no gradient flows. LSE
        counts the sink; rows that see nothing have -inf, or their sink.

    Raises:
        TypeError: for a wrong dtype or kind.
        ValueError: for a shape, device, stride or value that does not fit.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        dims = 4 if cu_seqlens_q is None else 3
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} is {x!r}, expected a tensor")
        if x.dim() != dims:
            layout = "[batch, rows, heads, dim]" if dims == 4 else "[rows, heads, dim], packed"
            raise ValueError(f"{name} has the shape {list(x.shape)}, expected {layout}")
    if not isinstance(causal, bool):
        raise TypeError(f"causal is {causal!r}, expected True or False")
    _check_numbers(window, softcap, scale, dropout, max_seqlen_q, max_seqlen_k)
    check_impl(impl)
    if cu_seqlens_q is None:
        for name, value in (
            ("cu_seqlens_k", cu_seqlens_k), ("max_seqlen_q", max_seqlen_q),
            ("max_seqlen_k", max_seqlen_k),
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"cu_seqlens_q is None, expected offsets together with {name}")
    else:
        if cu_seqlens_k is None and max_seqlen_k is not None:
            raise ValueError("cu_seqlens_k is None, expected offsets together with max_seqlen_k")
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        _check_packed("cu_seqlens_q", cu_seqlens_q, "max_seqlen_q", max_seqlen_q, q.shape[1], q)
        if cu_seqlens_k is not None:
            _check_packed("cu_seqlens_k", cu_seqlens_k, "max_seqlen_k", max_seqlen_k, k.shape[1], q)
    seed = None
    if dropout:
        seed = torch.randint(2**63 - 1, (1,), device=q.device, dtype=torch.int64)
    mask = AttentionMask(
        causal=causal,
        window=window,
        softcap=softcap,
        scale=q.shape[3] ** -0.5 if scale is None else scale,
        dropout=dropout,
        max_seqlen=max_seqlen_q,
    )
    check_attention(q, k, v, mask, sinks, cu_seqlens_q, cu_seqlens_k, seed)
    ops = operations(impl, q.device, q.dtype, 0, max(q.shape[3], v.shape[3]))
    request = AttentionRequest(
        mask, q.dtype, q.device, q.shape[1], q.shape[3], v.shape[3],
        packed=cu_seqlens_q is not None, sinks=sinks is not None,
        unlike=cu_seqlens_k is not None or k.shape[1] != q.shape[1],
    )  # fmt: skip
    core = attention_core(impl, ops, request)
    out, lse = FlashAttentionFunction.apply(
        Job(request, ops, core), q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, seed
    )
    if cu_seqlens_q is not None:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out
