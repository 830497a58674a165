"""What one call of a block fixes, and the small things both halves share.

A pass works on the residual stream flattened to `[tokens, hidden_size]`, chunk of rows by chunk
of rows. The chunk depends on the device alone: never on the policy, so that every policy runs the
same GEMMs on the same shapes and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from backfuse.kernels.reference.dropout import dropout_rows_
from backfuse.kernels.reference.explicit_attention import AttentionMask
from backfuse.kernels.reference.linear import (
    accumulate_outer,
    linear,
    linear_backward_input,
    matmul_transposed,
)
from backfuse.kernels.reference.norm import (
    accumulate_dtype,
    norm_apply,
    norm_backward,
    norm_statistics,
)

from .keep import Needs
from .spec import BlockSpec

#: Tokens a chunk, by device type. A CPU wants the chunk's scratch in its caches; a GPU wants
#: GEMMs large enough to fill it.
CHUNK_SIZE = {"cpu": 1024, "cuda": 4096}

#: Numbers of the dropouts of a block, for the counter (see `dropout.py`).
SITES = {"scores": 0, "attn": 1, "ffn": 2}

#: Where the output projection of each half is, by Hugging Face's names.
OUT_PROJECTION = {"attn": "self_attn.o_proj", "ffn": "mlp.down_proj"}


class Inputs(NamedTuple):
    """Tensors of a call that no gradient flows to.

    Attributes:
        cos: `[batch or 1, seq_len, rotary_dim]`, or None.
        sin: as cos.
        attention_mask: `[batch or 1, heads or 1, seq_len, seq_len]`, bool or additive, or None.
        cu_seqlens: `[sequences + 1]`, or None.
        seed: int64, one element, or None where nothing drops out.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    seed: Tensor | None = None


@dataclass(frozen=True)
class Call:
    """What one call of a block fixes besides its tensors.

    Attributes:
        spec: the block.
        batch_size: sequences (1 where they are packed).
        seq_len: tokens a sequence (all tokens where they are packed).
        compute_dtype: of the GEMMs' operands: autocast's, or the weights'.
        chunk_size: tokens a chunk.
        dropout: whether dropout is active.
        max_seqlen: longest packed sequence, where the caller knows it.
    """

    spec: BlockSpec
    batch_size: int
    seq_len: int
    compute_dtype: torch.dtype
    chunk_size: int
    dropout: bool = False
    max_seqlen: int | None = None

    def chunks(self) -> Iterator[slice]:
        """Slices of rows that cover all tokens."""
        tokens = self.batch_size * self.seq_len
        for start in range(0, tokens, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, tokens))

    @property
    def mask(self) -> AttentionMask:
        """What the attention core is asked for."""
        spec = self.spec
        return AttentionMask(
            causal=spec.causal,
            window=spec.sliding_window,
            softcap=spec.attn_logit_softcapping,
            scale=spec.attention_scale,
            dropout=spec.attention_dropout if self.dropout else 0.0,
            site=SITES["scores"],
            max_seqlen=self.max_seqlen,
        )


Weights = Mapping[str, Tensor]


def cast_weights(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The projections in the compute dtype, made anew for each pass; norms stay as they are.

    Without autocast nothing is copied. A cast is never kept: kept weights are the parameters
    themselves, so that whoever owns them can free and regather them.
    """
    return {n: w.to(dtype) if "_proj." in n else w for n, w in weights.items()}


class WeightGrads:
    """Gradients of parameters, summed over chunks in fp32 (fp64 for fp64).

    Args:
        wanted: names of the parameters that want one; the others are never computed.
    """

    def __init__(self, wanted: Set[str]) -> None:
        self.wanted = wanted
        self.totals: dict[str, Tensor] = {}

    def outer(self, name: str, dy: Tensor, x: Tensor) -> None:
        """Add `dy^T x`: a projection's weight."""
        if name in self.wanted:
            self.totals[name] = accumulate_outer(self.totals.get(name), dy, x)

    def rows(self, name: str, dy: Tensor) -> None:
        """Add the sum over rows: a bias."""
        if name in self.wanted:
            self.add(name, dy.sum(0, dtype=accumulate_dtype(dy.dtype)))

    def add(self, name: str, share: Tensor | None) -> None:
        """Add what a chunk gives."""
        if share is not None and name in self.wanted:
            total = self.totals.get(name)
            self.totals[name] = share if total is None else total.add_(share)

    def take(self, names: Sequence[str], weights: Sequence[Tensor]) -> list[Tensor | None]:
        """The finished gradients in their parameters' dtypes, None where none was wanted."""
        return [
            self.totals.pop(name).to(weight.dtype) if name in self.totals else None
            for name, weight in zip(names, weights, strict=True)
        ]


class Projections:
    """Weights side by side that read the same input: q, k and v, or gate and up.

    Args:
        names: their parameter names without `.weight`.
        weights: the block's weights.
    """

    def __init__(self, names: list[str], weights: Weights) -> None:
        self.names = names
        self.weights = [weights[f"{name}.weight"] for name in names]
        self.biases = [weights.get(f"{name}.bias") for name in names]

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """Write all outputs into `out`, `[rows, their widths together]`."""
        return linear(x, self.weights, self.biases, out)

    def backward_input(self, dy: Tensor) -> Tensor:
        """The gradient of the input."""
        return linear_backward_input(dy, self.weights)

    def backward_weights(self, dy: Tensor, x: Tensor | None, grads: WeightGrads) -> None:
        """Add to the gradients of the weights (those wanted need x) and biases."""
        widths = [weight.shape[0] for weight in self.weights]
        for name, part in zip(self.names, dy.split(widths, -1), strict=True):
            grads.rows(f"{name}.bias", part)
            if x is not None:
                grads.outer(f"{name}.weight", part, x)


class NormUse:
    """One norm of a block, by its role; `None` parameters where the block has no such norm."""

    def __init__(self, spec: BlockSpec, weights: Weights, role: str) -> None:
        self.spec = spec
        self.name = spec.norm_names[role]
        self.weight = weights[f"{self.name}.weight"]
        self.bias = weights.get(f"{self.name}.bias")

    def statistics(self, x: Tensor) -> Tensor:
        """`[1 or 2, rows]`."""
        return norm_statistics(x, self.spec.norm, self.spec.norm_eps)

    def apply(self, x: Tensor, statistics: Tensor) -> Tensor:
        """The normalised rows."""
        return norm_apply(
            x,
            statistics,
            self.weight,
            self.bias,
            offset=self.spec.norm_offset,
            round_first=self.spec.norm_round_first,
        )

    def backward(
        self, dy: Tensor, x: Tensor, statistics: Tensor, grads: WeightGrads, need_dx: bool = True
    ) -> Tensor | None:
        """The gradient of x in the statistics' dtype; adds to those of weight and bias."""
        weight_name = f"{self.name}.weight"
        dx, dweight = norm_backward(
            dy,
            x,
            statistics,
            self.weight,
            offset=self.spec.norm_offset,
            need_dx=need_dx,
            need_dweight=weight_name in grads.wanted,
        )
        grads.add(weight_name, dweight)
        grads.rows(f"{self.name}.bias", dy)
        return dx


class Branch:
    """The end of a half: output projection, post-norm, dropout, residual.

        out = residual + dropout(post_norm(x W^T + b))

    Args:
        call: the call.
        weights: the block's weights, cast.
        half: `"attn"` or `"ffn"`.
        seed: for dropout, or None.
    """

    def __init__(self, call: Call, weights: Weights, half: str, seed: Tensor | None) -> None:
        self.name = OUT_PROJECTION[half]
        self.weight = weights[f"{self.name}.weight"]
        self.bias = weights.get(f"{self.name}.bias")
        self.post = (
            NormUse(call.spec, weights, f"{half}_post_norm") if call.spec.post_norm else None
        )
        self.p = call.spec.residual_dropout if call.dropout else 0.0
        self.seed = seed
        self.site = SITES[half]

    def project(self, x: Tensor) -> Tensor:
        """`x W^T + b`, `[rows, h]`."""
        return matmul_transposed(x, self.weight, self.bias)

    def forward(self, residual: Tensor, x: Tensor, first_row: int, out: Tensor) -> None:
        """Write the half's output for some rows, where no norm follows the projection.

        Args:
            residual: `[rows, h]`.
            x: `[rows, in]`, the projection's input.
            first_row: number of the first row.
            out: `[rows, h]`, written.
        """
        self.add(residual, self.project(x), None, first_row, out)

    def add(
        self,
        residual: Tensor,
        projected: Tensor,
        statistics: Tensor | None,
        first_row: int,
        out: Tensor,
    ) -> None:
        """Write `residual + dropout(post_norm(projected))` into `out`; `projected` stays."""
        y = projected
        if self.post is not None:
            assert statistics is not None
            y = self.post.apply(y, statistics)
        if self.p:
            assert self.seed is not None
            y = y.clone() if y is projected else y
            dropout_rows_(y, self.seed, self.p, first_row, self.site)
        torch.add(residual, y, out=out)

    def backward(
        self,
        dz: Tensor,
        projected: Tensor | None,
        statistics: Tensor | None,
        first_row: int,
        needs: Needs,
        grads: WeightGrads,
    ) -> Tensor | None:
        """Back through dropout and post-norm, to the output of the projection.

        Args:
            dz: `[rows, h]`, the gradient of the half's output; only read.
            projected: `[rows, h]`, what the post-norm read, if there is one.
            statistics: of the post-norm.
            first_row: number of the first row.
            needs: what the half has to give.
            grads: where the gradients of post-norm and bias go.

        Returns:
            `[rows, h]`, or None where nothing before the post-norm wants a gradient.
        """
        dy = dz.to(self.weight.dtype)
        if self.p:
            assert self.seed is not None
            dy = dy.clone() if dy is dz else dy
            dropout_rows_(dy, self.seed, self.p, first_row, self.site)
        if self.post is not None:
            assert projected is not None and statistics is not None
            dprojected = self.post.backward(dy, projected, statistics, grads, needs.branch)
            dy = dy if dprojected is None else dprojected.to(self.weight.dtype)
        if not needs.branch:
            return None
        grads.rows(f"{self.name}.bias", dy)
        return dy

    def backward_weight(self, dy: Tensor, x: Tensor, grads: WeightGrads) -> None:
        """Add to the projection's weight gradient; x is `[rows, in]`, the projection's input."""
        grads.outer(f"{self.name}.weight", dy, x)

    def backward_input(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """`dy W`, `[rows, in]`, in `out` where that is given."""
        return matmul_transposed(dy, self.weight.t(), out=out)
