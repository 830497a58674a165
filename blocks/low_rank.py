"""The arithmetic of low-rank adapters, over a chunk of rows.

For projections side by side that read the same x, each with adapters of its own:

    t = s drop(x) A^T     y += t B^T                                                     forward
    u = s dy B            dx += drop'(u A)      dA = u^T drop(x)      dB = dy^T t        backward

| kept | recomputed | GEMMs in backward |
|---|---|---|
| nothing | t, from x | 5 for the forward's 2, as narrow as the rank |

t and u, `[rows, rank]`, hold the adapters of all the projections side by side. An adapter is never
rounded into the weight it adapts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from backfuse.kernels.reference.dropout import dropout_rows_
from backfuse.kernels.reference.linear import matmul_transposed
from backfuse.kernels.reference.norm import accumulate_dtype

from .lora import LoRA

if TYPE_CHECKING:
    from .weight_grads import WeightGrads

#: A product to be added: `[rows, rank]`, and a matrix of that rank.
Pair = tuple[Tensor, Tensor]


class _Adapter(NamedTuple):
    """One adapter of one of the projections.

    Attributes:
        projection: which one, counted from 0.
        lora: what it is.
        names: of A, B and B's bias.
        a: `[r, in]`.
        b: `[out, r]`.
        columns: its own of t and u.
        site: number of its dropout, for the counter.
    """

    projection: int
    lora: LoRA
    names: tuple[str, str, str]
    a: Tensor
    b: Tensor
    columns: slice
    site: int


class LowRank:
    """The adapters of projections side by side, in one pass; without any, nothing happens.

    Args:
        projections: the projections' names.
        adapters: the adapters of each, none where it has none.
        weights: the call's weights, cast.
        sites: of each projection, its place among the block's: the numbers of its dropouts.
        seed: for dropout, or None.
    """

    def __init__(
        self,
        projections: Sequence[str],
        adapters: Sequence[tuple[LoRA, ...]],
        weights: Mapping[str, Tensor],
        sites: Sequence[int],
        seed: Tensor | None,
    ) -> None:
        self.seed = seed
        self.parts: list[_Adapter] = []
        self.columns: list[slice] = []  # of t and u, one for each projection
        self.rank = 0
        for index, (name, own) in enumerate(zip(projections, adapters, strict=True)):
            start = self.rank
            for number, lora in enumerate(own):
                names = lora.parameters(name)
                columns = slice(self.rank, self.rank + lora.rank)
                # sites below 8 are the block's own
                site = 8 * (1 + number) + sites[index]
                a, b = weights[names[0]], weights[names[1]]
                self.parts.append(_Adapter(index, lora, names, a, b, columns, site))
                self.rank = columns.stop
            self.columns.append(slice(start, self.rank))
        self.drops = any(part.lora.dropout for part in self.parts)
        self.bs = [self._stacked(index) for index in range(len(projections))]

    @cached_property
    def a(self) -> Tensor:
        """A of all the adapters, `[rank, in]`."""
        one = len(self.parts) == 1
        return self.parts[0].a if one else torch.cat([part.a for part in self.parts])

    def _stacked(self, projection: int) -> Tensor | None:
        """B of all the adapters of a projection, `[out, their ranks together]`."""
        own = [part.b for part in self.parts if part.projection == projection]
        return None if not own else own[0] if len(own) == 1 else torch.cat(own, 1)

    def _scale(self, t: Tensor) -> Tensor:
        """Each adapter's columns times its scale, in place."""
        for part in self.parts:
            if part.lora.scale != 1.0:
                t[:, part.columns].mul_(part.lora.scale)
        return t

    def _drop(self, x: Tensor, part: _Adapter, rows: slice) -> Tensor:
        """Dropout of one adapter's input in place, forward or backward."""
        assert self.seed is not None
        return dropout_rows_(x, self.seed, part.lora.dropout, rows.start, part.site)

    def read(self, x: Tensor, rows: slice) -> list[Tensor]:
        """What each adapter's A reads: x itself, or a copy with holes."""
        return [
            self._drop(x.clone(), part, rows) if part.lora.dropout else x for part in self.parts
        ]

    def down(self, xs: Sequence[Tensor]) -> Tensor:
        """t, from what `read` gave."""
        if not self.drops:
            return self._scale(matmul_transposed(xs[0], self.a))
        t = xs[0].new_empty(len(xs[0]), self.rank)
        for x, part in zip(xs, self.parts, strict=True):
            matmul_transposed(x, part.a, out=t[:, part.columns])
        return self._scale(t)

    def forward(self, x: Tensor, rows: slice) -> list[Pair | None]:
        """What is to be added to each projection's output: `t_i` and `B_i`, for `t_i B_i^T`.

        An empty list without adapters.
        """
        if not self.parts:
            return []
        t = self.down(self.read(x, rows))
        return [
            None if b is None else (t[:, columns], b)
            for b, columns in zip(self.bs, self.columns, strict=True)
        ]

    def narrow(self, dys: Sequence[Tensor], wanted: bool, grads: WeightGrads) -> Tensor | None:
        """u, where anything reads it.

        Args:
            dys: the gradient of each projection's output, `[rows, out]` each.
            wanted: whether the gradient of their input is.
            grads: where the gradients go.
        """
        if not self.parts or not (wanted or self.want(grads, 0)):
            return None
        u = dys[0].new_empty(len(dys[0]), self.rank)
        for dy, b, columns in zip(dys, self.bs, self.columns, strict=True):
            if b is not None:
                matmul_transposed(dy, b.t(), out=u[:, columns])
        return self._scale(u)

    def add_input_gradient(self, u: Tensor | None, rows: slice, dx: Tensor) -> Tensor:
        """Add the gradient of x to dx, `[rows, in]`, which is the result."""
        if u is None:
            return dx
        if not self.drops:
            return torch.addmm(dx, u, self.a, out=dx)
        for part in self.parts:
            share = matmul_transposed(u[:, part.columns], part.a.t())
            dx.add_(self._drop(share, part, rows) if part.lora.dropout else share)
        return dx

    def backward_weights(
        self, dys: Sequence[Tensor], u: Tensor | None, x: Tensor, rows: slice, grads: WeightGrads
    ) -> None:
        """Add to the gradients of A and B.

        Args:
            dys: the gradient of each projection's output.
            u: as `narrow` gives it.
            x: `[rows, in]`.
            rows: which rows these are.
            grads: where the gradients go.
        """
        if not self.parts:
            return
        xs = self.read(x, rows)
        t = self.down(xs) if self.want(grads, 1) else None
        for part, own in zip(self.parts, xs, strict=True):
            if u is not None:
                grads.outer(part.names[0], u[:, part.columns], own)
            if t is not None:
                grads.outer(part.names[1], dys[part.projection], t[:, part.columns])

    def input_terms(self, u: Tensor | None, rows: slice) -> dict[str, Any]:
        """What `add_input_gradient` would add, as `ffn_dact` takes it: a product, or with holes in
        it a tensor."""
        if u is None:
            return {}
        if not self.drops:
            return {"product": (u, self.a)}
        share = u.new_zeros(len(u), self.a.shape[1])
        return {"addend": self.add_input_gradient(u, rows, share)}

    def want(self, grads: WeightGrads, which: int) -> bool:
        """Whether any A (0), B (1) or bias of a B (2) wants a gradient."""
        return any(grads.wants(part.names[which]) for part in self.parts)

    def add_biases(self, sums: Sequence[Tensor], grads: WeightGrads) -> None:
        """Add to the gradients of B's biases, from those of the projections' biases."""
        for part in self.parts:
            if part.lora.use_bias:
                grads.add(part.names[2], sums[part.projection] * part.lora.scale)


#: Of projections that have none.
NO_ADAPTERS = LowRank((), (), {}, (), None)


def with_adapters_bias(
    projection: str, own: tuple[LoRA, ...], weights: Mapping[str, Tensor]
) -> Tensor | None:
    """A projection's bias, with those of its adapters: `[out]`, or None where there is none.

    Args:
        projection: its name.
        own: its adapters.
        weights: the call's weights, cast.
    """
    bias = weights.get(f"{projection}.bias")
    for lora in own:
        if lora.use_bias:
            share = weights[lora.parameters(projection)[2]] * lora.scale
            bias = share if bias is None else bias + share
    return bias


def row_sum(dy: Tensor) -> Tensor:
    """The sum over rows, `[out]`, in fp32 (fp64 for fp64)."""
    return dy.sum(0, dtype=accumulate_dtype(dy.dtype))


def add_product(y: Tensor, pair: Pair | None, factor: float = 1.0) -> Tensor:
    """Add `t B^T`, times a factor, to y `[rows, out]`, which is the result."""
    if pair is None:
        return y
    t, b = pair
    if y.dtype != t.dtype:
        return y.add_(matmul_transposed(t, b), alpha=factor)
    return torch.addmm(y, t, b.t(), alpha=factor, out=y)
