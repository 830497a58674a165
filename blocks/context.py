"""Context parallelism: a block whose tokens are split over ranks, and whose attention is by heads.

    every rank, some tokens:  q, k, v -> all-to-all -> all tokens of some heads -> attention
                              attention's output -> all-to-all -> some tokens of all heads

All else of a block works token by token, on the rank's own. So this is an attention core that has
another one inside: it takes and gives the rank's tokens, and a block need not know.

| | forward | backward | and where `attn_out` is rebuilt |
|---|---|---|---|
| all-to-alls | 2 (q, k, v; out) | 2 (q, k, v, dout with delta or out; dq, dk, dv) | 2 more |

Kept is what one process keeps of these tokens: `attn_out` after its way back; LSE, whose backward
is by heads, where it lies. Rebuilding `qkv` sends nothing that backward does not send anyway.

Source: Jacobs et al. 2023 (DeepSpeed-Ulysses).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from backfuse.kernels.cores.choose import Core
from backfuse.kernels.dispatch import Operations
from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.explicit_attention import AttentionMask
from backfuse.kernels.reference.norm import accumulate_dtype

from .spec import BlockSpec

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Context:
    """The ranks that share the tokens of every sequence: each has a part, the first the first.

    Attributes:
        group: the name of their process group.
        rank: this one among them.
        size: how many.
    """

    group: str
    rank: int
    size: int

    @staticmethod
    def of(mesh: DeviceMesh) -> Context:
        """The ranks of a mesh of one dimension."""
        return Context(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size())

    def check(self, spec: BlockSpec) -> None:
        """Raise a ValueError for a block whose attention cannot be split, naming the field."""
        for name in ("attention_dropout", "residual_dropout", "activation_dropout"):
            if getattr(spec, name):
                raise ValueError(
                    f"{name} is {getattr(spec, name)}, expected 0.0 of a block whose tokens are "
                    "split over ranks"
                )
        heads, kv_heads, size = spec.num_attention_heads, spec.num_key_value_heads, self.size
        if heads % size:
            raise ValueError(
                f"num_attention_heads is {heads}, expected a multiple of {size}, the ranks that "
                "tokens are split over"
            )
        if kv_heads % size and size % kv_heads:
            raise ValueError(
                f"num_key_value_heads is {kv_heads}, expected a multiple or a divisor of {size}, "
                "the ranks that tokens are split over"
            )

    def whole(self, x: Tensor) -> Tensor:
        """Something shaped as whole sequences `[batch, seq_len, width]`, without their memory."""
        return x.new_empty(()).expand(x.shape[0], x.shape[1] * self.size, x.shape[2])

    def exchange(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """One all-to-all of several tensors `[ranks, ...]` of one dtype: the r-th goes to rank r.

        Returns:
            Tensors shaped as those: the r-th is from rank r.
        """
        widths = [part[0].numel() for part in parts]
        send = parts[0].new_empty(self.size, sum(widths))
        for room, part in zip(send.split(widths, 1), parts, strict=True):
            room.view(part.shape).copy_(part)
        if send.is_cpu:  # where it costs nothing to ask; a GPU would wait
            self._check_sizes(*parts[0].shape[1:3])
        received = torch.empty_like(send)
        by_name: Any = dist.distributed_c10d
        dist.all_to_all_single(received, send, group=by_name._resolve_process_group(self.group))
        rooms = zip(received.split(widths, 1), parts, strict=True)
        return [room.view(part.shape) for room, part in rooms]

    def _check_sizes(self, batch_size: int, length: int) -> None:
        """Raise a ValueError, on every rank, unless they all have parts of one size."""
        by_name: Any = dist.distributed_c10d
        own = torch.tensor([batch_size, length])
        sizes = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(sizes, own, group=by_name._resolve_process_group(self.group))
        found = [f"{batch} x {tokens}" for batch, tokens in (size.tolist() for size in sizes)]
        if len(set(found)) > 1:
            raise ValueError(
                f"hidden_states is {', '.join(found)} on the ranks that share its sequences, "
                "expected as many sequences on each, and parts of one length"
            )

    def to_heads(self, *parts: Tensor) -> list[Tensor]:
        """From `[batch, own tokens, heads, d]` each to `[batch, all tokens, own heads, d]`."""
        by_rank = [part.unflatten(2, (self.size, -1)).permute(2, 0, 1, 3, 4) for part in parts]
        return [part.transpose(0, 1).flatten(1, 2) for part in self.exchange(by_rank)]

    def to_tokens(self, *parts: Tensor) -> list[Tensor]:
        """From `[batch, all tokens, own heads, d]` each to `[batch, own tokens, heads, d]`."""
        by_rank = [part.unflatten(1, (self.size, -1)).transpose(0, 1) for part in parts]
        return [part.permute(1, 2, 0, 3, 4).flatten(2, 3) for part in self.exchange(by_rank)]

    def own(self, x: Tensor, dim: int) -> Tensor:
        """This rank's part of something that has one entry for each head."""
        return x.chunk(self.size, dim)[self.rank]


@dataclass(frozen=True)
class AllToAll:
    """An attention core on some tokens of all heads, by another on all tokens of some heads.

    Attributes:
        core: the other.
        context: the ranks.
    """

    core: Operations | Core
    context: Context

    def _spread(self, x: Tensor) -> Tensor:
        """k or v with a head for each rank at least."""
        return x.repeat_interleave(max(self.context.size // x.shape[2], 1), 2)

    def _own(self, x: Tensor | None, dim: int) -> Tensor | None:
        """Of sinks or a bias, what is for this rank's heads."""
        return x if x is None or x.shape[dim] == 1 else self.context.own(x, dim)

    def needs_delta(self, request: AttentionRequest) -> bool:
        """As the other. See `reference.attention.needs_delta`."""
        needs: bool = self.core.needs_delta(request)
        return needs

    def attention_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: AttentionMask,
        *,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seed: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Attention of q over k and v. As `reference.attention.attention_forward`, but

        Args:
            q: this rank's tokens, and so k and v.
            k: see q.
            v: see q.
            mask: of whole sequences, and so bias and cu_seqlens.
            sinks: of all heads.
            bias: see mask.
            cu_seqlens: see mask.
            seed: None: nothing drops out.

        Returns:
            out, of this rank's tokens; lse, of this rank's heads.
        """
        q, k, v = self.context.to_heads(q, self._spread(k), self._spread(v))
        out, lse = self.core.attention_forward(
            q, k, v, mask, sinks=self._own(sinks, 0), bias=self._own(bias, 1), cu_seqlens=cu_seqlens
        )
        return self.context.to_tokens(out)[0], lse

    def attention_backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        mask: AttentionMask,
        *,
        delta: Tensor | None = None,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seed: Tensor | None = None,
        need_dsinks: bool = True,
        dq: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Gradients of q, k and v, and this rank's share of the sinks'.

        As `reference.attention.attention_backward`; arguments as those of the forward pass.
        """
        if delta is None:
            last = out
        else:  # goes along as bits, as many channels of the dtype as it takes
            last = delta.transpose(1, 2).unsqueeze(3).contiguous().view(q.dtype)
        kv_heads = k.shape[2]
        q, k, v, dout, last = self.context.to_heads(
            q, self._spread(k), self._spread(v), dout, last
        )
        if delta is not None:
            delta = last.contiguous().view(delta.dtype).squeeze(3).transpose(1, 2).contiguous()
        *grads, dsinks = self.core.attention_backward(
            dout, q, k, v, last, lse, mask, delta=delta, sinks=self._own(sinks, 0),
            bias=self._own(bias, 1), cu_seqlens=cu_seqlens, need_dsinks=need_dsinks, dq=q,
        )  # fmt: skip
        dq, dk, dv = self.context.to_tokens(*grads)
        if kv_heads < self.context.size:
            high = accumulate_dtype(k.dtype)
            dk, dv = (
                x.unflatten(2, (kv_heads, -1)).sum(3, dtype=high).to(k.dtype) for x in (dk, dv)
            )
        if dsinks is not None and sinks is not None:
            own, dsinks = dsinks, dsinks.new_zeros(len(sinks))
            self.context.own(dsinks, 0).copy_(own)
        return dq, dk, dv, dsinks
