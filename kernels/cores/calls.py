"""How FlashAttention, in whatever version, takes the tensors of a call.

Dense: q, k, v and O are `[batch, tokens, heads, head_dim]`, LSE `[batch, heads, tokens]`. Packed:
`[tokens, heads, head_dim]`, LSE `[heads, tokens]`, int32 offsets and the longest length.
"""

from __future__ import annotations

from torch import Tensor

from backfuse.kernels.reference.explicit_attention import AttentionMask


class FlashCall:
    """One call, forward or backward.

    Args:
        q: `[batch, tokens, heads, head_dim]`.
        mask: what is visible.
        cu_seqlens: int32 or int64 `[sequences + 1]`, or None.
    """

    def __init__(self, q: Tensor, mask: AttentionMask, cu_seqlens: Tensor | None) -> None:
        self.packed = cu_seqlens is not None
        self.offsets = None if cu_seqlens is None else cu_seqlens.int().contiguous()
        self.longest = q.shape[1]
        if cu_seqlens is not None:  # waits for the GPU unless the caller knows
            self.longest = mask.max_seqlen or int(cu_seqlens.diff().max())
        #: Keys seen before a query's own, and after it; -1 for all.
        self.window = (-1, -1)
        if mask.window is not None:
            self.window = (mask.window - 1, 0 if mask.causal else mask.window - 1)

    def flat(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Tensors as the kernel takes them."""
        return tuple(x.flatten(0, 1) for x in tensors) if self.packed else tensors

    def flat_lse(self, lse: Tensor) -> Tensor:
        """LSE as the kernel takes it."""
        return lse.squeeze(0) if self.packed else lse

    def results(self, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """O and LSE as they are kept."""
        return (out.unsqueeze(0), lse.unsqueeze(0)) if self.packed else (out, lse)

    def grads(self, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients shaped as q, k and v."""
        if self.packed:
            return dq.unsqueeze(0), dk.unsqueeze(0), dv.unsqueeze(0)
        return dq, dk, dv
