"""Tiny random models of transformers, one a family, and one training step of each."""

import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "vocab_size": 64,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "n_embd": 48, "n_head": 6, "n_layer": 2, "vocab_size": 64, "n_positions": 128,
    "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ENCODER = {
    "hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 6, "num_hidden_layers": 2,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
TEXT_ENCODER = {
    **ENCODER, "vocab_size": 64, "max_position_embeddings": 128, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip

#: Families whose layers come out as one block -> their configurations' tiny sizes.
FUSED = {
    "gemma": {**SIZES, "head_dim": 16},
    "gemma2": {**SIZES, "head_dim": 16, "sliding_window": 9, "query_pre_attn_scalar": 20},
    "gemma3_text": {
        **SIZES, "head_dim": 16, "sliding_window": 9,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "llama": {**SIZES, "attention_bias": True, "mlp_bias": True},
    "mistral": {**SIZES, "sliding_window": 11, "head_dim": 8},
    "olmo2": SIZES,
    "phi3": {
        **SIZES,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    },
    "qwen2": SIZES,
    "qwen3": {**SIZES, "head_dim": 12},
    "smollm3": {**SIZES, "no_rope_layers": [1, 0]},
    "starcoder2": {**SIZES, "use_bias": True, "sliding_window": 12, "hidden_act": "gelu"},
    "cohere": SIZES,
    "gpt_neox": {
        **SIZES, "num_key_value_heads": None, "hidden_act": "gelu", "attention_bias": True,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5,
        },
    },
    "granite": {**SIZES, "residual_multiplier": 0.3, "attention_multiplier": 0.4},
    "gpt2": GPT2,
    "bert": TEXT_ENCODER,
    "dinov2": {**ENCODER, "mlp_ratio": 2, "image_size": 32, "patch_size": 8},
    "roberta": TEXT_ENCODER,
    "vit": {**ENCODER, "image_size": 32, "patch_size": 8},
}  # fmt: skip

#: Families of which the attention half is a block's.
HALF = {
    "mixtral": {**SIZES, "num_local_experts": 4},
    "qwen3_moe": {
        **SIZES, "head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}  # fmt: skip

#: Families that are no language models.
ENCODERS = ("bert", "dinov2", "roberta", "vit")

#: Sequences and tokens of a batch.
BATCH_SIZE, SEQ_LEN = 2, 40


def make_model(family, dtype=torch.float32, **changes):
    """A random model, in training, every parameter of it off its initial value."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **{**FUSED, **HALF}[family] | changes)
    kind = AutoModel if family in ENCODERS else AutoModelForCausalLM
    model = kind.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.to(dtype).train()


def batch(family, dtype=torch.float32):
    """What the model is called with."""
    generator = torch.Generator().manual_seed(1)
    if family in ("dinov2", "vit"):
        return {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator).to(dtype)}
    return {"input_ids": torch.randint(3, 64, (BATCH_SIZE, SEQ_LEN), generator=generator)}


def step(model, inputs, labels=None):
    """Logits (or the last hidden states), loss, and every gradient, by name, of one step.

    Args:
        model: a model.
        inputs: what it is called with.
        labels: of a language model; None: the inputs themselves, where they are tokens.
    """
    model.zero_grad(set_to_none=True)
    out = model(**inputs)
    result = out.logits if "logits" in out else out.last_hidden_state
    if "logits" in out:
        labels = inputs["input_ids"] if labels is None else labels
        shifted = labels[:, 1:].flatten()
        loss = torch.nn.functional.cross_entropy(result[:, :-1].flatten(0, 1), shifted)
    else:
        weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(2))
        if (seen := inputs.get("attention_mask")) is not None:
            weight = weight * seen[..., None]
        loss = (result * weight.to(result.dtype)).sum()
    loss.backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"logits": result.detach(), "loss": loss.detach(), **grads}
