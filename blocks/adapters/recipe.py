"""`Recipe`: how a live layer is run by a block's functions."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property

from torch import Tensor, nn

from backfuse.blocks.spec import BlockSpec

from .facts import Facts

#: Largest difference that counts as rounding, as a share of what the layer adds to its input.
ROUNDING = 5e-5


class OwnForward(Exception):
    """Why the layer's own forward runs."""


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a layer is run by a block's functions.

    Attributes:
        spec: what it is.
        names: the spec's parameters -> the layer's, by path.
        types: path of each module that holds a parameter and is no projection -> its type.
        arguments: of the layer's forward, in their order.
        extra: how many Nones it returns after its output; None: it returns a tensor.
        unmasked: whether a call without a mask is that of the spec.
        implementation: of attention, as its configuration names it.
        rest: of a layer whose attention half alone is run: paths of the norm behind it, and of
            what reads that; None for a whole block.
        kind: whose layer it is: `"hf"` (called as those of transformers are), or of `torch.nn`:
            `"encoder"` or `"decoder"`.
        masks: how its attention is told what tokens see (see `masks.py`).
        facts: what its parts were when it was read.
        defaults: arguments that are neither None nor False where they are not given.
        unreached: a parameter that only calls reach which a block cannot do; None: there is none.
    """

    spec: BlockSpec
    names: dict[str, str]
    types: dict[str, type[nn.Module]]
    arguments: tuple[str, ...]
    extra: int | None
    unmasked: bool
    implementation: str | None
    rest: tuple[str, str] | None = None
    kind: str = "hf"
    masks: str = "tensor"
    facts: Facts = field(default_factory=dict)
    defaults: frozenset[str] = frozenset()
    unreached: str | None = None

    @cached_property
    def places(self) -> tuple[tuple[str, str, str], ...]:
        """The spec's parameters, the modules that hold them, and their names there."""
        split = ((name, path.rpartition(".")) for name, path in self.names.items())
        return tuple((name, place, kind) for name, (place, _, kind) in split)

    def same(self, other: Recipe) -> bool:
        """Whether another layer is run in the same way."""
        return all(
            getattr(self, one.name) == getattr(other, one.name) for one in fields(self)
        )


def agrees(ours: Tensor, theirs: Tensor, x: Tensor) -> bool:
    """Whether two outputs of a layer for x differ by rounding at most."""
    scale = (theirs - x).abs().max().item()
    return (ours - theirs).abs().max().item() <= ROUNDING * scale
