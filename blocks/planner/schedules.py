"""Segments of layers that share one `x`: the classic schedules, and what each of them costs.

A schedule is what `BlockStack(segments=...)` takes: sizes of segments, nested ones as sequences.
Only the first layer of a segment keeps its `x`; backward rebuilds the others' from it.

| schedule | inputs held at once | layers run again to rebuild inputs |
|---|---|---|
| `uniform(n, k)` | n/k + k - 1 | n - n/k |
| `sqrt(n)` | about 2 sqrt(n) | about n - sqrt(n) |
| `recursive(n)` | about 1 + log2(n) | about n/2 log2(n) |

Sources: Chen et al. 2016 (sqrt, recursive).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from backfuse.blocks.stack import Segments, layers_in


def uniform(num_layers: int, every: int) -> list[Segments]:
    """Segments of `every` layers, the last of what is left.

    Raises:
        ValueError: for numbers below 1.
    """
    for name, value in (("num_layers", num_layers), ("every", every)):
        if value < 1:
            raise ValueError(f"{name} is {value}, expected at least 1")
    return [min(every, num_layers - start) for start in range(0, num_layers, every)]


def sqrt(num_layers: int) -> list[Segments]:
    """Segments of about the square root of the number of layers.

    Raises:
        ValueError: for no layers.
    """
    return uniform(num_layers, math.isqrt(max(num_layers, 1)))


def recursive(num_layers: int) -> list[Segments]:
    """One segment of two halves, which are segments of two halves, down to single layers.

    Raises:
        ValueError: for no layers.
    """
    if num_layers < 1:
        raise ValueError(f"num_layers is {num_layers}, expected at least 1")
    return [_halves(num_layers)]


def _halves(count: int) -> Segments:
    return 1 if count == 1 else (_halves(count - count // 2), _halves(count // 2))


def replays(segments: Sequence[Segments]) -> int:
    """How often backward runs a layer again to rebuild the inputs of others."""
    return sum(_replays(part) for part in segments)


def _replays(part: Segments) -> int:
    if isinstance(part, int):
        return part - 1
    return layers_in(part) - layers_in(part[-1]) + sum(_replays(inner) for inner in part)


def inputs_held(segments: Sequence[Segments]) -> int:
    """How many layers' inputs there are at once, at most: those kept, and those rebuilt."""
    # the last segment's backward comes first, when the inputs of all segments are still there
    return max(before + _held(part) for before, part in enumerate(segments))


def _held(part: Segments) -> int:
    """Of one segment alone, its own input included."""
    return part if isinstance(part, int) else inputs_held(part)
