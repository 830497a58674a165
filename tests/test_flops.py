"""FLOP formulas against FlopCounterMode."""

import functools

import pytest
import torch
from families import FAMILIES, FROZEN, POLICIES, make_block, make_input
from torch.utils.flop_counter import FlopCounterMode

from backfuse import BlockSpec, block_flops
from backfuse.blocks import flops


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("input_grad", [True, False])
def test_forward_backward_and_recompute(family, frozen, input_grad):
    spec = FAMILIES[family]
    x, grad = make_input(spec, seq_len=41, requires_grad=input_grad)
    block = make_block(spec, frozen=frozen)
    wanted = {name for name, p in block.named_parameters() if p.requires_grad}
    wanted |= {"hidden_states"} if input_grad else set()
    for policy in POLICIES:
        block.policy = policy
        predicted = block_flops(
            spec, policy, batch_size=2, seq_len=41, requires_grad=wanted, training=True
        )
        forward, y = count(lambda: block(x))
        assert forward == predicted.forward
        backward = count(functools.partial(y.backward, grad))[0] if y.requires_grad else 0
        assert backward == predicted.backward + predicted.recompute, policy
        if policy == POLICIES[0]:
            assert predicted.recompute == 0


@pytest.mark.parametrize("window", [None, 9])
def test_packed_and_masked(window):
    spec = BlockSpec(16, 24, 2, sliding_window=window)
    x, grad = make_input(spec, batch_size=1, seq_len=60)
    block = make_block(spec, "full")
    options = {"batch_size": 1, "seq_len": 60}
    cu_seqlens = torch.tensor([0, 10, 10, 60], dtype=torch.int32)
    total, _ = count(lambda: block(x, cu_seqlens=cu_seqlens).backward(grad))
    assert total == block_flops(spec, "full", lengths=[10, 0, 50], **options).total
    mask = torch.ones(1, 1, 60, 60, dtype=torch.bool).tril()
    total, _ = count(lambda: block(x, attention_mask=mask).backward(grad))
    assert total == block_flops(spec, "full", masked=True, **options).total


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"policy": {"x": "fp8"}}, "action of x is 'fp8'"),
        ({"lengths": [1, 2, 3]}, r"lengths is \[1, 2, 3\].*seq_len \(60\)"),
        ({"lengths": [-5, 65]}, "lengths is"),
        ({"lengths": [60], "batch_size": 2}, "batch_size of 2"),
        ({"lengths": []}, r"lengths is \[\].*seq_len \(60\)"),
        ({"lengths": [56, 4.0]}, r"lengths is \[56, 4.0\].*expected integers"),
        ({"device": "cdua"}, "device is 'cdua', expected cpu or cuda; did you mean 'cuda'"),
        ({"device": None}, "device is None, expected cpu or cuda"),
    ],
)
def test_bad_arguments(arguments, message):
    defaults = {"spec": BlockSpec(8, 16, 2), "policy": "full", "batch_size": 1, "seq_len": 60}
    with pytest.raises(ValueError, match=message):
        block_flops(**{**defaults, **arguments})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"spec": None}, "spec is None, expected a BlockSpec"),
        ({"dtype": "bf16"}, "dtype is 'bf16', expected one of torch.float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"lengths": 60}, "lengths is 60, expected a sequence of integers"),
        ({"requires_grad": "hidden_states"}, "requires_grad is 'hidden_states'"),
    ],
)
def test_arguments_of_a_wrong_kind(arguments, message):
    defaults = {"spec": BlockSpec(8, 16, 2), "policy": "full", "batch_size": 1, "seq_len": 60}
    with pytest.raises(TypeError, match=f"^{message}"):
        block_flops(**{**defaults, **arguments})


def test_llama_3_8b_by_arithmetic():
    """Extra FLOPs of a training step at 8,192 tokens, causal attention counted at half."""
    spec = BlockSpec(4096, 14336, 32, 8)
    extra = {}
    for policy in ("selective", "lean", "full"):
        flops = block_flops(spec, policy, batch_size=1, seq_len=8192, dtype=torch.bfloat16)
        base = block_flops(spec, "keep", batch_size=1, seq_len=8192, dtype=torch.bfloat16)
        hidden = 2 * 8192 * 8192 * spec.q_size  # half of Q K^T and P V: what the formula overstates
        base_total = base.total - int(3.5 * hidden)
        attention_again = hidden if policy == "full" else 0
        extra[policy] = 100 * (flops.recompute - attention_again) / base_total
    assert {name: round(value, 1) for name, value in extra.items()} == {
        "selective": 15.2, "lean": 20.7, "full": 25.0,
    }  # fmt: skip


def test_attention_with_groups_is_counted_whatever_pytorch_counts(monkeypatch):
    """2.11's formulas take as many heads of keys as of queries."""

    def strict(*shapes):
        if len({shape[1] for shape in shapes}) > 1:
            raise AssertionError("shapes are incompatible")
        return sum(map(sum, shapes))

    q, kv = (2, 8, 5, 16), (2, 2, 7, 16)
    whole = (2, 8, 7, 16)
    for name, formula in (
        ("sdpa_flop_count", flops._forward), ("sdpa_backward_flop_count", flops._backward)
    ):  # fmt: skip
        monkeypatch.setattr(flops, name, strict)
        first = (q,) if "backward" in name else ()
        assert formula(*first, q, kv, kv) == strict(*first, q, whole, whole)
    assert not flops._counts_groups()
