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
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .attention import AttentionHalf
from .call import Call, Inputs, cast_weights
from .ffn import FFNHalf
from .inputs import check_weights, prepare
from .keep import INPUT, Needs, half_needs, half_reads, offloaded
from .lora import (
    Adapters,
    AdaptersLike,
    adapter_parameters,
    all_parameters,
    parse_adapters,
    without_dropout,
)
from .offload import line
from .policy import KEEP, Policy, PolicyLike
from .remember import remembered
from .replay import effective_policies, operators_matter
from .run import Gradients, Kept, Layer, RunJob, wanted_names
from .spec import BlockSpec, check_spec
from .weight_grads import WeightGrads


class Job(Protocol):
    """What one call does, besides its tensors."""

    @property
    def call(self) -> Call:
        """The call."""

    @property
    def label(self) -> str:
        """Whose it is, for messages."""

    @property
    def offloads(self) -> bool:
        """Whether anything may go elsewhere than to the device's memory."""

    def away(self, kept: Kept) -> list[str]:
        """Names of those kept tensors that do."""

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


def refuse_second_derivative() -> None:
    """Raise a ValueError in a backward pass that is to be differentiated itself."""
    if torch.is_grad_enabled():
        raise ValueError(
            "create_graph is True, expected False: a backfuse block differentiates by hand "
            "and cannot be differentiated twice. For a second derivative run the layer as "
            "plain PyTorch under torch.utils.checkpoint(..., use_reentrant=False)."
        )


def _refuse_offload_in_capture() -> None:
    """Raise a ValueError while a CUDA graph is captured, whose replays know no other memory."""
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "a policy offloads while a CUDA graph is captured, expected one that keeps or "
            "recomputes: each step puts what it offloads elsewhere, and a graph replays the "
            "addresses of one"
        )


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
        if job.offloads:
            _refuse_offload_in_capture()
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
        refuse_second_derivative()
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
    if operators_matter() and isinstance(job, RunJob | HalfJob):
        from .ops import call_op  # which knows the jobs of this file

        return call_op(job, inputs, x, weights).view(hidden_states.shape)
    z = RecomputeFunction.apply(job, inputs, x, *weights)
    return torch.ops.aten._unsafe_view(z, hidden_states.shape)


def block(
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: Policy,
    *,
    adapters: Adapters = (),
    offload_dir: Path | None = None,
    **options: Any,
) -> Tensor:
    """One whole block on anybody's weights: what a `TransformerBlock` runs on its own.

    Args:
        hidden_states: `[batch, seq_len, hidden_size]`.
        weights: the tensors `spec.parameters()` and `adapter_parameters` name, by those names.
        spec: the block.
        policy: what it keeps; it has to keep `x`.
        adapters: of its projections, with the dropout that is active.
        offload_dir: folder of the files that offloaded tensors go to; None: host memory.
        options: see `TransformerBlock` and its `forward`; `training`: whether dropout is active.

    Returns:
        `[batch, seq_len, hidden_size]`, in hidden_states' dtype.

    Raises:
        TypeError: for a wrong dtype or kind.
        ValueError: for a wrong shape, value or device.
    """
    call, inputs = prepare(
        spec, hidden_states, lossy=policy.lossy, offload_dir=offload_dir, adapters=[adapters],
        **options,
    )  # fmt: skip
    weights = check_weights(weights, all_parameters(spec, adapters), hidden_states, call)
    [policy] = effective_policies([policy]) or [KEEP]
    layer = Layer(policy, tuple(weights), wanted_names(hidden_states, weights), adapters)
    return run_job(RunJob(call, (layer,), 0), inputs, hidden_states, list(weights.values()))


@dataclass(frozen=True, eq=False)
class HalfJob:
    """One half alone.

    Attributes:
        call: the call.
        half: `"attn"` or `"ffn"`.
        names: of the half's parameters, in the order of its weights.
        wanted: the names that want a gradient, `INPUT` for the half's input.
        policy: what it keeps, and where.
        adapters: of the half's projections.
    """

    call: Call
    half: str
    names: tuple[str, ...]
    wanted: frozenset[str]
    policy: Policy
    adapters: Adapters = ()

    @cached_property
    def needs(self) -> Needs:
        """What the backward pass has to give."""
        return half_needs(self.call.spec, self.half, self.wanted, INPUT in self.wanted)

    @cached_property
    def keep(self) -> frozenset[str]:
        """Names of what the forward pass keeps."""
        return half_reads(self.call.spec, self.half, self.policy, self.needs).kept

    @property
    def label(self) -> str:
        """For messages."""
        return "the attention half" if self.half == "attn" else "the FFN half"

    @property
    def offloads(self) -> bool:
        """Whether anything may go elsewhere than to the device's memory."""
        return self.policy.offloads

    def away(self, kept: Kept) -> list[str]:
        """Names of those kept tensors that go elsewhere."""
        return sorted(offloaded(self.policy, self.keep))

    def _cast(self, weights: Sequence[Tensor]) -> dict[str, Tensor]:
        named = dict(zip(self.names, weights, strict=True))
        return cast_weights(self.call.spec, named, self.call.compute_dtype)

    def forward(self, x: Tensor, weights: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, Kept]:
        named, keep = self._cast(weights), self.keep
        if self.half == "ffn":
            z, kept = FFNHalf(self.call, named, inputs, {}, self.adapters).forward(x, x, keep)
            if "mid" in keep:
                kept["mid"] = x
            return z, kept
        attn = AttentionHalf(self.call, named, inputs, x, {}, keep, self.adapters)
        mid = attn.mid()
        return mid, {name: attn.values[name] for name in sorted(keep)}

    def backward(
        self, dz: Tensor, weights: Sequence[Tensor], inputs: Inputs, kept: Kept
    ) -> Gradients:
        call, named, needs = self.call, self._cast(weights), self.needs
        grads = WeightGrads(call, self.names, weights, self.wanted)
        if self.half == "ffn":
            ffn = FFNHalf(call, named, inputs, kept, self.adapters)
            dx = ffn.backward(kept.get("mid"), dz, needs, grads)
        else:
            attn = AttentionHalf(call, named, inputs, kept.get("x"), kept, adapters=self.adapters)
            dx = attn.backward(dz, needs, grads)
        return dx, grads.take()


#: The same job for the same question: what it reads is found once.
_half_job = remembered(HalfJob)


def _half(
    half: str,
    shapes: Mapping[str, tuple[int, ...]],
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike,
    adapters: AdaptersLike | None,
    **options: Any,
) -> Tensor:
    parsed = Policy.parse(policy)
    parsed.check_available()
    own: Adapters = ()
    if adapters:
        found = parse_adapters(spec, adapters)
        own = tuple(one for one in found if f"{one[0]}.weight" in shapes)
        shapes = {**shapes, **adapter_parameters(spec, own)}
        own = own if options["training"] else without_dropout(own)
    call, inputs = prepare(
        spec, hidden_states, attention=half == "attn", lossy=parsed.lossy, adapters=[own],
        **options,
    )  # fmt: skip
    weights = check_weights(weights, shapes, hidden_states, call)
    kind = "attention" if half == "attn" else "ffn"
    [parsed] = effective_policies([parsed], kind=kind) or [KEEP]
    wanted = wanted_names(hidden_states, weights)
    job = _half_job(call, half, tuple(weights), wanted, parsed, own)
    return run_job(job, inputs, hidden_states, list(weights.values()))


def ffn(
    hidden_states: Tensor,
    weights: Mapping[str, Tensor],
    spec: BlockSpec,
    policy: PolicyLike = "selective",
    *,
    adapters: AdaptersLike | None = None,
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
        adapters: projection -> its `LoRA`, or several; their tensors stand among the weights, by
            the names of `adapter_parameters`. Those of the other half are ignored.
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
        adapters,
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
    adapters: AdaptersLike | None = None,
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
        adapters: as in `ffn`.
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
        adapters,
        position_embeddings=position_embeddings,
        attention_mask=attention_mask,
        cu_seqlens=cu_seqlens,
        max_seqlen=max_seqlen,
        training=training,
        chunk_size=chunk_size,
        impl=impl,
    )
