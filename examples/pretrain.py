"""Pretrains a Llama-style language model, in one process or many. A script to start from.

    python examples/pretrain.py --policy selective --steps 500 --out runs/first
    torchrun --nproc-per-node 8 examples/pretrain.py --model llama-3.2-1b --layers 16 --bf16 \\
        --data shards/ --vocabulary 128256 --seq-len 8192 --batch-size 16 --budget 20GiB \\
        --tensor-parallel 2 --out runs/second        # and the same with --resume goes on

`--policy` says what the blocks keep for their backward pass, or `--budget` how many bytes; either
changes memory and time, and not one bit of the result (only fp8 does: a resumed run has to repeat
it). Every layer is sharded by FSDP2, in one process too. Ctrl-C or SIGTERM finishes the step at
hand, saves a checkpoint and exits.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from pretrain_data import Tokens, load
from pretrain_log import Interrupt, Log, check_installed, memory_snapshot, peak_bytes, profiler
from pretrain_model import Model, Ranks, Shape, clip_gradients, cost_model, flops_per_second
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from backfuse import block_flops, kept_bytes, plan_on_all_ranks
from backfuse.bench.options import check_positive, check_seed, writable_folder
from backfuse.blocks.policy import FP8_NAMES, Policy
from backfuse.blocks.split import local_spec


@dataclass(frozen=True)
class Config:
    """Every field is a flag. The first group defines the run, and a resumed run must repeat it."""

    model: str = ""  # a shape's name, or a config.json; empty for the five sizes below
    hidden_size: int = 256
    intermediate_size: int = 704
    layers: int = 6
    heads: int = 8
    kv_heads: int = 4
    vocabulary: int = 0  # 0 for what the config.json says, or 256 for bytes
    data: str = ""  # a text, a folder of .bin, hf:NAME; empty for the standard library's source
    token_dtype: str = "uint16"  # of .bin files without a header
    document_end: int = -1  # a token that no attention crosses and whose next is not learnt
    seq_len: int = 512
    batch_size: int = 4  # sequences, of all processes together
    accumulation: int = 2  # batches whose gradients make one step
    steps: int = 500
    warmup: int = 50
    learning_rate: float = 1e-3
    final_rate: float = 0.1  # share of the learning rate that is left at the end
    weight_decay: float = 0.1
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0
    bf16: bool = False  # passes and weights' gradients; weights and optimizer stay fp32

    policy: str = "selective"
    budget: str = ""  # bytes kept for backward in each process, as 20GiB; in place of policy
    tensor_parallel: int = 1  # processes that share each layer
    compile: bool = False
    device: str = ""  # empty for a GPU if there is one
    timeout: int = 600  # seconds that a process waits for the others before it gives up
    out: str = "runs/pretrain"
    log_every: int = 10
    validate_every: int = 100
    validation_batches: int = 8
    checkpoint_every: int = 100
    checkpoints: int = 2  # so many of the last are left
    resume: bool = False
    any_layout: bool = False  # resume with other processes than before: the bits may differ
    tensorboard: bool = False
    wandb: str = ""  # a project's name
    memory_snapshot: bool = False  # of step 3, on a GPU
    trace: bool = False  # of steps 2 and 3, by PyTorch's profiler

    def defining(self) -> dict[str, Any]:
        """The settings that decide what is learnt."""
        names = [field.name for field in fields(self)]
        settings = {name: getattr(self, name) for name in names[: names.index("policy")]}
        policy = Policy.parse("keep" if self.budget else self.policy)
        lossy = [name for name in FP8_NAMES if getattr(policy, name) == "fp8"]
        return settings | {"lossy": ", ".join(f"{name}=fp8" for name in lossy)}

    def check(self) -> None:
        """Raises a ValueError for numbers that cannot be trained with."""
        for field in fields(self):
            free = ("seed", "warmup", "vocabulary", "document_end")
            if type(field.default) is int and field.name not in free:
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


class Trainer:
    """All that changes while training, and how to put it away and take it up again."""

    def __init__(self, config: Config, tokens: Tokens, ranks: Ranks) -> None:
        self.config, self.tokens, self.ranks = config, tokens, ranks
        self.shape = Shape.of(config)
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

    @property
    def kept(self) -> int:
        """Bytes that this process keeps between a batch's forward and backward passes."""
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
        """Matmul FLOPs of a step, in all processes, without what is rebuilt."""
        config = self.config
        sizes = {"batch_size": config.batch_size, "seq_len": config.seq_len}
        layer = block_flops(self.shape.spec, "keep", **sizes, device=self.ranks.device)
        head = 6 * config.batch_size * config.seq_len * self.model.head.weight.numel()
        return config.accumulation * (self.shape.layers * (layer.forward + layer.backward) + head)

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
        place = mesh.get_local_rank("data")
        pieces, ends = (part.chunk(self.ranks.layout[0])[place] for part in (pieces, ends))
        inputs, labels = pieces[:, :-1], pieces[:, 1:].masked_fill(ends, -100)
        packing = {}
        if config.document_end >= 0:  # documents in one row, each seeing itself alone
            first = nn.functional.pad(ends[:, :-1], (1, 0), value=True).flatten()
            offsets = torch.cat([first.nonzero().flatten(), torch.tensor([len(first)])]).int()
            packing = {"cu_seqlens": offsets.to(self.ranks.device), "max_seqlen": config.seq_len}
            inputs, labels = inputs.reshape(1, -1), labels.reshape(1, -1)
        # Tensor parallelism has each process hold a part of every sequence.
        part = mesh.get_local_rank("tensor")
        tokens, labels = (
            whole.chunk(config.tensor_parallel, 1)[part].contiguous().to(self.ranks.device)
            for whole in (inputs, labels)
        )
        return {"tokens": tokens, "labels": labels, **packing}, count

    def train_step(self) -> tuple[float, float]:
        """One optimizer step. Returns the loss and the norm of the gradient before clipping."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        batches = [self.batch("train", self.generator) for _ in range(self.config.accumulation)]
        count = max(1, sum(count for _, count in batches))
        total = torch.zeros((), device=self.ranks.device)
        for batch, _ in batches:
            loss = self.model(**batch) / count
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
            total += float(self.model(**batch))
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
            "config": self.config.defining(), "data": self.tokens.fingerprint,
            "layout": self.ranks.layout,
        }  # fmt: skip
        try:
            if self.ranks.first:
                shutil.rmtree(temporary, ignore_errors=True)
            dist.barrier()
            dcp.save(self.state(), checkpoint_id=temporary)
            if self.ranks.first:
                (temporary / "run.json").write_text(json.dumps(run))
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
            saved, data, layout = run["config"], run["data"], run["layout"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"resume: {path} is not a checkpoint of this script") from error
        mine = self.config.defining()
        differing = [name for name in mine if saved.get(name, "") != mine[name]]
        changed = [f"{name} {saved.get(name)} -> {mine[name]}" for name in differing]
        if data != self.tokens.fingerprint:
            changed.append("the text")
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


def checkpoints(folder: Path) -> list[Path]:
    """The whole ones, the oldest first."""
    return sorted(path for path in folder.glob("step-*") if (path / "run.json").exists())


def first_cause(error: Exception) -> BaseException:
    """What went wrong in the first process where something did."""
    failures = list(getattr(error, "failures", {}).values())
    cause: BaseException = failures[0][0] if failures else error
    while cause.__context__ is not None:
        cause = cause.__context__
    return cause


def start(config: Config) -> tuple[Trainer, Ranks]:
    """Checks everything that can be, meets the other processes, and makes or restores a trainer.

    Raises:
        ModuleNotFoundError, OSError, ValueError: for what cannot be, naming it.
    """
    config.check()
    shape, out = Shape.of(config), Path(config.out)
    check_installed(config)
    ranks = Ranks.start(config)
    if ranks.first:
        writable_folder(out)
    dist.barrier()
    found = checkpoints(out)
    if found and not config.resume:
        raise ValueError(
            f"out: {found[-1]} exists; continue it with --resume or name another folder"
        )
    if config.resume and not found:
        raise ValueError(f"resume: there is no checkpoint in {out}")
    tokens = load(config.data, config.seq_len, shape.vocabulary, config.token_dtype)
    trainer = Trainer(config, tokens, ranks)
    if config.resume:
        trainer.restore(found[-1])
    return trainer, ranks


def run(config: Config) -> int:
    """Trains. Returns the exit code: 0, or 128 and the signal that ended it."""
    trainer, ranks = start(config)
    say = print if ranks.first else (lambda *_, **__: None)
    out = Path(config.out)
    log = Log(config, trainer.step) if ranks.first else None
    size = sum(parameter.numel() for parameter in trainer.model.parameters())
    what = f"budget {config.budget}" if config.budget else f"policy {config.policy}"
    processes = f"{dist.get_world_size()} x {ranks.device}"
    say(f"{trainer.tokens}\n{size / 1e6:.1f} M parameters, {processes}, {what}")
    per_step = config.batch_size * config.seq_len * config.accumulation
    peak_flops = dist.get_world_size() * flops_per_second(ranks.device, trainer.dtype)
    interrupt, stop = Interrupt(), False
    with profiler(config) as trace:
        while trainer.step < config.steps and not stop:
            with memory_snapshot(config, trainer.step):
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
                say(f"step {step}: saved {trainer.save(out)}", flush=True)
    if stop and trainer.step < config.steps:
        return 128 + (interrupt.signal or signal.SIGTERM)
    return 0


def main(argv: list[str] | None = None) -> int:
    """The command line: a flag for each field of `Config`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, default in asdict(Config()).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            parser.add_argument(flag, type=type(default), default=default, metavar=repr(default))
    config = Config(**vars(parser.parse_args(argv)))
    try:
        return run(config)
    except (ValueError, OSError, ModuleNotFoundError, FloatingPointError) as error:
        print(f"pretrain: error: {error}", file=sys.stderr)
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
