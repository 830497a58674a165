"""Linear layers over a slice of rows, side by side in one buffer, through the library's GEMM.

Weights are in Hugging Face's layout `[out, in]`. Several weights that read the same input (q, k
and v; gate and up) write side by side into one buffer, whether they are stored apart or stacked:
one stacked weight is simply a list of length one.

    y = x W^T + b        dx = dy W        dW = dy^T x        db = sum over rows of dy
"""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

CPUINFO = Path("/proc/cpuinfo")


def _is_intel() -> bool:
    """Whether the processor is one that MKL, which `mm` calls, has its best code for."""
    try:
        text = CPUINFO.read_text()
    except OSError:
        text = platform.processor()
    return "GenuineIntel" in text


#: Asked now, for torch.compile does not trace the questions.
ONEDNN = torch.backends.mkldnn.is_available() and not (
    torch.backends.mkl.is_available() and _is_intel()
)


def _onednn(x: Tensor) -> bool:
    """Whether oneDNN's fp32 GEMM is to be used, which PyTorch's `mm` does not choose on a CPU.

    At a chunk's sizes it is some 10 % faster than MKL on an AMD processor (200 against 180 GFLOP/s
    on two AVX-512 cores), and some 5 % slower on an Intel one (148 against 157 GFLOP/s on one),
    where it is not used. It has no output argument, which costs a copy, and transposed left
    operands are slow in it: weight gradients stay with `mm`. A compiler that traces lowers it for
    constant weights alone, and chooses the GEMM itself.
    """
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and ONEDNN
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
    )


def matmul_transposed(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """`x W^T + b`.

    Args:
        x: `[rows, in]`.
        weight: `[out, in]`, any strides, in x's dtype.
        bias: `[out]` or None.
        out: `[rows, out]`, written; None for a fresh tensor.

    Returns:
        `out`, or the fresh tensor.
    """
    if _onednn(x):
        y = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y if out is None else out.copy_(y)
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)


def linear_add(
    residual: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    factor: float = 1.0,
) -> Tensor:
    """Write `residual + factor (x W^T + b)`, rounded once where the GEMM can add it.

    Args:
        residual: `[rows, out]`.
        x: `[rows, in]`.
        weight: `[out, in]`, in x's dtype.
        bias: `[out]` or None.
        out: `[rows, out]`, in residual's dtype, written.
        factor: on what is added.

    Returns:
        `out`.
    """
    if _onednn(x) or bias is not None or residual.dtype != x.dtype:
        return torch.add(residual, matmul_transposed(x, weight, bias), alpha=factor, out=out)
    return torch.addmm(residual, x, weight.t(), alpha=factor, out=out)


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
    parts = out.split([w.shape[0] for w in weights], -1)
    for part, weight, bias in zip(parts, weights, biases, strict=True):
        matmul_transposed(x, weight, bias, part)
    return out


def linear_backward_input(dy: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """The gradient of the input, `[rows, in]`, fresh: the sum of `dy_i W_i`."""
    first, *others = zip(dy.split([w.shape[0] for w in weights], -1), weights, strict=True)
    dx = matmul_transposed(first[0], first[1].t())
    for part, weight in others:
        if _onednn(dy):
            dx.add_(matmul_transposed(part, weight.t()))
        else:
            torch.addmm(dx, part, weight, out=dx)
    return dx


def accumulate_outer(
    total: Tensor | None, dy: Tensor, x: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    """Add `dy^T x` to a weight gradient that is summed over chunks.

    Args:
        total: `[out, in]` in fp32 (fp64 for fp64 operands), or None at the first chunk.
        dy: `[rows, out]`.
        x: `[rows, in]`, in dy's dtype.
        dtype: with None as the total: of the result, fp32 or dy's. There is then but one chunk,
            whose product is rounded as it is written: no sum in fp32, and no pass to round it.

    Returns:
        The new total, which is `total` itself where that was given.
    """
    if total is None and dtype == dy.dtype:
        return torch.mm(dy.t(), x)
    if dy.dtype in (torch.float32, torch.float64):
        if total is None:
            return torch.mm(dy.t(), x)
        return torch.addmm(total, dy.t(), x, out=total)
    if dy.is_cuda:
        if total is None:
            return torch.mm(dy.t(), x, out_dtype=torch.float32)
        return torch.addmm(total, dy.t(), x, out_dtype=torch.float32, out=total)
    # No CPU GEMM takes short operands and gives fp32: a chunk's share is rounded, the sum is not.
    # (Operands cast to fp32 would spare that, at 3.7 times the GEMM's time on AVX-512 with bf16.)
    share = torch.mm(dy.t(), x)
    return share.float() if total is None else total.add_(share)
