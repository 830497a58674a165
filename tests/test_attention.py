"""kernels/reference/*attention.py against an explicit fp64 softmax, under autograd."""

from dataclasses import replace

import pytest
import torch
from families import assert_as_good_as
from hypothesis import given, settings
from hypothesis import strategies as st

from backfuse.kernels.reference import explicit_attention as module
from backfuse.kernels.reference.attention import (
    attention_backward,
    attention_forward,
    needs_delta,
)
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.dropout import dropout_mask
from backfuse.kernels.reference.explicit_attention import (
    AttentionMask,
    explicit_backward,
    explicit_forward,
)
from backfuse.kernels.reference.norm import accumulate_dtype


def sequence_pairs(tokens, keys, bounds, bounds_k):
    """Slices of the queries and of the keys of each sequence."""
    bounds = bounds or [0, tokens]
    if bounds_k is None:
        bounds_k = [0, keys] if len(bounds) == 2 else bounds
    slices = (map(slice, b, b[1:]) for b in (bounds, bounds_k))
    return list(zip(*slices, strict=False))


def visible(tokens, keys, mask, bounds, bounds_k):
    """bool [tokens, keys] from first principles."""
    seen = torch.zeros(tokens, keys, dtype=torch.bool)
    for rows, cols in sequence_pairs(tokens, keys, bounds, bounds_k):
        n, m = rows.stop - rows.start, cols.stop - cols.start
        i, j = torch.arange(n).unsqueeze(1) + m - n, torch.arange(m)
        part = torch.ones(n, m, dtype=torch.bool)
        if mask.causal:
            part &= j <= i
        if mask.window is not None:
            part &= (i - j).abs() < mask.window
        seen[rows, cols] = part
    return seen


def plain(q, k, v, sinks, mask, bias=None, bounds=None, bounds_k=None, seed=None):
    """Softmax attention in the inputs' dtype, nothing clever: a sink is a column more."""
    batch, tokens, heads, _ = q.shape
    keys = k.shape[1]
    k, v = (x.repeat_interleave(heads // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * mask.scale
    if mask.softcap:
        scores = mask.softcap * torch.tanh(scores / mask.softcap)
    seen = visible(tokens, keys, mask, bounds, bounds_k)
    if bias is not None:
        seen = bias if bias.dtype == torch.bool else torch.ones(1, dtype=torch.bool)
        scores = scores if bias.dtype == torch.bool else scores + bias
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.to(q.dtype).view(1, heads, 1, 1).expand(batch, -1, tokens, 1)
        scores = torch.cat([scores, column], -1)
    empty = (scores == float("-inf")).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(empty, 0.0), -1).masked_fill(empty, 0.0)
    weights = weights[..., :keys]
    if mask.dropout:
        kept = torch.zeros(batch, heads, tokens, keys)
        pairs = sequence_pairs(tokens, keys, bounds, bounds_k)
        for number, (rows, cols) in enumerate(pairs):  # counted from each sequence's start
            n, m = rows.stop - rows.start, cols.stop - cols.start
            if n and m:
                slices = torch.arange(batch * heads) + number * heads
                counts = torch.arange(n), torch.arange(m)
                part = dropout_mask(seed, mask.dropout, *counts, slices, mask.site)
                kept[:, :, rows, cols] = part.view(batch, heads, n, m)
        weights = weights * kept.to(weights.dtype) / (1 - mask.dropout)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


def rowsum(out, dout):
    """delta `[batch, heads, tokens]`, in the dtype sums are taken in."""
    high = accumulate_dtype(out.dtype)
    return (out.to(high) * dout.to(high)).sum(-1).transpose(1, 2)


def explicit(dout, q, k, v, out, lse, mask, *, delta, **options):
    """`explicit_backward` with the arguments of `attention_backward`."""
    return explicit_backward(dout, q, k, v, lse, mask, delta, **options)


def largest(x):
    """The largest element, 0 where there is none."""
    return x.max().item() if x.numel() else 0.0


def check(
    q, k, v, mask, *, sinks=None, bias=None, bounds=None, bounds_k=None, seed=None, forward,
    backward,
):  # fmt: skip
    """Outputs and gradients within twice the error of plain PyTorch in the same dtype."""
    dtype = q.dtype
    dout = torch.randn(*q.shape[:3], v.shape[3]).to(dtype).to(q.device)
    offsets = (
        None if b is None else torch.tensor(b, dtype=torch.int32) for b in (bounds, bounds_k)
    )

    def through_autograd(dtype):
        leaves = [x.to(dtype).detach().requires_grad_() for x in (q, k, v)]
        if sinks is not None:
            leaves.append(sinks.to(dtype).detach().requires_grad_())
        sink = leaves[3] if sinks is not None else None
        out = plain(*leaves[:3], sink, mask, bias, bounds, bounds_k, seed)
        return [out, *torch.autograd.grad(out, leaves, dout.to(dtype))]

    exact, theirs = through_autograd(torch.float64), through_autograd(dtype)
    options = {"sinks": sinks, "bias": bias, "seed": seed}
    options |= dict(zip(("cu_seqlens", "cu_seqlens_k"), offsets, strict=True))
    out, lse = forward(q, k, v, mask, **options)
    delta = rowsum(out, dout)
    ours = [out, *backward(dout, q, k, v, out, lse, mask, delta=delta, **options)]
    # dS is a difference of dP and delta, which may cancel: that is the size rounding acts on.
    terms = (dout.double().abs() * exact[0].detach().abs()).sum(-1)
    size = largest(terms) * mask.scale
    scales = [0.0, *(size * largest(x.abs()) for x in (k, q)), 0.0]
    eps = 2e-13 if dtype == torch.float64 else 4 * torch.finfo(dtype).eps
    names = ["out", "dq", "dk", "dv"]
    if sinks is None:
        assert ours.pop() is None
    else:
        assert ours[4].dtype == lse.dtype
        names, scales = [*names, "dsinks"], [*scales, largest(terms.sum((0, 1)))]
    for name, a, b, c, scale in zip(names, ours, theirs, exact, scales, strict=True):
        assert (a.dtype == dtype or name == "dsinks") and a.shape == c.shape
        if c.numel():
            assert_as_good_as(name, a, b, c, eps, scale)
    assert lse.shape == (q.shape[0], q.shape[2], q.shape[1])


def heads(batch, tokens, heads, kv_heads, dim, dtype, *, keys=None, v_dim=None):
    shapes = ((tokens, heads, dim), (keys or tokens, kv_heads, dim),
              (keys or tokens, kv_heads, v_dim or dim))  # fmt: skip
    return [torch.randn(batch, *shape).to(dtype) for shape in shapes]


MASKS = {
    "causal": AttentionMask(scale=0.3),
    "full": AttentionMask(causal=False, scale=0.3),
    "window": AttentionMask(window=9, scale=0.3),
    "window-1": AttentionMask(window=1, scale=0.3),
    "window-full": AttentionMask(window=9, causal=False, scale=0.3),
    "softcap": AttentionMask(softcap=2.0, scale=0.5),
    "dropout": AttentionMask(dropout=0.3, scale=0.3, site=2),
    "all": AttentionMask(window=20, softcap=3.0, dropout=0.2, scale=0.4, causal=False),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_explicit(name, kv_heads, packed, dtype, monkeypatch, poisoned_empty):
    monkeypatch.setattr(module, "BLOCK", 16)  # several blocks, the last one ragged
    bounds = [0, 5, 5, 39, 40, 53] if packed else None
    q, k, v = heads(1 if packed else 2, 53, 6, kv_heads, 8, dtype)
    check(
        q, k, v, MASKS[name], bounds=bounds, seed=torch.tensor([77]),
        forward=explicit_forward, backward=explicit,
    )  # fmt: skip


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dim", [1, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_library(causal, packed, dim, dtype, poisoned_empty):
    """PyTorch's CPU kernel, through the dispatching functions."""
    bounds = [0, 0, 11, 12, 64, 70] if packed else None
    q, k, v = heads(1 if packed else 3, 70, 4, 2, dim, dtype)
    mask = AttentionMask(causal=causal, scale=0.4)
    assert not needs_delta(AttentionRequest(mask, dtype, q.device, 70, dim, packed=packed))
    check(q, k, v, mask, bounds=bounds, forward=attention_forward, backward=attention_backward)


@pytest.mark.parametrize("shape", [(2, 1), (1, 1), (2, 4), (1, 4)])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_mask_tensor_replaces_causality(shape, kind):
    q, k, v = heads(2, 20, 4, 2, 8, torch.float32)
    bias = torch.rand(*shape, 20, 20) > 0.5 if kind == torch.bool else torch.randn(*shape, 20, 20)
    check(
        q, k, v, MASKS["causal"], bias=bias, forward=attention_forward, backward=attention_backward
    )


def test_rows_that_see_nothing_are_zero_and_harmless():
    q, k, v = heads(1, 12, 2, 2, 8, torch.float32)
    bias = torch.ones(1, 1, 12, 12, dtype=torch.bool)
    bias[..., 3:6, :] = False
    out, lse = attention_forward(q, k, v, AttentionMask(), bias=bias)
    assert (out[:, 3:6] == 0).all() and (lse[:, :, 3:6] == float("-inf")).all()
    dout = torch.randn_like(q)
    grads = attention_backward(
        dout, q, k, v, out, lse, AttentionMask(), delta=rowsum(out, dout), bias=bias
    )
    assert (grads[0][:, 3:6] == 0).all() and all(g.isfinite().all() for g in grads[:3])


@pytest.mark.parametrize("value", [-1e9, torch.finfo(torch.float32).min, -1e4])
def test_an_additive_mask_over_a_whole_row_leaves_weights_that_add_up(value):
    """Hugging Face's left padding: such a row averages, as softmax has it."""
    q, k, v = heads(2, 20, 4, 2, 8, torch.float32)
    bias = torch.zeros(2, 1, 20, 20)
    bias[..., :4, :] = value
    check(q, k, v, MASKS["full"], bias=bias, forward=attention_forward, backward=attention_backward)


def test_the_library_is_not_asked_for_what_it_lacks():
    plain = AttentionRequest(MASKS["causal"], torch.float32, torch.device("cpu"), 53, 8)
    for name in ("window", "softcap", "dropout", "all"):
        assert needs_delta(replace(plain, mask=MASKS[name]))
    assert needs_delta(replace(plain, bias=True))
    assert needs_delta(replace(plain, device=torch.device("cuda")))
    assert not needs_delta(replace(plain, mask=AttentionMask(window=53)))


def test_strided_heads_are_read_in_place():
    packed = torch.randn(2, 30, 3, 4, 8)
    q, k, v = packed.unbind(2)
    mask = AttentionMask(scale=0.5)
    for forward in (attention_forward, explicit_forward):
        out, lse = forward(q, k, v, mask)
        again, lse_again = forward(*(x.contiguous() for x in (q, k, v)), mask)
        torch.testing.assert_close(out, again)
        torch.testing.assert_close(lse, lse_again)


@settings(max_examples=40, deadline=None)
@given(
    cuts=st.lists(st.integers(0, 40), max_size=5),
    window=st.none() | st.integers(1, 50),
    causal=st.booleans(),
    group=st.sampled_from([1, 3]),
    block=st.sampled_from([4, 16, 64]),
)
def test_explicit_on_any_packing(cuts, window, causal, group, block):
    bounds = [0, *sorted(cuts), 40]
    q, k, v = heads(1, 40, 2 * group, 2, 4, torch.float64)
    mask = AttentionMask(causal=causal, window=window, scale=0.5)
    before, module.BLOCK = module.BLOCK, block
    try:
        check(q, k, v, mask, bounds=bounds, forward=explicit_forward, backward=explicit)
    finally:
        module.BLOCK = before
