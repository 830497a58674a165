"""The FFN half: `z = mid + Wdown(act(Wgate n) * (Wup n))`, `n = norm(mid)`, and its backward.

| kept | recomputed | GEMMs in backward |
|---|---|---|
| mid, preact if the policy keeps it, norm statistics | n and the activated hidden: always;
preact otherwise | 6 (gated), 8 where preact is rebuilt; plain 4 and 5 |

Both passes walk over chunks of tokens, so that their scratch is O(chunk * f), never
O(tokens * f). A kept preact is only read: the gradient of the pre-activation goes to scratch.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from backfuse.kernels.reference.dropout import dropout_rows_
from backfuse.kernels.reference.fp8 import DTYPE as FP8

from .call import SITES, Call, Inputs, Weights
from .keep import Needs
from .lora import Adapters
from .parts import Branch, NormUse, Projections
from .weight_grads import WeightGrads


class FFNHalf:
    """One pass over the FFN half.

    Args:
        call: the call.
        weights: the half's weights, projections in the compute dtype.
        inputs: the call's side inputs.
        kept: what an earlier pass kept, by name (see `keep.py`); only read.
        adapters: the block's.
    """

    def __init__(
        self,
        call: Call,
        weights: Weights,
        inputs: Inputs,
        kept: Mapping[str, Tensor],
        adapters: Adapters = (),
    ) -> None:
        self.call = call
        self.spec = spec = call.spec
        self.kept = kept
        if spec.stacked_gate_up:
            names = ["gate_up"]
        else:
            names = ["gate", "up"] if spec.gated else ["up"]
        names = [f"mlp.{name}_proj" for name in names]
        self.ups = Projections(call, names, weights, adapters, inputs.seed)
        self.activation = (spec.hidden_act, spec.gated)
        self.norm = NormUse(call, weights, "ffn_norm", kept) if spec.pre_norm else None
        self.branch = Branch(call, weights, "ffn", adapters, inputs.seed, kept)
        self.p = spec.activation_dropout if call.dropout else 0.0
        self.seed = inputs.seed

    def _drop(self, x: Tensor, rows: slice) -> Tensor:
        """Dropout of the hidden in place, or of what is linear in its gradient."""
        if not self.p:
            return x
        assert self.seed is not None
        return dropout_rows_(x, self.seed, self.p, rows.start, SITES["hidden"])

    def _normed(self, mid: Tensor, rows: slice) -> Tensor:
        """The normalised input of a chunk, in the compute dtype."""
        if self.norm is None:
            return mid.to(self.call.compute_dtype)
        return self.norm.apply(mid, rows)

    def _activate(self, normed: Tensor | None, rows: slice, **written: Tensor | None) -> Tensor:
        """The hidden, from the normed input of a chunk; `written` as `ffn_up` takes it."""
        assert normed is not None
        products = self.ups.low_rank.forward(normed, rows)
        return self.call.ops.ffn_up(*self._up(normed), products=products, **written)

    def _up(
        self, normed: Tensor | None
    ) -> tuple[Tensor, list[Tensor], list[Tensor | None], str, bool]:
        """The arguments that the operations on the first projections share."""
        assert normed is not None
        return (normed, self.ups.weights, self.ups.biases, *self.activation)

    def forward(
        self, mid: Tensor, residual: Tensor, keep: Set[str] = frozenset()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The half's output, the first time or again: what was kept is read, not computed.

        A preact kept in eight bits is not read here: the output has to be the first one's.

        Args:
            mid: `[tokens, h]`, the half's input; with a parallel residual that is x.
            residual: `[tokens, h]`, what the half's output is added to.
            keep: names to leave in the second result.

        Returns:
            z `[tokens, h]`, and what is kept.
        """
        call, spec, kept, ops = self.call, self.spec, self.kept, self.call.ops
        compute = call.compute_dtype
        layout = {
            "preact": (spec.preact_size, FP8 if "preact_scales" in keep else compute),
            "preact_scales": (spec.preact_scales, torch.float32),
            "ffn_branch": (spec.hidden_size, mid.dtype if spec.norm_after_residual else compute),
        }
        out = {
            name: mid.new_empty(len(mid), width, dtype=dtype)
            for name, (width, dtype) in layout.items()
            if name in keep
        }
        z = torch.empty_like(mid)
        for rows in call.chunks():
            beside = residual[rows]
            if "ffn_branch" in kept:
                self.branch.finish(kept["ffn_branch"][rows], beside, rows, z[rows])
                continue
            if "preact" in kept and "preact_scales" not in kept:
                hidden = ops.activation_forward(kept["preact"][rows], *self.activation)
            else:
                hidden = self._activate(
                    self._normed(mid[rows], rows),
                    rows,
                    preact=out["preact"][rows] if "preact" in out else None,
                    scales=out["preact_scales"][rows] if "preact_scales" in out else None,
                )
            hidden = self._drop(hidden, rows)
            if self.branch.post is None:
                self.branch.forward(beside, hidden, rows, z[rows])
                continue
            projected = self.branch.project(hidden, beside, rows)
            self.branch.finish(projected, beside, rows, z[rows])
            if "ffn_branch" in out:
                out["ffn_branch"][rows] = projected
        norms = {"ffn_norm_stats": self.norm, "ffn_post_norm_stats": self.branch.post}
        for name, norm in norms.items():
            if name in keep and norm is not None and norm.statistics is not None:
                out[name] = norm.statistics
        return z, out

    def backward(
        self, mid: Tensor | None, dz: Tensor, needs: Needs, grads: WeightGrads
    ) -> Tensor | None:
        """The gradient of mid, and those of the weights.

        Args:
            mid: `[tokens, h]`, the half's input; None where nothing reads it.
            dz: `[tokens, h]`, the gradient of the half's output; only read.
            needs: what this half has to give.
            grads: where the weights' gradients go.

        Returns:
            `[tokens, h]` in dz's dtype, dz included, or None where mid wants none.
        """
        call, spec, kept = self.call, self.spec, self.kept
        dmid = torch.empty_like(dz) if needs.input else None
        chunk = min(call.chunk_size, len(dz))
        scratch = dz.new_empty(chunk, spec.preact_size, dtype=call.compute_dtype)
        post = self.branch.post
        reads_preact = needs.inner or needs.out or (post is not None and "ffn_branch" not in kept)
        for rows in call.chunks():
            # [chunk, ...] each, and None where no wanted gradient reads it
            part = None if mid is None else mid[rows]
            dpreact = scratch[: rows.stop - rows.start]
            preact = kept["preact"][rows] if reads_preact and "preact" in kept else None
            scales = kept["preact_scales"][rows] if "preact_scales" in kept else None
            normed = hidden = projected = None
            if part is not None and reads_preact and preact is None:
                normed = self._normed(part, rows)
            if post is not None:
                if normed is None:
                    projected = kept["ffn_branch"][rows]
                else:
                    preact = dpreact
                    hidden = self._drop(self._activate(normed, rows, preact=preact), rows)
                    projected = self.branch.project(hidden, part, rows)
            residual, dsum = dz[rows], None
            if spec.norm_after_residual and needs.branch:
                residual = dsum = torch.empty_like(residual)
            dy = self.branch.backward(dz[rows], projected, rows, needs, grads, dsum)
            if dy is None or not (needs.inner or needs.out):
                continue
            u = self.branch.narrow(dy, needs.inner, grads)
            if needs.inner:
                hidden = self._backward_activation(
                    self.branch.scaled(dy), u, normed, preact, scales, dpreact, rows, needs, grads
                )
            elif hidden is None and preact is not None:
                hidden = call.ops.activation_forward(preact, *self.activation, scales, dy.dtype)
                hidden = self._drop(hidden, rows)
            elif hidden is None:
                hidden = self._drop(self._activate(normed, rows), rows)
            if hidden is not None:
                self.branch.backward_weight(dy, u, hidden, rows, grads)
            if needs.inner:
                hidden = None
                dpart = None if dmid is None else dmid[rows]
                self._backward_input(dpreact, part, normed, residual, dpart, rows, needs, grads)
        return dmid

    def _backward_activation(
        self,
        dy: Tensor,
        u: Tensor | None,
        normed: Tensor | None,
        preact: Tensor | None,
        scales: Tensor | None,
        dpreact: Tensor,
        rows: slice,
        needs: Needs,
        grads: WeightGrads,
    ) -> Tensor | None:
        """Down projection and activation: writes dpreact, gives the hidden."""
        want_biases = self.ups.want_biases(grads)
        wanted: dict[str, Any] = {
            "need_hidden": needs.out, "need_dbias": want_biases and not self.p,
            **self.branch.low_rank.input_terms(u, rows),
        }  # fmt: skip
        down = self.branch.weight
        if preact is None:
            assert normed is not None
            wanted["products"] = self.ups.low_rank.forward(normed, rows)
            hidden, dbias = self.call.ops.ffn_recompute_dact(
                *self._up(normed), dy, down, dpreact, strategy=self.call.ffn_strategy, **wanted
            )
        else:
            hidden, dbias = self.call.ops.ffn_dact(
                dy, down, preact, *self.activation, dpreact, scales=scales, **wanted
            )
        if self.p:  # dpreact is linear in the hidden's gradient: what drops out there is 0 here
            for part in dpreact.chunk(2 if self.spec.gated else 1, -1):
                self._drop(part, rows)
            hidden = None if hidden is None else self._drop(hidden, rows)
            if want_biases:
                self.ups.backward_biases(dpreact, grads)
        if dbias is not None:
            self.ups.add_biases(dbias, grads)
        return hidden

    def _backward_input(
        self,
        dpreact: Tensor,
        mid: Tensor | None,
        normed: Tensor | None,
        residual: Tensor,
        dmid: Tensor | None,
        rows: slice,
        needs: Needs,
        grads: WeightGrads,
    ) -> None:
        """First projections and norm: writes dmid, adds to the weights' gradients."""
        u = self.ups.narrow(dpreact, needs.input or needs.norm, grads)
        if needs.input or needs.norm:
            dnormed = self.ups.backward_input(dpreact, u, rows)
            if self.norm is not None:
                assert mid is not None
                again = None
                if needs.projections and normed is None:
                    normed = again = torch.empty_like(dnormed)
                passed = residual if self.call.residual else None
                self.norm.backward(
                    dnormed, mid, rows, grads, residual=passed, dx=dmid, normed=again
                )
            elif dmid is not None:
                torch.add(residual, dnormed, out=dmid)
        if needs.projections:
            if normed is None:
                assert mid is not None
                normed = self._normed(mid, rows)
            self.ups.backward_weights(dpreact, u, normed, rows, grads)
