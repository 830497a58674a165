"""Low-rank adapters of a block's projections, as data (LoRA, Hu et al. 2021).

    y = x W^T + b + sum over i of s_i (drop_i(x) A_i^T B_i^T + c_i)

A_i is `[r_i, in]`, B_i `[out, r_i]`, and c_i, where there is one, `[out]`. A `BlockSpec` says
nothing of them: they belong to a call, and their tensors stand among its weights, by PEFT's names:
`self_attn.q_proj.lora_A.default.weight`, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite

from .errors import nearest
from .remember import remembered
from .spec import BlockSpec


@dataclass(frozen=True)
class LoRA:
    """One adapter of one projection.

    Attributes:
        rank: r.
        scale: s; LoRA's is `alpha / r`, rsLoRA's `alpha / sqrt(r)`.
        dropout: probability of dropping an element of what A reads, in training.
        use_bias: whether B has a bias.
        name: the adapter's, as it stands in its parameters' names.

    Raises:
        TypeError: for a name that is none.
        ValueError: for values that no adapter has.
    """

    rank: int
    scale: float = 1.0
    dropout: float = 0.0
    use_bias: bool = False
    name: str = "default"

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or isinstance(self.rank, bool) or self.rank < 1:
            raise ValueError(f"rank is {self.rank!r}, expected a positive integer")
        for name in ("scale", "dropout"):
            value = getattr(self, name)
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not isfinite(value):
                raise ValueError(f"{name} is {value!r}, expected a finite number")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout is {self.dropout!r}, expected 0 <= p < 1")
        if not isinstance(self.use_bias, bool):
            raise ValueError(f"use_bias is {self.use_bias!r}, expected True or False")
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name is {self.name!r}, expected the adapter's name")
        if not self.name.isprintable() or set(self.name) & {'"', "\\"}:  # an operator's text has it
            raise ValueError(f"name is {self.name!r}, expected no quotation marks or backslashes")

    def parameters(self, projection: str) -> tuple[str, str, str]:
        """The names of A, B and B's bias.

        Args:
            projection: the name of what it adapts, such as `self_attn.q_proj`.
        """
        b = f"{projection}.lora_B.{self.name}"
        return f"{projection}.lora_A.{self.name}.weight", f"{b}.weight", f"{b}.bias"


#: The adapters of each projection that has some, in the order of the spec's parameters: hashable.
Adapters = tuple[tuple[str, tuple[LoRA, ...]], ...]

#: What a user gives for it.
AdaptersLike = Mapping[str, LoRA | Sequence[LoRA]]


@remembered
def projections(spec: BlockSpec) -> dict[str, int]:
    """Names of the block's projections, without `.weight`, and their numbers."""
    ending = "_proj.weight"
    names = [n.removesuffix(".weight") for n in spec.parameters() if n.endswith(ending)]
    return {name: index for index, name in enumerate(names)}


def widths(spec: BlockSpec, projection: str) -> tuple[int, int]:
    """How much a projection gives, and how much it reads."""
    rows, columns = spec.parameters()[f"{projection}.weight"]
    return (columns, rows) if spec.conv1d else (rows, columns)


def parse_adapters(spec: BlockSpec, adapters: AdaptersLike | Adapters | None) -> Adapters:
    """The adapters as the block's passes take them.

    Args:
        spec: the block.
        adapters: projection -> its adapter, or several; None for none.

    Raises:
        TypeError: for something else.
        ValueError: for a name that is no projection's, or two adapters of one name.
    """
    if not adapters:
        return ()
    given = adapters if isinstance(adapters, Mapping) else dict(adapters)
    known = list(projections(spec))
    found = []
    for name in given:
        if name not in known:
            raise ValueError(
                f"adapters names {name!r}, expected projections among {known}{nearest(name, known)}"
            )
    for name in known:
        one = given.get(name, ())
        several = (one,) if isinstance(one, LoRA) else one
        if not isinstance(several, Sequence) or not all(isinstance(a, LoRA) for a in several):
            raise TypeError(f"adapters[{name!r}] is {one!r}, expected a LoRA or a sequence of them")
        labels = [lora.name for lora in several]
        if len(set(labels)) < len(labels):
            raise ValueError(f"adapters[{name!r}] has the names {labels}, expected different ones")
        if several:
            found.append((name, tuple(several)))
    return tuple(found)


def adapter_parameters(
    spec: BlockSpec, adapters: AdaptersLike | Adapters | None
) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the adapters.

    Arguments and errors as `parse_adapters`.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, several in parse_adapters(spec, adapters):
        columns, depth = widths(spec, name)
        for lora in several:
            a, b, bias = lora.parameters(name)
            found |= {a: (lora.rank, depth), b: (columns, lora.rank)}
            if lora.use_bias:
                found[bias] = (columns,)
    return found


@remembered
def all_parameters(spec: BlockSpec, adapters: Adapters) -> dict[str, tuple[int, ...]]:
    """Name and shape of every parameter of the block, and of its adapters; not to be changed."""
    return {**spec.parameters(), **adapter_parameters(spec, adapters)}


def drops(adapters: Adapters) -> bool:
    """Whether any of the adapters drops out."""
    return any(lora.dropout > 0 for _, several in adapters for lora in several)


def without_dropout(adapters: Adapters) -> Adapters:
    """The same adapters outside training."""
    if not drops(adapters):
        return adapters
    return tuple((n, tuple(replace(lora, dropout=0.0) for lora in own)) for n, own in adapters)
