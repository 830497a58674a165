"""Liger's kernels in a layer: in place of its parts' forwards, for the same numbers.

`apply_liger_kernel_to_...(model=model)` sets forwards on norms and MLPs, and one rotary embedding
for all layers of a family. A block computes what those stand for, by itself, so they are no
obstacle. To read such a layer on a CPU, where they do not run, the parts of its copy get their
classes' own forwards back.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_ligers(value: Any) -> bool:
    """Whether a function, method or class is of Liger's package."""
    return (getattr(value, "__module__", None) or "").startswith("liger_kernel.")


def forward_of_its_own(module: nn.Module) -> bool:
    """Whether a module's forward was replaced on the instance, by another than Liger's."""
    own = vars(module).get("forward")
    return own is not None and not is_ligers(own)


def _rotate(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, Tensor]:
    """Liger's rotary embedding of `[batch, heads, seq_len, head_dim]`: two halves, one angle."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned = (torch.cat(t.chunk(2, -1)[::-1], -1) for t in (q, k))
    sign = torch.ones(q.shape[-1])
    sign[: q.shape[-1] // 2] = -1
    first, second = (t * cos + other * sign * sin for t, other in zip((q, k), turned, strict=True))
    return first, second


@contextmanager
def without_liger(layer: nn.Module) -> Iterator[None]:
    """A stand-in without Liger's kernels; what its family's code calls is put back afterwards.

    Args:
        layer: a stand-in, which loses the forwards that Liger set on its parts.
    """
    for module in layer.modules():
        if is_ligers(vars(module).get("forward")):
            del vars(module)["forward"]
    codes = {kind.__module__: sys.modules[kind.__module__] for kind in map(type, layer.modules())}
    name = "apply_rotary_pos_emb"
    held = [(vars(code), vars(code)[name]) for code in codes.values() if name in vars(code)]
    held = [(code, function) for code, function in held if is_ligers(function)]
    for code, _ in held:
        code[name] = _rotate
    try:
        yield
    finally:
        for code, function in held:
            code[name] = function
