"""Attention as a block asks for it: the kernels, or written out for masks that are tensors.

Both keep the same, O and LSE, and both are deterministic: no atomics.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .attention import attention_forward as kernel_forward
from .attention_backward import attention_backward as kernel_backward
from .reference.attention_request import AttentionRequest
from .reference.explicit_attention import AttentionMask, explicit_backward, explicit_forward


def needs_delta(request: AttentionRequest) -> bool:
    """Always: see `reference.attention.needs_delta`."""
    return True


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
    """Attention of q over k and v. As `reference.attention.attention_forward`."""
    options: dict[str, Any] = {
        "sinks": sinks, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "seed": seed
    }  # fmt: skip
    if bias is not None:
        return explicit_forward(q, k, v, mask, bias=bias, **options)
    return kernel_forward(q, k, v, mask, **options)


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and sinks. As `reference.attention.attention_backward`.

    Raises:
        ValueError: without delta.
    """
    if delta is None:
        raise ValueError("delta is None, expected rowsum(out * dout)")
    options: dict[str, Any] = {
        "sinks": sinks, "cu_seqlens": cu_seqlens, "cu_seqlens_k": cu_seqlens_k, "seed": seed,
        "need_dsinks": need_dsinks, "need_dq": need_dq, "need_dkv": need_dkv,
    }  # fmt: skip
    if bias is not None:
        return explicit_backward(dout, q, k, v, lse, mask, delta, bias=bias, **options)
    return kernel_backward(dout, q, k, v, lse, mask, delta, dq=dq, **options)
