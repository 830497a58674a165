"""Linear layers over a slice of rows, side by side in one buffer, through the library's GEMM.

Weights are in Hugging Face's layout `[out, in]`. Several weights that read the same input (q, k
and v; gate and up) write side by side into one buffer, whether they are stored apart or stacked:
one stacked weight is simply a list of length one.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum over rows of dy
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def _columns(buffer: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """The slice of `buffer` that belongs to each weight."""
    return list(buffer.split([w.shape[0] for w in weights], -1))


def linear(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], out: Tensor
) -> Tensor:
    """Write `x W^T + b` of every weight side by side.

    Args:
        x: `[rows, in]`.
        weights: each `[out_i, in]`, in x's dtype.
        biases: each `[out_i]` or None.
        out: `[rows, sum of out_i]`, written.

    Returns:
        `out`.
    """
    for columns, weight, bias in zip(_columns(out, weights), weights, biases, strict=True):
        if bias is None:
            torch.mm(x, weight.t(), out=columns)
        else:
            torch.addmm(bias, x, weight.t(), out=columns)
    return out


def linear_backward_input(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of the input, `[rows, in]`, fresh: the sum of `dy_i W_i`."""
    first, *others = zip(_columns(dy, weights), weights, strict=True)
    dx = torch.mm(*first)
    for columns, weight in others:
        dx = torch.addmm(dx, columns, weight, out=dx)
    return dx


def accumulate_outer(total: Tensor | None, dy: Tensor, x: Tensor) -> Tensor:
    """Add `dy^T x` to a weight gradient that is summed over chunks.

    Args:
        total: `[out, in]` in fp32 (fp64 for fp64 operands), or None at the first chunk.
        dy: `[rows, out]`.
        x: `[rows, in]`, in dy's dtype.

    Returns:
        The new total, which is `total` itself where that was given.
    """
    if dy.dtype in (torch.float32, torch.float64):
        if total is None:
            return torch.mm(dy.t(), x)
        return torch.addmm(total, dy.t(), x, out=total)
    if dy.is_cuda:
        if total is None:
            return torch.mm(dy.t(), x, out_dtype=torch.float32)
        return torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total)
    # No CPU GEMM takes bf16 operands and gives fp32: a chunk's share is rounded, the sum is not.
    share = torch.mm(dy.t(), x)
    return share.float() if total is None else total.add_(share)
