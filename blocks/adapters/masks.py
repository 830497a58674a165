"""What a call of a transformers layer says of the tokens that are seen, as a block takes it.

How it is said goes by the attention implementation that the layer's configuration names:

- `tensor` (`sdpa`, `eager`): the mask is what is seen, `[batch, heads, seq_len, seq_len]`; what
  None means is the layer's (`Recipe.unmasked`).
- `flash` (`flash_attention_2` and later): the mask tells padding, `[batch, seq_len]`; causality and
  window are the layer's. Packed sequences are told by `cu_seq_lens_q`, or by the positions of a
  batch of 1.
- `flex` (`flex_attention`): a `BlockMask`, or what is added to scores; with None all is seen.

A layer of the last two is read with plain PyTorch in place of its kernels, which want a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backfuse.blocks.spec import BlockSpec

from .attributes import NotUnderstood, configuration, implementation
from .recipe import OwnForward, Recipe
from .stand_in import MASK

#: What tells FlashAttention where packed sequences lie; the other implementations ignore it.
PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def masks_of(layer: nn.Module) -> str:
    """`"tensor"`, `"flash"` or `"flex"`: how a layer is told what its tokens see.

    Raises:
        NotUnderstood: for an implementation that is not known.
    """
    used = implementation(layer)
    if used in (None, "sdpa", "eager"):
        return "tensor"
    if used == "flex_attention":
        return "flex"
    if used.startswith("flash_attention_") or ("/" in used and _masked_as_flash(used)):
        return "flash"
    raise NotUnderstood(
        f"its attention is {used!r}, expected 'sdpa', 'eager', 'flex_attention' or "
        "FlashAttention's (model.set_attn_implementation)"
    )


def _masked_as_flash(used: str) -> bool:
    """Whether an attention from the hub is FlashAttention under another name."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as KNOWN

    return KNOWN.get(used) is KNOWN["flash_attention_2"]


@contextmanager
def plain_attention(layer: nn.Module) -> Iterator[set[int | None]]:
    """Plain PyTorch in place of the attention kernels that a layer's configuration names.

    Yields:
        The windows that the layer hands to FlashAttention. They are not applied: an input that is
        longer than a window would be a long one.
    """
    windows: set[int | None] = set()
    masks = masks_of(layer)
    if masks == "tensor" or configuration(layer) is None:
        yield windows
        return
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def attention(
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        windows.add(sliding_window)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        scores = query @ key.transpose(-1, -2) * scale
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        if attention_mask is not None:
            scores = scores + attention_mask
        if masks == "flash" and (module.is_causal if is_causal is None else is_causal):
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        if s_aux is not None:
            sinks = s_aux.reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, sinks], -1)
        shares = F.dropout(scores.softmax(-1), dropout, bool(dropout))[..., : key.shape[2]]
        return (shares @ value).transpose(1, 2).contiguous(), None

    used = implementation(layer)
    own = ALL_ATTENTION_FUNCTIONS._local_mapping.get(used)
    ALL_ATTENTION_FUNCTIONS[used] = attention
    try:
        yield windows
    finally:
        if own is None:
            del ALL_ATTENTION_FUNCTIONS[used]
        else:
            ALL_ATTENTION_FUNCTIONS[used] = own


def seen_by(recipe: Recipe, x: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """What a block is told of the tokens that are seen; empty where its spec says it all.

    Args:
        recipe: of the layer.
        x: `[batch, seq_len, width]`.
        given: the call's other arguments.

    Raises:
        OwnForward: for what a block does not do.
    """
    mask = given.get(MASK)
    if recipe.masks == "flex" and type(mask).__name__ == "BlockMask":
        mask = _dense(mask)
    elif recipe.masks == "flash":
        if mask is None:
            return _packed(x, given)
        mask = _padding(recipe.spec, x, mask)
    seen = _mask(recipe, x, mask)
    return {} if seen is None else {MASK: seen}


def _dense(mask: Any) -> Tensor:
    """A `BlockMask` as a mask of every token, left on it for the other layers."""
    if torch.compiler.is_compiling():
        raise OwnForward(f"its {MASK} is a BlockMask, whose values are not known under compile")
    known = vars(mask)
    if "_backfuse_dense" not in known:
        from torch.nn.attention.flex_attention import create_mask

        batch, heads, queries, keys = mask.shape
        known["_backfuse_dense"] = create_mask(
            mask.mask_mod, batch, heads, queries, keys, device=str(mask.kv_num_blocks.device)
        )
    dense: Tensor = known["_backfuse_dense"]
    return dense


def _noted(x: Tensor, name: str) -> dict[object, Any]:
    """What was found out about a tensor as it is now, for the other layers; to be added to."""
    version, notes = vars(x).get(name, (None, {}))
    if version != x._version:  # what was true of it before is let go
        notes = {}
        vars(x)[name] = x._version, notes
    found: dict[object, Any] = notes
    return found


def _padding(spec: BlockSpec, x: Tensor, mask: Any) -> Tensor:
    """What is seen where FlashAttention leaves padding out: its tokens see nothing, nor are seen.

    All layers are given the same tensor: those of like windows share what is made of it.
    """
    if not isinstance(mask, Tensor) or mask.shape != x.shape[:2]:
        raise OwnForward(f"its {MASK} is not [batch, seq_len]")

    def made() -> Tensor:
        valid = mask.bool()
        return valid[:, None, :, None] & valid[:, None, None, :] & ~hidden(spec, x.shape[1], x)

    if torch.compiler.is_compiling() or mask.is_inference():  # which may change unseen
        return made()
    known = _noted(mask, "_backfuse_seen")
    key = spec.causal, spec.sliding_window
    if key not in known:
        known[key] = made()
    return known[key]


def _packed(x: Tensor, given: dict[str, Any]) -> dict[str, Any]:
    """Where packed sequences begin, as FlashAttention is told or finds out."""
    offsets, keys, longest, _ = told = [given.get(name) for name in PACKED]
    if all(value is not None for value in told):
        if len(x) != 1 or not isinstance(offsets, Tensor) or not isinstance(keys, Tensor):
            raise OwnForward(f"it is given {PACKED[0]} and a batch that is no packed one")
        if keys is not offsets and (torch.compiler.is_compiling() or not offsets.equal(keys)):
            raise OwnForward(f"it is given {PACKED[1]} unlike {PACKED[0]}")
    else:
        position = given.get("position_ids")
        if len(x) != 1 or not isinstance(position, Tensor) or position.shape[-1] == 1:
            return {}
        offsets, longest = _restarts(position)
    if offsets is None:
        return {}
    return {"cu_seqlens": offsets, "max_seqlen": longest if isinstance(longest, int) else None}


def _restarts(position: Tensor) -> tuple[Tensor | None, int | None]:
    """Offsets of packed sequences and the longest, by positions; None where they are one."""
    if torch.compiler.is_compiling():
        raise OwnForward(
            f"it is given a batch of 1, packed or not as position_ids say, whose values are not "
            f"known under compile ({PACKED[0]} would tell)"
        )
    if position.is_inference():  # which may change unseen
        return _offsets(position.flatten())
    known = _noted(position, "_backfuse_packed")
    if "offsets" not in known:
        known["offsets"] = _offsets(position.flatten())
    packed: tuple[Tensor | None, int | None] = known["offsets"]
    return packed


def _offsets(position: Tensor) -> tuple[Tensor | None, int | None]:
    """As `_restarts`, of positions `[tokens]`."""
    first = position.min()
    if torch.arange(len(position), device=position.device).add(first).equal(position):
        return None, None
    starts = (position == first).nonzero().flatten().to(torch.int32)
    offsets = F.pad(starts, (0, 1), value=len(position))
    if int(offsets[0]):
        raise OwnForward("its position_ids are those of no packed sequences")
    return offsets, int(offsets.diff().max())


def _mask(recipe: Recipe, x: Tensor, mask: Any) -> Tensor | None:
    """The mask as a block takes it; None where its spec says what is seen."""
    batch, seq_len = x.shape[:2]
    spec = recipe.spec
    if mask is None:
        if not recipe.unmasked:
            raise OwnForward("it is given no mask, which its attention takes for no causality")
        if spec.sliding_window is not None and seq_len > spec.sliding_window:
            raise OwnForward("it is given no mask, which its attention takes for no window")
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.requires_grad:
        raise OwnForward(f"its {MASK} is not [batch, heads, seq_len, seq_len]")
    wanted = ((1, batch), (1, spec.num_attention_heads), (1, seq_len), (seq_len,))
    if any(size not in sizes for size, sizes in zip(mask.shape, wanted, strict=True)):
        raise OwnForward(f"its {MASK} is of shape {list(mask.shape)}, with {seq_len} tokens")
    if not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise OwnForward(f"its {MASK} is {mask.dtype}")
    if mask.dtype == torch.bool and recipe.implementation == "eager":
        raise OwnForward(f"its {MASK} is boolean, which eager attention adds to its scores")
    traced = torch.compiler.is_compiling()  # a traced mask has no values yet
    if mask.shape[2] == seq_len and not traced and _says_the_spec(mask, spec):
        return None
    return mask.expand(-1, -1, seq_len, -1)


def hidden(spec: BlockSpec, seq_len: int, x: Tensor) -> Tensor:
    """What a spec hides, `[seq_len, seq_len]`, True where a key is not seen, on x's device."""
    tokens = torch.arange(seq_len, device=x.device)
    distance = tokens[:, None] - tokens
    out = (distance < 0) if spec.causal else torch.zeros_like(distance, dtype=torch.bool)
    if spec.sliding_window is not None:
        out |= distance.abs() >= spec.sliding_window
    return out


def _says_the_spec(mask: Tensor, spec: BlockSpec) -> bool:
    """Whether a mask hides what the spec hides anyway: a block then needs not read it.

    Eager attention and sliding windows always come with one. All layers are given the same tensor:
    the answer is left on it. On a GPU finding it makes the host wait, once a step.
    """
    capturing = mask.is_cuda and torch.cuda.is_current_stream_capturing()
    if capturing or torch.compiler.is_compiling() or mask.is_inference():
        return False
    known = _noted(mask, "_backfuse_says")
    key = spec.causal, spec.sliding_window
    if key not in known:
        out = hidden(spec, mask.shape[-1], mask)
        if mask.dtype == torch.bool:
            known[key] = bool((mask != out).all())
        else:
            lowest = torch.finfo(mask.dtype).min / 2
            known[key] = bool(((mask <= lowest) == out).all() and (mask == 0).ne(out).all())
    return known[key]
