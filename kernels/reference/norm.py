"""RMSNorm and LayerNorm, split where a backward pass wants to enter.

    RMSNorm    x_hat = x * rstd              rstd = 1 / sqrt(mean(x^2) + eps)
    LayerNorm  x_hat = (x - mean) * rstd     rstd = 1 / sqrt(var(x) + eps)
    y = x_hat * (offset + weight) + bias

    dx = rstd * (g - x_hat * mean(g * x_hat) [- mean(g)])    g = dy * (offset + weight)
    dweight = sum over rows of dy * x_hat        dbias = sum over rows of dy

| kept | recomputed | GEMMs |
|---|---|---|
| the statistics: rstd (and mean), 4 bytes a row each | y, from x and the statistics | none |

Models differ in where they round. Llama rounds x_hat to the input's dtype and then multiplies by
the weight (`round_first=True`); Gemma, OLMo 2 and `torch.nn.LayerNorm` multiply in fp32 and round
once. Sources: Zhang and Sennrich 2019 (RMSNorm), Ba et al. 2016 (LayerNorm), transformers'
modelling files for the rounding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NormSpec:
    """How a norm computes.

    Attributes:
        kind: `"rmsnorm"` or `"layernorm"`.
        eps: added to the mean square or the variance.
        offset: added to the weight in use.
        round_first: x_hat is rounded to the input's dtype before the weight comes in.
    """

    kind: str = "rmsnorm"
    eps: float = 1e-6
    offset: float = 0.0
    round_first: bool = True

    @property
    def statistics(self) -> int:
        """Numbers kept for a row: rstd, and the mean of a LayerNorm."""
        return 2 if self.kind == "layernorm" else 1


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_statistics(x: Tensor, spec: NormSpec, out: Tensor) -> Tensor:
    """What a norm's backward needs to know of its rows.

    Args:
        x: `[rows, width]`, any floating dtype.
        spec: the norm.
        out: `[1, rows]` (rstd) or `[2, rows]` (rstd, mean), fp32 (fp64 for fp64 input); written.

    Returns:
        `out`.
    """
    values = x.to(accumulate_dtype(x.dtype))
    if spec.kind == "rmsnorm":
        torch.rsqrt(values.square().mean(-1).add_(spec.eps), out=out[0])
    else:
        variance, mean = torch.var_mean(values, -1, correction=0)
        torch.rsqrt(variance.add_(spec.eps), out=out[0])
        out[1].copy_(mean)
    return out


def _normalized(x: Tensor, statistics: Tensor) -> Tensor:
    """x_hat in the dtype of the statistics, a fresh tensor `[rows, width]`."""
    if len(statistics) == 1:
        return x * statistics[0].unsqueeze(-1)
    return (x - statistics[1].unsqueeze(-1)).mul_(statistics[0].unsqueeze(-1))


def _scaled(
    x_hat: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec, dtype: torch.dtype
) -> Tensor:
    """y in `dtype`, the input's, from x_hat, which may be overwritten."""
    offset = spec.offset
    if spec.round_first:
        scale = weight + offset if offset else weight
        y = x_hat.to(dtype).mul_(scale.to(dtype))
    else:
        scale = weight.to(x_hat.dtype)
        y = x_hat.mul_(scale + offset if offset else scale)
    if bias is not None:
        y = y.add_(bias.to(y.dtype))
    return y.to(dtype)


def _is_librarys(x: Tensor, weight: Tensor, spec: NormSpec) -> bool:
    """Whether PyTorch's own LayerNorm does just this: one pass where the lines below take several.

    In low precision it rounds elsewhere; there they stay.
    """
    plain = spec.kind == "layernorm" and not spec.offset and not spec.round_first
    return plain and x.dtype == weight.dtype and x.dtype in (torch.float32, torch.float64)


def norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    statistics: Tensor,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The normalised rows, and their statistics.

    Args:
        x: `[rows, width]`.
        weight: `[width]`.
        bias: `[width]` or None.
        spec: the norm.
        statistics: `[1 or 2, rows]`, written (see `norm_statistics`).
        dtype: of y; it is rounded to x's dtype first.
        residual: `[rows, width]`, added to y; the sum goes to `out`.
        out: `[rows, width]`, written with y, or with the sum; wanted with a residual.

    Returns:
        y `[rows, width]`, fresh and in `dtype`; or `out`.
    """
    if _is_librarys(x, weight, spec):
        y, mean, rstd = torch.native_layer_norm(x, x.shape[-1:], weight, bias, spec.eps)
        statistics[0].copy_(rstd.squeeze(-1))
        statistics[1].copy_(mean.squeeze(-1))
        return _put(y.to(dtype), residual, out)
    norm_statistics(x, spec, statistics)
    return norm_apply(x, statistics, weight, bias, spec, dtype, residual=residual, out=out)


def norm_apply(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    dtype: torch.dtype,
    *,
    residual: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The normalised rows, from x and its statistics.

    The forward pass and every rebuild compute this with the same arguments: so both give the same
    bits.

    Args:
        x: `[rows, width]`.
        statistics: as `norm_forward` wrote it.
        weight: `[width]`.
        bias: `[width]` or None.
        spec: the norm.
        dtype: of y; it is rounded to x's dtype first.
        residual: `[rows, width]`, added to y; the sum goes to `out`.
        out: `[rows, width]`, written with y, or with the sum; wanted with a residual.

    Returns:
        y, fresh and in `dtype`; or `out`.
    """
    return _put(_output(x, statistics, weight, bias, spec).to(dtype), residual, out)


def _output(
    x: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor | None, spec: NormSpec
) -> Tensor:
    """y in x's dtype."""
    if _is_librarys(x, weight, spec):  # which finds the statistics again, as fast as it reads them
        return torch.native_layer_norm(x, x.shape[-1:], weight, bias, spec.eps)[0]
    return _scaled(_normalized(x, statistics), weight, bias, spec, x.dtype)


def _put(y: Tensor, residual: Tensor | None, out: Tensor | None) -> Tensor:
    """y where it is wanted, with what is to be added."""
    if residual is None:
        return y if out is None else out.copy_(y)
    return torch.add(residual, y, out=out)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    spec: NormSpec,
    *,
    residual: Tensor | None = None,
    dx: Tensor | None = None,
    normed: Tensor | None = None,
    need_dweight: bool = True,
    need_dbias: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows and of the parameters; on the way, the normalised rows again.

    Args:
        dy: `[rows, width]`; its dtype may be lower than x's.
        x: `[rows, width]`, the norm's input.
        statistics: as `norm_forward` wrote it.
        weight: `[width]`.
        bias: `[width]` or None; only `normed` needs it.
        spec: the norm.
        residual: `[rows, width]`, a gradient added to dx in fp32.
        dx: `[rows, width]`, written in its dtype; None where it is not wanted.
        normed: `[rows, width]`, written with what `norm_apply` gives; None where not wanted.
        need_dweight: whether dweight is wanted.
        need_dbias: whether dbias is wanted.

    Returns:
        dweight and dbias `[width]` in the statistics' dtype; None where not wanted.
    """
    if _is_librarys(x, weight, spec):
        rstd, mean = (row.to(x.dtype).unsqueeze(-1) for row in statistics)
        grads = torch.ops.aten.native_layer_norm_backward(
            dy.to(x.dtype), x, x.shape[-1:], mean, rstd, weight, bias,
            (dx is not None, need_dweight, need_dbias),
        )  # fmt: skip
        if dx is not None:
            _put(grads[0], residual, dx)
        if normed is not None:
            normed.copy_(_output(x, statistics, weight, bias, spec))
        return (grads[1] if need_dweight else None), (grads[2] if need_dbias else None)
    x_hat = _normalized(x, statistics)
    dy = dy.to(x_hat.dtype)
    dweight = (dy * x_hat).sum(0) if need_dweight else None
    dbias = dy.sum(0) if need_dbias else None
    if dx is not None:
        scale = weight.to(x_hat.dtype)
        grad = dy * (scale + spec.offset if spec.offset else scale)
        projection = (grad * x_hat).mean(-1, keepdim=True)
        if len(statistics) == 2:
            grad.sub_(grad.mean(-1, keepdim=True))
        grad.addcmul_(x_hat, projection, value=-1).mul_(statistics[0].unsqueeze(-1))
        if residual is None:
            dx.copy_(grad)
        else:
            torch.add(residual, grad, out=dx)
    if normed is not None:
        normed.copy_(_scaled(x_hat, weight, bias, spec, x.dtype))
    return dweight, dbias
