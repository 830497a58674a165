"""Predicted bytes are the bytes that autograd holds; nothing is held for frozen weights alone."""

import pytest
import torch
from families import (
    FAMILIES,
    FP8_POLICIES,
    FROZEN,
    POLICIES,
    held_bytes,
    make_block,
    make_input,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from backfuse import BlockSpec, kept_bytes, rope_cos_sin


def measure(block, x, autocast=None, angles=None):
    def run():
        with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            return block(x, position_embeddings=angles)

    held, _ = held_bytes(run, exclude=[*block.parameters(), *(angles or ())])
    return held


def names_wanted(block, x):
    wanted = {name for name, p in block.named_parameters() if p.requires_grad}
    return wanted | ({"hidden_states"} if x.requires_grad else set())


def angles_for(spec, tokens, dtype):
    if spec.rope is None:
        return None
    return rope_cos_sin(torch.arange(tokens)[None], spec.rotary_dim, layout=spec.rope, dtype=dtype)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("input_grad", [True, False])
def test_to_the_byte(family, frozen, input_grad):
    spec = FAMILIES[family]
    kinds = [(torch.float32, None), (torch.bfloat16, None), (torch.float64, None),
             (torch.float32, torch.bfloat16)]  # fmt: skip
    for dtype, autocast in kinds:
        x, _ = make_input(spec, dtype=dtype, seq_len=33, requires_grad=input_grad)
        block = make_block(spec, dtype=dtype, frozen=frozen)
        angles = angles_for(spec, 33, dtype)
        for policy in [*POLICIES, *FP8_POLICIES[::3]]:
            block.policy = policy
            predicted = kept_bytes(
                spec, policy, batch_size=2, seq_len=33, dtype=dtype, autocast_dtype=autocast,
                requires_grad=names_wanted(block, x),
            )  # fmt: skip
            assert measure(block, x, autocast, angles) == sum(predicted.values()), (
                policy,
                predicted,
            )


@settings(max_examples=40, deadline=None)
@given(
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1)]),
    head_dim=st.sampled_from([2, 6, 8]),
    width=st.integers(1, 40),
    ffn=st.integers(1, 40),
    position=st.sampled_from(["pre", "post", "both", "after_residual"]),
    norm=st.sampled_from(["rmsnorm", "layernorm"]),
    gated=st.booleans(),
    parallel=st.booleans(),
    policy=st.sampled_from(POLICIES + FP8_POLICIES),
    tokens=st.integers(1, 80),
)
def test_any_shape(heads, head_dim, width, ffn, position, norm, gated, parallel, policy, tokens):
    spec = BlockSpec(
        width, ffn, *heads, head_dim=head_dim, norm_position=position, norm=norm, gated=gated,
        parallel_residual=parallel and position != "after_residual",
    )  # fmt: skip
    x, _ = make_input(spec, batch_size=1, seq_len=tokens)
    angles = angles_for(spec, tokens, torch.float32)
    held = measure(make_block(spec, policy), x, angles=angles)
    assert held == sum(kept_bytes(spec, policy, batch_size=1, seq_len=tokens).values())


def test_llama_3_8b_by_arithmetic():
    """The table of the README's memory model: KiB a token, bf16, 8,192 tokens."""
    spec = BlockSpec(4096, 14336, 32, 8)
    expected = {"keep": 92.1, "selective": 36.1, "lean": 16.1, "full": 8.0}
    for policy, kib in expected.items():
        costs = kept_bytes(spec, policy, batch_size=1, seq_len=8192, dtype=torch.bfloat16)
        assert round(sum(costs.values()) / 8192 / 1024, 1) == kib


def test_names_of_what_is_kept():
    costs = kept_bytes(BlockSpec(8, 16, 2), "lean", batch_size=1, seq_len=4)
    assert costs == {
        "x": 128,
        "attn_out": 128,
        "lse": 32,
        "attn_norm_stats": 16,
        "ffn_norm_stats": 16,
    }
    assert (
        kept_bytes(BlockSpec(8, 16, 2), "keep", batch_size=1, seq_len=4, requires_grad=False) == {}
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"seq_len": 2.5}, "seq_len is 2.5"),
        ({"policy": "fulll"}, "did you mean 'full'"),
        ({"policy": {"x": "fp8"}}, "action of x is 'fp8'"),
        ({"requires_grad": ["mlp.wrong"]}, "mlp.wrong"),
        ({"requires_grad": [1, "mlp.wrong"]}, r"requires_grad names \['mlp.wrong', 1\]"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        kept_bytes(
            **{
                "spec": BlockSpec(8, 16, 2),
                "policy": "full",
                "batch_size": 1,
                "seq_len": 4,
                **arguments,
            }
        )


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"spec": None}, "spec is None, expected a BlockSpec"),
        ({"dtype": "bf16"}, "dtype is 'bf16', expected one of torch.float32"),
        ({"dtype": torch.int8}, "dtype is torch.int8"),
        ({"dtype": None}, "dtype is None"),
        ({"autocast_dtype": "bf16"}, "autocast_dtype is 'bf16'"),
        ({"autocast_dtype": torch.int8}, "autocast_dtype is torch.int8"),
        ({"requires_grad": "hidden_states"}, "requires_grad is 'hidden_states', expected True, Fa"),
        ({"requires_grad": None}, "requires_grad is None"),
        ({"requires_grad": iter(["hidden_states"])}, "requires_grad is <list_iterator"),
    ],
)
def test_arguments_of_a_wrong_kind(arguments, message):
    defaults = {"spec": BlockSpec(8, 16, 2), "policy": "full", "batch_size": 1, "seq_len": 4}
    with pytest.raises(TypeError, match=f"^{message}"):
        kept_bytes(**{**defaults, **arguments})


@pytest.mark.parametrize("packed", [False, True])
def test_angles_that_the_block_makes_itself_are_not_held(packed):
    spec = FAMILIES["llama"]
    x, _ = make_input(spec, batch_size=1, seq_len=40)
    block = make_block(spec, "full")
    cu_seqlens = torch.tensor([0, 10, 40], dtype=torch.int32) if packed else None
    shared = [*block.parameters()] + ([cu_seqlens] if packed else [])
    held, _ = held_bytes(lambda: block(x, cu_seqlens=cu_seqlens), exclude=shared)
    assert held == sum(kept_bytes(spec, "full", batch_size=1, seq_len=40).values())
