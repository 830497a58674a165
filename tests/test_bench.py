"""Bytes and seconds are measured right, the rivals are what they say, the benchmark runs."""

import dataclasses
import gc
import shutil

import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import backfuse
from backfuse import cli
from backfuse.bench import block, block_results, measure, options, rivals

B, T, H, FF, HEADS, KV = 2, 24, 32, 80, 4, 2
TOKENS = B * T
TINY = ["--layers", "2", "--hidden-size", "32", "--intermediate-size", "80", "--heads", "4"]
TINY += ["--batch-size", "2", "--seq-len", "24", "--rounds", "2", "--device", "cpu"]

has_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)


def plain_blocks(count=2, dtype=torch.float32):
    blocks = [rivals.PlainBlock(H, FF, HEADS, KV, dtype=dtype) for _ in range(count)]
    for parameter in nn.ModuleList(blocks).parameters():
        nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.1)
    return blocks


def rotary(dtype=torch.float32):
    return rivals.rotary_tables(T, H // HEADS, dtype=dtype)


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


@pytest.mark.parametrize("way", [name for name in rivals.RIVALS if not name.startswith("compile")])
def test_both_ways_of_counting_agree(way):
    run, tables = rivals.RIVALS[way](plain_blocks()), rotary()
    x = torch.randn(B, T, H, requires_grad=True)
    kept = measure.kept_bytes_measured(lambda x: run(x, tables), x)
    states = 0 if way == "plain" else 2 * torch.get_rng_state().nbytes
    assert measure.held_bytes(lambda x: run(x, tables), x) == kept + states


def test_kept_bytes_of_backfuse_are_the_predicted_ones():
    spec = backfuse.BlockSpec(H, FF, HEADS, KV)
    for policy in block_results.POLICIES:
        stack = backfuse.BlockStack(spec, 2, policy=policy)
        tables = rotary()
        x = torch.randn(B, T, H, requires_grad=True)
        predicted = backfuse.kept_bytes(spec, policy, batch_size=B, seq_len=T)
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
    assert trace == measure.Allocations(peak_bytes=6_000_000, live_bytes=3_000_000)


def test_allocator_trace_leaves_out_what_was_there():
    there = torch.ones(1_000_000)
    trace = measure.allocator_trace(there.neg)
    assert trace == measure.Allocations(peak_bytes=4_000_000, live_bytes=4_000_000)


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


# Rivals


def test_plain_block_is_hugging_faces_layer():
    transformers = pytest.importorskip("transformers")
    layers, name = rivals.llama_layers(1, H, FF, HEADS, KV)
    assert name == "LlamaDecoderLayer"
    assert isinstance(layers[0], transformers.models.llama.modeling_llama.LlamaDecoderLayer)
    ours = plain_blocks(1)[0]
    ours.load_state_dict(layers[0].state_dict())
    assert list(ours.state_dict()) == list(layers[0].state_dict())
    x = torch.randn(B, T, H)
    theirs = gradients(rivals.run_plain(layers), layers, x, rotary())
    for mine, other in zip(
        gradients(rivals.run_plain([ours]), [ours], x, rotary()), theirs, strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


def test_plain_block_interchanges_with_backfuse():
    plain = plain_blocks(1, torch.float64)[0]
    spec = backfuse.BlockSpec(H, FF, HEADS, KV)
    fused = backfuse.TransformerBlock(spec, dtype=torch.float64)
    fused.load_state_dict(plain.state_dict())
    plain.load_state_dict(fused.state_dict())
    x, tables = torch.randn(B, T, H, dtype=torch.float64), rotary(torch.float64)
    out = fused(x, position_embeddings=tables)
    torch.testing.assert_close(out, plain(x, position_embeddings=tables))


def test_rotary_tables_are_backfuses():
    cos, sin = backfuse.rope_cos_sin(torch.arange(T)[None], H // HEADS)
    mine = rivals.rotary_tables(T, H // HEADS)
    torch.testing.assert_close(mine[0], cos)
    torch.testing.assert_close(mine[1], sin)


@pytest.mark.parametrize("way", ["checkpoint", "sac-attention", "sac-every-2nd-mm"])
def test_checkpoints_find_plains_gradients_bitwise(way):
    layers, x = plain_blocks(), torch.randn(B, T, H)
    expected = gradients(rivals.run_plain(layers), layers, x, rotary())
    found = gradients(rivals.RIVALS[way](layers), layers, x, rotary())
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
    run, tables = rivals.RIVALS[way](plain_blocks()), rotary()
    x = torch.randn(B, T, H, requires_grad=True)
    held = measure.kept_bytes_measured(lambda x: run(x, tables), x)
    assert held == 2 * 4 * TOKENS * per_token


def test_every_budget_has_its_own_code_object(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: compiled.append(f) or f)
    layers, x = plain_blocks(), torch.randn(B, T, H)
    expected = rivals.run_plain(layers)(x, rotary())
    for budget in rivals.BUDGETS:
        assert torch.equal(rivals.run_compiled(layers, budget)(x, rotary()), expected)
    assert len({id(function.__code__) for function in compiled}) == len(rivals.BUDGETS)


@pytest.mark.slow
@has_compiler
def test_budgets_hold_different_bytes_in_one_process():
    layers, x = [Toy(), Toy()], torch.randn(TOKENS, H)
    expected = gradients(rivals.run_plain(layers), layers, x, rotary())
    held = []
    for budget in (1.0, 0.0):
        run = rivals.run_compiled(layers, budget)
        found = gradients(run, layers, x, rotary())
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
        fresh = x.clone().requires_grad_()
        held.append(measure.held_bytes(lambda x, run=run: run(x, rotary()), fresh))
    assert held[1] == 2 * 4 * TOKENS * H
    assert held[0] >= held[1] + 2 * 4 * TOKENS * FF


def test_missing_compiler_is_named(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert rivals.missing("checkpoint") is None
    assert "C++ compiler" in rivals.missing("compile-0.5")
    setup = block_results.Setup(2, H, FF, HEADS, device="cpu", providers=("compile-0.5",))
    results = block_results.Results(setup)
    assert [name for name, _ in block.build(setup, results)] == ["plain"]
    assert any(note.startswith("compile-0.5 left out") for note in results.notes)


# The command


def test_bench_block(tmp_path, capsys):
    csv, plot = tmp_path / "new" / "table.csv", tmp_path / "picture.png"
    chosen = ["--provider", "checkpoint,sac-attention,backfuse", "--policy", "keep,full"]
    outputs = ["--csv", str(csv), "--plot", str(plot)]
    assert cli.main(["bench", "block", *TINY, *chosen, *outputs]) == 0
    printed = capsys.readouterr().out
    frame = pd.read_csv(csv)
    names = ["plain", "checkpoint", "sac-attention", "backfuse keep", "backfuse full"]
    assert list(frame["provider"]) == names
    assert all(name in printed for name in names)
    assert (frame["gradient_error"] < 1e-4).all()
    assert frame["time_vs_plain"].iloc[0] == 1
    assert (frame["peak_mib"] > 0).all()
    spec = backfuse.BlockSpec(H, FF, HEADS)
    for policy in ("keep", "full"):
        kept = backfuse.kept_bytes(spec, policy, batch_size=2, seq_len=24)
        row = frame.set_index("provider").loc[f"backfuse {policy}"]
        assert row["held_kib_per_token_layer"] == pytest.approx(sum(kept.values()) / 48 / 1024)
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_interrupted_bench_prints_what_is_done(capsys, monkeypatch):
    calls = []

    def interrupted(call, device):
        calls.append(call)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return 1.0

    monkeypatch.setattr(measure, "seconds", interrupted)
    assert cli.main(["bench", "block", *TINY, "--provider", "checkpoint"]) == 130
    printed = capsys.readouterr().out
    assert "checkpoint" in printed and "1.000" in printed
    assert "interrupted" in printed


def test_wrong_gradients_are_noted(monkeypatch):
    def half(layers):
        run = rivals.run_plain(layers)
        return lambda x, tables: run(x, tables) / 2

    monkeypatch.setitem(rivals.RIVALS, "checkpoint", half)
    setup = block_results.Setup(
        1, H, FF, HEADS, seq_len=8, rounds=1, device="cpu", providers=("checkpoint",)
    )
    results = block.bench(setup)
    assert "checkpoint does NOT find plain's gradients" in results.notes


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--provider", "checkpiont"], ["provider", "'checkpiont'", "did you mean 'checkpoint'"]),
        (["--policy", "ful"], ["policy", "did you mean 'full'"]),
        (["--heads", "5"], ["hidden_size is 32", "multiple of 2 * heads = 10"]),
        (["--kv-heads", "3"], ["kv_heads is 3", "heads = 4"]),
        (["--layers", "0"], ["layers is 0"]),
        (["--rounds", "-1"], ["rounds is -1"]),
        (["--threads", "0"], ["threads is 0"]),
        (["--dtype", "fp31"], ["dtype", "did you mean 'fp32'"]),
        (["--dtype", "FP32"], ["dtype is 'FP32'", "did you mean 'fp32'"]),
        (["--seed", "-1"], ["seed is -1, expected 0 to"]),
        (["--seed", str(2**64 - 1)], [f"seed is {2**64 - 1}, expected 0 to"]),
        (["--seed", str(2**64)], [f"seed is {2**64}, expected 0 to"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--csv", "/dev/null/table.csv"], ["cannot write to /dev/null"]),
    ],
)
def test_bad_options_are_one_line_and_exit_2(args, words, capsys):
    assert cli.main(["bench", "block", *TINY, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("backfuse: error: ")
    for word in words:
        assert word in lines[0]


def test_defaults_of_the_command_are_the_setups():
    options = vars(cli._parser().parse_args(["bench", "block"]))
    defaults = dataclasses.asdict(block_results.Setup())
    for name, value in options.items():
        if value is not None and name in defaults:
            assert value == defaults[name], name


def test_missing_package_is_named(monkeypatch, capsys):
    real = options.importlib.import_module

    def absent(name):
        if name == "tqdm":
            raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
        return real(name)

    monkeypatch.setattr(options.importlib, "import_module", absent)
    assert cli.main(["bench", "block", *TINY]) == 2
    assert 'pip install "backfuse[bench]"' in capsys.readouterr().err


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == f"backfuse {backfuse.__version__}"
    for args in ([], ["bench"], ["demo", "--steps", "many"]):
        with pytest.raises(SystemExit) as left:
            cli.main(args)
        assert left.value.code == 2


def test_labels_do_not_overlap(tmp_path):
    pytest.importorskip("matplotlib")
    from backfuse.bench.plot import Point, tradeoff

    points = [Point(name, 2.0 + i / 10, 1.0 + i / 50) for i, name in enumerate(rivals.RIVALS)]
    tradeoff(points, tmp_path / "a.png", title="t", subtitle="s", time_label="time")
    assert (tmp_path / "a.png").stat().st_size > 10_000
