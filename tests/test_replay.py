"""Inside somebody else's checkpoint a block keeps, computes nothing twice, and warns once."""

import warnings
from pathlib import Path

import pytest
import torch
from families import FAMILIES, make_block, make_input, results, same_bits
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from backfuse import BlockStack, block_flops
from backfuse.blocks import replay


@pytest.fixture(autouse=True)
def not_warned_yet(monkeypatch):
    monkeypatch.setattr(replay, "_warned", False)


def selective(*args):
    return create_selective_checkpoint_contexts(lambda *_, **__: CheckpointPolicy.PREFER_RECOMPUTE)


OUTER = {
    "reentrant": {"use_reentrant": True},
    "non-reentrant": {"use_reentrant": False},
    "without early stop": {"use_reentrant": False, "early_stop": False},
    "selective": {"use_reentrant": False, "context_fn": selective},
}


@pytest.mark.parametrize("outer", OUTER)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_replayed_once_and_not_recomputed(outer, family):
    spec = FAMILIES[family]
    block = make_block(spec, "full")
    x, grad = make_input(spec)
    expected = results(block, x, grad)

    def run(x):
        return checkpoint(block, x, **OUTER[outer])

    run.zero_grad, run.parameters = block.zero_grad, block.parameters
    with pytest.warns(UserWarning, match="runs inside torch.utils.checkpoint") as record:
        assert same_bits(results(run, x, grad), expected)
    assert Path(record[0].filename).parent == Path(__file__).parent  # the caller, not PyTorch
    with FlopCounterMode(display=False) as counter:
        results(run, x, grad)
    flops = block_flops(spec, "keep", batch_size=2, seq_len=70)
    assert counter.get_total_flops() == 2 * flops.forward + flops.backward


def test_the_warning_comes_once():
    block = make_block(FAMILIES["llama"], "full")
    x, _ = make_input(block.spec)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        for _ in range(3):
            checkpoint(block, x, use_reentrant=False).sum().backward()
    assert len([w for w in record if "checkpoint" in str(w.message)]) == 1


def test_no_warning_where_nothing_is_recomputed():
    block = make_block(FAMILIES["llama"], "keep")
    x, _ = make_input(block.spec)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint(block, x, use_reentrant=False).sum().backward()


def test_other_hooks_are_not_mistaken_for_a_checkpoint():
    block = make_block(FAMILIES["llama"], "full")
    x, grad = make_input(block.spec)
    expected = results(block, x, grad)
    with warnings.catch_warnings(), torch.autograd.graph.save_on_cpu():
        warnings.simplefilter("error")
        assert same_bits(results(block, x, grad), expected)


def test_segments_inside_a_checkpoint():
    torch.manual_seed(0)
    stack = BlockStack(FAMILIES["llama"], 3, "full", segments=(3,))
    x, grad = make_input(stack.spec)
    expected = results(stack, x, grad)

    def run(x):
        return checkpoint(stack, x, use_reentrant=False)

    run.zero_grad, run.parameters = stack.zero_grad, stack.parameters
    with pytest.warns(UserWarning, match="runs inside"):
        assert same_bits(results(run, x, grad), expected)
    with FlopCounterMode(display=False) as counter:
        results(run, x, grad)
    flops = block_flops(stack.spec, "keep", batch_size=2, seq_len=70)
    assert counter.get_total_flops() == 3 * (2 * flops.forward + flops.backward)
