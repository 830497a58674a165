"""Tensor parallelism: a block whose heads and FFN columns are split over the ranks of a mesh.

    each half, on every rank:  out = x + reduce_scatter(half(all_gather(x)))

q, k, v, gate and up are split by rows (a rank has some heads, some of f), o and down by columns;
so a half ends in a partial sum. Between the halves a rank has its part of every sequence alone,
and so has what a block keeps of `x` and `mid`. Norms are computed of the gathered input, on every
rank: that is cheap, and nothing but `x` need be kept or gathered for it.

| | forward | backward |
|---|---|---|
| all-gathers of a half | 1 (x) | 2 (the output's gradient; x, for both recompute and weights) |
| reduce-scatters of a half | 1 | 1 (the input's gradient) |

With `sequence_parallel=False` every rank has whole sequences, and there is an all-reduce in place
of each reduce-scatter and nothing in place of an all-gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler's own imports the compiler at once

from .adapters.patched import state_of
from .block import TransformerBlock
from .call import Call, Inputs
from .context import Context
from .function import HalfJob, run_job
from .inputs import check_hidden_states, check_weights, prepare
from .policy import KEEP
from .replay import effective_policies
from .run import Gradients, Kept, wanted_names
from .spec import BlockSpec, check_spec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: The collectives' names from PyTorch 2.13 on, or those before.
_all_gather: Any
_reduce_scatter: Any
_all_gather, _reduce_scatter = (
    getattr(dist, new if hasattr(dist, new) else old, None)
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    )
)

#: Fields that have to be so: what stands behind the sum over ranks, or crosses heads, is not split.
EXPECTED = {
    "norm_position": "pre", "stacked_qkv": False, "stacked_gate_up": False, "o_bias": False,
    "down_bias": False, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "activation_dropout": 0.0, "residual_multiplier": 1.0, "parallel_residual": False,
    "layer_scale": False, "conv1d": False,
}  # fmt: skip

#: Ends of the names of parameters that are split -> the dimension; the others are on every rank.
SPLIT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}


def local_spec(spec: BlockSpec, ranks: int) -> BlockSpec:
    """What one of some ranks has of a block: its heads, and its part of the FFN.

    Raises:
        TypeError: for a spec that is none.
        ValueError: for sizes that do not divide, or a block that cannot be split, naming the field.
    """
    check_spec(spec)
    if ranks == 1:
        return spec
    for name, expected in EXPECTED.items():
        if getattr(spec, name) != expected:
            raise ValueError(
                f"{name} is {getattr(spec, name)!r}, expected {expected!r} of a block that is "
                "split over ranks"
            )
    if spec.qk_norm == "full":
        raise ValueError("qk_norm is 'full', expected 'head' or None: 'full' is over all heads")
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in sizes:
        if getattr(spec, name) % ranks:
            raise ValueError(
                f"{name} is {getattr(spec, name)}, expected a multiple of {ranks}, the ranks it is "
                "split over"
            )
    divided = {name: getattr(spec, name) // ranks for name in sizes}
    return spec.replace(**divided, head_dim=spec.head_dim)


@dataclass(frozen=True)
class Parallel:
    """How a block is split.

    Attributes:
        mesh: the ranks, in one dimension.
        spec: what one rank has.
        sequence_parallel: whether a rank has only its part of every sequence outside the halves.
    """

    mesh: DeviceMesh
    spec: BlockSpec
    sequence_parallel: bool

    def gather(self, x: Tensor, batch_size: int) -> Tensor:
        """Whole sequences `[tokens, h]` from each rank's part of them."""
        if not self.sequence_parallel:
            return x
        ranks, (rows, width) = self.mesh.size(), x.shape
        parts = x.new_empty(ranks * rows, width)
        _all_gather(parts, x.contiguous(), self.mesh.get_group())
        return parts.view(ranks, batch_size, -1, width).transpose(0, 1).reshape(-1, width)

    def reduce(self, partial: Tensor, batch_size: int) -> Tensor:
        """The sum over ranks `[tokens, h]`, of which each keeps its part; may write `partial`."""
        if not self.sequence_parallel:
            dist.all_reduce(partial, group=self.mesh.get_group())
            return partial
        ranks, width = self.mesh.size(), partial.shape[1]
        parts = partial.view(batch_size, ranks, -1, width).transpose(0, 1).reshape(-1, width)
        own = partial.new_empty(len(parts) // ranks, width)
        _reduce_scatter(own, parts, group=self.mesh.get_group())
        return own

    def sum_replicated(self, names: Sequence[str], grads: list[Tensor | None]) -> None:
        """Sums over ranks, in one message, the gradients of what is on every rank."""
        shared = [
            index for index, name in enumerate(names)
            if grads[index] is not None and _dimension(name) is None
        ]  # fmt: skip
        if not shared:
            return
        given = [grad for index in shared if (grad := grads[index]) is not None]
        flat = torch.cat([grad.to(_widest(given)).flatten() for grad in given])
        dist.all_reduce(flat, group=self.mesh.get_group())
        sums = flat.split([grad.numel() for grad in given])
        for index, grad, total in zip(shared, given, sums, strict=True):
            grads[index] = total.view_as(grad).to(grad.dtype)

    @_disable_dynamo
    def forward(self, block: TransformerBlock, hidden_states: Tensor, options: Any) -> Tensor:
        """What `TransformerBlock.forward` does, on this rank's part."""
        check_hidden_states(hidden_states, self.spec)
        whole = hidden_states
        if self.sequence_parallel:  # of the whole sequences' shape, and no memory
            batch_size, length, width = hidden_states.shape
            whole = hidden_states.new_empty(()).expand(batch_size, length * self.mesh.size(), width)
        call, inputs = prepare(
            self.spec, whole, **options, training=block.training, chunk_size=block.chunk_size,
            impl=block.impl, ffn_strategy=block.ffn_strategy, lossy=block.policy.lossy,
            offload_dir=block.offload_dir, context=block.context,
        )  # fmt: skip
        call = _partial(call)
        named, adapters = block.weights()
        parts: dict[str, Any] = named  # DTensors
        if adapters:
            raise ValueError(
                f"{adapters[0][0]} has adapters, expected none in a block that is split over ranks"
            )
        weights = {name: part.to_local() for name, part in parts.items()}
        weights = check_weights(weights, self.spec.parameters(), hidden_states, call)
        [policy] = effective_policies([block.policy], kind=None) or [KEEP]
        halves = ("attn", self.spec.attention_parameters()), ("ffn", self.spec.ffn_parameters())
        for half, shapes in halves:
            named = {name: weights[name] for name in shapes}
            wanted = wanted_names(hidden_states, named)
            job = ParallelJob(HalfJob(call, half, tuple(named), wanted, policy), self)
            side = inputs if half == "attn" else Inputs()
            hidden_states = run_job(job, side, hidden_states, list(named.values()))
        return hidden_states


def _widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """fp32, or fp64 where one is."""
    double = any(tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if double else torch.float32


@lru_cache(maxsize=4096)
def _partial(call: Call) -> Call:
    """The call without its residual, the same one each time."""
    return replace(call, residual=False)


@dataclass(frozen=True, eq=False)
class ParallelJob:
    """One half of a block on one of the ranks that share it; its input is kept as this rank's part.

    Attributes:
        half: what the rank computes, of whole sequences.
        parallel: how the block is split.
    """

    half: HalfJob
    parallel: Parallel

    @property
    def call(self) -> Call:
        """The half's call."""
        return self.half.call

    @property
    def label(self) -> str:
        """For messages."""
        return self.half.label

    @property
    def input(self) -> str:
        """The name under which the half keeps its input."""
        return "x" if self.half.half == "attn" else "mid"

    @property
    def offloads(self) -> bool:
        """Whether anything does."""
        return self.half.offloads

    def away(self, kept: Kept) -> list[str]:
        """Names of those kept tensors that go elsewhere."""
        return self.half.away(kept)

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        """The output, and what is kept."""
        batch = self.call.batch_size
        partial, kept = self.half.forward(self.parallel.gather(x, batch), weights, inputs)
        if self.input in kept:
            kept[self.input] = x
        return x + self.parallel.reduce(partial, batch), kept

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        """The gradient of x and those of the weights."""
        batch, parallel = self.call.batch_size, self.parallel
        if self.input in kept:
            kept = {**kept, self.input: parallel.gather(kept[self.input], batch)}
        partial, grads = self.half.backward(parallel.gather(dz, batch), weights, inputs, kept)
        parallel.sum_replicated(self.half.names, grads)
        return None if partial is None else dz + parallel.reduce(partial, batch), grads


def _dimension(name: str) -> int | None:
    """Along which dimension a parameter is split; None: it is on every rank."""
    if name.endswith(".sinks"):
        return 0
    return SPLIT.get(name.split(".")[-2])


def _check_meshes(mesh: object, context: object) -> None:
    """Raise unless one or both are meshes of one dimension, and not the same ranks."""
    # Imported here: it takes a while, and a build of PyTorch may lack it.
    from torch.distributed.device_mesh import DeviceMesh

    given = {"mesh": mesh, "context": context}
    for name, one in given.items():
        if one is None:
            continue
        if not isinstance(one, DeviceMesh):
            raise TypeError(f"{name} is a {type(one).__name__}, expected a DeviceMesh")
        if one.ndim != 1:
            raise ValueError(
                f"{name} has {one.ndim} dimensions, expected 1: name one, as mesh['tp']"
            )
    ranks = [set(one.mesh.tolist()) for one in given.values() if isinstance(one, DeviceMesh)]
    if not ranks:
        raise TypeError("mesh and context are both None, expected a DeviceMesh in one of them")
    if len(set.intersection(*ranks)) > 1 and len(ranks) > 1:
        raise ValueError(
            "mesh and context are the same ranks, expected two dimensions of one mesh"
        )


def _blocks(module: nn.Module) -> dict[str, TransformerBlock]:
    """The blocks of a module, by path; at least one."""
    blocks = {n: part for n, part in module.named_modules() if isinstance(part, TransformerBlock)}
    if blocks:
        return blocks
    for name, part in module.named_modules():
        if state_of(part) is not None:
            raise ValueError(
                f"{name or 'module'} is a patched {type(part).__name__}, expected a "
                "TransformerBlock: a patched layer cannot be split over ranks"
            )
    raise ValueError("module holds no TransformerBlock, expected at least one")


def parallelize(
    module: nn.Module,
    mesh: DeviceMesh | None = None,
    *,
    sequence_parallel: bool = True,
    context: DeviceMesh | None = None,
) -> nn.Module:
    """Splits every block of a module over the ranks of a mesh, in place: its weights, the tokens
    of its sequences, or both.

    Over `mesh` (tensor parallelism) the blocks' parameters become DTensors (of rank 0's values)
    under the same names, so that `fully_shard` over another dimension of the mesh, checkpoints and
    optimizers take them. A block then wants, on each rank, its part of every sequence:
    `[batch, seq_len / ranks, hidden_size]`, the first rank the first part; angles, masks and
    `cu_seqlens` are of whole sequences. What stands before and behind the blocks sees these parts
    too: the gradients of its parameters have to be summed over the mesh.

    Over `context` (context parallelism, by all-to-all around the attention) parameters stay as they
    are. A block wants each rank's part of every sequence, as above, all of one length, and the
    angles (`position_embeddings`) of that part; by default they are those of its place. Masks and
    `cu_seqlens` are of whole sequences. All parameters' gradients, the blocks' too, are of the
    rank's tokens: average them over `context` as over data-parallel ranks, as DDP or `fully_shard`
    over the flattened dimensions does.

    With both, a rank's part over `context` is what `mesh` splits further.

    Args:
        module: a `TransformerBlock`, a `BlockStack`, or a model of them. In a stack that is split
            over `mesh` no layer can share a segment with others.
        mesh: of one dimension; of one rank, the module stays as it is. `fully_shard` comes after.
        sequence_parallel: False: every rank of `mesh` has whole sequences, at every place.
        context: of one dimension; of one rank, the module stays as it is. Its ranks divide the
            heads (those of one rank of `mesh`), and the heads of keys, or are a multiple of these.

    Returns:
        The module.

    Raises:
        TypeError: for something that is no module, or no mesh.
        ValueError: for a mesh of several dimensions, the same ranks twice, a module without blocks
            or with blocks that are split or sharded already, dropout, and what `local_spec`
            refuses: heads that do not divide, say. The module is then as it was.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Module")
    _check_meshes(mesh, context)
    ranks = None if context is None or context.size() == 1 else Context.of(context)
    blocks, specs = _blocks(module), {}
    for path, block in blocks.items():
        sharded = any(isinstance(parameter, DTensor) for parameter in block.parameters())
        if block.parallel or block.context or (sharded and mesh is not None):
            raise ValueError(
                f"{path or 'module'} is sharded already, expected a whole block: parallelize comes "
                "before fully_shard, and once, with mesh and context together"
            )
        specs[path] = block.spec if mesh is None else local_spec(block.spec, mesh.size())
        if ranks is not None:
            ranks.check(specs[path])
    for path, block in blocks.items():
        block.context = ranks
        if mesh is None or mesh.size() == 1:  # what a split refuses, one rank does as ever
            continue
        for name, parameter in list(block.named_parameters()):
            dimension = _dimension(name)
            placement = Replicate() if dimension is None else Shard(dimension)
            owner, _, kind = name.rpartition(".")
            split = distribute_tensor(parameter.detach(), mesh, [placement])
            block.get_submodule(owner).register_parameter(
                kind, nn.Parameter(split, requires_grad=parameter.requires_grad)
            )
        block.parallel = Parallel(mesh, specs[path], sequence_parallel)
    return module
