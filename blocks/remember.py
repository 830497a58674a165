"""Remembering answers, where torch.compile is not looking."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def remembered(function: Callable[P, R]) -> Callable[P, R]:
    """The function, asked once for the same arguments; at each call while it is traced.

    A trace may hold symbols for sizes, which cannot be remembered, and warns of caches.
    """
    cached = lru_cache(maxsize=4096)(function)

    @wraps(function)
    def ask(*args: P.args, **kwargs: P.kwargs) -> R:
        # mypy: arguments of a cache are hashable, which a ParamSpec does not say
        return (function if torch.compiler.is_compiling() else cached)(*args, **kwargs)  # type: ignore[arg-type]

    return ask
