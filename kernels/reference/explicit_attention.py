"""Softmax attention written out, and its gradient from Q, K, V and O.

    S = scale * Q K^T    [S = cap * tanh(S / cap)]
    P = softmax(S)       O = (P o mask / (1 - p)) V
    LSE = log(sum exp S [+ exp sink]), one a row: P = exp(S - LSE)

    delta = rowsum(O o dO)       dP = (dO V^T) o mask / (1 - p)       dS = P o (dP - delta)
    [dS *= 1 - tanh^2]     dQ = scale dS K     dK = scale dS^T Q     dV = (P o mask / (1 - p))^T dO
    dsink = -sum over rows of exp(sink - LSE) delta

| kept | recomputed | GEMMs |
|---|---|---|
| Q, K, V, O and LSE (fp32, one a row) | P, block by block | forward 2, backward 5 |

It walks over blocks of query rows and only the keys they can see, so its scratch is
O(block * keys), whatever the mask. It does all there is: softcap, window, masks, sinks, dropout,
packed sequences, q, k and v of different lengths and widths, any dtype. Rows that see no key give
zeros, and zero gradients.

A sink is a learnt logit of each query head that takes part in the softmax's sum and in nothing
else: it is neither scaled nor capped nor dropped (GPT-OSS).

Where there are more keys than queries, or fewer, the last query of a sequence stands beside its
last key, as in FlashAttention from 2.1 on: `shift = keys - queries`.

Sources: Dao et al. 2022, Dao 2023.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .dropout import dropout_mask
from .norm import accumulate_dtype

#: Query rows that are worked on at a time.
BLOCK = 256


class Pair(NamedTuple):
    """The queries and the keys of one sequence.

    Attributes:
        number: which sequence.
        q: its first query.
        queries: how many.
        k: its first key.
        keys: how many.
    """

    number: int
    q: int
    queries: int
    k: int
    keys: int


class Span(NamedTuple):
    """Queries `[q0, q1)` and the keys `[k0, k1)` they can see, counted from their sequence's start.

    Attributes:
        q0: see above, and so the others.
        q1: see q0.
        k0: see q0.
        k1: see q0.
    """

    q0: int
    q1: int
    k0: int
    k1: int


@dataclass(frozen=True)
class AttentionMask:
    """Which keys a query sees, and what happens to its scores.

    Attributes:
        causal: query i sees keys j <= i + shift.
        window: query i sees keys with |i + shift - j| < window; None for all.
        softcap: scores become `softcap * tanh(score / softcap)`; None for as they are.
        scale: factor on the scores.
        dropout: probability that a softmax weight is dropped.
        site: which dropout of the block this is (see `dropout.py`).
        max_seqlen: longest packed sequence, where the caller knows it.
    """

    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    scale: float = 1.0
    dropout: float = 0.0
    site: int = 0
    max_seqlen: int | None = None


def sequences(tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """Number, first and last row of each packed sequence, empty ones left out."""
    bounds = [0, tokens] if cu_seqlens is None else cu_seqlens.tolist()
    spans = enumerate(zip(bounds, bounds[1:], strict=False))
    return [(number, a, b) for number, (a, b) in spans if b > a]


def _pairs(
    queries: int, keys: int, cu_seqlens: Tensor | None, cu_seqlens_k: Tensor | None
) -> Iterator[Pair]:
    """The sequences that have queries and keys; without offsets of keys they are the queries'."""
    q_bounds = [0, queries] if cu_seqlens is None else cu_seqlens.tolist()
    k_bounds = q_bounds if cu_seqlens_k is None else cu_seqlens_k.tolist()
    if cu_seqlens is None:
        k_bounds = [0, keys]
    for number in range(len(q_bounds) - 1):
        q0, q1 = q_bounds[number : number + 2]
        k0, k1 = k_bounds[number : number + 2]
        if q1 > q0 and k1 > k0:
            yield Pair(number, q0, q1 - q0, k0, k1 - k0)


def _blocks(queries: int, keys: int, mask: AttentionMask, bias: Tensor | None) -> Iterator[Span]:
    """The blocks of one sequence that can see any key.

    A bias says everything itself: with one, every key is visited.
    """
    shift = keys - queries
    for q0 in range(0, queries, BLOCK):
        q1 = min(q0 + BLOCK, queries)
        k0, k1 = 0, keys
        if bias is None:
            if mask.causal:
                k1 = min(k1, q1 + shift)
            if mask.window is not None:
                k0 = max(k0, q0 + shift - mask.window + 1)
                k1 = min(k1, q1 + shift + mask.window - 1)
        if k1 > k0:
            yield Span(q0, q1, k0, k1)


def score_flops(
    tokens: int,
    lengths: list[int] | None,
    width: int,
    mask: AttentionMask,
    library: bool,
    masked: bool,
    keys: int | None = None,
) -> int:
    """Multiply-add FLOPs (two each) of `Q K^T` for one row of a batch, all heads.

    Args:
        tokens: rows.
        lengths: lengths of the packed sequences, or None.
        width: heads * head_dim.
        mask: what is visible.
        library: whether PyTorch's kernel is used: its formula counts every key, visible or not.
        masked: whether a mask tensor is given.
        keys: how many, for rows that are one sequence; None: as many as rows.
    """
    if library:
        return 2 * width * sum(n * n for n in lengths or [tokens])
    pairs = 0
    for n in lengths or [tokens]:
        blocks = _blocks(n, n if keys is None else keys, mask, torch.empty(0) if masked else None)
        pairs += sum((q1 - q0) * (k1 - k0) for q0, q1, k0, k1 in blocks)
    return 2 * width * pairs


def _visible(span: Span, shift: int, mask: AttentionMask, device: torch.device) -> Tensor | None:
    """bool `[rows, keys]`, or None where a block sees every key it visits."""
    if not mask.causal and mask.window is None:
        return None
    q0, q1, k0, k1 = span
    distance = torch.arange(q0, q1, device=device).unsqueeze(1) + shift
    distance = distance - torch.arange(k0, k1, device=device)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        visible &= distance >= 0
    if mask.window is not None:
        visible &= distance.abs() < mask.window
    return visible


def _heads(x: Tensor, groups: int, high: torch.dtype) -> Tensor:
    """`[batch, rows, heads, dim]` to `[batch, kv heads, groups * rows, dim]`, in the high dtype."""
    return rearrange(x, "b t (h g) d -> b h (g t) d", g=groups).to(high)


def _scores(
    q: Tensor,
    k: Tensor,
    span: Span,
    shift: int,
    mask: AttentionMask,
    bias: Tensor | None,
    groups: int,
) -> tuple[Tensor, Tensor | None]:
    """Masked scores `[batch, kv heads, groups, rows, keys]` and tanh's value where softcapped."""
    q0, q1, k0, k1 = span
    scores = torch.matmul(q, k.transpose(-1, -2)).mul_(mask.scale)
    scores = rearrange(scores, "b h (g t) s -> b h g t s", g=groups)
    tanh = None
    if mask.softcap is not None:
        tanh = scores.div_(mask.softcap).tanh_()
        scores = tanh * mask.softcap
    if bias is not None:
        part = bias[..., q0:q1, k0:k1]
        # [batch or 1, heads or 1, rows, keys] beside [batch, kv heads, groups, rows, keys]
        part = part.unsqueeze(2) if part.shape[1] == 1 else part.unflatten(1, (-1, groups))
        if part.dtype == torch.bool:
            scores = scores.masked_fill_(~part, float("-inf"))
        else:
            scores = scores.add_(part)
    else:
        visible = _visible(span, shift, mask, q.device)
        if visible is not None:
            scores = scores.masked_fill_(~visible, float("-inf"))
    return scores, tanh


def _softmax(scores: Tensor, row_lse: Tensor, sink: Tensor | None) -> Tensor:
    """Softmax weights, zeros in rows that see nothing; scores are overwritten.

    A block holds whole rows, so the weights are normalised by themselves and not by LSE: with a
    mask of -1e9 added to all of a row, LSE = max + log(sum) would lose the logarithm.
    """
    largest = scores.amax(-1, keepdim=True)
    if sink is not None:
        largest = torch.maximum(largest, sink)
    largest.clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total += torch.exp(sink - largest)
    return weights.div_(total.masked_fill_(row_lse == float("-inf"), 1.0))


def _sink(sinks: Tensor | None, groups: int, high: torch.dtype) -> Tensor | None:
    """Sinks beside scores: `[kv heads, groups, 1, 1]`."""
    return None if sinks is None else sinks.to(high).view(-1, groups, 1, 1)


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """The gradient of the sinks, `[heads]`, in the dtype of LSE.

    Args:
        sinks: `[heads]`.
        lse: `[batch, heads, tokens]`, sinks included.
        delta: `[batch, heads, tokens]`, rowsum(out o dout).
    """
    weights = torch.exp(sinks.to(lse.dtype).view(-1, 1) - lse)
    weights.masked_fill_(lse == float("-inf"), 0.0)
    return -(weights * delta).sum((0, 2))


def _dropped(
    shape: torch.Size,
    span: Span,
    number: int,
    mask: AttentionMask,
    seed: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """The dropout mask of one block, scaled: `[batch, kv heads, groups, rows, keys]`.

    Rows and keys count from the start of their sequence, whose number stands in for the batch's.
    """
    heads = shape[1] * shape[2]
    kept = dropout_mask(
        seed,
        mask.dropout,
        torch.arange(span.q0, span.q1, device=seed.device),
        torch.arange(span.k0, span.k1, device=seed.device),
        torch.arange(number * heads, (number + shape[0]) * heads, device=seed.device),
        mask.site,
    )
    return kept.view(shape).to(dtype).div_(1.0 - mask.dropout)


def explicit_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention, block of rows by block of rows. Arguments and results as `attention_forward`."""
    high, groups = accumulate_dtype(q.dtype), q.shape[2] // k.shape[2]
    sink = _sink(sinks, groups, high)
    out = torch.zeros((*q.shape[:3], v.shape[3]), dtype=q.dtype, device=q.device)
    lse = torch.full(
        (q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=high, device=q.device
    )
    if sinks is not None:
        lse.copy_(sinks.view(-1, 1))
    for number, q_start, queries, k_start, keys in _pairs(
        q.shape[1], k.shape[1], cu_seqlens, cu_seqlens_k
    ):
        for span in _blocks(queries, keys, mask, bias):
            rows = slice(q_start + span.q0, q_start + span.q1)
            cols = slice(k_start + span.k0, k_start + span.k1)
            scores, _ = _scores(
                _heads(q[:, rows], groups, high), _heads(k[:, cols], 1, high), span,
                keys - queries, mask, bias, groups,
            )  # fmt: skip
            row_lse = torch.logsumexp(scores, -1, keepdim=True)
            if sink is not None:
                row_lse = torch.logaddexp(row_lse, sink)
            weights = _softmax(scores, row_lse, sink)
            if mask.dropout:
                assert seed is not None
                weights.mul_(_dropped(weights.shape, span, number, mask, seed, high))
            weights = rearrange(weights, "b h g t s -> b h (g t) s")
            part = torch.matmul(weights, _heads(v[:, cols], 1, high))
            out[:, rows] = rearrange(part, "b h (g t) d -> b t (h g) d", g=groups)
            lse[:, :, rows] = rearrange(row_lse, "b h g t 1 -> b (h g) t")
    return out, lse


def explicit_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    delta: Tensor,
    *,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
    need_dsinks: bool = True,
    need_dq: bool = True,
    need_dkv: bool = True,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and sinks. Arguments and results as `attention_backward`."""
    high, groups = accumulate_dtype(q.dtype), q.shape[2] // k.shape[2]
    sink = _sink(sinks, groups, high)
    dq = torch.zeros(q.shape, dtype=q.dtype, device=q.device) if need_dq else None
    dk, dv = (x.new_zeros(x.shape, dtype=high) if need_dkv else None for x in (k, v))
    pairs = _pairs(q.shape[1], k.shape[1], cu_seqlens, cu_seqlens_k)
    for number, q_start, queries, k_start, keys in pairs if need_dq or need_dkv else ():
        for span in _blocks(queries, keys, mask, bias):
            rows = slice(q_start + span.q0, q_start + span.q1)
            cols = slice(k_start + span.k0, k_start + span.k1)
            q_part, k_part = _heads(q[:, rows], groups, high), _heads(k[:, cols], 1, high)
            scores, tanh = _scores(q_part, k_part, span, keys - queries, mask, bias, groups)
            row_lse = rearrange(lse[:, :, rows], "b (h g) t -> b h g t 1", g=groups)
            weights = _softmax(scores, row_lse, sink)
            do_part = _heads(dout[:, rows], groups, high)
            dweights = torch.matmul(do_part, _heads(v[:, cols], 1, high).transpose(-1, -2))
            dweights = rearrange(dweights, "b h (g t) s -> b h g t s", g=groups)
            dropped = weights
            if mask.dropout:
                assert seed is not None
                factor = _dropped(weights.shape, span, number, mask, seed, high)
                dropped, dweights = weights * factor, dweights.mul_(factor)
            dropped = rearrange(dropped, "b h g t s -> b h (g t) s")
            if dv is not None:
                dv[:, cols] += rearrange(
                    torch.matmul(dropped.transpose(-1, -2), do_part), "b h s d -> b s h d"
                )
            row_delta = rearrange(delta[:, :, rows], "b (h g) t -> b h g t 1", g=groups)
            dscores = dweights.sub_(row_delta).mul_(weights)
            if tanh is not None:
                dscores.mul_(1.0 - tanh.square())
            dscores = rearrange(dscores.mul_(mask.scale), "b h g t s -> b h (g t) s")
            if dq is not None:
                dq_part = torch.matmul(dscores, k_part)
                dq[:, rows] = rearrange(dq_part, "b h (g t) d -> b t (h g) d", g=groups)
            if dk is not None:
                dk[:, cols] += rearrange(
                    torch.matmul(dscores.transpose(-1, -2), q_part), "b h s d -> b s h d"
                )
    dsinks = sink_gradient(sinks, lse, delta) if sinks is not None and need_dsinks else None
    if dk is not None and dv is not None:
        dk, dv = dk.to(k.dtype), dv.to(v.dtype)
    return dq, dk, dv, dsinks
