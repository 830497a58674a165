"""The attention kernels where numbers are large, small, or stand oddly; and blocks nobody sees."""

import sys

import pytest
import torch
from conftest import DEVICE
from test_attention import check, plain

from backfuse import flash_attention
from backfuse.kernels import attention as forward_module
from backfuse.kernels import attention_backward as backward_module
from backfuse.kernels import fused
from backfuse.kernels.attention import attention_forward
from backfuse.kernels.attention_backward import attention_backward
from backfuse.kernels.attention_launch import MAX_BATCH
from backfuse.kernels.reference.explicit_attention import AttentionMask

F32, BF16 = torch.float32, torch.bfloat16


def heads(tokens, count=2, dim=16, dtype=F32, batch=1):
    return [torch.randn(batch, tokens, count, dim, device=DEVICE).to(dtype) for _ in range(3)]


def kernels(q, k, v, mask, **options):
    check(
        q, k, v, mask, forward=fused.attention_forward, backward=fused.attention_backward,
        **options,
    )  # fmt: skip


@pytest.mark.parametrize("cap", [0.5, 30.0, 50.0, 1000.0])
def test_softcaps_of_fp32(cap):
    """Scores far below the cap, where a formula for tanh may cancel."""
    kernels(*heads(40), AttentionMask(softcap=cap, scale=0.25))


@pytest.mark.parametrize("window", [2**31 - 1, 2**31, 2**40, sys.maxsize])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_larger_than_anything(window, causal):
    kernels(*heads(40), AttentionMask(window=window, causal=causal, scale=0.25))


@pytest.mark.parametrize("kind", ["strided", "expanded"])
def test_sinks_of_any_stride(kind):
    sinks = torch.linspace(-4, 4, 8, device=DEVICE)[::2]
    if kind == "expanded":
        sinks = torch.full((1,), 2.0, device=DEVICE).expand(4)
    kernels(*heads(20, count=4), AttentionMask(scale=0.25), sinks=sinks)


class Recorder:
    """Stands in a kernel's place and remembers what it was given."""

    def __init__(self):
        self.given = []

    def __getitem__(self, grid):
        return lambda *args, **flags: self.given.append(args)


def test_offsets_reach_a_kernel_in_32_bits(monkeypatch):
    """In 64 they would be a descriptor's offsets, which have 32: that does not compile."""
    kernels = Recorder()
    monkeypatch.setattr(forward_module, "attention_forward_kernel", kernels)
    monkeypatch.setattr(backward_module, "attention_dkdv_kernel", kernels)
    monkeypatch.setattr(backward_module, "attention_dq_kernel", kernels)
    q, k, v = heads(20)
    offsets = torch.tensor([0, 7, 20], device=DEVICE)
    both = {"cu_seqlens": offsets, "cu_seqlens_k": offsets}
    out, lse = attention_forward(q, k, v, AttentionMask(), **both)
    attention_backward(out, q, k, v, lse, AttentionMask(), lse, **both)
    assert len(kernels.given) == 3
    for args in kernels.given:
        integers = [x for x in args if isinstance(x, torch.Tensor) and not x.is_floating_point()]
        assert len(integers) == 4 and all(x.dtype == torch.int32 for x in integers)


@pytest.mark.parametrize("window, causal", [(None, True), (20, True), (20, False)])
def test_blocks_that_nobody_sees_are_not_visited(window, causal):
    """A NaN in one of them would meet a weight of 0, and spread."""
    tokens, block = 320, 64  # keys and queries of any configuration's block, and more
    q, k, v = heads(tokens, count=1)
    mask = AttentionMask(window=window, causal=causal, scale=0.25)
    out, lse = attention_forward(q, k, v, mask)
    dout = torch.randn_like(out)
    delta = (out * dout).sum(-1).transpose(1, 2)
    right = attention_backward(dout, q, k, v, lse, mask, delta)
    last = slice(tokens - block, tokens)  # seen by none of the first block's queries
    v_bad, k_bad = v.clone(), k.clone()
    v_bad[:, last], k_bad[:, last] = float("nan"), float("nan")
    first = slice(0, block)
    bad_out, _ = attention_forward(q, k_bad, v_bad, mask)
    assert torch.equal(bad_out[:, first], out[:, first])
    dq, *_ = attention_backward(dout, q, k_bad, v_bad, lse, mask, delta)
    assert torch.equal(dq[:, first], right[0][:, first])
    q_bad, dout_bad = q.clone(), dout.clone()  # queries that see none of the last keys
    q_bad[:, first], dout_bad[:, first] = float("nan"), float("nan")
    _, dk, dv, _ = attention_backward(dout_bad, q_bad, k, v, lse, mask, delta)
    assert torch.equal(dk[:, last], right[1][:, last])
    assert torch.equal(dv[:, last], right[2][:, last])


def test_heads_that_stand_far_apart():
    """As in PyTorch's own layout: between two heads there are all tokens."""
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in heads(40, count=3))
    kernels(q, k, v, AttentionMask(scale=0.25))
    expected = plain(q, k, v, None, AttentionMask(scale=0.25))
    assert torch.allclose(flash_attention(q, k, v, scale=0.25, impl="triton"), expected, atol=1e-5)


def test_more_sequences_than_a_grid_has():
    q = torch.zeros(1, 1, 1, 1, device=DEVICE).expand(MAX_BATCH + 1, 1, 1, 1)
    with pytest.raises(ValueError, match=f"a batch of {MAX_BATCH + 1}, expected at most"):
        attention_forward(q, q, q, AttentionMask())


GOOD = torch.zeros(1, 4, 2, 8)
PACKED = {"q": GOOD[0], "k": GOOD[0], "v": GOOD[0], "cu_seqlens_q": torch.tensor([0, 4])}


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": GOOD[:0], "k": GOOD[:0], "v": GOOD[:0]}, ValueError, "expected a batch of at least"),
        ({"sinks": [0.0, 0.0]}, TypeError, r"sinks is \[0.0, 0.0\], expected a tensor"),
        ({"sinks": 1.0}, TypeError, "sinks is 1.0, expected a tensor"),
        ({"softcap": True}, ValueError, "softcap is True, expected a positive number"),
        ({"causal": "no"}, TypeError, "causal is 'no', expected True or False"),
        ({**PACKED, "max_seqlen_k": 4}, ValueError, "cu_seqlens_k is None, expected offsets"),
    ],
)
def test_bad_input(change, error, message):
    for impl in ("triton", "reference"):
        with pytest.raises(error, match=message):
            flash_attention(**{"q": GOOD, "k": GOOD, "v": GOOD, **change}, impl=impl)
