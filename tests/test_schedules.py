"""Schedules of segments, held against the passes that `run.py` really makes over them."""

import math
import weakref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from backfuse.blocks.planner.schedules import inputs_held, recursive, replays, sqrt, uniform
from backfuse.blocks.policy import KEEP
from backfuse.blocks.run import _differentiate
from backfuse.blocks.stack import _tree, layers_in, parse_segments


class Input:
    """Stands for a layer's input, and knows whose."""

    alive: weakref.WeakSet = weakref.WeakSet()

    def __init__(self, layer):
        self.layer = layer
        Input.alive.add(self)


class Pass:
    """Stands for a layer's passes: notes what is run, and how many inputs there are meanwhile."""

    def __init__(self, layer, log):
        self.layer, self.log = layer, log

    def output(self, x):
        assert x.layer == self.layer
        self.log["replays"] += 1
        return Input(self.layer + 1)

    def backward(self, x, dz):
        assert x.layer == self.layer and dz == self.layer + 1
        self.log["held"] = max(self.log["held"], len(Input.alive))
        return self.layer, []


def run(segments):
    """Replays and most inputs at once of a backward pass over a stack's segments."""
    log = {"replays": 0, "held": 0}
    passes = [Pass(layer, log) for layer in range(layers_in(segments))]
    starts = [sum(map(layers_in, segments[:i])) for i in range(len(segments))]
    kept = {start: Input(start) for start in starts}
    dz = len(passes)
    for start, part in reversed(list(zip(starts, segments, strict=True))):
        dz = _differentiate(_tree(part, start), passes, kept.pop(start), dz, {})
    assert dz == 0 and not Input.alive
    return log["replays"], log["held"]


tree = st.recursive(st.integers(1, 5), lambda inner: st.lists(inner, min_size=1, max_size=4),
                    max_leaves=8)  # fmt: skip


@settings(max_examples=100, deadline=None)
@given(st.lists(tree, min_size=1, max_size=4))
def test_costs_are_those_of_the_passes(segments):
    assert run(segments) == (replays(segments), inputs_held(segments))


@pytest.mark.parametrize("schedule", [sqrt, recursive, lambda n: uniform(n, 3)])
def test_every_layer_is_there(schedule):
    for layers in range(1, 40):
        segments = schedule(layers)
        assert layers_in(segments) == layers
        assert parse_segments(segments, [KEEP] * layers) == segments  # a stack takes it
        assert run(segments) == (replays(segments), inputs_held(segments))


def test_the_table_of_the_module():
    assert uniform(12, 4) == [4, 4, 4] and uniform(10, 4) == [4, 4, 2]
    assert (inputs_held(uniform(12, 4)), replays(uniform(12, 4))) == (3 + 4 - 1, 12 - 3)
    assert inputs_held(uniform(7, 1)) == 7 and replays(uniform(7, 1)) == 0
    assert inputs_held(sqrt(64)) == 2 * 8 - 1 and replays(sqrt(64)) == 64 - 8
    assert recursive(4) == [((1, 1), (1, 1))]
    for power in range(8):
        assert inputs_held(recursive(2**power)) == 1 + power
        assert replays(recursive(2**power)) == power * 2**power // 2


def test_sqrt_is_near_the_best_uniform_schedule():
    for layers in (1, 2, 10, 32, 80, 126):
        best = min(inputs_held(uniform(layers, every)) for every in range(1, layers + 1))
        assert best <= inputs_held(sqrt(layers)) <= best + 1 <= 2 * math.sqrt(layers) + 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: uniform(0, 2), "num_layers is 0"),
        (lambda: uniform(4, 0), "every is 0, expected at least 1"),
        (lambda: sqrt(0), "num_layers is 0"),
        (lambda: recursive(-1), "num_layers is -1"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()
