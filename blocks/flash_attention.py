"""`flash_attention`: attention by itself, for models whose attention is no block of ours.

    out = softmax(scale q k^T) v        LSE = log(sum exp (scale q k^T) [+ exp sink])

| kept | recomputed | GEMMs in backward |
|---|---|---|
| q, k, v as they were given, out, LSE (fp32, one a row and head) | the softmax | 5; 7 in the
kernels, which rebuild it twice |

To torch.compile and selective checkpoints it is an operator (`flash_attention_op.py`).

Multi-head latent attention (heads of v narrower than those of k), cross-attention and decoding
(other numbers of keys than of queries) come here; a block keeps less than this can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backfuse.kernels.reference.attention_inputs import check_looks
from backfuse.kernels.reference.dropout import draw_seed

from .flash_attention_op import (
    FlashAttentionFunction,
    Given,
    check_packed,
    forward_op,
    make_job,
    mask_of,
)
from .inputs import check_impl, dtype_under_autocast
from .replay import operators_matter


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

    Under autocast q, k and v are cast to its dtype, as by PyTorch's scaled_dot_product_attention.

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
    if (dtype := dtype_under_autocast(q)) is not None:
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
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
    given = Given(q, k, v, sinks, cu_seqlens_q, cu_seqlens_k, None)
    traced = torch.compiler.is_compiling()
    if not traced:  # else the operator looks, when there are offsets to see
        check_packed(given, max_seqlen_q, max_seqlen_k)
    if dropout:
        seed = torch.ops.backfuse.draw_seed(q, 1) if traced else draw_seed(q, 1)
        given = given._replace(seed=seed)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    options = causal, window, softcap, scale, dropout, max_seqlen_q
    mask = mask_of(*options)
    if operators_matter():
        check_looks(*given[:3], mask, *given[3:])
        out, lse = forward_op(*given, *options, max_seqlen_k, impl)
    else:
        out, lse = FlashAttentionFunction.apply(make_job(given, mask, impl), *given)
    if cu_seqlens_q is not None:
        out, lse = out.squeeze(0), lse.squeeze(0)
    return (out, lse) if return_lse else out
