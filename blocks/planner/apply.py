"""`apply`: a model keeps what a plan says."""

from __future__ import annotations

from typing import Any

from torch import nn

from backfuse.blocks.adapters.live import own_blocks
from backfuse.blocks.adapters.patch import patch
from backfuse.blocks.adapters.patched import state_of
from backfuse.blocks.policy import Policy
from backfuse.blocks.stack import BlockStack, Segments

from .plan import Plan


def apply(model: nn.Module, plan: Plan) -> tuple[list[Policy], list[Segments]]:
    """Makes a model keep what a plan says.

    Args:
        model: a `BlockStack`, or a model with one or with `TransformerBlock`s in it; or a model
            whose layers `patch` understands, which is patched by it (one that is patched already
            keeps its other options). Its dtype, what is trained and the sizes of its calls are the
            caller's business.
        plan: see `plan`.

    Returns:
        Policies and segments as they were, none of a model that was not patched: what puts them
        back is `stack.set_policy(*before)`, `patch(model, before[0])` or `unpatch(model)`.

    Raises:
        TypeError: for something else than a model and a plan.
        ValueError: if the plan is of other layers, naming the difference, or has segments and the
            layers are in no one stack; the model is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(plan, Plan):
        raise TypeError(f"plan is a {type(plan).__name__}, expected a Plan")
    blocks = own_blocks(model)
    if blocks:
        plan.check_fits({name: block.spec for name, block in blocks.items()})
        stacks = [m for m in model.modules() if isinstance(m, BlockStack)]
        if len(stacks) == 1 and len(stacks[0].layers) == len(blocks):
            before = stacks[0].policies, stacks[0].segments
            stacks[0].set_policy(plan.policies, plan.segments)
            return before
        plan.check_unsegmented()
        segments = [part for stack in stacks for part in stack.segments]
        if any(part != 1 for part in segments):
            raise ValueError(
                f"the model has several stacks with segments {segments}, expected one stack, or "
                "none of the segments: apply a plan to each stack"
            )
        policies = [block.policy for block in blocks.values()]
        for block, policy in zip(blocks.values(), plan.policies, strict=True):
            block.policy = policy
        return policies, [1] * len(policies)
    states = [state for m in model.modules() if (state := state_of(m)) is not None]
    options: dict[str, Any] = {
        name: getattr(state, name)
        for state in states[:1]
        for name in ("chunk_size", "impl", "ffn_strategy", "offload_dir")
    }
    patch(model, plan=plan, **options)
    return [state.policy for state in states], [1] * len(states)
