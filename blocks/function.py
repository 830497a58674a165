"""The autograd functions: a run of blocks, and each half alone, over the same passes.

A *job* is what one call does besides its tensors: it has a forward that gives the output and what
is kept, and a backward that gives the gradients from that. `RecomputeFunction` is the thin layer
between a job and autograd.

What is kept elsewhere (see `offload.py`) goes when what autograd saves does, right after the
backward pass or with a retained graph: a token that is saved with the rest says when.

Weights go through `save_for_backward` themselves, never as a copy or a cast: so a sharding engine
can free and regather them, and autograd notices if one is changed before the backward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import AttentionHalf
from .call import Call, Inputs, WeightGrads, cast_weights
from .ffn import FFNHalf
from .inputs import check_weights, prepare
from .keep import INPUT, Needs, attention_reads, ffn_reads, half_needs, offloaded
from .offload import line
from .policy import KEEP, Policy, PolicyLike
from .replay import effective_policies
from .run import Gradients, Kept, wanted_names
from .spec import BlockSpec, check_spec


class Job(Protocol):
    """What one call does, besides its tensors."""

    @property
    def call(self) -> Call:
        """The call."""

    @property
    def label(self) -> str:
        """Whose it is, for messages."""

    def away(self, kept: Kept) -> list[str]:
        """Names of those kept tensors that go elsewhere than to the device's memory."""

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        """The output `[tokens, h]`, and what is kept."""

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        """The gradient of x `[tokens, h]` and those of the weights, None where not wanted."""


_AS_IT_IS: AbstractContextManager[object] = nullcontext()


def no_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Casts are made by hand: autocast is off inside, where it was on at all."""
    if torch.is_autocast_enabled(x.device.type):
        return torch.autocast(x.device.type, enabled=False)
    return _AS_IT_IS


class _Owner:
    """Owns a parcel in place of a saved tensor."""


def _somebody_saves() -> bool:
    """Whether somebody's hooks are given what autograd saves."""
    return bool(torch._C._autograd._top_saved_tensors_default_hooks(False))


class RecomputeFunction(torch.autograd.Function):
    """Run a job under autograd."""

    @staticmethod
    def forward(ctx: Any, job: Job, inputs: Inputs, x: Tensor, *weights: Tensor) -> Tensor:
        """`x` is `[tokens, h]`, and so is the result."""
        with no_autocast(x):
            z, kept = job.forward(x, weights, inputs)
        ctx.parcel = token = None
        if away := {n: kept.pop(n) for n in job.away(kept) if kept[n].is_contiguous()}:
            ctx.line = line(x.device, job.call.offload_dir)
            token = torch.empty(0)
            if _somebody_saves():  # and may let go of the token at once
                ctx.owner = _Owner()
            ctx.parcel = ctx.line.put(job.label, away, getattr(ctx, "owner", token))
        ctx.job, ctx.names = job, list(kept)
        ctx.save_for_backward(*inputs, *weights, *kept.values(), token)
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
        split = len(saved) - 1 - len(ctx.names)
        kept = dict(zip(ctx.names, saved[split:-1], strict=True))
        if ctx.parcel is not None:
            kept |= ctx.line.get(ctx.parcel)
        with no_autocast(dz):
            dx, grads = job.backward(
                dz.contiguous(), saved[count:split], Inputs(*saved[:count]), kept
            )
        return None, None, dx, *grads


def run_job(job: Job, inputs: Inputs, hidden_states: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """Run a job on `[batch, seq_len, h]`.

    The reshaping stands outside the autograd function, and is none that autograd calls a view:
    the result may be changed in place as any layer's, also where a sharding engine hangs hooks on
    it. Nobody else has the storage.
    """
    x = hidden_states.flatten(0, 1)
    if x.stride(-1) != 1:  # kernels read whole rows
        x = x.contiguous()
    z = RecomputeFunction.apply(job, inputs, x, *weights)
    return torch.ops.aten._unsafe_view(z, hidden_states.shape)


@dataclass(frozen=True, eq=False)
class HalfJob:
    """One half alone.

    Attributes:
        call: the call.
        half: `"attn"` or `"ffn"`.
        names: of the half's parameters, in the order of its weights.
        wanted: the names that want a gradient, `INPUT` for the half's input.
        needs: what the backward pass has to give.
        keep: names of what the forward pass keeps.
        policy: what it keeps, and where.
    """

    call: Call
    half: str
    names: tuple[str, ...]
    wanted: frozenset[str]
    needs: Needs
    keep: frozenset[str]
    policy: Policy

    @property
    def label(self) -> str:
        """For messages."""
        return "the attention half" if self.half == "attn" else "the FFN half"

    def away(self, kept: Kept) -> list[str]:
        """Names of those kept tensors that go elsewhere."""
        return sorted(offloaded(self.policy, self.keep))

    def _cast(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        return cast_weights(dict(zip(self.names, weights, strict=True)), self.call.compute_dtype)

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        named, keep = self._cast(weights), self.keep
        if self.half == "ffn":
            z, kept = FFNHalf(self.call, named, inputs, {}).forward(x, keep)
            if "mid" in keep:
                kept["mid"] = x
            return z, kept
        attn = AttentionHalf(self.call, named, inputs, x, {}, keep)
        mid = attn.mid()
        return mid, {name: attn.values[name] for name in sorted(keep)}

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        call, named, needs = self.call, self._cast(weights), self.needs
        grads = WeightGrads(call.ops, self.wanted)
        if self.half == "ffn":
            dx = FFNHalf(call, named, inputs, kept).backward(kept.get("mid"), dz, needs, grads)
        else:
            dx = AttentionHalf(call, named, inputs, kept.get("x"), kept).backward(dz, needs, grads)
        return dx, grads.take(self.names, weights)


@lru_cache(maxsize=4096)
def half_job(
    call: Call, half: str, names: tuple[str, ...], wanted: frozenset[str], policy: Policy
) -> HalfJob:
    """The job of one half, the same one for the same question."""
    needs = half_needs(call.spec, half, wanted, INPUT in wanted)
    if half == "ffn":
        reads = ffn_reads(call.spec, policy, needs)
    else:
        reads = attention_reads(call.spec, policy, needs, read_mid=False)
    return HalfJob(call, half, names, wanted, needs, reads.kept, policy)


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
    weights = check_weights(weights, shapes, hidden_states, call)
    [parsed] = effective_policies([parsed]) or [KEEP]
    wanted = wanted_names(hidden_states, weights)
    job = half_job(call, half, tuple(weights), wanted, parsed)
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
