"""Gradients of parameters, summed over the chunks of a pass."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch import Tensor

from .call import Call
from .layouts import as_parameter
from .low_rank import row_sum
from .spec import LAYER_SCALE

#: Where the output projection of each half is, by Hugging Face's names.
OUT_PROJECTION = {"attn": "self_attn.o_proj", "ffn": "mlp.down_proj"}


class WeightGrads:
    """Gradients of parameters, summed over chunks in fp32 (fp64 for fp64).

    Args:
        call: the call.
        names: of the parameters.
        weights: the parameters.
        wanted: names of those that want one; the others are never computed.
    """

    def __init__(
        self, call: Call, names: Sequence[str], weights: Sequence[Tensor], wanted: Set[str]
    ) -> None:
        self.ops, self.spec = call.ops, call.spec
        self.names, self.weights = names, weights
        self.wanted = wanted
        self.totals: dict[str, Tensor] = {}
        # what a layer scale's gradient is computed from
        self.scaled = {
            name: scale
            for half, scale in LAYER_SCALE.items()
            if scale in names
            for name in names
            if name.startswith(f"{OUT_PROJECTION[half]}.") and ".lora_A." not in name
        }
        # with one chunk there is nothing to sum: a share is the gradient, rounded as it is written
        self.alone = call.batch_size * call.seq_len <= call.chunk_size

    def wants(self, name: str) -> bool:
        """Whether a gradient is wanted, or read by a layer scale's."""
        return name in self.wanted or self.scaled.get(name) in self.wanted

    def outer(self, name: str, dy: Tensor, x: Tensor) -> None:
        """Add `dy^T x`: a projection's weight."""
        if self.wants(name):
            if self.spec.conv1d and ".lora_" not in name:  # the parameter is [in, out]
                dy, x = x, dy
            exact = not self.alone or name in self.scaled
            dtype = None if exact else self.weights[self.names.index(name)].dtype
            self.totals[name] = self.ops.accumulate_outer(self.totals.get(name), dy, x, dtype)

    def rows(self, name: str, dy: Tensor) -> None:
        """Add the sum over rows: a bias."""
        if self.wants(name):
            self._add(name, row_sum(dy))

    def add(self, name: str, share: Tensor | None) -> None:
        """Add what a chunk gives."""
        if share is not None and self.wants(name):
            self._add(name, share)

    def _add(self, name: str, share: Tensor) -> None:
        total = self.totals.get(name)
        self.totals[name] = share if total is None else total.add_(share)

    def _scale(self, name: str) -> None:
        """From the gradient of a scaled projection's weight or bias: that of it, and the scale's.

        With `z = s (x W^T + b)` and `G = dz^T x`: `dW = s G`, `db = s sum(dz)`, and
        `ds = rowsum(G W) + b sum(dz)`. So no activation is kept for `ds`. An adapter's B is as W
        here, with t for x.
        """
        total = self.totals.get(name)
        if total is None:
            return
        scale = self.scaled[name]
        value, factor = (self.weights[self.names.index(n)].to(total.dtype) for n in (name, scale))
        if total.dim() == 1:
            self.add(scale, total * value)
        else:
            across = self.spec.conv1d and ".lora_" not in name
            self.add(scale, (total * value).sum(0 if across else 1))
            factor = factor if across else factor.unsqueeze(1)
        if name in self.wanted:
            total.mul_(factor)
        else:
            del self.totals[name]

    def take(self) -> list[Tensor | None]:
        """The finished gradients in their parameters' dtypes, None where none was wanted."""
        for name in self.scaled:
            self._scale(name)
        taken: list[Tensor | None] = []
        for name, weight in zip(self.names, self.weights, strict=True):
            total = self.totals.pop(name, None)
            if total is not None and total.dtype != weight.dtype:
                total = total.to(weight.dtype)
            taken.append(None if total is None else as_parameter(self.spec, name, total))
        return taken
