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
from .layouts import as_parameter, in_order
from .spec import LAYER_SCALE, BlockSpec

#: Tokens a chunk, by device type. A CPU wants the chunk's scratch in its caches; a GPU wants
#: GEMMs large enough to fill it.
CHUNK_SIZE = {"cpu": 1024, "cuda": 4096}

#: Numbers of the dropouts of a block, for the counter (see `dropout.py`).
SITES = {"scores": 0, "attn": 1, "ffn": 2, "hidden": 3}

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


def cast_weights(spec: BlockSpec, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The projections in the compute dtype and in order (see `layouts.py`), anew for each pass.

    Norms stay as they are. Without autocast nothing is copied, but for a QKV that goes by heads. A
    copy is never kept: kept weights are the parameters themselves, so that whoever owns them can
    free and regather them.
    """
    return {
        n: in_order(spec, n, w if w.dtype == dtype else w.to(dtype)) if "_proj." in n else w
        for n, w in weights.items()
    }


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
            f"{OUT_PROJECTION[half]}.{kind}": scale
            for half, scale in LAYER_SCALE.items()
            for kind in ("weight", "bias")
            if scale in names
        }
        # with one chunk there is nothing to sum: a share is the gradient, rounded as it is written
        self.alone = call.batch_size * call.seq_len <= call.chunk_size

    def outer(self, name: str, dy: Tensor, x: Tensor) -> None:
        """Add `dy^T x`: a projection's weight."""
        if name in self.wanted or self.scaled.get(name) in self.wanted:
            if self.spec.conv1d:  # the parameter is [in, out]
                dy, x = x, dy
            exact = not self.alone or name in self.scaled
            dtype = None if exact else self.weights[self.names.index(name)].dtype
            self.totals[name] = self.ops.accumulate_outer(self.totals.get(name), dy, x, dtype)

    def rows(self, name: str, dy: Tensor) -> None:
        """Add the sum over rows: a bias."""
        if name in self.wanted or self.scaled.get(name) in self.wanted:
            self._add(name, dy.sum(0, dtype=accumulate_dtype(dy.dtype)))

    def add(self, name: str, share: Tensor | None) -> None:
        """Add what a chunk gives."""
        if share is not None and name in self.wanted:
            self._add(name, share)

    def _add(self, name: str, share: Tensor) -> None:
        total = self.totals.get(name)
        self.totals[name] = share if total is None else total.add_(share)

    def _scale(self, name: str) -> None:
        """From the gradient of a scaled projection's weight or bias: that of it, and the scale's.

        With `z = s (x W^T + b)` and `G = dz^T x`: `dW = s G`, `db = s sum(dz)`, and
        `ds = rowsum(G W) + b sum(dz)`. So no activation is kept for `ds`.
        """
        total = self.totals.get(name)
        if total is None:
            return
        scale = self.scaled[name]
        value, factor = (self.weights[self.names.index(n)].to(total.dtype) for n in (name, scale))
        if total.dim() == 1:
            self.add(scale, total * value)
        else:
            self.add(scale, (total * value).sum(0 if self.spec.conv1d else 1))
            factor = factor if self.spec.conv1d else factor.unsqueeze(1)
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
        self.after_residual = call.spec.norm_after_residual
        self.factor = call.spec.residual_multiplier
        self.scale = weights.get(LAYER_SCALE[half])
        self.p = call.spec.residual_dropout if call.dropout else 0.0
        self.seed = seed
        self.site = SITES[half]

    def project(self, x: Tensor, residual: Tensor | None, rows: slice) -> Tensor:
        """What the post-norm reads, `[rows, h]`.

        Args:
            x: `[rows, in]`, the projection's input.
            residual: `[rows, h]`; only a norm that follows the residual needs it.
            rows: which rows these are.
        """
        if not self.after_residual:
            return matmul_transposed(x, self.weight, self.bias)
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
            y = matmul_transposed(x, self.weight, self.bias)
            y = self._drop(y, rows) if self.p else y
            y = y if self.scale is None else y * self.scale
            torch.add(residual, y, alpha=self.factor, out=out)
        else:
            linear_add(residual, x, self.weight, self.bias, out, self.factor)

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
        grads.rows(f"{self.name}.bias", dy)
        return dy

    def scaled(self, dy: Tensor) -> Tensor:
        """What `backward` gave, through the layer scale if there is one."""
        return dy if self.scale is None else (dy * self.scale).to(dy.dtype)

    def backward_weight(self, dy: Tensor, x: Tensor, grads: WeightGrads) -> None:
        """Add to the projection's weight gradient; x is `[rows, in]`, the projection's input."""
        grads.outer(f"{self.name}.weight", dy, x)

    def backward_input(self, dy: Tensor, out: Tensor | None = None) -> Tensor:
        """`dy W`, `[rows, in]`, in `out` where that is given."""
        return matmul_transposed(self.scaled(dy), self.weight.t(), out=out)
