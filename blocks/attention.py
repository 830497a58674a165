"""The attention half: `mid = x + Wo attention(rope(qk_norm(Wqkv norm(x))))`, and its backward.

| kept | recomputed | GEMMs in backward |
|---|---|---|
| x, qkv, attn_out and LSE, mid: as the policy says; norm statistics | normed x, roped and
qk-normed q and k, softmax: always; the rest of the four: as the policy says | 2 for each of the
forward's; 1 more for each of qkv and mid that is rebuilt; the flash forward for attn_out |

`AttentionHalf` holds what there is of the half's activations, and computes what is missing when
it is asked for. The forward pass starts with nothing, a backward pass with what was kept, and
both run the same lines: that is why a rebuilt activation has the bits of the first one.
"""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from einops import rearrange
from torch import Tensor

from backfuse.kernels.reference.attention import attention_backward, attention_forward
from backfuse.kernels.reference.norm import (
    accumulate_dtype,
    norm_apply,
    norm_backward,
    norm_statistics,
)
from backfuse.kernels.reference.rope import rope, rope_cos_sin

from .call import Branch, Call, Inputs, NormUse, Projections, WeightGrads, Weights
from .keep import Needs


class AttentionHalf:
    """One pass over the attention half.

    Args:
        call: the call.
        weights: the half's weights, projections in the compute dtype.
        inputs: the call's side inputs.
        x: `[tokens, h]`, the half's input; None where nothing reads it again.
        kept: what an earlier pass kept, by name (see `keep.py`); only read.
        keep: names that this pass is to leave in `values`.
    """

    def __init__(
        self,
        call: Call,
        weights: Weights,
        inputs: Inputs,
        x: Tensor | None,
        kept: Mapping[str, Tensor],
        keep: Set[str] = frozenset(),
    ) -> None:
        self.call = call
        self.spec = spec = call.spec
        self.weights = weights
        self.inputs = inputs
        self.values: dict[str, Tensor] = dict(kept)
        if x is not None:
            self.values["x"] = x
        self.keep = keep
        names = ["qkv"] if spec.stacked_qkv else ["q", "k", "v"]
        self.qkv = Projections([f"self_attn.{name}_proj" for name in names], weights)
        self.norm = NormUse(spec, weights, "attn_norm") if spec.pre_norm else None
        self.branch = Branch(call, weights, "attn", inputs.seed)
        self._heads: tuple[Tensor, Tensor, Tensor] | None = None

    def normed(self, rows: slice) -> Tensor:
        """The normalised input of a chunk, in the compute dtype."""
        x = self.values["x"][rows]
        if self.norm is not None:
            x = self.norm.apply(x, self.values["attn_norm_stats"][:, rows])
        return x.to(self.call.compute_dtype)

    def _make_statistics(self) -> None:
        if self.norm is not None and "attn_norm_stats" not in self.values:
            x = self.values["x"]
            parts = [self.norm.statistics(x[rows]) for rows in self.call.chunks()]
            self.values["attn_norm_stats"] = torch.cat(parts, -1)

    def heads(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the attention core takes them: `[batch, seq_len, heads, head_dim]`.

        A kept `qkv` is never written: q and k are then rotated into scratch. A `qkv` that is not
        kept is this pass's own scratch, and is rotated where it stands, unless qk-norm's
        backward will want it as it was.
        """
        if self._heads is not None:
            return self._heads
        call, spec = self.call, self.spec
        tokens = call.batch_size * call.seq_len
        qkv = self.values.get("qkv")
        project = qkv is None
        if qkv is None:
            self._make_statistics()
            like = self.values["x"]
            qkv = like.new_empty(tokens, spec.qkv_size, dtype=call.compute_dtype)
            if "qkv" in self.keep or spec.qk_norm:
                self.values["qkv"] = qkv
        rotated = spec.rope is not None or spec.qk_norm is not None
        qk_size = spec.q_size + spec.kv_size
        if not rotated or "qkv" not in self.values:
            qk = qkv[:, :qk_size]
        else:
            qk = qkv.new_empty(tokens, qk_size)
        angles = self._angles()
        for rows in call.chunks():
            if project:
                self.qkv.forward(self.normed(rows), qkv[rows])
            if rotated:
                self._rotate(qkv[rows, :qk_size], qk[rows], angles, rows)
        q, k = qk.split([spec.q_size, spec.kv_size], -1)
        self._heads = self._split(q), self._split(k), self._split(qkv[:, qk_size:])
        return self._heads

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "(b t) (n d) -> b t n d", b=self.call.batch_size, d=self.spec.head_dim)

    def _angles(self) -> tuple[Tensor, Tensor] | None:
        """cos and sin, one row a token: `[tokens, rotary_dim]`."""
        if self.spec.rope is None:
            return None
        cos, sin = self.inputs.cos, self.inputs.sin
        if cos is None or sin is None:
            cos, sin = self._default_angles()
        shape = (self.call.batch_size, -1, -1)
        return cos.expand(shape).flatten(0, 1), sin.expand(shape).flatten(0, 1)

    def _default_angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin of positions that count from 0 in each sequence: made anew, never kept."""
        call, cu_seqlens = self.call, self.inputs.cu_seqlens
        assert self.spec.rope is not None and self.spec.rope_theta is not None
        positions = torch.arange(call.seq_len, device=self.qkv.weights[0].device)
        if cu_seqlens is not None:
            sequence = torch.searchsorted(cu_seqlens, positions, right=True) - 1
            positions = positions - cu_seqlens[sequence]
        cos, sin = rope_cos_sin(
            positions,
            self.spec.rotary_dim,
            self.spec.rope_theta,
            layout=self.spec.rope,
            dtype=accumulate_dtype(call.compute_dtype),
        )
        return cos.unsqueeze(0), sin.unsqueeze(0)

    def _qk_parts(self, qk: Tensor) -> list[tuple[str, Tensor]]:
        """q and k of some rows, with their names."""
        return list(zip("qk", qk.split([self.spec.q_size, self.spec.kv_size], -1), strict=True))

    def _qk_norm_rows(self, part: Tensor) -> Tensor:
        """The rows that qk-norm normalises: heads, or whole projections."""
        return (
            part.unflatten(-1, (-1, self.spec.head_dim)).flatten(0, 1)
            if (self.spec.qk_norm == "head")
            else part
        )

    def _rotate(
        self, raw: Tensor, out: Tensor, angles: tuple[Tensor, Tensor] | None, rows: slice
    ) -> None:
        """qk-norm and RoPE of some rows of q and k, from `raw` into `out` (which may be raw)."""
        spec = self.spec
        for (name, source), (_, target) in zip(
            self._qk_parts(raw), self._qk_parts(out), strict=True
        ):
            if spec.qk_norm:
                lines = self._qk_norm_rows(source)
                normed = norm_apply(
                    lines,
                    norm_statistics(lines, "rmsnorm", spec.norm_eps),
                    self.weights[f"self_attn.{name}_norm.weight"],
                    None,
                    offset=spec.norm_offset,
                    round_first=spec.norm_round_first,
                )
                source = target.copy_(normed.view(target.shape))
            if angles is not None:
                heads = source.unflatten(-1, (-1, spec.head_dim))
                cos, sin = angles[0][rows], angles[1][rows]
                into = heads if source is target else target.unflatten(-1, (-1, spec.head_dim))
                rope(heads, cos, sin, layout=spec.rope or "half", out=into)

    def attn_out(self) -> Tensor:
        """The attention's output, `[tokens, q]`; its LSE lands beside it."""
        if "attn_out" not in self.values:
            out, lse = attention_forward(
                *self.heads(),
                self.call.mask,
                bias=self.inputs.attention_mask,
                cu_seqlens=self.inputs.cu_seqlens,
                seed=self.inputs.seed,
            )
            self.values["attn_out"], self.values["lse"] = out.flatten(2).flatten(0, 1), lse
        return self.values["attn_out"]

    def projected(self) -> Tensor:
        """With a post-norm: the output projection before that norm, `[tokens, h]`."""
        if "attn_branch" not in self.values:
            attn_out = self.attn_out()
            parts = [self.branch.project(attn_out[rows]) for rows in self.call.chunks()]
            self.values["attn_branch"] = torch.cat(parts)
        if "attn_post_norm_stats" not in self.values:
            assert self.branch.post is not None
            branch = self.values["attn_branch"]
            stats = [self.branch.post.statistics(branch[rows]) for rows in self.call.chunks()]
            self.values["attn_post_norm_stats"] = torch.cat(stats, -1)
        return self.values["attn_branch"]

    def mid(self) -> Tensor:
        """The residual between the halves, `[tokens, h]`."""
        if "mid" not in self.values:
            x = self.values["x"]
            mid = torch.empty_like(x)
            for rows in self.call.chunks():
                first = rows.start
                if self.spec.post_norm:
                    projected = self.projected()[rows]
                    stats = self.values["attn_post_norm_stats"][:, rows]
                    self.branch.add(x[rows], projected, stats, first, mid[rows])
                else:
                    self.branch.forward(x[rows], self.attn_out()[rows], first, mid[rows])
            self.values["mid"] = mid
        return self.values["mid"]

    def backward(self, dmid: Tensor, needs: Needs, grads: WeightGrads) -> Tensor | None:
        """The gradient of x, and those of the weights.

        Args:
            dmid: `[tokens, h]`, the gradient of the half's output; only read.
            needs: what this half has to give.
            grads: where the weights' gradients go.

        Returns:
            `[tokens, h]` in dmid's dtype, or None where x wants none.
        """
        call, spec = self.call, self.spec
        tokens = dmid.shape[0]
        attn_out = self.attn_out() if needs.inner or needs.out else None
        dout = dmid.new_empty(tokens, spec.q_size, dtype=call.compute_dtype)
        for rows in call.chunks():
            projected = self.projected()[rows] if spec.post_norm else None
            stats = self.values["attn_post_norm_stats"][:, rows] if spec.post_norm else None
            dy = self.branch.backward(dmid[rows], projected, stats, rows.start, needs, grads)
            if dy is not None and attn_out is not None:
                if needs.out:
                    self.branch.backward_weight(dy, attn_out[rows], grads)
                if needs.inner:
                    self.branch.backward_input(dy, dout[rows])
        if not needs.inner:
            return None
        assert attn_out is not None
        dheads = attention_backward(
            self._split(dout),
            *self.heads(),
            self._split(attn_out),
            self.values["lse"],
            call.mask,
            bias=self.inputs.attention_mask,
            cu_seqlens=self.inputs.cu_seqlens,
            seed=self.inputs.seed,
        )
        del dout
        self._heads = None  # roped q and k are not read again
        return self._backward_qkv(dmid, dheads, needs, grads)

    def _backward_qkv(
        self,
        dmid: Tensor,
        dheads: tuple[Tensor, Tensor, Tensor],
        needs: Needs,
        grads: WeightGrads,
    ) -> Tensor | None:
        """From the gradients of roped q and k, and of v, to the half's input."""
        call = self.call
        angles = self._angles()
        dx = torch.empty_like(dmid) if needs.input else None
        flat = [part.flatten(2).flatten(0, 1) for part in dheads]
        for rows in call.chunks():
            dqkv = torch.cat([part[rows] for part in flat], -1)
            self._unrotate(dqkv, angles, rows, grads)
            normed = self.normed(rows) if needs.projections else None
            self.qkv.backward_weights(dqkv, normed, grads)
            if not (needs.input or needs.norm):
                continue
            dnormed: Tensor | None = self.qkv.backward_input(dqkv)
            if self.norm is not None and dnormed is not None:
                stats = self.values["attn_norm_stats"][:, rows]
                x = self.values["x"][rows]
                dnormed = self.norm.backward(dnormed, x, stats, grads, needs.input)
            if dx is not None and dnormed is not None:
                torch.add(dmid[rows], dnormed, out=dx[rows])
        return dx

    def _unrotate(
        self,
        dqkv: Tensor,
        angles: tuple[Tensor, Tensor] | None,
        rows: slice,
        grads: WeightGrads,
    ) -> None:
        """RoPE and qk-norm backward of some rows, in place."""
        spec = self.spec
        dqk = dqkv[:, : spec.q_size + spec.kv_size]
        if angles is not None:
            heads = dqk.unflatten(-1, (-1, spec.head_dim))
            cos, sin = angles[0][rows], angles[1][rows]
            rope(heads, cos, sin, layout=spec.rope or "half", out=heads, transpose=True)
        if not spec.qk_norm:
            return
        raw = self.values["qkv"][rows, : spec.q_size + spec.kv_size]
        for (name, dpart), (_, part) in zip(self._qk_parts(dqk), self._qk_parts(raw), strict=True):
            weight_name = f"self_attn.{name}_norm.weight"
            lines = self._qk_norm_rows(part)
            dlines, dweight = norm_backward(
                self._qk_norm_rows(dpart),
                lines,
                norm_statistics(lines, "rmsnorm", spec.norm_eps),
                self.weights[weight_name],
                offset=spec.norm_offset,
                need_dweight=weight_name in grads.wanted,
            )
            grads.add(weight_name, dweight)
            assert dlines is not None
            dpart.copy_(dlines.view(dpart.shape))
