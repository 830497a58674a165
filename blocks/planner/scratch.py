"""Bytes that one block's passes take beside what is kept: rebuilt tensors, scratch, gradients.

A closed form of what `run.py`, `ffn.py` and `attention.py` allocate, step by step, for the
reference path on a CPU; kernels need no more, as what they fuse is not allocated. `T` tokens are
worked on in chunks of `c`.

| step of a backward pass | there at once |
|---|---|
| FFN, activation | d mid, c (d preact, normed, hidden and two like it), what mid was rebuilt from |
| FFN, weights | d mid, c (d preact, d normed, normed, norm's scratch), weight gradients |
| attention core | d mid, d attn_out, roped q k v, their gradients, attn_out where rebuilt |
| QKV | d mid, d x, roped and d q k v, c (d qkv, d normed, normed, norm's scratch), gradients |
| with post-norms | beside: c (their gradient and, where rebuilt, input and hidden); the sum's
  gradient where they follow it; what the attention half's reads, where rebuilt |

The gradient of the block's output is counted; the block's kept tensors and its `x` are not.
"""

from __future__ import annotations

from collections.abc import Set
from math import prod

import torch

from backfuse.blocks.call import CHUNK_SIZE
from backfuse.blocks.keep import INPUT, block_needs, block_reads
from backfuse.blocks.lora import Adapters, adapter_parameters, all_parameters
from backfuse.blocks.policy import Policy
from backfuse.blocks.spec import BlockSpec
from backfuse.kernels.reference.norm import accumulate_dtype


def gradient_bytes(
    spec: BlockSpec, wanted: Set[str], dtype: torch.dtype, adapters: Adapters = ()
) -> int:
    """Bytes of the gradients of a block's parameters."""
    shapes = all_parameters(spec, adapters)
    return sum(prod(s) for n, s in shapes.items() if n in wanted) * dtype.itemsize


def _heads(spec: BlockSpec, kept: Set[str], tokens: int, itemsize: int, high: int) -> int:
    """Of q, k and v as the attention core takes them, what they are made from, and the angles."""
    rotates = spec.rope is not None or spec.qk_norm is not None
    copies = int("qkv" not in kept) + int(rotates and ("qkv" in kept or spec.qk_norm is not None))
    angles = 2 * spec.rotary_dim * high if spec.rope is not None else 0
    return tokens * (copies * spec.qkv_size * itemsize + angles)


def _attention(spec: BlockSpec, tokens: int, itemsize: int, high: int) -> int:
    """Of the attention's output and its LSE."""
    return tokens * (spec.attn_out_size * itemsize + spec.num_attention_heads * high)


def forward_scratch(
    spec: BlockSpec,
    policy: Policy,
    wanted: Set[str],
    *,
    tokens: int,
    dtype: torch.dtype,
    chunk_size: int,
) -> int:
    """Bytes at most beside x and what is kept while a block's forward pass runs, its output with.

    What is kept is taken to be there from the start.
    """
    kept = block_reads(spec, policy, frozenset(wanted)).kept
    size, high = dtype.itemsize, accumulate_dtype(dtype).itemsize
    chunk = min(tokens, chunk_size)
    h, p, f = spec.hidden_size, spec.preact_size, spec.intermediate_size
    mid = 0 if "mid" in kept else tokens * h * size
    made = _heads(spec, kept, tokens, size, high)
    made += 0 if "attn_out" in kept else _attention(spec, tokens, size, high)
    preact = 0 if "preact" in kept else chunk * p * size
    hidden = f if tokens <= chunk_size else 2 * f  # a chunk's lives until the next one's is there
    ffn = tokens * h * size + preact + chunk * (h + hidden) * size
    return mid + max(made + chunk * h * size, ffn)


def backward_scratch(
    spec: BlockSpec,
    policy: Policy,
    wanted: Set[str],
    *,
    tokens: int,
    dtype: torch.dtype,
    chunk_size: int,
    adapters: Adapters = (),
) -> int:
    """Bytes at most beside what is kept while a block's backward pass runs.

    Args:
        spec: the block.
        policy: what it keeps.
        wanted: names of what wants a gradient.
        tokens: rows.
        dtype: of everything.
        chunk_size: rows of a chunk.
        adapters: of its projections.
    """
    kept = block_reads(spec, policy, frozenset(wanted)).kept
    attn_needs, ffn_needs = block_needs(spec, frozenset(wanted))
    size, high = dtype.itemsize, accumulate_dtype(dtype).itemsize
    chunk = min(tokens, chunk_size)
    h, p, f = spec.hidden_size, spec.preact_size, spec.intermediate_size
    stream, qkv = tokens * h * size, tokens * spec.qkv_size * size
    # over several chunks gradients are summed in fp32, and a CPU's share of a chunk stands beside
    each = size if tokens <= chunk_size else high
    beside = adapter_parameters(spec, adapters)
    in_ffn = {n for n in beside if n.startswith("mlp.")}
    of_ffn, of_attn = (
        {n: prod(s) for n, s in shapes.items() if n in wanted}
        for shapes in (
            {**spec.ffn_parameters(), **{n: beside[n] for n in in_ffn}},
            {**spec.attention_parameters(), **{n: beside[n] for n in beside.keys() - in_ffn}},
        )
    )
    ffn_grads, attn_grads = each * sum(of_ffn.values()), each * sum(of_attn.values())

    attention = _attention(spec, tokens, size, high) if "attn_out" not in kept else 0
    heads = _heads(spec, kept, tokens, size, high)
    rebuilt = 0
    if "mid" not in kept and ffn_needs.anything:
        rebuilt = stream + (attention + heads if attention else 0)
    # what a post-norm reads, where it is rebuilt; it stays until the half is done
    branch = stream if spec.post_norm and attn_needs.anything and "attn_branch" not in kept else 0

    # a norm's backward in high precision, into short results through copies
    wide = (3 if size == high else 5) * high
    normed = chunk * h * (2 * size + wide if spec.pre_norm else size)
    several = tokens > chunk_size
    # the gradient behind a post-norm stays while its chunk is worked on
    behind = chunk * h * size if spec.post_norm else 0

    peak = stream
    if ffn_needs.anything:
        hidden = chunk * f * size * (3 if spec.gated else 2)
        again = chunk * h * size if "preact" not in kept and spec.pre_norm else 0
        first = ffn_grads if several else 0
        down = each * sum(n for name, n in of_ffn.items() if "down" in name)
        entry = 0
        if spec.post_norm:  # its input again, if it was not kept, and the hidden that was made of
            remade = chunk * (h + f) * size if "ffn_branch" not in kept else 0
            entry = remade + chunk * h * wide + first
            hidden += chunk * f * size if remade else 0
            again += behind + (chunk * h * size if remade else 0)
        steps = (
            entry + again,
            again + hidden + first,
            chunk * f * size + again + max(first, down),
            normed + again + max(first, down),
            chunk * h * size * (2 if spec.pre_norm else 1) + again + ffn_grads,
        )
        output = stream if ffn_needs.input else 0
        peak = max(peak, stream + rebuilt + branch + output + chunk * p * size + max(steps))
    if attn_needs.anything:
        out = tokens * spec.attn_out_size * size
        before = stream * (2 if ffn_needs.anything else 1) + ffn_grads + attention + branch
        # the gradient of the sum that a norm follows, or of the last chunk before a post-norm
        before += stream if spec.norm_after_residual else behind
        # copies made for rotation stay until the half is done
        projection = each * sum(n for name, n in of_attn.items() if "o_proj" in name)
        core = before + out + heads + qkv + projection
        output = stream if INPUT in wanted else 0
        last = before + heads + qkv + output + chunk * spec.qkv_size * size
        first = attn_grads if several else projection
        qk_norm = chunk * spec.q_size * (3 * size + wide) if spec.qk_norm else 0
        passed = (2 if spec.pre_norm else 1) * chunk * h * size
        qk_norm += passed if several and qk_norm else 0  # of the chunk before
        rotation = 0
        if spec.rope is not None:  # the result, its source in high precision, the transposed sines
            copies = 1 if size == high else 2
            rotation = chunk * (copies * (spec.q_size + spec.kv_size) + spec.rotary_dim) * high
            rotation += passed if several else 0
        at_end = chunk * h * size * (2 if spec.pre_norm or several else 1)
        last += max(max(normed, qk_norm, rotation) + first, at_end + attn_grads)
        peak = max(peak, core, last)
    return peak


def default_chunk(device_name: str) -> int:
    """Rows of a chunk where the user does not say."""
    return CHUNK_SIZE["cpu" if device_name == "cpu" else "cuda"]
