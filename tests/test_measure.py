"""Bytes, GEMMs and seconds are measured right; PyTorch's own ways hold what they say."""

import gc
import shutil
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from torch import nn
from torch.utils.checkpoint import checkpoint

import backfuse
from backfuse import BlockSpec
from backfuse.bench import measure, plain, ways

B, T, H, FF, HEADS, KV = 2, 24, 32, 80, 4, 2
TOKENS = B * T
SPEC = BlockSpec(H, FF, HEADS, KV)
EAGER_WAYS = ("eager", "checkpoint", "sac-attention", "sac-every-2nd-mm")

has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)


def plain_blocks(count=2, dtype=torch.float32):
    blocks = [plain.PlainBlock(SPEC, dtype=dtype) for _ in range(count)]
    for parameter in nn.ModuleList(blocks).parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return blocks


def rotary(dtype=torch.float32):
    return plain.rotary_tables(T, H // HEADS, dtype=dtype)


def run_in(way, layers):
    """A function of hidden states and tables."""
    return plain.PlainStack(layers, ways.make_way(way))


def gradients(run, layers, x, tables):
    x = x.clone().requires_grad_()
    for layer in layers:
        layer.zero_grad()
    run(x, tables).sin().sum().backward()
    return [x.grad, *(p.grad.clone() for layer in layers for p in layer.parameters())]


# Bytes


class Toy(nn.Module):
    """silu(x W1) W2: keeps x, x W1 and silu(x W1)."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(H, FF, bias=False)
        self.down = nn.Linear(FF, H, bias=False)

    def forward(self, x, position_embeddings=None):
        return self.down(F.silu(self.up(x)))


class SavesTwo(torch.autograd.Function):
    """Saves a view and something that no output shares."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x[:1], x.new_zeros(7))
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        return dy * 2


def test_kept_bytes_of_eager_code():
    x = torch.randn(TOKENS, H)
    assert measure.kept_bytes_measured(Toy(), x) == 4 * TOKENS * (H + 2 * FF)
    assert measure.kept_bytes_measured(Toy().bfloat16(), x.bfloat16()) == 2 * TOKENS * (H + 2 * FF)


def test_kept_bytes_leave_out_what_frozen_weights_do_not_want():
    toy = Toy()
    toy.up.weight.requires_grad_(False)
    # Without a gradient for x and W1, only silu(x W1) is wanted.
    assert measure.kept_bytes_measured(toy, torch.randn(TOKENS, H)) == 4 * TOKENS * FF


def test_kept_bytes_under_checkpoint():
    toy = Toy()
    x = torch.randn(TOKENS, H)

    def call(x):
        return checkpoint(toy, x, use_reentrant=False)

    assert measure.kept_bytes_measured(call, x) == 4 * TOKENS * H
    # The allocator also sees the state of the random generator.
    state = torch.get_rng_state().nbytes
    assert measure.held_bytes(call, x) == 4 * TOKENS * H + state


def test_kept_bytes_of_an_autograd_function():
    x = torch.randn(TOKENS, H, requires_grad=True)
    # The view keeps all of its base.
    assert measure.kept_bytes_measured(SavesTwo.apply, x) == 4 * (TOKENS * H + 7)


def test_kept_bytes_do_not_count_what_was_there_before():
    weight = torch.randn(TOKENS, H)
    x = torch.randn(TOKENS, H, requires_grad=True)
    assert measure.kept_bytes_measured(lambda x: x * weight, x) == 0


def test_kept_bytes_count_results_written_in_place():
    x = torch.randn(TOKENS, H, requires_grad=True)
    assert measure.kept_bytes_measured(lambda x: (x * 2).sigmoid_(), x) == 4 * TOKENS * H


def test_kept_bytes_need_a_graph():
    with pytest.raises(ValueError, match="no graph"):
        measure.kept_bytes_measured(lambda x: x * 2, torch.randn(3))


@pytest.mark.parametrize("way", EAGER_WAYS)
def test_both_ways_of_counting_agree(way):
    run, tables = run_in(way, plain_blocks()), rotary()
    x = torch.randn(B, T, H, requires_grad=True)
    kept = measure.kept_bytes_measured(lambda x: run(x, tables), x)
    states = 0 if way == "eager" else 2 * torch.get_rng_state().nbytes
    assert measure.held_bytes(lambda x: run(x, tables), x) == kept + states


def test_kept_bytes_of_backfuse_are_the_predicted_ones():
    for policy in ("keep", "selective", "lean", "full"):
        stack = backfuse.BlockStack(SPEC, 2, policy=policy)
        tables = rotary()
        x = torch.randn(B, T, H, requires_grad=True)
        predicted = backfuse.kept_bytes(SPEC, policy, batch_size=B, seq_len=T)
        measured = measure.kept_bytes_measured(
            lambda x, stack=stack, tables=tables: stack(x, position_embeddings=tables), x
        )
        assert measured == 2 * sum(predicted.values()), policy


def test_allocator_trace():
    def call():
        first = torch.ones(1_000_000)
        second = torch.ones(500_000)
        del first
        third = torch.ones(250_000)
        return second, third

    trace = measure.allocator_trace(call)
    assert (trace.peak_bytes, trace.live_bytes) == (6_000_000, 3_000_000)
    levels = [level for _, level in trace.timeline]
    assert levels == [4_000_000, 6_000_000, 2_000_000, 3_000_000]
    assert [ms for ms, _ in trace.timeline] == sorted(ms for ms, _ in trace.timeline)


def test_allocator_trace_leaves_out_what_was_there():
    there = torch.ones(1_000_000)
    trace = measure.allocator_trace(there.neg)
    assert (trace.peak_bytes, trace.live_bytes) == (4_000_000, 4_000_000)


def test_allocator_trace_is_silent(capfd):
    measure.allocator_trace(lambda: torch.ones(10))
    assert capfd.readouterr() == ("", "")


def test_allocator_trace_survives_an_error():
    with pytest.raises(ZeroDivisionError):
        measure.allocator_trace(lambda: 1 / 0)
    assert measure.allocator_trace(lambda: torch.ones(10)).live_bytes == 40


def test_count_flops_sees_attention():
    q = torch.randn(1, 2, 16, 8, requires_grad=True)
    flops = measure.count_flops(lambda: F.scaled_dot_product_attention(q, q, q, is_causal=True))
    assert flops == 2 * 2 * (2 * 16 * 16 * 8)


@pytest.mark.parametrize(
    ("way", "gemms"),
    # Seven projections: 7 forward, 14 backward. A replay stops before the last one, and leaves out
    # those that are saved.
    [("eager", 21), ("checkpoint", 27), ("sac-attention", 27), ("sac-every-2nd-mm", 24)],
)
def test_gemms_are_those_that_run(way, gemms):
    layers = plain_blocks(1)
    run, tables, x = run_in(way, layers), rotary(), torch.randn(B, T, H, requires_grad=True)
    with measure.GemmCounter() as counter:
        run(x, tables).sum().backward()
    assert counter.gemms == gemms
    assert counter.flops == measure.count_flops(lambda: run(x, tables).sum().backward())


# Seconds


def test_interleaved_reverses_every_second_round():
    order = list(measure.interleaved("abc", 3))
    assert order == [
        *((0, name) for name in "abc"),
        *((1, name) for name in "cba"),
        *((2, name) for name in "abc"),
    ]


def test_spread():
    spread = measure.Spread.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (spread.median, spread.p20, spread.p80) == (3.5, 2.0, 5.0)
    assert measure.Spread.of([2.0]) == measure.Spread(2.0, 2.0, 2.0)
    with pytest.raises(ValueError, match="values is empty"):
        measure.Spread.of([])


def test_seconds_leave_the_collector_as_it_was():
    assert measure.seconds(lambda: None) >= 0
    assert gc.isenabled()
    gc.disable()
    try:
        measure.seconds(lambda: None)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_laps():
    calls = []

    def step(mark):
        mark()
        calls.append(1)
        mark()
        mark()

    found = measure.laps(step, DEVICE, repeats=3)
    assert len(calls) == 3
    assert [len(parts) for parts in found] == [2, 2, 2]
    assert all(seconds >= 0 for parts in found for seconds in parts)


def test_kernel_seconds_are_of_one_call():
    pause = [0.001, 0.03, *[0.001] * 200]
    found = measure.kernel_seconds(lambda: time.sleep(pause.pop(0)), "cpu")
    assert 0.001 <= found < 0.03
    assert 100 < len(pause) < 200


# Plain blocks, and PyTorch's ways to run them


def test_plain_block_is_hugging_faces_layer():
    transformers = pytest.importorskip("transformers")
    layers, name = plain.make_layers(SPEC, 1)
    assert name == "LlamaDecoderLayer"
    assert isinstance(layers[0], transformers.models.llama.modeling_llama.LlamaDecoderLayer)
    ours = plain_blocks(1)[0]
    ours.load_state_dict(layers[0].state_dict())
    assert list(ours.state_dict()) == list(layers[0].state_dict())
    x = torch.randn(B, T, H)
    theirs = gradients(run_in("eager", layers), layers, x, rotary())
    for mine, other in zip(
        gradients(run_in("eager", [ours]), [ours], x, rotary()), theirs, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_plain_block_interchanges_with_backfuse():
    theirs = plain_blocks(1, torch.float64)[0]
    fused = backfuse.TransformerBlock(SPEC, dtype=torch.float64)
    fused.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(fused.state_dict())
    x, tables = torch.randn(B, T, H, dtype=torch.float64), rotary(torch.float64)
    out = fused(x, position_embeddings=tables)
    torch.testing.assert_close(out, theirs(x, position_embeddings=tables))


def test_rotary_tables_are_backfuses():
    cos, sin = backfuse.rope_cos_sin(torch.arange(T)[None], H // HEADS)
    mine = plain.rotary_tables(T, H // HEADS)
    torch.testing.assert_close(mine[0], cos)
    torch.testing.assert_close(mine[1], sin)


@pytest.mark.parametrize("way", ["checkpoint", "sac-attention", "sac-every-2nd-mm"])
def test_checkpoints_find_plains_gradients_bitwise(way):
    layers, x = plain_blocks(), torch.randn(B, T, H)
    expected = gradients(run_in("eager", layers), layers, x, rotary())
    found = gradients(run_in(way, layers), layers, x, rotary())
    assert all(map(torch.equal, expected, found))


@pytest.mark.parametrize(
    ("way", "per_token"),
    [
        ("checkpoint", H),
        # x, the attention's output and its log-sum-exp
        ("sac-attention", 2 * H + HEADS),
        # and q, v, gate and down: of the seven matmuls the first, third, fifth and seventh
        ("sac-every-2nd-mm", 2 * H + HEADS + H + H * KV // HEADS + FF + H),
    ],
)
def test_checkpoints_hold_what_they_say(way, per_token):
    run, tables = run_in(way, plain_blocks()), rotary()
    x = torch.randn(B, T, H, requires_grad=True)
    held = measure.kept_bytes_measured(lambda x: run(x, tables), x)
    assert held == 2 * 4 * TOKENS * per_token


def test_every_budget_has_its_own_code_object(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    layers, x = plain_blocks(), torch.randn(B, T, H)
    expected = run_in("eager", layers)(x, rotary())
    names = [name for name in ways.WAYS if name.startswith("compile")]
    for name in names:
        assert torch.equal(run_in(name, layers)(x, rotary()), expected)
    codes = [function.__code__ for function in compiled]
    assert len(set(codes)) == len(codes) == len(names)


@pytest.mark.slow
@has_compiler
def test_budgets_hold_different_bytes_in_one_process():
    layers, x = [Toy(), Toy()], torch.randn(TOKENS, H)
    expected = gradients(run_in("eager", layers), layers, x, rotary())
    held = []
    for way in ("compile", "compile-0.0"):
        run = run_in(way, layers)
        found = gradients(run, layers, x, rotary())
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        fresh = x.clone().requires_grad_()
        held.append(measure.held_bytes(lambda x, run=run: run(x, rotary()), fresh))
    assert held[1] == 2 * 4 * TOKENS * H
    assert held[0] >= held[1] + 2 * 4 * TOKENS * FF


@pytest.mark.parametrize("way", ["eager", "sac-every-2nd-mm"])
def test_profiler_counts_what_is_asked_for(way):
    """It counts in compiled code, where a dispatch mode is blind; here both can look."""
    run, tables = run_in(way, plain_blocks(1)), rotary()
    x = torch.randn(B, T, H, requires_grad=True)

    def step():
        run(x, tables).sum().backward()

    trace = measure.allocator_trace(step)
    counted = measure.count_flops(step)
    assert trace.flops >= counted
    if way == "eager":
        assert (trace.flops, trace.gemms) == (counted, 21)
