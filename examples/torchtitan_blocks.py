"""torchtitan's Llama blocks that compute with backfuse, under the names they have.

    use_backfuse(model, "lean")      # before parallelize_llama, full activation checkpointing off

A block keeps its class's name, parameters and hooks: `fully_shard`, pipelines and checkpoints go
on working. It runs as the two halves `attention` and `ffn`, so `mid` is kept under any policy.
See `docs/torchtitan.md`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from backfuse import BlockSpec, Policy, attention, ffn

#: Our names of a block's weights -> torchtitan's.
NAMES = {
    "input_layernorm": "attention_norm",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.q_norm": "attention.q_norm",
    "self_attn.k_norm": "attention.k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "feed_forward.w1",
    "mlp.down_proj": "feed_forward.w2",
    "mlp.up_proj": "feed_forward.w3",
}

OPTIONAL = ("self_attn.q_norm", "self_attn.k_norm")


def modules_of(block: nn.Module) -> dict[str, nn.Module]:
    """The modules that hold a block's weights, by our names."""
    found = {}
    for ours, theirs in NAMES.items():
        try:
            found[ours] = block.get_submodule(theirs)
        except AttributeError:
            continue
    return found


def spec_of(block: nn.Module) -> BlockSpec:
    """What a block is, from its modules' sizes.

    Raises:
        ValueError: for a block of another structure, naming what is missing.
    """
    modules = modules_of(block)
    missing = [NAMES[name] for name in NAMES if name not in (*modules, *OPTIONAL)]
    if missing:
        raise ValueError(
            f"{type(block).__name__} has no {', '.join(missing)}, expected a dense block with "
            "projections apart from each other"
        )
    biased = [
        NAMES[name] for name, part in modules.items() if getattr(part, "bias", None) is not None
    ]
    if biased:
        raise ValueError(f"{', '.join(biased)} have biases, expected none")
    if type(block.attention.rope).__name__ != "ComplexRoPE":
        raise ValueError(
            f"rope is a {type(block.attention.rope).__name__}, expected a ComplexRoPE: "
            "neighbouring channels turn together"
        )
    heads, kv_heads = block.attention.n_heads, block.attention.n_kv_heads
    q = modules["self_attn.q_proj"].weight
    norm = modules["input_layernorm"]
    return BlockSpec(
        hidden_size=q.shape[1],
        intermediate_size=modules["mlp.gate_proj"].weight.shape[0],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=q.shape[0] // heads,
        norm_eps=norm.eps if norm.eps is not None else torch.finfo(torch.float32).eps,
        norm_round_first=False,
        qk_norm="head" if "self_attn.q_norm" in modules else None,
        rope="interleaved",
        rope_theta=None,
    )


def weights_of(block: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A block's weights by our names, as they are at this moment."""
    for name, module in modules_of(block).items():
        yield f"{name}.weight", module.weight


def angles_of(block: nn.Module, seq_len: int, positions: Tensor | None) -> tuple[Tensor, Tensor]:
    """cos and sin of each position, `[1 or batch, seq_len, head_dim]`, neighbours alike."""
    cache = block.attention.rope.cache
    cache = cache[None, :seq_len] if positions is None else cache[positions]
    cache = cache.repeat_interleave(2, -1)
    return cache.real.contiguous(), cache.imag.contiguous()


class Backfused:
    """What a block's class gets in front of its own."""

    def forward(
        self: Any, x: Tensor, attention_masks: Any = None, positions: Tensor | None = None
    ) -> Tensor:
        """As the block's own, for causal attention.

        Args:
            x: `[batch, seq_len, dim]`.
            attention_masks: torchtitan's `VarlenMetadata` (`attn_backend="varlen"`): documents that
                see themselves alone, all rows of the batch one after another; None: every row is
                one document.
            positions: `[batch, seq_len]`, from 0 in each document; None: from 0 in each row.

        Raises:
            TypeError: for other masks.
        """
        weights = dict(weights_of(self))
        cos, sin = angles_of(self, x.shape[1], positions)
        given: dict[str, Any] = {"spec": self.backfuse_spec, "policy": self.backfuse_policy}
        rows, packing = x, {}
        if attention_masks is not None:
            if not hasattr(attention_masks, "cu_seq_q"):
                raise TypeError(
                    f"attention_masks is a {type(attention_masks).__name__}, expected "
                    'VarlenMetadata (attn_backend="varlen") or None'
                )
            rows = x.flatten(0, 1)[None]
            cos, sin = (part.expand(len(x), -1, -1).flatten(0, 1)[None] for part in (cos, sin))
            packing = {
                "cu_seqlens": attention_masks.cu_seq_q, "max_seqlen": int(attention_masks.max_q)
            }  # fmt: skip
        mid = attention(rows, weights, position_embeddings=(cos, sin), **packing, **given)
        return ffn(mid, weights, **given).view(x.shape)


def use_backfuse(model: nn.Module, policy: str | dict[str, str] | Policy = "lean") -> nn.Module:
    """Makes every block of a torchtitan model compute with backfuse, in place.

    Args:
        model: with `layers`, a ModuleDict of blocks.
        policy: what each block keeps.

    Raises:
        ValueError: for blocks of another structure, or a wrong policy; nothing is then changed.
    """
    parsed = Policy.parse(policy)
    parsed.check_available()
    specs = [spec_of(block) for block in model.layers.values()]
    for block, spec in zip(model.layers.values(), specs, strict=True):
        block.backfuse_spec, block.backfuse_policy = spec, parsed
        own = type(block)
        block.__class__ = type(own.__name__, (Backfused, own), {"__module__": own.__module__})
    return model
