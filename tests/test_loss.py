"""`linear_cross_entropy` against PyTorch's, and what it holds."""

import pytest
import torch
import torch.nn.functional as F
from families import assert_as_good_as, held_bytes
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from backfuse import linear_cross_entropy
from backfuse.bench.measure import allocator_trace

TOKENS, WIDTH, VOCABULARY = 75, 24, 130


def problem(dtype=torch.float32, bias=True, ignored=7):
    hidden = torch.randn(3, TOKENS // 3, WIDTH).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, WIDTH) * 0.3).to(dtype).requires_grad_()
    shift = torch.randn(VOCABULARY).to(dtype).requires_grad_() if bias else None
    labels = torch.randint(VOCABULARY, (3, TOKENS // 3))
    labels.view(-1)[::ignored] = -100
    return hidden, weight, shift, labels


def plain(hidden, weight, bias, labels, dtype, reduction="mean"):
    parts = [p if p is None else p.detach().to(dtype).requires_grad_() for p in (hidden, weight)]
    shift = None if bias is None else bias.detach().to(dtype).requires_grad_()
    logits = F.linear(*parts, shift)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
    loss.sum().backward()
    return loss.detach(), [p.grad for p in (*parts, shift) if p is not None]


@pytest.mark.parametrize("chunk_size", [1, 16, 75, None])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_good_as_plain(dtype, reduction, chunk_size):
    hidden, weight, bias, labels = problem(dtype)
    loss = linear_cross_entropy(
        hidden, weight, labels, bias=bias, reduction=reduction, chunk_size=chunk_size
    )
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    loss.sum().backward()
    exact = plain(hidden, weight, bias, labels, torch.float64, reduction)
    same = plain(hidden, weight, bias, labels, dtype, reduction)
    eps = torch.finfo(dtype).eps
    assert_as_good_as("loss", loss.flatten(), same[0], exact[0], eps)
    names = ("hidden", "weight", "bias")
    for name, mine, theirs, true in zip(
        names, (hidden, weight, bias), same[1], exact[1], strict=True
    ):
        assert mine.grad.dtype == dtype
        assert_as_good_as(name, mine.grad, theirs, true, eps)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_gradcheck(reduction):
    hidden, weight, bias, labels = problem(torch.float64)

    def call(*parts):
        return linear_cross_entropy(
            *parts[:2], labels, bias=parts[2], reduction=reduction, chunk_size=32
        )

    assert torch.autograd.gradcheck(call, (hidden, weight, bias), fast_mode=True)


def test_asked_twice_and_scaled():
    hidden, weight, _, labels = problem(bias=False)
    loss = linear_cross_entropy(hidden, weight, labels)
    first = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
    scaled = torch.autograd.grad(loss, (hidden, weight), 2 * torch.ones(()), retain_graph=True)
    again = torch.autograd.grad(loss, (hidden, weight))
    for one, double, other in zip(first, scaled, again, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(2 * one, double)


def test_frozen_parts_cost_nothing():
    hidden, weight, _, labels = problem(bias=False)
    weight.requires_grad_(False)
    held, loss = held_bytes(lambda: linear_cross_entropy(hidden, weight, labels, reduction="sum"))
    assert held == hidden.nbytes
    loss.backward()
    assert weight.grad is None
    exact = plain(hidden, weight, None, labels, torch.float64, "sum")[1][0]
    torch.testing.assert_close(hidden.grad.double(), exact, rtol=1e-4, atol=1e-5)
    hidden = hidden.detach()
    held, _ = held_bytes(lambda: linear_cross_entropy(hidden, weight, labels, reduction="sum"))
    assert held == 0


def test_the_logits_of_all_tokens_never_exist():
    hidden = torch.randn(1, 512, 8, requires_grad=True)
    weight = torch.randn(1000, 8, requires_grad=True)
    labels = torch.randint(1000, (1, 512))
    logits = 512 * 1000 * 4

    def peak(**options):
        call = lambda: linear_cross_entropy(hidden, weight, labels, **options)  # noqa: E731
        return allocator_trace(call).peak_bytes

    assert peak(chunk_size=512) > logits
    assert peak(chunk_size=16) < logits / 4


def test_all_ignored_is_what_pytorch_says():
    hidden, weight, _, labels = problem(bias=False)
    labels.fill_(-100)
    assert linear_cross_entropy(hidden, weight, labels, reduction="sum").item() == 0
    assert linear_cross_entropy(hidden, weight, labels).isnan()


def test_under_autocast():
    hidden, weight, bias, labels = problem()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=16)
        theirs = F.cross_entropy(
            F.linear(hidden, weight, bias).float().flatten(0, 1), labels.flatten()
        )
    mine = torch.autograd.grad(loss, (hidden, weight, bias))
    them = torch.autograd.grad(theirs, (hidden, weight, bias))
    exact = plain(hidden, weight, bias, labels, torch.float64)
    assert loss.dtype == torch.float32
    eps = torch.finfo(torch.bfloat16).eps
    assert_as_good_as("loss", loss, theirs, exact[0], eps)
    for name, a, b, c in zip(("hidden", "weight", "bias"), mine, them, exact[1], strict=True):
        assert a.dtype == torch.float32
        assert_as_good_as(name, a, b, c, eps)


@pytest.mark.parametrize("chunk_size", [None, 1000])
def test_sums_beyond_fp16(chunk_size):
    """The mean's gradients fit fp16 where the sum's do not."""
    hidden = (torch.randn(1, 9000, 16) * 3 + 10).half().requires_grad_()
    weight = (torch.randn(32, 16) * 0.01).half().requires_grad_()
    bias = torch.zeros(32, dtype=torch.float16, requires_grad=True)
    labels = torch.zeros(1, 9000, dtype=torch.int64)
    loss = linear_cross_entropy(hidden, weight, labels, bias=bias, chunk_size=chunk_size)
    grads = torch.autograd.grad(loss, (hidden, weight, bias))
    exact = plain(hidden, weight, bias, labels, torch.float64)[1]
    same = plain(hidden, weight, bias, labels, torch.float16)[1]
    eps = torch.finfo(torch.float16).eps
    for name, mine, theirs, true in zip(
        ("hidden", "weight", "bias"), grads, same, exact, strict=True
    ):
        assert mine.dtype == torch.float16
        assert_as_good_as(name, mine, theirs, true, eps)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_one_graph(reduction):
    """Of operators that Inductor lowers, which oneDNN's GEMM with a weight that learns is not."""
    torch._dynamo.reset()
    graphs = []

    def note(graph, _):
        graphs.append(graph.code)
        return make_boxed_func(graph.forward)

    hidden, weight, bias, labels = problem()

    def call(*parts):
        return linear_cross_entropy(*parts, labels, bias=bias, reduction=reduction, chunk_size=32)

    parts = hidden, weight
    compiled = torch.compile(call, fullgraph=True, backend=aot_autograd(fw_compiler=note))(*parts)
    expected = call(*parts)
    torch.testing.assert_close(compiled, expected)
    found = torch.autograd.grad(compiled.sum(), (*parts, bias))
    wanted = torch.autograd.grad(expected.sum(), (*parts, bias))
    torch.testing.assert_close(found, wanted)
    assert graphs and not any("mkldnn" in code for code in graphs)
    torch._dynamo.reset()


def test_a_gradient_of_a_gradient_is_refused():
    hidden, weight, _, labels = problem(bias=False)
    with pytest.raises(ValueError, match="create_graph is True, expected False"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, labels), hidden, create_graph=True)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, r"hidden is \[1.0\], expected a floating-point tensor"),
        ({"hidden": torch.randn(4)}, ValueError, r"hidden is float32 \[4\]"),
        ({"weight": torch.randn(5, 3)}, ValueError, r"weight is float32 \[5, 3\].*expected \[voc"),
        ({"weight": torch.randn(130, 24).double()}, TypeError, "weight is torch.float64"),
        ({"bias": torch.randn(3)}, ValueError, r"bias is float32 \[3\].*expected \[130\]"),
        ({"labels": torch.zeros(3, 25)}, TypeError, "labels is float32"),
        ({"labels": torch.zeros(2, dtype=torch.int64)}, ValueError, r"labels .*expected \[3, 25\]"),
        ({"labels": torch.full((3, 25), 130)}, ValueError, "labels hold 130, expected 0 to 129"),
        ({"labels": torch.full((3, 25), -1)}, ValueError, "labels hold -1"),
        ({"reduction": "avg"}, ValueError, "reduction is 'avg'"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0"),
    ],
)
def test_bad_input(change, error, message):
    hidden, weight, bias, labels = problem()
    given = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias} | change
    with pytest.raises(error, match=message):
        linear_cross_entropy(**given)
