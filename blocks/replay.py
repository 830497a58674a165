"""Noticing that somebody else's checkpoint is about to run this block twice.

Inside `torch.utils.checkpoint` the outer checkpoint drops what a block saves and runs it again. A
block that recomputed on top of that would rebuild its activations twice. So it keeps instead: in
the first run (where the checkpoint drops everything anyway, but counts what was saved) and in
the replay, whose activations the backward pass uses at once.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import _CachedTorchDispatchMode, _CachingTorchDispatchMode

from .policy import KEEP, Policy

#: What a selective checkpoint runs its region under, first and in the replay.
_SELECTIVE = (_CachingTorchDispatchMode, _CachedTorchDispatchMode)

_warned = False


def _selective_mode() -> TorchDispatchMode | None:
    """The innermost selective checkpoint's mode."""
    if torch._C._len_torch_dispatch_stack() == 0:
        return None
    modes = reversed(_get_current_dispatch_mode_stack())
    return next((mode for mode in modes if isinstance(mode, _SELECTIVE)), None)


def operators_matter() -> bool:
    """Whether somebody looks at operators: torch.compile, or a selective checkpoint."""
    return torch.compiler.is_compiling() or _selective_mode() is not None


def _saves(mode: Any, kind: str | None) -> bool:
    """Whether a selective checkpoint saves the operator that comes next, first or in the replay."""
    if kind is None:
        return False
    op = getattr(torch.ops.backfuse, f"{kind}_forward").default
    replays = isinstance(mode, _CachedTorchDispatchMode)
    if replays and not hasattr(mode, "policy_fn"):  # the first run has noted what it saved
        entry = mode.storage.get(op, {}).get(mode.func_counter[op])
        return entry is not None and entry is not getattr(checkpoint, "_RECOMPUTE", None)
    context = checkpoint.SelectiveCheckpointContext(is_recompute=replays)
    return mode.policy_fn(context, op) in (
        True,
        checkpoint.CheckpointPolicy.MUST_SAVE,
        checkpoint.CheckpointPolicy.PREFER_SAVE,
    )


def inside_checkpoint(kind: str | None = "block") -> bool:
    """Whether an outer checkpoint will replay, or is replaying, the code that runs now.

    A non-reentrant checkpoint is seen by its saved-tensor hooks, in both runs. A reentrant one
    runs first without gradients, where nothing is kept, and replays within a backward pass. A
    selective checkpoint that saves the operator replays nothing of it; a compiler's plans are
    not known while it traces.

    Args:
        kind: what runs, `"block"`, `"attention"` or `"ffn"`; None: none of these operators.
    """
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():
        return False
    mode = _selective_mode()
    if mode is not None:
        return not _saves(mode, kind)
    if torch._C._current_graph_task_id() != -1:
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return bool(hooks) and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint"


def effective_policies(
    policies: list[Policy], segments: bool = False, kind: str | None = "block"
) -> list[Policy] | None:
    """The policies to run under, or None where all layers are to keep everything.

    Args:
        policies: one a layer.
        segments: whether some layers share one `x`.
        kind: see `inside_checkpoint`.
    """
    global _warned
    recomputing = segments or policies.count(KEEP) < len(policies)
    if not recomputing or not inside_checkpoint(kind):
        return policies
    if not _warned:
        _warned = True
        warnings.warn(
            "a backfuse block runs inside torch.utils.checkpoint, which replays it as a whole: "
            "its own policy is set aside and it keeps its activations during the replay. Turn one "
            "of the two off: a block with policy='full' needs no checkpoint around it.",
            stacklevel=_stacklevel(),
        )
    return None


def _stacklevel() -> int:
    """Frames up to the first one outside this package and PyTorch: the caller's own code."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(
        ("backfuse.", "torch.")
    ):
        level, frame = level + 1, frame.f_back
    return level
