"""Seconds of one block's training step, by arithmetic: what each policy costs on a device.

A part is one kernel. It takes as long as the slower of its products, at the rate a good GEMM
reaches, and its bytes, at the memory's bandwidth, every operand and result once. So the sum is what
a step takes at best. Launches, waves, caches, and kernels slower than a good GEMM (attention is)
are not in it.

| counted by | what |
|---|---|
| `flops.py` | GEMMs and attention: FLOPs, and elements read and written |
| `memory.py` | bytes kept, by tensor |
| `_passes` here | bytes of the memory-bound kernels between them |

Attention is counted by the scores that are visible, half of them where it is causal: what tiles on
the diagonal compute beyond that is not in it. Copies to the host run beside the kernels: their
seconds are of the link, and no part of a pass. Dropout costs nothing here, and what is kept in
eight bits is read and written as if it had sixteen.

On a `ProfiledDevice` each part takes what arithmetic says times what was measured of its like.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .devices import Device
from .devices import device as device_named
from .flops import block_matmuls
from .keep import block_needs, block_reads
from .lora import Adapters, AdaptersLike, parse_adapters
from .memory import check_dtype, check_sizes, host_bytes, kept_bytes, wanted_set
from .policy import ACTIVATION_NAMES, Policy, PolicyLike
from .profiled import ProfiledDevice
from .spec import BlockSpec, check_spec

#: Kept tensors that share the fate of an activation of another name.
BESIDE = {
    "lse": "attn_out",
    "attn_branch": "mid",
    "ffn_branch": "preact",
    "preact_scales": "preact",
}


@dataclass(frozen=True)
class Part:
    """A kernel of a training step.

    Attributes:
        phase: `"forward"`, `"backward"`, or `"recompute"`.
        name: a product's (see `flops.Matmul`), or of the pass over memory.
        flops: of its products; 0 for a pass over memory.
        bytes: that it reads and writes.
        seconds: that it takes.
    """

    phase: str
    name: str
    flops: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class BlockCosts:
    """What one block's training step costs.

    Attributes:
        parts: its kernels.
        kept: bytes kept on the device, by tensor.
        shipped: bytes that go to the host in forward and come back in backward, by tensor.
        device: where.
    """

    parts: tuple[Part, ...]
    kept: dict[str, int]
    shipped: dict[str, int]
    device: Device

    def seconds(self, phase: str) -> float:
        """Seconds of the parts of a phase."""
        return sum(part.seconds for part in self.parts if part.phase == phase)

    @property
    def forward(self) -> float:
        """Seconds of the forward pass."""
        return self.seconds("forward")

    @property
    def backward(self) -> float:
        """Seconds of the gradients alone."""
        return self.seconds("backward")

    @property
    def recompute(self) -> float:
        """Seconds of what the backward pass rebuilds."""
        return self.seconds("recompute")

    @property
    def step(self) -> float:
        """Seconds of a training step, copies hidden behind it."""
        return self.forward + self.recompute + self.backward

    @property
    def kept_bytes(self) -> int:
        """Bytes kept on the device."""
        return sum(self.kept.values())

    @property
    def host_bytes(self) -> int:
        """Bytes kept on the host."""
        return sum(self.shipped.values())

    @property
    def link(self) -> float:
        """Seconds of the link, in each direction."""
        return self.host_bytes / self.device.link_bandwidth


@dataclass(frozen=True)
class ActivationCost:
    """What each action on one activation costs.

    Attributes:
        bytes: that it takes on the device or the host.
        keep: seconds of these through the device's memory, written and read again: most of it
            hides behind the arithmetic of the kernels that do it.
        recompute: seconds of rebuilding it, everything else being kept. Of `x`: of the whole block
            before it; less where that one keeps more than its own `x`.
        offload: seconds of the link, in each direction.
    """

    bytes: int
    keep: float
    recompute: float
    offload: float


def visible_scores(spec: BlockSpec, tokens: int) -> int:
    """How many keys the queries of one sequence see, in all."""
    window = min(spec.sliding_window or tokens, tokens)
    behind = window * tokens - window * (window - 1) // 2  # itself included
    return behind if spec.causal else 2 * behind - tokens


def _passes(
    spec: BlockSpec, policy: Policy, wanted: frozenset[str]
) -> Iterator[tuple[str, str, int]]:
    """Phase, name, and elements a token of every kernel that multiplies no matrices."""
    h, out, qk = spec.hidden_size, spec.attn_out_size, spec.q_size + spec.kv_size
    rotates = spec.rope is not None or spec.qk_norm is not None
    rebuilt = block_reads(spec, policy, wanted).rebuilt
    attn, ffn = block_needs(spec, wanted)
    yield from (("forward", name, 2 * h) for name in ("attn_norm", "ffn_norm") if spec.pre_norm)
    if rotates:
        yield "forward", "qk_rope", 2 * qk
    if spec.post_norm:
        width = (2 if spec.norm_after_residual else 3) * h  # with the residual
        yield from (("forward", name, width) for name in ("attn_post_norm", "ffn_post_norm"))
        if ffn.anything and "mid" not in rebuilt and not spec.parallel_residual:
            yield "recompute", "attn_post_norm", width
    for half, needs, first in (("ffn", ffn, "preact"), ("attn", attn, "qkv")):
        if spec.pre_norm and first in rebuilt:
            yield "recompute", f"{half}_norm", 2 * h
        if spec.post_norm and needs.anything:
            yield "backward", f"{half}_post_norm", 3 * h
        again = needs.projections and not (half == "ffn" and "preact" in rebuilt)
        if spec.pre_norm and (needs.input or needs.norm):  # with the residual, and normed again
            yield "backward", f"{half}_norm", (5 if again else 4) * h
        elif spec.pre_norm and again:
            yield "backward", f"{half}_norm", 2 * h
        elif needs.input:
            yield "backward", f"{half}_residual", 3 * h
    if ffn.out and not ffn.inner and "preact" not in rebuilt:
        yield "backward", "activation", spec.preact_size + spec.intermediate_size
    if attn.inner:
        yield "backward", "qk_rope_again", 2 * out + (2 * qk if rotates else 0)  # and delta
        yield "backward", "qkv_gather", 2 * spec.qkv_size
        if rotates:
            yield "backward", "qk_rope", (3 if spec.qk_norm else 2) * qk


def block_costs(
    spec: BlockSpec,
    policy: PolicyLike,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.bfloat16,
    device: Device | str,
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | Adapters | None = None,
) -> BlockCosts:
    """What one block's training step costs on a device, by arithmetic.

    Args:
        spec: the block.
        policy: what it keeps. Rebuilding an `x` is the business of the block before it, and not
            counted.
        batch_size: sequences.
        seq_len: tokens a sequence.
        dtype: of everything; one whose rate the device has.
        device: it, or its name.
        requires_grad: names of what wants a gradient (see `kept_bytes`).
        adapters: projection -> its `LoRA`, or several.

    Raises:
        TypeError: for a spec, a dtype or names that are none.
        ValueError: for sizes, policies, names, devices and dtypes that do not exist or fit.
    """
    check_spec(spec)
    check_sizes(batch_size, seq_len)
    check_dtype("dtype", dtype)
    where = device if isinstance(device, Device) else device_named(device)
    where.check_dtype(dtype)
    parsed = Policy.parse(policy)
    sizes: dict[str, Any] = {
        "batch_size": batch_size, "seq_len": seq_len, "dtype": dtype,
        "requires_grad": requires_grad, "adapters": adapters,
    }  # fmt: skip
    factors = where.factors(spec) if isinstance(where, ProfiledDevice) else None
    own = parse_adapters(spec, adapters)
    wanted = wanted_set(spec, requires_grad, own)
    tokens = batch_size * seq_len
    visible = batch_size * visible_scores(spec, seq_len)
    scores, weighted = 2 * spec.q_size * visible, 2 * spec.attn_out_size * visible

    def part(phase: str, name: str, flops: int, elements: int) -> Part:
        traffic = elements * dtype.itemsize
        seconds = max(flops / where.matmul_rate, traffic / where.memory_bandwidth)
        if factors is not None:
            seconds *= factors.of(phase, name, parsed)
        return Part(phase, name, flops, traffic, seconds)

    parts = [
        part(matmul.phase, matmul.name, matmul.flops, matmul.elements)
        for matmul in block_matmuls(spec, parsed, wanted, tokens, scores, weighted, own)
    ]
    parts += [
        part(phase, name, 0, tokens * width) for phase, name, width in _passes(spec, parsed, wanted)
    ]
    kept, shipped = kept_bytes(spec, parsed, **sizes), host_bytes(spec, parsed, **sizes)
    return BlockCosts(tuple(parts), kept, shipped, where)


def activation_costs(
    spec: BlockSpec,
    *,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype = torch.bfloat16,
    device: Device | str,
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | Adapters | None = None,
) -> dict[str, ActivationCost]:
    """Each of the five activations: what keeping, rebuilding and offloading it costs.

    Arguments and errors as `block_costs`. An activation that no wanted gradient reads costs
    nothing.
    """
    where = device if isinstance(device, Device) else device_named(device)

    def costs(policy: PolicyLike) -> BlockCosts:
        return block_costs(
            spec, policy, batch_size=batch_size, seq_len=seq_len, dtype=dtype, device=where,
            requires_grad=requires_grad, adapters=adapters,
        )  # fmt: skip

    kept = costs("keep")
    found = {}
    for name in ACTIVATION_NAMES:
        size = costs({name: "offload"}).host_bytes
        again = costs({name: "recompute"}).recompute - kept.recompute
        if name == "x":
            again = kept.forward if size else 0.0
        found[name] = ActivationCost(
            size, 2 * size / where.memory_bandwidth, again, size / where.link_bandwidth
        )
    return found
