"""Attention through FlashAttention 3 and 4, as PyTorch calls them.

`torch.nn.attention._fa3` and `_fa4` have functions that call the packages `flash_attn_interface`
and `flash_attn.cute`. They are called as they are: nothing is registered or activated, so what
PyTorch's own `scaled_dot_product_attention` does in this process stays the same. The backward is
always asked to be deterministic; `backfuse tune` looks whether it is.

PyTorch calls those files prototypes, so `missing` looks for every name and argument they are
called with, here and now.

Source: Shah et al. 2024; `torch/nn/attention/_fa3.py` and `_fa4.py`.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask

from .calls import FlashCall

#: What the two functions are called with in every version, and what they take in some.
FORWARD = {"query", "key", "value", "cu_seq_q", "cu_seq_k", "scale", "is_causal", "seqused_k"}
BACKWARD = {
    "grad_out", "query", "key", "value", "out", "logsumexp", "cu_seq_q", "cu_seq_k", "scale",
    "is_causal", "deterministic",
}  # fmt: skip
LONGEST = ("max_q", "max_k", "max_seqlen_q", "max_seqlen_k")
WINDOW = ("window_size_left", "window_size_right")


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


class FlashPrototype:
    """One of PyTorch's prototypes, as an attention core.

    Args:
        name: `"fa3"` or `"fa4"`.
        package: the package that has the kernels.
        everything: what stands for a window that ends nowhere.
    """

    def __init__(self, name: str, package: str, everything: int | None) -> None:
        self.name = name
        self.package = package
        self.everything = everything

    @property
    def _module(self) -> Any:
        return importlib.import_module(f"torch.nn.attention._{self.name}")

    def _function(self, direction: str) -> Callable[..., Any]:
        return getattr(self._module, f"_{self.name}_run_{direction}")

    @functools.cached_property
    def missing(self) -> str | None:
        """What keeps it from being called here, or None."""
        try:
            for direction, needed in (("forward", FORWARD), ("backward", BACKWARD)):
                lacking = needed - _parameters(self._function(direction))
                if lacking:
                    return f"takes no {', '.join(sorted(lacking))} in this PyTorch's {direction}"
            getattr(self._module, f"_{self.name}_import_module")(self.package)
            # Read by the functions of FA4, and otherwise set only by activating it.
            if self.name == "fa4" and self._module._FA4_MODULE_PATH is None:
                self._module._FA4_MODULE_PATH = self.package
        except (ImportError, AttributeError, RuntimeError, OSError) as error:
            return f"cannot be loaded: {error}"
        return None

    def lacks(self, request: AttentionRequest) -> str | None:
        """Why this PyTorch's version of it cannot do what is asked, or None."""
        if self.missing is not None:
            return self.missing
        both = [_parameters(self._function(direction)) for direction in ("forward", "backward")]
        window = "sliding window" in request.extras()
        if window and not all(set(WINDOW) <= taken for taken in both):
            return "has no sliding window in this PyTorch"
        return None

    def _call(
        self,
        direction: str,
        mask: AttentionMask,
        flash: FlashCall,
        tensors: dict[str, Any],
    ) -> Any:
        if self.missing is not None:  # the kernels are loaded by looking
            raise RuntimeError(f"{self.name} {self.missing}")
        function = self._function(direction)
        options: dict[str, Any] = dict.fromkeys(LONGEST, flash.longest)
        for name, size in zip(WINDOW, flash.window, strict=True):
            options[name] = self.everything if size < 0 else size
        taken = _parameters(function)
        return function(
            **tensors,
            cu_seq_q=flash.offsets,
            cu_seq_k=flash.offsets,
            scale=mask.scale,
            is_causal=mask.causal,
            **{name: value for name, value in options.items() if name in taken},
        )

    def needs_delta(self, request: AttentionRequest) -> bool:
        """Never. As `reference.attention.needs_delta`."""
        return False

    def attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of q over k and v. As `reference.attention.attention_forward`."""
        flash = FlashCall(q, mask, cu_seqlens)
        tensors = dict(zip(("query", "key", "value"), flash.flat(q, k, v), strict=True))
        out, lse = self._call("forward", mask, flash, {**tensors, "seqused_k": None})
        return flash.results(out, lse)

    def attention_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: AttentionMask,
        *,
        delta: Tensor | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        seed: Tensor | None = None,
        need_dsinks: bool = True,
        need_dq: bool = True,
        need_dkv: bool = True,
        dq: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of q, k and v. As `reference.attention.attention_backward`."""
        flash = FlashCall(q, mask, cu_seqlens)
        names = ("grad_out", "query", "key", "value", "out")
        tensors: dict[str, Any] = dict(zip(names, flash.flat(dout, q, k, v, out), strict=True))
        tensors |= {"logsumexp": flash.flat_lse(lse), "deterministic": True}
        return *flash.grads(*self._call("backward", mask, flash, tensors)), None


FA3 = FlashPrototype("fa3", "flash_attn_interface", everything=-1)
FA4 = FlashPrototype("fa4", "flash_attn.cute.interface", everything=None)
