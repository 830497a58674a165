"""Pretrains a small Llama-style language model on bytes, in one process. A script to start from.

    python examples/pretrain.py --policy selective --steps 500 --out runs/first
    python examples/pretrain.py --policy selective --steps 500 --out runs/first --resume

`--policy` says what the blocks keep for their backward pass; it changes memory and time, and not
one bit of the result. Ctrl-C finishes the step at hand, saves a checkpoint and exits with 130.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backfuse import BlockSpec, BlockStack
from backfuse.bench.data import VOCABULARY, Corpus, load
from backfuse.bench.options import (
    check_device,
    check_positive,
    check_seed,
    default_device,
    writable_folder,
)


@dataclass(frozen=True)
class Config:
    """Every field is a flag. The first group defines the run, and a resumed run must repeat it."""

    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    data: str = ""  # a text file; empty for the Python standard library's source
    seq_len: int = 512
    batch_size: int = 4
    accumulation: int = 2  # batches whose gradients make one step
    steps: int = 500
    warmup: int = 50
    learning_rate: float = 1e-3
    final_rate: float = 0.1  # share of the learning rate that is left at the end
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    bf16: bool = False  # autocast

    policy: str = "selective"
    device: str = ""  # empty for a GPU if there is one
    out: str = "runs/pretrain"
    log_every: int = 10
    validate_every: int = 100
    validation_batches: int = 8
    checkpoint_every: int = 100
    resume: bool = False

    def defining(self) -> dict[str, Any]:
        """The settings that decide what is learnt."""
        names = [field.name for field in fields(self)]
        return {name: getattr(self, name) for name in names[: names.index("policy")]}

    def check(self) -> None:
        """Raises a ValueError for numbers that cannot be trained with."""
        for field in fields(self):
            if type(field.default) is int and field.name not in ("seed", "warmup"):
                check_positive(field.name, getattr(self, field.name))
        check_seed(self.seed)
        if not isinstance(self.warmup, int) or self.warmup < 0:
            raise ValueError(f"warmup is {self.warmup}, expected a whole number of at least 0")
        for name in ("learning_rate", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.final_rate <= 1:
            raise ValueError(f"final_rate is {self.final_rate}, expected a share from 0 to 1")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay is {self.weight_decay}, expected a number from 0 up")


class Model(nn.Module):
    """Embedding, a stack of blocks, norm, head."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        spec = BlockSpec(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
        )
        self.embedding = nn.Embedding(VOCABULARY, config.hidden_size)
        self.blocks = BlockStack(spec, config.layers, policy=config.policy)
        self.norm = nn.RMSNorm(config.hidden_size, eps=spec.norm_eps)
        self.head = nn.Linear(config.hidden_size, VOCABULARY, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        nn.init.normal_(self.head.weight, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy of bytes [B, T], in nats a byte."""
        logits = self.head(self.norm(self.blocks(self.embedding(inputs))))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class Trainer:
    """All that changes while training, and how to put it away and take it up again."""

    def __init__(self, config: Config, corpus: Corpus, device: str) -> None:
        self.config, self.corpus, self.device = config, corpus, device
        torch.manual_seed(config.seed)
        self.model = Model(config).to(device)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(
            groups, config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        )
        self.pieces = torch.Generator().manual_seed(config.seed)
        self.step = 0

    def rate(self) -> float:
        """The learning rate of this step: linear warm-up, then a cosine."""
        config = self.config
        if self.step < config.warmup:
            return config.learning_rate * (self.step + 1) / config.warmup
        progress = (self.step - config.warmup) / max(1, config.steps - config.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)

    def loss(self, split: str, generator: torch.Generator) -> Tensor:
        """The loss of one batch."""
        config = self.config
        batch = self.corpus.batch(split, config.batch_size, config.seq_len, generator, self.device)
        kind = torch.device(self.device).type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=config.bf16):
            return self.model(*batch)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step. Returns the loss and the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        total = 0.0
        for _ in range(self.config.accumulation):
            loss = self.loss("train", self.pieces) / self.config.accumulation
            loss.backward()
            total += float(loss.detach())
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return total, float(norm)

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss of the same pieces of the held-out text, every time."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        count = self.config.validation_batches
        mean = sum(float(self.loss("validation", generator)) for _ in range(count)) / count
        self.model.train()
        return mean

    def save(self, path: Path) -> None:
        """Writes a checkpoint; whatever happens meanwhile, `path` is whole: the old or the new.

        Raises:
            OSError: if it cannot be written, naming `path`.
        """
        state = {
            "config": self.config.defining(),
            "text": self.corpus.sha256,
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "pieces": self.pieces.get_state(),
            "cpu_rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        temporary = path.with_name(path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:
            # torch.save raises a RuntimeError of its own on top of the file's error
            cause = error if isinstance(error, OSError) else error.__context__
            if not isinstance(cause, OSError):
                raise
            raise OSError(f"cannot write {path}: {cause.strerror}") from error
        finally:
            temporary.unlink(missing_ok=True)

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint; raises a ValueError if it belongs to another run."""
        if not path.exists():
            raise ValueError(f"resume: there is no checkpoint at {path}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            saved, text = state["config"], state["text"]
        except Exception as error:  # rubbish can make the unpickler raise anything
            raise ValueError(f"resume: {path} is not a checkpoint of this script") from error
        mine = self.config.defining()
        differing = [name for name in mine if saved.get(name) != mine[name]]
        changed = [f"{name} {saved.get(name)} -> {mine[name]}" for name in differing]
        if text != self.corpus.sha256:
            changed.append("the text")
        if changed:
            raise ValueError(f"resume: not the run that {path} belongs to: {', '.join(changed)}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.pieces.set_state(state["pieces"])
        torch.set_rng_state(state["cpu_rng"])
        if state["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        self.step = state["step"]


class Interrupt:
    """Notices Ctrl-C, so that a step is never torn. A second one stops at once."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGINT, self._ask)

    def _ask(self, *_: Any) -> None:
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        print("\nfinishing this step, then saving; Ctrl-C again to stop at once", flush=True)


def run(config: Config) -> int:
    """Trains. Returns the exit code: 0, or 130 after Ctrl-C."""
    config.check()
    device = config.device or default_device()
    check_device(device)
    writable_folder(Path(config.out))
    path = Path(config.out) / "checkpoint.pt"
    if path.exists() and not config.resume:
        raise ValueError(f"out: {path} exists; continue it with --resume or name another folder")
    trainer = Trainer(config, load(config.data or None, config.seq_len), device)
    if config.resume:
        trainer.restore(path)
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    print(f"{trainer.corpus}\n{size / 1e6:.1f} M parameters, {device}, policy {config.policy}")
    tokens = config.batch_size * config.seq_len * config.accumulation
    interrupt = Interrupt()
    while trainer.step < config.steps and not interrupt.asked:
        start = time.perf_counter()
        loss, norm = trainer.train_step()
        step, last = trainer.step, trainer.step == config.steps
        if step % config.log_every == 0 or last:
            speed = tokens / (time.perf_counter() - start)
            print(f"step {step}: loss {loss:.4f}, norm {norm:.2f}, {speed:,.0f} tokens/s")
        if step % config.validate_every == 0 or last:
            print(f"step {step}: validation loss {trainer.validate():.4f}")
        if step % config.checkpoint_every == 0 or last or interrupt.asked:
            trainer.save(path)
            print(f"step {step}: saved {path}", flush=True)
    return 130 if interrupt.asked and trainer.step < config.steps else 0


def main(argv: list[str] | None = None) -> int:
    """The command line: a flag for each field of `Config`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in asdict(Config()).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default, metavar=repr(default))
    try:
        return run(Config(**vars(parser.parse_args(argv))))
    except (ValueError, OSError) as error:
        print(f"pretrain: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain: stopped; the last checkpoint is whole", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
