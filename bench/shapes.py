"""Shapes of well-known models, by name.

Sizes, norms, activations and biases are those of the published configurations. Scaled rotary
frequencies (Llama 3.2) are left out: no cost depends on them.
"""

from backfuse import BlockSpec

#: Name of a model -> one of its blocks.
SHAPES: dict[str, BlockSpec] = {
    "llama-3.2-1b": BlockSpec(
        2048, 8192, 32, 8, head_dim=64, norm_eps=1e-5, rope_theta=500000.0,
    ),
    "llama-3-8b": BlockSpec(
        4096, 14336, 32, 8, head_dim=128, norm_eps=1e-5, rope_theta=500000.0,
    ),
    "llama-3-70b": BlockSpec(
        8192, 28672, 64, 8, head_dim=128, norm_eps=1e-5, rope_theta=500000.0,
    ),
    "qwen2.5-7b": BlockSpec(
        3584, 18944, 28, 4, head_dim=128, norm_eps=1e-6, qkv_bias=True, rope_theta=1000000.0,
    ),
    "gpt2-xl": BlockSpec(
        1600, 6400, 25, head_dim=64, norm="layernorm", norm_eps=1e-5, hidden_act="gelu_new",
        gated=False, qkv_bias=True, o_bias=True, up_bias=True, down_bias=True, rope=None,
    ),
    "vit-l": BlockSpec(
        1024, 4096, 16, head_dim=64, norm="layernorm", norm_eps=1e-12, hidden_act="gelu",
        gated=False, qkv_bias=True, o_bias=True, up_bias=True, down_bias=True, rope=None,
        causal=False,
    ),
}  # fmt: skip

#: What a CPU is asked by default: a small Llama.
SMALL = BlockSpec(512, 1408, 8, head_dim=64, norm_eps=1e-5)
