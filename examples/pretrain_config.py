"""The flags of `pretrain.py`, and what of them defines a run."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backfuse.bench.options import check_positive, check_seed
from backfuse.bench.shapes import ALL_SHAPES
from backfuse.blocks.policy import FP8_NAMES, Policy

if TYPE_CHECKING:
    from pretrain_data import Tokens
    from pretrain_model import Shape

#: The flags that a model of a name or of a config.json takes the place of, all or but `layers`.
SIZES = ("hidden_size", "intermediate_size", "heads", "kv_heads", "layers")


def flag(default: Any, text: str) -> Any:
    """A field with what `--help` says of it."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """Every field is a flag. A resumed run must repeat those before `policy`.

    Of the first group what they give is compared: the model's shape, the data's fingerprint.
    """

    model: str = flag("", "a shape's name, or a config.json; by default of the five sizes below")
    hidden_size: int = flag(256, "width of the residual stream")
    intermediate_size: int = flag(704, "width of the FFN")
    layers: int = flag(6, "blocks; a named shape wants it said, a config.json says it")
    heads: int = flag(8, "of queries")
    kv_heads: int = flag(4, "of keys and values")
    vocabulary: int = flag(0, "number of ids; 0: what the config.json says, or 256 for bytes")
    data: str = flag("", "a text, a .bin, a folder of them, hf:NAME; by default Python's library")
    token_dtype: str = flag("uint16", "or uint32: of .bin files without a header")

    document_end: int = flag(
        -1, "a token that no attention crosses and whose next is not learnt (hf: data have 0); "
        "-1: none",
    )  # fmt: skip
    seq_len: int = flag(512, "tokens of a sequence")
    batch_size: int = flag(4, "sequences, of all processes together")
    accumulation: int = flag(2, "batches whose gradients make one step")
    steps: int = flag(500, "optimizer steps in all; may be more on a resume, and the cosine longer")
    warmup: int = flag(50, "steps in which the learning rate rises")
    learning_rate: float = flag(1e-3, "the highest")
    final_rate: float = flag(0.1, "share of the learning rate that is left at the end")
    weight_decay: float = flag(0.1, "of matrices")
    clip: float = flag(1.0, "largest norm of the gradient")
    seed: int = flag(0, "of weights, order of the data and dropout")
    bf16: bool = flag(False, "passes and weights' gradients; weights and optimizer stay fp32")

    policy: str = flag("selective", "what the blocks keep for backward: keep, selective, lean, ...")
    budget: str = flag(
        "", "in place of policy: bytes, as 20GiB, that the blocks of each process keep for "
        "backward; embedding, head and loss come on top",
    )  # fmt: skip
    tensor_parallel: int = flag(1, "processes that share each layer")
    compile: bool = flag(False, "each layer, by torch.compile")
    device: str = flag("", "by default a GPU if there is one")
    timeout: int = flag(600, "seconds that a process waits for the others before it gives up")
    out: str = flag("runs/pretrain", "folder of checkpoints and logs")
    log_every: int = flag(10, "steps from one line of figures to the next")
    validate_every: int = flag(100, "steps from one validation to the next")
    validation_batches: int = flag(8, "batches of each")
    checkpoint_every: int = flag(100, "steps from one checkpoint to the next")
    checkpoints: int = flag(2, "so many of the last are left")
    resume: bool = flag(False, "go on from the last checkpoint, or begin where there is none")
    any_layout: bool = flag(False, "resume with other processes than before: the bits may differ")
    tensorboard: bool = flag(False, "figures for TensorBoard too")
    wandb: str = flag("", "a project's name, for figures there too")
    memory_snapshot: bool = flag(False, "every allocation of this start's third step, on a GPU")
    trace: bool = flag(False, "this start's second and third step in PyTorch's profiler")

    @classmethod
    def parse(cls, description: str, argv: list[str] | None) -> Config:
        """From the command line.

        Raises:
            ValueError: for a flag that another one makes void.
        """
        parser = argparse.ArgumentParser(
            description=description, argument_default=argparse.SUPPRESS
        )
        for one in fields(cls):
            name, text = "--" + one.name.replace("_", "-"), one.metadata["help"]
            if isinstance(one.default, bool):
                parser.add_argument(name, action="store_true", help=text)
            else:
                kind, default = type(one.default), repr(one.default)
                parser.add_argument(name, type=kind, metavar=default, help=text)
        given = vars(parser.parse_args(argv))
        void = {"policy"} if given.get("budget") else set()
        if model := given.get("model"):
            void |= {*SIZES[:-1]} | ({"layers"} if Path(model).is_file() else set())
        for name in [name for name in given if name in void]:
            other = "budget" if name == "policy" else "model"
            raise ValueError(
                f"{name} is {given[name]} beside {other} ({given[other]}), which takes its place: "
                f"expected one of --{name.replace('_', '-')} and --{other}"
            )
        if given.get("model") in ALL_SHAPES and "layers" not in given:
            raise ValueError(f"model is {given['model']}, a layer's shape: expected --layers too")
        return cls(**given)

    def check(self) -> None:
        """Raises a ValueError for numbers that cannot be trained with."""
        for one in fields(self):
            free = ("seed", "warmup", "vocabulary", "document_end")
            if type(one.default) is int and one.name not in free:
                check_positive(one.name, getattr(self, one.name))
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

    def defining(self, shape: Shape, tokens: Tokens) -> dict[str, Any]:
        """What decides what is learnt, as JSON: model, data and settings."""
        names = [one.name for one in fields(self)]
        names = names[names.index("document_end") : names.index("policy")]
        settings = {name: getattr(self, name) for name in names}
        policy = Policy.parse("keep" if self.budget else self.policy)
        lossy = [f"{name}=fp8" for name in FP8_NAMES if getattr(policy, name) == "fp8"]
        model = asdict(shape)
        model |= model.pop("spec") | {"vocabulary": tokens.vocabulary}
        data = {"data": tokens.fingerprint[:16], "lossy": ", ".join(lossy)}
        return json.loads(json.dumps(model | data | settings))


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The entries that differ, in words; of lists only the names."""
    names = [name for name in other if one.get(name) != other[name]]
    return [
        name if isinstance(other[name], list) else f"{name} {one.get(name)} -> {other[name]}"
        for name in names
    ]
