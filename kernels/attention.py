"""Flash attention, forward: softmax attention without its matrix of scores.

    S = scale Q K^T    [S = cap tanh(S / cap)]    P = softmax(S)    O = (P o mask / (1 - p)) V
    LSE = log(sum exp S [+ exp sink])

| kept | recomputed | GEMMs |
|---|---|---|
| O and LSE (fp32, one a row and head) | P, in the backward kernels | 2 |

A program walks over the keys that a block of queries of one head can see: first the blocks that
all of them see whole, then those that need a mask. Maxima and sums of rows are in units of log 2.
Grouped heads share their keys and values without copies. Rows that see nothing give zeros, and an
LSE of -inf, or of the sink: a learnt logit of the head that takes part in the softmax's sum and in
nothing else, which here is what maxima and sums begin with.

Packed sequences: a table made on the device says which block of which sequence a program has, so
that no length is read by the host. Sources: Dao et al. 2022, Dao 2023; sinks as in GPT-OSS;
dropout as in `reference/dropout.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import choose
from .attention_launch import Launch, block_table, fresh_strides, narrow, row_strides
from .attention_tiles import (
    LN2,
    LOG2E,
    block_of,
    check_tiles,
    dropout_factor,
    keys_seen,
    load_rows,
    row_offsets,
    score,
    spans_of,
    visible,
)
from .configs import Config, architecture
from .launch import Layout, Plan, layouts, on_device, operand, planned
from .reference.attention_inputs import check_offset_values
from .reference.explicit_attention import AttentionMask


@triton.jit
def _forward_step(
    acc, total, largest, q_tile, k, v, first_k, queries, keys, shift, row, col, offs_m, kv_head,
    stride_kt, stride_kh, stride_vt, stride_vh,
    scale, softcap, window, seed, slice_number, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, VARLEN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    DESC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: the running output, sums and maxima."""
    k_tile = load_rows(
        k, first_k, col, keys, kv_head, stride_kt, stride_kh,
        BLOCK_N, BLOCK_D, HEAD_DIM, DESC, VARLEN,
    )  # [BLOCK_N, BLOCK_D]
    dots = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    scores, _ = score(dots, scale, softcap, SOFTCAP, PRECISION)
    if MASKED:
        offs_n = col + tl.arange(0, BLOCK_N)
        seen = visible(
            offs_m[:, None], offs_n[None, :], queries, keys, shift, window, CAUSAL, WINDOW
        )
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
        v, first_k, col, keys, kv_head, stride_vt, stride_vh,
        BLOCK_N, BLOCK_DV, V_DIM, DESC, VARLEN, MASKED,
    )  # [BLOCK_N, BLOCK_DV]
    acc = acc * shrink[:, None]
    acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc, input_precision=PRECISION)
    return acc, total, now


@triton.jit(do_not_specialize=["tokens", "tokens_k", "heads", "threshold"])
def attention_forward_kernel(
    q, k, v, sinks, out, lse, cu_seqlens, cu_seqlens_k, tile_sequence, tile_block, seed,
    tokens, tokens_k, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_oh,
    stride_lb, stride_lh, stride_lt,
    scale, softcap, window, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, VARLEN: tl.constexpr, CROSS: tl.constexpr, HAS_SINKS: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr, DESC: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    check_tiles(BLOCK_N, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, DROPOUT, DESC)
    # The last queries first: under a causal mask they have the most to do.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    head, batch = tl.program_id(1), tl.program_id(2)
    sequence, row = block_of(pid, batch, tile_sequence, tile_block, BLOCK_M, VARLEN)
    first, queries, first_k, keys, shift = spans_of(
        sequence, batch, cu_seqlens, cu_seqlens_k, tokens, tokens_k, VARLEN, CROSS
    )
    if row >= 0 if VARLEN else queries > 0:  # a block that there is
        kv_head = head // group
        offs_m = row + tl.arange(0, BLOCK_M)
        q_tile = load_rows(
            q, first, row, queries, head, stride_qt, stride_qh,
            BLOCK_M, BLOCK_D, HEAD_DIM, DESC, VARLEN,
        )  # [BLOCK_M, BLOCK_D]
        acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        largest = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        if HAS_SINKS:
            total += 1.0
            largest = (
                tl.zeros((BLOCK_M,), tl.float32) + tl.load(sinks + head).to(tl.float32) * LOG2E
            )
        slice_number = sequence * heads + head
        lo, full_lo, full_hi, hi = keys_seen(
            row, queries, keys, shift, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, CROSS
        )
        for col in range(full_lo, full_hi, BLOCK_N):
            acc, total, largest = _forward_step(
                acc, total, largest, q_tile, k, v, first_k, queries, keys, shift, row, col,
                offs_m, kv_head, stride_kt, stride_kh, stride_vt, stride_vh,
                scale, softcap, window, seed, slice_number, threshold, keep_scale,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, VARLEN, False, PRECISION, DESC,
                HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        left = (full_lo - lo) // BLOCK_N  # blocks before the full ones, and after
        for block in range(0, left + tl.cdiv(hi - full_hi, BLOCK_N)):
            col = tl.where(block < left, lo + block * BLOCK_N, full_hi + (block - left) * BLOCK_N)
            acc, total, largest = _forward_step(
                acc, total, largest, q_tile, k, v, first_k, queries, keys, shift, row, col,
                offs_m, kv_head, stride_kt, stride_kh, stride_vt, stride_vh,
                scale, softcap, window, seed, slice_number, threshold, keep_scale,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, VARLEN, True, PRECISION, DESC,
                HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        empty = total == 0.0
        total = tl.where(empty, 1.0, total)
        acc = acc / total[:, None]
        row_lse = tl.where(empty, float("-inf"), (largest + tl.log2(total)) * LN2)
        offs_d = tl.arange(0, BLOCK_DV)
        tokens_m = (first + offs_m).to(tl.int64)
        pointers = out + tokens_m[:, None] * stride_ot + head * stride_oh + offs_d[None, :]
        mask = (offs_m < queries)[:, None] & (offs_d < V_DIM)[None, :]
        tl.store(pointers, acc.to(DTYPE), mask=mask)
        place = tokens_m if VARLEN else offs_m.to(tl.int64)
        at_lse = lse + row_offsets(place, head, batch, stride_lb, stride_lh, stride_lt)
        tl.store(at_lse, row_lse, mask=offs_m < queries)


@planned
def _plan(
    q: Layout,
    k: Layout,
    v: Layout,
    sinks: Layout | None,
    cu_seqlens: Layout | None,
    cu_seqlens_k: Layout | None,
    seed: Layout | None,
    mask: AttentionMask,
    config: Config | None,
) -> Plan:
    launch = Launch(q, k, v, mask, sinks, cu_seqlens, cu_seqlens_k, seed)
    if config is None:
        size, name = q.dtype.itemsize, architecture(q.device)
        config = choose("attention_forward", name, size, launch.width, launch.heavy)
    batch, tokens, heads, _ = q.shape
    strides = [s for x in (q, k, v) for s in row_strides(x)]
    strides += [*fresh_strides(heads, v.shape[3]), heads * tokens, tokens, 1]
    flags = {
        **launch.flags,
        "HAS_SINKS": sinks is not None,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
    }
    rows = ((q, config.block_m), (k, config.block_n), (v, config.block_n))
    return Plan(
        launch.query_grid(config.block_m),
        tuple(launch.rows_of(x, block) for x, block in rows),
        (*launch.sizes, *strides, *launch.numbers),
        flags,
    )


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask,
    *,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
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
    plan = _plan(*layouts(q, k, v, sinks, cu_seqlens, cu_seqlens_k, seed), mask, config)
    check_offset_values("cu_seqlens", cu_seqlens, q.shape[1])
    check_offset_values("cu_seqlens_k", cu_seqlens_k, k.shape[1])
    batch, tokens, heads, _ = q.shape
    out = q.new_empty(batch, tokens, heads, v.shape[3])
    lse = q.new_empty(batch, heads, tokens, dtype=torch.float32)
    cu_seqlens, cu_seqlens_k = narrow(cu_seqlens), narrow(cu_seqlens_k)
    table = block_table(cu_seqlens, tokens, plan.flags["BLOCK_M"])
    with on_device(q):
        attention_forward_kernel[plan.grid](
            *map(operand, (q, k, v), plan.blocks), None if sinks is None else sinks.contiguous(),
            out, lse, cu_seqlens, cu_seqlens_k, *table, seed, *plan.numbers, **plan.flags,
        )  # fmt: skip
    return out, lse
