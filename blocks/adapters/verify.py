"""A guess held against the layer itself: only what gives the layer's own numbers is believed.

The stand-in's weights and input are random and of size 1, in fp32. A part in another place, another
activation or a factor that was overlooked moves its output by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.function import attention, block
from backfuse.blocks.policy import KEEP, Policy
from backfuse.blocks.spec import BlockSpec

from .attributes import NotUnderstood, head_dim, implementation, residual_width, rotary_dims
from .facts import numbers, remember
from .liger import without_liger
from .masks import masks_of, plain_attention
from .peft import parts_of
from .recipe import Recipe, agrees
from .recognise import Guess, Reading
from .stand_in import (
    ANGLES,
    LARGE,
    MASK,
    SEQ_LEN,
    Observation,
    Unreadable,
    angles,
    defaults_of,
    enlarge,
    forward_arguments,
    one_chance,
    random_input,
    run,
    stand_in,
    visible,
)
from .torch_layers import torch_kind, understand_torch


def only_output(output: object) -> tuple[Tensor, int | None]:
    """The tensor that a layer returns, and how many Nones follow it in a tuple."""
    if isinstance(output, Tensor):
        return output, None
    if (
        isinstance(output, tuple)
        and output
        and isinstance(output[0], Tensor)
        and all(other is None for other in output[1:])
    ):
        return output[0], len(output) - 1
    raise NotUnderstood("it returns more than its output")


def run_hf(
    layer: nn.Module,
    recipe: Recipe | Guess,
    policy: Policy,
    weights: Mapping[str, Tensor],
    options: dict[str, Any],
    x: Tensor,
    position: tuple[Tensor, Tensor] | None,
    seen: Mapping[str, Any],
    replay: Callable[..., Tensor] | None = None,
) -> Tensor:
    """A layer's output: a block, or its attention half and what is the layer's own.

    Args:
        layer: the live layer, or a stand-in.
        recipe: how it is run.
        policy: what it keeps.
        weights: its parameters by the spec's names.
        options: see `TransformerBlock`; `training`: whether dropout is active.
        x: `[batch, seq_len, width]`.
        position: cos and sin, or None.
        seen: of the arguments of `TransformerBlock.forward` those that say what tokens see.
        replay: the checkpoint around what is the layer's own, or None.
    """
    given: dict[str, Any] = {ANGLES: position, **seen, **options}
    if recipe.rest is None:
        return block(x, weights, recipe.spec, policy, **given)
    for name in ("ffn_strategy", "offload_dir"):
        given.pop(name, None)
    mid = attention(x, weights, recipe.spec, policy, **given)
    norm, ffn = (layer.get_submodule(path) for path in recipe.rest)

    def rest(mid: Tensor) -> Tensor:
        return torch.add(mid, first_tensor(ffn(norm(mid))), alpha=recipe.spec.residual_multiplier)

    return rest(mid) if replay is None else replay(rest, mid)


def _run_guess(
    layer: nn.Module, guess: Guess, x: Tensor, position: Any, mask: Tensor | None
) -> Tensor:
    """What a guess gives on a stand-in's weights."""
    own = dict(layer.named_parameters(remove_duplicate=False))
    weights = {name: own[path] for name, path in guess.names.items()}
    position = position if guess.spec.rope else None
    with one_chance():  # as the layer's own run
        return run_hf(layer, guess, KEEP, weights, {}, x, position, {MASK: mask})


def first_tensor(output: Any) -> Tensor:
    """What a module gives, or the first of it."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first


def _observations(
    layer: nn.Module, x: Tensor, arguments: tuple[str, ...], mask: Tensor | None
) -> Iterator[tuple[Observation, Any, int | None, list[str | None]]]:
    """Runs of a stand-in under all ways to tell it positions: angles, their width, layouts."""
    given = {} if mask is None else {MASK: mask}
    if ANGLES not in arguments:
        yield run(layer, x, **given), None, None, [None]
        return
    failure: Exception | None = None
    ran = False
    for rotary_dim in rotary_dims(layer, head_dim(layer, x.shape[-1])):
        for layout in ("half", "interleaved"):
            position = angles(rotary_dim, layout)
            try:
                seen = run(layer, x, **given, **{ANGLES: position})
            except RuntimeError as error:  # angles of another width
                failure = error
                break
            ran = True
            yield seen, position, rotary_dim, [layout, None]
    if not ran and failure is not None:
        raise failure


def understand(layer: nn.Module, original: type[nn.Module]) -> Recipe:
    """The recipe of a live layer, held against its own output.

    Args:
        layer: only looked at.
        original: its class before it was patched.

    Raises:
        NotUnderstood: with the reason.
    """
    with _plainly():
        if (kind := torch_kind(original)) is not None:
            recipe = understand_torch(layer, original, kind)
        else:
            recipe = _understand_hf(layer, original)
    return replace(recipe, facts=remember(layer, original), defaults=defaults_of(original))


def _understand_hf(layer: nn.Module, original: type[nn.Module]) -> Recipe:
    """The recipe of a layer that is called as those of transformers are."""
    masks = masks_of(layer)
    arguments, needed = forward_arguments(original)
    others = sorted(needed - {*arguments[:1], MASK, ANGLES})
    if not arguments or others:
        raise NotUnderstood(f"its forward takes {', '.join(others) or 'nothing'}")
    _check_own_reach(layer)
    width = residual_width(layer)
    copy = stand_in(layer, original)
    causal = any(getattr(module, "is_causal", False) for module in copy.modules())
    mask = visible(bool(causal)) if MASK in arguments and masks != "flash" else None
    x = random_input(width)
    with without_liger(copy), plain_attention(copy) as windows:
        for seen, position, rotary_dim, layouts in _observations(copy, x, arguments, mask):
            output, extra = only_output(seen.output)
            reading = Reading(copy, seen)
            for layout in layouts:
                for guess in reading.guesses(rotary_dim if layout else None, layout):
                    with torch.no_grad():
                        ours = _run_guess(copy, guess, x, position, mask)
                    if not agrees(ours, output, x):
                        continue
                    seen.check_chance(guess.rest[1] if guess.rest else None)
                    _check_positions(copy, original, output, x, position, mask)
                    unmasked = mask is None or _unmasked(copy, guess, x, position)
                    _check_elsewhere(copy, guess, x, position, mask)
                    if masks == "flash":
                        guess = replace(guess, spec=_windowed(guess.spec, windows))
                    recipe = _recipe(layer, guess, arguments, extra, unmasked)
                    return replace(recipe, masks=masks, unreached=_unreached(copy, guess))
    seen.check_chance()
    buffers = [name for name, buffer in layer.named_buffers() if buffer.is_floating_point()]
    reason = "what was made of its parts gives other numbers than it does"
    raise NotUnderstood(reason + (f" (it may read {', '.join(buffers)})" if buffers else ""))


def _check_elsewhere(
    layer: nn.Module, guess: Guess, x: Tensor, position: Any, mask: Tensor | None
) -> None:
    """Raise if a guess is wrong in eval mode, or of large activations; the stand-in is spoilt."""
    told = {n: value for n, value in ((ANGLES, position), (MASK, mask)) if value is not None}

    def holds(x: Tensor) -> bool:
        output, _ = only_output(run(layer, x, **told).output)
        with torch.no_grad():
            return agrees(_run_guess(layer, guess, x, position, mask), output, x)

    layer.eval()
    if not holds(x):
        raise NotUnderstood("in eval mode it gives other numbers")
    enlarge(layer.train(), guess.names, guess.spec)
    if not holds(x * LARGE if guess.spec.pre_norm else x):  # elsewhere scores would be too large
        raise NotUnderstood("large activations give other numbers: it clamps them, perhaps")


def _windowed(spec: BlockSpec, windows: set[int | None]) -> BlockSpec:
    """A spec with the window that its layer hands to FlashAttention, whose masks say nothing of it.

    Raises:
        NotUnderstood: for a layer that calls it in another way.
    """
    if len(windows) != 1:
        raise NotUnderstood("its attention is not called as transformers calls FlashAttention")
    return spec.replace(sliding_window=next(iter(windows)))


def _unreached(layer: nn.Module, guess: Guess) -> str | None:
    """A parameter of a stand-in that no part of a block is, if there is one: cross attention's."""
    owned = {*guess.names.values()}
    rest = tuple(f"{path}." for path in guess.rest or ())
    names = (name for name, _ in layer.named_parameters(remove_duplicate=False))
    return next((n for n in names if n not in owned and not n.startswith(rest)), None)


def _check_positions(
    layer: nn.Module, original: type[nn.Module], output: Tensor, x: Tensor, position: Any, mask: Any
) -> None:
    """Raise if positions enter in another way too: a scale that grows with them, say."""
    given = {name: value for name, value in ((ANGLES, position), (MASK, mask)) if value is not None}
    arguments, _ = forward_arguments(original)
    late = {"position_ids": (torch.arange(SEQ_LEN) + 10**6).expand(len(x), -1)}
    late["cache_position"] = late["position_ids"][0]
    told = {name: value for name, value in late.items() if name in arguments}
    if told and not agrees(only_output(run(layer, x, **given, **told).output)[0], output, x):
        raise NotUnderstood(f"what it computes depends on {', '.join(told)}")


def _check_own_reach(layer: nn.Module) -> None:
    """Raise if a layer may hide tokens by itself, which no short input would show."""
    for name, buffer in layer.named_buffers():
        if buffer.dim() > 1:
            raise NotUnderstood(f"it holds {name} {list(buffer.shape)}, a mask of its own perhaps")
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            known = name == "sliding_window" or "pattern" in name
            if "window" in name and not known and isinstance(value, int) and value:
                raise NotUnderstood(f"it has {path}.{name} = {value}, a window of its own perhaps")


@contextmanager
def _plainly() -> Iterator[None]:
    """Without what the caller set for all of PyTorch: device, dtype, autocast."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_default_dtype(dtype)


def _unmasked(layer: nn.Module, guess: Guess, x: Tensor, position: Any) -> bool:
    """Whether the layer without a mask does what its spec says."""
    given = {} if position is None else {ANGLES: position}
    output, _ = only_output(run(layer, x, **{MASK: None}, **given).output)
    spec = guess.spec.replace(sliding_window=None)
    plain = Guess(spec, guess.names, guess.rest)
    with torch.no_grad():
        return agrees(_run_guess(layer, plain, x, position, None), output, x)


def _recipe(
    layer: nn.Module, guess: Guess, arguments: tuple[str, ...], extra: int | None, unmasked: bool
) -> Recipe:
    places = {path.rpartition(".")[0]: name for name, path in guess.names.items()}
    parts = {"": layer, **dict(parts_of(layer))}
    types = {
        place: type(parts[place]) for place, name in places.items() if "_proj." not in name
    }
    return Recipe(
        guess.spec, guess.names, types, arguments, extra, unmasked, implementation(layer),
        guess.rest,
    )  # fmt: skip


def same_but_for_number(
    layer: nn.Module, others: Sequence[nn.Module], recipe: Recipe, original: type[nn.Module]
) -> list[bool]:
    """Whether each of the others, which are `alike`, computes what the layer does.

    A stand-in runs with numbers that nobody can read. Where that fails, it is given the number of
    each in turn: far cheaper still than to read them all.
    """
    if all(numbers(other) == numbers(layer) for other in others):
        return [True] * len(others)
    if recipe.kind != "hf":
        return [False] * len(others)
    with _plainly():
        copy = stand_in(layer, original)
        x = random_input(recipe.spec.hidden_size)
        given: dict[str, Any] = {}
        if MASK in recipe.arguments and recipe.masks != "flash":
            given[MASK] = visible(recipe.spec.causal)
        if ANGLES in recipe.arguments:
            width = recipe.spec.hidden_size
            rope = recipe.spec.rotary_dim if recipe.spec.rope else None
            given[ANGLES] = angles(rope or rotary_dims(layer, head_dim(layer, width))[0], "half")

        def numbered(values: Mapping[tuple[str, str], Any]) -> tuple[Tensor, object]:
            for (path, name), value in values.items():
                place = path.replace(".base_layer", "")
                setattr(copy.get_submodule(place), name, value)
            with without_liger(copy), plain_attention(copy) as windows:
                seen = run(copy, x, **given)
            drops = [p for p, _ in seen.dropped], seen.score_dropout, len(seen.drawn)
            return only_output(seen.output)[0], (drops, windows)

        expected, told = numbered(numbers(layer))
        try:
            output, found = numbered(dict.fromkeys(numbers(layer), Unreadable()))
            if found == told and agrees(output, expected, x):
                return [True] * len(others)
        except Exception:  # whatever somebody's code raises: a number was looked at, perhaps
            pass
        same = [True] * len(others)
        for large in (False, True):
            if large:
                enlarge(copy, recipe.names, recipe.spec)
                expected, told = numbered(numbers(layer))
            for index, other in enumerate(others):
                output, found = numbered(numbers(other))
                same[index] &= found == told and agrees(output, expected, x)
    return same
