"""A guess held against the layer itself: only what gives the layer's own numbers is believed.

The stand-in's weights and input are random and of size 1, in fp32. A part in another place, another
activation or a factor that was overlooked moves its output by far more than rounding does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from backfuse.blocks.function import attention, block
from backfuse.blocks.policy import KEEP
from backfuse.blocks.spec import BlockSpec

from .recognise import (
    Guess,
    NotUnderstood,
    Reading,
    configuration,
    head_dim,
    residual_width,
    rotary_dims,
)
from .stand_in import (
    ANGLES,
    MASK,
    Observation,
    angles,
    forward_arguments,
    random_input,
    run,
    stand_in,
    visible,
)

#: Largest difference that counts as rounding, as a share of what the layer adds to its input.
ROUNDING = 5e-5

#: Attention implementations of transformers whose masks are tensors of what each token sees.
IMPLEMENTATIONS = (None, "sdpa", "eager")


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a layer is run by a block's functions.

    Attributes:
        spec: what it is.
        names: the spec's parameters -> the layer's, by path.
        types: path of each module that holds a parameter and is no projection -> its type.
        arguments: of the layer's forward, in their order.
        extra: how many Nones it returns after its output; None: it returns a tensor.
        unmasked: whether a call without a mask is that of the spec.
        implementation: of attention, as its configuration names it.
        rest: of a layer whose attention half alone is run: paths of the norm behind it, and of
            what reads that; None for a whole block.
    """

    spec: BlockSpec
    names: dict[str, str]
    types: dict[str, type[nn.Module]]
    arguments: tuple[str, ...]
    extra: int | None
    unmasked: bool
    implementation: str | None
    rest: tuple[str, str] | None = None

    def same(self, other: Recipe) -> bool:
        """Whether another layer is run in the same way."""
        return all(
            getattr(self, field.name) == getattr(other, field.name) for field in fields(self)
        )


def implementation(layer: nn.Module) -> str | None:
    """What a layer's configuration says computes its attention."""
    return getattr(configuration(layer), "_attn_implementation", None)


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


def run_guess(
    layer: nn.Module, guess: Guess, x: Tensor, position: Any, mask: Tensor | None
) -> Tensor:
    """What a guess gives on a stand-in's weights."""
    own = dict(layer.named_parameters())
    weights = {name: own[path] for name, path in guess.names.items()}
    given: dict[str, Any] = {ANGLES: position if guess.spec.rope else None, MASK: mask}
    if guess.rest is None:
        return block(x, weights, guess.spec, KEEP, **given)
    mid = attention(x, weights, guess.spec, KEEP, **given)
    norm, ffn = guess.rest
    return mid + first_tensor(layer.get_submodule(ffn)(layer.get_submodule(norm)(mid)))


def first_tensor(output: Any) -> Tensor:
    """What a module gives, or the first of it."""
    first = output[0] if isinstance(output, tuple) else output
    assert isinstance(first, Tensor)
    return first


def _agrees(ours: Tensor, theirs: Tensor, x: Tensor) -> bool:
    scale = (theirs - x).abs().max().item()
    return (ours - theirs).abs().max().item() <= ROUNDING * scale


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
    used = implementation(layer)
    if used not in IMPLEMENTATIONS:
        raise NotUnderstood(
            f"its attention is {used!r}, expected 'sdpa' or 'eager' (model.set_attn_implementation)"
        )
    arguments, needed = forward_arguments(original)
    if not arguments or (others := needed - {arguments[0], MASK, ANGLES}):
        raise NotUnderstood(
            f"its forward takes {', '.join(sorted(others)) if arguments else 'nothing'}"
        )
    width = residual_width(layer)
    copy = stand_in(layer, original)
    causal = any(getattr(module, "is_causal", False) for module in copy.modules())
    mask = visible(bool(causal)) if MASK in arguments else None
    x = random_input(width)
    for seen, position, rotary_dim, layouts in _observations(copy, x, arguments, mask):
        output, extra = only_output(seen.output)
        reading = Reading(copy, seen)
        for layout in layouts:
            for guess in reading.guesses(rotary_dim if layout else None, layout):
                with torch.no_grad():
                    ours = run_guess(copy, guess, x, position, mask)
                if not _agrees(ours, output, x):
                    continue
                unmasked = mask is None or _unmasked(copy, guess, x, position)
                return _recipe(layer, guess, arguments, extra, unmasked)
    raise NotUnderstood("what was made of its parts gives other numbers than it does")


def _unmasked(layer: nn.Module, guess: Guess, x: Tensor, position: Any) -> bool:
    """Whether the layer without a mask does what its spec says."""
    given = {} if position is None else {ANGLES: position}
    output, _ = only_output(run(layer, x, **{MASK: None}, **given).output)
    spec = guess.spec.replace(sliding_window=None)
    plain = Guess(spec, guess.names, guess.rest)
    with torch.no_grad():
        return _agrees(run_guess(layer, plain, x, position, None), output, x)


def _recipe(
    layer: nn.Module, guess: Guess, arguments: tuple[str, ...], extra: int | None, unmasked: bool
) -> Recipe:
    places = {path.rpartition(".")[0]: name for name, path in guess.names.items()}
    types = {
        place: type(layer.get_submodule(place))
        for place, name in places.items()
        if "_proj." not in name
    }
    return Recipe(
        guess.spec, guess.names, types, arguments, extra, unmasked, implementation(layer),
        guess.rest,
    )  # fmt: skip


def alike(layer: nn.Module, original: type[nn.Module]) -> object:
    """A key that layers share which differ in their weights' values and their number at most."""
    seen: list[object] = [original]
    for path, module in layer.named_modules():
        facts = tuple(
            (name, value)
            for name, value in sorted(vars(module).items())
            if isinstance(value, int | float | str | None)
            and not name.startswith("_")
            and name not in ("training", "gradient_checkpointing")
            and not name.endswith(("idx", "index", "layer_id"))
        )
        shapes = tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False))
        seen.append((path, type(module) if path else original, facts, shapes))
    return tuple(seen)
