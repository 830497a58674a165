"""Shapes of well-known models, by name; small ones for a CPU; and those of others' benchmarks.

Sizes, norms, activations and biases are those of the published configurations. Scaled rotary
frequencies (Llama 3.2) are left out: no cost depends on them.
"""

from dataclasses import dataclass

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
    "qwen3-8b": BlockSpec(
        4096, 12288, 32, 8, head_dim=128, norm_eps=1e-6, qk_norm="head", rope_theta=1000000.0,
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

#: What a CPU can be asked: small Llamas, FFN 8/3 of the hidden size as theirs.
SMALL_SHAPES: dict[str, BlockSpec] = {
    f"small-{h}": BlockSpec(h, f, max(1, h // 64), head_dim=min(h, 64))
    for h, f in ((32, 96), (64, 192), (512, 1408), (768, 2048), (1024, 2816))
}

#: Others' benchmarks have shapes of no model: only their FFN means something.
PEER_SHAPES: dict[str, BlockSpec] = {
    "quack-mlp": BlockSpec(4096, 16384, 32, head_dim=128),
    "liger-tiled": BlockSpec(2048, 4096, 16, head_dim=128),
}

#: All of them.
ALL_SHAPES = SHAPES | SMALL_SHAPES | PEER_SHAPES


@dataclass(frozen=True)
class CrossCheck:
    """A row of somebody else's published table, to be measured again.

    Attributes:
        op: the operation here that comes nearest.
        shape: a name from `ALL_SHAPES`.
        batch_size: sequences.
        seq_len: tokens of each.
        layers: how many.
        providers: ours and those that the table holds.
        counts: how the source counts, and what it published.
    """

    op: str
    shape: str
    batch_size: int
    seq_len: int
    layers: int
    providers: tuple[str, ...]
    counts: str


#: Name -> case. Sources: QuACK's `AI/mlp_activation_checkpointing.md`, Liger's
#: `benchmark/data/all_benchmark_data.csv`.
CROSS_CHECKS: dict[str, CrossCheck] = {
    "quack-mlp": CrossCheck(
        "ffn", "quack-mlp", 4, 2048, 4,
        ("eager", "checkpoint", "quack", "quack-recompute", "backfuse"),
        "QuACK, H100, bf16, 4 MLPs: allocated after the forward minus before, 1342 MB normal, "
        "268 MB checkpoint and recompute; peak with inputs 3221, 3020, 3020 MB. Here the FFN half "
        "stands for the MLP (a norm and a residual more); kept_bytes counts the input, peak_bytes "
        "neither input nor weights",
    ),
    "liger-swiglu": CrossCheck(
        "ffn", "llama-3-8b", 4, 2048, 1,
        ("eager", "compile", "liger", "backfuse"),
        "Liger times forward, backward and full with a retained graph, and adds up weight "
        "gradients; memory is the allocator's maximum with weights. A100, T = 8192: 6372 MB eager, "
        "4474 MB Liger. Here nothing is retained, gradients are fresh, weights do not count",
    ),
    "liger-tiled": CrossCheck(
        "ffn", "liger-tiled", 2, 8192, 1,
        ("eager", "liger", "liger-tiled", "checkpoint", "backfuse"),
        "Liger, RTX 4090, 4 shards, T = 16384: eager 35.3 ms and 2416 MB, Liger 33.7 ms and "
        "1792 MB, tiled 47.7 ms and 1056 MB; counted as in liger-swiglu",
    ),
}  # fmt: skip
