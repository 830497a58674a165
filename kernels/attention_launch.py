"""What the three attention kernels are launched with: checks, descriptors, flags and grids."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .configs import uses_descriptors
from .dispatch import MAX_HEAD_DIM
from .launch import (
    DTYPES,
    TRITON_DTYPES,
    Described,
    Layout,
    cdiv,
    describable,
    described,
    dot_precision,
)
from .reference.attention_inputs import check_looks
from .reference.explicit_attention import AttentionMask

#: What the third dimension of a grid can be.
MAX_BATCH = 65535


class Tiles(NamedTuple):
    """Blocks of rows of packed sequences.

    Attributes:
        sequence: int32 `[count]`, the number of each block's sequence.
        block: int32 `[count]`, the block's number in it; negative past the last one.
    """

    sequence: Tensor
    block: Tensor


def packed_tiles(cu_seqlens: Tensor, tokens: int, block: int) -> Tiles:
    """The blocks of packed sequences, one after another, made on the device.

    Args:
        cu_seqlens: `[sequences + 1]`.
        tokens: of all of them.
        block: rows of a block.

    Returns:
        As many as there can be: some past the end are of no sequence.
    """
    counts = (cu_seqlens.diff() + (block - 1)) // block
    ends = counts.cumsum(0)
    tiles = torch.arange(cdiv(tokens, block) + len(counts), device=cu_seqlens.device)
    sequence = torch.searchsorted(ends, tiles, right=True)
    inside = sequence < len(counts)
    sequence = sequence.clamp_(max=len(counts) - 1)
    number = tiles - (ends - counts)[sequence]
    return Tiles(sequence.int(), torch.where(inside, number, -1).int())


def block_table(
    cu_seqlens: Tensor | None, tokens: int, block: int
) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """The table that says where a grid's blocks are; nothing of sequences that are not packed."""
    return (None, None) if cu_seqlens is None else packed_tiles(cu_seqlens, tokens, block)


def narrow(cu_seqlens: Tensor | None) -> Tensor | None:
    """Offsets in int32: a descriptor's are no wider, and rows beyond would not fit a GPU."""
    return None if cu_seqlens is None else cu_seqlens.int().contiguous()


def row_strides(x: Layout) -> tuple[int, int]:
    """How far the rows of heads `[batch, tokens, heads, dim]` are apart, and how far the heads.

    Where each sequence has one row, the batch's stride says it, and the tokens' may be anything.
    """
    return x.strides[0] if x.shape[1] == 1 else x.strides[1], x.strides[2]


def fresh_strides(heads: int, dim: int) -> tuple[int, int]:
    """`row_strides` of contiguous heads."""
    return heads * dim, dim


def back_to_back(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether the sequences of a batch stand right behind each other."""
    return shape[0] == 1 or shape[1] <= 1 or strides[0] == shape[1] * strides[1]


def check_heads(q: Layout, k: Layout, v: Layout) -> None:
    """Raise unless the kernels can load these, which are right otherwise (see `check_attention`).

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for heads that are too wide, or strides that do not fit.
    """
    if q.shape[0] > MAX_BATCH:
        raise ValueError(f"q has a batch of {q.shape[0]}, expected at most {MAX_BATCH}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES:
            raise TypeError(
                f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}, all the same"
            )
        if x.shape[3] > MAX_HEAD_DIM:
            raise ValueError(f"{name} has heads of {x.shape[3]}, expected at most {MAX_HEAD_DIM}")
        if x.strides[3] != 1 and x.shape[3] != 1:
            raise ValueError(
                f"{name} has the strides {x.strides}, expected a last one of 1: make it contiguous"
            )
        if not back_to_back(x.shape, x.strides):
            raise ValueError(
                f"{name} has the strides {x.strides}, expected sequences right behind each other"
            )


def side_by_side(x: Layout, block_d: int) -> bool:
    """Whether a descriptor can load blocks of one head: no channel of the next one is in them."""
    return x.shape[3] == block_d and x.strides[2] == block_d


class Launch:
    """What the three attention kernels are launched with, by what their tensors look like.

    Args:
        q: as in `attention_forward`, and so the others.
        k: see q.
        v: see q.
        mask: see q.
        sinks: see q.
        cu_seqlens: see q.
        cu_seqlens_k: see q.
        seed: see q.
        dout: the output's gradient, in a backward pass.
    """

    def __init__(
        self,
        q: Layout,
        k: Layout,
        v: Layout,
        mask: AttentionMask,
        sinks: Layout | None,
        cu_seqlens: Layout | None,
        cu_seqlens_k: Layout | None,
        seed: Layout | None,
        dout: Layout | None = None,
    ) -> None:
        check_looks(q, k, v, mask, sinks, cu_seqlens, cu_seqlens_k, seed)
        check_heads(q, k, v)
        self.batch, self.tokens, self.heads, head_dim = q.shape
        self.tokens_k, self.kv_heads, v_dim = k.shape[1], k.shape[2], v.shape[3]
        block_d, block_dv = (max(16, triton.next_power_of_2(d)) for d in (head_dim, v_dim))
        self.width = max(block_d, block_dv)
        cross = cu_seqlens_k is not None or self.tokens != self.tokens_k
        self.packed = cu_seqlens is not None
        self.sequences = cu_seqlens.shape[0] - 1 if cu_seqlens is not None else 0
        self.heavy = bool(mask.softcap or mask.dropout or self.packed or cross)
        blocks = [(q, block_d), (k, block_d), (v, block_dv)]
        if dout is not None:
            blocks.append((dout, block_dv))
        self.desc = uses_descriptors(q) and all(
            describable(x) and side_by_side(x, block) for x, block in blocks
        )
        # what a window, a cap and dropout are without one: numbers that are not read
        threshold = int(mask.dropout * 2**32)
        self.sizes = self.tokens, self.tokens_k, self.heads, self.heads // self.kv_heads
        self.numbers = (
            mask.scale,
            mask.softcap or 1.0,
            min(mask.window or 0, self.tokens + self.tokens_k),  # no sum with it overflows
            threshold - 2**32 if threshold >= 2**31 else threshold,  # its bits, signed
            1.0 / (1.0 - mask.dropout),
        )
        self.flags = {
            "CAUSAL": mask.causal,
            "WINDOW": mask.window is not None,
            "SOFTCAP": mask.softcap is not None,
            "DROPOUT": mask.dropout > 0,
            "SITE": mask.site,
            "VARLEN": self.packed,
            "CROSS": cross,
            "DTYPE": TRITON_DTYPES[q.dtype],
            "PRECISION": dot_precision(q.dtype),
            "DESC": self.desc,
            "HEAD_DIM": head_dim,
            "BLOCK_D": block_d,
            "V_DIM": v_dim,
            "BLOCK_DV": block_dv,
        }

    def rows_of(self, x: Layout, rows: int) -> Described | None:
        """How heads `[batch, tokens, heads, dim]` are described to a kernel that loads that many
        rows: as `[batch, tokens, heads * dim]` (packed: without the batch), heads side by side;
        None: by a pointer."""
        if not self.desc:
            return None
        batch, tokens, heads, head_dim = x.shape
        stride = row_strides(x)[0]
        if self.packed:
            flat = x._replace(shape=(tokens, heads * head_dim), strides=(stride, 1))
            return described(flat, rows, head_dim)
        shape, strides = (batch, tokens, heads * head_dim), (tokens * stride, stride, 1)
        return described(x._replace(shape=shape, strides=strides), 1, rows, head_dim)

    def query_grid(self, block: int) -> tuple[int, int, int]:
        """The grid of blocks of queries."""
        return self._grid(self.tokens, block, self.heads)

    def key_grid(self, block: int) -> tuple[int, int, int]:
        """The grid of blocks of keys."""
        return self._grid(self.tokens_k, block, self.kv_heads)

    def _grid(self, tokens: int, block: int, heads: int) -> tuple[int, int, int]:
        if self.packed:  # as many as `packed_tiles` gives
            return cdiv(tokens, block) + self.sequences, heads, 1
        return cdiv(tokens, block), heads, self.batch
