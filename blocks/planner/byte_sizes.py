"""Bytes as people write them: `"40GiB"` and `"40GB"` are different numbers."""

from __future__ import annotations

import re
from fractions import Fraction

#: Unit -> bytes.
UNITS = {"B": 1} | {
    f"{prefix}{ending}": base**power
    for power, prefix in enumerate("KMGT", 1)
    for ending, base in (("B", 1000), ("iB", 1024))
}

_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(name: str, value: int | str) -> int:
    """A number of bytes.

    Args:
        name: of the argument, for messages.
        value: bytes, or text such as `"40GiB"` (2^30 bytes each), `"40GB"` (10^9 bytes each),
            `"1.5 TiB"`; a number without a unit is bytes. Fractions of a byte are dropped.

    Raises:
        TypeError: for something that is neither an integer nor text.
        ValueError: for a negative number, or text that says no number of bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        if value < 0:
            raise ValueError(f"{name} is {value}, expected at least 0 bytes")
        return value
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, expected bytes: an integer, or text such as '40GiB'")
    match = _NUMBER_AND_UNIT.fullmatch(value)
    units = {unit.lower(): size for unit, size in UNITS.items()} | {"": 1}
    if match is None or match[2].lower() not in units:
        raise ValueError(
            f"{name} is {value!r}, expected bytes such as 40GiB, 40GB or 42949672960; units are "
            f"{', '.join(UNITS)}"
        )
    return int(Fraction(match[1]) * units[match[2].lower()])


def format_bytes(count: float) -> str:
    """The same for a reader: `"59.88 GiB"`."""
    unit = next((u for u in ("TiB", "GiB", "MiB", "KiB") if count >= UNITS[u]), "B")
    return f"{count:,.0f} B" if unit == "B" else f"{count / UNITS[unit]:,.2f} {unit}"
