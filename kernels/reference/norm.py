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

import torch
from torch import Tensor


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are taken in: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def norm_statistics(x: Tensor, kind: str, eps: float) -> Tensor:
    """What a norm's backward needs to know of its rows.

    Args:
        x: `[rows, width]`, any floating dtype.
        kind: `"rmsnorm"` or `"layernorm"`.
        eps: added to the mean square or the variance.

    Returns:
        `[1, rows]` (rstd) or `[2, rows]` (rstd, mean), fp32 (fp64 for fp64 input).
    """
    values = x.to(accumulate_dtype(x.dtype))
    if kind == "rmsnorm":
        return values.square().mean(-1).add_(eps).rsqrt_().unsqueeze(0)
    variance, mean = torch.var_mean(values, -1, correction=0)
    return torch.stack((variance.add_(eps).rsqrt_(), mean))


def _normalized(x: Tensor, statistics: Tensor) -> Tensor:
    """x_hat in the dtype of the statistics, a fresh tensor `[rows, width]`."""
    if len(statistics) == 1:
        return x * statistics[0].unsqueeze(-1)
    return (x - statistics[1].unsqueeze(-1)).mul_(statistics[0].unsqueeze(-1))


def norm_apply(
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    offset: float = 0.0,
    round_first: bool = True,
) -> Tensor:
    """The normalised rows, from x and its statistics: a fresh tensor `[rows, width]` in x's dtype.

    The forward pass and every rebuild call this one function with the same arguments: so both
    give the same bits.
    """
    x_hat = _normalized(x, statistics)
    scale = weight + offset if offset and round_first else weight
    if round_first:
        y = x_hat.to(x.dtype).mul_(scale.to(x.dtype))
    else:
        y = x_hat.mul_(scale.to(x_hat.dtype) + offset if offset else scale.to(x_hat.dtype))
    if bias is not None:
        y = y.add_(bias.to(y.dtype))
    return y.to(x.dtype)


def norm_backward(
    dy: Tensor,
    x: Tensor,
    statistics: Tensor,
    weight: Tensor,
    *,
    offset: float = 0.0,
    need_dx: bool = True,
    need_dweight: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of the rows and of the weight.

    Args:
        dy: `[rows, width]`; its dtype may be lower than x's.
        x: `[rows, width]`, the norm's input.
        statistics: as `norm_statistics` gave it.
        weight: `[width]`.
        offset: as in the forward pass.
        need_dx: whether dx is wanted.
        need_dweight: whether dweight is wanted.

    Returns:
        dx `[rows, width]` and dweight `[width]`, in the statistics' dtype; None where not wanted.
    """
    x_hat = _normalized(x, statistics)
    dy = dy.to(x_hat.dtype)
    dweight = (dy * x_hat).sum(0) if need_dweight else None
    if not need_dx:
        return None, dweight
    scale = weight.to(x_hat.dtype)
    grad = dy * (scale + offset if offset else scale)
    projection = (grad * x_hat).mean(-1, keepdim=True)
    if len(statistics) == 2:
        grad.sub_(grad.mean(-1, keepdim=True))
    dx = grad.sub_(x_hat.mul_(projection)).mul_(statistics[0].unsqueeze(-1))
    return dx, dweight
