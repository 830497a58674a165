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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens: Tensor | None,
    cu_seqlens_k: Tensor | None,
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
        sinks=sinks is not None,
        unlike=cu_seqlens_k is not None or k.shape[1] != q.shape[1],
    )


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
    """Attention of q over k and v.

    Args:
        q: `[batch, tokens, heads, head_dim]`, last stride 1.
        k: `[batch, keys, kv heads, head_dim]`, heads a multiple of kv heads.
        v: `[batch, keys, kv heads, v_head_dim]`.
        mask: what is visible, and the scores' treatment.
        sinks: `[heads]`, any floating-point dtype: a logit in each row's softmax that no value
            belongs to, neither scaled nor capped; or None.
        bias: `[batch or 1, heads or 1, tokens, keys]`: bool (True: visible) or added to the
            scores. It replaces `mask.causal` and `mask.window`.
        cu_seqlens: int32 or int64 `[sequences + 1]`, starts of the packed sequences and the end;
            the batch must then be 1.
        cu_seqlens_k: the same of the keys, where they are not the queries'; the last query of a
            sequence then stands beside its last key.
        seed: int64, one element, for dropout.

    Returns:
        out `[batch, tokens, heads, v_head_dim]`, contiguous, and lse `[batch, heads, tokens]`,
        fp32 (fp64 for fp64). Rows that see no key: 0, and -inf or their sink.
    """
    if not needs_delta(_request(q, k, v, mask, sinks, bias, cu_seqlens, cu_seqlens_k)):
        return cpu_attention.attention_forward(q, k, v, mask, cu_seqlens=cu_seqlens)
    return explicit_forward(
        q, k, v, mask, sinks=sinks, bias=bias, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens_k,
        seed=seed,
    )  # fmt: skip


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
    """Gradients of q, k and v, fresh and contiguous, shaped as those; and of the sinks.

    Args:
        dout: `[batch, tokens, heads, v_head_dim]`.
        q: as in the forward pass, and so k, v, mask, sinks, bias, both offsets and seed.
        k: see q.
        v: see q.
        out: what the forward pass gave.
        lse: what the forward pass gave.
        mask: see q.
        delta: `[batch, heads, tokens]`, rowsum(out o dout); where `needs_delta` says so.
        sinks: see q.
        bias: see q.
        cu_seqlens: see q.
        cu_seqlens_k: see q.
        seed: see q.
        need_dsinks: whether the gradient of the sinks is wanted.
        need_dq: whether that of q is. Borrowed cores compute it all the same, and so below.
        need_dkv: whether that of k or v is.
        dq: room for the gradient of q, which may be q itself, where that is not read again. Whether
            it is taken is the core's business: the result says where the gradient is.

    Returns:
        dq, dk, dv, and dsinks: `[heads]`, fp32 (fp64 for fp64). None for what was not computed.

    Raises:
        ValueError: without delta, where it is needed.
    """
    if not needs_delta(_request(q, k, v, mask, sinks, bias, cu_seqlens, cu_seqlens_k)):
        return cpu_attention.attention_backward(
            dout, q, k, v, out, lse, mask, cu_seqlens=cu_seqlens
        )
    if delta is None:
        raise ValueError("delta is None, expected rowsum(out * dout): no library kernel fits")
    return explicit_backward(
        dout, q, k, v, lse, mask, delta, sinks=sinks, bias=bias, cu_seqlens=cu_seqlens,
        cu_seqlens_k=cu_seqlens_k, seed=seed, need_dsinks=need_dsinks, need_dq=need_dq,
        need_dkv=need_dkv,
    )  # fmt: skip
