"""`backfuse bench report`: README.md's measured table and docs/benchmarks.md, from the CSVs.

Everything between the two markers of README.md, and all of docs/benchmarks.md, is written by
`render` from `bench/results/<device>/*.csv`. A test renders into memory and compares: whoever
changes a CSV, or a page by hand, is told to run this command.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from .measure import KIB, MIB
from .options import require
from .pictures import name_of, plot_activations, plot_rate, plot_timeline, plot_tradeoff
from .rows import milliseconds, read
from .run import timeline_file
from .shapes import CROSS_CHECKS, SHAPES

BEGIN, END = "<!-- written by `backfuse bench report` -->", "<!-- end -->"

#: What the README shows: these rows of this device.
README_DEVICE = "cpu"
README_CASE = {
    "op": "stack", "shape": "small-512", "layers": 8, "batch_size": 2, "tokens": 4096,
    "mode": "both",
}  # fmt: skip

#: Whose memory over time is drawn; all of them would cover each other.
TIMELINE = ("eager", "compile", "checkpoint", "sac-every-2nd-mm", "torch-remat")

SIZE = ["op", "shape", "layers", "batch_size", "tokens", "dtype"]

HEAD = """# Benchmarks

Written by `backfuse bench report` from the files in `bench/results`; nothing here is typed by hand.
How to measure: `backfuse bench --help`, `backfuse bench list`.

- Everybody runs on the same weights, input and output gradient. Each step makes fresh gradients
  (none add up), no graph is retained, inputs are random; on a GPU the L2 cache is flushed before
  each step. Rounds run in alternating order.
- **ms**: median of all steps, 20th and 80th percentile in brackets. **/ eager**: median of the
  rounds' ratios to plain PyTorch in the same round; **run 2** that of another run of it all, later
  on the same machine. A `~` marks a ratio whose percentiles include 1 in one of the runs, or that
  is on either side of 1 in two: that difference is noise.
- **TFLOP/s**: of a step that recomputes nothing, causal attention at half. **of GEMM**: the share
  of the library's GEMM of these sizes, timed in the same rounds; for memory-bound operations
  **GB/s** and the share of a copy.
- **kept**: what a forward pass holds for its backward. **peak**: the most of a step above weights
  and inputs, gradients included. **GEMMs**: calls; backfuse makes more, each for a chunk of tokens.
  **GFLOP**: of GEMMs and attention (as if it were not causal) as they ran, recomputing included;
  blank where kernels hide them, as GEMMs.
- **error**: relative norm against a run in fp64 (fp32 where that takes too long), the largest of
  output and gradients. More than rounding and three times eager's error explain is WRONG.
"""


def results(root: Path) -> dict[str, tuple[pd.DataFrame, pd.DataFrame]]:
    """Device's folder -> rows of all of its files, `results.csv` first, and timelines.

    Raises:
        ValueError: for a file that is no table of rows.
    """
    found = {}
    for folder in sorted((root / "bench" / "results").iterdir()):
        files = sorted(folder.glob("results*.csv"), key=lambda path: path.stem)
        files = [path for path in files if not path.stem.endswith("-timeline")]
        if files:
            lines = [timeline_file(f) for f in files if timeline_file(f).exists()]
            frames = [pd.read_csv(f, keep_default_na=False) for f in lines]
            timelines = pd.concat(frames) if frames else pd.DataFrame(columns=[*SIZE, "provider"])
            found[folder.name] = read(files), timelines
    return found


def render(root: Path) -> dict[Path, str]:
    """The pages as they should be, by path.

    Raises:
        ValueError: for a README without markers or a table without its rows.
    """
    found = results(root)
    readme = root / "README.md"
    text = readme.read_text()
    start, end = text.find(BEGIN), text.find(END)
    if start < 0 or end < start:
        raise ValueError(f"{readme} has no markers {BEGIN!r} and {END!r}")
    if README_DEVICE not in found:
        raise ValueError(f"bench/results/{README_DEVICE} has no results.csv")
    part = _readme_part(found[README_DEVICE][0])
    return {
        readme: text[: start + len(BEGIN)] + "\n" + part + text[end:],
        root / "docs" / "benchmarks.md": "\n".join(_page(root, found)).rstrip() + "\n",
    }


def picture_name(what: str, size: Any) -> str:
    """File of a picture, from the columns of a row; `size` may lack some."""
    parts = (what, *(size[name] for name in ("op", "shape", "dtype", "tokens") if name in size))
    return "-".join(str(part) for part in parts) + ".png"


def first_run(rows: pd.DataFrame) -> pd.DataFrame:
    """Without rows that an earlier file has too."""
    return rows.drop_duplicates([*SIZE, "provider", "policy", "mode"])


def _readme_part(rows: pd.DataFrame) -> str:
    chosen = rows
    for name, value in README_CASE.items():
        chosen = chosen[chosen[name] == value]
    chosen = first_run(chosen)
    if chosen.empty:
        raise ValueError(f"bench/results/{README_DEVICE} has no rows of {README_CASE}")
    first = chosen.iloc[0]
    lines = [
        f"{first['layers']} Llama blocks, hidden {first['hidden_size']}, FFN "
        f"{first['intermediate_size']}, {first['batch_size']} × "
        f"{first['tokens'] // first['batch_size']:,} tokens, {first['dtype']}, forward and "
        "backward, against Hugging Face's",
        f"layers; {first['device']}, torch {first['torch']}, {first['date']}, medians of "
        f"{first['rounds']} interleaved rounds:",
        "",
        "| | time / eager | held for backward, KiB per token and layer | peak, MiB |",
        "|---|---|---|---|",
    ]
    for _, row in chosen.iterrows():
        kept = row["kept_bytes"] / row["tokens"] / row["layers"] / KIB
        name = name_of(row).replace("backfuse-reference", "backfuse")
        peak = row["peak_bytes"] / MIB
        lines.append(f"| {name} | {row['vs_eager']:.2f} | {kept:.1f} | {peak:,.0f} |")
    path = f"bench/results/{README_DEVICE}/{picture_name('bytes-time', first)}"
    return "\n".join([*lines, "", f"![Held for backward against time]({path})", ""])


def _page(root: Path, found: dict[str, tuple[pd.DataFrame, pd.DataFrame]]) -> Iterator[str]:
    yield HEAD
    yield "![Bytes per token by activation](../bench/results/activations.png)\n"
    for folder, (rows, timelines) in found.items():
        names = sorted(set(rows["device"]))
        yield f"## {folder}\n\n{'; '.join(names)}\n"
        for _, group in rows.groupby(["op", "shape", "layers", "dtype"], sort=False):
            if _rated(group):
                first = group.iloc[0]
                which = {name: first[name] for name in ("op", "shape", "dtype")}
                yield f"![rate](../bench/results/{folder}/{picture_name('rate', which)})\n"
        for _, group in rows.groupby(["op", "dtype", "batch_size"], sort=False):
            yield from _glance(group)
        for _, group in rows.groupby(SIZE, sort=False):
            yield from _section(folder, group, timelines)
        yield from _kernels(root / "bench" / "results" / folder / "kernels.csv")
    yield "## Others' tables\n"
    yield "`backfuse bench check` measures these shapes again; what the sources say of theirs:\n"
    for name, case in CROSS_CHECKS.items():
        yield f"- `{name}`: {case.counts}."


def _kernels(csv: Path) -> Iterator[str]:
    """The best configuration of each kernel, of a file that `bench kernels` wrote."""
    if not csv.exists():
        return
    frame = pd.read_csv(csv, keep_default_na=False, na_values={"share": [""], "ms": [""]})
    first = frame.iloc[0]
    yield f"### kernels: {first['shape']}, {first['tokens']:,} tokens, {first['dtype']}\n"
    yield "| kernel | best configuration | ms | share | of | error |\n|---|---|---|---|---|---|"
    right = frame[(frame["status"] == "ok") & frame["share"].notna()]
    for _, rows in right.groupby(["kernel", "variant"], sort=False):
        best = rows.loc[rows["share"].idxmax()]
        name = f"{best['kernel']} {best['variant']}".rstrip()
        cells = (name, best["config"], milliseconds(best["ms"]), f"{best['share']:.0%}")
        yield f"| {' | '.join(cells)} | {best['baseline']} | {best['error'] or ''} |"
    wrong = frame[~frame["status"].isin(["ok", "does not fit"])]
    yield f"\n{len(wrong)} of {len(frame)} are wrong or failed.\n"


def _rated(group: pd.DataFrame) -> bool:
    timed = group[group["mode"] == "both"].dropna(subset="ms_median")
    rated = timed["tflops"].notna() | timed["gbps"].notna()
    return timed[rated]["tokens"].nunique() > 1


def _glance(group: pd.DataFrame) -> Iterator[str]:
    """Each run's ratios of an operation at all of its sizes, where there are several."""
    timed = group[(group["mode"] == "both") & group["vs_eager"].notna()]
    columns = {}
    for _, size in timed.groupby(["hidden_size", "tokens"]):
        first = size.iloc[0]
        names = [name_of(row) for _, row in size.iterrows()]
        ratios = size["vs_eager"].map("{:.2f}".format).groupby(names, sort=False)
        columns[f"{first['hidden_size']}, {first['tokens'] // 1024}k"] = ratios.agg(" ".join)
    if len(columns) < 3:
        return
    table = pd.DataFrame(columns).fillna("")
    head = timed.iloc[0]
    yield f"### {head['op']}, {head['dtype']}: time / eager by hidden size and tokens, each run\n"
    yield "| | " + " | ".join(table.columns) + " |"
    yield "|---" * (1 + len(table.columns)) + "|"
    for name in dict.fromkeys(name_of(row) for _, row in timed.iterrows()):
        yield f"| {name} | " + " | ".join(table.loc[name]) + " |"
    yield ""


def _section(folder: str, group: pd.DataFrame, timelines: pd.DataFrame) -> Iterator[str]:
    first = group.iloc[0]
    blocks = f"{first['layers']} x " if first["layers"] > 1 else ""
    sequences = f"{first['batch_size']} x {first['tokens'] // first['batch_size']:,} tokens"
    yield f"### {first['op']}: {blocks}{first['shape']}, {sequences}, {first['dtype']}\n"
    yield (
        f"hidden {first['hidden_size']}, FFN {first['intermediate_size']}, {first['heads']}/"
        f"{first['kv_heads']} heads of {first['head_dim']}; torch {first['torch']}, triton "
        f"{first['triton']}, {', '.join(sorted(set(group['date'])))}, {first['rounds']} rounds\n"
    )
    yield from _table(group)
    pictures = f"../bench/results/{folder}"
    if _plotted(group):
        yield f"![bytes against time]({pictures}/{picture_name('bytes-time', first)})\n"
    if len(_lines_of(first, timelines)):
        yield f"![memory over time]({pictures}/{picture_name('timeline', first)})\n"


def _table(group: pd.DataFrame) -> Iterator[str]:
    main = first_run(group)
    others = [rows for _, rows in group.groupby("file", sort=False)][1:]
    columns: dict[str, list[str]] = {
        "provider": [name_of(row) for _, row in main.iterrows()],
        "mode": list(main["mode"]),
        "ms": [_with_spread(row) for _, row in main.iterrows()],
    }
    key = ["provider", "policy", "mode"]
    noise = group.groupby(key)[["vs_eager", "vs_eager_p20", "vs_eager_p80"]].agg(list)
    columns["/ eager"] = [_ratio(row, noise.loc[tuple(row[key])]) for _, row in main.iterrows()]
    for number, rows in enumerate(others, start=2):
        again = rows.drop_duplicates(key).set_index(key)["vs_eager"]
        values = [again.get(tuple(row[key])) for _, row in main.iterrows()]
        columns[f"run {number}"] = ["" if pd.isna(v) else f"{v:.3f}" for v in values]
    columns |= {
        "TFLOP/s": _column(main["tflops"], "{:.3g}"),
        "of GEMM": _column(main["gemm_share"], "{:.0%}"),
        "GB/s": _column(main["gbps"], "{:.3g}"),
        "of copy": _column(main["copy_share"], "{:.0%}"),
        "kept, KiB/token": _column(main["kept_bytes"] / main["tokens"] / KIB, "{:,.1f}"),
        "peak, MiB": _column(main["peak_bytes"] / MIB, "{:,.0f}"),
        "GEMMs": _column(main["gemms"], "{:.0f}"),
        "GFLOP": _column(main["flops"] / 1e9, "{:,.4g}"),
        "error": _column(main["error"], "{:.1e}"),
        "": [_status(row) for _, row in main.iterrows()],
    }
    used = {title: cells for title, cells in columns.items() if any(cells)}
    yield "| " + " | ".join(used) + " |"
    yield "|---" * len(used) + "|"
    for cells in zip(*used.values(), strict=True):
        yield "| " + " | ".join(cells) + " |"
    yield ""


def _column(values: pd.Series[float], form: str) -> list[str]:
    return ["" if pd.isna(value) else form.format(value) for value in values]


def _with_spread(row: Any) -> str:
    if pd.isna(row["ms_median"]):
        return ""
    spread = [milliseconds(row[name]) for name in ("ms_p20", "ms_p80")]
    return milliseconds(row["ms_median"]) + (f" ({'–'.join(spread)})" if all(spread) else "")


def _ratio(row: Any, runs: Any) -> str:
    """The ratio, and whether it is noise; `runs` has lists of what each run gave."""
    if pd.isna(row["vs_eager"]):
        return ""
    spans = zip(runs["vs_eager_p20"], runs["vs_eager_p80"], strict=True)
    noise = any(low <= 1 <= high for low, high in spans)
    noise |= min(runs["vs_eager"]) <= 1 <= max(runs["vs_eager"])
    return f"{row['vs_eager']:.3f}{' ~' if noise and row['provider'] != 'eager' else ''}"


def _status(row: Any) -> str:
    return "" if row["status"] == "ok" else f"{row['status']}: {row['note']}".replace("|", "/")


def _plotted(group: pd.DataFrame) -> bool:
    both = group[group["mode"] == "both"].dropna(subset=["vs_eager", "kept_bytes"])
    return both[both["kept_bytes"] > 0]["provider"].nunique() > 2


def _lines_of(size: Any, timelines: pd.DataFrame) -> pd.DataFrame:
    for name in SIZE:
        timelines = timelines[timelines[name] == size[name]]
    ours = timelines["provider"].str.startswith("backfuse")
    return timelines[ours | timelines["provider"].isin(TIMELINE)]


def draw(root: Path) -> list[Path]:
    """Draws all pictures that the pages show.

    Raises:
        ModuleNotFoundError: without matplotlib, with the line that installs it.
    """
    from .pictures import describe

    base = root / "bench" / "results"
    written = [base / "activations.png"]
    plot_activations("llama-3-8b", SHAPES["llama-3-8b"], written[0])
    for folder, (rows, timelines) in results(root).items():
        both = first_run(rows[rows["mode"] == "both"])
        for _, group in both.groupby(["op", "shape", "layers", "dtype"], sort=False):
            if _rated(group):
                which = {name: group.iloc[0][name] for name in ("op", "shape", "dtype")}
                written.append(base / folder / picture_name("rate", which))
                plot_rate(group, written[-1])
        for _, group in both.groupby(SIZE, sort=False):
            first = group.iloc[0]
            if _plotted(group):
                written.append(base / folder / picture_name("bytes-time", first))
                plot_tradeoff(group, written[-1])
            lines = _lines_of(first, timelines)
            if len(lines):
                written.append(base / folder / picture_name("timeline", first))
                plot_timeline(lines, written[-1], describe(first))
    return written


def run(root: Path) -> int:
    """The command: writes pages and pictures.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: for a folder that is not the repository's root, or a table that is none.
        OSError: for a page that cannot be written.
    """
    if not (root / "bench" / "results").is_dir() or not (root / "README.md").is_file():
        raise ValueError(f"root is {str(root)!r}, expected the repository's, with bench/results")
    require("matplotlib")
    pages = render(root)
    for path, text in pages.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    for path in (*pages, *draw(root)):
        print(f"wrote {path}")
    return 0
