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

In a patched model what stands around the layers knows of no parts: the first layer of a list takes
its part of whole sequences (its backward gathers), the last one gathers its output (its backward
takes a part). All ranks then compute the same embeddings, loss and gradients of these.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._compile import _disable_dynamo  # torch.compiler's own imports the compiler at once

from .adapters.calls import weights_of
from .adapters.patched import state_of, swap
from .adapters.recipe import OwnForward
from .block import TransformerBlock
from .call import Call, Inputs
from .context import Context
from .function import HalfJob, run_job
from .inputs import check_hidden_states, check_weights, prepare
from .lora import Adapters, adapter_parameters
from .policy import KEEP, Policy
from .replay import effective_policies
from .run import Gradients, Kept, wanted_names
from .spec import BlockSpec
from .split import check_adapters, dimension_of, is_split, local_spec

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


@dataclass(frozen=True)
class Parallel:
    """How a block is split.

    Attributes:
        mesh: the ranks, in one dimension.
        spec: what one rank has.
        sequence_parallel: whether a rank has only its part of every sequence outside the halves.
        enters: whether the block is given whole sequences all the same, and takes its part.
        leaves: whether it gives whole sequences all the same.
    """

    mesh: DeviceMesh
    spec: BlockSpec
    sequence_parallel: bool
    enters: bool = False
    leaves: bool = False

    @property
    def parts(self) -> int:
        """Of how many parts like the block's input whole sequences are."""
        return self.mesh.size() if self.sequence_parallel and not self.enters else 1

    def own(self, x: Tensor, batch_size: int) -> Tensor:
        """This rank's part of whole sequences `[tokens, h]`."""
        ranks, width = self.mesh.size(), x.shape[1]
        part = x.view(batch_size, ranks, -1, width)[:, self.mesh.get_local_rank()]
        return part.clone(memory_format=torch.contiguous_format).view(-1, width)

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
            if grads[index] is not None and dimension_of(name) is None
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
    def forward(
        self,
        hidden_states: Tensor,
        weights: Mapping[str, Any],
        policy: Policy,
        *,
        adapters: Adapters,
        **options: Any,
    ) -> Tensor:
        """What `block` does (see `function.py`), on this rank's part; the weights are DTensors."""
        check_hidden_states(hidden_states, self.spec)
        check_adapters(adapters)
        batch_size, length, width = hidden_states.shape
        ranks = self.mesh.size() if self.sequence_parallel else 1
        if length * self.parts % ranks:
            raise ValueError(
                f"hidden_states has {length} tokens a sequence, expected a multiple of {ranks}, "
                "the ranks that have a part of each: pad them, or sequence_parallel=False"
            )
        # of the whole sequences' shape, and no memory
        whole = hidden_states.new_empty(()).expand(batch_size, length * self.parts, width)
        call, inputs = prepare(
            self.spec, whole, lossy=policy.lossy, adapters=[adapters], **options
        )
        call = _partial(call)
        for name, weight in weights.items():
            if not hasattr(weight, "to_local"):
                raise TypeError(
                    f"{name} is a {type(weight).__name__}, expected a DTensor: parallelize comes "
                    "after whatever changes a block's parameters (adapters, say)"
                )
        weights = {name: weight.to_local() for name, weight in weights.items()}
        halves = ("attn", self.spec.attention_parameters()), ("ffn", self.spec.ffn_parameters())
        jobs = []
        [policy] = effective_policies([policy], kind=None) or [KEEP]
        for half, shapes in halves:
            own = tuple(one for one in adapters if f"{one[0]}.weight" in shapes)
            shapes = {**shapes, **adapter_parameters(self.spec, own)}
            named = check_weights(weights, shapes, hidden_states, call)
            jobs.append((half, own, named))
        x = hidden_states
        if self.sequence_parallel and self.enters:
            x = _Exchange.apply(x, self, True)
        for half, own, named in jobs:
            job = HalfJob(call, half, tuple(named), wanted_names(x, named), policy, own)
            side = inputs if half == "attn" else Inputs()
            x = run_job(ParallelJob(job, self), side, x, list(named.values()))
        return _Exchange.apply(x, self, False) if self.sequence_parallel and self.leaves else x


class _Exchange(torch.autograd.Function):
    """Whole sequences to this rank's part of them, or back; each is the other's backward pass.

    Of whole sequences every rank has the same, and the same gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parallel: Parallel, take: bool) -> Tensor:
        """`[batch, seq_len, h]` each."""
        ctx.parallel, ctx.take = parallel, take
        return _exchanged(x, parallel, take)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """The other way."""
        return _exchanged(dy, ctx.parallel, not ctx.take), None, None


def _exchanged(x: Tensor, parallel: Parallel, take: bool) -> Tensor:
    batch_size, _, width = x.shape
    exchange = parallel.own if take else parallel.gather
    exchanged = exchange(x.reshape(-1, width), batch_size)
    # no view, as in `run_job`
    return torch.ops.aten._unsafe_view(exchanged, [batch_size, -1, width])


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


@dataclass(frozen=True)
class _Whole:
    """A block that is to be split.

    Attributes:
        weights: its parameters by the spec's names.
        parallel: how.
    """

    weights: Mapping[str, Tensor]
    parallel: Parallel


def _sharded(path: str) -> ValueError:
    return ValueError(
        f"{path or 'module'} is sharded already, expected a whole block: parallelize comes before "
        "fully_shard, and once, with mesh and context together"
    )


def _whole(module: nn.Module, path: str, mesh: DeviceMesh, sequence_parallel: bool) -> _Whole:
    """A block of a module as it is, and how it is to be split.

    Raises:
        ValueError: see `parallelize`.
    """
    layer, name, ends = module.get_submodule(path), path or "module", (False, False)
    own = dict(layer.named_parameters())
    if any(map(is_split, own.values())):
        raise _sharded(path)
    if isinstance(layer, TransformerBlock):
        spec, (weights, adapters) = layer.spec, layer.weights()
    else:
        state = state_of(layer)
        assert state is not None
        spec, ends = state.recipe.spec, _ends(module, path)
        if state.recipe.rest is not None:
            raise ValueError(
                f"{name} is a {type(layer).__name__} of which the attention half alone is a "
                "block's, expected a whole block"
            )
        try:
            weights, adapters = weights_of(layer, state.recipe)
        except OwnForward as reason:
            raise ValueError(
                f"{name} runs its own forward for now, expected a block's: {reason}"
            ) from reason
    spec = local_spec(spec, mesh.size())
    check_adapters(adapters)
    weights |= _inactive(layer, weights, own)
    used = set(map(id, weights.values()))
    if unused := [n for n, parameter in own.items() if id(parameter) not in used]:
        raise ValueError(
            f"{name} holds {unused[0]}, expected no parameters but those that it computes with"
        )
    return _Whole(weights, Parallel(mesh, spec, sequence_parallel, *ends))


def _inactive(
    layer: nn.Module, weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The parameters of LoRA's adapters that are not active, by the names they have when they are.

    Args:
        layer: the block, or the patched layer.
        weights: what it computes with now.
        own: its parameters by their paths.
    """
    state, found = state_of(layer), {}
    places = {name: name for name in weights} if state is None else state.recipe.names
    parts = ((name.rpartition(".")[0], path.rpartition(".")[0]) for name, path in places.items())
    projections = {place: name for name, place in parts}
    for path, parameter in own.items():
        place, mark, rest = path.partition(".lora_")
        if mark and rest[:2] in ("A.", "B.") and place in projections:
            found[f"{projections[place]}.lora_{rest}"] = parameter
    return found


def _ends(module: nn.Module, path: str) -> tuple[bool, bool]:
    """Whether a patched layer is the first of those that follow one another, and the last.

    Raises:
        ValueError: for one that follows another layer, which is not patched.
    """
    place, _, _ = path.rpartition(".")
    owner = module.get_submodule(place)
    if not path or not isinstance(owner, nn.ModuleList | nn.Sequential):
        return True, True
    layers = list(owner.children())
    for name, layer in owner.named_children():
        if state_of(layer) is None:
            raise ValueError(
                f"{place}.{name} is a {type(layer).__name__} that is not patched, expected all "
                f"layers of {place} to be: what is between them is split"
            )
    layer = module.get_submodule(path)
    return layer is layers[0], layer is layers[-1]


def _check_ties(module: nn.Module, wholes: Mapping[str, _Whole]) -> None:
    """Raise a ValueError for a parameter of a block that stands anywhere else too."""
    split = {id(weight) for whole in wholes.values() for weight in whole.weights.values()}
    seen: dict[int, str] = {}
    names = (
        (f"{path}.{kind}", parameter) for path, part in module.named_modules()
        for kind, parameter in part.named_parameters(recurse=False, remove_duplicate=False)
    )  # fmt: skip
    for name, parameter in names:  # a module that has two names is there once
        if id(parameter) in split and seen.setdefault(id(parameter), name) != name:
            raise ValueError(
                f"{seen[id(parameter)]} and {name} are one parameter, expected a block's weights "
                "to be its own: each is split by itself"
            )


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
    over the flattened dimensions does. With both, a rank's part over `context` is what `mesh`
    splits further.

    A patched model (`patch` comes first) is split over `mesh` alone. It is called with whole
    sequences, the same on every rank, and gives them: the first of its layers takes its part, the
    last gathers. What stands around the layers stays whole, and its gradients are the same on every
    rank; what stands between them may not mix tokens. Where a layer's own forward would have to run
    (with a cache, say) it raises a ValueError.

    Args:
        module: a `TransformerBlock`, a `BlockStack`, or a model of them; or a patched model. In a
            stack that is split over `mesh` no layer can share a segment with others.
        mesh: of one dimension; of one rank, the module stays as it is. `fully_shard` comes after.
        sequence_parallel: False: every rank of `mesh` has whole sequences, at every place.
        context: of one dimension; of one rank, the module stays as it is. Its ranks divide the
            heads (those of one rank of `mesh`), and the heads of keys, or are a multiple of these.

    Returns:
        The module.

    Raises:
        TypeError: for something that is no module, or no mesh.
        ValueError: for a mesh of several dimensions, the same ranks twice, a module without blocks
            or with blocks that are split or sharded already, dropout over `context`, a patched
            model over it, layers that are patched by half or run their own forward, and what
            `local_spec` refuses: heads that do not divide, say; for adapters that drop out, or have
            a bias behind the sum over ranks. The module is then as it was.
    """
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    if not isinstance(module, nn.Module):
        raise TypeError(f"module is a {type(module).__name__}, expected a torch.nn.Module")
    _check_meshes(mesh, context)
    ranks = None if context is None or context.size() == 1 else Context.of(context)
    layers = {
        path: part for path, part in module.named_modules()
        if isinstance(part, TransformerBlock) or state_of(part) is not None
    }  # fmt: skip
    if not layers:
        raise ValueError(
            f"module is a {type(module).__name__} that holds no TransformerBlock and no patched "
            "layer, expected at least one: patch comes first"
        )
    wholes = {}
    for path, layer in layers.items():
        own = isinstance(layer, TransformerBlock)
        if own and (layer.parallel or layer.context or any(map(is_split, layer.parameters()))):
            raise _sharded(path)
        if ranks is not None and not own:
            raise ValueError(
                f"{path or 'module'} is a patched {type(layer).__name__}, expected a "
                "TransformerBlock: of a patched model tokens are not split"
            )
        if mesh is not None and mesh.size() > 1:  # what a split refuses, one rank does as ever
            wholes[path] = _whole(module, path, mesh, sequence_parallel)
        if ranks is not None:
            ranks.check(wholes[path].parallel.spec if path in wholes else layer.spec)
    _check_ties(module, wholes)
    for path, layer in layers.items():
        if isinstance(layer, TransformerBlock):
            layer.context = ranks
        if path not in wholes:
            continue
        whole = wholes[path]
        names = {id(parameter): name for name, parameter in layer.named_parameters()}
        for name, parameter in whole.weights.items():
            dimension = dimension_of(name)
            placement = Replicate() if dimension is None else Shard(dimension)
            owner, _, kind = names[id(parameter)].rpartition(".")
            split = distribute_tensor(parameter.detach(), mesh, [placement])
            layer.get_submodule(owner).register_parameter(
                kind, nn.Parameter(split, requires_grad=parameter.requires_grad)
            )
        if isinstance(layer, TransformerBlock):
            layer.parallel = whole.parallel
        elif (state := state_of(layer)) is not None:
            swap(layer, replace(state, parallel=whole.parallel))
    return module
