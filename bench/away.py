"""What autograd saves, in host memory: PyTorch's hooks, and layers checkpointed under them.

On a CPU host memory is the device's own: there files stand for it, so that what the allocator sees
is what a GPU would hold.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.offload import Buffer, file_buffers

from .own import stack
from .plain import PlainStack, rotary_of
from .problem import Case, Contender, Problem
from .ways import Way, checkpointed


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Of the files; removed when Python ends."""
    return tempfile.TemporaryDirectory(prefix="backfuse-bench-")


def directory_of(case: Case) -> Path | None:
    """Where the files are that stand for host memory; None on a GPU."""
    return None if case.cuda else Path(_folder().name)


def saved_away(directory: Path | None) -> AbstractContextManager[Any]:
    """What autograd saves within is kept in pinned host memory, or in files of that directory."""
    if directory is None:
        return torch.autograd.graph.save_on_cpu(pin_memory=True)

    def pack(x: Tensor) -> Tensor | tuple[Buffer, Tensor]:
        if not x.numel():
            return x
        [buffer] = file_buffers({"x": x}, directory).values()
        buffer.write(x.detach())
        return buffer, x.to("meta")

    def unpack(packed: Tensor | tuple[Buffer, Tensor]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        buffer, like = packed
        x = torch.empty(like.shape, dtype=like.dtype)
        buffer.read(x)
        return x

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def _with_mlp(layer: Any, mlp: nn.Module) -> nn.Module:
    """A layer that shares all with another one but its MLP."""
    other = copy.copy(layer)
    other._modules = {**layer._modules, "mlp": mlp}
    return other


def on_cpu(
    problem: Problem,
    policy: str,
    *,
    name: str,
    directory: Path | None,
    way: Way = checkpointed,
    mlp: Callable[[Case, nn.Module], nn.Module] | None = None,
) -> Contender:
    """A stack whose layers run in that way, what they save being elsewhere.

    Args:
        problem: a stack.
        policy: none.
        name: the contender's.
        directory: of files that stand for host memory; None for host memory.
        way: how a layer is called.
        mlp: makes the MLP that stands in a layer for its own.
    """
    plain: Any = problem.module
    layers = list(plain.layers)
    if mlp is not None:
        layers = [_with_mlp(layer, mlp(problem.case, layer.mlp)) for layer in layers]
    run = PlainStack(layers, way, rotary_of(plain))

    def run_away(x: Tensor) -> Tensor:
        with saved_away(directory):
            return run(x)

    parameters = dict(plain.named_parameters())
    return Contender(name, run_away, parameters, note=problem.kind)


def contender(problem: Problem, policy: str, *, name: str, way: Way) -> Contender:
    """`on_cpu`, where this device's host memory is."""
    return on_cpu(problem, policy, name=name, directory=directory_of(problem.case), way=way)


def ours(problem: Problem, policy: str) -> Contender:
    """`BlockStack`, whose policy may offload."""
    return stack(problem, policy, directory_of(problem.case))
