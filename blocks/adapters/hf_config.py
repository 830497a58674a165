"""From a Hugging Face configuration to the fields of a `BlockSpec`.

Most of a configuration is read by its attributes' names, which families share. What a family's
modelling code does without saying so in its configuration stands in `FAMILIES`.
"""

from __future__ import annotations

from typing import Any

from backfuse.blocks.errors import nearest

BIASES = {"qkv_bias": True, "o_bias": True, "up_bias": True, "down_bias": True}
ENCODER = {"norm": "layernorm", "gated": False, "rope": None, "causal": False, **BIASES}
BERT = {**ENCODER, "norm_position": "after_residual"}
VIT = {name: value for name, value in ENCODER.items() if name != "qkv_bias"}
GEMMA = {"norm_offset": 1.0, "norm_round_first": False}
OLMO2 = {"norm_position": "post", "norm_round_first": False, "qk_norm": "full"}

#: model_type -> what its modelling code does and its configuration does not say.
FAMILIES: dict[str, dict[str, Any]] = {
    "bert": BERT,
    "deit": VIT,
    "dinov2": {**VIT, "layer_scale": True, "residual_dropout": 0.0},
    "gemma": GEMMA,
    "gemma2": {**GEMMA, "norm_position": "both"},
    "gemma3_text": {**GEMMA, "norm_position": "both", "qk_norm": "head"},
    "gpt2": {"norm": "layernorm", "gated": False, "rope": None, "stacked_qkv": True,
             "conv1d": True, **BIASES},
    "gpt_neox": {"norm": "layernorm", "gated": False, "stacked_qkv": True, "qkv_per_head": True,
                 "up_bias": True, "down_bias": True},
    "granite": {},
    "llama": {},
    "mistral": {},
    "olmo2": OLMO2,
    "phi3": {"stacked_qkv": True, "stacked_gate_up": True},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": "head"},
    "roberta": BERT,
    "smollm3": {},
    "starcoder2": {"norm": "layernorm", "gated": False},
    "vit": VIT,
}  # fmt: skip

#: Field -> the attributes that may hold it, in the order they are asked.
ATTRIBUTES = {
    "hidden_size": ("hidden_size", "n_embd"),
    "intermediate_size": ("intermediate_size", "n_inner"),
    "num_attention_heads": ("num_attention_heads", "n_head"),
    "num_key_value_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "norm_epsilon", "layer_norm_eps"),
    "hidden_act": ("hidden_activation", "hidden_act", "activation_function"),
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "attention_scale": ("attention_multiplier",),
    "attention_dropout": ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob"),
    "residual_dropout": (
        "residual_dropout",
        "resid_pdrop",
        "hidden_dropout",
        "hidden_dropout_prob",
    ),
    "residual_multiplier": ("residual_multiplier",),
    "parallel_residual": ("use_parallel_residual",),
}

#: Settings that change a layer in a way a block has no field for: attribute -> harmless values.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (None, False),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "scale_attn_weights": (None, True),
    "use_bidirectional_attention": (None, False),
    "position_embedding_type": (None, "rope", "absolute"),
    "drop_path_rate": (None, 0.0),
}


def _layer_type(config: Any, layer_idx: int) -> str | None:
    types = getattr(config, "layer_types", None)
    return types[layer_idx] if types else None


def _rope_fields(config: Any, layer_idx: int, head_dim: int) -> dict[str, Any]:
    """Base and rotary dim; no base where the angles are scaled, which only the model can do."""
    flags = getattr(config, "no_rope_layers", None)  # 1 for layers that do rotate
    if flags and not flags[layer_idx]:
        return {"rope": None}
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters.get(_layer_type(config, layer_idx), parameters)
    plain = parameters.get("rope_type", "default") == "default"
    factor = parameters.get("partial_rotary_factor", 1.0)
    return {
        "rope_theta": parameters.get("rope_theta", 10000.0) if plain else None,
        "rotary_dim": int(head_dim * factor),
    }


def spec_fields(config: Any, layer_idx: int) -> dict[str, Any]:
    """Keyword arguments of `BlockSpec` for one decoder layer.

    Args:
        config: a `transformers` configuration.
        layer_idx: which layer.

    Raises:
        TypeError: for a layer_idx that is no integer.
        ValueError: for a family or a setting that a block cannot represent.
    """
    if not isinstance(layer_idx, int) or isinstance(layer_idx, bool):
        raise TypeError(f"layer_idx is {layer_idx!r}, expected an integer")
    family = getattr(config, "model_type", None)
    if family not in FAMILIES:
        raise ValueError(
            f"config.model_type is {family!r}, expected one of {', '.join(FAMILIES)}"
            + nearest(family, FAMILIES)
        )
    count = getattr(config, "num_hidden_layers", None)
    if count is not None and not 0 <= layer_idx < count:
        raise ValueError(f"layer_idx is {layer_idx}, expected one of the {count} layers, from 0")
    for name, harmless in UNSUPPORTED.items():
        if getattr(config, name, None) not in harmless:
            raise ValueError(
                f"config.{name} is {getattr(config, name)!r}, expected {harmless[-1]!r}: a block "
                "has no such setting"
            )
    fields: dict[str, Any] = {}
    for field, attributes in ATTRIBUTES.items():
        values = (getattr(config, name, None) for name in attributes)
        value = next((value for value in values if value is not None), None)
        if value is not None:
            fields[field] = value
    ratio = getattr(config, "mlp_ratio", 4)  # 4 where GPT-2 says nothing
    fields.setdefault("intermediate_size", int(fields["hidden_size"] * ratio))
    head_dim = fields.setdefault("head_dim", fields["hidden_size"] // fields["num_attention_heads"])
    bias = bool(getattr(config, "attention_bias", False) or getattr(config, "use_bias", False))
    mlp_bias = bool(getattr(config, "mlp_bias", False) or getattr(config, "use_bias", False))
    fields.update(
        qkv_bias=getattr(config, "qkv_bias", bias), o_bias=bias, up_bias=mlp_bias,
        down_bias=mlp_bias,
    )  # fmt: skip
    window = getattr(config, "sliding_window", None)
    if _layer_type(config, layer_idx) in (None, "sliding_attention"):
        fields["sliding_window"] = window
    scalar = getattr(config, "query_pre_attn_scalar", None)
    fields.setdefault("attention_scale", head_dim**-0.5 if scalar is None else scalar**-0.5)
    if FAMILIES[family].get("rope", "half"):
        fields.update(_rope_fields(config, layer_idx, head_dim))
    fields.update(FAMILIES[family])
    if getattr(config, "use_swiglu_ffn", False):  # DINOv2's: as many weights, in multiples of 8
        width = int(2 * fields["intermediate_size"] / 3)
        fields.update(gated=True, hidden_act="silu", intermediate_size=(width + 7) // 8 * 8)
    if getattr(config, "is_decoder", False):  # of an encoder's family
        fields["causal"] = True
    return fields
