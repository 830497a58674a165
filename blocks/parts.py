"""What both halves are made of: projections side by side, norms, and the end of a half."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from backfuse.kernels.reference.dropout import dropout_rows_
from backfuse.kernels.reference.linear import (
    linear,
    linear_add,
    linear_backward_input,
    matmul_transposed,
)
from backfuse.kernels.reference.norm import accumulate_dtype

from .call import SITES, Call, Weights
from .keep import Needs
from .lora import Adapters, projections
from .low_rank import NO_ADAPTERS, LowRank, add_product, row_sum, with_adapters_bias
from .spec import LAYER_SCALE
from .weight_grads import OUT_PROJECTION, WeightGrads


class Projections:
    """Weights side by side that read the same input: q, k and v, or gate and up.

    Args:
        call: the call.
        names: their parameter names without `.weight`.
        weights: the block's weights.
        adapters: the block's.
        seed: for dropout, or None.
    """

    def __init__(
        self,
        call: Call,
        names: list[str],
        weights: Weights,
        adapters: Adapters,
        seed: Tensor | None,
    ) -> None:
        self.names = names
        self.weights = [weights[f"{name}.weight"] for name in names]
        self.biases = [weights.get(f"{name}.bias") for name in names]
        self.low_rank = _low_rank(call, names, weights, adapters, seed)
        if self.low_rank.parts:
            own = dict(adapters)
            self.biases = [with_adapters_bias(n, own.get(n, ()), weights) for n in names]
            if any(bias is not None for bias in self.biases):  # one for each weight, or none
                self.biases = [
                    weight.new_zeros(len(weight)) if bias is None else bias
                    for weight, bias in zip(self.weights, self.biases, strict=True)
                ]

    def forward(self, x: Tensor, rows: slice, out: Tensor) -> Tensor:
        """Write all outputs into `out`, `[rows, their widths together]`."""
        linear(x, self.weights, self.biases, out)
        for part, pair in zip(self._parts(out), self.low_rank.forward(x, rows), strict=False):
            add_product(part, pair)
        return out

    def narrow(self, dy: Tensor, wanted: bool, grads: WeightGrads) -> Tensor | None:
        """u of the adapters, from the gradient of all outputs (see `LowRank.narrow`)."""
        return self.low_rank.narrow(self._parts(dy), wanted, grads)

    def backward_input(self, dy: Tensor, u: Tensor | None, rows: slice) -> Tensor:
        """The gradient of the input; u as `narrow` gives it."""
        return self.low_rank.add_input_gradient(u, rows, linear_backward_input(dy, self.weights))

    def _parts(self, dy: Tensor) -> tuple[Tensor, ...]:
        """What belongs to each of the weights."""
        return dy.split([weight.shape[0] for weight in self.weights], -1)

    def backward_weights(
        self, dy: Tensor, u: Tensor | None, x: Tensor, rows: slice, grads: WeightGrads
    ) -> None:
        """Add to the gradients of the weights and of the adapters; u as `narrow` gives it."""
        parts = self._parts(dy)
        for name, part in zip(self.names, parts, strict=True):
            grads.outer(f"{name}.weight", part, x)
        self.low_rank.backward_weights(parts, u, x, rows, grads)

    def backward_biases(self, dy: Tensor, grads: WeightGrads) -> None:
        """Add to the gradients of the biases."""
        if self.want_biases(grads):
            self.add_biases(row_sum(dy), grads)

    def add_biases(self, dbias: Tensor, grads: WeightGrads) -> None:
        """Add to the gradients of the biases what a kernel has summed already."""
        parts = self._parts(dbias)
        self.low_rank.add_biases(parts, grads)
        for name, part in zip(self.names, parts, strict=True):  # each its own storage: they leave
            grads.add(f"{name}.bias", part.clone() if len(parts) > 1 else part)

    def want_biases(self, grads: WeightGrads) -> bool:
        """Whether a bias wants a gradient."""
        own = any(f"{name}.bias" in grads.wanted for name in self.names)
        return own or self.low_rank.want(grads, 2)


def _low_rank(
    call: Call, names: list[str], weights: Weights, adapters: Adapters, seed: Tensor | None
) -> LowRank:
    """The adapters of projections side by side."""
    own = dict(adapters)
    if own.keys().isdisjoint(names):
        return NO_ADAPTERS
    numbers = projections(call.spec)
    return LowRank(
        names, [own.get(name, ()) for name in names], weights, [numbers[n] for n in names], seed
    )


class NormUse:
    """One norm of a block in one pass, with the statistics of its rows.

    Args:
        call: the call.
        weights: the block's weights.
        role: a key of `spec.norm_names`.
        kept: what an earlier pass kept: its statistics are read where they are there.
    """

    def __init__(self, call: Call, weights: Weights, role: str, kept: Mapping[str, Tensor]) -> None:
        self.call = call
        self.spec = call.spec.norm_spec
        self.name = call.spec.norm_names[role]
        self.weight = weights[f"{self.name}.weight"]
        self.bias = weights.get(f"{self.name}.bias")
        self.statistics = kept.get(f"{role}_stats")
        self.known = self.statistics is not None

    def apply(
        self,
        x: Tensor,
        rows: slice,
        *,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """Some rows normalised, in the compute dtype; their statistics too where they are new.

        Args:
            x: `[rows, width]`.
            rows: which rows these are.
            residual: added; the sum goes to `out`, which is then the result.
            out: where the result goes, in its dtype; None: a fresh tensor.
        """
        if self.statistics is None:
            tokens = self.call.batch_size * self.call.seq_len
            self.statistics = x.new_empty(
                self.spec.statistics, tokens, dtype=accumulate_dtype(x.dtype)
            )
        statistics, dtype = self.statistics[:, rows], self.call.compute_dtype
        if out is not None and residual is None:
            dtype = out.dtype
        ops, given = self.call.ops, (self.weight, self.bias, self.spec)
        if self.known:
            return ops.norm_apply(x, statistics, *given, dtype, residual=residual, out=out)
        return ops.norm_forward(x, *given, statistics, dtype, residual=residual, out=out)

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        rows: slice,
        grads: WeightGrads,
        *,
        residual: Tensor | None = None,
        dx: Tensor | None = None,
        normed: Tensor | None = None,
    ) -> None:
        """Write the gradient of x, and the normalised rows again; add to those of the parameters.

        Args:
            dy: `[rows, width]`.
            x: `[rows, width]`.
            rows: which rows these are.
            grads: where the parameters' gradients go.
            residual: added to dx.
            dx: written; None where it is not wanted.
            normed: written; None where it is not wanted.
        """
        assert self.statistics is not None
        dweight, dbias = self.call.ops.norm_backward(
            dy,
            x,
            self.statistics[:, rows],
            self.weight,
            self.bias,
            self.spec,
            residual=residual,
            dx=dx,
            normed=normed,
            need_dweight=f"{self.name}.weight" in grads.wanted,
            need_dbias=f"{self.name}.bias" in grads.wanted,
        )
        grads.add(f"{self.name}.weight", dweight)
        grads.add(f"{self.name}.bias", dbias)


class Branch:
    """The end of a half: output projection, post-norm, dropout, layer scale, residual.

        out = residual + m dropout(post_norm(x W^T + b))    or m scale dropout(x W^T + b)
        out = post_norm(residual + m dropout(x W^T + b))    where the norm follows the residual

    Args:
        call: the call.
        weights: the block's weights, cast.
        half: `"attn"` or `"ffn"`.
        adapters: the block's.
        seed: for dropout, or None.
        kept: what an earlier pass kept.
    """

    def __init__(
        self,
        call: Call,
        weights: Weights,
        half: str,
        adapters: Adapters,
        seed: Tensor | None,
        kept: Mapping[str, Tensor],
    ) -> None:
        self.name = OUT_PROJECTION[half]
        self.weight = weights[f"{self.name}.weight"]
        self.low_rank = _low_rank(call, [self.name], weights, adapters, seed)
        own = dict(adapters).get(self.name, ())
        self.bias = with_adapters_bias(self.name, own, weights)
        self.post = (
            NormUse(call, weights, f"{half}_post_norm", kept) if call.spec.post_norm else None
        )
        self.after_residual = call.spec.norm_after_residual
        self.factor = call.spec.residual_multiplier
        self.scale = weights.get(LAYER_SCALE[half])
        self.residual = call.residual
        self.p = call.spec.residual_dropout if call.dropout else 0.0
        self.seed = seed
        self.site = SITES[half]

    def _add_adapters(self, y: Tensor, x: Tensor, rows: slice, factor: float = 1.0) -> Tensor:
        """Add to y what the adapters give for x, times a factor."""
        for pair in self.low_rank.forward(x, rows):
            add_product(y, pair, factor)
        return y

    def _linear(self, x: Tensor, rows: slice) -> Tensor:
        """`x W^T + b` with the adapters, `[rows, h]`."""
        return self._add_adapters(matmul_transposed(x, self.weight, self.bias), x, rows)

    def project(self, x: Tensor, residual: Tensor | None, rows: slice) -> Tensor:
        """What the post-norm reads, `[rows, h]`.

        Args:
            x: `[rows, in]`, the projection's input.
            residual: `[rows, h]`; only a norm that follows the residual needs it.
            rows: which rows these are.
        """
        if not self.after_residual:
            return self._linear(x, rows)
        assert residual is not None
        total = torch.empty_like(residual)
        self.forward(residual, x, rows, total)
        return total

    def forward(self, residual: Tensor, x: Tensor, rows: slice, out: Tensor) -> None:
        """Write the sum of projection and residual for some rows: where no norm follows, the end.

        Args:
            residual: `[rows, h]`.
            x: `[rows, in]`, the projection's input.
            rows: which rows these are.
            out: `[rows, h]`, written.
        """
        if self.p or self.scale is not None:
            y = self._linear(x, rows)
            y = self._drop(y, rows) if self.p else y
            y = y if self.scale is None else y * self.scale
            torch.add(residual, y, alpha=self.factor, out=out)
        elif not self.residual:
            if out.dtype == x.dtype:
                matmul_transposed(x, self.weight, self.bias, out)
                self._add_adapters(out, x, rows)
            else:
                out.copy_(self._linear(x, rows))
        else:
            linear_add(residual, x, self.weight, self.bias, out, self.factor)
            self._add_adapters(out, x, rows, self.factor)

    def finish(self, projected: Tensor, residual: Tensor | None, rows: slice, out: Tensor) -> None:
        """Write the half's output from what the post-norm reads, which stays as it is.

        Args:
            projected: `[rows, h]`, what `project` gave.
            residual: `[rows, h]`; None where it is in that already.
            rows: which rows these are.
            out: `[rows, h]`, written.
        """
        assert self.post is not None
        if self.after_residual:
            self.post.apply(projected, rows, out=out)
            return
        assert residual is not None
        if self.p or self.factor != 1.0:
            y = self.post.apply(projected, rows)
            torch.add(residual, self._drop(y, rows) if self.p else y, alpha=self.factor, out=out)
        else:
            self.post.apply(projected, rows, residual=residual, out=out)

    def _drop(self, y: Tensor, rows: slice) -> Tensor:
        """Dropout in place, forward or backward."""
        assert self.seed is not None
        return dropout_rows_(y, self.seed, self.p, rows.start, self.site)

    def backward(
        self,
        dz: Tensor,
        projected: Tensor | None,
        rows: slice,
        needs: Needs,
        grads: WeightGrads,
        dsum: Tensor | None = None,
    ) -> Tensor | None:
        """Back through dropout and post-norm, to the output of the projection, but for its scale.

        Args:
            dz: `[rows, h]`, the gradient of the half's output; only read.
            projected: `[rows, h]`, what the post-norm read, if there is one.
            rows: which rows these are.
            needs: what the half has to give.
            grads: where the gradients of post-norm and bias go.
            dsum: `[rows, h]`, where the norm follows the residual: written with the gradient of
                their sum; None where it is not wanted.

        Returns:
            `[rows, h]`, or None where nothing before the post-norm wants a gradient.
        """
        if self.after_residual:
            assert self.post is not None and projected is not None
            self.post.backward(dz, projected, rows, grads, dx=dsum)
            if dsum is None:
                return None
            dz = dsum
        dy = (dz if self.factor == 1.0 else dz * self.factor).to(self.weight.dtype)
        if self.p:
            dy = self._drop(dy.clone() if dy is dz else dy, rows)
        if self.post is not None and not self.after_residual:
            assert projected is not None
            dprojected = torch.empty_like(dy) if needs.branch else None
            self.post.backward(dy, projected, rows, grads, dx=dprojected)
            dy = dy if dprojected is None else dprojected
        if not needs.branch:
            return None
        if grads.wants(f"{self.name}.bias") or self.low_rank.want(grads, 2):
            dbias = row_sum(dy)
            self.low_rank.add_biases([dbias], grads)
            grads.add(f"{self.name}.bias", dbias)
        return dy

    def scaled(self, dy: Tensor) -> Tensor:
        """What `backward` gave, through the layer scale if there is one."""
        return dy if self.scale is None else (dy * self.scale).to(dy.dtype)

    def narrow(self, dy: Tensor, wanted: bool, grads: WeightGrads) -> Tensor | None:
        """u of the adapters, from what `backward` gave (see `LowRank.narrow`)."""
        return self.low_rank.narrow([self.scaled(dy)], wanted, grads)

    def backward_weight(
        self, dy: Tensor, u: Tensor | None, x: Tensor, rows: slice, grads: WeightGrads
    ) -> None:
        """Add to the gradients of the projection's weight and of its adapters.

        Args:
            dy: `[rows, h]`, the gradient of the projection's output.
            u: as `narrow` gives it.
            x: `[rows, in]`, the projection's input.
            rows: which rows these are.
            grads: where the gradients go.
        """
        grads.outer(f"{self.name}.weight", dy, x)
        self.low_rank.backward_weights([dy], u, x, rows, grads)

    def backward_input(self, dy: Tensor, u: Tensor | None, rows: slice, out: Tensor) -> Tensor:
        """Write `dy W` into `out`, `[rows, in]`, and add what the adapters give."""
        matmul_transposed(self.scaled(dy), self.weight.t(), out=out)
        return self.low_rank.add_input_gradient(u, rows, out)
