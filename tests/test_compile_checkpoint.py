"""Blocks as operators inside selective checkpoints, eager and compiled, and their FLOPs."""

import contextlib
import functools

import pytest
import torch
from families import FAMILIES, FROZEN, make_block, make_input, results, same_bits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from backfuse import SAVE_OPS, BlockStack, attention, block_flops, ffn
from backfuse.blocks import function

aten = torch.ops.aten


class Count(TorchDispatchMode):
    """Counts operators as they run, and the bytes of what matmuls put out."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func.name().split("::")[1])
        return func(*args, **(kwargs or {}))


def checkpointed(block, save, **options):
    """The block inside a selective checkpoint that saves some operators."""
    contexts = functools.partial(create_selective_checkpoint_contexts, list(save))

    def run(x):
        return checkpoint(block, x, use_reentrant=False, context_fn=contexts, **options)

    run.zero_grad, run.parameters = block.zero_grad, block.parameters
    return run


def counted(run, x, grad):
    with Count() as count:
        got = results(run, x, grad)
    return got, count.calls


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("policy", ["keep", "lean"])
def test_saved_it_runs_once(policy, early_stop):
    block = make_block(FAMILIES["gpt2"], policy)
    x, grad = make_input(block.spec)
    expected = results(block, x, grad)
    run = checkpointed(block, SAVE_OPS, early_stop=early_stop)
    got, calls = counted(run, x, grad)
    assert same_bits(got, expected)
    assert calls.count("block_forward") == calls.count("block_backward") == 1


@pytest.mark.filterwarnings("ignore:a backfuse block runs inside")
def test_saving_matmuls_saves_none_of_its():
    """Its GEMMs are no operators of the checkpoint's: nothing of them is held."""
    block = make_block(FAMILIES["llama"], "full")
    x, grad = make_input(block.spec)
    expected = results(block, x, grad)
    run = checkpointed(block, [aten.mm.default, aten.addmm.default, aten.linear.default])
    got, calls = counted(run, x, grad)
    assert same_bits(got, expected)
    assert calls.count("block_forward") == 2 and calls.count("block_backward") == 1
    assert "mm" not in calls


@pytest.mark.parametrize("save, runs", [(SAVE_OPS, 0), ((), 1)])
def test_compiled(save, runs):
    """The partitioner follows the checkpoint: a saved operator is not in the backward graph."""
    from test_compile_graphs import traced

    torch._dynamo.reset()
    block = make_block(FAMILIES["gpt2"], "lean")
    x, grad = make_input(block.spec)
    expected = results(block, x, grad)
    graphs, got = traced(checkpointed(block, save), x, grad, 1)
    assert same_bits(got, expected)
    assert graphs.calls("block_forward") == runs


@pytest.mark.filterwarnings("ignore:a backfuse block runs inside")
def test_torch_remat():
    remat = pytest.importorskip("torch_remat")
    block = make_block(FAMILIES["llama"], "full")
    x, grad = make_input(block.spec)
    run = remat.checkpoint(region_name="layer")(lambda x: block(x))

    def step(x):
        return run(x)

    step.zero_grad, step.parameters = block.zero_grad, block.parameters
    with FlopCounterMode(display=False) as counter:
        assert same_bits(results(step, x, grad), results(block, x, grad))
    once = block_flops(block.spec, "keep", batch_size=2, seq_len=70)
    alone = block_flops(block.spec, "full", batch_size=2, seq_len=70)
    assert counter.get_total_flops() == 2 * once.forward + once.backward + alone.total


def test_save_ops_names_every_forward():
    assert {str(op) for op in SAVE_OPS} == {
        f"backfuse.{kind}_forward.default"
        for kind in ("block", "attention", "ffn", "flash_attention")
    }


@contextlib.contextmanager
def as_operators(on):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function, "operators_matter", lambda: on)
        yield


def flops(run, x, grad, on):
    with as_operators(on), FlopCounterMode(display=False) as counter:
        y = run(x)
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.backward(grad)
    return forward, counter.get_total_flops()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "olmo2"])
@pytest.mark.parametrize("policy", ["keep", "selective", "full"])
@pytest.mark.parametrize("frozen", ["nothing", "attention", "projections"])
def test_flops_of_blocks_and_halves(family, policy, frozen):
    spec = FAMILIES[family]
    block = make_block(spec, policy, frozen=frozen)
    assert frozen in FROZEN
    weights = dict(block.named_parameters())
    x, grad = make_input(spec, seq_len=41)
    halves = (
        functools.partial(half, weights=weights, spec=spec, policy=policy, training=True)
        for half in (attention, ffn)
    )
    for run in (block, *halves):
        assert flops(run, x, grad, True) == flops(run, x, grad, False)
    predicted = block_flops(
        spec, policy, batch_size=2, seq_len=41,
        requires_grad={n for n, w in weights.items() if w.requires_grad} | {"hidden_states"},
    )  # fmt: skip
    assert flops(block, x, grad, True) == (predicted.forward, predicted.total)


@pytest.mark.parametrize("segments", [4, ((1, 2), 1), ((2, (1, 1)),)])
def test_flops_of_segments(segments):
    spec = FAMILIES["llama"]
    policies = ["lean", "keep", "full", {"mid": "recompute", "preact": "fp8"}]
    stack = BlockStack(spec, 4, policies, segments=segments, chunk_size=64)
    x, grad = make_input(spec, seq_len=41)
    assert flops(stack, x, grad, True) == flops(stack, x, grad, False)
