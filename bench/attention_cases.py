"""The attention kernels in every configuration, as cases (see `kernel_case.py`)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from backfuse.kernels import attention, attention_backward, attention_configs, configs
from backfuse.kernels.configs import Config
from backfuse.kernels.reference.explicit_attention import (
    AttentionMask,
    explicit_backward,
    explicit_forward,
)

from .kernel_case import Case, Operands, config_text
from .problem import relative_error, rounding


class Attention:
    """Operands of the attention kernels, for one mask.

    Args:
        t: the other operands.
        softcap: of the scores, or None.
    """

    def __init__(self, t: Operands, softcap: float | None) -> None:
        spec = t.spec
        heads, kv, d = spec.num_attention_heads, spec.num_key_value_heads, spec.head_dim
        self.mask = AttentionMask(spec.causal, softcap=softcap, scale=spec.attention_scale)
        self.q, self.k, self.v, self.dout = (t.make(1, t.M, n, d) for n in (heads, kv, kv, heads))
        self.limit, self.exact = rounding(t.dtype, t.M), t.exact
        self.work = 4.0 * t.M**2 * heads * d / (2 if spec.causal else 1)

    def forward(self, **options: Any) -> tuple[Tensor, ...]:
        """O and LSE by the kernel."""
        return attention.attention_forward(self.q, self.k, self.v, self.mask, **options)

    @cached_property
    def right(self) -> tuple[Any, ...]:
        """O, LSE, dQ, dK and dV by the reference."""
        q, k, v, dout = (x.to(self.exact) for x in (self.q, self.k, self.v, self.dout))
        out, lse = explicit_forward(q, k, v, self.mask)
        delta = (out * dout).sum(-1).transpose(1, 2)  # [1, heads, M]
        self.delta = delta.float()
        return out, lse, *explicit_backward(dout, q, k, v, lse, self.mask, delta)[:3]

    def backward(self, **options: Any) -> tuple[Any, ...]:
        """dQ, dK and dV by the kernels."""
        lse = self.right[1].float()
        operands = (self.dout, self.q, self.k, self.v, lse, self.mask, self.delta)
        return attention_backward.attention_backward(*operands, **options)[:3]

    def case(self, kernel: str, config: Config, library: Case) -> Case:
        """One of the three kernels; a backward one runs with the other's default."""
        if kernel == "attention_forward":
            call, part, work = partial(self.forward, config=config), slice(0, 2), self.work
        else:
            options = {f"{kernel.removeprefix('attention_')}_config": config}
            call, part, work = partial(self.backward, **options), slice(2, 5), 2.5 * self.work
        variant = "softcap" * (self.mask.softcap is not None)

        def check() -> float:
            return max(map(relative_error, call(), self.right[part]))

        return Case(kernel, variant, call, work, library, check, self.limit)


def attention_cases(t: Operands) -> Iterator[Case]:
    """The three attention kernels in each configuration that is meant for the block's heads."""
    size = t.dtype.itemsize
    table = configs.table_of(configs.architecture(t.device), size)
    block_d = max(16, 1 << (t.spec.head_dim - 1).bit_length())
    widths = sorted({c.block_k for c in attention_configs.CONFIGS["attention_forward"][table]})
    meant = next((width for width in widths if width >= block_d), block_d)
    work = t.flops(t.spec.intermediate_size)
    library = Case("torch.mm", "beside attention", lambda: torch.mm(t.dy, t.down), work)
    yield library
    for softcap, tables in ((None, attention_configs.CONFIGS), (30.0, attention_configs.HEAVY)):
        chosen = [
            (kernel, config)
            for kernel, by_name in tables.items()
            for config in by_name.get(table, ())
            if config.block_k == meant
        ]
        operands = Attention(t, softcap) if chosen else None
        for kernel, config in chosen:
            assert operands is not None
            case = operands.case(kernel, config, library)
            heavy = softcap is not None
            case.config = config_text(config)
            case.default = config == attention_configs.choose(kernel, table, size, block_d, heavy)
            shared = attention_configs.shared_bytes(kernel, config, size)
            if shared > configs.SHARED_MEMORY[table]:
                case.status = "does not fit"
            yield case
