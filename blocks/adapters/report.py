"""What `patch` did with each layer it found."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from backfuse.blocks.policy import Policy


@dataclass(frozen=True)
class PatchedLayer:
    """A row of the report.

    Attributes:
        name: path of the layer in the model.
        kind: its class.
        status: `"fused"` (the whole block), `"half"` (its attention half; the rest is the layer's
            own), or `"skipped"`.
        policy: what it keeps; None for a skipped one.
        reason: why it was skipped, or why it runs its own forward as it is now; None otherwise.
    """

    name: str
    kind: str
    status: str
    policy: Policy | None = None
    reason: str | None = None


class PatchReport(Sequence[PatchedLayer]):
    """A row for each layer that was found, in the model's order; prints as a table.

    Args:
        rows: the layers.
    """

    def __init__(self, rows: Sequence[PatchedLayer]) -> None:
        self.rows = tuple(rows)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        return self.rows[index]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def fused(self) -> list[str]:
        """Names of the layers that are one block."""
        return [row.name for row in self.rows if row.status == "fused"]

    @property
    def half(self) -> list[str]:
        """Names of the layers whose attention half is fused."""
        return [row.name for row in self.rows if row.status == "half"]

    @property
    def skipped(self) -> dict[str, str]:
        """Names of the layers that are as they were -> why."""
        return {row.name: row.reason or "" for row in self.rows if row.status == "skipped"}

    def to_frame(self) -> pd.DataFrame:
        """A row a layer: `name`, `kind`, `status`, `policy`, `reason`."""
        return pd.DataFrame(
            [
                (row.name, row.kind, row.status, row.policy and str(row.policy), row.reason)
                for row in self.rows
            ],
            columns=["name", "kind", "status", "policy", "reason"],
        )

    def _lines(self) -> Iterator[tuple[str, str, str, str]]:
        """One line for a run of like layers."""

        def like(row: PatchedLayer) -> tuple[object, ...]:
            return row.kind, row.status, row.policy, row.reason, row.name.rpartition(".")[0]

        for _, run in itertools.groupby(self.rows, like):
            rows = list(run)
            first, last = rows[0], rows[-1]
            name = first.name or "(the model)"
            if len(rows) > 1:
                name = f"{name} to {last.name.rpartition('.')[2]}"
            told = [str(first.policy)] if first.policy else []
            told += [first.reason] if first.reason else []
            yield name, first.kind, first.status, "; ".join(told)

    def __str__(self) -> str:
        lines = [("layers", "class", "", "keeps, or why not"), *self._lines()]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)

    __repr__ = __str__
