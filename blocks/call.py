"""What one call of a block fixes, and the small things both halves share.

A pass works on the residual stream flattened to `[tokens, hidden_size]`, chunk of rows by chunk
of rows. The chunk depends on the device alone: never on the policy, so that every policy runs the
same GEMMs on the same shapes and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from backfuse.kernels.cores.choose import Core
from backfuse.kernels.dispatch import Operations
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.dropout import dropout_rows_
from backfuse.kernels.reference.explicit_attention import AttentionMask
from backfuse.kernels.reference.linear import (
    linear,
    linear_add,
    linear_backward_input,
    matmul_transposed,
)
from backfuse.kernels.reference.norm import accumulate_dtype

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


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of a block fixes besides its tensors.

    Attributes:
        spec: the block.
        batch_size: sequences (1 where they are packed).
        seq_len: tokens a sequence (all tokens where they are packed).
        compute_dtype: of the GEMMs' operands: autocast's, or the weights'.
        autocast: whether it is autocast's.
        chunk_size: tokens a chunk.
        ops: the kernels, or their reference.
        core: whose attention runs (see `kernels/cores`).
        ffn_strategy: how the kernels rebuild a pre-activation (see `kernels/ffn_recompute.py`).
        dropout: whether dropout is active.
        max_seqlen: longest packed sequence, where the caller knows it.
        offload_dir: folder of the files that offloaded tensors go to; None: host memory.
        residual: whether a half adds its input; False where its output is a partial sum.
    """

    spec: BlockSpec
    batch_size: int
    seq_len: int
    compute_dtype: torch.dtype
    autocast: bool
    chunk_size: int
    ops: Operations
    core: Operations | Core
    ffn_strategy: str = "auto"
    dropout: bool = False
    max_seqlen: int | None = None
    offload_dir: Path | None = None
    residual: bool = True

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

    def attention_request(self, inputs: Inputs, device: torch.device) -> AttentionRequest:
        """What decides which core can do it."""
        return AttentionRequest(
            mask=self.mask,
            dtype=self.compute_dtype,
            device=device,
            tokens=self.seq_len,
            head_dim=self.spec.head_dim,
            v_head_dim=self.spec.v_head_dim,
            bias=inputs.attention_mask is not None,
            packed=inputs.cu_seqlens is not None,
            sinks=self.spec.attention_sinks,
        )


Weights = Mapping[str, Tensor]


def cast_weights(weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The projections in the compute dtype, made anew for each pass; norms stay as they are.

    Without autocast nothing is copied. A cast is never kept: kept weights are the parameters
    themselves, so that whoever owns them can free and regather them.
    """
    return {
        n: w if w.dtype == dtype or "_proj." not in n else w.to(dtype) for n, w in weights.items()
    }


class WeightGrads:
    """Gradients of parameters, summed over chunks in fp32 (fp64 for fp64).

    Args:
        ops: the kernels, or their reference.
        wanted: names of the parameters that want one; the others are never computed.
    """

    def __init__(self, ops: Operations, wanted: Set[str]) -> None:
        self.ops = ops
        self.wanted = wanted
        self.totals: dict[str, Tensor] = {}

    def outer(self, name: str, dy: Tensor, x: Tensor) -> None:
        """Add `dy^T x`: a projection's weight."""
        if name in self.wanted:
            self.totals[name] = self.ops.accumulate_outer(self.totals.get(name), dy, x)

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

    def _split(self, dy: Tensor) -> list[tuple[str, Tensor]]:
        """What belongs to each of the weights, with their names."""
        widths = [weight.shape[0] for weight in self.weights]
        return list(zip(self.names, dy.split(widths, -1), strict=True))

    def backward_weights(self, dy: Tensor, x: Tensor, grads: WeightGrads) -> None:
        """Add to the gradients of the weights."""
        for name, part in self._split(dy):
            grads.outer(f"{name}.weight", part, x)

    def backward_biases(self, dy: Tensor, grads: WeightGrads) -> None:
        """Add to the gradients of the biases."""
        for name, part in self._split(dy):
            grads.rows(f"{name}.bias", part)

    def add_biases(self, dbias: Tensor, grads: WeightGrads) -> None:
        """Add to the gradients of the biases what a kernel has summed already."""
        for name, part in self._split(dbias):
            grads.add(f"{name}.bias", part)

    def want_biases(self, grads: WeightGrads) -> bool:
        """Whether a bias wants a gradient."""
        return any(f"{name}.bias" in grads.wanted for name in self.names)


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
            out: see residual.
        """
        if self.statistics is None:
            tokens = self.call.batch_size * self.call.seq_len
            self.statistics = x.new_empty(
                self.spec.statistics, tokens, dtype=accumulate_dtype(x.dtype)
            )
        statistics, dtype = self.statistics[:, rows], self.call.compute_dtype
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
    """The end of a half: output projection, post-norm, dropout, residual.

        out = residual + dropout(post_norm(x W^T + b))

    Args:
        call: the call.
        weights: the block's weights, cast.
        half: `"attn"` or `"ffn"`.
        seed: for dropout, or None.
        kept: what an earlier pass kept.
    """

    def __init__(
        self,
        call: Call,
        weights: Weights,
        half: str,
        seed: Tensor | None,
        kept: Mapping[str, Tensor],
    ) -> None:
        self.name = OUT_PROJECTION[half]
        self.weight = weights[f"{self.name}.weight"]
        self.bias = weights.get(f"{self.name}.bias")
        self.post = (
            NormUse(call, weights, f"{half}_post_norm", kept) if call.spec.post_norm else None
        )
        self.residual = call.residual
        self.p = call.spec.residual_dropout if call.dropout else 0.0
        self.seed = seed
        self.site = SITES[half]

    def project(self, x: Tensor) -> Tensor:
        """`x W^T + b`, `[rows, h]`."""
        return matmul_transposed(x, self.weight, self.bias)

    def forward(self, residual: Tensor, x: Tensor, rows: slice, out: Tensor) -> None:
        """Write the half's output for some rows, where no norm follows the projection.

        Args:
            residual: `[rows, h]`.
            x: `[rows, in]`, the projection's input.
            rows: which rows these are.
            out: `[rows, h]`, written.
        """
        if self.p:
            torch.add(residual, self._drop(self.project(x), rows), out=out)
        elif not self.residual:
            matmul_transposed(x, self.weight, self.bias, out)
        else:
            linear_add(residual, x, self.weight, self.bias, out)

    def add(self, residual: Tensor, projected: Tensor, rows: slice, out: Tensor) -> None:
        """Write `residual + dropout(post_norm(projected))` into `out`; `projected` stays."""
        assert self.post is not None
        if self.p:
            torch.add(residual, self._drop(self.post.apply(projected, rows), rows), out=out)
        else:
            self.post.apply(projected, rows, residual=residual, out=out)

    def _drop(self, y: Tensor, rows: slice) -> Tensor:
        """Dropout in place, forward or backward."""
        assert self.seed is not None
        return dropout_rows_(y, self.seed, self.p, rows.start, self.site)

    def backward(
        self, dz: Tensor, projected: Tensor | None, rows: slice, needs: Needs, grads: WeightGrads
    ) -> Tensor | None:
        """Back through dropout and post-norm, to the output of the projection.

        Args:
            dz: `[rows, h]`, the gradient of the half's output; only read.
            projected: `[rows, h]`, what the post-norm read, if there is one.
            rows: which rows these are.
            needs: what the half has to give.
            grads: where the gradients of post-norm and bias go.

        Returns:
            `[rows, h]`, or None where nothing before the post-norm wants a gradient.
        """
        dy = dz.to(self.weight.dtype)
        if self.p:
            dy = self._drop(dy.clone() if dy is dz else dy, rows)
        if self.post is not None:
            assert projected is not None
            dprojected = torch.empty_like(dy) if needs.branch else None
            self.post.backward(dy, projected, rows, grads, dx=dprojected)
            dy = dy if dprojected is None else dprojected
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
