"""The autograd functions: a run of blocks, and each half alone, over the same passes.

A *job* is what one call does besides its tensors: it has a forward that gives the output and what
is kept, and a backward that gives the gradients from that. `RecomputeFunction` is the thin layer
between a job and autograd.

Weights go through `save_for_backward` themselves, never as a copy or a cast: so a sharding engine
can free and regather them, and autograd notices if one is changed before the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import AttentionHalf
from .call import Call, Inputs, WeightGrads, cast_weights
from .ffn import FFNHalf
from .inputs import check_weights, prepare
from .keep import INPUT, attention_reads, ffn_reads, half_needs
from .policy import Policy, PolicyLike
from .replay import effective_policies
from .run import Gradients, Kept, Layer, wanted_names
from .spec import BlockSpec, check_spec


class Job(Protocol):
    """What one call does, besides its tensors."""

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        """The output `[tokens, h]`, and what is kept."""

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        """The gradient of x `[tokens, h]` and those of the weights, None where not wanted."""


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Casts are made by hand: autocast is off inside, where it was on at all."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return nullcontext()


class RecomputeFunction(torch.autograd.Function):
    """Run a job under autograd."""

    @staticmethod
    def forward(ctx: Any, job: Job, inputs: Inputs, x: Tensor, *weights: Tensor) -> Tensor:
        """`x` is `[tokens, h]`, and so is the result."""
        with no_autocast(x):
            z, kept = job.forward(x, weights, inputs)
        ctx.job, ctx.names = job, list(kept)
        ctx.save_for_backward(*inputs, *weights, *kept.values())
        return z

    @staticmethod
    def backward(ctx: Any, dz: Tensor) -> tuple[Any, ...]:
        """Rebuild what was dropped, and differentiate by hand."""
        if torch.is_grad_enabled():
            raise ValueError(
                "create_graph is True, expected False: a backfuse block differentiates by hand "
                "and cannot be differentiated twice. For a second derivative run the layer as "
                "plain PyTorch under torch.utils.checkpoint(..., use_reentrant=False)."
            )
        job, count = ctx.job, len(Inputs._fields)
        saved = ctx.saved_tensors
        split = len(saved) - len(ctx.names)
        kept = dict(zip(ctx.names, saved[split:], strict=True))
        with no_autocast(dz):
            dx, grads = job.backward(
                dz.contiguous(), saved[count:split], Inputs(*saved[:count]), kept
            )
        return None, None, dx, *grads


def run_job(job: Job, inputs: Inputs, hidden_states: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Run a job on `[batch, seq_len, h]`.

    The reshaping stands outside the autograd function: its result is then no view made inside
    it, and may be changed in place as any layer's.
    """
    z = RecomputeFunction.apply(job, inputs, hidden_states.flatten(0, 1), *weights)
    return z.view(hidden_states.shape)


@dataclass(frozen=True)
class HalfJob:
    """One half alone.

    Attributes:
        call: the call.
        layer: policy, parameter names and wanted names.
        half: `"attn"` or `"ffn"`.
    """

    call: Call
    layer: Layer
    half: str

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        call, layer = self.call, self.layer
        named = cast_weights(dict(zip(layer.names, weights, strict=True)), call.compute_dtype)
        needs = half_needs(call.spec, self.half, layer.wanted, INPUT in layer.wanted)
        if self.half == "ffn":
            keep = ffn_reads(call.spec, layer.policy, needs).kept
            z, kept = FFNHalf(call, named, inputs, {}).forward(x, keep)
            return z, kept | ({"mid": x} if "mid" in keep else {})
        keep = attention_reads(call.spec, layer.policy, needs, read_mid=False).kept
        attn = AttentionHalf(call, named, inputs, x, {}, keep)
        mid = attn.mid()
        return mid, {name: attn.values[name] for name in sorted(keep)}

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        call, layer = self.call, self.layer
        named = cast_weights(dict(zip(layer.names, weights, strict=True)), call.compute_dtype)
        needs = half_needs(call.spec, self.half, layer.wanted, INPUT in layer.wanted)
        grads = WeightGrads(call.ops, layer.wanted)
        if self.half == "ffn":
            dx = FFNHalf(call, named, inputs, kept).backward(kept.get("mid"), dz, needs, grads)
        else:
            dx = AttentionHalf(call, named, inputs, kept.get("x"), kept).backward(dz, needs, grads)
        return dx, grads.take(layer.names, weights)


def _half(
    half: str,
    shapes: Mapping[str, tuple[int, ...]],
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike,
    **options: Any,
) -> Tensor:
    parsed = Policy.parse(policy)
    parsed.check_available()
    call, inputs = prepare(
        spec, hidden_states, attention=half == "attn", lossy=parsed.lossy, **options
    )
    weights = check_weights(weights, shapes, hidden_states)
    [parsed] = effective_policies([parsed]) or [Policy()]
    layer = Layer(parsed, tuple(weights), wanted_names(hidden_states, weights))
    job = HalfJob(call, layer, half)
    return run_job(job, inputs, hidden_states, list(weights.values()))


def ffn(
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike = "selective",
    *,
    training: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
    ffn_strategy: str = "auto",
) -> Tensor:
    """The FFN half alone: norm, FFN and residual.

    Args:
        hidden_states: `[batch, seq_len, hidden_size]`.
        weights: the tensors `spec.ffn_parameters()` names, by those names; more are ignored, so
            `dict(block.named_parameters())` will do. Gradients flow to them.
        spec: the block it is half of.
        policy: of its activations only `preact` matters here.
        training: whether dropout is active.
        chunk_size: tokens a chunk; None: the device's default.
        impl: which operations run: `"triton"` (kernels), `"reference"` (PyTorch), or `"auto"`: the
            kernels for bf16 and fp16 on a GPU, else the reference; `"sdpa"`, `"fa3"`, `"fa4"`: the
            kernels with somebody else's attention (see `kernels/cores/choose.py`).
        ffn_strategy: how the kernels rebuild a dropped `preact`: `"split"` (into scratch),
            `"fused"` (inside the backward kernel), or `"auto"`: as measured on this device by
            `backfuse tune`, else split.

    Returns:
        `[batch, seq_len, hidden_size]`, in hidden_states' dtype.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, or policy.
    """
    return _half(
        "ffn",
        check_spec(spec).ffn_parameters(),
        hidden_states,
        weights,
        spec,
        policy,
        training=training,
        chunk_size=chunk_size,
        impl=impl,
        ffn_strategy=ffn_strategy,
    )


def attention(
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike = "selective",
    *,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    training: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
) -> Tensor:
    """The attention half alone: norm, attention, output projection and residual.

    Args:
        hidden_states: `[batch, seq_len, hidden_size]`.
        weights: the tensors `spec.attention_parameters()` names, by those names; more are ignored.
        spec: the block it is half of.
        policy: of its activations `qkv` and `attn_out` matter here.
        position_embeddings: see `TransformerBlock.forward`, and so the others.
        attention_mask: see position_embeddings.
        cu_seqlens: see position_embeddings.
        max_seqlen: see position_embeddings.
        training: whether dropout is active.
        chunk_size: tokens a chunk; None: the device's default.
        impl: which operations run: `"triton"` (kernels), `"reference"` (PyTorch), or `"auto"`: the
            kernels for bf16 and fp16 on a GPU, else the reference.

    Returns:
        `[batch, seq_len, hidden_size]`, in hidden_states' dtype.

    Raises:
        TypeError: for a wrong dtype.
        ValueError: for a wrong shape, device, or policy.
    """
    return _half(
        "attn",
        check_spec(spec).attention_parameters(),
        hidden_states,
        weights,
        spec,
        policy,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        training=training,
        chunk_size=chunk_size,
        impl=impl,
    )
