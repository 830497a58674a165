"""What happens to q and k between their projection and the attention: qk-norm, then RoPE.

    forward     y = rope(qk_norm(raw))
    backward    draw = qk_norm^T(rope^T(dy))
    delta       rowsum(O o dO), which an attention backward wants, on the way

| kept | recomputed | GEMMs |
|---|---|---|
| raw, if there is a qk-norm and the policy keeps it | y; the norm's rstd | none |

q and k stand side by side in one row. Both directions work in place where they are asked to. The
norm is an RMSNorm over each head (`"head"`: Qwen 3, Gemma 3) or over all of q and all of k
(`"full"`: OLMo 2).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .norm import NormSpec, accumulate_dtype, norm_backward, norm_forward, norm_statistics
from .rope import rope


@dataclass(frozen=True)
class QKSpec:
    """What is done to q and k.

    Attributes:
        q_size: width of all q heads.
        kv_size: width of all k heads.
        head_dim: width of a head.
        layout: RoPE's, `"half"` or `"interleaved"`.
        qk_norm: `"head"`, `"full"` or None.
        norm: how qk-norm computes.
        v_head_dim: width of a head of v and of O; None: head_dim.
    """

    q_size: int
    kv_size: int
    head_dim: int
    layout: str = "half"
    qk_norm: str | None = None
    norm: NormSpec = field(default_factory=NormSpec)
    v_head_dim: int | None = None

    @property
    def heads(self) -> int:
        """Heads of q, and of O."""
        return self.q_size // self.head_dim

    @property
    def out_head_dim(self) -> int:
        """Width of a head of O."""
        return self.v_head_dim or self.head_dim


def _lines(part: Tensor, spec: QKSpec) -> Tensor:
    """The rows that qk-norm normalises: heads, or whole projections."""
    if spec.qk_norm == "head":
        return part.unflatten(-1, (-1, spec.head_dim)).flatten(0, 1)
    return part


def _parts(qk: Tensor, spec: QKSpec) -> Iterator[Tensor]:
    yield from qk.split([spec.q_size, spec.kv_size], -1)


def _statistics(lines: Tensor) -> Tensor:
    return lines.new_empty(1, len(lines), dtype=accumulate_dtype(lines.dtype))


def qk_rope_forward(
    raw: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    spec: QKSpec,
    out: Tensor,
    *,
    attn_out: Tensor | None = None,
    dout: Tensor | None = None,
    delta: Tensor | None = None,
) -> None:
    """qk-norm and RoPE of some rows; and, in a backward pass, delta.

    Args:
        raw: `[rows, q_size + kv_size]`, last stride 1; only read, unless out is the same.
        cos: `[rows, rotary_dim]`, or None for no RoPE; sin likewise.
        sin: see cos.
        q_weight: `[head_dim]` or `[q_size]`, or None for no qk-norm.
        k_weight: `[head_dim]` or `[kv_size]`, or None.
        spec: what is done.
        out: `[rows, q_size + kv_size]`, written; may be raw.
        attn_out: `[rows, heads * out_head_dim]`; with it, delta is written.
        dout: as attn_out, its gradient.
        delta: `[rows, heads]`, fp32 (fp64 for fp64); any strides; written.
    """
    sources, targets = _parts(raw, spec), _parts(out, spec)
    for source, target, weight in zip(sources, targets, (q_weight, k_weight), strict=True):
        if weight is not None:
            lines = _lines(source, spec)
            normed = norm_forward(
                lines, weight, None, spec.norm, _statistics(lines), lines.dtype
            )
            source = target.copy_(normed.view(target.shape))
        heads = source.unflatten(-1, (-1, spec.head_dim))
        into = heads if source is target else target.unflatten(-1, (-1, spec.head_dim))
        if cos is not None and sin is not None:
            rope(heads, cos, sin, layout=spec.layout, out=into)
        elif weight is None:
            into.copy_(heads)
    if delta is not None and attn_out is not None and dout is not None:
        attention_delta(attn_out, dout, delta, spec)


def attention_delta(attn_out: Tensor, dout: Tensor, delta: Tensor, spec: QKSpec) -> None:
    """delta alone, where there is nothing to rotate. Arguments as in `qk_rope_forward`."""
    products = attn_out.to(delta.dtype) * dout.to(delta.dtype)
    delta.copy_(products.unflatten(-1, (-1, spec.out_head_dim)).sum(-1))


def qk_rope_backward(
    dqk: Tensor,
    raw: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    spec: QKSpec,
    *,
    need_dweights: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradient of the projection's output, in place.

    Args:
        dqk: `[rows, q_size + kv_size]`, the gradient of roped q and k; overwritten with that of
            the raw ones.
        raw: `[rows, q_size + kv_size]`; only qk-norm needs it.
        cos: as in the forward pass, and so sin, q_weight, k_weight and spec.
        sin: see cos.
        q_weight: see cos.
        k_weight: see cos.
        spec: see cos.
        need_dweights: whether the gradients of q_weight and k_weight are wanted.

    Returns:
        The gradients of q_weight and k_weight, fp32 (fp64 for fp64); None where not wanted.
    """
    if cos is not None and sin is not None:
        heads = dqk.unflatten(-1, (-1, spec.head_dim))
        rope(heads, cos, sin, layout=spec.layout, out=heads, transpose=True)
    grads: list[Tensor | None] = [None, None]
    if raw is None or q_weight is None or k_weight is None:
        return None, None
    weights = (q_weight, k_weight)
    for index, (dpart, part) in enumerate(zip(_parts(dqk, spec), _parts(raw, spec), strict=True)):
        lines, dlines = _lines(part, spec), _lines(dpart, spec)
        statistics = norm_statistics(lines, spec.norm, _statistics(lines))
        dx = torch.empty_like(dlines)
        grads[index], _ = norm_backward(
            dlines, lines, statistics, weights[index], None, spec.norm,
            dx=dx, need_dweight=need_dweights[index],
        )  # fmt: skip
        dpart.copy_(dx.view(dpart.shape))
    return grads[0], grads[1]
