"""Flash attention, backward: two kernels, no atomics.

    P = exp(S - LSE)       dP = dO V^T o mask / (1 - p)     dS = P o (dP - delta) [* (1 - tanh^2)]
    dV = (P o mask / (1 - p))^T dO        dK = scale dS^T Q        dQ = scale dS K

| kept | recomputed | GEMMs |
|---|---|---|
| Q, K, V (or rebuilt by the caller), O (in delta) and LSE | P, twice | 7 |

The one for dK and dV holds a block of keys and walks over the queries that see it, of all heads of
its group; the one for dQ holds a block of queries and walks over keys, as the forward does. S^T and
dP^T are computed as such (`K Q^T`, `V dO^T`), so that no operand of a product is a transposed
accumulator: that goes wrong on Hopper before Triton 3.7.1. P is computed twice for it, and in
return every sum has one owner and one order.

delta, the row sums of O o dO, comes from the pass that rotates q and k (`qk_rope.py`). Sinks are in
LSE, and change nothing here; their own gradient needs LSE and delta alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_configs import choose
from .attention_launch import (
    Launch,
    back_to_back,
    block_table,
    fresh_strides,
    narrow,
    row_strides,
)
from .attention_tiles import (
    LOG2E,
    block_of,
    check_tiles,
    dropout_factor,
    in_reach,
    keys_seen,
    load_rows,
    queries_seeing,
    row_offsets,
    score,
    spans_of,
    visible,
)
from .configs import Config, architecture
from .launch import Layout, Plan, layouts, on_device, operand, planned
from .reference.attention_inputs import check_offset_values
from .reference.explicit_attention import AttentionMask, sink_gradient


@triton.jit
def _probabilities(
    dots, row_lse, scale, softcap, seen, SOFTCAP: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """P from `Q K^T` (or P^T from its transpose), and tanh's value. `row_lse` in units of log 2."""
    scores, tanh = score(dots, scale, softcap, SOFTCAP, PRECISION)
    weights = tl.exp2(scores - row_lse)
    if MASKED:
        weights = tl.where(seen, weights, 0.0)
    return weights, tanh


@triton.jit
def _row_lse(lse, rows, mask):
    """LSE of some rows in units of log 2; 0 for those that see nothing, whose P is masked."""
    value = tl.load(lse + rows, mask=mask, other=0.0)
    return tl.where(value == float("-inf"), 0.0, value * LOG2E)


@triton.jit
def _dkdv_step(
    dk, dv, k_tile, v_tile, q, dout, lse, delta, first, queries, shift, row, col, offs_n,
    head, batch,
    stride_qt, stride_qh, stride_dt, stride_dh, stride_lb, stride_lh, stride_lt,
    stride_eb, stride_eh, stride_et,
    scale, softcap, window, seed, slice_number, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, VARLEN: tl.constexpr, CLEAN: tl.constexpr, PRECISION: tl.constexpr,
    DESC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of queries: adds to dK and dV.

    Queries past the end are zeros, and so is what they add. Keys past the end get something, which
    is not stored.
    """
    offs_m = row + tl.arange(0, BLOCK_M)
    mask_m = offs_m < queries
    place = (first + offs_m).to(tl.int64) if VARLEN else offs_m.to(tl.int64)
    q_tile = load_rows(
        q, first, row, queries, head, stride_qt, stride_qh,
        BLOCK_M, BLOCK_D, HEAD_DIM, DESC, VARLEN, CLEAN,
    )  # [BLOCK_M, BLOCK_D]
    dots = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    seen = mask_m[None, :]
    if CAUSAL or WINDOW:
        seen = in_reach((offs_m + shift)[None, :] - offs_n[:, None], window, CAUSAL, WINDOW)
    at_lse = row_offsets(place, head, batch, stride_lb, stride_lh, stride_lt)
    row_lse = _row_lse(lse, at_lse, mask_m)
    weights, tanh = _probabilities(
        dots, row_lse[None, :], scale, softcap, seen, SOFTCAP, CAUSAL or WINDOW, PRECISION
    )
    do_tile = load_rows(
        dout, first, row, queries, head, stride_dt, stride_dh,
        BLOCK_M, BLOCK_DV, V_DIM, DESC, VARLEN, CLEAN,
    )  # [BLOCK_M, BLOCK_DV]
    dweights = tl.dot(v_tile, do_tile.T, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    dropped = weights
    if DROPOUT:
        factor = dropout_factor(
            seed, row, col, slice_number, threshold, keep_scale, SITE, BLOCK_M, BLOCK_N, True
        )
        dropped = weights * factor
        dweights *= factor
    dv = tl.dot(dropped.to(do_tile.dtype), do_tile, dv, input_precision=PRECISION)
    at_delta = row_offsets(place, head, batch, stride_eb, stride_eh, stride_et)
    row_delta = tl.load(delta + at_delta, mask=mask_m, other=0.0)
    dscores = weights * (dweights - row_delta[None, :])
    if SOFTCAP:
        dscores *= 1.0 - tanh * tanh
    dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["tokens", "tokens_k", "heads", "threshold"])
def attention_dkdv_kernel(
    q, k, v, dout, lse, delta, dk, dv, cu_seqlens, cu_seqlens_k, tile_sequence, tile_block, seed,
    tokens, tokens_k, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_lb, stride_lh, stride_lt, stride_eb, stride_eh, stride_et,
    stride_dkt, stride_dkh, stride_dvt, stride_dvh,
    scale, softcap, window, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, VARLEN: tl.constexpr, CROSS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, DESC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of a block of keys of one head, from all query heads of its group."""
    check_tiles(BLOCK_N, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, DROPOUT, DESC)
    kv_head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    sequence, col = block_of(tl.program_id(0), batch, tile_sequence, tile_block, BLOCK_N, VARLEN)
    first, queries, first_k, keys, shift = spans_of(
        sequence, batch, cu_seqlens, cu_seqlens_k, tokens, tokens_k, VARLEN, CROSS
    )
    if col >= 0 if VARLEN else keys > 0:  # a block that there is
        offs_n = col + tl.arange(0, BLOCK_N)
        k_tile = load_rows(
            k, first_k, col, keys, kv_head, stride_kt, stride_kh,
            BLOCK_N, BLOCK_D, HEAD_DIM, DESC, VARLEN,
        )
        v_tile = load_rows(
            v, first_k, col, keys, kv_head, stride_vt, stride_vh,
            BLOCK_N, BLOCK_DV, V_DIM, DESC, VARLEN,
        )
        acc_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
        acc_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
        lo, hi = queries_seeing(
            col, queries, keys, shift, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, CROSS
        )
        blocks = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_M)
        whole = blocks
        if VARLEN and DESC:  # the last block of a sequence may have rows of the next one
            whole = tl.minimum(blocks, (queries - lo) // BLOCK_M)
        # One loop over the heads of the group and their blocks: it is filled and drained once.
        if whole > 0:
            tl.assume(group * whole > 0)  # see `tiles.dot_kn`
            for step in range(0, group * whole):
                head = kv_head * group + step // whole
                row = lo + step % whole * BLOCK_M
                acc_dk, acc_dv = _dkdv_step(
                    acc_dk, acc_dv, k_tile, v_tile, q, dout, lse, delta, first, queries, shift,
                    row, col, offs_n, head, batch,
                    stride_qt, stride_qh, stride_dt, stride_dh,
                    stride_lb, stride_lh, stride_lt, stride_eb, stride_eh, stride_et,
                    scale, softcap, window, seed, sequence * heads + head, threshold, keep_scale,
                    CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, VARLEN, False, PRECISION, DESC,
                    HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        if VARLEN and DESC:
            for step in range(0, group * (blocks - whole)):
                head, row = kv_head * group + step, lo + whole * BLOCK_M
                acc_dk, acc_dv = _dkdv_step(
                    acc_dk, acc_dv, k_tile, v_tile, q, dout, lse, delta, first, queries, shift,
                    row, col, offs_n, head, batch,
                    stride_qt, stride_qh, stride_dt, stride_dh,
                    stride_lb, stride_lh, stride_lt, stride_eb, stride_eh, stride_et,
                    scale, softcap, window, seed, sequence * heads + head, threshold, keep_scale,
                    CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, VARLEN, True, PRECISION, DESC,
                    HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        tokens_n = (first_k + offs_n).to(tl.int64)[:, None]
        mask_n = (offs_n < keys)[:, None]
        offs_d, offs_dv = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_DV)[None, :]
        at_dk = dk + tokens_n * stride_dkt + kv_head * stride_dkh + offs_d
        tl.store(at_dk, (acc_dk * scale).to(DTYPE), mask=mask_n & (offs_d < HEAD_DIM))
        at_dv = dv + tokens_n * stride_dvt + kv_head * stride_dvh + offs_dv
        tl.store(at_dv, acc_dv.to(DTYPE), mask=mask_n & (offs_dv < V_DIM))


@triton.jit
def _dq_step(
    dq, q_tile, do_tile, row_lse, row_delta, k, v, first_k, queries, keys, shift, row, col, offs_m,
    kv_head,
    stride_kt, stride_kh, stride_vt, stride_vh,
    scale, softcap, window, seed, slice_number, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, VARLEN: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
    DESC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, V_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One block of keys: adds to dQ."""
    k_tile = load_rows(
        k, first_k, col, keys, kv_head, stride_kt, stride_kh,
        BLOCK_N, BLOCK_D, HEAD_DIM, DESC, VARLEN, MASKED,
    )  # [BLOCK_N, BLOCK_D]
    dots = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    offs_n = col + tl.arange(0, BLOCK_N)
    seen = (offs_n < keys)[None, :]
    if MASKED:
        seen = visible(
            offs_m[:, None], offs_n[None, :], queries, keys, shift, window, CAUSAL, WINDOW
        )
    weights, tanh = _probabilities(
        dots, row_lse[:, None], scale, softcap, seen, SOFTCAP, MASKED, PRECISION
    )
    v_tile = load_rows(
        v, first_k, col, keys, kv_head, stride_vt, stride_vh,
        BLOCK_N, BLOCK_DV, V_DIM, DESC, VARLEN,
    )  # [BLOCK_N, BLOCK_DV]
    dweights = tl.dot(do_tile, v_tile.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
    if DROPOUT:
        dweights *= dropout_factor(
            seed, row, col, slice_number, threshold, keep_scale, SITE, BLOCK_M, BLOCK_N, False
        )
    dscores = weights * (dweights - row_delta[:, None])
    if SOFTCAP:
        dscores *= 1.0 - tanh * tanh
    if MASKED:
        dscores = tl.where(seen, dscores, 0.0)
    return tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)


@triton.jit(do_not_specialize=["tokens", "tokens_k", "heads", "threshold"])
def attention_dq_kernel(
    q, k, v, dout, lse, delta, dq, cu_seqlens, cu_seqlens_k, tile_sequence, tile_block, seed,
    tokens, tokens_k, heads, group,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_dt, stride_dh,
    stride_lb, stride_lh, stride_lt, stride_eb, stride_eh, stride_et, stride_dqt, stride_dqh,
    scale, softcap, window, threshold, keep_scale,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, DROPOUT: tl.constexpr,
    SITE: tl.constexpr, VARLEN: tl.constexpr, CROSS: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr, DESC: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    V_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of a block of queries of one head."""
    check_tiles(BLOCK_N, HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, DROPOUT, DESC)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # the heavy ones first
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    sequence, row = block_of(pid, batch, tile_sequence, tile_block, BLOCK_M, VARLEN)
    first, queries, first_k, keys, shift = spans_of(
        sequence, batch, cu_seqlens, cu_seqlens_k, tokens, tokens_k, VARLEN, CROSS
    )
    if row >= 0 if VARLEN else queries > 0:  # a block that there is
        kv_head = head // group
        offs_m = row + tl.arange(0, BLOCK_M)
        mask_m = offs_m < queries
        place = (first + offs_m).to(tl.int64) if VARLEN else offs_m.to(tl.int64)
        q_tile = load_rows(
            q, first, row, queries, head, stride_qt, stride_qh,
            BLOCK_M, BLOCK_D, HEAD_DIM, DESC, VARLEN,
        )
        do_tile = load_rows(
            dout, first, row, queries, head, stride_dt, stride_dh,
            BLOCK_M, BLOCK_DV, V_DIM, DESC, VARLEN,
        )
        at_lse = row_offsets(place, head, batch, stride_lb, stride_lh, stride_lt)
        row_lse = _row_lse(lse, at_lse, mask_m)
        at_delta = row_offsets(place, head, batch, stride_eb, stride_eh, stride_et)
        row_delta = tl.load(delta + at_delta, mask=mask_m, other=0.0)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        slice_number = sequence * heads + head
        lo, full_lo, full_hi, hi = keys_seen(
            row, queries, keys, shift, window, BLOCK_M, BLOCK_N, CAUSAL, WINDOW, CROSS
        )
        for col in range(full_lo, full_hi, BLOCK_N):
            acc = _dq_step(
                acc, q_tile, do_tile, row_lse, row_delta, k, v, first_k, queries, keys, shift,
                row, col, offs_m, kv_head, stride_kt, stride_kh, stride_vt, stride_vh,
                scale, softcap, window, seed, slice_number, threshold, keep_scale,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, VARLEN, False, PRECISION, DESC,
                HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        left = (full_lo - lo) // BLOCK_N
        for block in range(0, left + tl.cdiv(hi - full_hi, BLOCK_N)):
            col = tl.where(block < left, lo + block * BLOCK_N, full_hi + (block - left) * BLOCK_N)
            acc = _dq_step(
                acc, q_tile, do_tile, row_lse, row_delta, k, v, first_k, queries, keys, shift,
                row, col, offs_m, kv_head, stride_kt, stride_kh, stride_vt, stride_vh,
                scale, softcap, window, seed, slice_number, threshold, keep_scale,
                CAUSAL, WINDOW, SOFTCAP, DROPOUT, SITE, VARLEN, True, PRECISION, DESC,
                HEAD_DIM, BLOCK_D, V_DIM, BLOCK_DV, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        offs_d = tl.arange(0, BLOCK_D)[None, :]
        at = dq + (first + offs_m).to(tl.int64)[:, None] * stride_dqt + head * stride_dqh + offs_d
        tl.store(at, (acc * scale).to(DTYPE), mask=mask_m[:, None] & (offs_d < HEAD_DIM))


class Plans(NamedTuple):
    """How the two kernels are launched.

    Attributes:
        dkdv: the one for dK and dV.
        dq: the one for dQ.
    """

    dkdv: Plan
    dq: Plan


@planned
def _plans(
    q: Layout,
    k: Layout,
    v: Layout,
    dout: Layout,
    lse: Layout,
    delta: Layout,
    dq: Layout | None,
    sinks: Layout | None,
    cu_seqlens: Layout | None,
    cu_seqlens_k: Layout | None,
    seed: Layout | None,
    mask: AttentionMask,
    dkdv_config: Config | None,
    dq_config: Config | None,
) -> Plans:
    launch = Launch(q, k, v, mask, sinks, cu_seqlens, cu_seqlens_k, seed, dout)
    batch, tokens, heads, head_dim = q.shape
    kv_heads, v_dim = v.shape[2:]
    for name, rows in (("lse", lse), ("delta", delta)):
        fits = rows.dtype == torch.float32 and rows.device == q.device
        if not fits or rows.shape != (batch, heads, tokens):
            raise ValueError(
                f"{name} is {rows.dtype} {list(rows.shape)} on {rows.device}, expected "
                f"torch.float32 {[batch, heads, tokens]} on {q.device}"
            )
    name, size = architecture(q.device), q.dtype.itemsize
    keys = dkdv_config or choose("attention_dkdv", name, size, launch.width, launch.heavy)
    queries = dq_config or choose("attention_dq", name, size, launch.width, launch.heavy)
    strides = [s for x in (q, k, v, dout) for s in row_strides(x)]
    strides += [*lse.strides, *delta.strides]

    def plan(
        grid: tuple[int, ...], config: Config, m: int, n: int, outputs: list[tuple[int, int]]
    ) -> Plan:
        return Plan(
            grid,
            tuple(launch.rows_of(x, rows) for x, rows in ((q, m), (k, n), (v, n), (dout, m))),
            (*launch.sizes, *strides, *(s for pair in outputs for s in pair), *launch.numbers),
            {
                **launch.flags,
                "BLOCK_M": m,
                "BLOCK_N": n,
                "num_warps": config.num_warps,
                "num_stages": config.num_stages,
            },
        )

    to_k, to_v = fresh_strides(kv_heads, head_dim), fresh_strides(kv_heads, v_dim)
    to_q = fresh_strides(heads, head_dim) if dq is None else row_strides(dq)
    m, n = keys.block_m, keys.block_n
    dkdv = plan(launch.key_grid(n), keys, m, n, [to_k, to_v])
    m, n = queries.block_m, queries.block_n
    return Plans(dkdv, plan(launch.query_grid(m), queries, m, n, [to_q]))


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    mask: AttentionMask,
    delta: Tensor,
    *,
    sinks: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    seed: Tensor | None = None,
    need_dsinks: bool = True,
    need_dq: bool = True,
    need_dkv: bool = True,
    dq: Tensor | None = None,
    dkdv_config: Config | None = None,
    dq_config: Config | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v and sinks. As `reference.explicit_attention.explicit_backward`, without
    a bias.

    Args:
        delta: `[batch, heads, tokens]`, fp32, any strides.
        dq: shaped as q and in its dtype, written; may be q itself, which is lost then: its kernel
            runs last, and each program reads its own rows before it writes them. None: fresh.
        dkdv_config: tile sizes; None for the table's.
        dq_config: see dkdv_config.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for shapes, strides or devices that do not fit.
    """
    shape = (*q.shape[:3], v.shape[-1])
    if dout.shape != shape or dout.dtype != q.dtype or dout.device != q.device:
        raise ValueError(
            f"dout is {dout.dtype} {list(dout.shape)} on {dout.device}, expected {q.dtype} "
            f"{list(shape)} on {q.device}"
        )
    if dout.stride(3) != 1 or not back_to_back(dout.shape, dout.stride()):
        dout = dout.contiguous()
    given = layouts(q, k, v, dout, lse, delta, dq, sinks, cu_seqlens, cu_seqlens_k, seed)
    plans = _plans(*given, mask, dkdv_config, dq_config)
    check_offset_values("cu_seqlens", cu_seqlens, q.shape[1])
    check_offset_values("cu_seqlens_k", cu_seqlens_k, k.shape[1])
    cu_seqlens, cu_seqlens_k = narrow(cu_seqlens), narrow(cu_seqlens_k)
    of_keys = cu_seqlens if cu_seqlens_k is None else cu_seqlens_k
    loaded, dk, dv = (q, k, v, dout), None, None
    with on_device(q):
        if need_dkv:
            dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
            plan = plans.dkdv
            table = block_table(of_keys, k.shape[1], plan.flags["BLOCK_N"])
            attention_dkdv_kernel[plan.grid](
                *map(operand, loaded, plan.blocks), lse, delta, dk, dv, cu_seqlens, cu_seqlens_k,
                *table, seed, *plan.numbers, **plan.flags,
            )  # fmt: skip
        if need_dq:
            dq = q.new_empty(q.shape) if dq is None else dq
            plan = plans.dq
            table = block_table(cu_seqlens, q.shape[1], plan.flags["BLOCK_M"])
            attention_dq_kernel[plan.grid](
                *map(operand, loaded, plan.blocks), lse, delta, dq, cu_seqlens, cu_seqlens_k,
                *table, seed, *plan.numbers, **plan.flags,
            )  # fmt: skip
    dsinks = sink_gradient(sinks, lse, delta) if sinks is not None and need_dsinks else None
    return dq if need_dq else None, dk, dv, dsinks
