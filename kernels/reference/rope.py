"""Rotary position embedding, its transpose, and the cosines and sines.

Hugging Face's convention: `y = x * cos + rot(x) * sin` on the first `rotary_dim` channels of a
head, the rest passes through.

    half         rot(x1, x2) = (-x2, x1)           halves of the head      (Llama, GPT-NeoX)
    interleaved  rot(x0, x1, ...) = (-x1, x0, ...)  neighbouring channels   (GPT-J, Cohere)

The gradient is the transposed map, `dx = dy * cos + rot^T(dy * sin)`, which needs no activation:
that is why roped q and k are never kept. cos and sin may be anything (scaled, truncated,
different in the two halves): the transpose is exact for all of them.

Source: Su et al. 2021 (RoFormer).
"""

import torch
from torch import Tensor

from .norm import accumulate_dtype


def rope_cos_sin(
    position_ids: Tensor,
    head_dim: int,
    theta: float = 10000.0,
    *,
    layout: str = "half",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Cosines and sines as Hugging Face's models pass them to their layers.

    Args:
        position_ids: integers, `[..., tokens]`.
        head_dim: channels that rotate (the rotary dim where it is partial), even.
        theta: base of the wavelengths.
        layout: `"half"` or `"interleaved"`.
        dtype: of the result; the angles are computed in fp32 (fp64 for fp64).

    Returns:
        `(cos, sin)`, each `[..., tokens, head_dim]`.

    Raises:
        ValueError: for an odd `head_dim` or an unknown layout.
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary embeddings, got {head_dim}")
    if layout not in ("half", "interleaved"):
        raise ValueError(f"layout must be 'half' or 'interleaved', got {layout!r}")
    high = accumulate_dtype(dtype)
    exponent = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=high) / head_dim
    angles = position_ids.to(high).unsqueeze(-1) * theta**-exponent
    angles = (
        torch.cat((angles, angles), -1) if layout == "half" else angles.repeat_interleave(2, -1)
    )
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _pair(x: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The two partners of every rotation, as views."""
    if layout == "half":
        first, second = x.chunk(2, -1)
        return first, second
    return x[..., 0::2], x[..., 1::2]


def rope(
    x: Tensor, cos: Tensor, sin: Tensor, *, layout: str, out: Tensor, transpose: bool = False
) -> Tensor:
    """Rotate heads, or (for gradients) apply the transposed map.

    Args:
        x: `[tokens, heads, head_dim]`, any strides.
        cos: `[tokens, rotary_dim]`; sin likewise. `rotary_dim <= head_dim`.
        sin: see cos.
        layout: `"half"` or `"interleaved"`.
        out: `[tokens, heads, head_dim]`, written; may be x itself.
        transpose: the gradient's map instead of the forward's.

    Returns:
        `out`. The arithmetic is in fp32 (fp64 for fp64), rounded once.
    """
    rotary_dim = cos.shape[-1]
    high = accumulate_dtype(x.dtype)
    rotated = x[..., :rotary_dim].to(high)
    first, second = _pair(rotated, layout)
    sin1, sin2 = _pair(sin.to(high).unsqueeze(1), layout)
    if transpose:
        sin1, sin2 = -sin2, -sin1
    y = rotated * cos.to(high).unsqueeze(1)
    new_first, new_second = _pair(y, layout)
    new_first.addcmul_(second, sin1, value=-1)
    new_second.addcmul_(first, sin2)
    out[..., :rotary_dim].copy_(y)
    if out is not x and rotary_dim < x.shape[-1]:
        out[..., rotary_dim:].copy_(x[..., rotary_dim:])
    return out
