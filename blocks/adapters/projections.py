"""A live projection, whatever library made it, as what a block computes with."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class Projection(NamedTuple):
    """What `y = x W^T + b` is made of.

    Attributes:
        weight: as the module holds it.
        bias: or None.
        transposed: whether the weight is `[in, out]`.
    """

    weight: Tensor
    bias: Tensor | None
    transposed: bool


def projection(module: nn.Module) -> Projection | None:
    """The parts of a projection, or None for anything that is not plainly one.

    The exact type decides: a subclass, an adapter or a quantised layer does more than its weight
    says.
    """
    kind = type(module)
    if kind is nn.Linear:
        assert isinstance(module, nn.Linear)
        return Projection(module.weight, module.bias, False)
    if kind.__name__ == "Conv1D" and kind.__module__ == "transformers.pytorch_utils":
        assert isinstance(module.weight, Tensor) and isinstance(module.bias, Tensor)
        return Projection(module.weight, module.bias, True)
    return None
