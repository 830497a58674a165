"""BlockSpec: defaults, checks, names and shapes."""

import dataclasses

import pytest

from backfuse import BlockSpec


def test_defaults_are_llamas():
    spec = BlockSpec(512, 1408, 8)
    assert (spec.num_key_value_heads, spec.head_dim, spec.rotary_dim) == (8, 64, 64)
    assert spec.attention_scale == 64**-0.5 and spec.norm_round_first and not spec.norm_bias
    assert (spec.q_size, spec.kv_size, spec.qkv_size, spec.preact_size) == (512, 512, 1536, 2816)


def test_frozen_hashable_and_replaceable():
    spec = BlockSpec(512, 1408, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec.hidden_size = 3
    assert hash(spec) == hash(BlockSpec(512, 1408, 8))
    wide = spec.replace(head_dim=128)
    assert (wide.rotary_dim, wide.attention_scale, wide.kv_size) == (128, 128**-0.5, 1024)
    assert spec.replace(norm="layernorm") == BlockSpec(512, 1408, 8, norm="layernorm")
    assert BlockSpec(512, 1408, 8, head_dim=32).replace(hidden_size=64).head_dim == 32


def test_parameter_names_and_shapes():
    spec = BlockSpec(
        8, 12, 4, 2, norm="layernorm", norm_position="both", qkv_bias=True, qk_norm="head",
        stacked_gate_up=True,
    )  # fmt: skip
    shapes = spec.parameters()
    assert shapes["self_attn.k_proj.weight"] == (4, 8) and shapes["self_attn.k_proj.bias"] == (4,)
    assert shapes["mlp.gate_up_proj.weight"] == (24, 8) and shapes["self_attn.q_norm.weight"] == (
        2,
    )
    assert {n for n in shapes if "layernorm" in n and n.endswith("bias")} == {
        "input_layernorm.bias", "post_attention_layernorm.bias",
        "pre_feedforward_layernorm.bias", "post_feedforward_layernorm.bias",
    }  # fmt: skip
    assert "self_attn.o_proj.bias" not in shapes and "mlp.up_proj.weight" not in shapes


def test_sinks_and_heads_of_v_of_their_own_width():
    spec = BlockSpec(8, 12, 4, 2, head_dim=6, v_head_dim=10, attention_sinks=True)
    assert (spec.q_size, spec.kv_size, spec.v_size) == (24, 12, 20)
    assert (spec.qkv_size, spec.attn_out_size) == (56, 40)
    shapes = spec.attention_parameters()
    assert shapes["self_attn.v_proj.weight"] == (20, 8)
    assert shapes["self_attn.o_proj.weight"] == (8, 40) and shapes["self_attn.sinks"] == (4,)
    stacked = spec.replace(stacked_qkv=True).attention_parameters()
    assert stacked["self_attn.qkv_proj.weight"] == (56, 8)
    assert BlockSpec(8, 12, 4).replace(head_dim=6).v_head_dim == 6
    assert "self_attn.sinks" not in BlockSpec(8, 12, 4).parameters()


def test_layouts_of_weights():
    gpt2 = BlockSpec(8, 12, 4, gated=False, stacked_qkv=True, conv1d=True, qkv_bias=True)
    shapes = gpt2.parameters()
    assert shapes["self_attn.qkv_proj.weight"] == (8, 24)
    assert shapes["self_attn.qkv_proj.bias"] == (24,)
    assert shapes["mlp.up_proj.weight"] == (8, 12) and shapes["mlp.down_proj.weight"] == (12, 8)
    shared = BlockSpec(8, 12, 4, parallel_residual=True, shared_norm=True)
    assert [n for n in shared.parameters() if "norm" in n] == ["input_layernorm.weight"]
    assert "input_layernorm.weight" in shared.ffn_parameters()
    after = BlockSpec(8, 12, 4, norm_position="after_residual")
    assert after.norm_names == BlockSpec(8, 12, 4, norm_position="post").norm_names


def test_an_odd_head_dim_may_rotate_in_part_or_not_at_all():
    assert BlockSpec(28, 48, 4, rotary_dim=6).head_dim == 7
    assert BlockSpec(28, 48, 4, rope=None).head_dim == 7


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 0}, "hidden_size is 0, expected a positive integer"),
        (
            {"hidden_size": 30},
            r"hidden_size is 30, expected a multiple of num_attention_heads \(4\)",
        ),
        ({"intermediate_size": 2.5}, "intermediate_size is 2.5"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"num_key_value_heads": 3}, "num_key_value_heads is 3, expected a divisor"),
        ({"head_dim": 7}, "^head_dim is 7, expected an even number.*or give rotary_dim"),
        ({"v_head_dim": 0}, "v_head_dim is 0, expected a positive integer"),
        ({"attention_sinks": 1}, "attention_sinks is 1, expected True or False"),
        ({"hidden_size": 28}, "^head_dim is 7, expected an even number"),
        ({"head_dim": 7, "rotary_dim": 5}, "^rotary_dim is 5, expected an even number"),
        (
            {"rotary_dim": 10},
            r"rotary_dim is 10, expected an even number of at most head_dim \(8\)",
        ),
        ({"sliding_window": 0}, "sliding_window is 0"),
        ({"hidden_act": "sillu"}, "hidden_act is 'sillu'.*did you mean 'silu'"),
        ({"hidden_act": "SiLU"}, "hidden_act is 'SiLU'.*did you mean 'silu'"),
        ({"norm": "batchnorm"}, "norm is 'batchnorm'"),
        ({"norm": "RMSNorm"}, "norm is 'RMSNorm'.*did you mean 'rmsnorm'"),
        ({"norm_position": "middle"}, "norm_position is 'middle'"),
        ({"qk_norm": "heads"}, "qk_norm is 'heads'.*did you mean 'head'"),
        ({"rope": "halves"}, "rope is 'halves'.*did you mean 'half'"),
        ({"rope": "none"}, r"rope is 'none'.*did you mean None\?"),
        ({"norm_eps": -1.0}, "norm_eps is -1.0, expected a positive number"),
        ({"attn_logit_softcapping": 0.0}, "attn_logit_softcapping is 0.0"),
        ({"residual_dropout": 1.0}, "residual_dropout is 1.0, expected 0 <= p < 1"),
        ({"activation_dropout": 1.0}, "activation_dropout is 1.0, expected 0 <= p < 1"),
        ({"attention_dropout": -0.1}, "attention_dropout is -0.1"),
        ({"norm_eps": None}, "norm_eps is None"),
        ({"norm_eps": "a"}, "norm_eps is 'a'"),
        ({"attention_scale": float("inf")}, "attention_scale is inf"),
        ({"attention_dropout": None}, "attention_dropout is None"),
        ({"norm_offset": "x"}, "norm_offset is 'x'"),
        ({"gated": "no"}, "gated is 'no', expected True or False"),
        ({"gated": False, "stacked_gate_up": True}, "stacked_gate_up is True"),
        ({"norm_position": "after"}, "norm_position is 'after', expected one of 'pre'"),
        (
            {"layer_scale": True, "norm_position": "both"},
            "layer_scale is True, expected False with norm_position 'both'",
        ),
        ({"residual_multiplier": None}, "residual_multiplier is None, expected a number"),
        ({"residual_multiplier": float("nan")}, "residual_multiplier is nan"),
        ({"qkv_per_head": True}, "qkv_per_head is True, expected False without stacked_qkv"),
        (
            {"qkv_per_head": True, "stacked_qkv": True, "conv1d": True},
            "conv1d is True, expected False with qkv_per_head",
        ),
        (
            {"parallel_residual": True, "norm_position": "after_residual"},
            "norm_position is 'after_residual', expected another one with parallel_residual",
        ),
        ({"shared_norm": True}, "shared_norm is True, expected False without parallel_residual"),
        (
            {"shared_norm": True, "parallel_residual": True, "norm_position": "post"},
            "shared_norm is True, expected False without .* a norm before",
        ),
    ],
)
def test_bad_values(change, message):
    with pytest.raises(ValueError, match=message):
        BlockSpec(
            **{"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, **change}
        )
