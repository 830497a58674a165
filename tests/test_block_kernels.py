"""Blocks on the Triton kernels: the promises of the reference path, kept by the kernels.

Without a GPU the kernels run under Triton's interpreter: exact, and slow.
"""

import pytest
import torch
from conftest import DEVICE
from families import (
    FAMILIES,
    POLICIES,
    assert_as_good_as,
    make_block,
    make_input,
    results,
    same_bits,
)

from backfuse import BlockSpec, BlockStack, TransformerBlock, ffn, rope_cos_sin
from backfuse.kernels import attention_core, dispatch, fused, reference

STRATEGIES = ["split", "fused"]

#: Families of which no kernel sees anything new: in one precision only.
COMPOSED = ("bert", "neox", "shared-norm-and-layer-scale")


def kernel_block(spec, policy="keep", **options):
    block = make_block(spec, policy, **options).to(DEVICE)
    block.impl = "triton"
    return block


def to_device(*tensors):
    return [t.detach().to(DEVICE).requires_grad_(t.requires_grad) for t in tensors]


@pytest.mark.parametrize(
    "family, dtype",
    [(family, torch.float32) for family in FAMILIES]
    + [(family, torch.bfloat16) for family in FAMILIES if family not in COMPOSED],
)
def test_as_good_as_the_reference_and_the_same_bits_under_every_policy(
    family, dtype, poisoned_empty
):
    spec = FAMILIES[family]
    x, grad = make_input(spec, dtype=dtype, seq_len=45)
    reference_block = make_block(spec, dtype=dtype)
    theirs = results(reference_block, x, grad)
    exact = results(make_block(spec, dtype=dtype).double(), x.detach().double().requires_grad_(),
                    grad.double())  # fmt: skip
    block = kernel_block(spec, dtype=dtype)
    x, grad = to_device(x, grad)
    ours = results(block, x, grad)
    eps = torch.finfo(dtype).eps
    names = ["output", "x", *(name for name, _ in block.named_parameters())]
    largest = max(e.abs().max().item() for e in exact)
    for name, a, b, c in zip(names, ours, theirs, exact, strict=True):
        # A bias of k has no gradient but rounding: measured against the largest of all.
        scale = largest if name.endswith("bias") else 4 * c.abs().max().item()
        assert_as_good_as(name, a.cpu(), b, c, eps, scale)
    for index, policy in enumerate([*POLICIES[1::4], "full"]):
        block.policy = policy
        block.ffn_strategy = STRATEGIES[index % 2]
        assert same_bits(results(block, x, grad), ours), (policy, block.ffn_strategy)


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
@pytest.mark.parametrize("frozen", ["everything", "projections", "all-but-down", "all-but-norms",
                                    "all-but-biases"])  # fmt: skip
def test_frozen_subsets(family, frozen, poisoned_empty):
    spec = FAMILIES[family]
    x, grad = to_device(*make_input(spec, seq_len=20))
    everything = results(kernel_block(spec), x, grad)
    for policy, strategy in (("keep", "auto"), ("full", "split"), ("lean", "fused")):
        block = kernel_block(spec, policy, frozen=frozen)
        block.ffn_strategy = strategy
        for value, full in zip(results(block, x, grad), everything, strict=True):
            assert value is None or torch.equal(value, full), policy


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_autocast(autocast, poisoned_empty):
    spec = FAMILIES["qwen3"]
    x, grad = to_device(*make_input(spec, seq_len=20))
    block = kernel_block(spec)

    def run():
        with torch.autocast(DEVICE, dtype=autocast):
            return results(block, x, grad)

    expected = run()
    assert all(t.dtype == torch.float32 for t in expected)
    block.policy = "full"
    assert same_bits(run(), expected)
    block.impl = "reference"
    for ours, theirs in zip(expected, run(), strict=True):
        assert (ours - theirs).norm() <= 8 * torch.finfo(autocast).eps * theirs.norm()


def test_packed_sequences_and_segments(poisoned_empty):
    spec = FAMILIES["gemma2"].replace(sliding_window=None)
    torch.manual_seed(0)
    stack = BlockStack(spec, 3, "keep", chunk_size=64, impl="triton").to(DEVICE)
    x, grad = to_device(*make_input(spec, batch_size=1, seq_len=70))
    cu_seqlens = torch.tensor([0, 30, 30, 31, 70], dtype=torch.int32, device=DEVICE)
    expected = results(stack, x, grad, cu_seqlens=cu_seqlens)
    stack.set_policy("lean", segments=3)
    assert same_bits(results(stack, x, grad, cu_seqlens=cu_seqlens), expected)
    stack.impl = "reference"
    for ours, theirs in zip(expected, results(stack, x, grad, cu_seqlens=cu_seqlens), strict=True):
        assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_strided_small_weights_and_angles_in_fp64():
    spec = FAMILIES["qwen3"].replace(up_bias=True)
    block = kernel_block(spec)
    x, grad = to_device(*make_input(spec, seq_len=20))
    angles = rope_cos_sin(torch.arange(20)[None], spec.rotary_dim)
    expected = results(block, x, grad, position_embeddings=to_device(*angles))
    for name, parameter in list(block.named_parameters()):
        if parameter.dim() == 1:
            path, _, kind = name.rpartition(".")
            wide = torch.stack([parameter.detach(), parameter.detach() + 1], -1)
            setattr(block.get_submodule(path), kind, torch.nn.Parameter(wide[:, 0]))
    double = to_device(*(t.double() for t in angles))
    assert same_bits(results(block, x, grad, position_embeddings=double), expected)


def test_eight_bits_and_second_backward(poisoned_empty):
    spec = FAMILIES["llama"]
    block = kernel_block(spec, {"preact": "fp8"})
    x, grad = to_device(*make_input(spec, seq_len=20))
    inputs = [x, *block.parameters()]
    y = block(x)
    first = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    assert same_bits(first, torch.autograd.grad(y, inputs, grad))
    block.policy = "keep"
    assert torch.equal(block(x), y)
    block.policy, block.impl = {"preact": "fp8"}, "reference"
    for ours, theirs in zip(first, torch.autograd.grad(block(x), inputs, grad), strict=True):
        # A pre-activation on the edge between two steps of e4m3 may fall to either side.
        assert (ours - theirs).norm() <= 1e-2 * theirs.norm()


def test_every_kernel_is_called(monkeypatch):
    """None of the operations is left to the reference."""
    called = set()
    for name in fused.__all__:
        kernel = getattr(fused, name)

        def counted(*args, name=name, kernel=kernel, **kwargs):
            called.add(name)
            return kernel(*args, **kwargs)

        monkeypatch.setattr(fused, name, counted)
    spec = FAMILIES["qwen3"].replace(sliding_window=5)  # no library attention: delta is wanted
    block = kernel_block(spec, "full")
    x, grad = to_device(*make_input(spec, seq_len=9))
    results(block, x, grad)
    block.policy = "keep"
    results(block, x, grad)
    block.requires_grad_(False)
    block.mlp.down_proj.requires_grad_()
    results(block, x.detach(), grad)  # the hidden alone
    assert called == set(fused.__all__)


def test_pytorchs_attention_beside_the_kernels(monkeypatch):
    spec = FAMILIES["llama"]
    dtype = torch.bfloat16
    x, grad = to_device(*make_input(spec, dtype=dtype, seq_len=20))
    block = kernel_block(spec, dtype=dtype)
    ours = results(block, x, grad)
    block.impl = "sdpa"

    def fail(*args, **kwargs):
        raise AssertionError("the kernel's attention was called")

    monkeypatch.setattr(fused, "attention_forward", fail)
    monkeypatch.setattr(fused, "attention_backward", fail)
    theirs = results(block, x, grad)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm()
    with pytest.raises(ValueError, match="impl is 'sdpa', but PyTorch's .* has no s"):
        block = make_block(FAMILIES["gemma2"], dtype=dtype).to(DEVICE)
        block.impl = "sdpa"
        block(x)


def test_operations_by_name():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    for dtype in (torch.float32, torch.bfloat16):
        assert dispatch.operations("auto", cpu, dtype, 64) is reference
        assert dispatch.operations("reference", cuda, dtype, 64) is reference
    assert dispatch.operations("auto", cuda, torch.float32, 64) is reference
    assert dispatch.operations("auto", cuda, torch.float64, 64) is reference


@pytest.mark.skipif(DEVICE == "cuda", reason="under the interpreter")
def test_where_kernels_cannot_run(monkeypatch):
    cpu = torch.device("cpu")
    assert dispatch.operations("triton", cpu, torch.float16, 64) is fused
    block = TransformerBlock(FAMILIES["llama"], impl="triton", dtype=torch.float64)
    x = torch.zeros(1, 4, 32, dtype=torch.float64)
    with pytest.raises(ValueError, match="impl is 'triton', but the dtype is torch.float64, exp"):
        block(x)
    with pytest.raises(ValueError, match="but a row has 40000 elements, expected at most 32768"):
        dispatch.operations("triton", cpu, torch.float16, 40000)
    monkeypatch.setattr("backfuse.kernels.launch.INTERPRETED", False)
    dispatch._obstacle.cache_clear()
    with pytest.raises(ValueError, match="the tensors are on cpu, expected a GPU"):
        TransformerBlock(FAMILIES["llama"], impl="triton")(torch.zeros(1, 4, 32))
    dispatch._obstacle.cache_clear()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"impl": "tritn"}, "impl is 'tritn', expected one of auto.*did you mean 'triton'"),
        ({"ffn_strategy": "fuse"}, "ffn_strategy is 'fuse', expected.*did you mean 'fused'"),
    ],
)
def test_unknown_names(options, message):
    spec = BlockSpec(8, 16, 2)
    for make in (TransformerBlock, lambda s, **o: BlockStack(s, 2, **o)):
        with pytest.raises(ValueError, match=message):
            make(spec, **options)
    block = TransformerBlock(spec)
    with pytest.raises(ValueError, match=message):
        ffn(torch.zeros(1, 2, 8), dict(block.named_parameters()), spec, **options)


def test_without_triton_the_reference_runs(monkeypatch):
    """On a machine that has no triton, auto is the reference and triton a clear error."""
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    dispatch._obstacle.cache_clear()
    cuda = torch.device("cuda")
    assert dispatch.operations("auto", cuda, torch.bfloat16, 64) is reference
    with pytest.raises(ValueError, match="impl is 'triton', but triton is not installed"):
        dispatch.operations("triton", cuda, torch.bfloat16, 64)
    dispatch._obstacle.cache_clear()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("policy", ["keep", "lean"])
def test_scratch_holds_the_gradient_of_q(family, policy, monkeypatch):
    """q's gradient takes q's place, but for a q that is kept: that is only read."""
    asked = []
    kernel = attention_core.kernel_backward

    def spy(dout, q, *others, dq, **options):
        asked.append(dq is q)
        return kernel(dout, q, *others, dq=dq, **options)

    monkeypatch.setattr(attention_core, "kernel_backward", spy)
    spec = FAMILIES[family]
    x, grad = make_input(spec)
    results(kernel_block(spec, policy), x.to(DEVICE), grad.to(DEVICE))
    read_only = policy == "keep" and spec.rope is None and spec.qk_norm is None
    assert asked == [not read_only]


@pytest.mark.parametrize("impl", ["triton", "reference"])
def test_an_input_whose_rows_are_columns(impl):
    """Batch 1, transposed: to flatten it copies nothing, and no kernel could read it."""
    spec = FAMILIES["llama"]
    block = make_block(spec).to(DEVICE)
    block.impl = impl
    x, grad = make_input(spec, batch_size=1)
    theirs = results(block, x.detach().to(DEVICE).requires_grad_(), grad.to(DEVICE))
    turned = x.detach().to(DEVICE).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    assert same_bits(results(block, turned, grad.to(DEVICE)), theirs)


@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("width", [126, 128])
def test_fused_where_only_one_side_is_aligned(stacked, width):
    """Gate and up are rebuilt in the tiles of the forward pass, or not in that kernel."""
    spec = BlockSpec(64, width, 4, 2, stacked_gate_up=stacked)
    x, _ = make_input(spec)
    offset = torch.randn(x.numel() + 1)[1:].view(x.shape)  # contiguous, one element off
    found = []
    for policy in ("keep", "selective"):
        block = kernel_block(spec, policy)
        block.ffn_strategy = "fused"
        found.append(results(block, x.detach().to(DEVICE).requires_grad_(), offset.to(DEVICE)))
    assert same_bits(*found)
