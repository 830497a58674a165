"""kernels/reference/rope.py: Hugging Face's formula, the exact transpose, partial dims."""

import pytest
import torch

from backfuse import rope_cos_sin
from backfuse.kernels.reference.rope import rope


def plain(x, cos, sin, layout):
    """x cos + rot(x) sin on the rotary channels, as Hugging Face writes it."""
    dim = cos.shape[-1]
    part, rest = x[..., :dim], x[..., dim:]
    if layout == "half":
        rotated = torch.cat((-part[..., dim // 2 :], part[..., : dim // 2]), -1)
    else:
        rotated = torch.stack((-part[..., 1::2], part[..., 0::2]), -1).flatten(-2)
    return torch.cat((part * cos.unsqueeze(1) + rotated * sin.unsqueeze(1), rest), -1)


@pytest.mark.parametrize("layout", ["half", "interleaved"])
@pytest.mark.parametrize("head_dim, rotary_dim", [(8, 8), (8, 4), (6, 2), (10, 10)])
@pytest.mark.parametrize("in_place", [False, True])
def test_forward_and_transpose(layout, head_dim, rotary_dim, in_place):
    x = torch.randn(5, 3, head_dim, dtype=torch.float64, requires_grad=True)
    # cos and sin of no rotation at all, different in the two halves: the transpose must still hold
    cos, sin = torch.randn(2, 5, rotary_dim, dtype=torch.float64)
    y, dy = plain(x, cos, sin, layout), torch.randn(5, 3, head_dim, dtype=torch.float64)
    (dx,) = torch.autograd.grad(y, x, dy)
    given, dgiven = x.detach().clone(), dy.clone()
    out = given if in_place else torch.full_like(given, float("nan"))
    dout = dgiven if in_place else torch.full_like(dgiven, float("nan"))
    torch.testing.assert_close(rope(given, cos, sin, layout=layout, out=out), y.detach())
    torch.testing.assert_close(rope(dgiven, cos, sin, layout=layout, out=dout, transpose=True), dx)
    if not in_place:
        assert torch.equal(given, x) and torch.equal(dgiven, dy)


def test_low_precision_rounds_once():
    x = torch.randn(50, 4, 16).bfloat16()
    cos, sin = rope_cos_sin(torch.arange(50), 16, dtype=torch.bfloat16)
    ours = rope(x, cos, sin, layout="half", out=torch.empty_like(x))
    exact = plain(x.double(), cos.double(), sin.double(), "half")
    assert torch.equal(ours, exact.float().bfloat16())


def test_cosines_match_hugging_face():
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaRotaryEmbedding

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    positions = torch.tensor([[0, 1, 7, 1000], [3, 2, 1, 0]])
    theirs = LlamaRotaryEmbedding(config)(torch.empty(1), positions)
    ours = rope_cos_sin(positions, 16, 5e5)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)  # fp32 angles up to 1000 radians


def test_interleaved_cosines_repeat_pairwise():
    cos, _ = rope_cos_sin(torch.arange(3), 6, layout="interleaved")
    half, _ = rope_cos_sin(torch.arange(3), 6)
    assert torch.equal(cos[:, 0::2], cos[:, 1::2]) and torch.equal(cos[:, 0::2], half[:, :3])


@pytest.mark.parametrize("kwargs", [{"head_dim": 7}, {"head_dim": 8, "layout": "spiral"}])
def test_bad_arguments(kwargs):
    with pytest.raises(ValueError, match="head_dim|layout"):
        rope_cos_sin(torch.arange(3), **kwargs)
