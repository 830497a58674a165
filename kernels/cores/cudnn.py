"""Attention through cuDNN's kernels, as PyTorch calls them.

PyTorch gives its backward no deterministic mode, and refuses it under
`torch.use_deterministic_algorithms(True)`; so do we. It takes `[batch, heads, tokens, head_dim]` in
any strides, and LSE as `[batch, heads, tokens, 1]` (PyTorch 2.9 and later): views, no copies.
Packed sequences are left out: PyTorch's own callers keep them switched off.

Source: `aten/src/ATen/native/cudnn/MHA.cpp` and `transformers/cuda/sdp_utils.cpp` in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask

aten = torch.ops.aten


def needs_delta(request: AttentionRequest) -> bool:
    """Never. As `reference.attention.needs_delta`."""
    return False


def _transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tokens and heads change places."""
    return tuple(x.transpose(1, 2) for x in tensors)


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
    tokens = q.shape[1]
    out, lse, *_ = aten._cudnn_attention_forward(
        *_transposed(q, k, v),
        None,
        None,
        None,
        tokens,
        tokens,
        True,
        0.0,
        mask.causal,
        False,
        scale=mask.scale,
    )
    return out.transpose(1, 2).contiguous(), lse.squeeze(-1)


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
    """Gradients of q, k and v. As `reference.attention.attention_backward`."""
    tokens = q.shape[1]
    # Read only where something drops, but converted in any case on some GPUs.
    unused = torch.empty((), dtype=torch.int64, device=q.device)
    grads = aten._cudnn_attention_backward(
        *_transposed(dout, q, k, v, out),
        lse.unsqueeze(-1),
        unused,
        unused,
        None,
        None,
        None,
        tokens,
        tokens,
        0.0,
        mask.causal,
        scale=mask.scale,
    )
    dq, dk, dv = _transposed(*grads)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), None
