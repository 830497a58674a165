"""kernels/reference/activation.py against autograd in fp64."""

import pytest
import torch
from families import assert_as_good_as
from torch.nn import functional as F

from backfuse.kernels.reference.activation import (
    ACTIVATIONS,
    activation_backward,
    activation_forward,
)

PLAIN = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


@pytest.mark.parametrize("kind", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_place", [True, False])
def test_forward_and_backward(kind, gated, dtype, in_place):
    rows, width = 13, 37

    def through_autograd(preact, dhidden):
        preact = preact.clone().requires_grad_()
        gate, up = preact.chunk(2, -1) if gated else (preact, None)
        hidden = PLAIN[kind](gate) * (up if gated else 1)
        return hidden, torch.autograd.grad(hidden, preact, dhidden)[0]

    preact = (torch.randn(rows, 2 * width if gated else width) * 2).to(dtype)
    dhidden = torch.randn(rows, width).to(dtype)
    exact = through_autograd(preact.double(), dhidden.double())
    plain = through_autograd(preact, dhidden)
    before = preact.clone()
    hidden = activation_forward(preact, kind, gated)
    assert torch.equal(preact, before)
    out = preact if in_place else torch.full_like(preact, float("nan"))
    again = activation_backward(dhidden.clone(), preact, kind, gated, out)
    assert torch.equal(hidden, again)
    assert in_place or torch.equal(preact, before)
    eps = torch.finfo(dtype).eps
    assert_as_good_as("hidden", hidden, plain[0], exact[0], eps)
    assert_as_good_as("dpreact", out, plain[1], exact[1], eps)
