"""A plain PyTorch Llama block, and PyTorch's own ways to run blocks with less memory.

Each way takes a list of layers and gives back a function that runs them:

    plain             nothing recomputed
    checkpoint        torch.utils.checkpoint around every layer, its defaults (early stop)
    sac-attention     selective checkpoint: only the attention operator's outputs are saved
    sac-every-2nd-mm  selective checkpoint as torchtitan does it: attention and every other matmul
    compile-B         torch.compile of every layer with activation_memory_budget = B
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import shutil
from collections.abc import Callable, Sequence
from types import CodeType, FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Rotary = tuple[Tensor, Tensor]
Run = Callable[[Tensor, Rotary], Tensor]

BUDGETS = (1.0, 0.5, 0.25, 0.1, 0.0)


class PlainRMSNorm(nn.Module):
    """`weight * x / rms(x)`, computed in fp32 and cast back before the weight, as Llama does."""

    def __init__(self, size: int, eps: float, **factory: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size, **factory))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class PlainAttention(nn.Module):
    """Causal self-attention with rotary embeddings and grouped key and value heads."""

    def __init__(
        self, hidden_size: int, heads: int, kv_heads: int, head_dim: int, **factory: Any
    ) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.grouped = kv_heads != heads
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=False, **factory)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False, **factory)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=False, **factory)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=False, **factory)

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        q, k, v = (
            proj(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, head_dim]
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = _rotate(q, rotary), _rotate(k, rotary)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    """SwiGLU: `down(silu(gate(x)) * up(x))`."""

    def __init__(self, hidden_size: int, intermediate_size: int, **factory: Any) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False, **factory)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False, **factory)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PlainBlock(nn.Module):
    """A Llama decoder layer in ordinary PyTorch, with Hugging Face's parameter names.

    Args:
        hidden_size: width of the residual stream.
        intermediate_size: width of the FFN.
        num_attention_heads: query heads; must divide `hidden_size` unless `head_dim` is given.
        num_key_value_heads: key and value heads, the query heads' number by default.
        head_dim: width of one head.
        rms_norm_eps: added to the mean square.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        num_attention_heads: int,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        rms_norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        kv_heads = num_key_value_heads or num_attention_heads
        head_dim = head_dim or hidden_size // num_attention_heads
        self.self_attn = PlainAttention(
            hidden_size, num_attention_heads, kv_heads, head_dim, **factory
        )
        self.mlp = PlainMLP(hidden_size, intermediate_size, **factory)
        self.input_layernorm = PlainRMSNorm(hidden_size, rms_norm_eps, **factory)
        self.post_attention_layernorm = PlainRMSNorm(hidden_size, rms_norm_eps, **factory)

    def forward(self, hidden_states: Tensor, position_embeddings: Rotary) -> Tensor:
        """Hidden states [B, T, hidden_size] and (cos, sin), each [1 or B, T, head_dim]."""
        mid = hidden_states + self.self_attn(
            self.input_layernorm(hidden_states), position_embeddings
        )
        return mid + self.mlp(self.post_attention_layernorm(mid))


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


def _rotate(x: Tensor, rotary: Rotary) -> Tensor:
    cos, sin = (table.unsqueeze(1) for table in rotary)  # [1 or B, 1, T, head_dim]
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def run_plain(layers: Sequence[nn.Module]) -> Run:
    """The layers one after the other; autograd keeps what it likes."""

    def run(x: Tensor, rotary: Rotary) -> Tensor:
        for layer in layers:
            x = layer(x, position_embeddings=rotary)
        return x

    return run


def run_checkpoint(layers: Sequence[nn.Module], context_fn: Callable[[], Any] | None = None) -> Run:
    """Every layer under non-reentrant `torch.utils.checkpoint`, otherwise its defaults."""
    options: dict[str, Any] = {"use_reentrant": False}
    if context_fn is not None:
        options["context_fn"] = context_fn

    def run(x: Tensor, rotary: Rotary) -> Tensor:
        for layer in layers:
            x = checkpoint(layer, x, position_embeddings=rotary, **options)
        return x

    return run


def _attention_ops() -> list[Any]:
    """The operators behind `scaled_dot_product_attention`, on every device."""
    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    return [getattr(aten, name).default for name in names if hasattr(aten, name)]


def run_saving_attention(layers: Sequence[nn.Module]) -> Run:
    """Selective checkpoint that saves what attention puts out and replays everything else."""
    return run_checkpoint(
        layers, functools.partial(create_selective_checkpoint_contexts, _attention_ops())
    )


def run_saving_every_second_matmul(layers: Sequence[nn.Module]) -> Run:
    """Selective checkpoint by torchtitan's rule: attention and matmuls 1, 3, 5, ... are saved."""
    attention = frozenset(_attention_ops())
    matmuls = frozenset((torch.ops.aten.mm.default, torch.ops.aten.addmm.default))

    def contexts() -> Any:
        # The forward and its replay count apart, so that they decide alike.
        counters = {False: itertools.count(), True: itertools.count()}

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            second = op in matmuls and next(counters[context.is_recompute]) % 2 == 1
            if op in attention or (op in matmuls and not second):
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return run_checkpoint(layers, contexts)


def run_compiled(layers: Sequence[nn.Module], budget: float) -> Run:
    """Every layer compiled, its partitioner told to keep `budget` of what it would like to keep.

    Args:
        layers: of one kind and one shape, so that one graph serves all of them.
        budget: 0 to 1; a share of the partitioner's own range, not of bytes.

    Raises:
        RuntimeError: at the first call, where there is no C++ compiler.
    """

    def one_layer(layer: nn.Module, x: Tensor, rotary: Rotary) -> Tensor:
        return layer(x, position_embeddings=rotary)

    # Dynamo keys its graphs by code object: budgets that share one all get the first one's graph.
    name = f"one_layer_budget_{budget}"
    own: CodeType = one_layer.__code__.replace(co_name=name)
    compiled = torch.compile(FunctionType(own, globals(), name), fullgraph=True, dynamic=False)

    def run(x: Tensor, rotary: Rotary) -> Tensor:
        with torch._functorch.config.patch(activation_memory_budget=budget):
            for layer in layers:
                x = compiled(layer, x, rotary)
        return x

    return run


#: Name to a function from layers to a function that runs them.
RIVALS: dict[str, Callable[[Sequence[nn.Module]], Run]] = {
    "plain": run_plain,
    "checkpoint": run_checkpoint,
    "sac-attention": run_saving_attention,
    "sac-every-2nd-mm": run_saving_every_second_matmul,
    **{f"compile-{budget}": functools.partial(run_compiled, budget=budget) for budget in BUDGETS},
}


def missing(name: str, device: torch.device | str = "cpu") -> str | None:
    """Why the rival `name` cannot run here, in one line; None if it can."""
    if not name.startswith("compile"):
        return None
    if torch.device(device).type == "cuda":
        return None if importlib.util.find_spec("triton") else "compiling for CUDA needs triton"
    if any(shutil.which(compiler) for compiler in ("g++", "clang++", "c++")):
        return None
    return "torch.compile on a CPU needs a C++ compiler (g++ or clang++)"


def llama_layers(
    num_layers: int,
    hidden_size: int,
    intermediate_size: int,
    num_attention_heads: int,
    num_key_value_heads: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[list[nn.Module], str]:
    """Layers to compare against, and what they are.

    Returns:
        Hugging Face's `LlamaDecoderLayer` with sdpa where transformers is installed, else
        `PlainBlock`, in training mode; and the name of the class.
    """
    sizes = (hidden_size, intermediate_size, num_attention_heads, num_key_value_heads)
    try:
        from transformers import LlamaConfig
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer
    except ImportError:
        blocks = [PlainBlock(*sizes, device=device, dtype=dtype) for _ in range(num_layers)]
        return list(blocks), "PlainBlock (transformers is not installed)"
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        num_hidden_layers=num_layers,
        attn_implementation="sdpa",
    )
    layers = [LlamaDecoderLayer(config, index) for index in range(num_layers)]
    return [layer.to(device=device, dtype=dtype).train() for layer in layers], "LlamaDecoderLayer"
