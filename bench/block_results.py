"""What the benchmark of a stack of blocks is asked, and what it found."""

from __future__ import annotations

import datetime
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from . import rivals
from .measure import KIB, MIB, Spread
from .options import DTYPES, check_device, check_positive, check_seed, choose, default_device
from .plot import Point, tradeoff

POLICIES = ("keep", "selective", "lean", "full")
PROVIDERS = (*rivals.RIVALS, "backfuse")


@dataclass(frozen=True)
class Setup:
    """What is measured. The defaults fit a CPU with two cores.

    Attributes:
        layers: blocks in the stack.
        hidden_size: width of the residual stream.
        intermediate_size: width of the FFN.
        heads: query heads.
        kv_heads: key and value heads; None: as many.
        batch_size: sequences.
        seq_len: tokens of a sequence.
        dtype: `fp32`, `bf16`, `fp16` or `fp64`, of weights and input.
        device: `cpu` or `cuda`; the GPU if there is one.
        rounds: how often every contender is timed.
        providers: names from `PROVIDERS`; plain always runs.
        policies: of the provider `backfuse`.
        seed: of weights, input and output gradient.

    Raises:
        ValueError: for sizes that do not divide, names that are not known and an unusable seed.
    """

    layers: int = 8
    hidden_size: int = 512
    intermediate_size: int = 1408
    heads: int = 8
    kv_heads: int | None = None
    batch_size: int = 2
    seq_len: int = 2048
    dtype: str = "fp32"
    device: str = field(default_factory=default_device)
    rounds: int = 5
    providers: tuple[str, ...] = PROVIDERS
    policies: tuple[str, ...] = POLICIES
    seed: int = 0

    def __post_init__(self) -> None:
        sizes = ("layers", "hidden_size", "intermediate_size", "heads", "batch_size", "seq_len")
        for name in (*sizes, "rounds"):
            check_positive(name, getattr(self, name))
        check_positive("kv_heads", self.num_key_value_heads)
        check_seed(self.seed)
        if self.hidden_size % (2 * self.heads):
            raise ValueError(
                f"hidden_size is {self.hidden_size}, expected a multiple of 2 * heads "
                f"= {2 * self.heads}: rotary embeddings turn pairs of channels"
            )
        if self.heads % self.num_key_value_heads:
            raise ValueError(
                f"kv_heads is {self.kv_heads}, expected a divisor of heads = {self.heads}"
            )
        choose("dtype", self.dtype, DTYPES)
        check_device(self.device)
        for name in self.providers:
            choose("provider", name, PROVIDERS)
        for name in self.policies:
            choose("policy", name, POLICIES)

    @property
    def num_key_value_heads(self) -> int:
        """Key and value heads, resolved."""
        return self.heads if self.kv_heads is None else self.kv_heads

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.batch_size * self.seq_len

    def title(self) -> str:
        """One line that says what was measured."""
        kv = "" if self.num_key_value_heads == self.heads else f"/{self.num_key_value_heads}"
        return (
            f"{self.layers} blocks, hidden {self.hidden_size}, FFN {self.intermediate_size}, "
            f"{self.heads}{kv} heads, {self.batch_size} × {self.seq_len:,} tokens, {self.dtype}"
        )


@dataclass
class Contender:
    """One way to run the stack, and what was measured of it."""

    name: str
    run: rivals.Run
    parameters: dict[str, nn.Parameter]
    held_bytes: int = 0
    peak_bytes: int = 0
    gradient_error: float = 0.0
    seconds: list[float] = field(default_factory=list)


class Results:
    """What a benchmark found, as far as it came.

    Attributes:
        setup: what was asked for.
        contenders: in the order of the table; plain first.
        notes: lines about what is missing or odd.
        interrupted: whether the user stopped it.
    """

    def __init__(self, setup: Setup) -> None:
        self.setup = setup
        self.contenders: list[Contender] = []
        self.notes: list[str] = []
        self.interrupted = False

    def frame(self) -> pd.DataFrame:
        """One row a contender, with numbers only; times are NaN where none was taken."""
        plain = self.contenders[0].seconds if self.contenders else []
        rows = []
        for contender in self.contenders:
            row: dict[str, Any] = {"provider": contender.name}
            ratios = [a / b for a, b in zip(contender.seconds, plain, strict=False)]
            if ratios:
                ratio, time = Spread.of(ratios), Spread.of(contender.seconds)
                row |= {
                    "time_vs_plain": ratio.median,
                    "time_vs_plain_p20": ratio.p20,
                    "time_vs_plain_p80": ratio.p80,
                    "ms": time.median * 1e3,
                }
            else:
                row |= dict.fromkeys(
                    ("time_vs_plain", "time_vs_plain_p20", "time_vs_plain_p80", "ms"), float("nan")
                )
            per_token = self.setup.tokens * self.setup.layers * KIB
            row["held_kib_per_token_layer"] = contender.held_bytes / per_token
            row["peak_mib"] = contender.peak_bytes / MIB
            row["gradient_error"] = contender.gradient_error
            rows.append(row)
        return pd.DataFrame(rows)

    def table(self) -> str:
        """The frame as text for people."""
        frame = self.frame()
        if frame.empty:
            return "nothing was measured"
        shown = pd.DataFrame(
            {
                "provider": frame["provider"],
                "time / plain": frame["time_vs_plain"].map("{:.3f}".format),
                "p20-p80": [
                    f"{low:.3f}-{high:.3f}"
                    for low, high in zip(
                        frame["time_vs_plain_p20"], frame["time_vs_plain_p80"], strict=True
                    )
                ],
                "ms": frame["ms"].map("{:,.0f}".format),
                "held KiB/token/layer": frame["held_kib_per_token_layer"].map("{:.2f}".format),
                "peak MiB": frame["peak_mib"].map("{:,.0f}".format),
                "gradient error": frame["gradient_error"].map("{:.1e}".format),
            }
        )
        return shown.to_string(index=False)

    def save_csv(self, path: Path) -> None:
        """Writes the frame with the set-up and the versions in every row."""
        frame = self.frame()
        setup = asdict(self.setup)
        for name in ("providers", "policies"):
            del setup[name]
        for name, value in (setup | machine(self.setup.device)).items():
            frame[name] = value
        frame.to_csv(path, index=False)

    def save_plot(self, path: Path) -> None:
        """Writes a picture of held bytes against time.

        Raises:
            ModuleNotFoundError: without matplotlib, with the line that installs it.
            OSError: if the file cannot be written.
        """
        frame = self.frame().dropna(subset="time_vs_plain")
        points = [
            Point(row["provider"], row["held_kib_per_token_layer"], row["time_vs_plain"])
            for _, row in frame.iterrows()
        ]
        facts = machine(self.setup.device)
        tradeoff(
            points,
            path,
            title="What a step costs, and what it holds for its backward pass",
            subtitle=f"{self.setup.title()}; {facts['device_name']}, torch {facts['torch']}",
            time_label="time of forward and backward, relative to plain PyTorch",
        )


def machine(device: str) -> dict[str, Any]:
    """What a number depends on besides the set-up."""
    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{torch.get_num_threads()} threads {platform.machine()}"
    return {
        "device_name": name,
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
