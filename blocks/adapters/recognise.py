"""From a live layer to a `BlockSpec` and the places of its parameters: one rule for all families.

A layer is read from what a copy of it does (see `stand_in.py`), not from names:

- Its projections, in the order in which they run, fall into groups that read the same input:
  q, k and v (or one for all); o; gate and up (or one for both, or up alone); down.
- Norms of the residual's width stand before the first group, between o and the third, and behind
  the last; how many stand where says what they are. Norms that read a projection of the first
  group are qk-norms.
- The activation is the one that takes the outputs of the third group to the input of down.
- Dropout is told by what it was handed.

What cannot be seen in that way (how q, k and v lie in one projection, how positions enter, whether
the halves stand side by side) is guessed, and each guess is held against the layer's own output:
see `verify.py`. A guess that is wrong cannot pass, so a family nobody has heard of is either
understood or left alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.spec import LAYER_SCALE, BlockSpec
from backfuse.kernels.reference.activation import ACTIVATIONS
from backfuse.kernels.reference.norm import NormSpec

from .attributes import NotUnderstood, attribute, head_dim
from .norms import is_norm, norm_spec
from .projections import Projection, projection
from .stand_in import Observation, Seen

#: Norms before the attention, between the halves, and behind the FFN -> what a layer may then be.
ORDERS: dict[tuple[int, int, int], list[dict[str, Any]]] = {
    (1, 1, 0): [{}, {"parallel_residual": True}],
    (1, 2, 1): [
        {"norm_position": "both"},
        {"norm_position": "both", "parallel_residual": True},
    ],
    (0, 1, 1): [{"norm_position": "post"}, {"norm_position": "after_residual"}],
    (1, 0, 0): [{"parallel_residual": True, "shared_norm": True}],
}


@dataclass(frozen=True)
class Guess:
    """One reading of a layer.

    Attributes:
        spec: what it is.
        names: the spec's parameters -> the live parameters, by their path in the layer.
        rest: where only the attention half is read: paths of the norm behind it, and of the module
            of the layer's own that reads that; None for a whole block.
    """

    spec: BlockSpec
    names: dict[str, str]
    rest: tuple[str, str] | None = None


def _is_softmax(x: Tensor) -> bool:
    """Whether rows are weights: at most 1 in sum (a sink takes a share), and none below 0."""
    return bool((x >= 0).all() and (x.sum(-1) <= 1 + 1e-4).all())


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@dataclass(frozen=True)
class Group:
    """Projections that ran one after another on the same input."""

    members: tuple[Seen, ...]

    @property
    def parts(self) -> list[Projection]:
        """What they are made of."""
        return [part for seen in self.members if (part := projection(seen.module))]

    @property
    def outs(self) -> list[int]:
        """Their widths."""
        return [seen.y.shape[-1] for seen in self.members]

    def biased(self) -> bool:
        """Whether they have biases: all of them, or none."""
        biases = {part.bias is not None for part in self.parts}
        if len(biases) > 1:
            raise NotUnderstood(
                f"only some of {', '.join(seen.path for seen in self.members)} have a bias"
            )
        return biases.pop()


def _groups(projections: Iterable[Seen]) -> list[Group]:
    grouped = itertools.groupby(projections, lambda seen: (_storage(seen.x), seen.x.data_ptr()))
    return [Group(tuple(members)) for _, members in grouped]


class Reading:
    """What is read from an observation.

    Args:
        layer: the stand-in.
        seen: what it did.

    Raises:
        NotUnderstood: with the reason.
    """

    def __init__(self, layer: nn.Module, seen: Observation) -> None:
        self.layer, self.seen = layer, seen
        self.width = seen.x.shape[-1]
        self.head_dim = head_dim(layer, self.width)
        groups = _groups([s for s in seen.modules if projection(s.module)])
        paths = [member.path for group in groups for member in group.members]
        if len(set(paths)) < len(paths):
            raise NotUnderstood("a projection runs more than once")
        if len(groups) < 2:
            raise NotUnderstood("fewer than two groups of plain projections ran")
        self.qkv, self.o = groups[:2]
        self.ffn = groups[2:]
        if len(self.qkv.members) not in (1, 3) or len(self.o.members) != 1:
            raise NotUnderstood("its projections do not begin with q, k, v (or one of all) and o")
        norms = [s for s in seen.modules if is_norm(s.module)]
        first = [_storage(member.y) for member in self.qkv.members]
        self.qk_norms = [s for s in norms if s.order < self._o.order and _storage(s.x) in first]
        self.norms = [s for s in norms if s not in self.qk_norms]
        if any(s.x.shape[-1] != self.width for s in self.norms):
            raise NotUnderstood("a norm is neither of the residual's width nor one of q or k")

    @property
    def _o(self) -> Seen:
        return self.o.members[0]

    def _norm_fields(self) -> dict[str, Any]:
        """Fields that say how the norms compute; all have to do so in the same way."""
        specs = {path: norm_spec(module) for path, module in
                 ((s.path, s.module) for s in self.norms)}  # fmt: skip
        unknown = [path for path, spec in specs.items() if spec is None]
        if unknown:
            raise NotUnderstood(f"{unknown[0]} is neither an RMSNorm nor a LayerNorm")
        kinds = set(specs.values())
        biased = {getattr(s.module, "bias", None) is not None for s in self.norms}
        if len(kinds) != 1 or len(biased) != 1:
            raise NotUnderstood("its norms are unlike each other")
        [spec] = kinds
        assert spec is not None
        return {
            "norm": spec.kind,
            "norm_eps": spec.eps,
            "norm_offset": spec.offset,
            "norm_round_first": spec.round_first,
            "norm_bias": biased.pop(),
        }

    def _qk_norm(self, spec: dict[str, Any], q_size: int) -> str | None:
        if not self.qk_norms:
            return None
        like = NormSpec("rmsnorm", spec["norm_eps"], spec["norm_offset"], spec["norm_round_first"])
        for seen in self.qk_norms:
            if norm_spec(seen.module) != like or getattr(seen.module, "bias", None) is not None:
                raise NotUnderstood(f"{seen.path} is not an RMSNorm as the block's other norms")
        if len(self.qk_norms) != 2:
            raise NotUnderstood("one norm on q and k, expected two")
        if self.qk_norms[0].x.shape[-1] == self.head_dim:
            return "head"
        if self.qk_norms[0].x.shape[-1] == q_size:
            return "full"
        raise NotUnderstood("the norms on q and k are as wide as neither a head nor all heads")

    def _attention_fields(self) -> dict[str, Any]:
        """Heads, biases and scores."""
        head, [q, *others] = self.head_dim, self.qkv.outs
        o_width = self._o.x.shape[-1]
        if others:
            q_size, kv_size = q, others[0]
        else:
            q_size, kv_size = o_width, (q - o_width) // 2
        if q_size % head or kv_size % head or o_width != q_size:
            raise NotUnderstood(f"heads of {head} channels do not fill its projections")
        softcap = attribute(self.layer, ("attn_logit_softcapping",))
        scale = attribute(self.layer, ("scaling", "scale"), float)
        window = attribute(self.layer, ("sliding_window",), int)
        causal = any(getattr(m, "is_causal", False) for m in self.layer.modules())
        sinks = [n for n, p in self.layer.named_parameters() if n.endswith(".sinks")]
        factor = getattr(self.layer, "residual_multiplier", 1.0)
        return {
            "residual_multiplier": float(factor),
            "hidden_size": self.width,
            "num_attention_heads": q_size // head,
            "num_key_value_heads": kv_size // head,
            "head_dim": head,
            "qkv_bias": self.qkv.biased(),
            "o_bias": self.o.biased(),
            "stacked_qkv": not others,
            "conv1d": self._transposed(),
            "attn_logit_softcapping": softcap,
            "attention_scale": head**-0.5 if scale is None else scale,
            "causal": bool(causal),
            "sliding_window": window if causal else None,
            "attention_sinks": bool(sinks),
        }

    def _transposed(self) -> bool:
        """Whether weights are `[in, out]`: all of them, or none."""
        kinds = {part.transposed for group in (self.qkv, self.o, *self.ffn) for part in group.parts}
        if len(kinds) > 1:
            raise NotUnderstood("only some of its weights are [in, out]")
        return kinds.pop()

    def _qkv_layouts(self) -> list[dict[str, Any]]:
        """How the rows of one projection for q, k and v may be ordered."""
        if len(self.qkv.members) > 1 or self._transposed():
            return [{}]
        return [{}, {"qkv_per_head": True}]

    def _outs(self) -> list[Seen]:
        """The last projection of each half."""
        return [self._o, *(group.members[0] for group in self.ffn[-1:])]

    def _scales(self) -> list[Seen]:
        """Layer scales: modules with one vector that read a half's output, in the halves' order."""
        found = []
        for out in self._outs():
            found += [
                seen
                for seen in self.seen.modules
                if _storage(seen.x) == _storage(out.y)
                and not is_norm(seen.module)
                and [p.shape for p in seen.module.parameters()] == [(self.width,)]
            ]
        if len(found) not in (0, len(self._outs())):
            raise NotUnderstood("only one of its halves has a layer scale")
        return found

    def _dropout_fields(self) -> dict[str, Any]:
        """Probabilities; a layer that drops out something else is not understood."""
        scores = set(self.seen.score_dropout) - {0.0}
        halves: dict[int, float] = {}
        outs = self._outs()
        hidden: set[float] = set()
        places: list[int] = []
        for p, x in self.seen.dropped:
            places.append(_storage(x))
            if self.ffn and _storage(x) == _storage(self.ffn[1].members[0].x):
                hidden.add(p)
                continue
            if x.dim() == 4 and x.shape[-2] == x.shape[-1] and _is_softmax(x):
                scores.add(p)
                places[-1] = -1  # each softmax has one
                continue
            half = next((i for i, s in enumerate(outs) if _storage(s.y) == _storage(x)), None)
            if half is None:
                raise NotUnderstood(
                    f"it drops out (p = {p}) elsewhere than softmax weights, the FFN's hidden and "
                    "the halves' outputs"
                )
            halves[half] = p
        if len(set(places)) < len(places):
            raise NotUnderstood("it drops out twice in one place")
        unlike = len(set(halves.values())) > 1 or 0 < len(halves) < len(outs)
        if unlike or len(scores) > 1 or len(hidden) > 1:
            raise NotUnderstood("its halves drop out with unlike probabilities")
        return {
            "attention_dropout": scores.pop() if scores else 0.0,
            "residual_dropout": next(iter(halves.values()), 0.0),
            "activation_dropout": hidden.pop() if hidden else 0.0,
        }

    def _activation(self) -> tuple[dict[str, Any], list[Seen]]:
        """Fields of the FFN, and its first projections, the gate before up."""
        up, down = self.ffn
        hidden, outs = down.members[0].x, [seen.y for seen in up.members]
        members = list(up.members)
        f = hidden.shape[-1]
        stacked = len(outs) == 1 and outs[0].shape[-1] == 2 * f
        if stacked:
            outs = list(outs[0].chunk(2, -1))
        if len(down.members) != 1 or len(outs) not in (1, 2) or any(o.shape[-1] != f for o in outs):
            raise NotUnderstood("its FFN is not up and down, with or without a gate")
        for name, (act, _) in ACTIVATIONS.items():
            orders = [outs] if len(outs) == 1 or stacked else [outs, outs[::-1]]
            for order in orders:
                made = act(order[0]) if len(order) == 1 else act(order[0]) * order[1]
                if torch.allclose(made, hidden, rtol=1e-5, atol=1e-6):
                    if order is not outs:
                        members.reverse()
                    fields = {
                        "hidden_act": name,
                        "gated": len(outs) == 2,
                        "stacked_gate_up": stacked,
                        "intermediate_size": f,
                        "up_bias": up.biased(),
                        "down_bias": down.biased(),
                    }
                    return fields, members
        raise NotUnderstood(f"its activation is none of {', '.join(ACTIVATIONS)}")

    def _places(self, half: bool) -> tuple[int, int, int]:
        """How many norms stand before the first group, between o and the FFN, and behind that."""
        first = min(member.order for member in self.qkv.members)
        last = self._o.order if half else self.ffn[0].members[0].order
        counts = [0, 0, 0]
        for seen in self.norms:
            counts[0 if seen.order < first else 1 if seen.order < last or half else 2] += 1
        return counts[0], counts[1], counts[2]

    def guesses(self, rotary_dim: int | None, rope: str | None) -> Iterator[Guess]:
        """Readings of the layer that what was seen leaves open.

        Args:
            rotary_dim: of the angles it was given, or None.
            rope: their layout, or None.
        """
        qkv, ffn = self.qkv, self.ffn
        failure: NotUnderstood | None = None  # of the order in which they ran
        for members in self._orders():
            self.qkv, self.ffn = Group(members), ffn
            try:
                if len(ffn) == 2:
                    yield from self._whole_guesses(rotary_dim, rope)
                else:
                    yield self._half_guess(rotary_dim, rope)
            except NotUnderstood as reason:
                failure = reason if members == qkv.members else failure
        self.qkv, self.ffn = qkv, ffn
        if failure is not None:
            raise failure
        if len(ffn) == 2:  # what looks like an FFN may be shared experts beside others
            with suppress(NotUnderstood):
                yield self._half_guess(rotary_dim, rope)
            self.ffn = ffn

    def _orders(self) -> Iterator[tuple[Seen, ...]]:
        """Which of three first projections may be q, k and v; at first in the order they ran in."""
        members = self.qkv.members
        yield from [members] if self.qk_norms else itertools.permutations(members)

    def _whole_guesses(self, rotary_dim: int | None, rope: str | None) -> Iterator[Guess]:
        """Readings of the layer as a whole block."""
        fields = {
            **self._attention_fields(), **self._norm_fields(), **self._dropout_fields(),
            "rope": rope, "rope_theta": None, "layer_scale": bool(self._scales()),
        }  # fmt: skip
        if rotary_dim is not None:
            fields["rotary_dim"] = rotary_dim
        ffn, ups = self._activation()
        fields["qk_norm"] = self._qk_norm(fields, self._o.x.shape[-1])
        counts = self._places(half=False)
        if counts not in ORDERS:
            raise NotUnderstood(
                f"its norms stand {counts[0]} before attention, {counts[1]} between the halves and "
                f"{counts[2]} behind the FFN"
            )
        drops = fields["residual_dropout"] > 0
        for order, layout in itertools.product(ORDERS[counts], self._qkv_layouts()):
            if drops and order.get("norm_position") in ("both", "post"):
                continue  # a block drops out behind such a norm, and this was seen before it
            spec = BlockSpec(**{**fields, **ffn, **order, **layout})
            yield Guess(spec, self._names(spec, ups))

    def _half_guess(self, rotary_dim: int | None, rope: str | None) -> Guess:
        """The attention half alone: before a mixture of experts, say."""
        fields = {
            **self._attention_fields(), **self._norm_fields(), "rope": rope, "rope_theta": None,
            "intermediate_size": 1,
        }  # fmt: skip
        if rotary_dim is not None:
            fields["rotary_dim"] = rotary_dim
        fields["qk_norm"] = self._qk_norm(fields, self._o.x.shape[-1])
        if self._places(half=True)[:2] != (1, 1):
            raise NotUnderstood("its FFN is not understood, nor where its norms stand")
        self.ffn = []
        fields |= self._dropout_fields()
        norm = self.norms[1]
        readers = [
            s for s in self.seen.modules if "." not in s.path and _storage(s.x) == _storage(norm.y)
        ]
        if len(readers) != 1:
            raise NotUnderstood("its FFN is not understood, nor which module it is")
        spec = BlockSpec(**fields)
        return Guess(spec, self._names(spec, []), (norm.path, readers[0].path))

    def _names(self, spec: BlockSpec, ups: list[Seen]) -> dict[str, str]:
        """The spec's parameter names -> the layer's."""
        places = {"self_attn.o_proj": self._o.path}
        firsts = ["qkv"] if spec.stacked_qkv else ["q", "k", "v"]
        for name, seen in zip(firsts, self.qkv.members, strict=True):
            places[f"self_attn.{name}_proj"] = seen.path
        for name, seen in zip("qk", self.qk_norms, strict=False):
            places[f"self_attn.{name}_norm"] = seen.path
        if ups:
            first = ["gate_up"] if spec.stacked_gate_up else ["gate", "up"][-len(ups) :]
            for name, seen in zip(first, ups, strict=True):
                places[f"mlp.{name}_proj"] = seen.path
            places["mlp.down_proj"] = self.ffn[1].members[0].path
        roles = ["attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm"]
        norms = [spec.norm_names[role] for role in roles if role in spec.norm_names]
        for name, seen in zip(dict.fromkeys(norms), self.norms, strict=False):
            places[name] = seen.path
        shapes = spec.parameters() if ups else spec.attention_parameters()
        names = {}
        for name in shapes:
            place, _, kind = name.rpartition(".")
            names[name] = f"{places[place]}.{kind}" if place in places else ""
        sinks = [n for n, _ in self.layer.named_parameters() if n.endswith(".sinks")]
        if spec.attention_sinks:
            names["self_attn.sinks"] = sinks[0]
        for half, seen in zip(LAYER_SCALE, self._scales(), strict=False):
            [name] = [n for n, _ in seen.module.named_parameters()]
            names[LAYER_SCALE[half]] = f"{seen.path}.{name}"
        return names
