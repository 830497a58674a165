"""The static report against tables of an earlier one: what has become worse."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

#: What makes two rows the same kernel in the same configuration.
KEY = ("kernel", "arch", "dtype", "variant", "tile", "warps", "stages")

#: What may not grow.
COSTS = ("registers", "spill_bytes", "loop_spills", "shared_bytes", "serialized")


def read_tables(folder: Path, architectures: Sequence[str]) -> pd.DataFrame:
    """The rows of `<folder>/<architecture>.csv` of each architecture.

    Raises:
        OSError: for a file that is not there.
        ValueError: for one that is no such table.
    """
    tables = []
    for name in architectures:
        path = folder / f"{name}.csv"
        table = pd.read_csv(path, keep_default_na=True)
        missing = [column for column in (*KEY, *COSTS, "triton") if column not in table]
        if missing:
            raise ValueError(f"{path} has no column {missing[0]!r}, expected a static report")
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def regressions(table: pd.DataFrame, earlier: pd.DataFrame, triton: str) -> list[str]:
    """What is worse than before, a line each.

    Rows without a counterpart are nobody's regression: kernels and configurations come and go.
    Another version of Triton compiles otherwise, so that its rows are not compared either. Rows
    of the same key (a configuration that stands twice in a table) are compared with the worst.

    Args:
        table: the report's.
        earlier: rows of earlier ones, with the column `triton`.
        triton: the version that compiled `table`.
    """
    same = earlier[earlier["triton"] == triton].astype(dict.fromkeys(COSTS, "float64"))
    known = same.groupby(list(KEY))[list(COSTS)].max()
    found = []
    for _, row in table.iterrows():
        key = tuple(row[name] for name in KEY)
        if pd.isna(list(key)).any() or key not in known.index:
            continue
        before = known.loc[key]
        for cost in COSTS:
            then, now = before[cost], row[cost]
            if pd.notna(then) and pd.notna(now) and now > then:
                case = " ".join(map(str, key[:5]))
                found.append(f"worse: {case}: {cost} {int(then)} -> {int(now)}")
    return found
