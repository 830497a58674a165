"""A copy of a layer with random weights, and what is seen of it while it runs.

A live layer says little about itself: names differ from family to family, and its weights may all
be ones. So a copy of it, on the CPU, in fp32, with every parameter random, runs once on random
input, and what its parts were handed and gave is written down. No memory is taken on the layer's
device, no parameter of it is read, and a layer on the meta device will do as well.

Dropout is made the identity meanwhile, and noted: which elements would have dropped out.
"""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from backfuse.blocks.layouts import as_parameter, in_order
from backfuse.blocks.spec import BlockSpec
from backfuse.kernels.reference.rope import rope_cos_sin

from .attributes import NotUnderstood
from .peft import active_of

#: Sequences and tokens of the input: unlike each other, and unlike most sizes of a layer.
BATCH_SIZE, SEQ_LEN = 2, 7

#: By how much activations are made large: beyond the bounds that models clamp them to (4 to 16).
LARGE = 100.0

#: Where a module holds hooks.
HOOKS = [name for name in vars(nn.Module()) if "hook" in name and "state_dict" not in name]

#: Arguments of a layer's forward that are known besides its input, which comes first.
MASK, ANGLES = "attention_mask", "position_embeddings"


def stand_in(layer: nn.Module, original: type[nn.Module]) -> nn.Module:
    """A copy on the CPU, in fp32, with random parameters and buffers, without hooks, in training.

    Args:
        layer: the live layer; only looked at.
        original: the class of the copy.

    Raises:
        Exception: what the layer's own parts raise on being copied.
    """
    generator = torch.Generator().manual_seed(0)
    memo: dict[int, Any] = {}
    for parameter in layer.parameters():
        # uniform, of standard deviation 1 / sqrt(width); what is a vector differs from 0 and 1
        matrix = parameter.dim() > 1
        width = (3 / max(parameter.shape[1:].numel(), 1)) ** 0.5 if matrix else 0.5
        fresh = torch.empty(parameter.shape).uniform_(-width, width, generator=generator)
        memo[id(parameter)] = nn.Parameter(fresh if matrix else fresh + 0.75, requires_grad=False)
    for buffer in layer.buffers():
        if buffer.is_floating_point():  # what reads it is not understood: it may change any time
            known = torch.rand(buffer.shape, generator=generator) + 0.75
        else:
            known = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu()
        memo[id(buffer)] = known.clone()
    for module in layer.modules():  # somebody's hooks are not to be called, nor copied
        for name in HOOKS:
            if isinstance(hooks := vars(module).get(name), dict):
                memo[id(hooks)] = type(hooks)()
    result = copy.deepcopy(layer, memo)
    result.__class__ = original
    while wrapped := [(p, x) for p, m in result.named_modules() if p and (x := _inner(m))]:
        result.set_submodule(*wrapped[0])  # the paths below it are others then
    return result.train()


def _inner(module: nn.Module) -> nn.Module | None:
    """What PEFT put this around, and a block reads; None for anything else."""
    live = active_of(module)
    live = getattr(live, "base_layer", live)  # an adapter's: what it adapts is read
    return live if live is not module and isinstance(live, nn.Module) else None


class Unreadable:
    """Stands for a number, and raises where somebody looks at it: adds, compares, prints, ..."""

    def _refuse(self, *_: Any) -> Any:
        raise TypeError("a number that is not to be read was")

    __eq__ = __ne__ = __bool__ = __hash__ = __str__ = __repr__ = __format__ = _refuse


def enlarge(layer: nn.Module, names: Mapping[str, str], spec: BlockSpec) -> None:
    """Make a stand-in's activations large: what clamps them is seen then.

    Args:
        layer: the stand-in, whose projections are multiplied by `LARGE`, those of q and k by 4:
            scores grow by its square.
        names: the spec's parameters -> the layer's, by path.
        spec: what the layer is taken for.
    """
    own = dict(layer.named_parameters(remove_duplicate=False))
    for name, path in names.items():
        if not name.endswith("_proj.weight"):
            continue
        weight = own[path].data
        rows = in_order(spec, name, weight)  # a view, but where rows go by heads
        if "qkv" in name:
            rows[: -spec.v_size].mul_(4.0)
            rows[-spec.v_size :].mul_(LARGE)
        else:
            rows.mul_(4.0 if name.split(".")[1] in ("q_proj", "k_proj") else LARGE)
        if rows.data_ptr() != weight.data_ptr():
            weight.copy_(as_parameter(spec, name, rows))


@dataclass(frozen=True)
class Seen:
    """A module of the layer at work.

    Attributes:
        path: its name in the layer.
        module: itself.
        x: its input.
        y: its output.
        order: how many were called before it returned.
    """

    path: str
    module: nn.Module
    x: Tensor
    y: Tensor
    order: int


@dataclass
class Observation:
    """What was seen.

    Attributes:
        x: the layer's input, `[batch, seq_len, width]`.
        output: what it returned.
        modules: its modules that took a tensor and gave one, in the order in which they returned.
        dropped: probability and input of every dropout.
        score_dropout: probabilities of dropout that were handed to PyTorch's attention.
        inside: paths of the modules that run at the moment, the innermost last.
        drawn: for each draw of random numbers besides dropout, the modules in which it was.
    """

    x: Tensor
    output: Any = None
    modules: list[Seen] = field(default_factory=list)
    dropped: list[tuple[float, Tensor]] = field(default_factory=list)
    score_dropout: set[float] = field(default_factory=set)
    inside: list[str] = field(default_factory=list)
    drawn: list[tuple[str, ...]] = field(default_factory=list)

    def check_chance(self, own: str | None = None) -> None:
        """Raise `NotUnderstood` for random numbers that a block would not draw.

        Args:
            own: path of a module that runs as it was, and may draw; None: there is none.
        """
        if any(own not in place for place in self.drawn):
            raise NotUnderstood("it draws random numbers besides dropout (stochastic depth, say)")


#: Functions and methods that draw random numbers.
RANDOM = {
    "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm", "bernoulli",
    "bernoulli_", "multinomial", "normal", "normal_", "uniform_", "random_", "exponential_",
    "geometric_", "log_normal_", "cauchy_", "poisson", "rrelu", "rrelu_", "alpha_dropout",
    "feature_alpha_dropout", "gumbel_softmax", "dropout1d", "dropout2d", "dropout3d",
    "feature_dropout",
}  # fmt: skip


class NoDropout(TorchFunctionMode):
    """Makes dropout the identity and notes it, and what else draws random numbers."""

    def __init__(self, seen: Observation) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (F.dropout, torch.dropout):
            bound = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
            p = float(bound.get("p", 0.5))
            if p and bound.get("training", bound.get("train", True)):
                self.seen.dropped.append((p, bound["input"]))
            return bound["input"]
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p")
            bound = dict(zip(names, args, strict=False)) | kwargs
            self.seen.score_dropout.add(float(bound.pop("dropout_p", 0.0)))
            return func(**bound)
        if getattr(func, "__name__", "") in RANDOM:
            self.seen.drawn.append(tuple(self.seen.inside))
        return func(*args, **kwargs)


@contextmanager
def one_chance() -> Iterator[None]:
    """Where random numbers are the same each time; generators stay as they were."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def forward_arguments(original: type[nn.Module]) -> tuple[tuple[str, ...], set[str]]:
    """Names of a forward's arguments in their order, and those that must be given."""
    parameters = list(inspect.signature(original.forward).parameters.values())[1:]
    fixed = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = {p.name for p in fixed if p.default is p.empty}
    return tuple(p.name for p in fixed), needed


def defaults_of(original: type[nn.Module]) -> frozenset[str]:
    """Arguments of a forward that are neither None nor False where they are not given."""
    parameters = inspect.signature(original.forward).parameters.values()
    silent = (None, False, inspect.Parameter.empty)
    return frozenset(p.name for p in parameters if not any(p.default is one for one in silent))


def visible(causal: bool) -> Tensor:
    """What is added to scores, `[batch, 1, seq_len, seq_len]`: causal, or without one key."""
    hidden = torch.full((SEQ_LEN, SEQ_LEN), torch.finfo(torch.float32).min)
    if causal:
        hidden = hidden.triu(1)
    else:
        hidden[:, [i for i in range(SEQ_LEN) if i != 2]] = 0.0
    return hidden.expand(BATCH_SIZE, 1, -1, -1)  # some layers want the batch's size


def random_input(width: int) -> Tensor:
    """`[batch, seq_len, width]`, the same each time."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(BATCH_SIZE, SEQ_LEN, width, generator=generator)


def angles(rotary_dim: int, layout: str) -> tuple[Tensor, Tensor]:
    """cos and sin of a few positions, `[1, seq_len, rotary_dim]` each."""
    cos, sin = rope_cos_sin(torch.arange(SEQ_LEN), rotary_dim, 100.0, layout=layout)
    return cos[None], sin[None]


def run(layer: nn.Module, x: Tensor, **given: Any) -> Observation:
    """Run a stand-in and write down what is seen.

    Args:
        layer: see `stand_in`.
        x: `[batch, seq_len, width]`.
        given: further arguments of its forward.

    Raises:
        Exception: what the layer raises.
    """
    seen = Observation(x)
    order = itertools.count()

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            seen.inside.pop()
            taken = next(_tensors([*args, *kwargs.values()]), None)
            made = next(_tensors([output]), None)
            if taken is not None and made is not None:
                seen.modules.append(Seen(path, module, taken, made, next(order)))

        return hook

    def enter(path: str) -> Any:
        return lambda module, args: seen.inside.append(path)

    handles = []
    for path, module in layer.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(enter(path)))
            handles.append(module.register_forward_hook(note(path), with_kwargs=True))
    try:
        with torch.no_grad(), one_chance(), NoDropout(seen):
            seen.output = layer(x, **given)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _tensors(values: Iterable[Any]) -> Any:
    """The tensors among values, and first in tuples among them."""
    for value in values:
        if isinstance(value, tuple | list) and value:
            value = value[0]
        if isinstance(value, Tensor):
            yield value
