"""BlockStack: segments, nesting, per-layer policies: the same bits, less held."""

import functools

import pytest
import torch
from families import FAMILIES, POLICIES, held_bytes, make_input, results, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from backfuse import BlockSpec, BlockStack, kept_bytes

NAMED = ["keep", "selective", "lean", "full"]


def make_stack(spec, num_layers, policy="keep", segments=None, dtype=torch.float32):
    torch.manual_seed(0)
    stack = BlockStack(spec, num_layers, policy, segments=segments, chunk_size=64, dtype=dtype)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return stack


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "segments", [2, 5, 7, (1, 4), (2, 3), ((1, 2), 2), ((2, 2, 1),), (((1, 1), 2), 1)]
)
def test_segments_give_the_same_bits(family, segments, poisoned_empty):
    spec = FAMILIES[family]
    stack = make_stack(spec, 5)
    x, grad = make_input(spec)
    expected = results(stack, x, grad)
    mixed = ["keep", "full", "lean", {"mid": "recompute"}, "selective"]
    for policy in (*NAMED, mixed):
        stack.set_policy(policy, segments)
        assert same_bits(results(stack, x, grad), expected), policy


@pytest.mark.parametrize(
    "frozen",
    [lambda i, n: i < 2, lambda i, n: i >= 2, lambda i, n: i != 1, lambda i, n: "mlp" in n],
)
@pytest.mark.parametrize("input_grad", [True, False])
def test_frozen_layers_in_segments(frozen, input_grad):
    spec = FAMILIES["llama"]
    x, grad = make_input(spec)
    everything = results(make_stack(spec, 4), x, grad)
    x, grad = make_input(spec, requires_grad=input_grad)
    for policy in NAMED:
        stack = make_stack(spec, 4, policy, (1, (2, 1)))
        for i, layer in enumerate(stack.layers):
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(not frozen(i, name))
        got = results(stack, x, grad)
        wanted = [True, input_grad, *(p.requires_grad for p in stack.parameters())]
        for value, full, want in zip(got, everything, wanted, strict=True):
            assert (value is not None) == want
            assert not want or torch.equal(value, full)


def test_policies_that_drop_x_make_segments():
    spec = FAMILIES["llama"]
    drop = {"x": "recompute", "preact": "recompute"}
    stack = make_stack(spec, 5, ["keep", drop, drop, "full", drop])
    assert stack.segments == [3, 2]
    x, grad = make_input(spec)
    assert same_bits(results(stack, x, grad), results(make_stack(spec, 5), x, grad))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("policy", NAMED)
@pytest.mark.parametrize("segments", [None, 2, ((1, 2), 1)])
def test_held_bytes_are_predicted(family, policy, segments):
    spec = FAMILIES[family]
    stack = make_stack(spec, 4, policy, segments)
    x, _ = make_input(spec)
    angles = stack_angles(spec)
    held, _ = held_bytes(
        lambda: stack(x, position_embeddings=angles), exclude=[*stack.parameters(), *(angles or ())]
    )
    costs = kept_bytes(spec, policy, batch_size=2, seq_len=70)
    firsts = {None: 4, 2: 2}.get(segments, 2)
    assert held == 4 * sum(costs.values()) - (4 - firsts) * costs["x"]


def stack_angles(spec):
    from backfuse import rope_cos_sin

    if spec.rope is None:
        return None
    return rope_cos_sin(torch.arange(70)[None], spec.rotary_dim, layout=spec.rope)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_tree_of_segments_and_any_policies(data):
    spec = BlockSpec(8, 8, 2, residual_dropout=0.1)

    def trees(count):
        """A random way to cut `count` layers."""
        if count == 1 or data.draw(st.booleans()):
            return count
        cut = data.draw(st.integers(1, count - 1))
        return (trees(cut), trees(count - cut))

    num_layers = data.draw(st.integers(1, 6))
    segments = trees(num_layers)
    policies = [data.draw(st.sampled_from(POLICIES)) for _ in range(num_layers)]
    x, grad = make_input(spec, seq_len=5)
    stack = make_stack(spec, num_layers, policies, (segments,))
    assert same_bits(results(stack, x, grad), results(make_stack(spec, num_layers), x, grad))


def test_a_refused_change_changes_nothing():
    stack = make_stack(FAMILIES["llama"], 4, "lean", 2)
    with pytest.raises(ValueError, match="segments hold 5 layers, expected num_layers"):
        stack.set_policy("full", (4, 1))
    assert stack.segments == [2, 2] and all(
        layer.policy.keeps("attn_out") for layer in stack.layers
    )


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"num_layers": 0}, ValueError, "num_layers is 0"),
        ({"policy": ["keep"] * 3}, ValueError, "policy holds 3 policies, expected one a layer"),
        ({"policy": {"qkv": "fp8"}}, ValueError, "action of qkv is 'fp8'"),
        ({"policy": [{"x": "recompute"}] * 4}, ValueError, "first layer's policy recomputes x"),
        ({"segments": 0}, ValueError, "segments hold the size 0"),
        ({"segments": "2"}, TypeError, "segments hold '2'"),
        ({"segments": (2, ())}, TypeError, r"segments hold \(\)"),
        ({"segments": (2, 2.0)}, TypeError, "segments hold 2.0"),
        ({"segments": (2, 3)}, ValueError, "segments hold 5 layers"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        BlockStack(**{"spec": FAMILIES["llama"], "num_layers": 4, **arguments})


@pytest.mark.parametrize("segments", [None, 2, ((1, 2), 1)])
def test_nothing_waits_for_the_garbage_collector(segments):
    """A reference cycle in a pass would hold kept tensors until a collection, and cost the peak."""
    import gc
    import weakref

    stack = make_stack(FAMILIES["gemma2"], 4, "keep", segments)
    x, grad = make_input(stack.spec)
    kept = []

    def pack(tensor):
        kept.append(weakref.ref(tensor.untyped_storage()))
        return tensor

    own = {p.untyped_storage().data_ptr() for p in stack.parameters()}
    own.add(x.untyped_storage().data_ptr())
    gc.collect()
    gc.disable()
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = stack(x)
        y.backward(grad)
        del y
        alive = [ref() for ref in kept if ref() is not None]
        assert not [s for s in alive if s.data_ptr() not in own]
    finally:
        gc.enable()


@pytest.mark.parametrize("segments", [4, ((2, 1), 1), (1, (2, 1))])
@pytest.mark.parametrize("policy", ["keep", "full"])
def test_frozen_first_layers_cost_nothing_in_a_segment(segments, policy):
    from torch.utils.flop_counter import FlopCounterMode

    spec = FAMILIES["llama"]
    costs = []
    for cut in (None, segments):
        stack = make_stack(spec, 4, policy, cut)
        for name, parameter in stack.named_parameters():
            parameter.requires_grad_(name.startswith("layers.3"))
        x, grad = make_input(spec, requires_grad=False)
        held, y = held_bytes(functools.partial(stack, x), exclude=list(stack.parameters()))
        with FlopCounterMode(display=False) as counter:
            y.backward(grad)
        costs.append((held, counter.get_total_flops()))
    assert costs[0] == costs[1]


def test_layers_with_hooks_are_called():
    """Hooks run, and the bits stay; with other layers in a segment, a layer cannot be called."""
    spec = FAMILIES["llama"]
    stack = make_stack(spec, 3, "lean", (1, 2))
    x, grad = make_input(spec)
    expected = results(stack, x, grad)
    seen = []
    handle = stack.layers[0].register_forward_hook(lambda *_: seen.append("first"))
    assert same_bits(results(stack, x, grad), expected)
    assert seen == ["first"]
    stack.layers[2].register_full_backward_hook(lambda *_: seen.append("last"))
    with pytest.raises(ValueError, match=r"layers.2 has hooks .* segment of layers 1 to 2"):
        stack(x)
    stack.set_policy("lean")
    assert same_bits(results(stack, x, grad), expected)
    assert seen == ["first", "first", "last"]
    handle.remove()
    assert same_bits(results(stack, x, grad), expected)
    assert seen == ["first", "first", "last", "last"]


def test_a_layer_that_is_wrapped_is_named():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    x, _ = make_input(FAMILIES["llama"])
    for wrap in (checkpoint_wrapper, torch.compile):
        stack = make_stack(FAMILIES["llama"], 2)
        stack.layers[1] = wrap(stack.layers[1])
        kind = type(stack.layers[1]).__name__
        with pytest.raises(TypeError, match=rf"layers.1 is a {kind}, .* layer.compile\(\)"):
            stack(x)
