"""`linear_cross_entropy`: the head and its loss, without the logits of all tokens at once.

    logits = x W^T + b,   loss_i = logsumexp(logits_i) - logits_i[label_i]
    dlogits = softmax(logits) - onehot(label),   dx = dlogits W,   dW = dlogits^T x

| kept | recomputed | GEMMs |
|---|---|---|
| dx and dW, unscaled (dW in fp32 for fp16, whose range a sum may leave) | nothing | 3 |
| x and W, for `reduction="none"` | logits | 4 |

A scalar loss scales all its gradients alike, so the forward pass computes them while it has a
chunk's logits, and the backward pass multiplies. PyTorch's own chunked function (from 2.13 on)
does the same, but rounds a bf16 loss to bf16, adds weight gradients in bf16, and cannot be asked
twice; this one sums in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from backfuse.kernels.reference.linear import accumulate_outer, matmul_transposed
from backfuse.kernels.reference.norm import accumulate_dtype

from .spec import choose

REDUCTIONS = ("mean", "sum", "none")

#: Logits that exist at a time, in elements, where the caller does not say: 256 MiB of fp32.
CHUNK_ELEMENTS = 2**26


def _dlogits(
    x: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """The losses of some tokens, 0 where not valid, and the gradients of their logits.

    Args:
        x: `[rows, h]`.
        weight: `[vocabulary, h]`, in x's dtype.
        bias: `[vocabulary]` or None.
        labels: `[rows]`, within the vocabulary.
        valid: `[rows]`, bool.

    Returns:
        `[rows]` and `[rows, vocabulary]`, both in fp32 (fp64 for fp64).
    """
    logits = matmul_transposed(x, weight, bias).to(accumulate_dtype(x.dtype))
    lse = logits.logsumexp(-1)
    column = labels.unsqueeze(-1)
    losses = (lse - logits.gather(-1, column).squeeze(-1)).masked_fill_(~valid, 0.0)
    grad = logits.sub_(lse.unsqueeze(-1)).exp_()
    grad.scatter_add_(-1, column, torch.full_like(column, -1, dtype=grad.dtype))
    return losses, grad.masked_fill_(~valid.unsqueeze(-1), 0.0)


class _LinearCrossEntropy(torch.autograd.Function):
    """The losses of all tokens, or their sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        valid: Tensor,
        chunk_size: int,
        each: bool,
    ) -> Tensor:
        """`x` is `[tokens, h]`; the result is `[tokens]`, or one number."""
        wanted = ctx.needs_input_grad[:3]
        losses, grads = _walk(x, weight, bias, labels, valid, chunk_size, None if each else wanted)
        ctx.each, ctx.chunk_size, ctx.dtype = each, chunk_size, x.dtype
        if each:
            ctx.save_for_backward(x, weight, bias, labels, valid)
            return losses
        ctx.save_for_backward(*grads)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Any, ...]:
        """Scales what the forward pass computed, or walks again."""
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph is True, expected False: linear_cross_entropy differentiates by "
                "hand and cannot be differentiated twice"
            )
        if ctx.each:
            x, weight, bias, labels, valid = ctx.saved_tensors
            wanted = ctx.needs_input_grad[:3]
            _, grads = _walk(x, weight, bias, labels, valid, ctx.chunk_size, wanted, dloss)
        else:
            grads = [g if g is None else (g * dloss).to(ctx.dtype) for g in ctx.saved_tensors]
        return *grads, None, None, None, None


def _walk(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    chunk_size: int,
    wanted: tuple[bool, ...] | None,
    dlosses: Tensor | None = None,
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of all tokens, and the gradients of x, weight and bias where they are wanted.

    Gradients are in x's dtype, but those of weight and bias in fp32 for fp16 without `dlosses`.

    Args:
        x: `[tokens, h]`.
        weight: `[vocabulary, h]`.
        bias: `[vocabulary]` or None.
        labels: `[tokens]`.
        valid: `[tokens]`, bool.
        chunk_size: tokens at a time.
        wanted: of which of the three a gradient is wanted; None for none.
        dlosses: `[tokens]`, the gradients of the losses; None for 1 each.
    """
    need_dx, need_dweight, need_dbias = wanted or (False, False, False)
    losses = x.new_empty(len(x), dtype=accumulate_dtype(x.dtype))
    dx = torch.empty_like(x) if need_dx else None
    dweight: Tensor | None = None
    dbias: Tensor | None = None
    for start in range(0, len(x), chunk_size):
        rows = slice(start, start + chunk_size)
        losses[rows], grad = _dlogits(x[rows], weight, bias, labels[rows], valid[rows])
        if dlosses is not None:
            grad.mul_(dlosses[rows].unsqueeze(-1))
        if need_dbias:
            share = grad.sum(0)
            dbias = share if dbias is None else dbias.add_(share)
        if not (need_dx or need_dweight):
            continue
        low = grad.to(x.dtype)
        if dx is not None:
            matmul_transposed(low, weight.t(), out=dx[rows])
        if need_dweight:
            pair = low, x[rows]
            if x.dtype == torch.float16 and not x.is_cuda:  # there a product is rounded to fp16
                pair = grad, x[rows].float()
            dweight = accumulate_outer(dweight, *pair)
    # Sums over tokens that are to be scaled may lie beyond fp16.
    wide = x.dtype == torch.float16 and dlosses is None
    sums = (part if part is None or wide else part.to(x.dtype) for part in (dweight, dbias))
    return losses, [dx, *sums]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk_size: int | None = None,
) -> Tensor:
    """`cross_entropy(linear(hidden, weight, bias), labels)`, some tokens at a time.

    The transient is one chunk's logits; what is held for the backward pass is the gradients of
    hidden, weight and bias, or nothing but the arguments for `reduction="none"`.

    Args:
        hidden: `[..., h]`.
        weight: `[vocabulary, h]`, in hidden's dtype (any floating dtype under autocast).
        labels: int64 `[...]`, from 0 up to the vocabulary, or `ignore_index`.
        bias: `[vocabulary]`, likewise.
        ignore_index: label of tokens that count for nothing.
        reduction: `"mean"` over the tokens that count (NaN where there is none, as PyTorch's),
            `"sum"`, or `"none"`.
        chunk_size: tokens at a time; None: so many that their logits take 256 MiB in fp32.

    Returns:
        In fp32 (fp64 for fp64): one number, or `[...]`.

    Raises:
        TypeError: for something that is no tensor, or of a wrong dtype.
        ValueError: for a wrong shape, device or value.
    """
    choose("reduction", reduction, REDUCTIONS)
    if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
        raise ValueError(f"chunk_size is {chunk_size!r}, expected a positive integer, or None")
    parts = {"hidden": hidden, "weight": weight} | ({} if bias is None else {"bias": bias})
    _check(parts, labels, ignore_index)
    device = hidden.device.type
    if hidden.dtype != torch.float64 and torch.is_autocast_enabled(device):
        parts = {name: part.to(torch.get_autocast_dtype(device)) for name, part in parts.items()}
    flat = labels.flatten()
    valid = flat != ignore_index
    size = chunk_size or max(1, CHUNK_ELEMENTS // len(weight))
    loss = _LinearCrossEntropy.apply(
        parts["hidden"].flatten(0, -2),
        parts["weight"],
        parts.get("bias"),
        flat.masked_fill(~valid, 0),
        valid,
        size,
        reduction == "none",
    )
    if reduction == "none":
        return loss.view(labels.shape)
    return loss / valid.sum() if reduction == "mean" else loss


def _check(parts: dict[str, Tensor], labels: Tensor, ignore_index: int) -> None:
    """Raise unless the tensors fit each other."""
    for name, part in parts.items():
        if not isinstance(part, Tensor) or not part.is_floating_point():
            raise TypeError(f"{name} is {_told(part)}, expected a floating-point tensor")
    hidden, weight = parts["hidden"], parts["weight"]
    if hidden.dim() < 2 or hidden.numel() == 0:
        raise ValueError(f"hidden is {_told(hidden)}, expected [..., h], none of them 0")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or not len(weight):
        raise ValueError(
            f"weight is {_told(weight)}, expected [vocabulary, {hidden.shape[-1]}] as hidden is"
        )
    if "bias" in parts and parts["bias"].shape != weight.shape[:1]:
        raise ValueError(f"bias is {_told(parts['bias'])}, expected [{len(weight)}]")
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64:
        raise TypeError(f"labels is {_told(labels)}, expected an int64 tensor")
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(f"labels is {_told(labels)}, expected {list(hidden.shape[:-1])}")
    autocast = torch.is_autocast_enabled(hidden.device.type) and hidden.dtype != torch.float64
    for name, part in (*parts.items(), ("labels", labels)):
        if part.device != hidden.device:
            raise ValueError(f"{name} is {_told(part)}, expected the device of hidden")
        if name != "labels" and part.dtype != hidden.dtype and not autocast:
            raise TypeError(f"{name} is {part.dtype}, expected hidden's {hidden.dtype}")
    # A GPU would have to be waited for, and a trace has no labels to read.
    if labels.is_cpu and not torch.compiler.is_compiling():
        wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= len(weight)))]
        if wrong.numel():
            raise ValueError(
                f"labels hold {int(wrong[0])}, expected 0 to {len(weight) - 1}, or {ignore_index}"
            )


def _told(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)} on {value.device}"
