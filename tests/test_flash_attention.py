"""`flash_attention` against plain PyTorch, and as an autograd function."""

import functools

import pytest
import torch
from conftest import DEVICE
from families import assert_as_good_as, held_bytes
from test_attention import plain

from backfuse import flash_attention
from backfuse.kernels.reference.explicit_attention import AttentionMask

F32, BF16, F64 = torch.float32, torch.bfloat16, torch.float64
IMPLS = ["reference", "triton"]


def tensors(batch, queries, keys, heads, kv_heads, dim, v_dim, dtype, device="cpu"):
    shapes = (queries, heads, dim), (keys, kv_heads, dim), (keys, kv_heads, v_dim)
    made = [torch.randn(batch, *shape, dtype=F64).to(device, dtype) for shape in shapes]
    return [x.requires_grad_() for x in made]


#: What is asked -> sizes (as `tensors` takes them), options, whether there are sinks.
CASES = {
    "causal": ((2, 40, 40, 4, 2, 16, 16), {}, False),
    "sinks": ((2, 40, 40, 4, 2, 16, 16), {"window": 9, "softcap": 3.0}, True),
    "latent": ((1, 40, 40, 2, 2, 24, 16), {"scale": 0.3}, False),
    "cross": ((2, 12, 50, 4, 1, 16, 20), {"causal": False, "dropout": 0.2}, True),
    "decoding": ((3, 1, 50, 2, 1, 16, 16), {}, False),
    "packed": ((1, 40, 40, 2, 1, 16, 16), {"bounds": [0, 7, 7, 40]}, True),
    "packed-cross": (
        (1, 30, 52, 2, 1, 16, 24), {"bounds": [0, 7, 7, 30], "bounds_k": [0, 20, 31, 52]}, False,
    ),
}  # fmt: skip


def call(q, k, v, bounds=None, bounds_k=None, **options):
    """`flash_attention` of tensors with a batch, whatever the layout."""
    if bounds is None:
        return flash_attention(q, k, v, **options)
    offsets = {"cu_seqlens_q": torch.tensor(bounds, dtype=torch.int32, device=q.device)}
    if bounds_k is not None:
        offsets["cu_seqlens_k"] = torch.tensor(bounds_k, device=q.device)
    return flash_attention(q[0], k[0], v[0], **offsets, **options)[None]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_as_good_as_pytorch(name, impl, dtype, poisoned_empty):
    sizes, options, with_sinks = CASES[name]
    leaves = tensors(*sizes, dtype, DEVICE)
    if with_sinks:
        leaves.append(torch.linspace(-2, 2, sizes[3], device=DEVICE).requires_grad_())
    grad = torch.randn(sizes[0], sizes[1], sizes[3], sizes[6], device=DEVICE).to(dtype)
    torch.manual_seed(3)
    sinks = leaves[3] if with_sinks else None
    out = call(*leaves[:3], sinks=sinks, impl=impl, **options)
    ours = [out, *torch.autograd.grad(out, leaves, grad)]
    torch.manual_seed(3)
    seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
    mask = {"scale": sizes[5] ** -0.5, **options}
    bounds = [mask.pop(name, None) for name in ("bounds", "bounds_k")]

    def through_autograd(dtype):
        given = [x.detach().to("cpu", dtype).requires_grad_() for x in leaves]
        sink = given[3] if with_sinks else None
        y = plain(*given[:3], sink, AttentionMask(**mask), None, *bounds, seed.cpu())
        return [y, *torch.autograd.grad(y, given, grad.to("cpu", dtype))]

    exact, theirs = through_autograd(F64), through_autograd(dtype)
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "ds"), ours, theirs, exact, strict=False):
        size = (grad.cpu().double().abs() * exact[0].abs()).sum(-1).max().item()
        assert_as_good_as(name, a.cpu(), b, c, 4 * torch.finfo(dtype).eps, size)
        assert a.dtype == (F32 if name == "ds" else dtype)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name):
    sizes, options, with_sinks = CASES[name]
    leaves = tensors(*sizes, F64)
    if with_sinks:
        leaves.append(torch.linspace(-2, 2, sizes[3], dtype=F64).requires_grad_())

    def run(q, k, v, sinks=None):
        torch.manual_seed(3)
        return call(q, k, v, sinks=sinks, **options)

    assert torch.autograd.gradcheck(run, leaves, fast_mode=True)


@pytest.mark.parametrize("impl", IMPLS)
def test_any_strides(impl):
    q, k, v = tensors(2, 20, 20, 4, 2, 16, 16, F32, DEVICE)
    expected = torch.autograd.grad(flash_attention(q, k, v, impl=impl).sum(), (q, k, v))
    before = [x.detach().clone() for x in (q, k, v)]
    turned = [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    turned[1] = turned[1].mT.contiguous().mT
    leaves = [x.requires_grad_() for x in turned]
    out = flash_attention(*leaves, impl=impl)
    got = torch.autograd.grad(out, leaves, torch.ones((), device=DEVICE).expand_as(out))
    assert all(map(torch.equal, got, expected))
    other = torch.ones_like(out).mT.contiguous().mT
    assert all(
        map(torch.equal, torch.autograd.grad(flash_attention(q, k, v, impl=impl), (q, k, v), other),
            expected)
    )  # fmt: skip
    assert all(map(torch.equal, (q, k, v), before))
    shared = k[:1].detach().requires_grad_()  # one sequence of keys for the whole batch
    (both,) = torch.autograd.grad(
        flash_attention(q, shared.expand(2, -1, -1, -1), v, impl=impl).sum(), shared
    )
    apart = shared.detach().repeat(2, 1, 1, 1).requires_grad_()
    (each,) = torch.autograd.grad(flash_attention(q, apart, v, impl=impl).sum(), apart)
    torch.testing.assert_close(both, each.sum(0, keepdim=True))


@pytest.mark.parametrize("impl", [*IMPLS, "sdpa"])
def test_a_second_backward_and_only_what_is_wanted(impl):
    q, k, v = tensors(1, 20, 20, 2, 2, 16, 16, F32, DEVICE)
    out = flash_attention(q, k, v, impl=impl)
    first = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert all(map(torch.equal, torch.autograd.grad(out.sum(), (q, k, v)), first))
    k.requires_grad_(False)
    sinks = torch.zeros(2, device=DEVICE, requires_grad=True)
    out = flash_attention(q, k, v, sinks=sinks if impl != "sdpa" else None, impl=impl)
    out.sum().backward()
    assert k.grad is None and q.grad is not None
    assert (sinks.grad is None) == (impl == "sdpa")


@pytest.mark.parametrize("impl", IMPLS)
def test_keeps_what_it_was_given_and_two_results(impl):
    q, k, v = tensors(2, 20, 33, 4, 2, 16, 8, BF16, DEVICE)
    held, out = held_bytes(lambda: flash_attention(q.mT.contiguous().mT, k, v, impl=impl))
    assert held == sum(x.nbytes for x in (q, k, v, out)) + 2 * 4 * 20 * 4


@pytest.mark.parametrize("impl", IMPLS)
def test_lse(impl):
    q, k, v = tensors(2, 9, 12, 4, 2, 16, 8, F32, DEVICE)
    sinks = torch.ones(4, device=DEVICE)
    out, lse = flash_attention(q, k, v, causal=False, sinks=sinks, return_lse=True, impl=impl)
    scores = torch.einsum("bihd,bjhd->bhij", q, k.repeat_interleave(2, 2)) / 4
    column = sinks.view(1, 4, 1, 1).expand(2, -1, 9, 1)
    torch.testing.assert_close(lse, torch.cat([scores, column], -1).logsumexp(-1))
    assert out.requires_grad and not lse.requires_grad
    offsets = torch.tensor([0, 9], device=DEVICE), torch.tensor([0, 12], device=DEVICE)
    packed, packed_lse = flash_attention(
        q[0], k[0], v[0], causal=False, sinks=sinks, return_lse=True, impl=impl,
        cu_seqlens_q=offsets[0], cu_seqlens_k=offsets[1], max_seqlen_q=9, max_seqlen_k=12,
    )  # fmt: skip
    torch.testing.assert_close(packed, out[0])
    torch.testing.assert_close(packed_lse, lse[0])


def test_dropout_follows_the_generator():
    q, k, v = tensors(1, 40, 40, 2, 2, 8, 8, F32)
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        runs.append(flash_attention(q, k, v, dropout=0.5))
    assert torch.equal(runs[0], runs[1]) and not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("of_k", [F32, BF16])
def test_autocast_casts(of_k):
    """As PyTorch's attention: a k that a rotation left in fp32 is no error."""
    q, k, v = tensors(1, 40, 40, 2, 2, 8, 8, F32)
    low = [x.detach().to(BF16).requires_grad_() for x in (q, k, v)]
    expected = flash_attention(*low)
    k = k.detach().to(of_k).requires_grad_()
    with torch.autocast("cpu", dtype=BF16):
        found = flash_attention(q, k, v)
    assert found.dtype == BF16 and torch.equal(found, expected)
    grads = torch.autograd.grad(found.float().sum(), (q, k, v))
    for grad, exact, x in zip(
        grads, torch.autograd.grad(expected.float().sum(), low), (q, k, v), strict=True
    ):
        assert grad.dtype == x.dtype and torch.equal(grad.to(BF16), exact)
    double = [x.detach().double() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=BF16):
        assert flash_attention(*double).dtype == torch.float64


def test_a_double_backward_is_refused():
    q, k, v = tensors(1, 8, 8, 2, 2, 8, 8, F32)
    with pytest.raises(ValueError, match="create_graph is True.*math backend"):
        torch.autograd.grad(flash_attention(q, k, v).sum(), q, create_graph=True)


GOOD = torch.zeros(1, 4, 2, 8)
ROWS = {"q": GOOD[0], "k": GOOD[0], "v": GOOD[0]}
OFFSETS = torch.tensor([0, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": None}, TypeError, "q is None, expected a tensor"),
        ({"k": GOOD[0]}, ValueError, r"k has the shape \[4, 2, 8\], expected \[batch, rows, heads"),
        ({"cu_seqlens_q": OFFSETS}, ValueError, r"q has .*, expected \[rows, heads, dim\]"),
        ({"k": GOOD.half()}, TypeError, "k is torch.float16, expected"),
        ({"v": GOOD[:, :, :1]}, ValueError, "2, 2 and 1 heads, expected"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks is torch.float32 \[3\], expected"),
        ({"window": 0}, ValueError, "window is 0, expected a positive integer, or None"),
        ({"window": 2.5}, ValueError, "window is 2.5"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a positive number, or None"),
        ({"scale": float("inf")}, ValueError, "scale is inf"),
        ({"dropout": 1.0}, ValueError, "dropout is 1.0, expected 0 <= p < 1"),
        ({"impl": "tritn"}, ValueError, "impl is 'tritn'.*did you mean 'triton'"),
        ({"cu_seqlens_k": OFFSETS}, ValueError, "cu_seqlens_q is None, expected .* cu_seqlens_k"),
        ({"max_seqlen_q": 4}, ValueError, "cu_seqlens_q is None, expected .* max_seqlen_q"),
        ({**ROWS, "cu_seqlens_q": [0, 4]}, TypeError, r"cu_seqlens_q is \[0, 4\], expected an"),
        ({**ROWS, "cu_seqlens_q": OFFSETS.float()}, TypeError, "cu_seqlens_q is torch.float32"),
        ({**ROWS, "cu_seqlens_q": OFFSETS * 2}, ValueError, r"cu_seqlens_q is \[0, 8\], expected"),
        ({**ROWS, "cu_seqlens_q": OFFSETS[:0]}, ValueError, r"cu_seqlens_q is \[\], expected"),
        ({**ROWS, "cu_seqlens_q": OFFSETS, "cu_seqlens_k": OFFSETS + 1}, ValueError,
         r"cu_seqlens_k is \[1, 5\], expected"),
        ({**ROWS, "cu_seqlens_q": OFFSETS, "max_seqlen_q": 3}, ValueError,
         r"max_seqlen_q is 3, expected at least the longest sequence \(4\)"),
        ({**ROWS, "cu_seqlens_q": OFFSETS, "max_seqlen_k": 0}, ValueError, "max_seqlen_k is 0"),
        ({"q": GOOD[:, :3], "impl": "sdpa"}, ValueError, "sdpa.* no other numbers of keys"),
        ({"sinks": torch.zeros(2), "impl": "sdpa"}, ValueError, "sdpa.* has no .*sinks"),
        ({"v": GOOD[..., :4], "impl": "sdpa"}, ValueError, "sdpa.* no other head dim of v"),
        ({"q": GOOD.double(), "k": GOOD.double(), "v": GOOD.double(), "impl": "triton"}, ValueError,
         "impl is 'triton', but the dtype is torch.float64"),
        ({"v": torch.zeros(1, 4, 2, 264), "impl": "triton"}, ValueError, "a head has 264 elements"),
    ],
)  # fmt: skip
def test_bad_input(change, error, message):
    run = functools.partial(flash_attention, **{"q": GOOD, "k": GOOD, "v": GOOD, **change})
    with pytest.raises(error, match=message):
        run()
