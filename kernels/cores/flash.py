"""Attention through the FlashAttention 2 that PyTorch brings for CUDA.

Its backward adds up dQ with atomics, so that two runs differ in their last bits, unless
`torch.use_deterministic_algorithms(True)`. Where somebody has activated another implementation
(`torch.nn.attention.activate_flash_attention_impl`), that one answers here.

Source: Dao 2023; `aten/src/ATen/native/transformers/cuda/attention_backward.cu` in PyTorch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask

from .calls import FlashCall

aten = torch.ops.aten


def needs_delta(request: AttentionRequest) -> bool:
    """Never. As `reference.attention.needs_delta`."""
    return False


def _options(call: FlashCall, mask: AttentionMask) -> dict[str, float | int]:
    """Keyword arguments: the scale, and the window where there is one."""
    options: dict[str, float | int] = {"scale": mask.scale}
    if mask.window is not None:
        options["window_size_left"], options["window_size_right"] = call.window
    return options


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
    call = FlashCall(q, mask, cu_seqlens)
    out, lse, *_ = aten._flash_attention_forward(
        *call.flat(q, k, v),
        call.offsets,
        call.offsets,
        call.longest,
        call.longest,
        0.0,
        mask.causal,
        False,
        **_options(call, mask),
    )
    return call.results(out, lse)


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
    call = FlashCall(q, mask, cu_seqlens)
    # The kernel reads the random state only where it drops: it never does here.
    unused = torch.empty(2, dtype=torch.uint64, device=q.device)
    grads = aten._flash_attention_backward(
        *call.flat(dout, q, k, v, out),
        call.flat_lse(lse),
        call.offsets,
        call.offsets,
        call.longest,
        call.longest,
        0.0,
        mask.causal,
        unused,
        unused,
        **_options(call, mask),
    )
    return *call.grads(*grads), None
