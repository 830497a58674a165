"""A step makes the host wait for nothing, and can be captured in a CUDA graph and replayed."""

import pytest
import torch
from families import make_block, make_input, results, same_bits

from backfuse import BlockSpec, BlockStack
from backfuse.blocks.offload import line

SPEC = BlockSpec(64, 128, 4, 2, residual_dropout=0.1, attention_dropout=0.1)
POLICIES = ("keep", "selective", "lean", "full")


def test_offload_is_refused_in_a_capture(monkeypatch):
    block = make_block(SPEC, "offload")
    x, grad = make_input(SPEC)
    expected = results(block, x, grad)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match="offloads while a CUDA graph is captured, expected one"):
        block(x)
    block.policy = "lean"
    assert same_bits(results(block, x, grad), expected)
    assert not line(torch.device("cpu"), None).parcels


def gpu_stack(policy, segments=None):
    torch.manual_seed(0)
    return BlockStack(
        SPEC, 4, policy, segments=segments, device="cuda", dtype=torch.bfloat16, chunk_size=128
    )


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("packed", [False, True])
def test_the_host_waits_for_nothing(policy, packed):
    stack = gpu_stack(policy, segments=2)
    batch_size = 1 if packed else 2
    x = torch.randn(batch_size, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    given = {}
    if packed:
        offsets = torch.tensor([0, 100, 256], dtype=torch.int32, device="cuda")
        given = {"cu_seqlens": offsets, "max_seqlen": 156}
    stack(x, **given).sum().backward()  # kernels are loaded, which may wait
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        stack(x, **given).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode(before)


def captured(stack, x, grad):
    """A function that replays one captured step, and gives its output and gradients."""
    parameters = list(stack.parameters())

    def step():
        y = stack(x)
        return [y, *torch.autograd.grad(y, [x, *parameters], grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step()

    def replay(seed):
        torch.cuda.manual_seed(seed)
        graph.replay()
        return [tensor.clone() for tensor in found]

    return replay


@pytest.mark.gpu
def test_captured_and_replayed():
    x = torch.randn(2, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x)
    expected = None
    for policy in POLICIES:
        stack = gpu_stack(policy)
        replay = captured(stack, x, grad)
        first = replay(1)
        assert not torch.equal(replay(2)[0], first[0])  # what drops out is drawn at each replay
        assert same_bits(replay(1), first)
        expected = expected or first
        assert same_bits(first, expected), policy
        stack.eval()
        still = captured(stack, x, grad)(1)
        y = stack(x)
        assert same_bits(still, [y, *torch.autograd.grad(y, [x, *stack.parameters()], grad)])


@pytest.mark.gpu
def test_an_offloading_stack_cannot_be_captured():
    x = torch.randn(2, 256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    stack = gpu_stack("offload")
    with pytest.raises(ValueError, match="offloads while a CUDA graph is captured"):
        captured(stack, x, torch.randn_like(x))
