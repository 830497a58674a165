"""What a block keeps for its backward pass, to the byte.

The list of kept tensors is `keep.block_reads`'s, the one the forward pass saves by; this file only
knows their shapes. Not counted: parameters (they are there anyway), and what all layers share
(cosines and sines, masks, offsets of packed sequences).
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch

from backfuse.kernels.reference.norm import accumulate_dtype

from .keep import INPUT, block_reads, offloaded
from .lora import Adapters, AdaptersLike, adapter_parameters, drops, parse_adapters
from .policy import Policy, PolicyLike
from .spec import BlockSpec, check_spec

#: What a block computes in.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def wanted_set(
    spec: BlockSpec,
    requires_grad: bool | Collection[str],
    adapters: AdaptersLike | Adapters | None = None,
) -> frozenset[str]:
    """Names that want a gradient, from what a user says of them.

    Raises:
        TypeError: for something else than names.
        ValueError: for a name that is neither a parameter nor `hidden_states`.
    """
    known = {INPUT, *spec.parameters(), *adapter_parameters(spec, adapters)}
    if isinstance(requires_grad, bool):
        return frozenset(known if requires_grad else ())
    if isinstance(requires_grad, str) or not isinstance(requires_grad, Collection):
        raise TypeError(
            f"requires_grad is {requires_grad!r}, expected True, False or a collection of names"
        )
    unknown = set(requires_grad) - known
    if unknown:
        raise ValueError(
            f"requires_grad names {sorted(unknown, key=repr)}, expected names among {sorted(known)}"
        )
    return frozenset(requires_grad)


def check_sizes(batch_size: int, seq_len: int) -> None:
    """Raise a ValueError unless both are positive integers."""
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}, expected a positive integer")


def check_dtype(name: str, dtype: object) -> None:
    """Raise a TypeError unless a block can compute in `dtype`."""
    if dtype not in DTYPES:
        raise TypeError(f"{name} is {dtype!r}, expected one of {', '.join(map(str, DTYPES))}")


def kept_bytes(
    spec: BlockSpec,
    policy: PolicyLike,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | Adapters | None = None,
    training: bool = True,
) -> dict[str, int]:
    """Bytes that one block keeps on the device between its forward and its backward pass.

    What it offloads is not in it (see `host_bytes`).

    Args:
        spec: the block.
        policy: what it keeps; a policy that recomputes `x` stands for a layer of a segment that
            is not its first.
        batch_size: sequences.
        seq_len: tokens a sequence.
        dtype: of the residual stream, and of the GEMMs' operands where autocast is off.
        autocast_dtype: of the GEMMs' operands under autocast; None: off.
        requires_grad: names of what wants a gradient, parameters and `"hidden_states"`; or True
            for all and False for nothing.
        adapters: projection -> its `LoRA`, or several. They keep nothing themselves; what their
            gradients read is kept, and `requires_grad` may name their parameters.
        training: whether dropout is active.

    Returns:
        Name of each kept tensor -> bytes; the five activations' names first, then `lse`, norm
        statistics and `seed`. `sum(result.values())` is the total.

    Raises:
        TypeError: for a spec, a dtype or names that are none.
        ValueError: for sizes, policies or names that do not exist.
    """
    everything, away = _everything(
        spec, policy, batch_size=batch_size, seq_len=seq_len, dtype=dtype,
        autocast_dtype=autocast_dtype, requires_grad=requires_grad, adapters=adapters,
        training=training,
    )  # fmt: skip
    return {name: size for name, size in everything.items() if name not in away}


def host_bytes(spec: BlockSpec, policy: PolicyLike, **sizes: Any) -> dict[str, int]:
    """Bytes that one block keeps elsewhere: in host memory, or in files.

    What the last calls before the backward pass keep is still on the device when that begins, and
    never leaves: `offload.IN_FLIGHT + 1` of them. So does an `x` whose rows do not stand right
    behind each other.

    Arguments, result and errors as `kept_bytes`.
    """
    everything, away = _everything(spec, policy, **sizes)
    return {name: size for name, size in everything.items() if name in away}


def _everything(
    spec: BlockSpec,
    policy: PolicyLike,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.float32,
    autocast_dtype: torch.dtype | None = None,
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | Adapters | None = None,
    training: bool = True,
) -> tuple[dict[str, int], frozenset[str]]:
    """Bytes of everything that is kept, and the names of what is kept elsewhere."""
    check_spec(spec)
    check_sizes(batch_size, seq_len)
    check_dtype("dtype", dtype)
    if autocast_dtype is not None:
        check_dtype("autocast_dtype", autocast_dtype)
    parsed = Policy.parse(policy)
    parsed.check_available()
    own = parse_adapters(spec, adapters)
    wanted = wanted_set(spec, requires_grad, own)
    kept = block_reads(spec, parsed, wanted).kept - (set() if parsed.keeps("x") else {"x"})
    tokens = batch_size * seq_len
    compute = autocast_dtype if autocast_dtype and dtype != torch.float64 else dtype
    stats = accumulate_dtype(dtype).itemsize * (2 if spec.norm == "layernorm" else 1)
    post_stats = accumulate_dtype(compute).itemsize * (2 if spec.norm == "layernorm" else 1)
    branch = dtype if spec.norm_after_residual else compute
    per_token = {
        "x": spec.hidden_size * dtype.itemsize,
        "qkv": spec.qkv_size * compute.itemsize,
        "attn_out": spec.attn_out_size * compute.itemsize,
        "mid": spec.hidden_size * dtype.itemsize,
        "preact": spec.preact_size * (1 if parsed.preact == "fp8" else compute.itemsize),
        "preact_scales": spec.preact_scales * torch.float32.itemsize,
        "attn_branch": spec.hidden_size * branch.itemsize,
        "ffn_branch": spec.hidden_size * branch.itemsize,
        "lse": spec.num_attention_heads * accumulate_dtype(compute).itemsize,
        "attn_norm_stats": stats,
        "ffn_norm_stats": stats,
        "attn_post_norm_stats": post_stats,
        "ffn_post_norm_stats": post_stats,
    }
    result = {name: tokens * size for name, size in per_token.items() if name in kept}
    dropouts = spec.attention_dropout, spec.residual_dropout, spec.activation_dropout
    if training and wanted and (any(dropouts) or drops(own)):
        result["seed"] = 8
    return result, offloaded(parsed, kept)
