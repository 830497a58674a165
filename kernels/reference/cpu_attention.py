"""Attention and its gradient through PyTorch's own flash kernel for CPUs.

Packed sequences go through it one after another. It keeps O and LSE, and makes its own delta.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_request import Abilities, AttentionRequest
from .explicit_attention import AttentionMask, sequences
from .norm import accumulate_dtype

aten = torch.ops.aten

#: What PyTorch's CPU kernel can do.
CPU = Abilities("PyTorch's CPU kernel", frozenset({"packed sequences"}), device="cpu")


def needs_delta(request: AttentionRequest) -> bool:
    """Never. As `attention.needs_delta`."""
    return False


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over k and v. As `attention.attention_forward`, for what `CPU` can do."""
    forward = aten._scaled_dot_product_flash_attention_for_cpu
    spans = sequences(q.shape[1], cu_seqlens)
    if spans == [(0, 0, q.shape[1])]:
        out, lse = forward(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, mask.causal, scale=mask.scale
        )
        return out.transpose(1, 2), lse
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q.dtype), device=q.device
    )
    for _, a, b in spans:
        part, part_lse = forward(
            *(x[:, a:b].transpose(1, 2) for x in (q, k, v)), 0.0, mask.causal, scale=mask.scale
        )
        out[:, a:b], lse[:, :, a:b] = part.transpose(1, 2), part_lse
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    *,
    delta: Tensor | None = None,
    sinks: Tensor | None = None,
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
    need_dsinks: bool = True,
    need_dq: bool = True,
    need_dkv: bool = True,
    dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients of q, k and v. As `attention.attention_backward`, for what `CPU` can do."""
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    spans = sequences(q.shape[1], cu_seqlens)
    if spans == [(0, 0, q.shape[1])]:
        grads = backward(
            *(x.transpose(1, 2) for x in (dout, q, k, v, out)),
            lse,
            0.0,
            mask.causal,
            scale=mask.scale,
        )
        dq, dk, dv = (g.transpose(1, 2) for g in grads)
        return dq, dk, dv, None
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    for _, a, b in spans:
        grads = backward(
            *(x[:, a:b].transpose(1, 2) for x in (dout, q, k, v, out)),
            lse[:, :, a:b],
            0.0,
            mask.causal,
            scale=mask.scale,
        )
        for result, grad in zip((dq, dk, dv), grads, strict=True):
            result[:, a:b] = grad.transpose(1, 2)
    return dq, dk, dv, None
