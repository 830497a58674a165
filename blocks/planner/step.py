"""Bytes of a whole training step of a model, event by event: what the allocator will see.

    throughout   parameters, optimizer state, the ids; gradients where they were there before
    forward      what the layers keep, one after the other, and a layer's scratch
    loss         all that, the normed hidden states, three times the logits in fp32
    backward     what is still kept, the gradients that are there already, a layer's scratch
    update       all gradients, and what the optimizer makes on the way

Everything has one dtype, the optimizer's states too, as PyTorch's optimizers make them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import nn

from backfuse.blocks.errors import nearest
from backfuse.blocks.lora import Adapters, all_parameters
from backfuse.blocks.policy import Policy
from backfuse.blocks.spec import BlockSpec

from .byte_sizes import parse_bytes
from .choices import Choice
from .scratch import forward_scratch, gradient_bytes

#: Optimizer -> bytes of its state a parameter of so many bytes, as `(per byte, per element)`; eight
#: bits: two states of a byte, and a scale of four bytes for each 256 of them.
OPTIMIZERS: dict[str, tuple[float, float]] = {
    "adamw": (2, 0), "adamw8bit": (0, 2 * (1 + 4 / 256)), "sgd": (0, 0), "none": (0, 0),
}  # fmt: skip

#: Tensors of a parameter's size that AdamW makes while it updates it.
OPTIMIZER_TEMPORARIES = 2


@dataclass(frozen=True)
class ModelSpec:
    """What surrounds the blocks of a language model, and how it is trained.

    Attributes:
        vocab_size: rows of embedding and head.
        tied: whether the head is the embedding.
        trained: whether embedding, last norm and head want gradients.
        optimizer: a key of `OPTIMIZERS`: AdamW's two states, the same in eight bits, SGD without
            momentum, or no optimizer at all.
        world_size: of fully sharded data parallelism: parameters, gradients and states are cut in
            so many parts, but for two layers that are gathered at a time.
        in_flight: micro-batches whose forward pass is over when a backward pass begins (pipeline
            schedules); with more than one, gradients are there from the start.
        loss_tokens: tokens whose logits exist at a time, of a loss that is computed in chunks; None
            for all.
        parameter_bytes: of everything in the model; None for the layers, embedding, one norm's
            weight and the head, in the dtype of the plan.
        trained_bytes: of those that want gradients; None likewise.
    """

    vocab_size: int
    tied: bool = False
    trained: bool = True
    optimizer: str = "adamw"
    world_size: int = 1
    in_flight: int = 1
    loss_tokens: int | None = None
    parameter_bytes: int | None = None
    trained_bytes: int | None = None

    def __post_init__(self) -> None:
        for name in ("parameter_bytes", "trained_bytes"):
            value = getattr(self, name)
            if value is not None:
                parse_bytes(name, value)
        for name in ("vocab_size", "world_size", "in_flight", "loss_tokens"):
            value = getattr(self, name)
            if name == "loss_tokens" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(
                f"optimizer is {self.optimizer!r}, expected one of {', '.join(OPTIMIZERS)}"
                + nearest(self.optimizer, OPTIMIZERS)
            )

    @classmethod
    def from_model(cls, model: nn.Module, **training: Any) -> ModelSpec:
        """What surrounds the layers of a live language model, as `plan` takes it by itself.

        The embedding is the largest of the model, the head a linear layer of its size. Bytes of
        parameters are those of the whole model, whatever else is in it: adapters, positions, a
        tower for images.

        Args:
            model: on any device, also `meta`.
            training: how it is trained: `optimizer`, `world_size`, `in_flight`, `loss_tokens`.

        Raises:
            TypeError: for something that is no module.
            ValueError: for a model without an embedding and a head, or names of training that do
                not exist.
        """
        from backfuse.blocks.adapters.live import surroundings

        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
        known = ("optimizer", "world_size", "in_flight", "loss_tokens")
        for name in training:
            if name not in known:
                raise ValueError(
                    f"training names {name!r}, expected names among {', '.join(known)}"
                    + nearest(name, known)
                )
        found = surroundings(model, **training)
        if found is None:
            raise ValueError(
                f"model is a {type(model).__name__}, expected one with an embedding and a linear "
                "head of as many rows"
            )
        return found

    def state_bytes(self, trained_bytes: int, dtype: torch.dtype) -> int:
        """Of the optimizer's states of parameters of so many bytes."""
        per_byte, per_element = OPTIMIZERS[self.optimizer]
        return int(trained_bytes * per_byte + trained_bytes // dtype.itemsize * per_element)


class LayerBytes(NamedTuple):
    """What a step needs to know of one layer (or of one segment of layers).

    Attributes:
        parameters: bytes of its parameters.
        gradients: bytes of their gradients.
        kept: bytes kept on the device.
        forward: bytes beside that in its forward pass.
        backward: bytes beside that in its backward pass; its gradients are in it.
        largest: bytes of the gradient of its largest parameter.
        layers: how many layers it is.
    """

    parameters: int
    gradients: int
    kept: int
    forward: int
    backward: int
    largest: int
    layers: int = 1


def layer_bytes(
    spec: BlockSpec,
    policy: Policy,
    wanted: frozenset[str],
    choice: Choice,
    layers: int = 1,
    *,
    tokens: int,
    dtype: torch.dtype,
    chunk_size: int,
    adapters: Adapters = (),
) -> LayerBytes:
    """Of a layer, or of a segment of like ones.

    Args:
        spec: each layer.
        policy: what it keeps.
        wanted: names of what wants a gradient.
        choice: what it costs, of a whole step.
        layers: how many.
        tokens: rows.
        dtype: of everything.
        chunk_size: rows of a chunk.
        adapters: of each layer's projections.
    """
    everything = all_parameters(spec, adapters)
    own = [prod(shape) for name, shape in everything.items() if name in wanted]
    size = sum(map(prod, everything.values())) * dtype.itemsize
    scratch = forward_scratch(
        spec, policy, wanted, tokens=tokens, dtype=dtype, chunk_size=chunk_size
    )
    return LayerBytes(
        layers * size, layers * gradient_bytes(spec, wanted, dtype, adapters),
        choice.kept, scratch, choice.transient, max(own, default=0) * dtype.itemsize, layers,
    )  # fmt: skip


@dataclass(frozen=True)
class Event:
    """A moment of a step.

    Attributes:
        name: `"start"`, `"forward"`, `"loss"`, `"backward"`, `"embedding"` or `"update"`.
        layer: the first layer it is about; None for none.
        bytes: on the device, at most while it lasts.
    """

    name: str
    layer: int | None
    bytes: int


@dataclass(frozen=True)
class Fixed:
    """Bytes of a step that no choice of policies changes.

    Attributes:
        floor: there throughout.
        loss: beside what is kept, while the loss and its gradient are computed.
        head: gradients that are there when the layers' backward passes begin.
        embedding: beside the layers' gradients, after the last of them.
        update: beside the floor, in the optimizer's step.
    """

    floor: int
    loss: int
    head: int
    embedding: int
    update: int


def _cut(size: int, parts: int) -> int:
    return -(-size // parts)


def fixed(
    model: ModelSpec,
    layers: Sequence[LayerBytes],
    *,
    tokens: int,
    hidden_size: int,
    dtype: torch.dtype,
    foreach: bool,
) -> Fixed:
    """What surrounds the layers, in bytes.

    Args:
        model: see `ModelSpec`.
        layers: the first layer first.
        tokens: of a micro-batch.
        hidden_size: width of the residual stream.
        dtype: of everything.
        foreach: whether the optimizer updates all parameters together (on a GPU PyTorch's do).
    """
    size, parts = dtype.itemsize, model.world_size
    table, norm = model.vocab_size * hidden_size * size, hidden_size * size
    stream = tokens * hidden_size * size
    tables = (1 if model.tied else 2) * table + norm
    table_grad = table if model.trained else 0
    layer_grads = sum(layer.gradients for layer in layers)
    trained = layer_grads + (tables if model.trained else 0)
    parameters = tables + sum(layer.parameters for layer in layers)
    rest = 0  # gradients of what is neither in the layers nor in tables
    if model.trained_bytes is not None:
        rest = max(0, model.trained_bytes - trained)
        trained = model.trained_bytes
    if model.parameter_bytes is not None:
        parameters = model.parameter_bytes
    floor = _cut(parameters, parts) + _cut(model.state_bytes(trained, dtype), parts)
    floor += 2 * torch.int64.itemsize * tokens
    if parts > 1:  # the layer at work and the next are whole, and so is a gradient
        floor += max(2 * layer.parameters + layer.gradients for layer in layers)
    gathered = model.in_flight > 1  # gradients of earlier micro-batches
    floor += _cut(trained, parts) if gathered else 0
    head = 0 if gathered or not model.trained else _cut(table + norm, parts)
    rows = min(tokens, model.loss_tokens or tokens)
    logits, high = rows * model.vocab_size, max(size, torch.float32.itemsize)
    # log-probabilities, and the gradients of them and of the logits; then those of the head
    loss = 2 * stream + max(3 * logits * high, logits * size + table_grad + stream)
    largest = max([table_grad, *(layer.largest for layer in layers)])
    makes = 0 if model.optimizer in ("sgd", "none") else _cut(trained, parts)
    if makes and not foreach:  # one parameter after the other
        makes = OPTIMIZER_TEMPORARIES * _cut(largest, parts)
    return Fixed(
        floor, loss, head, head + stream + table_grad + (0 if gathered else _cut(rest, parts)),
        (0 if gathered else _cut(trained, parts)) + makes,
    )  # fmt: skip


def timeline(model: ModelSpec, layers: Sequence[LayerBytes], around: Fixed) -> list[Event]:
    """The step, event by event.

    Args:
        model: see `ModelSpec`.
        layers: the first layer first.
        around: see `fixed`.
    """
    floor = around.floor + (model.in_flight - 1) * sum(layer.kept for layer in layers)
    events = [Event("start", None, around.floor)]
    kept = first = 0
    for layer in layers:
        kept += layer.kept
        events.append(Event("forward", first, floor + kept + layer.forward))
        first += layer.layers
    events.append(Event("loss", None, floor + kept + around.loss))
    gradients = around.head
    for layer in reversed(layers):
        first -= layer.layers
        events.append(Event("backward", first, floor + kept + gradients + layer.backward))
        kept -= layer.kept
        if model.in_flight == 1:
            gradients += _cut(layer.gradients, model.world_size)
    events.append(Event("embedding", None, floor + gradients - around.head + around.embedding))
    if model.optimizer != "none":
        events.append(Event("update", None, around.floor + around.update))
    return events
