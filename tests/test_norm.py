"""kernels/reference/norm.py against autograd in fp64, and against PyTorch's own norms."""

import pytest
import torch
from families import assert_as_good_as
from torch.nn import functional as F

from backfuse.kernels.reference.norm import (
    NormSpec,
    norm_apply,
    norm_backward,
    norm_forward,
)


def plain(x, weight, bias, kind, eps, offset, round_first):
    """Hugging Face's arithmetic, differentiable."""
    if kind == "layernorm":
        return F.layer_norm(x, x.shape[-1:], weight + offset, bias, eps)
    high = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_hat = x.to(high) * torch.rsqrt(x.to(high).square().mean(-1, keepdim=True) + eps)
    if round_first:
        return (weight + offset) * x_hat.to(x.dtype)
    return (x_hat * (weight.to(high) + offset)).to(x.dtype)


CASES = [("rmsnorm", 0.0, True), ("rmsnorm", 1.0, False), ("layernorm", 0.0, False)]


@pytest.mark.parametrize("kind, offset, round_first", CASES)
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 3), (33, 65), (7, 1000)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_forward_and_backward(kind, offset, round_first, rows, width, dtype, poisoned_empty):
    x64, dy64 = (torch.randn(rows, width, dtype=torch.float64) * 3 for _ in range(2))
    w64 = torch.randn(width, dtype=torch.float64)
    b64 = torch.randn(width, dtype=torch.float64) if kind == "layernorm" else None
    x, dy, w = x64.to(dtype), dy64.to(dtype), w64.to(dtype)
    b = None if b64 is None else b64.to(dtype)

    def through_autograd(x, w, b, dy):
        leaves = [t.clone().requires_grad_() for t in (x, w) + (() if b is None else (b,))]
        y = plain(*leaves, *([None] if b is None else []), kind, 1e-5, offset, round_first)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    exact = through_autograd(x.double(), w.double(), None if b is None else b.double(), dy.double())
    torchs = through_autograd(x, w, b, dy)
    spec = NormSpec(kind, 1e-5, offset, round_first)
    high = torch.float64 if dtype == torch.float64 else torch.float32
    stats = torch.empty(spec.statistics, rows, dtype=high)
    y = norm_forward(x, w, b, spec, stats, dtype)
    assert torch.equal(norm_apply(x, stats, w, b, spec, dtype), y)
    dx, again = torch.empty_like(x, dtype=high), torch.empty_like(x)
    dw, db = norm_backward(dy, x, stats, w, b, spec, dx=dx, normed=again, need_dbias=b is not None)
    assert torch.equal(again, y)
    assert y.dtype == dtype and stats.dtype == dw.dtype == high
    eps = torch.finfo(dtype).eps * (64 if dtype == torch.float64 else 1)  # exact is fp64 too
    scale = (stats[0].unsqueeze(-1) * dy.double() * (w.double() + offset)).abs().max().item()
    for name, value, torch_value, exact_value in zip(
        ("y", "dx", "dw", "db"), (y, dx, dw, db), torchs, exact, strict=False
    ):
        assert_as_good_as(name, value, torch_value, exact_value, eps, scale)
    residual = torch.randn(rows, width).to(dtype)
    sums = torch.empty_like(x), torch.empty_like(x)
    norm_apply(x, stats, w, b, spec, dtype, residual=residual, out=sums[0])
    norm_backward(dy, x, stats, w, b, spec, residual=residual, dx=sums[1])
    assert torch.equal(sums[0], residual + y)
    assert torch.equal(sums[1], (residual + dx).to(dtype))


def test_gradients_that_are_not_wanted_are_not_computed():
    x, w = torch.randn(3, 4), torch.randn(4)
    spec, stats = NormSpec(), torch.empty(1, 3)
    norm_forward(x, w, None, spec, stats, x.dtype)
    assert norm_backward(x, x, stats, w, None, spec, need_dweight=False) == (None, None)
    dweight, dbias = norm_backward(x, x, stats, w, None, spec, need_dbias=True)
    assert dweight.shape == dbias.shape == (4,)


def test_a_row_alone_gives_the_bits_it_gives_among_others():
    x, w, spec = torch.randn(9, 40), torch.randn(40), NormSpec("layernorm")
    stats, alone = torch.empty(2, 9), torch.empty(2, 1)
    y = norm_forward(x, w, None, spec, stats, x.dtype)
    one = norm_forward(x[4:5].clone(), w, None, spec, alone, x.dtype)
    assert torch.equal(stats[:, 4:5], alone) and torch.equal(y[4:5], one)
