"""Policies: names, aliases, parsing, and what a person reads."""

import pytest

from backfuse import NAMED_POLICIES, BlockSpec, Policy, TransformerBlock


def test_named_policies_say_what_they_keep():
    recomputed = {
        name: {a for a in ("x", "qkv", "attn_out", "mid", "preact") if not policy.keeps(a)}
        for name, policy in NAMED_POLICIES.items()
    }
    assert recomputed == {
        "keep": set(),
        "selective": {"preact"},
        "lean": {"qkv", "mid", "preact"},
        "full": {"qkv", "attn_out", "mid", "preact"},
        "offload": {"qkv", "mid", "preact"},
    }
    assert NAMED_POLICIES["offload"].x == NAMED_POLICIES["offload"].attn_out == "offload"


@pytest.mark.parametrize(
    "value, expected",
    [
        ("keep", Policy()),
        ("everything_saveable", Policy()),
        ("dots_saveable", Policy()),
        ("nothing_saveable", NAMED_POLICIES["full"]),
        ("gradient_checkpointing", NAMED_POLICIES["full"]),
        ("activation_checkpointing", NAMED_POLICIES["full"]),
        ({}, Policy()),
        ({"preact": "recompute"}, NAMED_POLICIES["selective"]),
        ("preact=recompute", NAMED_POLICIES["selective"]),
        (" qkv = recompute, mid=recompute ,preact=recompute", NAMED_POLICIES["lean"]),
        (NAMED_POLICIES["lean"], NAMED_POLICIES["lean"]),
    ],
)
def test_parse(value, expected):
    assert Policy.parse(value) == expected


@pytest.mark.parametrize(
    "value, error, message",
    [
        ("selektive", ValueError, "policy is 'selektive', expected one of keep.*mean 'selective'"),
        ("nothing_savable", ValueError, "did you mean 'nothing_saveable'"),
        ("SELECTIVE", ValueError, "policy is 'SELECTIVE'.*did you mean 'selective'"),
        ("preact=recompute, preact=keep", ValueError, "policy is 'preact=.*: preact has two"),
        ({"prect": "keep"}, ValueError, "activation 'prect', expected.*did you mean 'preact'"),
        ({"preact": "recomput"}, ValueError, "preact is 'recomput'.*did you mean 'recompute'"),
        ("preact=drop", ValueError, "action of preact is 'drop'"),
        ("preact=", ValueError, "action of preact is ''"),
        (3, TypeError, "policy is a int"),
        (None, TypeError, "policy is a NoneType"),
    ],
)
def test_parse_refuses(value, error, message):
    with pytest.raises(error, match=message):
        Policy.parse(value)


def test_repr_is_for_people():
    assert repr(NAMED_POLICIES["full"]) == (
        "Policy(full: keep x; recompute qkv, attn_out, mid, preact)"
    )
    assert repr(Policy.parse("mid=recompute")) == (
        "Policy(keep x, qkv, attn_out, preact; recompute mid)"
    )


@pytest.mark.parametrize(
    "policy, message",
    [
        ({"qkv": "fp8"}, "the action of qkv is 'fp8'.*only preact can be kept in eight bits"),
        ({"x": "recompute"}, "expected one that keeps x.*BlockStack"),
    ],
)
def test_a_block_refuses_what_it_cannot_do(policy, message):
    spec = BlockSpec(8, 16, 2)
    with pytest.raises(ValueError, match=message):
        TransformerBlock(spec, policy)
    block = TransformerBlock(spec, "lean")
    with pytest.raises(ValueError, match=message):
        block.policy = policy
    assert block.policy == NAMED_POLICIES["lean"]
