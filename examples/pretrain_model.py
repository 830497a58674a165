"""The model of `pretrain.py`, and how it lies on its processes.

Every layer is a unit of FSDP2 over the data-parallel processes, split before that over the
tensor-parallel ones if there are any; embedding, norm and head are sharded over all processes.
Tensor parallelism gives a process its part of every sequence, so the gradients of those three are
sums over all, as those of the layers are over the data-parallel ones.
"""

from __future__ import annotations

import datetime
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from pretrain_config import differences
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from backfuse import BlockSpec, BlockStack, linear_cross_entropy, parallelize
from backfuse.bench.options import check_device, default_device
from backfuse.bench.shapes import ALL_SHAPES
from backfuse.blocks.devices import DEVICES, Device, measure_cpu
from backfuse.blocks.split import local_spec

if TYPE_CHECKING:
    from pretrain_config import Config

#: What some models do to embeddings and logits, as a config.json says it -> where it does nothing.
SCALES = {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None,
    "embedding_dropout": 0.0, "embd_pdrop": 0.0, "hidden_dropout": 0.0,
}  # fmt: skip

#: Scaled rotary embeddings whose frequencies do not depend on the length of what is read.
SCALED_ROPE = ("linear", "llama3", "yarn")


@dataclass(frozen=True)
class Shape:
    """What the model is: its blocks, how many, and the vocabulary.

    Scaled rotary embeddings have their frequencies here, and a factor of cosine and sine.
    """

    spec: BlockSpec
    layers: int
    vocabulary: int = 0
    tied: bool = False
    frequencies: tuple[float, ...] = ()
    amplitude: float = 1.0

    def angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, fp32 [..., rotary_dim], of scaled rotary embeddings at positions."""
        frequencies = torch.tensor(self.frequencies, device=positions.device).repeat(2)
        turned = positions[..., None].float() * frequencies
        return turned.cos() * self.amplitude, turned.sin() * self.amplitude

    @classmethod
    def of(cls, config: Config) -> Shape:
        """From a shape's name, a config.json or the sizes.

        Raises:
            ValueError: for anything else, a model that cannot be made of equal blocks, or one that
                scales its embeddings or logits.
        """
        if not config.model:
            sizes = config.hidden_size, config.intermediate_size, config.heads, config.kv_heads
            return cls(BlockSpec(*sizes), config.layers, config.vocabulary)
        if config.model in ALL_SHAPES:
            shape = cls(ALL_SHAPES[config.model], config.layers, config.vocabulary)
        elif Path(config.model).is_file():
            from transformers import AutoConfig

            try:
                theirs = AutoConfig.from_pretrained(config.model)
            except (KeyError, TypeError) as error:  # what it is made of is not there, or wrong
                raise ValueError(f"model is {config.model}, which is damaged: {error}") from error
            layers = getattr(theirs, "num_hidden_layers", 1)
            specs = {BlockSpec.from_config(theirs, index) for index in range(layers)}
            if len(specs) != 1:
                raise ValueError(f"model is {config.model}, expected layers, and all alike")
            [spec] = specs
            found = {name: getattr(theirs, name, None) for name in SCALES}
            found["norm_offset"] = spec.norm_offset  # Gemma, which scales its embeddings as well
            for name, value in found.items():
                if value is not None and value != (plain := SCALES.get(name, 0.0)):
                    raise ValueError(
                        f"model is {config.model}, whose {name} is {value}, expected {plain}: "
                        "this script's embedding, last norm and head are plain"
                    )
            if not (vocabulary := config.vocabulary or getattr(theirs, "vocab_size", 0)):
                raise ValueError(
                    f"model is {config.model}, a {theirs.model_type} without a vocab_size, "
                    "expected a language model"
                )
            shape = cls(spec, layers, vocabulary, bool(theirs.tie_word_embeddings))
            if spec.rope and spec.rope_theta is None:
                shape = shape.scaled(theirs)
        else:
            raise ValueError(
                f"model is {config.model!r}, expected a config.json or one of "
                f"{', '.join(ALL_SHAPES)}"
            )
        if shape.spec.rope is None:
            raise ValueError(
                f"model is {config.model}, expected rotary embeddings: this script adds no "
                "positions"
            )
        return shape

    def scaled(self, theirs: Any) -> Shape:
        """With the rotary frequencies of a Hugging Face configuration.

        Raises:
            ValueError: for those that depend on the length of the sequence.
        """
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        kind = theirs.rope_parameters.get("rope_type")
        if kind not in SCALED_ROPE:
            raise ValueError(
                f"model has rotary embeddings scaled by {kind}, expected one of "
                f"{', '.join(SCALED_ROPE)}, or none: its angles depend on the sequence's length"
            )
        try:
            frequencies, amplitude = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"model has rope_parameters {theirs.rope_parameters}, of which transformers makes "
                f"no angles: {error}"
            ) from error
        return replace(self, frequencies=tuple(frequencies.tolist()), amplitude=float(amplitude))


@dataclass(frozen=True)
class Ranks:
    """The processes: `data` many groups of `tensor` many, which share each layer."""

    device: str
    mesh: DeviceMesh
    everyone: DeviceMesh

    @classmethod
    def start(cls, config: Config, shape: Shape) -> Ranks:
        """Meets the other processes of torchrun, or founds a group of one."""
        device = config.device or default_device()
        check_device(device)
        alone: dict[str, Any] = {}
        if not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
            alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        kind = torch.device(device).type
        if kind == "cuda" and not alone:
            device = f"cuda:{os.environ['LOCAL_RANK']}"
            torch.cuda.set_device(device)
        world = 1 if alone else int(os.environ["WORLD_SIZE"])
        tensor = config.tensor_parallel
        data, rest = divmod(world, tensor)
        if rest:
            raise ValueError(
                f"tensor_parallel is {tensor}, expected a divisor of the {world} processes"
            )
        for name, divisor, what in (
            ("batch_size", data, "the data-parallel processes"),
            ("seq_len", tensor, "tensor_parallel"),
        ):
            if getattr(config, name) % divisor:
                raise ValueError(
                    f"{name} is {getattr(config, name)}, expected a multiple of {divisor}: {what}"
                )
        local_spec(shape.spec, tensor)
        limit = datetime.timedelta(seconds=config.timeout)
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=limit, **alone)
        mesh = init_device_mesh(kind, (data, tensor), mesh_dim_names=("data", "tensor"))
        return cls(device, mesh, init_device_mesh(kind, (world,), mesh_dim_names=("everyone",)))

    @property
    def first(self) -> bool:
        """Whether this process speaks for all."""
        return dist.get_rank() == 0

    def sum(self, number: float) -> float:
        """Summed over all processes."""
        total = torch.tensor(float(number), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return float(total)

    def check_same(self, given: dict[str, Any]) -> None:
        """Raises a ValueError, on every rank, unless all were given the same."""
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, given)
        odd = [
            f"rank {rank} ({', '.join(changed)})"
            for rank, theirs in enumerate(everyone)
            if (changed := differences(everyone[0], theirs))
        ]
        if odd:
            raise ValueError(f"expected all ranks to be given the same as rank 0: {'; '.join(odd)}")

    @property
    def layout(self) -> list[int | str]:
        """How the processes are arranged, and on what."""
        kind = torch.device(self.device).type
        return [self.mesh["data"].size(), self.mesh["tensor"].size(), kind]


class Model(nn.Module):
    """Embedding, a stack of blocks, norm, head."""

    def __init__(self, shape: Shape, vocabulary: int, policy: str) -> None:
        super().__init__()
        width = shape.spec.hidden_size
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = BlockStack(shape.spec, shape.layers, policy=policy)
        norm = nn.RMSNorm if shape.spec.norm == "rmsnorm" else nn.LayerNorm
        self.norm = norm(width, eps=shape.spec.norm_eps)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor, labels: Tensor, **packing: Any) -> Tensor:
        """The sum of the cross-entropy of tokens [B, T], in nats."""
        hidden = self.norm(self.blocks(self.embedding(tokens), **packing))
        return linear_cross_entropy(hidden, self.head.weight, labels, reduction="sum")

    @classmethod
    def sharded(cls, config: Config, shape: Shape, vocabulary: int, ranks: Ranks) -> Model:
        """The model with its first weights: the same for any layout, one layer whole at a time."""
        with torch.device("meta"):
            model = cls(shape, vocabulary, config.policy)
        passes = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
        precision = MixedPrecisionPolicy(
            **passes if config.bf16 else {},
            cast_forward_inputs=False,  # the only ones are angles
        )
        torch.manual_seed(config.seed)
        for outer in (model.embedding, model.norm, model.head):
            outer.to_empty(device=ranks.device)
            outer.reset_parameters()
        nn.init.normal_(model.embedding.weight, std=0.02)
        nn.init.normal_(model.head.weight, std=0.02)
        if shape.tied:
            model.head.weight = model.embedding.weight
        for layer in model.blocks.layers:
            layer.to_empty(device=ranks.device)
            layer.reset_parameters()
            if config.tensor_parallel > 1:
                parallelize(layer, ranks.mesh["tensor"])
            if config.compile:
                layer.compile()
            fully_shard(layer, mesh=ranks.mesh["data"], mp_policy=precision)
        fully_shard(model, mesh=ranks.everyone, mp_policy=precision)
        for module in model.modules():  # the loss is divided by all tokens: gradients are summed
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)
                module.set_gradient_divide_factor(1.0)
        return model


def clip_gradients(parameters: list[nn.Parameter], limit: float) -> float:
    """Scales gradients down to a norm; returns what it was.

    By hand, in one message: layers and the rest lie on different meshes.
    """
    parts = [parameter.grad.to_local() for parameter in parameters]
    total = torch.zeros((), dtype=torch.float64, device=parts[0].device)
    for parameter, norm in zip(parameters, torch._foreach_norm(parts), strict=True):
        copies = 1
        for size, placement in zip(parameter.device_mesh.shape, parameter.placements, strict=True):
            copies *= size if placement.is_replicate() else 1
        total += norm.double().square() / copies
    dist.all_reduce(total)
    norm = math.sqrt(float(total))
    if norm > limit:
        torch._foreach_mul_(parts, limit / norm)
    return norm


def cost_model(device: str, dtype: torch.dtype) -> Device:
    """What the planner knows of a device."""
    found = measure_cpu(dtype) if device == "cpu" else known_gpu(device)
    if found is None:
        raise ValueError(
            f"budget: nothing is known of {torch.cuda.get_device_name(device)}, expected one of "
            f"{', '.join(DEVICES)}"
        )
    return found


def known_gpu(device: str) -> Device | None:
    """The table's row of a GPU, by its name."""
    name = torch.cuda.get_device_name(device).lower()
    return next((row for key, row in DEVICES.items() if key.replace("-", " ") in name), None)


def flops_per_second(device: str, dtype: torch.dtype) -> float:
    """What a process's GPU can do at most; infinity where that is not known."""
    if device == "cpu" or dtype != torch.bfloat16:
        return math.inf
    found = known_gpu(device)
    return math.inf if found is None else found.matmul_flops
