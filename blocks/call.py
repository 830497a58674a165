"""What one call of a block fixes.

A pass works on the residual stream flattened to `[tokens, hidden_size]`, chunk of rows by chunk
of rows. The chunk depends on the device alone: never on the policy, so that every policy runs the
same GEMMs on the same shapes and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from backfuse.kernels.cores.choose import Core
from backfuse.kernels.dispatch import Operations
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask

from .context import AllToAll, Context
from .layouts import in_order
from .spec import BlockSpec

#: Tokens a chunk, by device type. A CPU wants the chunk's scratch in its caches; a GPU wants
#: GEMMs large enough to fill it.
CHUNK_SIZE = {"cpu": 1024, "cuda": 4096}

#: Numbers of the dropouts of a block, for the counter (see `dropout.py`).
SITES = {"scores": 0, "attn": 1, "ffn": 2, "hidden": 3}

#: Stands in for operations while a call is only traced: whoever runs it chooses (see `ops.py`).
LATER: Operations = ModuleType("later")


class Inputs(NamedTuple):
    """Tensors of a call that no gradient flows to.

    Attributes:
        cos: `[batch or 1, seq_len, rotary_dim]`, or None.
        sin: as cos.
        attention_mask: `[batch or 1, heads or 1, seq_len, seq_len]`, bool or additive, or None.
        cu_seqlens: `[sequences + 1]`, or None.
        seed: int64, one element, or None where nothing drops out.
    """

    cos: Tensor | None = None
    sin: Tensor | None = None
    attention_mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    seed: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Call:
    """What one call of a block fixes besides its tensors.

    Attributes:
        spec: the block.
        batch_size: sequences (1 where they are packed).
        seq_len: tokens a sequence (all tokens where they are packed); this rank's, in a context.
        compute_dtype: of the GEMMs' operands: autocast's, or the weights'.
        autocast: whether it is autocast's.
        chunk_size: tokens a chunk.
        ops: the kernels, or their reference.
        core: whose attention runs (see `kernels/cores`).
        impl: the name that `ops` and `core` were chosen by.
        ffn_strategy: how the kernels rebuild a pre-activation (see `kernels/ffn_recompute.py`).
        dropout: whether dropout is active.
        max_seqlen: longest packed sequence, where the caller knows it.
        offload_dir: folder of the files that offloaded tensors go to; None: host memory.
        residual: whether a half adds its input; False where its output is a partial sum.
        context: the ranks that share every sequence's tokens; None: they are all here.
    """

    spec: BlockSpec
    batch_size: int
    seq_len: int
    compute_dtype: torch.dtype
    autocast: bool
    chunk_size: int
    ops: Operations
    core: Operations | Core | AllToAll
    impl: str = "auto"
    ffn_strategy: str = "auto"
    dropout: bool = False
    max_seqlen: int | None = None
    offload_dir: Path | None = None
    residual: bool = True
    context: Context | None = None

    def chunks(self) -> Iterator[slice]:
        """Slices of rows that cover all tokens."""
        tokens = self.batch_size * self.seq_len
        for start in range(0, tokens, self.chunk_size):
            yield slice(start, min(start + self.chunk_size, tokens))

    @property
    def mask(self) -> AttentionMask:
        """What the attention core is asked for."""
        spec = self.spec
        return AttentionMask(
            causal=spec.causal,
            window=spec.sliding_window,
            softcap=spec.attn_logit_softcapping,
            scale=spec.attention_scale,
            dropout=spec.attention_dropout if self.dropout else 0.0,
            site=SITES["scores"],
            max_seqlen=self.max_seqlen,
        )

    def attention_request(self, inputs: Inputs, device: torch.device) -> AttentionRequest:
        """What decides which core can do it."""
        return AttentionRequest(
            mask=self.mask,
            dtype=self.compute_dtype,
            device=device,
            tokens=self.seq_len * (self.context.size if self.context else 1),
            head_dim=self.spec.head_dim,
            v_head_dim=self.spec.v_head_dim,
            bias=inputs.attention_mask is not None,
            packed=inputs.cu_seqlens is not None,
            sinks=self.spec.attention_sinks,
        )


Weights = Mapping[str, Tensor]


def cast_weights(spec: BlockSpec, weights: Weights, dtype: torch.dtype) -> dict[str, Tensor]:
    """The projections in the compute dtype and in order (see `layouts.py`), anew for each pass.

    Norms stay as they are. Without autocast nothing is copied, but for a QKV that goes by heads. A
    copy is never kept: kept weights are the parameters themselves, so that whoever owns them can
    free and regather them.
    """
    return {
        n: in_order(spec, n, w if w.dtype == dtype else w.to(dtype)) if "_proj." in n else w
        for n, w in weights.items()
    }
