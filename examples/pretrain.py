"""Pretrains a Llama-style language model, in one process or many. A script to start from.

    python examples/pretrain.py --policy selective --steps 500 --out runs/first
    torchrun --nproc-per-node 8 examples/pretrain.py --model llama-3.2-1b --layers 16 --bf16 \\
        --data shards/ --token-dtype uint32 --vocabulary 128256 --seq-len 8192 --batch-size 16 \\
        --budget 20GiB --tensor-parallel 2 --out runs/second --resume   # begins, or goes on

`--policy` says what the blocks keep for their backward pass, or `--budget` how many bytes that may
be; either changes memory and time, and not one bit of the result (only fp8 does: a resumed run has
to repeat it). Every layer is sharded by FSDP2, in one process too. Ctrl-C or SIGTERM finishes the
step at hand, saves a checkpoint and exits; torchrun kills what is left 30 s after its SIGTERM, so a
step and a checkpoint have to fit in there.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pretrain_config import Config, differences
from pretrain_data import Tokens, load
from pretrain_log import (
    Interrupt,
    Log,
    check_installed,
    memory_snapshot,
    peak_bytes,
    profiler,
    tell,
)
from pretrain_model import Model, Ranks, Shape, clip_gradients, cost_model, flops_per_second
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from backfuse import block_flops, kept_bytes, plan_on_all_ranks
from backfuse.bench.options import writable_folder
from backfuse.blocks.split import local_spec


class Trainer:
    """All that changes while training, and how to put it away and take it up again."""

    def __init__(self, config: Config, shape: Shape, tokens: Tokens, ranks: Ranks) -> None:
        self.config, self.shape, self.tokens, self.ranks = config, shape, tokens, ranks
        self.local_spec = local_spec(self.shape.spec, config.tensor_parallel)
        self.model = Model.sharded(config, self.shape, tokens.vocabulary, ranks)
        self.sizes = {"batch_size": config.batch_size // ranks.layout[0], "seq_len": config.seq_len}
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32
        if config.budget:
            actions = ("recompute",) if ranks.device == "cpu" else ("recompute", "offload")
            made = plan_on_all_ranks(
                self.local_spec, num_layers=self.shape.layers, budget=config.budget, allow=actions,
                device=cost_model(ranks.device, self.dtype), dtype=self.dtype, **self.sizes,
            )  # fmt: skip
            self.model.blocks.set_policy(made.policies, made.segments)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2]},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(
            groups, config.learning_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay,
            fused=True,
        )  # fmt: skip
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.lengths: list[int] = []  # of the documents of the last step
        # Dropout is another one in each part of a batch, and the same where a part is shared.
        torch.manual_seed((config.seed + 1 + ranks.mesh.get_local_rank("data")) % 2**64)

    @property
    def kept(self) -> int:
        """Bytes that this process's blocks keep from a batch's forward to its backward pass."""
        total = 0
        for policy in self.model.blocks.policies:
            kept = kept_bytes(self.local_spec, policy, dtype=self.dtype, **self.sizes)
            if (ranks := self.config.tensor_parallel) > 1:  # a part of each half's input
                whole = self.dtype.itemsize * self.shape.spec.hidden_size
                tokens = self.sizes["batch_size"] * self.sizes["seq_len"]
                kept |= dict.fromkeys(("x", "mid"), whole * tokens // ranks)
            total += sum(kept.values())
        return total

    @property
    def step_flops(self) -> float:
        """Matmul FLOPs of the last step, in all processes, without what is rebuilt."""
        layer = block_flops(
            self.shape.spec, "keep", batch_size=1, seq_len=sum(self.lengths),
            lengths=self.lengths, device=self.ranks.device,
        )  # fmt: skip
        head = 6 * sum(self.lengths) * self.model.head.weight.numel()
        return self.shape.layers * (layer.forward + layer.backward) + head

    def rate(self) -> float:
        """The learning rate of this step: linear warm-up, then a cosine."""
        config = self.config
        if self.step < config.warmup:
            return config.learning_rate * (self.step + 1) / config.warmup
        progress = (self.step - config.warmup) / max(1, config.steps - config.warmup)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return config.learning_rate * (config.final_rate + (1 - config.final_rate) * cosine)

    def batch(self, split: str, generator: torch.Generator) -> tuple[dict[str, Any], int]:
        """This process's share of a batch, and how many tokens are learnt in all of it."""
        config, mesh = self.config, self.ranks.mesh
        pieces = self.tokens.pieces(split, config.batch_size, config.seq_len, generator)
        ends = pieces[:, :-1] == config.document_end
        count = int((~ends).sum())
        firsts = nn.functional.pad(ends[:, :-1], (1, 0), value=True)  # of documents
        self.lengths += offsets(firsts).diff().tolist()
        place = mesh.get_local_rank("data")
        pieces, ends, firsts = (
            part.chunk(self.ranks.layout[0])[place] for part in (pieces, ends, firsts)
        )
        inputs, labels = pieces[:, :-1], pieces[:, 1:].masked_fill(ends, -100)
        packing: dict[str, Any] = {}
        if config.document_end >= 0:  # documents in one row, each seeing itself alone
            starts = offsets(firsts).int().to(self.ranks.device)
            packing = {"cu_seqlens": starts, "max_seqlen": config.seq_len}
            inputs, labels, firsts = (x.reshape(1, -1) for x in (inputs, labels, firsts))
        if self.shape.frequencies:
            places = torch.arange(firsts.shape[1])  # in the row, then in its document
            places = places - places.masked_fill(~firsts[:1], 0).cummax(1).values
            packing["places"] = places  # angles are made when they are needed: they are large
        # Tensor parallelism has each process hold a part of every sequence.
        part = mesh.get_local_rank("tensor")
        tokens, labels = (
            whole.chunk(config.tensor_parallel, 1)[part].contiguous().to(self.ranks.device)
            for whole in (inputs, labels)
        )
        return {"tokens": tokens, "labels": labels, **packing}, count

    def loss(self, places: torch.Tensor | None = None, **batch: Any) -> torch.Tensor:
        """The sum of the loss of a batch's share; places: of each token in its document."""
        if places is not None:
            batch["position_embeddings"] = self.shape.angles(places.to(self.ranks.device))
        return self.model(**batch)

    def train_step(self) -> tuple[float, float]:
        """One optimizer step. Returns the loss and the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.lengths = []
        batches = [self.batch("train", self.generator) for _ in range(self.config.accumulation)]
        count = max(1, sum(count for _, count in batches))
        total = torch.zeros((), device=self.ranks.device)
        for batch, _ in batches:
            loss = self.loss(**batch) / count
            loss.backward()
            total += loss.detach()
        norm = clip_gradients(list(self.model.parameters()), self.config.clip)
        if not math.isfinite(norm):
            raise FloatingPointError(
                f"step {self.step + 1}: the gradient's norm is {norm}, expected a finite number; "
                "weights and checkpoints are as the step before left them"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        return self.ranks.sum(float(total)), norm

    @torch.no_grad()
    def validate(self) -> float:
        """The mean loss of the same pieces of the held-out text, every time."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        total = counted = 0.0
        for _ in range(self.config.validation_batches):
            batch, count = self.batch("validation", generator)
            total += float(self.loss(**batch))
            counted += count
        self.model.train()
        return self.ranks.sum(total) / max(1, counted)

    def state(self) -> dict[str, Any]:
        """All of it, as a checkpoint holds it."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        cuda = self.ranks.device != "cpu"
        rng = torch.cuda.get_rng_state(self.ranks.device) if cuda else torch.get_rng_state()
        return {
            "model": model,
            "optimizer": optimizer,
            "step": torch.tensor(self.step),
            "pieces": self.generator.get_state(),
            f"rng-{dist.get_rank()}": rng,
        }

    def save(self, folder: Path) -> Path:
        """Writes a checkpoint beside the others, then drops the oldest.

        Whatever happens meanwhile, the last one is whole: a new one gets its name at the end.

        Raises:
            OSError: if it cannot be written, naming it.
        """
        path = folder / f"step-{self.step:08d}"
        temporary = folder / f".{path.name}"
        run = {
            "run": self.config.defining(self.shape, self.tokens), "layout": self.ranks.layout
        }  # fmt: skip
        try:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            dist.barrier()
            dcp.save(self.state(), checkpoint_id=temporary)
            if self.ranks.first:
                with open(temporary / "run.json", "w") as file:
                    json.dump(run, file)
                    file.flush()
                    os.fsync(file.fileno())
                shutil.rmtree(path, ignore_errors=True)  # one that was not whole
                os.replace(temporary, path)
                for old in checkpoints(folder)[: -self.config.checkpoints]:
                    shutil.rmtree(old)
            dist.barrier()
        except (OSError, dcp.api.CheckpointException) as error:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            raise OSError(f"cannot write {path}: {first_cause(error)}") from error
        return path

    def restore(self, path: Path) -> None:
        """Continues from a checkpoint; raises a ValueError if it belongs to another run."""
        try:
            run = json.loads((path / "run.json").read_text())
            saved, layout, before = run["run"], run["layout"], run["run"]["steps"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"resume: {path} is not a checkpoint of this script, or of another version of it"
            ) from error
        mine = self.config.defining(self.shape, self.tokens)
        longer = mine["steps"] > before
        changed = differences(saved | ({"steps": mine["steps"]} if longer else {}), mine)
        if layout != self.ranks.layout and not self.config.any_layout:
            changed.append(f"layout {layout} -> {self.ranks.layout} (--any-layout allows it)")
        if changed:
            raise ValueError(f"resume: not the run that {path} belongs to: {', '.join(changed)}")
        state = self.state()
        rng = f"rng-{dist.get_rank()}"
        if layout != self.ranks.layout:
            del state[rng]
        try:
            dcp.load(state, checkpoint_id=path)
        except dcp.api.CheckpointException as error:
            raise ValueError(f"resume: {path} is damaged: {first_cause(error)}") from error
        set_state_dict(
            self.model, self.optimizer, model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
        )  # fmt: skip
        self.generator.set_state(state["pieces"])
        self.step = int(state["step"])
        if rng in state and self.ranks.device == "cpu":
            torch.set_rng_state(state[rng])
        elif rng in state:
            torch.cuda.set_rng_state(state[rng], self.ranks.device)
        else:  # of another layout: dropout goes on with others than the run began with
            torch.manual_seed((torch.initial_seed() + (self.step << 32)) % 2**64)
        if longer and self.ranks.first:
            print(f"resume: steps {before} -> {mine['steps']}, the learning rate's cosine with it")


def offsets(firsts: torch.Tensor) -> torch.Tensor:
    """Where documents begin in the rows one after another, and the end, int64 [documents + 1]."""
    return nn.functional.pad(firsts.flatten(), (0, 1), value=True).nonzero().flatten()


def is_whole(path: Path) -> bool:
    """Whether a folder is a checkpoint: the last thing that is written into it can be read."""
    try:
        return bool(json.loads((path / "run.json").read_text()))
    except (OSError, ValueError):
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if is_whole(path))


def newest(folder: Path) -> Path | None:
    """The last whole checkpoint, or None if there is none.

    Raises:
        ValueError: if there are some, of which none is whole.
    """
    found = [path for path in sorted(folder.glob("step-*")) if (path / "run.json").exists()]
    whole = checkpoints(folder)
    if found and not whole:
        raise ValueError(f"out: {found[-1]} is not a checkpoint of this script, or is damaged")
    for path in found:
        if path > whole[-1] and dist.get_rank() == 0:
            print(f"pretrain: {path} is damaged; the one before it counts", file=sys.stderr)
    return whole[-1] if whole else None


def first_cause(error: Exception) -> str:
    """What went wrong in the first process where something did."""
    failures = list(getattr(error, "failures", {}).values())
    cause: BaseException = failures[0][0] if failures else error
    while cause.__context__ is not None:
        cause = cause.__context__
    return str(cause) or type(cause).__name__


def start(config: Config) -> tuple[Trainer, Ranks]:
    """Checks everything that can be, meets the other processes, and makes or restores a trainer.

    Raises:
        ModuleNotFoundError, OSError, ValueError: for what cannot be, naming it.
    """
    config.check()
    shape, out = Shape.of(config), Path(config.out)
    check_installed(config)
    ranks = Ranks.start(config, shape)
    if ranks.first:
        writable_folder(out)
    dist.barrier()
    found = newest(out)
    if found and not config.resume:
        raise ValueError(f"out: {found} exists; continue it with --resume or name another folder")
    tokens = load(config.data, config.seq_len, shape.vocabulary, config.token_dtype)
    if not -1 <= config.document_end < tokens.vocabulary:
        raise ValueError(
            f"document_end is {config.document_end}, expected -1 or one of the vocabulary's ids "
            f"(below {tokens.vocabulary})"
        )
    ours = config.defining(shape, tokens) | {
        "checkpoint": found and found.name, "folder of out": meeting(out, ranks)
    }  # fmt: skip
    paths = ("model", "data", "out", "device")  # which may differ, and what they hold may not
    ranks.check_same({n: v for n, v in asdict(config).items() if n not in paths} | ours)
    trainer = Trainer(config, shape, tokens, ranks)
    if found:
        trainer.restore(found)
    elif config.resume and ranks.first:
        print(f"resume: there is no checkpoint in {out}: from the beginning")
    return trainer, ranks


def meeting(folder: Path, ranks: Ranks) -> str | None:
    """A number that the first process leaves in a folder, where this one finds it there."""
    file = folder / ".meeting"
    if ranks.first:
        file.write_text(str(time.time_ns()))
    dist.barrier()
    found = file.read_text() if file.exists() else None
    dist.barrier()
    if ranks.first:
        file.unlink()
    return found


def run(config: Config) -> int:
    """Trains. Returns the exit code: 0, or 128 and the signal that ended it."""
    trainer, ranks = start(config)
    say = tell if ranks.first else (lambda *_: None)
    out = Path(config.out)
    log = Log(config, trainer.step) if ranks.first else None
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    what = f"budget {config.budget}" if config.budget else f"policy {config.policy}"
    shape, processes = trainer.shape, f"{dist.get_world_size()} x {ranks.device}"
    say(
        f"{trainer.tokens}\n{size / 1e6:.1f} M parameters: {shape.layers} layers of width "
        f"{shape.spec.hidden_size}, vocabulary {trainer.tokens.vocabulary}; {processes}, {what}"
    )
    per_step = config.batch_size * config.seq_len * config.accumulation
    peak_flops = dist.get_world_size() * flops_per_second(ranks.device, trainer.dtype)
    interrupt, stop, begin = Interrupt(), False, trainer.step
    with profiler(config) as trace, closing(log) if log else nullcontext():
        while trainer.step < config.steps and not stop:
            with memory_snapshot(config, trainer.step - begin):
                begun = time.perf_counter()
                loss, norm = trainer.train_step()
                seconds = time.perf_counter() - begun
            stop = ranks.sum(interrupt.signal != 0) > 0
            if trace:
                trace.step()
            step, last = trainer.step, trainer.step == config.steps
            speed, mfu = per_step / seconds, trainer.step_flops / seconds / peak_flops
            logged, validation = step % config.log_every == 0 or last, ""
            if logged:
                said = f"step {step}: loss {loss:.4f}, norm {norm:.2f}, {speed:,.0f} tokens/s"
                say(f"{said}, MFU {mfu:.1%}" if mfu else said)
            if step % config.validate_every == 0 or last:
                validation = trainer.validate()
                say(f"step {step}: validation loss {validation:.4f}")
            if log and (logged or validation):
                learning_rate = trainer.optimizer.param_groups[0]["lr"]
                log.write(
                    step, loss, norm, learning_rate, speed, mfu or "", trainer.kept,
                    peak_bytes(ranks.device), validation,
                )  # fmt: skip
            if step % config.checkpoint_every == 0 or last or stop:
                say(f"step {step}: saved {trainer.save(out)}")
    if stop and trainer.step < config.steps:
        return 128 + (interrupt.signal or signal.SIGTERM)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line: a flag for each field of `Config`."""
    try:
        return run(Config.parse((__doc__ or "").partition("\n")[0], argv))
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"pretrain: error: {str(error) or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pretrain: stopped; the last checkpoint is whole", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        print(f"pretrain: error: another process is gone: {error}", file=sys.stderr, flush=True)
        os._exit(3)  # an orderly end would wait for it
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
