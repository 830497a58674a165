"""Attention as a block asks for it: the kernels, or written out for masks that are tensors.

Both keep the same, O and LSE, and both are deterministic: no atomics.
"""

from __future__ import annotations

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
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over k and v. As `reference.attention.attention_forward`."""
    if bias is not None:
        return explicit_forward(q, k, v, mask, bias=bias, cu_seqlens=cu_seqlens, seed=seed)
    return kernel_forward(q, k, v, mask, cu_seqlens=cu_seqlens, seed=seed)


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
    bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v. As `reference.attention.attention_backward`.

    Raises:
        ValueError: without delta.
    """
    if delta is None:
        raise ValueError("delta is None, expected rowsum(out * dout)")
    if bias is not None:
        return explicit_backward(
            dout, q, k, v, lse, mask, delta, bias=bias, cu_seqlens=cu_seqlens, seed=seed
        )
    return kernel_backward(dout, q, k, v, lse, mask, delta, cu_seqlens=cu_seqlens, seed=seed)
