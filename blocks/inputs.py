"""Checks of everything a caller hands to a block, before any work."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from backfuse.kernels.cores.choose import Core
from backfuse.kernels.dispatch import (
    FFN_STRATEGIES,
    IMPLEMENTATIONS,
    Operations,
    attention_core,
    operations,
)
from backfuse.kernels.reference.dropout import draw_seed

from .call import CHUNK_SIZE, LATER, Call, Inputs
from .context import AllToAll, Context
from .errors import nearest
from .lora import Adapters, drops
from .remember import remembered
from .spec import BlockSpec, check_spec


def _told(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> str:
    return f"{str(dtype).removeprefix('torch.')} {list(shape)} on {device}"


def _described(x: object) -> str:
    return _told(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else repr(x)


#: Where autocast exists; asked now, for torch.compile does not trace the question everywhere.
AUTOCAST_DEVICES = frozenset(
    name for name in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(name)
)


def dtype_under_autocast(x: Tensor) -> torch.dtype | None:
    """The dtype autocast asks for, or None where it does not apply."""
    device = x.device.type
    if x.dtype == torch.float64 or device not in AUTOCAST_DEVICES:
        return None
    if not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


#: What is checked of a weight: shape, dtype, device, class.
Layout = tuple[torch.Size, torch.dtype, torch.device, type[Tensor]]


@remembered
def _check_layouts(
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    layouts: tuple[Layout, ...],
    dtype: torch.dtype,
    device: torch.device,
    autocast: bool,
) -> None:
    """Raise unless weights fit; those that do are remembered, so that a training step asks once."""
    for name, shape, layout in zip(names, shapes, layouts, strict=True):
        # Of a class torch.compile of torch 2.11 cannot ask.
        if not torch.compiler.is_compiling() and hasattr(layout[3], "to_local"):
            raise TypeError(
                f"{name} is a {layout[3].__name__}, expected a whole tensor: shard the block (as "
                "fully_shard(block) does), not its parts, which it never calls"
            )
        if layout[0] != shape:
            raise ValueError(f"{name} is {_told(*layout[:3])}, expected the shape {list(shape)}")
        if layout[2] != device:
            raise ValueError(
                f"{name} is on {layout[2]}, expected the device of hidden_states ({device})"
            )
        _check_weight_dtype(name, layout[1], dtype, autocast)


def _check_weight_dtype(name: str, given: torch.dtype, dtype: torch.dtype, autocast: bool) -> None:
    if autocast or ".lora_" in name:
        expected = list(dict.fromkeys((torch.float32, torch.bfloat16, torch.float16, dtype)))
        reason = "under autocast" if autocast else "as adapters may be"
    elif "_proj." in name:
        expected = [dtype]
        reason = "the dtype of hidden_states; mixed precision is torch.autocast's business"
    else:
        expected = list(dict.fromkeys((dtype, torch.float32)))
        reason = f"with hidden_states in {dtype}"
    if given not in expected:
        told = " or ".join(map(str, expected))
        raise TypeError(f"{name} is {given}, expected {told}, {reason}")


def check_weights(
    weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], x: Tensor, call: Call
) -> dict[str, Tensor]:
    """The weights of a half or a block, in the order of `shapes`.

    Outside autocast projections have the input's dtype, norms that or fp32, and adapters that or
    any of those that under autocast each may have: fp32, bf16 or fp16.

    Raises:
        TypeError: for weights that are no mapping of tensors, that are sharded, or of a dtype that
            does not fit.
        ValueError: for a missing weight, a wrong shape or another device.
    """
    if not isinstance(weights, Mapping):
        raise TypeError(f"weights is {weights!r}, expected a mapping from names to tensors")
    given = {}
    for name, shape in shapes.items():
        weight = weights.get(name)
        if not isinstance(weight, Tensor):
            if name not in weights:
                raise ValueError(f"weights lack {name!r}, expected a tensor of shape {list(shape)}")
            raise TypeError(f"{name} is {weight!r}, expected a tensor of shape {list(shape)}")
        # Biases and norm weights of any stride: oneDNN misreads them, and kernels refuse them.
        # Autograd sees the copy, so that its gradient goes to whom it was made from.
        given[name] = weight.contiguous() if len(shape) == 1 else weight
    layouts = tuple([(w.shape, w.dtype, w.device, type(w)) for w in given.values()])
    _check_layouts(tuple(shapes), tuple(shapes.values()), layouts, x.dtype, x.device, call.autocast)
    return given


def check_hidden_states(x: object, spec: BlockSpec) -> Tensor:
    """The input of a block.

    Raises:
        TypeError: if it is not a floating-point tensor.
        ValueError: if it is not `[batch, seq_len, hidden_size]`.
    """
    if not isinstance(x, Tensor) or not x.is_floating_point():
        raise TypeError(f"hidden_states is {_described(x)}, expected a floating-point tensor")
    if x.dim() != 3 or x.shape[-1] != spec.hidden_size or x.numel() == 0:
        raise ValueError(
            f"hidden_states is {_described(x)}, expected [batch, seq_len, {spec.hidden_size}], "
            "none of them 0"
        )
    return x


def check_cu_seqlens(cu_seqlens: object, max_seqlen: int | None, x: Tensor) -> Tensor:
    tokens = x.shape[0] * x.shape[1]
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.dim() != 1
        or (cu_seqlens.dtype not in (torch.int32, torch.int64))
    ):
        raise TypeError(
            f"cu_seqlens is {_described(cu_seqlens)}, expected a 1-D int32 tensor of offsets"
        )
    if x.shape[0] != 1:
        raise ValueError(
            f"hidden_states is {_described(x)}, expected a batch of 1 with cu_seqlens: packed "
            "sequences stand in one row"
        )
    if cu_seqlens.device != x.device:
        raise ValueError(
            f"cu_seqlens is on {cu_seqlens.device}, expected the device of hidden_states "
            f"({x.device})"
        )
    # Reading offsets from a GPU makes the call wait for it, which max_seqlen is there to spare.
    # A traced call has none to read yet: the op that runs later does.
    if (cu_seqlens.is_cpu or max_seqlen is None) and not torch.compiler.is_compiling():
        offsets = cu_seqlens.tolist()
        if not offsets or offsets[0] != 0 or offsets[-1] != tokens or offsets != sorted(offsets):
            raise ValueError(
                f"cu_seqlens is {offsets}, expected offsets that rise from 0 to the number of "
                f"tokens ({tokens})"
            )
        longest = max(b - a for a, b in zip(offsets, offsets[1:], strict=False))
        if max_seqlen is not None and max_seqlen < longest:
            raise ValueError(
                f"max_seqlen is {max_seqlen}, expected at least the longest sequence ({longest})"
            )
    return cu_seqlens


def _check_mask(mask: object, spec: BlockSpec, x: Tensor) -> Tensor:
    batch, seq_len, heads = x.shape[0], x.shape[1], spec.num_attention_heads
    if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.is_floating_point()):
        raise TypeError(
            f"attention_mask is {_described(mask)}, expected a bool tensor (True: visible) or a "
            "floating-point one that is added to the scores"
        )
    if (
        mask.dim() != 4
        or mask.shape[0] not in (1, batch)
        or mask.shape[1] not in (1, heads)
        or (tuple(mask.shape[2:]) != (seq_len, seq_len))
    ):
        raise ValueError(
            f"attention_mask is {_described(mask)}, expected [{batch} or 1, {heads} or 1, "
            f"{seq_len}, {seq_len}]"
        )
    if mask.device != x.device:
        raise ValueError(
            f"attention_mask is on {mask.device}, expected the device of hidden_states ({x.device})"
        )
    if mask.requires_grad:
        raise ValueError("attention_mask requires a gradient, which a block does not compute")
    return mask


def _position_embeddings(
    given: tuple[Tensor, Tensor] | None, spec: BlockSpec, x: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    if spec.rope is None:
        return None, None
    batch, seq_len = x.shape[:2]
    if given is None:
        if "rope_theta" not in spec.there:
            raise ValueError(
                "position_embeddings is None, expected (cos, sin): this spec has no rope_theta to "
                "compute them from"
            )
        return None, None
    if not isinstance(given, tuple | list) or len(given) != 2:
        raise TypeError(
            f"position_embeddings is a {type(given).__name__}, expected a pair (cos, sin)"
        )
    for name, part in zip(("cos", "sin"), given, strict=True):
        fits = isinstance(part, Tensor) and part.dim() == 3 and part.is_floating_point()
        if (
            not fits
            or part.shape[0] not in (1, batch)
            or tuple(part.shape[1:])
            != (
                seq_len,
                spec.rotary_dim,
            )
        ):
            raise ValueError(
                f"{name} of position_embeddings is {_described(part)}, expected "
                f"[{batch} or 1, {seq_len}, {spec.rotary_dim}]"
            )
        if part.device != x.device:
            raise ValueError(
                f"{name} of position_embeddings is on {part.device}, expected the device of "
                f"hidden_states ({x.device})"
            )
        if part.requires_grad:
            raise ValueError(
                f"{name} of position_embeddings requires a gradient, which a block does not compute"
            )
    return given[0], given[1]


@lru_cache(maxsize=4096)
def plain_call(
    spec: BlockSpec,
    batch_size: int,
    seq_len: int,
    dtype: torch.dtype,
    autocast_dtype: torch.dtype | None,
    device: torch.device,
    chunk_size: int,
    impl: str,
    ffn_strategy: str,
    dropout: bool,
    max_seqlen: int | None,
    lossy: bool,
    attention: bool,
    offload_dir: Path | None,
    context: Context | None,
) -> Call:
    """The call with its operations' own attention, the same one for the same question."""
    width = max(spec.hidden_size, spec.q_size)
    head_dim = max(spec.head_dim, spec.v_head_dim) if attention else 0
    compute_dtype = autocast_dtype or dtype
    ops = operations(impl, device, compute_dtype, width, head_dim, lossy)
    return Call(
        spec=spec,
        batch_size=batch_size,
        seq_len=seq_len,
        compute_dtype=compute_dtype,
        autocast=autocast_dtype is not None,
        chunk_size=chunk_size,
        ops=ops,
        core=ops,
        impl=impl,
        ffn_strategy=ffn_strategy,
        dropout=dropout,
        max_seqlen=max_seqlen,
        offload_dir=offload_dir,
        context=context,
    )


@lru_cache(maxsize=4096)
def _with_core(call: Call, core: Operations | Core | AllToAll) -> Call:
    """The call with that attention, the same one each time."""
    return replace(call, core=core)


def with_attention(call: Call, inputs: Inputs, device: torch.device) -> Call:
    """The call with the attention that its `impl` chooses for these inputs."""
    request = call.attention_request(inputs, device)
    core = attention_core(call.impl, call.ops, request)
    return _with_core(call, core if call.context is None else AllToAll(core, call.context))


def prepare(
    spec: BlockSpec,
    hidden_states: Tensor,
    *,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    attention_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    training: bool = False,
    chunk_size: int | None = None,
    impl: str = "auto",
    ffn_strategy: str = "auto",
    lossy: bool = False,
    layers: int = 1,
    attention: bool = True,
    offload_dir: Path | None = None,
    adapters: Iterable[Adapters] = (),
    context: Context | None = None,
) -> tuple[Call, Inputs]:
    """Check a call's arguments and put them in order.

    Args:
        spec: the block.
        hidden_states: `[batch, seq_len, hidden_size]`.
        position_embeddings: `(cos, sin)`, each `[batch or 1, seq_len, rotary_dim]`.
        attention_mask: `[batch or 1, heads or 1, seq_len, seq_len]`, bool or additive.
        cu_seqlens: int32 `[sequences + 1]`, for packed sequences.
        max_seqlen: the longest of them, which spares a GPU a host synchronisation.
        training: whether dropout is active.
        chunk_size: tokens a chunk; None: the device's default.
        impl: a name from `IMPLEMENTATIONS` (see `kernels/dispatch.py`).
        ffn_strategy: `"auto"`, `"split"` or `"fused"` (see `kernels/ffn_recompute.py`).
        lossy: whether something is kept in eight bits.
        layers: how many layers the call runs through: each drops out with a seed of its own.
        attention: whether the call has an attention half.
        offload_dir: folder of the files that offloaded tensors go to; None: host memory.
        adapters: the layers', with the dropout that is active.
        context: the ranks that share every sequence's tokens, of which hidden_states and
            position_embeddings are this one's; None: they are all here.

    Raises:
        TypeError: for something of the wrong kind or dtype.
        ValueError: for a shape, device or value that does not fit.
    """
    check_spec(spec)
    x = check_hidden_states(hidden_states, spec)
    if attention_mask is not None and cu_seqlens is not None:
        raise ValueError("attention_mask and cu_seqlens are both given, expected one of them")
    if max_seqlen is not None and (
        cu_seqlens is None or not isinstance(max_seqlen, int) or max_seqlen < 1
    ):
        raise ValueError(
            f"max_seqlen is {max_seqlen!r}, expected a positive integer, together with cu_seqlens"
        )
    check_impl(impl, ffn_strategy)
    chunk_size = check_chunk_size(chunk_size)
    if chunk_size is None:
        chunk_size = CHUNK_SIZE.get(x.device.type, CHUNK_SIZE["cuda"])
    cos = sin = None
    whole = x if context is None else context.whole(x)
    if attention:
        if cu_seqlens is not None:
            cu_seqlens = check_cu_seqlens(cu_seqlens, max_seqlen, whole)
        if attention_mask is not None:
            attention_mask = _check_mask(attention_mask, spec, whole)
        cos, sin = _position_embeddings(position_embeddings, spec, x)
    kinds = {"residual_dropout", "activation_dropout"}
    if attention:
        kinds |= {"attention_dropout"}
    dropout = training and not spec.there.isdisjoint(kinds)
    seed = None
    if dropout or any(map(drops, adapters)):
        if context is not None:
            raise ValueError(
                "dropout is active, expected none in a block whose tokens are split over ranks"
            )
        traced = torch.compiler.is_compiling()
        seed = torch.ops.backfuse.draw_seed(x, layers) if traced else draw_seed(x, layers)
    inputs = Inputs(cos, sin, attention_mask, cu_seqlens, seed)
    autocast_dtype = dtype_under_autocast(x)
    if torch.compiler.is_compiling():  # sizes may be symbols, by which nothing can be chosen
        call = Call(
            spec, x.shape[0], x.shape[1], autocast_dtype or x.dtype, autocast_dtype is not None,
            chunk_size, LATER, LATER, impl, ffn_strategy, dropout, max_seqlen, offload_dir,
            context=context,
        )  # fmt: skip
        return call, inputs
    call = plain_call(
        spec, x.shape[0], x.shape[1], x.dtype, autocast_dtype, x.device, chunk_size, impl,
        ffn_strategy, dropout, max_seqlen, lossy, attention, offload_dir, context,
    )  # fmt: skip
    return (with_attention(call, inputs, x.device) if attention else call), inputs


def check_impl(impl: str, ffn_strategy: str = "auto") -> None:
    """Raise a ValueError unless these are names of implementations and of FFN strategies."""
    names = (("impl", impl, IMPLEMENTATIONS), ("ffn_strategy", ffn_strategy, FFN_STRATEGIES))
    for name, value, options in names:
        if value not in options:
            raise ValueError(
                f"{name} is {value!r}, expected one of {', '.join(options)}"
                + nearest(value, options)
            )


def check_offload_dir(folder: str | Path | None) -> Path | None:
    """The folder a user gave for offloaded tensors.

    Raises:
        TypeError: for something that is no path.
        ValueError: for a folder that is not there, or that nothing can be written to.
    """
    if folder is None:
        return None
    if not isinstance(folder, str | Path):
        raise TypeError(f"offload_dir is {folder!r}, expected the path of a folder, or None")
    path = Path(folder).expanduser().resolve()
    if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
        raise ValueError(f"offload_dir is {str(folder)!r}, expected a folder one can write to")
    return path


def check_chunk_size(chunk_size: int | None) -> int | None:
    """A chunk size a user gave.

    Raises:
        ValueError: unless it is None or a positive multiple of 64: rows of every chunk then
            start on a cache line, kept or in scratch, which bitwise equality leans on.
    """
    if chunk_size is None or (
        isinstance(chunk_size, int) and chunk_size > 0 and chunk_size % 64 == 0
    ):
        return chunk_size
    raise ValueError(f"chunk_size is {chunk_size!r}, expected a positive multiple of 64, or None")
