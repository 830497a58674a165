"""One plan for all processes: made by the first from the least of their budgets, and sent round.

Ranks whose plans differ would wait for each other in every layer, so nobody plans alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from backfuse.blocks.spec import BlockSpec

from .byte_sizes import parse_bytes
from .make import plan
from .optimal import Limits
from .plan import Plan


def plan_on_all_ranks(
    model_or_spec: nn.Module | BlockSpec | Sequence[BlockSpec],
    *,
    group: dist.ProcessGroup | None = None,
    **options: Any,
) -> Plan:
    """The same plan on every rank of a group: each of them has to call it.

    A budget may differ between ranks: the least counts, and None counts for nothing. So may the
    device, which is perhaps measured: the group's first rank's counts. Everything else has to be
    the same.

    Args:
        model_or_spec: see `plan`; of a live model its printed form is compared.
        group: which ranks; None: all. Without a process group it is `plan` itself.
        options: see `plan`.

    Raises:
        ValueError: for an argument that differs between ranks, naming it.
        Exception: whatever `plan` raises on the first rank, and a wrong budget of any rank. Any
            error is raised on all of them: none is left waiting.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return plan(model_or_spec, **options)
    mine: Any
    try:
        given = {name: options.pop(name, None) for name in Limits._fields}
        mine = {n: None if v is None else parse_bytes(n, v) for n, v in given.items()}
        same = {"model_or_spec": model_or_spec, **options}
        mine["same"] = {n: _told(v) for n, v in same.items() if n != "device"}
    except (TypeError, ValueError) as error:
        mine = error
    everyones: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyones, mine, group)
    for rank, budgets in enumerate(everyones):
        if isinstance(budgets, Exception):
            raise type(budgets)(f"rank {rank}: {budgets}")
    first = everyones[0]["same"]
    for rank, other in enumerate(everyones):
        for name in {**first, **other["same"]}:
            if (value := other["same"].get(name)) != first.get(name):
                raise ValueError(
                    f"{name} is {value} on rank {rank} and {first.get(name)} on rank 0, expected "
                    "the same on all ranks"
                )
    for name in Limits._fields:
        values = [budgets[name] for budgets in everyones if budgets[name] is not None]
        options[name] = min(values, default=None)
    made: list[Any] = [None]
    if dist.get_rank(group) == 0:
        try:
            made = [plan(model_or_spec, **options)]
        except Exception as error:
            made = [error]
    dist.broadcast_object_list(made, group=group, group_src=0)
    if isinstance(made[0], Exception):
        raise made[0]
    return made[0]


def _told(value: object) -> str:
    """What can be compared between processes: without addresses, and sets in order."""
    if isinstance(value, set | frozenset):
        return repr(sorted(value, key=repr))
    return type(value).__name__ if type(value).__repr__ is object.__repr__ else repr(value)
