"""`backfuse bench block`: time, held bytes and peak of a stack of blocks, against the alternatives.

Every contender runs the same layers on the same input with the same output gradient, and has to
find the same gradients. Times are ratios to plain PyTorch within a round, rounds run in
alternating order; held bytes and peaks come from the allocator.
"""

from __future__ import annotations

import datetime
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from . import measure, rivals
from .measure import KIB, MIB, Spread
from .options import DTYPES, check_positive, choose, progress_bar

POLICIES = ("keep", "selective", "lean", "full")
PROVIDERS = (*rivals.RIVALS, "backfuse")

#: Gradients may differ by this much of the reference's largest one before a row is marked.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.02}


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
        device: `cpu` or `cuda`.
        rounds: how often every contender is timed.
        providers: names from `PROVIDERS`; plain always runs.
        policies: of the provider `backfuse`.
        seed: of weights, input and output gradient.

    Raises:
        ValueError: for sizes that do not divide and names that are not known.
    """

    layers: int = 8
    hidden_size: int = 512
    intermediate_size: int = 1408
    heads: int = 8
    kv_heads: int | None = None
    batch_size: int = 2
    seq_len: int = 2048
    dtype: str = "fp32"
    device: str = "cpu"
    rounds: int = 5
    providers: tuple[str, ...] = PROVIDERS
    policies: tuple[str, ...] = POLICIES
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("layers", "hidden_size", "intermediate_size", "heads", "batch_size"):
            check_positive(name, getattr(self, name))
        check_positive("seq_len", self.seq_len)
        check_positive("rounds", self.rounds)
        check_positive("kv_heads", self.num_key_value_heads)
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
        """
        from .plot import Point, tradeoff

        frame = self.frame().dropna(subset="time_vs_plain")
        points = [
            Point(
                row["provider"],
                row["held_kib_per_token_layer"],
                row["time_vs_plain"],
                ours=row["provider"].startswith("backfuse"),
            )
            for _, row in frame.iterrows()
        ]
        facts = machine(self.setup.device)
        tradeoff(
            points,
            path,
            title="What a step costs, and what it holds for its backward pass",
            subtitle=f"{self.setup.title()}; {facts['device_name']}, torch {facts['torch']}",
            x_label="held for backward, KiB per token and layer",
            y_label="time of forward and backward, relative to plain PyTorch",
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


def build(setup: Setup, results: Results) -> list[tuple[str, Callable[[], Contender]]]:
    """The contenders that can run here, unbuilt; plain first. Notes go to `results`."""
    torch.manual_seed(setup.seed)
    sizes = (setup.hidden_size, setup.intermediate_size, setup.heads, setup.num_key_value_heads)
    layers, kind = rivals.llama_layers(
        setup.layers, *sizes, device=setup.device, dtype=DTYPES[setup.dtype]
    )
    results.notes.append(f"plain is {kind}")
    shared = dict(nn.ModuleList(layers).named_parameters())

    def rival(name: str) -> Callable[[], Contender]:
        return lambda: Contender(name, rivals.RIVALS[name](layers), shared)

    def ours(policy: str) -> Callable[[], Contender]:
        return lambda: _stack(setup, policy, layers)

    chosen = [name for name in rivals.RIVALS if name in setup.providers or name == "plain"]
    makers: list[tuple[str, Callable[[], Contender]]] = []
    for name in chosen:
        reason = rivals.missing(name, setup.device)
        if reason:
            results.notes.append(f"{name} left out: {reason}")
        else:
            makers.append((name, rival(name)))
    if "backfuse" in setup.providers:
        makers += [(f"backfuse {policy}", ours(policy)) for policy in setup.policies]
    return makers


def _stack(setup: Setup, policy: str, layers: Sequence[nn.Module]) -> Contender:
    from backfuse import BlockSpec, BlockStack

    spec = BlockSpec(
        hidden_size=setup.hidden_size,
        intermediate_size=setup.intermediate_size,
        num_attention_heads=setup.heads,
        num_key_value_heads=setup.num_key_value_heads,
    )
    stack = BlockStack(
        spec, len(layers), policy=policy, device=setup.device, dtype=DTYPES[setup.dtype]
    )
    for mine, theirs in zip(stack.layers, layers, strict=True):
        mine.load_state_dict(theirs.state_dict())

    def run(x: Tensor, rotary: rivals.Rotary) -> Tensor:
        return stack(x, position_embeddings=rotary)

    return Contender(f"backfuse {policy}", run, dict(stack.layers.named_parameters()))


class Step:
    """Forward and backward of a contender on one fixed input."""

    def __init__(self, setup: Setup) -> None:
        generator = torch.Generator().manual_seed(setup.seed + 1)
        shape = (setup.batch_size, setup.seq_len, setup.hidden_size)
        place = {"device": setup.device, "dtype": DTYPES[setup.dtype]}
        self.x = torch.randn(shape, generator=generator).to(**place).requires_grad_()
        self.dy = torch.randn(shape, generator=generator).to(**place)
        self.rotary = rivals.rotary_tables(setup.seq_len, setup.hidden_size // setup.heads, **place)
        self.device = setup.device

    def clear(self, contender: Contender) -> None:
        """Drops every gradient, so that the next step makes its own."""
        self.x.grad = None
        for parameter in contender.parameters.values():
            parameter.grad = None

    def __call__(self, contender: Contender) -> None:
        contender.run(self.x, self.rotary).backward(self.dy)

    def gradients(self, contender: Contender) -> dict[str, Tensor]:
        """The input's gradient and the parameters', by name, after a step."""
        owners = {"x": self.x, **contender.parameters}
        return {name: owner.grad for name, owner in owners.items() if owner.grad is not None}

    def examine(self, contender: Contender) -> dict[str, Tensor]:
        """Measures bytes, after a warm-up where a first run allocates more; returns gradients."""
        self.clear(contender)
        if contender.name.startswith("compile") or torch.device(self.device).type == "cuda":
            self(contender)
            self.clear(contender)
        contender.held_bytes = measure.held_bytes(
            lambda x: contender.run(x, self.rotary), self.x, device=self.device
        )
        step = measure.allocator_trace(lambda: self(contender), self.device)
        gradients = self.gradients(contender)
        weights = sum(gradient.nbytes for name, gradient in gradients.items() if name != "x")
        contender.peak_bytes = step.peak_bytes - weights
        return gradients


def gradient_error(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference in any tensor, as a share of the reference's largest value there.

    Infinite if there is a gradient on one side only.
    """
    if gradients.keys() != reference.keys():
        return float("inf")
    return max(
        float((gradients[name] - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30))
        for name, theirs in reference.items()
    )


def bench(setup: Setup) -> Results:
    """Measures every contender; what is done when the user presses Ctrl-C is kept."""
    results = Results(setup)
    try:
        _bench(setup, results)
    except KeyboardInterrupt:
        results.interrupted = True
        results.notes.append("interrupted: the table holds what was measured until then")
    return results


def _bench(setup: Setup, results: Results) -> None:
    step = Step(setup)
    makers = build(setup, results)
    reference: dict[str, Tensor] = {}
    with progress_bar(total=len(makers) * (setup.rounds + 1), unit="run") as bar:
        for name, make in makers:
            bar.set_description(f"{name}: bytes")
            try:
                contender = make()
                gradients = step.examine(contender)
            except (RuntimeError, NotImplementedError) as error:
                if name == "plain":
                    raise
                results.notes.append(f"{name} failed: {str(error).splitlines()[0]}")
                bar.update(setup.rounds + 1)
                continue
            reference = reference or gradients
            contender.gradient_error = gradient_error(gradients, reference)
            if contender.gradient_error > TOLERANCE[DTYPES[setup.dtype]]:
                results.notes.append(f"{name} does NOT find plain's gradients")
            results.contenders.append(contender)
            step.clear(contender)
            bar.update()
        reference.clear()
        named = {contender.name: contender for contender in results.contenders}
        for index, name in measure.interleaved(list(named), setup.rounds):
            bar.set_description(f"{name}: round {index + 1} of {setup.rounds}")
            contender = named[name]
            contender.seconds.append(measure.seconds(lambda c=contender: step(c), setup.device))
            step.clear(contender)
            bar.update()


def run(setup: Setup, csv: Path | None = None, plot: Path | None = None) -> int:
    """The command: measures, prints, writes. Returns the exit code."""
    print(setup.title())
    results = bench(setup)
    print(results.table())
    for note in results.notes:
        print(f"note: {note}")
    if csv and results.contenders:
        results.save_csv(csv)
        print(f"wrote {csv}")
    if plot and any(contender.seconds for contender in results.contenders):
        results.save_plot(plot)
        print(f"wrote {plot}")
    return 130 if results.interrupted else 0
