"""What the attention kernels share: which rows a program has, which it visits, and their scores.

Queries and keys may differ in number. A sequence's last query then stands beside its last key, as
in FlashAttention from 2.1 on: query i stands where key `i + shift` does, with `shift = keys -
queries`, and it is from there that causality and windows count. Without CROSS shift is 0, and costs
nothing.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def check_tiles(
    BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, DROPOUT: tl.constexpr, DESC: tl.constexpr,
):  # fmt: skip
    """What forward and backward must agree on, and could get wrong without a word."""
    tl.static_assert(HEAD_DIM <= BLOCK_D, "a head must fit its tile")
    tl.static_assert(V_DIM <= BLOCK_DV, "a head of v must fit its tile")
    if DESC:  # a wider tile would hold channels of the next head
        tl.static_assert(HEAD_DIM == BLOCK_D, "a descriptor loads whole heads")
        tl.static_assert(V_DIM == BLOCK_DV, "a descriptor loads whole heads")
    if DROPOUT:  # every kernel draws for the same four keys at a time
        tl.static_assert(BLOCK_N % 4 == 0, "keys drop out in groups of four")


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
    VARLEN: tl.constexpr,
    CLEAN: tl.constexpr = False,
):
    """`[BLOCK_ROW, BLOCK_D]`: rows of one head of a sequence that begins at `first`.

    Zeros outside of the head, and past the sequence's end: but packed sequences, loaded through a
    descriptor, have the next one's rows there, unless CLEAN is asked for. It must be where such a
    row meets a weight of 0 in a sum, for it may hold a NaN.
    """
    if DESC and not VARLEN:
        tile = source.load([tl.program_id(2), row, head * HEAD_DIM]).reshape(BLOCK_ROW, BLOCK_D)
    elif DESC:
        tile = source.load([(first + row).to(tl.int32), head * HEAD_DIM])
        if CLEAN:
            inside = row + tl.arange(0, BLOCK_ROW) < rows
            tile = tl.where(inside[:, None], tile, tl.zeros_like(tile))
    else:
        offs_row, offs_d = row + tl.arange(0, BLOCK_ROW), tl.arange(0, BLOCK_D)
        pointers = source + (first + offs_row).to(tl.int64)[:, None] * stride_row
        pointers += head.to(tl.int64) * stride_head + offs_d[None, :]
        mask = (offs_row < rows)[:, None]
        if BLOCK_D != HEAD_DIM:
            mask = mask & (offs_d < HEAD_DIM)[None, :]
        tile = tl.load(pointers, mask=mask, other=0.0)
    return tile


@triton.jit
def row_offsets(rows, head, batch, stride_batch, stride_head, stride_row):
    """Where numbers of rows are (LSE, delta): int64."""
    return batch.to(tl.int64) * stride_batch + head.to(tl.int64) * stride_head + rows * stride_row


@triton.jit
def block_of(pid, batch, tile_sequence, tile_block, BLOCK: tl.constexpr, VARLEN: tl.constexpr):
    """Number of a program's sequence and its first row there: negative past the last block."""
    if VARLEN:
        sequence = tl.load(tile_sequence + pid)
        row = tl.load(tile_block + pid) * BLOCK
    else:
        sequence = batch
        row = pid * BLOCK
    return sequence, row


@triton.jit
def spans_of(
    sequence, batch, cu_seqlens, cu_seqlens_k, tokens, tokens_k,
    VARLEN: tl.constexpr, CROSS: tl.constexpr,
):  # fmt: skip
    """A sequence's first query and their number, its first key and their number, and shift."""
    if VARLEN:
        first = tl.load(cu_seqlens + sequence)
        queries = tl.load(cu_seqlens + sequence + 1) - first
    else:
        first = batch.to(tl.int64) * tokens
        queries = tokens
    if CROSS:
        if VARLEN:
            first_k = tl.load(cu_seqlens_k + sequence)
            keys = tl.load(cu_seqlens_k + sequence + 1) - first_k
        else:
            first_k = batch.to(tl.int64) * tokens_k
            keys = tokens_k
        shift = keys - queries
    else:
        first_k, keys, shift = first, queries, 0
    return first, queries, first_k, keys, shift


@triton.jit
def _not_negative(x, CROSS: tl.constexpr):
    """x, which is less than 0 only with a shift, or 0 then."""
    return tl.maximum(x, 0) if CROSS else x


@triton.jit
def keys_seen(
    row, queries, keys, shift, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CROSS: tl.constexpr,
):  # fmt: skip
    """Keys that some query of a block sees, and those that all see: `lo <= full_lo <= full_hi <=
    hi`, all but `hi` multiples of BLOCK_N."""
    lo, hi = 0, keys
    full_lo, full_hi = 0, keys // BLOCK_N * BLOCK_N
    start = row + shift  # where the first query stands among the keys
    last = tl.minimum(row + BLOCK_M, queries) + shift  # one past the last
    if CAUSAL:
        hi = _not_negative(last, CROSS)
        full_hi = _not_negative(start + 1, CROSS) // BLOCK_N * BLOCK_N
    if WINDOW:
        lo = tl.maximum(start - window + 1, 0) // BLOCK_N * BLOCK_N
        # the last query sees from last - window on; the first one up to start + window - 1
        full_lo = tl.cdiv(tl.maximum(last - window, 0), BLOCK_N) * BLOCK_N
        if not CAUSAL:
            hi = tl.minimum(keys, _not_negative(last + window - 1, CROSS))
            full_hi = tl.minimum(keys, _not_negative(start + window, CROSS)) // BLOCK_N * BLOCK_N
    full_lo = tl.minimum(tl.maximum(full_lo, lo), tl.cdiv(hi, BLOCK_N) * BLOCK_N)
    full_hi = tl.maximum(full_lo, tl.minimum(full_hi, hi // BLOCK_N * BLOCK_N))
    return lo, full_lo, full_hi, hi


@triton.jit
def queries_seeing(
    col, queries, keys, shift, window,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    CROSS: tl.constexpr,
):  # fmt: skip
    """The first and one past the last of the queries that see some key of a block; the first is
    rounded down to a multiple of BLOCK_M."""
    lo, hi = 0, queries
    start = col - shift  # where the first key stands among the queries
    last = tl.minimum(col + BLOCK_N, keys) - shift  # one past the last
    if CAUSAL:
        lo = _not_negative(start, CROSS) // BLOCK_M * BLOCK_M
    if WINDOW:
        hi = tl.minimum(queries, _not_negative(last + window - 1, CROSS))
        if not CAUSAL:
            lo = tl.maximum(start - window + 1, 0) // BLOCK_M * BLOCK_M
    return lo, hi


@triton.jit
def in_reach(distance, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether a query sees a key that stands so far before it."""
    if CAUSAL:
        near = distance >= 0
        if WINDOW:
            near = near & (distance < window)
    else:
        tl.static_assert(WINDOW)
        near = (distance < window) & (-distance < window)
    return near


@triton.jit
def visible(
    offs_q, offs_k, queries, keys, shift, window, CAUSAL: tl.constexpr, WINDOW: tl.constexpr
):
    """Which keys a query sees, of those that there are; the two broadcast against each other."""
    seen = (offs_k < keys) & (offs_q < queries)
    if CAUSAL or WINDOW:
        seen = seen & in_reach(offs_q + shift - offs_k, window, CAUSAL, WINDOW)
    return seen


@triton.jit
def score(dots, scale, softcap, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """Scores in units of log 2, from `Q K^T`; and tanh's value (the same scores without a cap)."""
    if SOFTCAP:
        x = dots * (scale / softcap)
        tanh = 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
        if PRECISION == "ieee":  # fp32: near 0 that difference cancels, and a series does not
            x2 = x * x
            series = -1.0 / 3 + x2 * (2.0 / 15 + x2 * (-17.0 / 315 + x2 * (62.0 / 2835)))
            tanh = tl.where(tl.abs(x) < 0.25, x + x * x2 * series, tanh)
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
