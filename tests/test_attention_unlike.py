"""Sinks, heads of v of another width, and other numbers of keys than of queries: on both paths."""

import functools
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from hypothesis import given, settings
from hypothesis import strategies as st
from test_attention import MASKS, check, explicit, rowsum
from test_attention import heads as plain_heads
from test_attention_kernels import heads

from backfuse.kernels import fused, reference
from backfuse.kernels.attention import attention_forward
from backfuse.kernels.attention_backward import attention_backward
from backfuse.kernels.reference import explicit_attention as module
from backfuse.kernels.reference.attention import needs_delta
from backfuse.kernels.reference.attention_inputs import check_attention
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask, explicit_forward

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64

kernels = functools.partial(
    check, forward=fused.attention_forward, backward=fused.attention_backward
)
written_out = functools.partial(check, forward=explicit_forward, backward=explicit)


def sinks_of(q, dtype=None):
    """Some larger than any score, some smaller."""
    return torch.linspace(-4, 4, q.shape[2]).to(dtype or q.dtype).to(q.device)


#: Queries and keys of packed sequences: fewer, more, none of either, one query to many keys.
BOUNDS = {
    "more-keys": ([0, 3, 20, 21], [0, 40, 57, 97]),
    "more-queries": ([0, 40, 57, 97], [0, 3, 20, 21]),
    "none": ([0, 7, 7, 20, 20], [0, 0, 9, 44, 44]),
    "no-queries": ([0, 0, 0], [0, 9, 35]),
    "no-keys": ([0, 9, 35], [0, 0, 0]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("dtype", [F64, F32, BF16])
@pytest.mark.parametrize("bounds", [None, [0, 5, 5, 39, 40, 53]])
def test_sinks_written_out(name, dtype, bounds, monkeypatch, poisoned_empty):
    monkeypatch.setattr(module, "BLOCK", 16)
    q, k, v = plain_heads(2 if bounds is None else 1, 53, 6, 2, 8, dtype)
    written_out(q, k, v, MASKS[name], sinks=sinks_of(q), bounds=bounds, seed=torch.tensor([7]))


@pytest.mark.parametrize("name", ["causal", "window", "softcap", "dropout", "all"])
@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_sinks_in_kernels(name, dtype, poisoned_empty):
    q, k, v = heads(2, 45, 4, 2, 16, dtype)
    seed = torch.tensor([7], device=DEVICE)
    kernels(q, k, v, MASKS[name], sinks=sinks_of(q), seed=seed)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_sinks_of_their_own_dtype_and_packed(dtype, poisoned_empty):
    q, k, v = heads(1, 53, 3, 1, 16, F32)
    kernels(q, k, v, MASKS["causal"], sinks=sinks_of(q, dtype), bounds=[0, 5, 5, 53])


@pytest.mark.parametrize("impl", [fused, reference])
def test_sinks_where_nothing_is_seen(impl):
    """The sink is all of the sum; it and its gradient are harmless, even a sink of -inf."""
    q, k, v = heads(1, 40, 2, 1, 16, F32, keys=8)
    sinks = torch.tensor([1.5, float("-inf")], device=DEVICE)
    mask = AttentionMask()
    out, lse = impl.attention_forward(q, k, v, mask, sinks=sinks)
    assert (out[:, :32] == 0).all()
    assert (lse[0, 0, :32] == 1.5).all() and (lse[0, 1, :32] == float("-inf")).all()
    dout = torch.randn_like(out)
    options = {"delta": rowsum(out, dout), "sinks": sinks}
    grads = impl.attention_backward(dout, q, k, v, out, lse, mask, **options)
    assert all(g.isfinite().all() for g in grads) and (grads[0][:, :32] == 0).all()
    assert grads[3][0] != 0 and grads[3][1] == 0
    less = impl.attention_backward(dout, q, k, v, out, lse, mask, **options, need_dsinks=False)
    assert less[3] is None and all(map(torch.equal, less[:3], grads[:3]))


@pytest.mark.parametrize("dims", [(8, 20), (20, 8), (16, 1), (1, 16)])
@pytest.mark.parametrize("dtype", [F64, BF16])
@pytest.mark.parametrize("name", ["causal", "all"])
def test_widths_written_out(dims, dtype, name):
    q, k, v = plain_heads(2, 30, 4, 2, dims[0], dtype, v_dim=dims[1])
    seed = torch.tensor([7])
    check(
        q, k, v, MASKS[name], seed=seed, sinks=sinks_of(q),
        forward=reference.attention_forward, backward=reference.attention_backward,
    )  # fmt: skip


@pytest.mark.parametrize("dims", [(16, 32), (32, 16), (24, 40), (192, 128), (1, 20), (20, 1)])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_widths_in_kernels(dims, dtype, poisoned_empty):
    q, k, v = heads(2, 40, 2, 1, dims[0], dtype, v_dim=dims[1])
    seed = torch.tensor([7], device=DEVICE)
    mask = MASKS["all"] if dims == (24, 40) else AttentionMask(scale=dims[0] ** -0.5)
    kernels(q, k, v, mask, seed=seed)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("sizes", [(1, 53), (53, 1), (20, 53), (53, 20)])
def test_lengths_written_out(name, sizes, monkeypatch, poisoned_empty):
    monkeypatch.setattr(module, "BLOCK", 16)
    q, k, v = plain_heads(2, sizes[0], 4, 2, 8, F64, keys=sizes[1])
    written_out(q, k, v, MASKS[name], seed=torch.tensor([7]))


@pytest.mark.parametrize("name", ["causal", "full", "window", "window-full", "all"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_packed_lengths_written_out(name, bounds, monkeypatch, poisoned_empty):
    monkeypatch.setattr(module, "BLOCK", 16)
    of_q, of_k = BOUNDS[bounds]
    [q, _, _], [_, k, v] = (plain_heads(1, b[-1], 4, 2, 8, F64) for b in (of_q, of_k))
    written_out(q, k, v, MASKS[name], bounds=of_q, bounds_k=of_k, seed=torch.tensor([7]))


@pytest.mark.parametrize("name", ["causal", "full", "window", "window-full", "all"])
@pytest.mark.parametrize("sizes", [(1, 70), (70, 1), (33, 70), (70, 33)])
def test_lengths_in_kernels(name, sizes, poisoned_empty):
    q, k, v = heads(2, sizes[0], 2, 1, 16, F32, keys=sizes[1])
    seed = torch.tensor([7], device=DEVICE)
    kernels(q, k, v, MASKS[name], seed=seed, sinks=sinks_of(q) if name == "full" else None)


@pytest.mark.parametrize("name", ["causal", "window-full", "all"])
@pytest.mark.parametrize("bounds", BOUNDS)
def test_packed_lengths_in_kernels(name, bounds, poisoned_empty):
    of_q, of_k = BOUNDS[bounds]
    (q, *_), (_, k, v) = (heads(1, b[-1], 2, 1, 16, F32) for b in (of_q, of_k))
    seed = torch.tensor([7], device=DEVICE)
    kernels(q, k, v, MASKS[name], bounds=of_q, bounds_k=of_k, seed=seed)


@pytest.mark.parametrize("sizes", [(0, 5), (5, 0)])
def test_nothing_on_one_side(sizes, poisoned_empty):
    q, k, v = (torch.randn(2, n, 2, 16, device=DEVICE) for n in (sizes[0], sizes[1], sizes[1]))
    kernels(q, k, v, AttentionMask())
    written_out(q, k, v, AttentionMask())


@settings(max_examples=60, deadline=None)
@given(
    queries=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    keys=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    window=st.none() | st.integers(1, 15),
    causal=st.booleans(),
    block=st.sampled_from([4, 64]),
)
def test_written_out_on_any_packing(queries, keys, window, causal, block):
    of_q, of_k = ([0, *torch.tensor(n).cumsum(0).tolist()] for n in (queries, keys))
    [q, _, _], [_, k, v] = (plain_heads(1, b[-1], 2, 1, 4, F64) for b in (of_q, of_k))
    mask = AttentionMask(causal=causal, window=window, scale=0.5)
    before, module.BLOCK = module.BLOCK, block
    try:
        written_out(q, k, v, mask, sinks=sinks_of(q), bounds=of_q, bounds_k=of_k)
    finally:
        module.BLOCK = before


def test_the_library_is_not_asked_for_any_of_it():
    plain = AttentionRequest(AttentionMask(), F32, torch.device("cpu"), 53, 8)
    assert not needs_delta(plain) and not needs_delta(replace(plain, v_head_dim=8))
    for asked in ({"sinks": True}, {"v_head_dim": 16}, {"unlike": True}):
        assert needs_delta(replace(plain, **asked))
    with pytest.raises(RuntimeError, match="same head size"):  # else it could be asked for widths
        q, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 4)
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, v)


GOOD = torch.zeros(1, 4, 2, 8)
OFFSETS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks is torch.float32 \[3\], expected .* \[2\]"),
        ({"sinks": torch.zeros(2).long()}, ValueError, r"sinks is torch.int64 \[2\], expected a f"),
        ({"mask": AttentionMask(window=0)}, ValueError, "window is 0, expected at least 1"),
        ({"mask": AttentionMask(dropout=0.1)}, ValueError, "seed is None, expected one for a drop"),
        ({"k": GOOD[..., :4]}, ValueError, r"k has the shape .*, expected \[1, keys, heads, 8\]"),
        ({"v": GOOD[:, :3]}, ValueError, r"v has the shape .*, expected \[1, 4, heads, dim\]"),
        ({"v": GOOD[0]}, ValueError, r"v has the shape \[4, 2, 8\], expected \[1, 4, heads, dim\]"),
        ({"k": GOOD[:, :, :0], "v": GOOD[:, :, :0]}, ValueError, "2, 0 and 0 heads, expected"),
        ({"v": GOOD[..., :0]}, ValueError, "heads of q and v have 8 and 0 channels"),
        ({"v": GOOD.to("meta")}, ValueError, "v is on meta, expected cpu"),
        ({"cu_seqlens": OFFSETS.float()}, TypeError, r"cu_seqlens is torch.float32 \[2\], exp"),
        ({"cu_seqlens": OFFSETS[None]}, TypeError, r"cu_seqlens is torch.int32 \[1, 2\], expected"),
        ({"cu_seqlens": OFFSETS.to("meta")}, ValueError, "cu_seqlens is on meta, expected cpu"),
        ({"cu_seqlens": OFFSETS - 1}, ValueError, r"cu_seqlens is \[-1, 3\], expected offsets tha"),
        ({"cu_seqlens": OFFSETS * 2}, ValueError, r"is \[0, 8\].*to the number of rows \(4\)"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 4])}, ValueError, r"is \[0, 3, 2, 4\], expected"),
        ({"cu_seqlens_k": OFFSETS}, ValueError, "cu_seqlens is None, expected one together with"),
        ({"k": GOOD[:, :3], "v": GOOD[:, :3], "cu_seqlens": OFFSETS}, ValueError, "k has 3 rows a"),
        ({"cu_seqlens": OFFSETS, "cu_seqlens_k": torch.tensor([0, 1, 4])}, ValueError,
         "cu_seqlens_k has 3 offsets, expected as many as cu_seqlens"),
        ({"cu_seqlens": OFFSETS, "cu_seqlens_k": OFFSETS * 2}, ValueError, r"_k is \[0, 8"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    arguments = {"q": GOOD, "k": GOOD, "v": GOOD, "mask": AttentionMask(), **change}
    with pytest.raises(error, match=message):
        check_attention(**arguments)
    with pytest.raises(error, match=message):
        attention_forward(**arguments)
    rows = torch.zeros(1, 2, 4)
    grads = {"dout": GOOD[..., : arguments["v"].shape[-1]], "lse": rows, "delta": rows}
    with pytest.raises(error, match=message):
        attention_backward(**arguments, **grads)
