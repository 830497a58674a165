"""`Patch`: Lightning's callback that patches what a LightningModule trains, before it is sharded.

    Trainer(callbacks=[Patch("selective")], ...).fit(module)

Needs `lightning` (or `pytorch_lightning`), which `import backfuse` does not.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from backfuse.blocks.adapters.patch import patch
from backfuse.blocks.adapters.read import layers_of
from backfuse.blocks.adapters.report import PatchReport
from backfuse.blocks.policy import PolicyLike


class Patch(Callback):  # type: ignore[misc]
    """Patches the layers of a LightningModule when `fit` sets up, and prints the report.

    That is after its `__init__`, and before a strategy moves, wraps or shards it, and before a
    checkpoint is loaded (whose keys are those of the model as it was). Other stages are left alone.
    Layers that `configure_model` makes do not exist yet: call `backfuse.patch` there.

    Args:
        policy: see `backfuse.patch`.
        options: the other arguments of `backfuse.patch`.

    Attributes:
        report: what was fused, or skipped and why; None before `fit`.

    Raises:
        TypeError: for an argument that `backfuse.patch` does not take.
    """

    def __init__(self, policy: PolicyLike | list[PolicyLike] | None = None, **options: Any) -> None:
        inspect.signature(patch).bind(None, policy, **options)
        self.arguments: dict[str, Any] = {"policy": policy, **options}
        self.report: PatchReport | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Called by the Trainer, on every rank.

        Raises:
            TypeError, ValueError: see `backfuse.patch`.
        """
        if stage == "fit":
            if not any(layers_of(pl_module)):
                raise ValueError(
                    f"{type(pl_module).__name__} holds nothing with a norm and projections yet: if "
                    "its configure_model makes the layers, call backfuse.patch at the end of that"
                )
            self.report = patch(pl_module, **self.arguments)
            if trainer.is_global_zero:
                print(self.report)
