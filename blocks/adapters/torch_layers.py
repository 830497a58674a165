"""`torch.nn.TransformerEncoderLayer` and `TransformerDecoderLayer` as a block, or as its halves.

Their parts have fixed names, and attention is one call that no hook sees into; so they are read
from those names, and held against their own numbers as any other layer. A decoder layer's cross
attention stays its own, between the two halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.function import attention, block, ffn
from backfuse.blocks.policy import KEEP, Policy
from backfuse.blocks.spec import BlockSpec
from backfuse.kernels.reference.activation import ACTIVATIONS

from .attributes import NotUnderstood
from .recipe import OwnForward, Recipe, agrees
from .stand_in import (
    SEQ_LEN,
    NoDropout,
    Observation,
    enlarge,
    forward_arguments,
    random_input,
    stand_in,
)

KINDS = {nn.TransformerEncoderLayer: "encoder", nn.TransformerDecoderLayer: "decoder"}

#: Arguments of a layer's forward.
ARGUMENTS: dict[str, tuple[str, ...]] = {
    "encoder": ("src", "src_mask", "src_key_padding_mask", "is_causal"),
    "decoder": (
        "tgt", "memory", "tgt_mask", "memory_mask", "tgt_key_padding_mask",
        "memory_key_padding_mask", "tgt_is_causal", "memory_is_causal",
    ),
}  # fmt: skip

#: The spec's names -> the layers', but for norms.
NAMES = {
    "self_attn.qkv_proj.weight": "self_attn.in_proj_weight",
    "self_attn.qkv_proj.bias": "self_attn.in_proj_bias",
    "self_attn.o_proj": "self_attn.out_proj",
    "mlp.up_proj": "linear1",
    "mlp.down_proj": "linear2",
}


def torch_kind(original: type[nn.Module]) -> str | None:
    """`"encoder"`, `"decoder"`, or None for any other class."""
    return next((name for kind, name in KINDS.items() if issubclass(original, kind)), None)


def understand_torch(layer: nn.Module, original: type[nn.Module], kind: str) -> Recipe:
    """The recipe of a live layer, held against its own output.

    Args:
        layer: only looked at.
        original: its class before it was patched.
        kind: see `torch_kind`.

    Raises:
        NotUnderstood: with the reason.
    """
    copy: Any = stand_in(layer, original)
    base = next(base for base, name in KINDS.items() if name == kind)
    for name in ("_sa_block", "_ff_block"):
        if getattr(original, name) is not getattr(base, name):
            raise NotUnderstood(f"its {name} is not PyTorch's, and would not be called")
    heads = copy.self_attn
    if not heads._qkv_same_embed_dim or heads.bias_k is not None or heads.add_zero_attn:
        raise NotUnderstood("its attention has more than q, k and v of one width")
    norms = [copy.norm1, copy.norm2, *([copy.norm3] if kind == "decoder" else [])]
    outs = [copy.dropout1, copy.dropout2, *([copy.dropout3] if kind == "decoder" else [])]
    if any(type(norm) is not nn.LayerNorm for norm in norms) or len({n.eps for n in norms}) > 1:
        raise NotUnderstood("its norms are not LayerNorms of one eps")
    if len({outs[0].p, outs[-1].p}) > 1:
        raise NotUnderstood("its halves drop out with unlike probabilities")
    biased = heads.in_proj_bias is not None
    act = _activation(copy.activation)
    if act is None:
        raise NotUnderstood(f"its activation is none of {', '.join(ACTIVATIONS)}")
    spec = BlockSpec(
        heads.embed_dim, copy.linear1.out_features, heads.num_heads, norm="layernorm",
        norm_eps=norms[0].eps, norm_bias=norms[0].bias is not None, gated=False, hidden_act=act,
        norm_position="pre" if copy.norm_first else "after_residual", rope=None, causal=False,
        qkv_bias=biased, o_bias=heads.out_proj.bias is not None,
        up_bias=copy.linear1.bias is not None, down_bias=copy.linear2.bias is not None,
        stacked_qkv=True, attention_dropout=heads.dropout, residual_dropout=outs[0].p,
        activation_dropout=copy.dropout.p,
    )  # fmt: skip
    names = _names(spec, last_norm="norm2" if kind == "encoder" else "norm3")
    kinds = {path.rpartition(".")[0]: type(copy.get_submodule(path.rpartition(".")[0]))
             for path in names.values()}  # fmt: skip
    types = {place: kind for place, kind in kinds.items() if kind is not nn.Linear}
    rest = ("norm2", "multihead_attn") if kind == "decoder" else None
    arguments, _ = forward_arguments(original)
    recipe = Recipe(spec, names, types, arguments, None, True, None, rest, kind)
    _check(copy, original, recipe)
    return recipe


def _activation(function: Any) -> str | None:
    """The name of an activation, by its values."""
    grid = torch.linspace(-4, 4, 65)
    values = function(grid)
    known = ((name, act(grid)) for name, (act, _) in ACTIVATIONS.items())
    return next((n for n, v in known if torch.allclose(v, values, rtol=1e-5, atol=1e-6)), None)


def _names(spec: BlockSpec, last_norm: str) -> dict[str, str]:
    roles = {"attn_norm": "norm1", "attn_post_norm": "norm1"}
    norms = {name: roles.get(role, last_norm) for role, name in spec.norm_names.items()}
    names = {}
    for name in spec.parameters():
        place, _, kind = name.rpartition(".")
        known = {**NAMES, **norms}
        names[name] = known.get(name) or f"{known[place]}.{kind}"
    return names


def _check(copy: nn.Module, original: type[nn.Module], recipe: Recipe) -> None:
    """Raise unless a stand-in does what its recipe says, with and without masks.

    It trains, without dropout: elsewhere PyTorch takes a fast path around a subclass's methods.
    """
    for module in copy.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
    own = dict(copy.named_parameters(remove_duplicate=False))
    weights = {name: own[path] for name, path in recipe.names.items()}
    x = random_input(recipe.spec.hidden_size)
    causal = torch.ones(SEQ_LEN, SEQ_LEN, dtype=torch.bool).triu(1)
    padding = torch.zeros(len(x), SEQ_LEN, dtype=torch.bool)
    padding[1, -2:] = True
    if not _batch_first(copy):
        x = x.transpose(0, 1)
    args = [x] if recipe.kind == "encoder" else [x, x.flip(-1)]
    prefix = "src" if recipe.kind == "encoder" else "tgt"
    masks = {f"{prefix}_mask": causal, f"{prefix}_key_padding_mask": padding}
    for mode in ("masked", "plain", "eval", "large"):
        given = masks if mode == "masked" else {}
        copy.train(mode != "eval")
        if mode == "large":
            enlarge(copy, recipe.names, recipe.spec)
        seen = Observation(x)
        with torch.no_grad(), NoDropout(seen):
            theirs = original.forward(copy, *args, **given)
            read = torch_arguments(copy, recipe, args, given)
            ours = run_torch(copy, recipe, KEEP, weights, {}, *read)
        seen.check_chance()
        if not agrees(ours, theirs, x):
            raise NotUnderstood("what was made of its parts gives other numbers than it does")


def _batch_first(layer: nn.Module) -> bool:
    heads = layer.self_attn
    return bool(heads.batch_first)  # type: ignore[union-attr]


def torch_arguments(
    layer: nn.Module, recipe: Recipe, args: Any, kwargs: Any
) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """Input `[batch, seq_len, width]`, mask, and what cross attention is given.

    Raises:
        OwnForward: for what a block does not do.
    """
    given = {**dict(zip(recipe.arguments, args, strict=False)), **kwargs}
    prefix = ARGUMENTS[recipe.kind][0]
    silent = set(recipe.arguments) - recipe.defaults
    unknown = [
        name for name, value in given.items()
        if name not in ARGUMENTS[recipe.kind] and (value is not None or name not in silent)
    ]  # fmt: skip
    if unknown or len(args) > len(recipe.arguments):
        raise OwnForward(f"it is given {', '.join(unknown) or 'more'}, which a block does not know")
    if recipe.kind == "decoder" and not isinstance(given.get("memory"), Tensor):
        raise OwnForward("it is given no memory")
    x = given.get(prefix)
    if not isinstance(x, Tensor) or x.is_nested or x.dim() != 3 or not x.numel():
        raise OwnForward("its input is no tensor of three dimensions, or empty")
    if not _batch_first(layer):
        x = x.transpose(0, 1)
    mask, padding = given.get(f"{prefix}_mask"), given.get(f"{prefix}_key_padding_mask")
    hint = "is_causal" if recipe.kind == "encoder" else "tgt_is_causal"
    if given.get(hint) and mask is None:
        raise OwnForward(f"it is given {hint} without the mask of which that is a hint")
    seen = _seen(mask, padding, len(x), recipe.spec.num_attention_heads, x.shape[1], x.dtype)
    cross = {
        "attn_mask": given.get("memory_mask"),
        "key_padding_mask": given.get("memory_key_padding_mask"),
        "is_causal": given.get("memory_is_causal", False),
        "mem": given.get("memory"),
    }
    return x, seen, cross if recipe.kind == "decoder" else {}


def _seen(
    mask: Tensor | None, padding: Tensor | None, batch: int, heads: int, tokens: int,
    dtype: torch.dtype,
) -> Tensor | None:  # fmt: skip
    """One mask `[batch or 1, heads or 1, tokens, tokens]`, True (or 0) where a key is seen."""
    parts = []
    if mask is not None:
        parts.append(mask[None, None] if mask.dim() == 2 else mask.unflatten(0, (batch, heads)))
    if padding is not None:
        parts.append(padding[:, None, None].expand(-1, -1, tokens, -1))
    if any(part.requires_grad or part.shape[-1] != tokens for part in parts):
        raise OwnForward("its mask wants a gradient, or is not of its tokens")
    if all(part.dtype == torch.bool for part in parts):
        seen = None
        for part in parts:
            seen = ~part if seen is None else seen & ~part
        return seen
    total = None
    for part in parts:
        if part.dtype == torch.bool:
            part = torch.zeros(part.shape, dtype=dtype, device=part.device).masked_fill(
                part, float("-inf")
            )
        total = part if total is None else total + part
    return total


def run_torch(
    layer: nn.Module,
    recipe: Recipe,
    policy: Policy,
    weights: Mapping[str, Tensor],
    options: dict[str, Any],
    x: Tensor,
    mask: Tensor | None,
    cross: dict[str, Any],
) -> Tensor:
    """The layer's output, as it gives it.

    Args:
        layer: the live layer.
        recipe: how it is run.
        policy: what it keeps.
        weights: its parameters by the spec's names.
        options: see `TransformerBlock`; `training`: whether dropout is active.
        x: `[batch, seq_len, width]`.
        mask: see `TransformerBlock.forward`.
        cross: what its cross attention is given.
    """
    own: Any = layer
    spec = recipe.spec
    if cross:
        half = {name: value for name, value in options.items() if name != "offload_dir"}
        scores = {name: value for name, value in half.items() if name != "ffn_strategy"}
        if "adapters" in scores:
            scores["adapters"] = ()  # its attention's would be refused
        x = attention(x, weights, spec, policy, attention_mask=mask, **scores)
        inner = _cross(own, own.norm2(x) if own.norm_first else x, cross)
        x = x + inner if own.norm_first else own.norm2(x + inner)
        y = ffn(x, weights, spec, policy, **half)
    else:
        y = block(x, weights, spec, policy, attention_mask=mask, **options)
    return y if _batch_first(layer) else y.transpose(0, 1)


def _cross(layer: Any, x: Tensor, cross: dict[str, Any]) -> Tensor:
    """The layer's cross attention on `[batch, seq_len, width]`."""
    if _batch_first(layer):
        y: Tensor = layer._mha_block(x, **cross)
        return y
    y = layer._mha_block(x.transpose(0, 1), **cross)
    return y.transpose(0, 1)
