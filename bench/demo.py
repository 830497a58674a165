"""`backfuse demo`: one small language model, trained on real text under every policy at once.

All contenders start from the same weights and see the same batches. They train in turn, one step
each in alternating order, so that their times can be compared whatever else the machine does.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from backfuse import BlockStack, kept_bytes

from . import measure
from .data import Corpus, load
from .measure import KIB, MIB, Spread
from .model import ByteModel, ModelSize, generate
from .options import (
    check_device,
    check_positive,
    check_seed,
    default_device,
    progress_bar,
    require,
    writable_folder,
)
from .plain import PlainBlock, PlainStack
from .ways import make_way

RIVALS = ("eager", "checkpoint", "sac-attention")
POLICIES = ("keep", "selective", "lean", "full")

#: Steps at the beginning that are too irregular to time.
WARM_UP = 3
VALIDATION_BATCHES = 4
LEARNING_RATE = 3e-3
PROMPT = b"    def "
SAMPLE_BYTES = 240


@dataclass(frozen=True)
class Settings:
    """What the demo trains. The defaults take under three minutes on two cores.

    Attributes:
        steps: optimizer steps of every contender.
        seq_len: bytes of a sequence.
        layers: blocks.
        batch_size: sequences of a step.
        hidden_size: width of the model.
        data: a text file; None for the Python standard library.
        out: folder for the CSVs and the picture.
        seed: of weights and batches.
        device: `cpu` or `cuda`; None: the GPU if there is one.
    """

    steps: int = 40
    seq_len: int = 256
    layers: int = 4
    batch_size: int = 8
    hidden_size: int = 192
    data: Path | None = None
    out: Path = Path("backfuse-demo")
    seed: int = 0
    device: str | None = None


class Trainee:
    """One way to train, and what was measured of it.

    What has not been measured yet is NaN.

    Attributes:
        name: as in the table.
        predicted_bytes: kept per layer by the memory model; None where there is no model.
        kept_bytes: held for backward by all layers, measured.
        peak_bytes: of forward and backward, above parameters, optimizer state and gradients.
        flops: matmul FLOPs of forward and backward.
        losses: of every step.
        seconds: of every step.
        validation_loss: at the end.
    """

    def __init__(self, name: str, model: ByteModel, predicted_bytes: int | None = None) -> None:
        self.name = name
        self.model = model
        self.predicted_bytes = predicted_bytes
        self.kept_bytes = self.peak_bytes = self.flops = math.nan
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.validation_loss = math.nan
        self.optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))

    @property
    def ours(self) -> bool:
        """Whether the blocks are backfuse's."""
        return self.name.startswith("backfuse")

    def examine(self, inputs: Tensor, targets: Tensor) -> None:
        """Measures bytes and FLOPs on one batch; leaves the model as it was."""
        hidden = self.model.embedding(inputs).detach().requires_grad_()
        self.kept_bytes = measure.kept_bytes_measured(self.model.run_stack, hidden)

        def forward_and_backward() -> None:
            self.model.loss(inputs, targets).backward()

        self.flops = measure.count_flops(forward_and_backward)
        self.model.zero_grad()
        trace = measure.allocator_trace(forward_and_backward, inputs.device)
        gradients = sum(p.grad.nbytes for p in self.model.parameters() if p.grad is not None)
        self.peak_bytes = trace.peak_bytes - gradients
        self.model.zero_grad()

    def step(self, inputs: Tensor, targets: Tensor, learning_rate: float) -> None:
        """One optimizer step."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        loss = self.model.loss(inputs, targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.losses.append(float(loss.detach()))

    @torch.no_grad()
    def validate(self, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
        """The mean loss of the batches."""
        self.validation_loss = sum(float(self.model.loss(*batch)) for batch in batches)
        self.validation_loss /= len(batches)


def contenders(settings: Settings, size: ModelSize, device: str) -> list[Trainee]:
    """All ways to train, from the same weights; eager first."""
    torch.manual_seed(settings.seed)
    trainees: list[Trainee] = []
    weights: dict[str, Tensor] = {}
    for name in RIVALS + POLICIES:
        predicted = None
        if name in RIVALS:
            blocks = [PlainBlock(size.spec) for _ in range(size.layers)]
            stack: nn.Module = PlainStack(blocks, make_way(name))
        else:
            stack = BlockStack(size.spec, size.layers, policy=name)
            sizes: dict[str, Any] = {"batch_size": settings.batch_size, "seq_len": settings.seq_len}
            predicted = sum(kept_bytes(size.spec, name, **sizes).values())
            name = f"backfuse {name}"
        model = ByteModel(size.spec, size.seq_len, stack)
        weights = weights or model.state_dict()
        model.load_state_dict(weights)
        trainees.append(Trainee(name, model.to(device), predicted))
    return trainees


def learning_rate(step: int, steps: int) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak."""
    warm_up = max(1, steps // 10)
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    return LEARNING_RATE * (0.1 + 0.45 * (1 + math.cos(math.pi * progress)))


def batches(
    corpus: Corpus, split: str, count: int, settings: Settings, device: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches for the same seed."""
    generator = torch.Generator().manual_seed(settings.seed + (split == "validation"))
    for _ in range(count):
        yield corpus.batch(split, settings.batch_size, settings.seq_len, generator, device)


def train(trainees: list[Trainee], corpus: Corpus, settings: Settings, device: str) -> None:
    """Trains all of them in turn, then validates."""
    named = {trainee.name: trainee for trainee in trainees}
    stream = batches(corpus, "train", settings.steps, settings, device)
    batch: tuple[Tensor, Tensor] | None = None
    latest = -1
    tokens = settings.batch_size * settings.seq_len
    with progress_bar(total=settings.steps * len(trainees), unit="step") as bar:
        for step, name in measure.interleaved(list(named), settings.steps):
            if step != latest:
                batch, latest = next(stream), step
            assert batch is not None
            trainee, rate = named[name], learning_rate(step, settings.steps)
            took = measure.seconds(partial(trainee.step, *batch, rate), device)
            trainee.seconds.append(took)
            bar.set_description(name)
            bar.set_postfix_str(f"loss {trainee.losses[-1]:.3f}, {tokens / took:,.0f} tokens/s")
            bar.update()
    held_out = list(batches(corpus, "validation", VALIDATION_BATCHES, settings, device))
    for trainee in trainees:
        trainee.validate(held_out)


def summary(trainees: Sequence[Trainee], settings: Settings) -> pd.DataFrame:
    """One row a contender, over the steps that all of them have done."""
    steps = min(len(trainee.seconds) for trainee in trainees)
    eager = trainees[0]
    per_token = settings.batch_size * settings.seq_len * KIB
    rows = []
    for trainee in trainees:
        timed = slice(WARM_UP if steps > WARM_UP else 0, steps)
        pairs = zip(trainee.seconds[timed], eager.seconds[timed], strict=True)
        ratios = [mine / theirs for mine, theirs in pairs]
        ratio = Spread.of(ratios) if ratios else Spread(math.nan, math.nan, math.nan)
        predicted = trainee.predicted_bytes
        rows.append(
            {
                "policy": trainee.name,
                "kept_kib_predicted": math.nan if predicted is None else predicted / per_token,
                "kept_kib_measured": trainee.kept_bytes / per_token / settings.layers,
                "peak_mib": trainee.peak_bytes / MIB,
                "time_vs_eager": ratio.median,
                "time_vs_eager_p20": ratio.p20,
                "time_vs_eager_p80": ratio.p80,
                "recompute_gflop": (trainee.flops - eager.flops) / 1e9,
                "recompute_share": trainee.flops / eager.flops - 1,
                "train_loss": trainee.losses[steps - 1] if steps else math.nan,
                "validation_loss": trainee.validation_loss,
            }
        )
    return pd.DataFrame(rows)


def table(frame: pd.DataFrame) -> str:
    """The summary for people."""

    def column(name: str, form: str) -> list[str]:
        return ["-" if math.isnan(value) else form.format(value) for value in frame[name]]

    shown = {
        "policy": frame["policy"],
        "kept KiB/token/layer: predicted": column("kept_kib_predicted", "{:.2f}"),
        "measured": column("kept_kib_measured", "{:.2f}"),
        "peak MiB": column("peak_mib", "{:.1f}"),
        "step time / eager": column("time_vs_eager", "{:.2f}"),
        "p20": column("time_vs_eager_p20", "{:.2f}"),
        "p80": column("time_vs_eager_p80", "{:.2f}"),
        "recomputed GFLOP/step": column("recompute_gflop", "{:.2f}"),
        "of eager's": column("recompute_share", "{:.1%}"),
        "train loss": column("train_loss", "{:.4f}"),
        "validation": column("validation_loss", "{:.4f}"),
    }
    return pd.DataFrame(shown).to_string(index=False)


def agreement(trainees: Sequence[Trainee]) -> list[str]:
    """Sentences on whether the contenders trained the same model."""
    steps = min(len(trainee.losses) for trainee in trainees)
    if not steps:
        return []
    ours = [trainee for trainee in trainees if trainee.ours]
    eager = trainees[0]
    said = []
    finished = len({len(trainee.losses) for trainee in trainees}) == 1
    names = ", ".join(trainee.name.removeprefix("backfuse ") for trainee in ours)
    differing = [t.name for t in ours[1:] if not _same(ours[0], t, steps, finished)]
    if differing:
        said.append(f"backfuse's policies do NOT agree bitwise: {', '.join(differing)}")
    else:
        what = "losses and final weights" if finished else "losses"
        said.append(f"backfuse {names}: {what} are bitwise equal over {steps} steps.")
    for trainee in (*(t for t in trainees[1:] if not t.ours), ours[0]):
        gap = max(abs(a - b) for a, b in zip(trainee.losses[:steps], eager.losses, strict=False))
        how = "bitwise equal losses" if gap == 0 else f"losses within {gap:.1e} nats"
        said.append(f"{trainee.name} against eager: {how}.")
    return said


def _same(one: Trainee, other: Trainee, steps: int, weights_too: bool) -> bool:
    if one.losses[:steps] != other.losses[:steps]:
        return False
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return not weights_too or all(torch.equal(a, b) for a, b in pairs)


def save(trainees: Sequence[Trainee], frame: pd.DataFrame, settings: Settings, where: str) -> None:
    """Writes the summary, the losses and, where something was timed, the picture."""
    from .plot import Point, tradeoff

    frame.to_csv(settings.out / "summary.csv", index=False)
    steps = min(len(trainee.losses) for trainee in trainees)
    losses = pd.DataFrame({trainee.name: trainee.losses[:steps] for trainee in trainees})
    losses.rename_axis("step").to_csv(settings.out / "losses.csv")
    written = ["summary.csv", "losses.csv"]
    if steps:
        points = [
            Point(row["policy"], row["kept_kib_measured"], row["time_vs_eager"])
            for _, row in frame.iterrows()
        ]
        tradeoff(
            points,
            settings.out / "memory-vs-time.png",
            title="What each policy keeps for backward, and what it costs",
            subtitle=f"training {where}, torch {torch.__version__}",
            time_label="time of a training step, relative to plain PyTorch",
        )
        written.append("memory-vs-time.png")
    print(f"Wrote {', '.join(written)} to {settings.out}")


def run(settings: Settings) -> int:
    """The command. Returns the exit code: 0, or 130 after Ctrl-C.

    Raises:
        OSError: if the folder cannot be written to.
        ValueError: for sizes, seed, text or device that do not work.
    """
    started = time.perf_counter()
    require("matplotlib")
    require("tqdm")
    check_positive("steps", settings.steps)
    check_positive("batch_size", settings.batch_size)
    check_seed(settings.seed)
    size = ModelSize(settings.layers, settings.hidden_size, settings.seq_len)
    device = settings.device or default_device()
    check_device(device)
    writable_folder(settings.out)
    corpus = load(settings.data, settings.seq_len)
    trainees = contenders(settings, size, device)
    parameters = sum(parameter.numel() for parameter in trainees[0].model.parameters())
    where = (
        f"{settings.layers} blocks, hidden {size.hidden_size}, FFN {size.intermediate_size}, "
        f"{size.heads} heads, {settings.batch_size} × {settings.seq_len} bytes, fp32, {device}"
    )
    print(f"Text: {corpus}")
    print(f"Model: {where}; {parameters / 1e6:.2f} M parameters")
    print(f"Training {len(trainees)} times {settings.steps} steps, in turn. Ctrl-C stops early.")
    interrupted = False
    try:
        example = next(batches(corpus, "train", 1, settings, device))
        for trainee in trainees:
            trainee.examine(*example)
        train(trainees, corpus, settings, device)
    except KeyboardInterrupt:
        interrupted = True
        done = min(len(trainee.seconds) for trainee in trainees)
        print(f"\nInterrupted after {done} of {settings.steps} steps; writing what is done.")
    frame = summary(trainees, settings)
    print(f"\n{table(frame)}\n")
    print("\n".join(agreement(trainees)))
    if not interrupted:
        chooser = torch.Generator().manual_seed(settings.seed)
        author = next(trainee for trainee in trainees if trainee.name == "backfuse selective")
        text = generate(author.model, PROMPT, SAMPLE_BYTES, chooser, temperature=0.7)
        print(f"\nWritten by the model that {author.name} trained (--steps helps):\n{text}\n")
    save(trainees, frame, settings, where)
    print(f"{time.perf_counter() - started:.0f} s")
    return 130 if interrupted else 0
