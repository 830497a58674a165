"""Every operation in plain PyTorch modules: all others share their weights, and are held to them.

They round where Hugging Face's modules do, and have a block's parameter names. Context that wants
no gradient (rotary tables) is bound to the module, so that a module is a function of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backfuse import BlockSpec

Rotary = tuple[Tensor, Tensor]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}


class PlainRMSNorm(nn.Module):
    """`weight * x / rms(x)`, in fp32 (fp64 for fp64), cast back before the weight, as Llama does.

    Args:
        size: of a row.
        eps: added to the mean square.
        device, dtype: of the weight.
    """

    def __init__(self, size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def norm_of(spec: BlockSpec, **factory: Any) -> nn.Module:
    """The norm of a block, RMSNorm or LayerNorm."""
    if spec.norm == "layernorm":
        return nn.LayerNorm(spec.hidden_size, eps=spec.norm_eps, **factory)
    return PlainRMSNorm(spec.hidden_size, spec.norm_eps, **factory)


class PlainMLP(nn.Module):
    """`down(act(gate(x)) * up(x))`, or `down(act(up(x)))`."""

    def __init__(self, spec: BlockSpec, **factory: Any) -> None:
        super().__init__()
        h, f = spec.hidden_size, spec.intermediate_size
        self.gated, self.act = spec.gated, ACTIVATIONS[spec.hidden_act]
        if self.gated:
            self.gate_proj = nn.Linear(h, f, bias=spec.up_bias, **factory)
        self.up_proj = nn.Linear(h, f, bias=spec.up_bias, **factory)
        self.down_proj = nn.Linear(f, h, bias=spec.down_bias, **factory)

    def forward(self, x: Tensor) -> Tensor:
        if self.gated:
            return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))
        return self.down_proj(self.act(self.up_proj(x)))


class PlainHalf(nn.Module):
    """The FFN half: `x + mlp(norm(x))`."""

    def __init__(self, spec: BlockSpec, **factory: Any) -> None:
        super().__init__()
        self.post_attention_layernorm = norm_of(spec, **factory)
        self.mlp = PlainMLP(spec, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.post_attention_layernorm(x))


def rotate(x: Tensor, rotary: Rotary) -> Tensor:
    """RoPE of `[B, heads, T, head_dim]`, Hugging Face's formula; cos and sin `[1 or B, T, D]`."""
    cos, sin = (table.unsqueeze(1) for table in rotary)
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class PlainRope(nn.Module):
    """qk-norm, if the block has it, and RoPE, on the projections' output.

    Args:
        spec: the block.
        rotary: cos and sin `[1, T, head_dim]`.
        device, dtype: of the norms' weights.
    """

    def __init__(self, spec: BlockSpec, rotary: Rotary, **factory: Any) -> None:
        super().__init__()
        self.spec = spec
        _hold(self, rotary)
        if spec.qk_norm:
            self.q_norm = PlainRMSNorm(spec.head_dim, spec.norm_eps, **factory)
            self.k_norm = PlainRMSNorm(spec.head_dim, spec.norm_eps, **factory)

    def forward(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, q_size + kv_size]` to q and k, each `[B, T, heads, head_dim]`."""
        spec = self.spec
        q, k = (
            part.unflatten(-1, (-1, spec.head_dim))
            for part in qk.split([spec.q_size, spec.kv_size], -1)
        )
        if spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        rotary = rotary_of(self)
        assert rotary is not None
        q, k = (rotate(x.transpose(1, 2), rotary).transpose(1, 2) for x in (q, k))
        return q, k


def _hold(module: nn.Module, rotary: Rotary | None) -> None:
    """Makes the tables buffers, which follow `module.to(dtype)`."""
    for name, table in zip(("cos", "sin"), rotary or (None, None), strict=True):
        module.register_buffer(name, table, persistent=False)


def rotary_of(module: Any) -> Rotary | None:
    """The tables that a module holds."""
    return None if module.cos is None else (module.cos, module.sin)


def sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """`scaled_dot_product_attention` of `[B, T, heads, head_dim]`."""
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2)


class PlainCore(nn.Module):
    """The attention core: softmax(q kᵀ) v of `[B, T, heads, head_dim]`."""

    def __init__(self, spec: BlockSpec) -> None:
        super().__init__()
        self.causal = spec.causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, self.causal)


class PlainAttention(nn.Module):
    """Self-attention with its projections: rotary embeddings, grouped heads, qk-norm by head."""

    def __init__(self, spec: BlockSpec, **factory: Any) -> None:
        super().__init__()
        self.spec = spec
        h, bias = spec.hidden_size, spec.qkv_bias
        self.q_proj = nn.Linear(h, spec.q_size, bias=bias, **factory)
        self.k_proj = nn.Linear(h, spec.kv_size, bias=bias, **factory)
        self.v_proj = nn.Linear(h, spec.kv_size, bias=bias, **factory)
        self.o_proj = nn.Linear(spec.q_size, h, bias=spec.o_bias, **factory)
        if spec.qk_norm:
            self.q_norm = PlainRMSNorm(spec.head_dim, spec.norm_eps, **factory)
            self.k_norm = PlainRMSNorm(spec.head_dim, spec.norm_eps, **factory)

    def forward(self, x: Tensor, rotary: Rotary | None) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.spec.head_dim))  # [B, T, heads, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.spec.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if rotary is not None and self.spec.rope:
            q, k = (rotate(x.transpose(1, 2), rotary).transpose(1, 2) for x in (q, k))
        return self.o_proj(sdpa(q, k, v, self.spec.causal).flatten(2))


class PlainAttentionHalf(nn.Module):
    """The attention half: `x + self_attn(norm(x))`; rotary tables as `PlainRope` has them."""

    def __init__(self, spec: BlockSpec, rotary: Rotary | None, **factory: Any) -> None:
        super().__init__()
        _hold(self, rotary)
        self.input_layernorm = norm_of(spec, **factory)
        self.self_attn = PlainAttention(spec, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.self_attn(self.input_layernorm(x), rotary_of(self))


class PlainBlock(nn.Module):
    """A decoder layer in ordinary PyTorch, with Hugging Face's parameter names.

    Args:
        spec: a block with norms before its halves, and separate projections.
        device, dtype: of the parameters.
    """

    def __init__(self, spec: BlockSpec, **factory: Any) -> None:
        super().__init__()
        self.self_attn = PlainAttention(spec, **factory)
        self.mlp = PlainMLP(spec, **factory)
        self.input_layernorm = norm_of(spec, **factory)
        self.post_attention_layernorm = norm_of(spec, **factory)

    def forward(self, hidden_states: Tensor, position_embeddings: Rotary | None = None) -> Tensor:
        """Hidden states [B, T, hidden_size] and (cos, sin), each [1 or B, T, head_dim]."""
        mid = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings
        )
        return mid + self.mlp(self.post_attention_layernorm(mid))


def is_llama(spec: BlockSpec) -> bool:
    """Whether Hugging Face's `LlamaDecoderLayer` is this block."""
    llama = BlockSpec(
        spec.hidden_size,
        spec.intermediate_size,
        spec.num_attention_heads,
        spec.num_key_value_heads,
        head_dim=spec.head_dim,
        norm_eps=spec.norm_eps,
        rope_theta=spec.rope_theta,
    )
    return spec == llama


def make_layers(spec: BlockSpec, count: int, **factory: Any) -> tuple[list[nn.Module], str]:
    """Layers to compare against, and what they are.

    Returns:
        Hugging Face's `LlamaDecoderLayer` with sdpa where that is the block and transformers is
        installed, else `PlainBlock`, in training mode; and the name of the class. In fp64 always
        `PlainBlock`: Hugging Face's norms compute in fp32.
    """
    if not is_llama(spec) or factory.get("dtype") == torch.float64:
        return [PlainBlock(spec, **factory) for _ in range(count)], "PlainBlock"
    try:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    except ImportError:
        layers: list[nn.Module] = [PlainBlock(spec, **factory) for _ in range(count)]
        return layers, "PlainBlock (transformers is not installed)"
    config = LlamaConfig(
        hidden_size=spec.hidden_size,
        intermediate_size=spec.intermediate_size,
        num_attention_heads=spec.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        rms_norm_eps=spec.norm_eps,
        num_hidden_layers=count,
        attn_implementation="sdpa",
    )
    layers = [LlamaDecoderLayer(config, index) for index in range(count)]
    return [layer.to(**factory).train() for layer in layers], "LlamaDecoderLayer"


class PlainStack(nn.Module):
    """Layers one after the other; called like a `BlockStack`.

    Args:
        layers: each called with hidden states and `position_embeddings`.
        way: makes of a layer the function that runs it (see `ways.py`).
        rotary: cos and sin for calls without them.
    """

    def __init__(
        self,
        layers: Iterable[nn.Module],
        way: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda layer: layer,
        rotary: Rotary | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.way = way
        _hold(self, rotary)
        self._calls: list[Callable[..., Any]] | None = None

    def forward(self, hidden_states: Tensor, position_embeddings: Rotary | None = None) -> Tensor:
        if self._calls is None:
            self._calls = [self.way(layer) for layer in self.layers]
        rotary = position_embeddings or rotary_of(self)
        for call in self._calls:
            hidden_states = call(hidden_states, position_embeddings=rotary)
        return hidden_states


def rotary_tables(
    seq_len: int,
    head_dim: int,
    theta: float = 10000.0,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Rotary:
    """(cos, sin) for positions 0 to `seq_len`, each [1, seq_len, head_dim], halves repeated."""
    exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim
    positions = torch.arange(seq_len, device=device, dtype=torch.float32)
    angles = torch.outer(positions, theta**-exponents).repeat(1, 2).unsqueeze(0)
    return angles.cos().to(dtype), angles.sin().to(dtype)
