"""Attention and its gradient from O and LSE, in PyTorch.

On a CPU through PyTorch's own kernel where that can do what is asked (`cpu_attention.py`), else
written out (`explicit_attention.py`). Both keep the same, O and LSE, and both are deterministic.
"""

from __future__ import annotations

from torch import Tensor

from . import cpu_attention
from .attention_request import AttentionRequest
from .explicit_attention import AttentionMask, explicit_backward, explicit_forward


def needs_delta(request: AttentionRequest) -> bool:
    """Whether `attention_backward` wants delta: where it is written out."""
    return cpu_attention.CPU.obstacle(request) is not None


def _request(
    q: Tensor, v: Tensor, mask: AttentionMask, bias: Tensor | None, cu_seqlens: Tensor | None
) -> AttentionRequest:
    return AttentionRequest(
        mask=mask,
        dtype=q.dtype,
        device=q.device,
        tokens=q.shape[1],
        head_dim=q.shape[-1],
        v_head_dim=v.shape[-1],
        bias=bias is not None,
        packed=cu_seqlens is not None,
    )


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
    """Attention of q over k and v.

    Args:
        q: `[batch, tokens, heads, head_dim]`, last stride 1.
        k: `[batch, tokens, kv heads, head_dim]`, heads a multiple of kv heads; v likewise.
        v: see k.
        mask: what is visible, and the scores' treatment.
        bias: `[batch or 1, heads or 1, tokens, tokens]`: bool (True: visible) or added to the
            scores. It replaces `mask.causal` and `mask.window`.
        cu_seqlens: int32 or int64 `[sequences + 1]`, starts of the packed sequences and the end;
            the batch must then be 1.
        seed: int64, one element, for dropout.

    Returns:
        out `[batch, tokens, heads, head_dim]`, contiguous, and lse `[batch, heads, tokens]`,
        fp32 (fp64 for fp64).
    """
    if needs_delta(_request(q, v, mask, bias, cu_seqlens)):
        return explicit_forward(q, k, v, mask, bias=bias, cu_seqlens=cu_seqlens, seed=seed)
    return cpu_attention.attention_forward(q, k, v, mask, cu_seqlens=cu_seqlens)


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
    """Gradients of q, k and v, fresh and contiguous, shaped as those.

    Args:
        dout: `[batch, tokens, heads, head_dim]`.
        q: as in the forward pass, and so k, v, mask, bias, cu_seqlens and seed.
        k: see q.
        v: see q.
        out: what the forward pass gave.
        lse: what the forward pass gave.
        mask: see q.
        delta: `[batch, heads, tokens]`, rowsum(out o dout); where `needs_delta` says so.
        bias: see q.
        cu_seqlens: see q.
        seed: see q.

    Raises:
        ValueError: without delta, where it is needed.
    """
    if not needs_delta(_request(q, v, mask, bias, cu_seqlens)):
        return cpu_attention.attention_backward(
            dout, q, k, v, out, lse, mask, cu_seqlens=cu_seqlens
        )
    if delta is None:
        raise ValueError("delta is None, expected rowsum(out * dout): no library kernel fits")
    return explicit_backward(
        dout, q, k, v, lse, mask, delta, bias=bias, cu_seqlens=cu_seqlens, seed=seed
    )
