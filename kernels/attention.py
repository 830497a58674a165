"""Flash attention, forward: softmax attention without its matrix of scores.

    S = scale Q K^T    [S = cap tanh(S / cap)]    P = softmax(S)    O = (P o mask / (1 - p)) V
    LSE = log sum exp S

| kept | recomputed | GEMMs |
|---|---|---|
| O and LSE (fp32, one a row and head) | P, in the backward kernels | 2 |

A program walks over the keys that a block of queries of one head can see: first the blocks that
all of them see whole, then those that need a mask. Maxima and sums of rows are in units of log 2.
Grouped heads share their keys and values without copies. Rows that see nothing give zeros, and an
LSE of -inf.

Packed sequences: a table made on the device says which block of which sequence a program has, so
that no length is read by the host. Sources: Dao et al. 2022, Dao 2023; dropout as in
`reference/dropout.py`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import choose
from .configs import Config, architecture, uses_descriptors
from .dispatch import MAX_HEAD_DIM
from .launch import (
    DTYPES,
    TRITON_DTYPES,
    cdiv,
    describable,
    described,
    dot_precision,
    layout,
    on_device,
    operand,
)
from .reference.explicit_attention import AttentionMask

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_rows(
    source,
    first,
    row,
    rows,
    head,
    stride_row,
    stride_head,
    BLOCK_ROW: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DESC: tl.constexpr,
):
    """`[BLOCK_ROW, BLOCK_D]`: rows of one head of a sequence that begins at `first`.

    Zeros outside of the head; what stands past the sequence's end is not said, and finite: the
    next sequence's rows, or zeros.
    """
    if DESC:
        tl.static_assert(BLOCK_D == HEAD_DIM)
        tile = source.load([(first + row).to(tl.int32), head * HEAD_DIM])
    else:
        offs_row, offs_d = row + tl.arange(0, BLOCK_ROW), tl.arange(0, BLOCK_D)
        pointers = source + (first + offs_row).to(tl.int64)[:, None] * stride_row
        pointers += head * stride_head + offs_d[None, :]
        mask = (offs_row < rows)[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def sequence_of(
    pid, batch, tile_sequence, tile_block, cu_seqlens, tokens, BLOCK: tl.constexpr,
    VARLEN: tl.constexpr,
):  # fmt: skip
    """Where a program's block of rows is: first token and length of its sequence, number of the
    sequence, and the block's first row. Past the last block the length is 0."""
    if VARLEN:
        sequence = tl.load(tile_sequence + pid)
        row = tl.load(tile_block + pid) * BLOCK
        first = tl.load(cu_seqlens + sequence)
        length = tl.where(row < 0, 0, tl.load(cu_seqlens + sequence + 1) - first)
    else:
        sequence = batch
        row = pid * BLOCK
        first = batch.to(tl.int64) * tokens
        length = tokens
    return first, length, sequence, row


@triton.jit
def keys_seen(
    row, length, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Keys that some query of a block sees, and those that all see: `lo <= full_lo <= full_hi <=
    hi`, all but `hi` multiples of BLOCK_N."""
    lo, hi = 0, length
    full_lo, full_hi = 0, length // BLOCK_N * BLOCK_N
    last = tl.minimum(row + BLOCK_M, length)  # one past the last query
    if CAUSAL:
        hi = last
        full_hi = (row + 1) // BLOCK_N * BLOCK_N
    if WINDOW:
        lo = tl.maximum(row - window + 1, 0) // BLOCK_N * BLOCK_N
        # the last query sees from last - window on; the first one up to row + window - 1
        full_lo = tl.cdiv(tl.maximum(last - window, 0), BLOCK_N) * BLOCK_N
        if not CAUSAL:
            hi = tl.minimum(length, last + window - 1)
            full_hi = tl.minimum(length, row + window) // BLOCK_N * BLOCK_N
    full_lo = tl.minimum(tl.maximum(full_lo, lo), tl.cdiv(hi, BLOCK_N) * BLOCK_N)
    full_hi = tl.maximum(full_lo, tl.minimum(full_hi, hi // BLOCK_N * BLOCK_N))
    return lo, full_lo, full_hi, hi


@triton.jit
def visible(offs_q, offs_k, length, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Which keys a query sees; the two broadcast against each other."""
    seen = (offs_k < length) & (offs_q < length)
    if CAUSAL:
        seen = seen & (offs_k <= offs_q)
    if WINDOW:
        seen = seen & (offs_q - offs_k < window)
        if not CAUSAL:
            seen = seen & (offs_k - offs_q < window)
    return seen


@triton.jit
def score(dots, scale, softcap, SOFTCAP: tl.constexpr):
    """Scores in units of log 2, from `Q K^T`; and tanh's value (the same scores without a cap)."""
    if SOFTCAP:
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * dots * (scale / softcap))) - 1.0
        scores = tanh * (softcap * LOG2E)
    else:
        scores = dots * (scale * LOG2E)
        tanh = scores
    return scores, tanh


@triton.jit
def dropout_factor(
    seed, row, col, slice_number, threshold, keep_scale,
    SITE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """0 or 1 / (1 - p) for queries from `row` on and keys from `col` on, a multiple of 4.

    `[ROWS, COLS]`, or `[COLS, ROWS]` where it is transposed. One call of the generator serves four
    neighbouring keys.
    """
    offs_q = row + tl.arange(0, ROWS)
    groups = col // 4 + tl.arange(0, COLS // 4)
    if TRANSPOSED:
        c0, c1 = tl.broadcast(groups[:, None], offs_q[None, :])
    else:
        c0, c1 = tl.broadcast(groups[None, :], offs_q[:, None])
    zeros = c0 * 0
    c2 = zeros + slice_number.to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(seed), c0, c1, c2, zeros + SITE)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [..., 2, 2], the key's two low bits
    if TRANSPOSED:
        words = words.permute(0, 2, 3, 1).reshape(COLS, ROWS)
    else:
        words = words.reshape(ROWS, COLS)
    kept = words.to(tl.uint32, bitcast=True) >= threshold.to(tl.uint32, bitcast=True)
    return tl.where(kept, keep_scale, 0.0)


@triton.jit
def _forward_step(
    acc, total, largest, q_tile, k, v, first, length, row, col, offs_m, kv_head,
    stride_kt, stride_kh, stride_vt, stride_vh,
    scale, softcap, window, seed, slice_number, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running output, sums and maxima."""
    k_tile = load_rows(
        k, first, col, length, kv_head, stride_kt, stride_kh, BLOCK_N, BLOCK_D, HEAD_DIM, DESC
    )
    dots = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    scores, _ = score(dots, scale, softcap, SOFTCAP)
    if MASKED:
        offs_n = col + tl.arange(0, BLOCK_N)
        seen = visible(offs_m[:, None], offs_n[None, :], length, window, CAUSAL, WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
    now = tl.maximum(largest, tl.max(scores, 1))
    base = tl.where(now == float("-inf"), 0.0, now)  # a row that has seen nothing yet
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(largest - base)
    total = total * shrink + tl.sum(weights, 1)
    if DROPOUT:
        weights *= dropout_factor(
            seed, row, col, slice_number, threshold, keep_scale, SITE, BLOCK_M, BLOCK_N, False
        )
    v_tile = load_rows(
        v, first, col, length, kv_head, stride_vt, stride_vh, BLOCK_N, BLOCK_D, HEAD_DIM, DESC
    )
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, total, now


@triton.jit(do_not_specialize=["tokens", "heads", "threshold"])
def attention_forward_kernel(
    q, k, v, out, lse, cu_seqlens, tile_sequence, tile_block, seed,
    tokens, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_lb, stride_lh, stride_lt,
    scale, softcap, window, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, VARLEN: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    DESC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # The last queries first: under a causal mask they have the most to do.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    first, length, sequence, row = sequence_of(
        pid, batch, tile_sequence, tile_block, cu_seqlens, tokens, BLOCK_M, VARLEN
    )
    if length > 0:
        kv_head = head // group
        offs_m = row + tl.arange(0, BLOCK_M)
        q_tile = load_rows(
            q, first, row, length, head, stride_qt, stride_qh, BLOCK_M, BLOCK_D, HEAD_DIM, DESC
        )  # [BLOCK_M, BLOCK_D]
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        slice_number = sequence * heads + head
        lo, full_lo, full_hi, hi = keys_seen(row, length, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW)
        for col in range(full_lo, full_hi, BLOCK_N):
            acc, total, largest = _forward_step(
                acc, total, largest, q_tile, k, v, first, length, row, col, offs_m, kv_head,
                stride_kt, stride_kh, stride_vt, stride_vh,
                scale, softcap, window, seed, slice_number, threshold, keep_scale,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, False, PRECISION, DESC,
                HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        left = (full_lo - lo) // BLOCK_N  # blocks before the full ones, and after
        for block in range(0, left + tl.cdiv(hi - full_hi, BLOCK_N)):
            col = tl.where(block < left, lo + block * BLOCK_N, full_hi + (block - left) * BLOCK_N)
            acc, total, largest = _forward_step(
                acc, total, largest, q_tile, k, v, first, length, row, col, offs_m, kv_head,
                stride_kt, stride_kh, stride_vt, stride_vh,
                scale, softcap, window, seed, slice_number, threshold, keep_scale,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, True, PRECISION, DESC,
                HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        acc = acc / total[:, None]
        row_lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
        offs_d = tl.arange(0, BLOCK_D)
        tokens_m = (first + offs_m).to(tl.int64)
        pointers = out + tokens_m[:, None] * stride_ot + head * stride_oh + offs_d[None, :]
        mask = (offs_m < length)[:, None] & (offs_d < HEAD_DIM)[None, :]
        tl.store(pointers, acc.to(DTYPE), mask=mask)
        place = tokens_m if VARLEN else offs_m.to(tl.int64)
        row_pointers = lse + batch.to(tl.int64) * stride_lb + head * stride_lh + place * stride_lt
        tl.store(row_pointers, row_lse, mask=offs_m < length)


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


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless the kernels can work with these.

    Raises:
        TypeError: for a dtype no kernel takes, or several.
        ValueError: for shapes, strides or devices that do not fit.
    """
    if q.dim() != 4:
        raise ValueError(f"q has the shape {list(q.shape)}, expected [batch, tokens, heads, dim]")
    batch, tokens, heads, head_dim = q.shape
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dtype not in DTYPES or x.dtype != q.dtype:
            raise TypeError(
                f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}, all the same"
            )
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, expected {q.device}")
        if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, tokens, head_dim):
            raise ValueError(
                f"{name} has the shape {list(x.shape)}, expected [{batch}, {tokens}, heads, "
                f"{head_dim}]"
            )
        if x.stride(3) != 1 and head_dim != 1:
            raise ValueError(
                f"{name} has the strides {x.stride()}, expected a last one of 1: make it contiguous"
            )
        if x.stride(0) != tokens * x.stride(1) and batch != 1:
            raise ValueError(
                f"{name} has the strides {x.stride()}, expected sequences right behind each other"
            )
    if k.shape[2] != v.shape[2] or heads % k.shape[2]:
        raise ValueError(
            f"q, k and v have {heads}, {k.shape[2]} and {v.shape[2]} heads, expected as many of k "
            "as of v, and a multiple of them of q"
        )
    if head_dim > MAX_HEAD_DIM:
        raise ValueError(f"q has heads of {head_dim}, expected at most {MAX_HEAD_DIM}")


def rows_of(x: Tensor, rows: int, desc: bool) -> Any:
    """Heads `[batch, tokens, heads, dim]` as a kernel takes them: a pointer, or a descriptor of
    `[batch * tokens, heads * dim]`, whose heads stand side by side."""
    if not desc:
        return x
    batch, tokens, heads, head_dim = x.shape
    flat = x.as_strided((batch * tokens, heads * head_dim), (x.stride(1), 1))
    return operand(flat, described(layout(flat), rows, head_dim))


def side_by_side(x: Tensor, block_d: int) -> bool:
    """Whether a descriptor can load blocks of one head: no channel of the next one is in them."""
    return x.shape[3] == block_d and x.stride(2) == block_d


class Launch:
    """What the three attention kernels are launched with, beside their tensors.

    Args:
        q: `[batch, tokens, heads, head_dim]`; k and v likewise, with their heads.
        k: see q.
        v: see q.
        mask: what is visible.
        cu_seqlens: `[sequences + 1]` or None.
        seed: for dropout.
        others: more tensors that are loaded through descriptors if all can be.
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        cu_seqlens: Tensor | None,
        seed: Tensor | None,
        others: tuple[Tensor, ...] = (),
    ) -> None:
        check_heads(q, k, v)
        self.batch, self.tokens, self.heads, self.head_dim = q.shape
        self.kv_heads = k.shape[2]
        self.group = self.heads // self.kv_heads
        self.block_d = max(16, triton.next_power_of_2(self.head_dim))
        if mask.dropout and seed is None:
            raise ValueError(f"seed is None, expected one for a dropout of {mask.dropout}")
        if cu_seqlens is not None and self.batch != 1:
            raise ValueError(f"q has a batch of {self.batch}, expected 1 with cu_seqlens")
        self.cu_seqlens = None if cu_seqlens is None else cu_seqlens.contiguous()
        self.seed = seed
        self.heavy = bool(mask.softcap or mask.dropout or cu_seqlens is not None)
        self.desc = uses_descriptors(q) and all(
            describable(layout(x)) and side_by_side(x, self.block_d) for x in (q, k, v, *others)
        )
        # what a window, a cap and dropout are without one: numbers that are not read
        threshold = int(mask.dropout * 2**32)
        self.numbers = (
            mask.scale,
            mask.softcap or 1.0,
            mask.window or 0,
            threshold - 2**32 if threshold >= 2**31 else threshold,  # its bits, signed
            1.0 / (1.0 - mask.dropout),
        )
        self.flags = {
            "CAUSAL": mask.causal,
            "WINDOW": mask.window is not None,
            "SOFTCAP": mask.softcap is not None,
            "DROPOUT": mask.dropout > 0,
            "SITE": mask.site,
            "VARLEN": cu_seqlens is not None,
            "DTYPE": TRITON_DTYPES[q.dtype],
            "PRECISION": dot_precision(q.dtype),
            "DESC": self.desc,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": self.block_d,
        }

    def grid(self, block: int, heads: int) -> tuple[tuple[int, int, int], tuple[Any, Any]]:
        """The grid of blocks of rows, and the table that says where they are."""
        if self.cu_seqlens is None:
            return (cdiv(self.tokens, block), heads, self.batch), (None, None)
        tiles = packed_tiles(self.cu_seqlens, self.tokens, block)
        return (len(tiles.block), heads, 1), (tiles.sequence, tiles.block)


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    cu_seqlens: Tensor | None = None,
    seed: Tensor | None = None,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of q over k and v. As `reference.attention.attention_forward`, without a bias.

    Args:
        config: tile sizes; None for the table's.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for shapes, strides or devices that do not fit.
    """
    launch = Launch(q, k, v, mask, cu_seqlens, seed)
    if config is None:
        size = q.element_size()
        name = architecture(q.device)
        config = choose("attention_forward", name, size, launch.block_d, launch.heavy)
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(
        (launch.batch, launch.heads, launch.tokens), dtype=torch.float32, device=q.device
    )
    grid, table = launch.grid(config.block_m, launch.heads)
    with on_device(q):
        attention_forward_kernel[grid](
            rows_of(q, config.block_m, launch.desc),
            rows_of(k, config.block_n, launch.desc),
            rows_of(v, config.block_n, launch.desc),
            out, lse, launch.cu_seqlens, *table, seed,
            launch.tokens, launch.heads, launch.group,
            *q.stride()[1:3], *k.stride()[1:3], *v.stride()[1:3], *out.stride()[1:3],
            *lse.stride(),
            *launch.numbers,
            **launch.flags,
            BLOCK_M=config.block_m, BLOCK_N=config.block_n,
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return out, lse
