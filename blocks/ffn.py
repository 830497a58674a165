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

import torch
from torch import Tensor

from backfuse.kernels.reference.activation import activation_backward, activation_forward

from .call import Branch, Call, Inputs, NormUse, Projections, WeightGrads, Weights
from .keep import Needs


class FFNHalf:
    """One pass over the FFN half.

    Args:
        call: the call.
        weights: the half's weights, projections in the compute dtype.
        inputs: the call's side inputs.
        kept: what an earlier pass kept, by name (see `keep.py`); only read.
    """

    def __init__(
        self, call: Call, weights: Weights, inputs: Inputs, kept: Mapping[str, Tensor]
    ) -> None:
        self.call = call
        self.spec = spec = call.spec
        self.kept = kept
        if spec.stacked_gate_up:
            names = ["gate_up"]
        else:
            names = ["gate", "up"] if spec.gated else ["up"]
        self.ups = Projections([f"mlp.{name}_proj" for name in names], weights)
        self.norm = NormUse(spec, weights, "ffn_norm") if spec.pre_norm else None
        self.branch = Branch(call, weights, "ffn", inputs.seed)

    def _normed(self, mid: Tensor, statistics: Tensor | None) -> Tensor:
        """The normalised input of a chunk, in the compute dtype."""
        if self.norm is not None:
            assert statistics is not None
            mid = self.norm.apply(mid, statistics)
        return mid.to(self.call.compute_dtype)

    def _scratch(self, like: Tensor, width: int) -> Tensor:
        """One chunk's worth of scratch, reused for all chunks."""
        rows = min(self.call.chunk_size, like.shape[0])
        return like.new_empty(rows, width, dtype=self.call.compute_dtype)

    def forward(
        self, mid: Tensor, keep: Set[str] = frozenset()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The half's output, the first time or again: what was kept is read, not computed.

        Args:
            mid: `[tokens, h]`.
            keep: names to leave in the second result.

        Returns:
            z `[tokens, h]`, and what is kept.
        """
        call, spec, post = self.call, self.spec, self.branch.post
        widths = {"preact": spec.preact_size, "ffn_branch": spec.hidden_size}
        out = {
            name: mid.new_empty(len(mid), width, dtype=call.compute_dtype)
            for name, width in widths.items()
            if name in keep
        }
        stats: dict[str, list[Tensor]] = {"ffn_norm_stats": [], "ffn_post_norm_stats": []}
        scratch = self._scratch(mid, spec.preact_size)
        z = torch.empty_like(mid)
        for rows in call.chunks():
            part, projected = mid[rows], None
            if "ffn_branch" in self.kept:
                projected = self.kept["ffn_branch"][rows]
            else:
                target = out["preact"][rows] if "preact" in out else scratch[: len(part)]
                preact, statistics = self._preact(part, rows, target)
                hidden = activation_forward(preact, spec.hidden_act, spec.gated)
                stats["ffn_norm_stats"].append(statistics)
                if post is None:
                    self.branch.forward(part, hidden, rows.start, z[rows])
                    continue
                projected = self.branch.project(hidden)
            assert post is not None
            statistics = post.statistics(projected)
            stats["ffn_post_norm_stats"].append(statistics)
            self.branch.add(part, projected, statistics, rows.start, z[rows])
            if "ffn_branch" in out:
                out["ffn_branch"][rows] = projected
        for name, parts in stats.items():
            if name in keep:
                out[name] = torch.cat(parts, -1)
        return z, out

    def _preact(self, mid: Tensor, rows: slice, target: Tensor) -> tuple[Tensor, Tensor]:
        """A chunk's pre-activation (kept, or made in `target`) and its norm's statistics."""
        statistics = mid.new_empty(1, len(mid))
        if self.norm is not None:
            stats = self.kept.get("ffn_norm_stats")
            statistics = self.norm.statistics(mid) if stats is None else stats[:, rows]
        if "preact" in self.kept:
            return self.kept["preact"][rows], statistics
        return self.ups.forward(self._normed(mid, statistics), target), statistics

    def backward(
        self, mid: Tensor | None, dz: Tensor, needs: Needs, grads: WeightGrads
    ) -> Tensor | None:
        """The gradient of mid, and those of the weights.

        Args:
            mid: `[tokens, h]`; None where nothing reads it.
            dz: `[tokens, h]`, the gradient of the half's output; only read.
            needs: what this half has to give.
            grads: where the weights' gradients go.

        Returns:
            `[tokens, h]` in dz's dtype, or None where mid wants none.
        """
        spec, kept, post = self.spec, self.kept, self.branch.post
        dmid = torch.empty_like(dz) if needs.input else None
        scratch = self._scratch(dz, spec.preact_size)
        reads_preact = needs.inner or needs.out or (post is not None and "ffn_branch" not in kept)
        rebuild = reads_preact and "preact" not in kept
        for rows in self.call.chunks():
            # [chunk, ...] each, and None where no wanted gradient reads it
            part = None if mid is None else mid[rows]
            stats = kept["ffn_norm_stats"][:, rows] if "ffn_norm_stats" in kept else None
            target = scratch[: rows.stop - rows.start]
            normed = preact = projected = post_stats = None
            if part is not None and (rebuild or needs.projections):
                normed = self._normed(part, stats)
            if normed is not None and rebuild:
                preact = self.ups.forward(normed, target)
            elif reads_preact:
                preact = kept["preact"][rows]
            if post is not None:
                post_stats = kept["ffn_post_norm_stats"][:, rows]
                projected = self._projected(rows, preact)
            dy = self.branch.backward(dz[rows], projected, post_stats, rows.start, needs, grads)
            if dy is None or preact is None:
                continue
            if not self._backward_activation(dy, preact, target, needs, grads):
                continue
            self.ups.backward_weights(target, normed if needs.projections else None, grads)
            if not (needs.input or needs.norm):
                continue
            dpart: Tensor | None = self.ups.backward_input(target)
            if self.norm is not None:
                assert dpart is not None and part is not None and stats is not None
                dpart = self.norm.backward(dpart, part, stats, grads, needs.input)
            if dmid is not None and dpart is not None:
                torch.add(dz[rows], dpart, out=dmid[rows])
        return dmid

    def _projected(self, rows: slice, preact: Tensor | None) -> Tensor:
        """What the post-norm read in a chunk: kept, or made from the pre-activation."""
        if "ffn_branch" in self.kept:
            return self.kept["ffn_branch"][rows]
        assert preact is not None
        hidden = activation_forward(preact, self.spec.hidden_act, self.spec.gated)
        return self.branch.project(hidden)

    def _backward_activation(
        self, dy: Tensor, preact: Tensor, target: Tensor, needs: Needs, grads: WeightGrads
    ) -> bool:
        """Down projection and activation; whether `target` now holds preact's gradient."""
        spec = self.spec
        if not needs.inner:
            hidden = activation_forward(preact, spec.hidden_act, spec.gated)
            self.branch.backward_weight(dy, hidden, grads)
            return False
        dhidden = self.branch.backward_input(dy)
        hidden = activation_backward(dhidden, preact, spec.hidden_act, spec.gated, target)
        if needs.out:
            self.branch.backward_weight(dy, hidden, grads)
        return True
