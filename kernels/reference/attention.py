"""Attention and its gradient from O and LSE, through PyTorch's own kernels where they fit.

The CPU has a flash kernel of its own, and on CUDA PyTorch ships FlashAttention: `library_core`
says when they can do what is asked. What they lack (softcap, masks, dropout, windows on a CPU,
fp32 on CUDA) goes to `explicit_attention.py`. Both keep the same: O and LSE.

PyTorch's CUDA backward accumulates dQ with atomics unless
`torch.use_deterministic_algorithms(True)`.
"""

import torch
from torch import Tensor

from .explicit_attention import AttentionMask, explicit_backward, explicit_forward, sequences
from .norm import accumulate_dtype

aten = torch.ops.aten


def library_core(
    mask: AttentionMask,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    tokens: int,
    bias: Tensor | None,
    v_head_dim: int | None = None,
    sinks: bool = False,
) -> str | None:
    """The kernel of PyTorch's that can do what is asked: `"cpu"`, `"flash"`, or None.

    Args:
        mask: as in `attention_forward`.
        dtype: of the heads.
        device: where they are.
        head_dim: of q and k.
        tokens: rows of q, and of k.
        bias: as in `attention_forward`.
        v_head_dim: of v; None: as q's.
        sinks: whether there are any.
    """
    if mask.softcap is not None or mask.dropout or bias is not None or sinks:
        return None
    if v_head_dim not in (None, head_dim):
        return None
    if device.type == "cpu":
        return "cpu" if mask.window is None or mask.window >= tokens else None
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return "flash" if head_dim % 8 == 0 and head_dim <= 256 else None
    return None


def needs_delta(
    mask: AttentionMask,
    dtype: torch.dtype,
    device: torch.device,
    head_dim: int,
    tokens: int,
    bias: Tensor | None,
    v_head_dim: int | None = None,
    sinks: bool = False,
) -> bool:
    """Whether `attention_backward` wants delta. Arguments as `library_core`."""
    core = library_core(mask, dtype, device, head_dim, tokens, bias, v_head_dim, sinks)
    return core is None


def _core(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    sinks: Tensor | None,
    bias: Tensor | None,
    cu_seqlens_k: Tensor | None,
) -> str | None:
    """`library_core` of tensors; None where the keys' lengths may differ from the queries'."""
    if cu_seqlens_k is not None or k.shape[1] != q.shape[1]:
        return None
    return library_core(
        mask, q.dtype, q.device, q.shape[-1], q.shape[1], bias, v.shape[-1], sinks is not None
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
    core = _core(q, k, v, mask, sinks, bias, cu_seqlens_k)
    if core is None:
        return explicit_forward(
            q, k, v, mask, sinks=sinks, bias=bias, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k, seed=seed,
        )  # fmt: skip
    if core == "flash":
        q, k, v = _flat(q, k, v, cu_seqlens=cu_seqlens)
        out, lse, *_ = aten._flash_attention_forward(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            *_lengths(q, cu_seqlens, mask),
            0.0,
            mask.causal,
            False,
            **_flash_options(mask),
        )
        return out.view(-1, *q.shape[-3:]), lse
    spans = sequences(q.shape[1], cu_seqlens)
    if spans == [(0, 0, q.shape[1])]:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, mask.causal, scale=mask.scale
        )
        return out.transpose(1, 2), lse
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(
        (q.shape[0], q.shape[2], q.shape[1]), dtype=accumulate_dtype(q.dtype), device=q.device
    )
    for _, a, b in spans:
        part, part_lse = aten._scaled_dot_product_flash_attention_for_cpu(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v, fresh and contiguous, shaped as those; and of the sinks.

    Args:
        dout: `[batch, tokens, heads, v_head_dim]`.
        q: as in the forward pass, and so k, v, mask, sinks, bias, both offsets and seed.
        k: see q.
        v: see q.
        out: what the forward pass gave.
        lse: what the forward pass gave.
        mask: see q.
        delta: `[batch, heads, tokens]`, rowsum(out o dout); needed where `library_core` gives None.
        sinks: see q.
        bias: see q.
        cu_seqlens: see q.
        cu_seqlens_k: see q.
        seed: see q.
        need_dsinks: whether the gradient of the sinks is wanted.

    Returns:
        dq, dk, dv, and dsinks: `[heads]`, fp32 (fp64 for fp64), or None.
    """
    core = _core(q, k, v, mask, sinks, bias, cu_seqlens_k)
    if core is None:
        if delta is None:
            raise ValueError("delta is None, expected rowsum(out * dout): no library kernel fits")
        return explicit_backward(
            dout, q, k, v, lse, mask, delta, sinks=sinks, bias=bias, cu_seqlens=cu_seqlens,
            cu_seqlens_k=cu_seqlens_k, seed=seed, need_dsinks=need_dsinks,
        )  # fmt: skip
    if core == "flash":
        shapes = q.shape, k.shape, v.shape
        q, k, v = _flat(q, k, v, cu_seqlens=cu_seqlens)
        dout, out = _flat(dout, out, cu_seqlens=cu_seqlens)
        # The kernel reads the random state only where it drops: it never does here.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        grads = aten._flash_attention_backward(
            dout,
            q,
            k,
            v,
            out,
            lse,
            cu_seqlens,
            cu_seqlens,
            *_lengths(q, cu_seqlens, mask),
            0.0,
            mask.causal,
            unused,
            unused,
            **_flash_options(mask),
        )
        dq, dk, dv = (g.view(s) for g, s in zip(grads, shapes, strict=True))
        return dq, dk, dv, None
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


def _flat(*tensors: Tensor, cu_seqlens: Tensor | None = None) -> tuple[Tensor, ...]:
    """FlashAttention takes packed tensors without a batch dimension."""
    return tensors if cu_seqlens is None else tuple(x.flatten(0, 1) for x in tensors)


def _lengths(q: Tensor, cu_seqlens: Tensor | None, mask: AttentionMask) -> tuple[int, int]:
    """Longest query and key sequence; packed ones need a host sync unless the caller knows."""
    if cu_seqlens is None:
        return q.shape[1], q.shape[1]
    longest = mask.max_seqlen or int(cu_seqlens.diff().max())
    return longest, longest


def _flash_options(mask: AttentionMask) -> dict[str, float | int]:
    """Keyword arguments of FlashAttention in PyTorch: the scale, and the window to both sides."""
    options: dict[str, float | int] = {"scale": mask.scale}
    if mask.window is not None:
        options["window_size_left"] = mask.window - 1
        options["window_size_right"] = 0 if mask.causal else mask.window - 1
    return options
