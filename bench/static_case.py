"""One compilation of the static report: a kernel's arguments by name, held against the kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Dot:
    """A product of a step of a kernel's loop, of BLOCK_K depth.

    Attributes:
        rows: of the tile.
        columns: of the tile.
        new_rows: whether the left operand is loaded for it, not for the dot before.
    """

    rows: int
    columns: int
    new_rows: bool = True


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        kernel: a key of `MODULES`.
        architecture: one of `ARCHITECTURES`.
        variant: `"main"`, or what differs.
        dtype: of the operands.
        tile: the block sizes, as the table shows them.
        types: Triton's type of each argument that is one.
        constexprs: value of each other argument; a dtype by its name.
        options: of `triton.compile`.
        unaligned: integer arguments that may be no multiples of 16.
        dots: what a step multiplies; nothing for kernels whose dtype or work has no tensor cores.
    """

    kernel: str
    architecture: str
    variant: str
    dtype: str
    tile: str
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    unaligned: tuple[str, ...] = ()
    dots: tuple[Dot, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The case as JSON can hold it."""
        return asdict(self)


def bind(
    case: Mapping[str, Any], names: Sequence[str], unspecialized: Sequence[str] = ()
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constexprs and attributes as Triton's `ASTSource` takes them.

    Args:
        case: a `Case`, as a dictionary.
        names: the kernel's arguments.
        unspecialized: those the kernel marks `do_not_specialize`.

    Raises:
        ValueError: if the case describes other arguments than the kernel has.
    """
    types, constexprs = case["types"], case["constexprs"]
    described = {**types, **constexprs}
    missing = [name for name in names if name not in described]
    surplus = [name for name in described if name not in names]
    if missing or surplus:
        raise ValueError(
            f"bench/static_cases.py describes {case['kernel']} wrongly: the kernel's "
            f"{', '.join(missing) or 'none'} are missing, {', '.join(surplus) or 'none'} too many"
        )
    signature = {name: types.get(name, "constexpr") for name in names}
    unaligned = {*case["unaligned"], *unspecialized}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in unaligned)
    }
    values: dict[tuple[int, ...], Any] = {
        (names.index(name),): value for name, value in constexprs.items()
    }
    return signature, values, attributes


class Arguments:
    """Types and constexprs of a kernel under description."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self.constexprs: dict[str, Any] = {}

    def pointer(self, name: str, dtype: str, present: bool = True) -> None:
        if present:
            self.types[name] = f"*{dtype}"
        else:
            self.constexprs[name] = None

    def matrix(self, name: str, dtype: str, descriptor: bool, *block: int) -> None:
        shape = ", ".join(map(str, block))
        self.types[name] = f"tensordesc<{dtype}[{shape}]>" if descriptor else f"*{dtype}"

    def scalars(self, names: str, kind: str = "i32") -> None:
        self.types |= dict.fromkeys(names.split(), kind)
