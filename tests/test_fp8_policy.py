"""preact kept in eight bits: the loss of `keep` bit by bit, gradients off by e4m3's rounding."""

import pytest
import torch
from families import FAMILIES, FP8_POLICIES, FROZEN, make_block, make_input, results, same_bits

from backfuse import BlockStack, Policy


def differences(ours, theirs):
    """Relative errors of gradients, in the norm of all of them that are not rounding themselves."""
    scale = max(b.norm() / b.numel() ** 0.5 for b in theirs)
    return [
        (a - b).norm() / b.norm()
        for a, b in zip(ours, theirs, strict=True)
        if b.norm() / b.numel() ** 0.5 > 1e-3 * scale
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_loss_is_exact_and_gradients_are_close(family, dtype, poisoned_empty):
    spec = FAMILIES[family]
    block = make_block(spec, "keep", dtype=dtype)
    x, grad = make_input(spec, dtype=dtype, seq_len=75)
    exact = results(block, x, grad)
    first = None
    for policy in FP8_POLICIES:
        block.policy = policy
        got = results(block, x, grad)
        first = first or got
        assert same_bits(got, first), policy  # what else is kept makes no difference
    assert torch.equal(first[0], exact[0])
    assert not same_bits(first, exact)  # it is in eight bits
    # Each element is within 2^-4 of itself; errors of elements are independent, so that a gradient
    # is off by less than the largest of them.
    worst = max(differences(first[1:], exact[1:]))
    assert worst < 2**-4, worst


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("frozen", FROZEN)
def test_frozen_subsets(family, frozen, poisoned_empty):
    """What is not frozen gets what it gets when nothing is."""
    spec = FAMILIES[family]
    policy = {"preact": "fp8", "qkv": "recompute"}
    x, grad = make_input(spec, seq_len=40)
    everything = results(make_block(spec, policy), x, grad)
    got = results(make_block(spec, policy, frozen=frozen), x, grad)
    for value, full in zip(got, everything, strict=True):
        assert value is None or torch.equal(value, full)


def test_a_segment_is_rebuilt_exactly():
    """The rebuilt inputs of a segment's layers do not come from eight bits."""
    spec = FAMILIES["llama"]
    torch.manual_seed(0)
    stack = BlockStack(spec, 3, "keep", chunk_size=64)
    x, grad = make_input(spec)
    stack.set_policy({"preact": "fp8"})
    apart = results(stack, x, grad)
    stack.set_policy({"preact": "fp8"}, segments=3)
    assert same_bits(results(stack, x, grad), apart)


def test_second_backward():
    spec = FAMILIES["llama"]
    block = make_block(spec, {"preact": "fp8"})
    x, grad = make_input(spec)
    y = block(x)
    inputs = [x, *block.parameters()]
    first = torch.autograd.grad(y, inputs, grad, retain_graph=True)
    assert same_bits(first, torch.autograd.grad(y, inputs, grad))


def test_only_what_is_kept_in_eight_bits_is_lossy():
    assert Policy.parse({"preact": "fp8"}).lossy and not Policy.parse("lean").lossy
