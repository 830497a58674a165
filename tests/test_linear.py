"""kernels/reference/linear.py: weights apart or stacked, biases, sums over chunks."""

import pytest
import torch

from backfuse.kernels.reference import linear as module
from backfuse.kernels.reference.linear import (
    accumulate_outer,
    linear,
    linear_add,
    linear_backward_input,
)


@pytest.mark.parametrize("onednn", [True, False])
def test_either_gemm_of_a_cpu(onednn, monkeypatch, poisoned_empty):
    """Which one runs depends on the processor: both have to be right, into strided memory too."""
    if onednn and not torch.backends.mkldnn.is_available():
        pytest.skip("PyTorch without oneDNN")
    monkeypatch.setattr(module, "ONEDNN", onednn)
    calls = []
    pointwise = torch.ops.mkldnn._linear_pointwise if onednn else None
    monkeypatch.setattr(
        torch.ops.mkldnn, "_linear_pointwise", lambda *args: calls.append(1) or pointwise(*args)
    )
    x, residual = torch.randn(7, 5), torch.randn(7, 8)
    weights = [torch.randn(n, 5) for n in (3, 1, 4)]
    biases = [torch.randn(3), None, torch.randn(4)]
    wide = torch.full((7, 10), 7.0)
    out = linear(x, weights, biases, wide[:, 1:9])
    exact = x.double() @ torch.cat(weights).double().T
    exact += torch.cat([biases[0], torch.zeros(1), biases[2]]).double()
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)
    assert (wide[:, [0, 9]] == 7).all()
    back = linear_backward_input(out, weights).double()
    torch.testing.assert_close(
        back, out.double() @ torch.cat(weights).double(), atol=1e-5, rtol=1e-5
    )
    added = linear_add(residual, x, torch.cat(weights), None, torch.empty(7, 8), 0.5)
    exact = residual.double() + 0.5 * (x.double() @ torch.cat(weights).double().T)
    torch.testing.assert_close(added.double(), exact, atol=1e-5, rtol=1e-5)
    assert bool(calls) == onednn


@pytest.mark.parametrize("bias", [True, False])
def test_side_by_side_equals_one_by_one(bias, poisoned_empty):
    x = torch.randn(7, 5, dtype=torch.float64)
    weights = [torch.randn(n, 5, dtype=torch.float64) for n in (3, 1, 4)]
    biases = [torch.randn(len(w), dtype=torch.float64) if bias else None for w in weights]
    out = linear(x, weights, biases, torch.empty(7, 8, dtype=torch.float64))
    parts = [x @ w.T + (0 if b is None else b) for w, b in zip(weights, biases, strict=True)]
    torch.testing.assert_close(out, torch.cat(parts, 1))
    torch.testing.assert_close(linear_backward_input(out, weights), out @ torch.cat(weights))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_weight_gradients_over_chunks_are_summed_in_high_precision(dtype):
    dy, x = torch.randn(64 * 40, 3).to(dtype), torch.randn(64 * 40, 5).to(dtype)
    total = None
    for dy_part, x_part in zip(dy.split(64), x.split(64), strict=True):
        total = accumulate_outer(total, dy_part, x_part)
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    exact = dy.double().T @ x.double()
    # One chunk's product is rounded to the operands' dtype at most once: an error of eps / 2 of a
    # chunk's size. A sum kept in the low dtype would be off by eps / 2 of the total, 40 times.
    eps = torch.finfo(dtype).eps
    parts = zip(dy.double().split(64), x.double().split(64), strict=True)
    chunks = torch.stack([a.T @ b for a, b in parts])
    bound = (
        eps * chunks.abs().sum(0) / 2 + 64 * 1.2e-7 * (dy.double().abs().T @ x.double().abs())
    ).clamp(min=1e-12)
    assert ((total.double() - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_only_chunk_is_rounded_once(dtype):
    dy, x = torch.randn(64, 3).to(dtype), torch.randn(64, 5).to(dtype)
    alone = accumulate_outer(None, dy, x, dtype)
    exact, sizes = dy.double().T @ x.double(), dy.double().abs().T @ x.double().abs()
    assert alone.dtype == dtype
    bound = torch.finfo(dtype).eps / 2 * exact.abs() + 64 * 1.2e-7 * sizes
    assert ((alone.double() - exact).abs() <= bound).all()
    if dtype.itemsize == 2:
        assert accumulate_outer(None, dy, x, torch.float32).dtype == torch.float32
