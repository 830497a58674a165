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
from functools import cached_property

import torch
from torch import Tensor

from backfuse.kernels.reference.norm import accumulate_dtype
from backfuse.kernels.reference.rope import rope_cos_sin

from .call import Call, Inputs, Weights
from .keep import Needs
from .lora import Adapters
from .parts import Branch, NormUse, Projections
from .weight_grads import WeightGrads

Heads = tuple[Tensor, Tensor, Tensor]


class AttentionHalf:
    """One pass over the attention half.

    Args:
        call: the call.
        weights: the half's weights, projections in the compute dtype.
        inputs: the call's side inputs.
        x: `[tokens, h]`, the half's input; None where nothing reads it again.
        kept: what an earlier pass kept, by name (see `keep.py`); only read.
        keep: names that this pass is to leave in `values`.
        adapters: the block's.
    """

    def __init__(
        self,
        call: Call,
        weights: Weights,
        inputs: Inputs,
        x: Tensor | None,
        kept: Mapping[str, Tensor],
        keep: Set[str] = frozenset(),
        adapters: Adapters = (),
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
        names = [f"self_attn.{name}_proj" for name in names]
        self.qkv = Projections(call, names, weights, adapters, inputs.seed)
        self.norm = NormUse(call, weights, "attn_norm", kept) if spec.pre_norm else None
        self.branch = Branch(call, weights, "attn", adapters, inputs.seed, kept)
        self.rotates = spec.rope is not None or spec.qk_norm is not None
        self.qk_norms = [weights.get(f"self_attn.{name}_norm.weight") for name in "qk"]
        self.sinks = weights.get("self_attn.sinks")
        self._heads: Heads | None = None
        self._scratch: Tensor | None = None

    def _normed(self, rows: slice) -> Tensor:
        """The normalised input of a chunk, in the compute dtype."""
        x = self.values["x"][rows]
        return x.to(self.call.compute_dtype) if self.norm is None else self.norm.apply(x, rows)

    def heads(self, delta: tuple[Tensor, Tensor, Tensor] | None = None) -> Heads:
        """q, k and v as the attention core takes them: `[batch, seq_len, heads, (v_)head_dim]`.

        A kept `qkv` is never written: q and k are then rotated into scratch. A `qkv` that is not
        kept is this pass's own scratch, and is rotated where it stands, unless qk-norm's
        backward will want it as it was.

        Args:
            delta: `(attn_out, dout, delta)`: both as `attn_out()` is, and `[tokens, heads]`, which
                is written with rowsum(O o dO) in the same pass.
        """
        call, spec, ops = self.call, self.spec, self.call.ops
        if self._heads is not None or not self.rotates:
            if delta is not None:
                ops.attention_delta(*delta, spec.qk_spec)
            delta = None
        if self._heads is not None:
            return self._heads
        tokens = call.batch_size * call.seq_len
        qkv = self.values.get("qkv")
        project = qkv is None
        if qkv is None:
            like = self.values["x"]
            qkv = like.new_empty(tokens, spec.qkv_size, dtype=call.compute_dtype)
            if "qkv" in self.keep or spec.qk_norm:
                self.values["qkv"] = qkv
        qk_size = spec.q_size + spec.kv_size
        if self.rotates and "qkv" in self.values:
            # As wide as qkv: with other strides the attention core could round differently.
            self._scratch = torch.empty_like(qkv)
        elif "qkv" not in self.values:
            self._scratch = qkv
        qk = (qkv if self._scratch is None else self._scratch)[:, :qk_size]
        cos, sin = self._angles
        names = ("attn_out", "dout", "delta")
        for rows in call.chunks():
            if project:
                self.qkv.forward(self._normed(rows), rows, qkv[rows])
            if self.rotates:
                parts = {n: t[rows] for n, t in zip(names, delta or (), strict=False)}
                ops.qk_rope_forward(
                    qkv[rows, :qk_size],
                    None if cos is None else cos[rows],
                    None if sin is None else sin[rows],
                    *self.qk_norms,
                    spec.qk_spec,
                    qk[rows],
                    **parts,
                )
        if self.norm is not None and self.norm.statistics is not None:
            self.values["attn_norm_stats"] = self.norm.statistics
        q, k = qk.split([spec.q_size, spec.kv_size], -1)
        v = qkv[:, qk_size:]
        head_dim, v_head_dim = spec.head_dim, spec.v_head_dim
        self._heads = self._split(q, head_dim), self._split(k, head_dim), self._split(v, v_head_dim)
        return self._heads

    def _split(self, x: Tensor, head_dim: int) -> Tensor:
        return x.view(self.call.batch_size, self.call.seq_len, -1, head_dim)

    @cached_property
    def _angles(self) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """cos and sin, one row a token: `[tokens, rotary_dim]`; None without RoPE."""
        if self.spec.rope is None:
            return None, None
        cos, sin = self.inputs.cos, self.inputs.sin
        if cos is None or sin is None:
            cos, sin = self._default_angles()
        if cos.dtype == torch.float64:  # more than the rotation computes in, unless that is fp64
            high = accumulate_dtype(self.call.compute_dtype)
            cos, sin = cos.to(high), sin.to(high)
        shape = (self.call.batch_size, -1, -1)
        return cos.expand(shape).flatten(0, 1), sin.expand(shape).flatten(0, 1)

    def _default_angles(self) -> tuple[Tensor, Tensor]:
        """cos and sin of positions that count from 0 in each sequence: made anew, never kept."""
        call, cu_seqlens = self.call, self.inputs.cu_seqlens
        assert self.spec.rope is not None and self.spec.rope_theta is not None
        first = call.context.rank * call.seq_len if call.context else 0
        device = self.qkv.weights[0].device
        positions = torch.arange(first, first + call.seq_len, device=device)
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

    def attn_out(self) -> Tensor:
        """The attention's output, `[tokens, heads * v_head_dim]`; its LSE lands beside it."""
        if "attn_out" not in self.values:
            out, lse = self.call.core.attention_forward(
                *self.heads(),
                self.call.mask,
                sinks=self.sinks,
                bias=self.inputs.attention_mask,
                cu_seqlens=self.inputs.cu_seqlens,
                seed=self.inputs.seed,
            )
            self.values["attn_out"], self.values["lse"] = out.flatten(2).flatten(0, 1), lse
        return self.values["attn_out"]

    def projected(self) -> Tensor:
        """With a post-norm: what it reads, `[tokens, h]`."""
        if "attn_branch" not in self.values:
            attn_out = self.attn_out()
            x = self.values["x"] if self.spec.norm_after_residual else None
            parts = [
                self.branch.project(attn_out[rows], None if x is None else x[rows], rows)
                for rows in self.call.chunks()
            ]
            self.values["attn_branch"] = torch.cat(parts)
        return self.values["attn_branch"]

    def mid(self) -> Tensor:
        """The residual between the halves, `[tokens, h]`."""
        if "mid" not in self.values:
            after = self.spec.norm_after_residual
            x = self.projected() if after else self.values["x"]
            mid = torch.empty_like(x)
            for rows in self.call.chunks():
                if after:
                    self.branch.finish(x[rows], None, rows, mid[rows])
                elif self.branch.post is not None:
                    self.branch.finish(self.projected()[rows], x[rows], rows, mid[rows])
                else:
                    self.branch.forward(x[rows], self.attn_out()[rows], rows, mid[rows])
            if self.branch.post is not None and self.branch.post.statistics is not None:
                self.values["attn_post_norm_stats"] = self.branch.post.statistics
            self.values["mid"] = mid
        return self.values["mid"]

    def backward(
        self, dmid: Tensor, needs: Needs, grads: WeightGrads, dsum: Tensor | None = None
    ) -> Tensor | None:
        """The gradient of x, and those of the weights.

        Args:
            dmid: `[tokens, h]`, the gradient of the half's output; only read.
            needs: what this half has to give.
            grads: where the weights' gradients go.
            dsum: `[tokens, h]`, what x gets beside the half's gradient; None: dmid, or what comes
                through a norm after the residual.

        Returns:
            `[tokens, h]` in dmid's dtype, or None where x wants none.
        """
        call, spec = self.call, self.spec
        tokens = dmid.shape[0]
        attn_out = self.attn_out() if needs.inner or needs.out else None
        dout = dmid.new_empty(tokens, spec.attn_out_size, dtype=call.compute_dtype)
        residual = dmid if dsum is None else dsum
        after = torch.empty_like(dmid) if spec.norm_after_residual and needs.branch else None
        if after is not None:
            residual = after
        for rows in call.chunks():
            projected = self.projected()[rows] if spec.post_norm else None
            place = None if after is None else after[rows]
            dy = self.branch.backward(dmid[rows], projected, rows, needs, grads, place)
            if dy is not None and attn_out is not None:
                u = self.branch.narrow(dy, needs.inner, grads)
                if needs.out:
                    self.branch.backward_weight(dy, u, attn_out[rows], rows, grads)
                if needs.inner:
                    self.branch.backward_input(dy, u, rows, dout[rows])
        if not needs.inner:
            return None
        assert attn_out is not None
        delta = self._new_delta(dout)
        heads = self.heads(None if delta is None else (attn_out, dout, delta))
        by_head = None  # [batch, heads, seq_len], as LSE is
        if delta is not None:
            by_head = delta.view(call.batch_size, call.seq_len, -1).transpose(1, 2)
        *dheads, dsinks = call.core.attention_backward(
            self._split(dout, spec.v_head_dim),
            *heads,
            self._split(attn_out, spec.v_head_dim),
            self.values["lse"],
            call.mask,
            delta=by_head,
            sinks=self.sinks,
            bias=self.inputs.attention_mask,
            cu_seqlens=self.inputs.cu_seqlens,
            seed=self.inputs.seed,
            dq=None if self._scratch is None else heads[0],
            need_dsinks="self_attn.sinks" in grads.wanted,
        )
        grads.add("self_attn.sinks", dsinks)
        in_place = dheads[0] is heads[0]
        parts = [part.flatten(2).flatten(0, 1) for part in dheads]
        del dout, heads, dheads
        self._heads = None  # roped q and k are not read again
        if in_place and self._scratch is not None:  # the gradient of q stands there already
            widths = spec.kv_size, spec.v_size
            for room, part in zip(
                self._scratch[:, spec.q_size :].split(widths, -1), parts[1:], strict=True
            ):
                room.copy_(part)
            parts = [self._scratch]
        return self._backward_qkv(residual, parts, needs, grads)

    def _new_delta(self, dout: Tensor) -> Tensor | None:
        """Room for delta, `[tokens, heads]`, tokens side by side as the attention kernels read
        them; None where the attention core makes its own."""
        if not self.call.core.needs_delta(self.call.attention_request(self.inputs, dout.device)):
            return None
        return dout.new_empty(
            self.spec.num_attention_heads, len(dout), dtype=accumulate_dtype(dout.dtype)
        ).t()

    def _backward_qkv(
        self, residual: Tensor, parts: list[Tensor], needs: Needs, grads: WeightGrads
    ) -> Tensor | None:
        """From the gradients of roped q and k, and of v, to the half's input.

        Args:
            residual: `[tokens, h]`, the gradient that passes the half by.
            parts: `[tokens, width]` each: the gradients of q, k and v, or one of all, which is
                overwritten.
            needs: what this half has to give.
            grads: where the weights' gradients go.
        """
        call, spec = self.call, self.spec
        cos, sin = self._angles
        dx = torch.empty_like(residual) if needs.input else None
        qk_size = spec.q_size + spec.kv_size
        names = [f"self_attn.{name}_norm.weight" for name in "qk"]
        room = None
        if len(parts) > 1:  # for the gradients side by side, of a chunk at a time
            room = residual.new_empty(
                min(len(residual), call.chunk_size), spec.qkv_size, dtype=call.compute_dtype
            )
        for rows in call.chunks():
            dqkv = parts[0][rows]
            if room is not None:
                dqkv = room[: len(dqkv)]
                torch.cat([part[rows] for part in parts], -1, out=dqkv)
            if self.rotates:
                dweights = call.ops.qk_rope_backward(
                    dqkv[:, :qk_size],
                    self.values["qkv"][rows, :qk_size] if spec.qk_norm else None,
                    None if cos is None else cos[rows],
                    None if sin is None else sin[rows],
                    *self.qk_norms,
                    spec.qk_spec,
                    need_dweights=tuple(name in grads.wanted for name in names),
                )
                for name, dweight in zip(names, dweights, strict=True):
                    grads.add(name, dweight)
            self.qkv.backward_biases(dqkv, grads)
            normed = None
            u = self.qkv.narrow(dqkv, needs.input or needs.norm, grads)
            if needs.input or needs.norm:
                dnormed = self.qkv.backward_input(dqkv, u, rows)
                dpart = None if dx is None else dx[rows]
                if self.norm is not None:
                    x = self.values["x"][rows]
                    normed = torch.empty_like(dnormed) if needs.projections else None
                    passed = residual[rows] if call.residual else None
                    self.norm.backward(
                        dnormed, x, rows, grads, residual=passed, dx=dpart, normed=normed
                    )
                elif dpart is not None:
                    torch.add(residual[rows], dnormed, out=dpart)
            if needs.projections:
                normed = self._normed(rows) if normed is None else normed
                self.qkv.backward_weights(dqkv, u, normed, rows, grads)
        return dx
