"""PyTorch's own ways to run a module with less memory, and torch_remat's.

A way makes of a callable (a layer, or a whole operation) another one that computes the same:

    eager              nothing recomputed
    checkpoint         torch.utils.checkpoint, its defaults (non-reentrant, early stop)
    sac-attention      selective checkpoint: only the attention operator's outputs are saved
    sac-every-2nd-mm   selective checkpoint as torchtitan does it: attention and every other matmul
    compile            torch.compile: its partitioner keeps what costs a GEMM to rebuild
    compile-B          the same with activation_memory_budget = B
    compile-checkpoint torch.compile of the checkpointed callable
    torch-remat        torch_remat.checkpoint, nothing saved inside
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any

import torch
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

Call = Callable[..., Any]
Way = Callable[[Call], Call]

BUDGETS = (0.75, 0.5, 0.25, 0.1, 0.0)


def eager(call: Call) -> Call:
    """Autograd keeps what it likes."""
    return call


def checkpointed(call: Call, context_fn: Callable[[], Any] | None = None) -> Call:
    """Only the inputs are kept, and what `context_fn` saves."""
    options: dict[str, Any] = {} if context_fn is None else {"context_fn": context_fn}
    return functools.partial(checkpoint, call, use_reentrant=False, **options)


def _attention_ops() -> list[Any]:
    """The operators behind `scaled_dot_product_attention`, on every device."""
    aten = torch.ops.aten
    names = (
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    return [getattr(aten, name).default for name in names if hasattr(aten, name)]


def saving_attention(call: Call) -> Call:
    """Saves what attention puts out and replays everything else."""
    contexts = functools.partial(create_selective_checkpoint_contexts, _attention_ops())
    return checkpointed(call, contexts)


def saving_every_second_matmul(call: Call) -> Call:
    """torchtitan's rule: attention and matmuls 1, 3, 5, ... are saved."""
    attention = frozenset(_attention_ops())
    matmuls = frozenset((torch.ops.aten.mm.default, torch.ops.aten.addmm.default))

    def contexts() -> Any:
        # The forward and its replay count apart, so that they decide alike.
        counters = {False: itertools.count(), True: itertools.count()}

        def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            second = op in matmuls and next(counters[context.is_recompute]) % 2 == 1
            if op in attention or (op in matmuls and not second):
                return CheckpointPolicy.MUST_SAVE
            return CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    return checkpointed(call, contexts)


def compiled(budget: float | None = None, inner: Way = eager) -> Way:
    """A way that compiles, its partitioner told to keep `budget` of what it would like to keep.

    All callables of one way share a graph: layers of one kind and shape compile once.

    Args:
        budget: 0 to 1, a share of the partitioner's own range, not of bytes; None: PyTorch's
            default, 1.
        inner: what is done to a callable before it is compiled.

    Raises:
        RuntimeError: at the first call, where there is no C++ compiler.
    """

    def one_layer(call: Call, *args: Any, **kwargs: Any) -> Any:
        return inner(call)(*args, **kwargs)

    # Dynamo keys its graphs by code object: budgets that share one all get the first one's graph.
    name = f"one_layer_{inner.__name__}_{budget}".replace(".", "_")
    own: CodeType = one_layer.__code__.replace(co_name=name)
    function = FunctionType(own, globals(), name, None, one_layer.__closure__)
    graph = torch.compile(function, fullgraph=True, dynamic=False)

    def way(call: Call) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            if budget is None:
                return graph(call, *args, **kwargs)
            with torch._functorch.config.patch(activation_memory_budget=budget):
                return graph(call, *args, **kwargs)

        return run

    return way


def remat(call: Call) -> Call:
    """torch_remat's checkpoint. Its compiled form is not measured."""
    import torch_remat

    return torch_remat.checkpoint(region_name="layer")(call)


def make_way(name: str) -> Way:
    """The way of that name, fresh: compiled ones share nothing with an earlier one."""
    return WAYS[name]()


#: Name -> makes the way.
WAYS: dict[str, Callable[[], Way]] = {
    "eager": lambda: eager,
    "checkpoint": lambda: checkpointed,
    "sac-attention": lambda: saving_attention,
    "sac-every-2nd-mm": lambda: saving_every_second_matmul,
    "compile": compiled,
    **{f"compile-{budget}": functools.partial(compiled, budget) for budget in BUDGETS},
    "compile-checkpoint": lambda: compiled(inner=checkpointed),
    "torch-remat": lambda: remat,
}
