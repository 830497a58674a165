"""`backfuse bench performance`: the tables of `docs/performance.md`, by arithmetic.

The document is prose with tables between markers, `<!-- NAME -->` and `<!-- end -->`. The command
writes the tables anew; everything else stays as somebody wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pandas as pd

from backfuse import BlockSpec
from backfuse.blocks.costs import BlockCosts, block_costs
from backfuse.blocks.devices import DEVICES
from backfuse.blocks.policy import NAMED_POLICIES

from .frontier import CURVES, Setting, draw
from .shapes import SHAPES

#: The models, and the tokens of their one sequence.
MODELS = ("llama-3-8b", "llama-3-70b")
TOKENS = 8192

#: The device of the tables that are of one.
DEVICE = "h200"

#: Whose frontier is shown.
SETTINGS = (Setting("llama-3-8b", 8192, DEVICE), Setting("llama-3-70b", 32768, DEVICE))

#: What stands where a measurement will.
UNMEASURED = "not measured yet"

#: What fusing spares -> elements per token that are neither written nor read.
FUSED: dict[str, Callable[[BlockSpec], int]] = {
    "forward: gate and up stay in the accumulators of the kernel that applies the activation "
    "(policies that rebuild `preact`)": lambda spec: 2 * spec.preact_size,
    "backward: the hidden's gradient stays in the accumulator, and the hidden comes from the same "
    "epilogue": lambda spec: 2 * spec.intermediate_size + spec.preact_size,
    'backward: a rebuilt `preact` stays in registers (`ffn_strategy="fused"`)': (
        lambda spec: 2 * spec.preact_size
    ),
    "forward: both halves add the residual in the GEMM": lambda spec: 4 * spec.hidden_size,
    "backward: both norms add the residual's gradient and write the normed input again": (
        lambda spec: 6 * spec.hidden_size
    ),
}


def _table(columns: Sequence[str], rows: Iterator[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _costs(model: str, policy: str = "keep", device: str = DEVICE) -> BlockCosts:
    return block_costs(SHAPES[model], policy, batch_size=1, seq_len=TOKENS, device=device)


def devices() -> str:
    """The rates everything is divided by."""

    def rows() -> Iterator[Sequence[str]]:
        for name, row in DEVICES.items():
            yield (
                name, f"{row.matmul_flops / 1e12:,.0f}", f"{row.matmul_rate / 1e12:,.0f}",
                f"{row.memory_bandwidth / 1e12:.2f}", f"{row.link_bandwidth / 1e9:.0f}",
                f"{row.matmul_rate / row.memory_bandwidth:.0f}", UNMEASURED,
            )  # fmt: skip

    return _table(
        ["device", "peak, TFLOP/s", "a good GEMM, TFLOP/s", "memory, TB/s", "link, GB/s",
         "FLOPs a byte", "measured"], rows(),
    )  # fmt: skip


def floors() -> str:
    """FLOPs over the library's rate, bytes over bandwidth, pass by pass."""

    def floor(costs: BlockCosts, phase: str) -> str:
        parts = [part for part in costs.parts if part.phase == phase]
        flops = sum(part.flops for part in parts) / costs.device.matmul_rate
        moved = sum(part.bytes for part in parts) / costs.device.memory_bandwidth
        return f"{1e3 * flops:.2f} / {1e3 * moved:.2f}"

    def rows() -> Iterator[Sequence[str]]:
        for model in MODELS:
            for device in DEVICES:
                costs, full = _costs(model, device=device), _costs(model, "full", device)
                yield (
                    model, device, floor(costs, "forward"), floor(costs, "backward"),
                    floor(full, "recompute"), f"{1e3 * costs.step:.2f}", UNMEASURED,
                )  # fmt: skip

    return _table(
        ["block", "device", "forward: FLOPs / bytes, ms", "backward: FLOPs / bytes, ms",
         "what `full` rebuilds, ms",
         "modelled step, ms", "measured step, ms"], rows(),
    )  # fmt: skip


def shares() -> str:
    """Every kernel of a step and its share of it."""
    steps = {model: _costs(model) for model in MODELS}
    parts = {}
    for model in MODELS:  # what `full` rebuilds goes to the end; the rest is the step of `keep`
        again = [part for part in _costs(model, "full").parts if part.phase == "recompute"]
        kept = sorted(steps[model].parts, key=lambda p: ("forward", "backward").index(p.phase))
        parts[model] = [*kept, *again]

    def rows() -> Iterator[Sequence[str]]:
        for pair in zip(*parts.values(), strict=True):
            first = pair[0]
            cells = []
            for model, part in zip(MODELS, pair, strict=True):
                assert (part.phase, part.name) == (first.phase, first.name)
                cells += [f"{1e3 * part.seconds:.3f}", f"{part.seconds / steps[model].step:.1%}"]
            yield (
                first.phase, f"`{first.name}`", f"{first.flops / 1e12:.2f}",
                f"{first.bytes / 1e6:,.0f}", *cells, UNMEASURED,
            )  # fmt: skip

    return _table(
        ["pass", "kernel", "8B: TFLOP", "8B: MB", "8B: ms", "8B: of the step", "70B: ms",
         "70B: of the step", "measured"], rows(),
    )  # fmt: skip


def fusing() -> str:
    """Bytes that fused kernels neither write nor read, and their time."""

    def rows() -> Iterator[Sequence[str]]:
        for what, elements in FUSED.items():
            cells = []
            for model in MODELS:
                costs = _costs(model)
                spared = 2 * TOKENS * elements(SHAPES[model])
                took = spared / costs.device.memory_bandwidth
                cells += [f"{spared / 1e6:,.0f}", f"{1e3 * took:.2f}", f"{took / costs.step:.1%}"]
            yield what, *cells, UNMEASURED

    return _table(
        ["spared", "8B: MB", "8B: ms", "8B: of the step", "70B: MB", "70B: ms", "70B: of the step",
         "measured"], rows(),
    )  # fmt: skip


def policies() -> str:
    """The named policies: held, FLOPs, modelled and measured time."""

    def rows() -> Iterator[Sequence[str]]:
        for setting in SETTINGS:
            for name in NAMED_POLICIES:
                kib, extra = setting.policy(name)
                yield setting.title, f"`{name}`", f"{kib:.1f}", f"{extra:.1%}", UNMEASURED

    return _table(
        ["block", "policy", "KiB per token and layer", "modelled extra time",
         "measured extra time"], rows(),
    )  # fmt: skip


def frontier() -> str:
    """The least extra time for bytes on the device."""
    budgets = (64, 32, 16, 8, 4, 1)

    def rows() -> Iterator[Sequence[str]]:
        for setting in SETTINGS:
            choices = [setting.choices(allow) for allow, _ in CURVES.values()]
            for kib in budgets:
                mixes = [setting.mix(own, kib) for own in choices]
                cells = ["cannot" if mix is None else f"{mix.overhead:.1%}" for mix in mixes]
                host = mixes[-1].host_bytes if mixes[-1] else 0.0
                yield (
                    setting.title, str(kib), *cells, f"{host / setting.seq_len / 1024:.1f}",
                    UNMEASURED,
                )  # fmt: skip

    return _table(
        ["block", "KiB per token and layer", *CURVES, "of that on the host, KiB", "measured"],
        rows(),
    )


def cpu() -> str:
    """The model's FLOPs against the times that `backfuse bench stack` measured on a CPU.

    Raises:
        FileNotFoundError: outside of a checkout, which has these times.
    """
    path = Path(__file__).with_name("results") / "cpu" / "results.csv"
    table = pd.read_csv(path)
    first = table[table["op"] == "stack"].iloc[0]
    same = (table["shape"] == first["shape"]) & (table["tokens"] == first["tokens"])
    own = table[same & table["provider"].str.startswith("backfuse")].set_index("policy")
    row = own.loc["keep"]
    hidden_size, intermediate_size = int(row["hidden_size"]), int(row["intermediate_size"])
    spec = BlockSpec(hidden_size, intermediate_size, int(row["heads"]), int(row["kv_heads"]))
    batch_size = int(row["batch_size"])

    def flops(policy: str) -> int:
        costs = block_costs(
            spec, policy, batch_size=batch_size, seq_len=int(row["tokens"]) // batch_size,
            device=DEVICE,
        )  # fmt: skip
        return sum(part.flops for part in costs.parts)

    def rows() -> Iterator[Sequence[str]]:
        for name in ("selective", "lean", "full"):
            modelled = flops(name) / flops("keep") - 1
            times = [
                own.loc[name, f"vs_eager{column}"] / row["vs_eager"] - 1
                for column in ("", "_p20", "_p80")
            ]
            yield (
                f"`{name}`",
                f"{modelled:.1%}",
                f"{times[0]:.1%} ({times[1]:.1%} to {times[2]:.1%})",
            )

    return _table(["policy", "modelled: extra FLOPs", "measured: extra time"], rows())


#: Marker -> its table.
TABLES: dict[str, Callable[[], str]] = {
    table.__name__: table for table in (devices, floors, shares, fusing, policies, frontier, cpu)
}


def fill(text: str) -> str:
    """The document with its tables written anew.

    Raises:
        ValueError: for a marker that is none of `TABLES`, or one that is missing.
    """
    blocks = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    named = [match[2] for match in blocks.finditer(text)]
    if sorted(named) != sorted(TABLES):
        raise ValueError(
            f"the document has the tables {', '.join(named) or 'none'}, expected each of "
            f"{', '.join(TABLES)} once"
        )
    return blocks.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", text)


def run(write: Path | None = None, plot: Path | None = None) -> int:
    """The command: prints the tables, or writes them into the document.

    Args:
        write: the document; None to print.
        plot: the frontier's picture (PNG); None for none.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: if the document's markers are not those of the tables.
        OSError: if a file cannot be read or written.
    """
    if write:
        write.write_text(fill(write.read_text("utf-8")), "utf-8")
        print(f"wrote {write}")
    else:
        for name, table in TABLES.items():
            print(f"{name}\n\n{table()}\n")
    if plot:
        draw(SETTINGS, plot)
        print(f"wrote {plot}")
    return 0
