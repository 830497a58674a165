"""How a parameter's rows stand, where the passes want them otherwise.

The passes read projections as `[out, in]`, and a stacked QKV as q, k, v. A spec may say that the
parameters are laid out otherwise: they are then put in order anew for each pass, and never kept in
that order; gradients go back to the parameters' own.

| field | parameter | the passes' |
|---|---|---|
| `conv1d` | projections `[in, out]`, but for adapters | their transposes: views |
| `qkv_per_head` | rows by key heads: its query heads, itself, its value head | q, then k, then v |
"""

from __future__ import annotations

import torch
from torch import Tensor

from .spec import BlockSpec

#: What goes by heads, with `qkv_per_head`.
QKV = ("self_attn.qkv_proj.weight", "self_attn.qkv_proj.bias")

#: What the FFN's kernels read.
FFN = ("mlp.up_proj.weight", "mlp.gate_proj.weight", "mlp.gate_up_proj.weight",
       "mlp.down_proj.weight")  # fmt: skip


def _by_heads(spec: BlockSpec, name: str) -> bool:
    """Whether a parameter's rows go by heads: those of an adapter's B do as well."""
    return spec.qkv_per_head and (name in QKV or name.startswith("self_attn.qkv_proj.lora_B."))


def in_order(spec: BlockSpec, name: str, weight: Tensor) -> Tensor:
    """A parameter as the passes read it: itself, where it is so already.

    Args:
        spec: the block.
        name: the parameter's.
        weight: the parameter, or a cast of it.
    """
    if spec.conv1d and weight.dim() == 2 and ".lora_" not in name:
        # Kernels read rows: a copy a pass on a GPU, where they would make one for each chunk.
        return weight.t().contiguous() if weight.is_cuda and name in FFN else weight.t()
    if _by_heads(spec, name):
        heads = spec.num_key_value_heads
        widths = [size // heads for size in (spec.q_size, spec.kv_size, spec.v_size)]
        parts = weight.unflatten(0, (heads, -1)).split(widths, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])
    return weight


def as_parameter(spec: BlockSpec, name: str, grad: Tensor) -> Tensor:
    """The gradient of what `in_order` gave, as that of the parameter; arguments as there.

    That of a transposed weight is computed as the parameter stands (see `call.WeightGrads`).
    """
    if _by_heads(spec, name):
        parts = grad.split([spec.q_size, spec.kv_size, spec.v_size])
        by_head = [part.unflatten(0, (spec.num_key_value_heads, -1)) for part in parts]
        return torch.cat(by_head, 1).flatten(0, 1)
    return grad
