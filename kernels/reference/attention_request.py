"""What an attention core is asked for, and what one can do: words without tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .explicit_attention import AttentionMask


@dataclass(frozen=True)
class AttentionRequest:
    """What an attention core is asked for.

    Attributes:
        mask: what is visible, and the scores' treatment.
        dtype: of q, k and v.
        device: where they are.
        tokens: of a row of the batch; of all packed sequences together.
        head_dim: channels of a head of q and k.
        v_head_dim: of v, where it has others.
        bias: whether an attention mask is given as a tensor.
        packed: whether sequences are packed (`cu_seqlens`).
        sinks: whether there are attention sinks.
        unlike: whether there are other numbers of keys than of queries.
    """

    mask: AttentionMask
    dtype: torch.dtype
    device: torch.device
    tokens: int
    head_dim: int
    v_head_dim: int | None = None
    bias: bool = False
    packed: bool = False
    sinks: bool = False
    unlike: bool = False

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence, as far as it is known without asking a GPU."""
        return self.mask.max_seqlen or self.tokens

    def extras(self) -> dict[str, str]:
        """What is asked for beyond causal or full attention of equal heads: what -> how much."""
        mask, extras = self.mask, {}
        if mask.window is not None and mask.window < self.tokens:
            extras["sliding window"] = str(mask.window)
        if mask.softcap is not None:
            extras["softcap"] = str(mask.softcap)
        if mask.dropout:
            extras["dropout"] = str(mask.dropout)
        if self.v_head_dim not in (None, self.head_dim):
            extras["other head dim of v"] = str(self.v_head_dim)
        flags = {
            "attention mask": self.bias,
            "packed sequences": self.packed,
            "attention sinks": self.sinks,
            "other numbers of keys than of queries": self.unlike,
        }
        return extras | {name: "yes" for name, asked in flags.items() if asked}


#: Everything that `AttentionRequest.extras` can name.
EXTRAS = frozenset(
    {
        "sliding window", "softcap", "dropout", "other head dim of v", "attention mask",
        "packed sequences", "attention sinks", "other numbers of keys than of queries",
    }
)  # fmt: skip


@dataclass(frozen=True)
class Abilities:
    """What an attention core can do.

    Attributes:
        label: what an error calls it.
        extras: what it can of `EXTRAS`.
        dtypes: of q, k and v; None for any.
        device: type of the device it runs on; None for any.
        max_head_dim: the widest head; None for any.
        head_dim_step: what a head dim is a multiple of.
    """

    label: str
    extras: frozenset[str] = frozenset()
    dtypes: tuple[torch.dtype, ...] | None = None
    device: str | None = None
    max_head_dim: int | None = None
    head_dim_step: int = 1

    def obstacle(self, request: AttentionRequest) -> str | None:
        """Why it cannot do what is asked, or None. What a GPU lacks is not asked here."""
        if self.device not in (None, request.device.type):
            return f"runs on {self.device}, and the tensors are on {request.device.type}"
        if self.dtypes is not None and request.dtype not in self.dtypes:
            return f"takes {' or '.join(map(str, self.dtypes))}, and the dtype is {request.dtype}"
        for what, asked in request.extras().items():
            if what not in self.extras:
                return f"has no {what} (asked for: {asked})"
        for dim in (request.head_dim, request.v_head_dim or request.head_dim):
            if dim > (self.max_head_dim or dim) or dim % self.head_dim_step:
                return (
                    f"takes heads of at most {self.max_head_dim} channels, a multiple of "
                    f"{self.head_dim_step}, and they have {dim}"
                )
        return None
