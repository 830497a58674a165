"""`backfuse bench ffn`: both tables, what is wrong or fails in them, and what the files hold."""

import dataclasses
import gc
import math
import shutil
import sys
import time
from types import ModuleType

import pandas as pd
import pytest
import torch
from conftest import DEVICE

import backfuse
from backfuse import cli
from backfuse.bench import ffn, ffn_results, ffn_rivals, measure
from backfuse.bench.shapes import SHAPES

TINY = ["--hidden-size", "32", "--intermediate-size", "48", "--tokens", "40", "--rounds", "2"]
TINY += ["--device", "cpu"]

GPT2 = {"shape": "gpt2-xl", "hidden_size": 32, "intermediate_size": 48}
LLAMA = {"hidden_size": 32, "intermediate_size": 48}


@pytest.fixture(autouse=True, scope="module")
def quick_collector():
    """Each measurement of bytes collects garbage: let it not look at what torch has imported."""
    gc.freeze()
    yield
    gc.unfreeze()


def small(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "tokens": 40, "rounds": 2}
    return ffn_results.Setup(**{**sizes, "device": "cpu", "providers": ("backfuse",), **changes})


def half(setup):
    results = ffn_results.Results(setup)
    ffn.bench_half(results)
    return results


# Shapes


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_sizes(name):
    spec = SHAPES[name]
    sizes = {
        "llama-3.2-1b": (2048, 8192, 32, 8, 64),
        "llama-3-8b": (4096, 14336, 32, 8, 128),
        "llama-3-70b": (8192, 28672, 64, 8, 128),
        "qwen2.5-7b": (3584, 18944, 28, 4, 128),
        "gpt2-xl": (1600, 6400, 25, 25, 64),
        "vit-l": (1024, 4096, 16, 16, 64),
    }
    h, f, heads, kv, head_dim = sizes[name]
    assert (spec.hidden_size, spec.intermediate_size) == (h, f)
    assert (spec.q_size, spec.kv_size) == (heads * head_dim, kv * head_dim)
    assert spec.gated == (name not in ("gpt2-xl", "vit-l"))
    assert spec.causal == (name != "vit-l")


# The half


def test_command_end_to_end(tmp_path, capsys):
    prefix, plot = tmp_path / "new" / "ffn", tmp_path / "picture.png"
    outputs = ["--csv", str(prefix), "--plot", str(plot)]
    args = ["bench", "ffn", *TINY, "--provider", "checkpoint,liger,backfuse", *outputs]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    frame = pd.read_csv(tmp_path / "new" / "ffn-half.csv").set_index("provider")
    names = ["eager", "checkpoint", "backfuse keep", "backfuse selective"]
    assert list(frame.index) == names
    assert all(name in printed for name in names)
    assert "note: liger left out: liger-kernel" in printed
    assert "note: kernels not measured: the kernels need a GPU" in printed
    assert (frame["status"] == "ok").all() and (frame["gradient_error"] < 1e-5).all()
    assert frame["time_vs_eager"].iloc[0] == 1
    for column in ("forward_ms", "backward_ms", "both_ms", "peak_mib", "tflops"):
        assert (frame[column] > 0).all(), column
    assert (frame["both_ms_p20"] <= frame["both_ms_p80"]).all()
    assert {"device_name", "torch", "triton", "date", "tokens"} <= set(frame.columns)
    state = torch.get_rng_state().nbytes / 40
    held = frame["held_kib_per_token"] * 1024
    assert held["checkpoint"] == pytest.approx(4 * 32 + state)
    assert held["backfuse selective"] == pytest.approx(4 * 32 + 4)  # and rstd
    assert held["backfuse keep"] == pytest.approx(4 * (32 + 2 * 48) + 4)
    assert plot.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize("shape", [GPT2, LLAMA, {**GPT2, "shape": "vit-l"}])
def test_every_contender_is_right(shape, dtype):
    results = half(small(**shape, dtype=dtype, rounds=1, providers=("checkpoint", "backfuse")))
    assert [contender.status for contender in results.contenders] == 4 * ["ok"]
    assert not results.failed


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
def test_compiled_contenders_are_right_and_hold_less():
    results = half(small(providers=("compile", "compile-checkpoint"), rounds=1))
    assert [c.status for c in results.contenders] == 3 * ["ok"]
    plain, compiled, checkpointed = (c.held_bytes for c in results.contenders)
    assert plain > compiled > checkpointed


def broken(way, change):
    def make(half, spec):
        contender = way(half, spec)
        run = contender.run
        contender.run = lambda x: change(run, x)
        return contender

    return make


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda run, x: run(x) * 1.001, "output"),
        (lambda run, x: run(x).detach() + run(x) - run(x), "gradient"),
        (lambda run, x: run(x.detach()), "gradient"),
    ],
)
def test_wrong_rival_is_marked(change, what, monkeypatch, capsys):
    monkeypatch.setitem(
        ffn_rivals.WAYS, "checkpoint", broken(ffn_rivals.WAYS["checkpoint"], change)
    )
    args = ["bench", "ffn", *TINY, "--provider", "checkpoint,backfuse", "--tables", "half"]
    assert cli.main(args) == 0  # not ours
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if line.startswith("        checkpoint")]
    assert row.endswith("WRONG")
    assert f"note: checkpoint is WRONG: {what} error" in printed
    assert printed.count("WRONG") == printed.count("checkpoint is WRONG") + 1


def test_our_wrong_gradients_and_failures_fail_the_command(monkeypatch, capsys):
    real = backfuse.ffn

    def wrong(x, policy, **options):
        if policy == "keep":
            raise OSError("no such kernel\nmore")
        return 2 * real(x, policy=policy, **options) - x

    monkeypatch.setattr(ffn_rivals.backfuse, "ffn", wrong)
    assert cli.main(["bench", "ffn", *TINY, "--provider", "backfuse", "--tables", "half"]) == 1
    printed = capsys.readouterr().out
    assert "note: backfuse keep failed: OSError: no such kernel\n" in printed
    assert "note: backfuse selective is WRONG" in printed


def test_nan_is_wrong():
    exact = {"x": torch.ones(3), "output": torch.ones(3)}
    assert ffn_rivals.largest_error({"x": torch.full((3,), math.nan)}, exact) == math.inf
    assert ffn_rivals.largest_error({}, exact) == math.inf
    assert ffn_rivals.largest_error({"x": torch.ones(3)}, exact) == 0
    one = torch.tensor([0.1, math.nan, 0.2])
    assert ffn_rivals.relative_error(one, torch.ones(3)) == math.inf


def test_gradients_do_not_add_up(monkeypatch):
    """Each timed step makes its own gradients."""
    seen = []
    real = ffn_rivals.Step.clear

    def clear(self, contender):
        real(self, contender)
        seen.append(all(p.grad is None for p in contender.parameters.values()))

    monkeypatch.setattr(ffn_rivals.Step, "clear", clear)
    half(small(rounds=1))
    assert seen and all(seen)


def test_quack_gets_alternating_rows(monkeypatch):
    """Against a stand-in for QuACK that computes what QuACK's documentation says."""

    def mlp_func(x, first, down, activation, recompute=False):
        assert activation == "swiglu"
        pairs = (x @ first.T).unflatten(-1, (-1, 2))
        return (torch.nn.functional.silu(pairs[..., 0]) * pairs[..., 1]) @ down.T

    module = ModuleType("quack.mlp")
    module.mlp_func = mlp_func
    monkeypatch.setitem(sys.modules, "quack", ModuleType("quack"))
    monkeypatch.setitem(sys.modules, "quack.mlp", module)
    monkeypatch.setattr(ffn, "missing", lambda name, spec, device: None)
    results = half(small(providers=("quack", "quack-recompute"), rounds=1))
    names = [contender.name for contender in results.contenders]
    assert names == ["eager", "quack", "quack-recompute"]
    assert [contender.status for contender in results.contenders] == 3 * ["ok"]


def test_interrupted_command_prints_what_is_done(capsys, monkeypatch, tmp_path):
    real, calls = ffn_rivals.Step.time, []

    def timed(self, contender):
        calls.append(contender)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, contender)

    monkeypatch.setattr(ffn_rivals.Step, "time", timed)
    csv = tmp_path / "half.csv"
    args = ["bench", "ffn", *TINY, "--provider", "backfuse", "--tables", "half", "--csv", str(csv)]
    assert cli.main(args) == 130
    printed = capsys.readouterr().out
    assert "interrupted" in printed and "1.000" in printed
    frame = pd.read_csv(csv)
    assert frame["both_ms"].notna().tolist() == [True, True, False]


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


# The kernels


@pytest.fixture
def stubbed(monkeypatch):
    """No clock, a small copy: the kernels run where the tests do."""
    pytest.importorskip("triton")
    from backfuse.bench import ffn_kernels

    monkeypatch.setattr(ffn_kernels, "COPY_BYTES", 2**12)
    monkeypatch.setattr(measure, "kernel_seconds", lambda call, device: 0.002)


def kernels(setup):
    from backfuse.bench import ffn_kernels

    results = ffn_results.Results(setup)
    ffn_kernels.bench_kernels(results)
    return results


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shape", [LLAMA, GPT2])
def test_kernel_rows(shape, dtype, stubbed):
    results = kernels(small(**shape, dtype=dtype, device=DEVICE))
    frame = results.frame("kernels")
    assert (frame["status"] == "ok").all(), frame[["kernel", "variant", "error", "status"]]
    assert not results.failed
    kinds = set(frame["kernel"])
    expected = {"copy", "torch.mm", "ffn_up", "ffn_dact", "ffn_recompute", "library"}
    expected |= {"norm_forward", "norm_apply", "norm_backward", "weight_grad"}
    if shape is LLAMA:
        expected |= {"qk_rope_forward", "qk_rope_backward"}
    assert kinds == expected
    memory = frame["kernel"].str.startswith(("norm", "qk_rope", "copy"))
    assert frame["gb_s"].notna().equals(memory) and frame["tflops"].isna().equals(memory)
    assert not frame.duplicated(["kernel", "variant", "config"]).any()
    # Every call takes as long: rates are as the work, and fused as fast as split.
    for _, row in frame.iterrows():
        if row["baseline"].startswith("torch.mm"):
            assert row["share"] == pytest.approx(1), row["kernel"]
    assert (frame["time_vs_split"].dropna() == 1).all()
    assert frame["time_vs_split"].notna().any()
    up = frame[frame["kernel"] == "ffn_up"].iloc[0]
    h, f = 32, 48 * (2 if shape is LLAMA else 1)
    assert up["tflops"] == pytest.approx(2 * 40 * h * f / 0.002 / 1e12)
    assert up["default"] and up["config"]
    table = results.table("kernels")
    assert "ffn_up hidden + preact" in table and "nan" not in table
    lines = results.figures()
    assert any(line.startswith("ffn_up hidden: 1.000 of torch.mm") for line in lines)
    assert any("x the time of split" in line for line in lines)


def test_every_configuration_has_a_row_even_those_that_do_not_run(monkeypatch, stubbed):
    from backfuse.kernels import configs, ffn_dact

    name = configs.architecture(torch.device(DEVICE))
    first = configs.CONFIGS["ffn_dact"][name][0]
    table = (
        first,
        dataclasses.replace(first, block_k=32),
        dataclasses.replace(first, block_m=32),
        dataclasses.replace(first, block_m=4096, block_n=4096),
    )
    monkeypatch.setitem(configs.CONFIGS["ffn_dact"], name, table)
    real = ffn_dact.ffn_dact

    def odd(*args, config, **options):
        if config.block_k == 32:
            raise RuntimeError("out of resource: shared memory\nmore")
        hidden, dbias = real(*args, config=config, **options)
        if config.block_m == 32:
            args[5][7, 3:] = math.nan  # a few gradients that are not written
        return hidden, dbias

    monkeypatch.setattr(ffn_dact, "ffn_dact", odd)
    results = kernels(small(**LLAMA, device=DEVICE))
    rows = [case for case in results.cases if case.kernel == "ffn_dact"]
    assert [case.status for case in rows] == [
        "ok", "RuntimeError: out of resource: shared memory", "WRONG", "does not fit"
    ]  # fmt: skip
    assert [len(case.seconds) for case in rows] == [2, 0, 0, 0]
    assert [case.default for case in rows] == [True, False, False, False]
    assert results.failed
    assert all(case.status == "ok" for case in results.cases if case.kernel != "ffn_dact")
    assert "WRONG" in results.table("kernels")


def test_a_slightly_wrong_kernel_is_wrong(monkeypatch, stubbed):
    from backfuse.kernels import norm, qk_rope

    rope, backward = qk_rope.qk_rope_backward, norm.norm_backward

    def odd(dqk, *args, **options):
        found = rope(dqk, *args, **options)
        dqk[-1] *= -1
        return found

    monkeypatch.setattr(qk_rope, "qk_rope_backward", odd)
    monkeypatch.setattr(
        norm, "norm_backward", lambda *args, **options: (backward(*args, **options)[0] * 1.1, None)
    )
    results = kernels(small(**LLAMA, dtype="bf16", device=DEVICE, rounds=1))
    wrong = {case.kernel for case in results.cases if case.status == "WRONG"}
    assert wrong == {"qk_rope_backward", "norm_backward"}


def test_kernel_that_fails_while_it_is_timed(monkeypatch, stubbed):
    def clock(call, device):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(measure, "kernel_seconds", clock)
    results = kernels(small(**LLAMA, device=DEVICE))
    assert {case.status for case in results.cases} == {"RuntimeError: the device is lost"}
    assert results.frame("kernels")["ms"].isna().all()


def test_kernel_seconds_are_of_one_call():
    pause = [0.001, 0.03, *[0.001] * 200]
    found = measure.kernel_seconds(lambda: time.sleep(pause.pop(0)), "cpu")
    assert 0.001 <= found < 0.03
    assert 100 < len(pause) < 200


def test_figures_compare_within_rounds():
    results = ffn_results.Results(small())
    for name, laps, held in (
        ("eager", [[[1.0, 1.0]], [[2.0, 2.0]]], 100),
        ("compile", [[[1.0, 1.0]], [[2.0, 2.0]]], 100),
        ("backfuse keep", [[[0.5, 0.5]], [[1.0, 1.0]]], 60),
    ):
        results.contenders.append(
            ffn_rivals.Contender(name, lambda x: x, {}, held_bytes=held, laps=laps)
        )
    assert results.figures() == [
        "backfuse keep: 0.500 x the time of compile (goal: at most 1.00)",
        "backfuse keep: 0.600 x the held bytes of compile (goal: at most 0.70)",
    ]


# The command


def test_csv_paths(tmp_path):
    both = ffn.csv_paths(tmp_path / "a.csv", ("half", "kernels"))
    assert both == {name: tmp_path / f"a-{name}.csv" for name in ("half", "kernels")}
    assert ffn.csv_paths(tmp_path / "b", ("half",)) == {"half": tmp_path / "b.csv"}
    dotted = ffn.csv_paths(tmp_path / "llama-3.2", ("half", "kernels"))
    assert dotted["half"] == tmp_path / "llama-3.2-half.csv"


def test_defaults_follow_the_device():
    setup = ffn_results.Setup(device="cpu")
    assert (setup.rows, setup.dtype_name, setup.spec.hidden_size) == (2048, "fp32", 512)
    named = ffn_results.Setup(device="cpu", shape="qwen2.5-7b", hidden_size=64)
    assert (named.spec.hidden_size, named.spec.intermediate_size) == (64, 18944)
    options = vars(cli._parser().parse_args(["bench", "ffn"]))
    defaults = dataclasses.asdict(ffn_results.Setup())
    for name, value in options.items():
        if value is not None and name in defaults:
            assert value == defaults[name], name


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--shape", "llama-3-8"], ["shape is 'llama-3-8'", "did you mean 'llama-3-8b'"]),
        (["--provider", "quak"], ["provider is 'quak'", "did you mean 'quack'"]),
        (["--tables", "halves"], ["table is 'halves'", "did you mean 'half'"]),
        (["--tables", ","], ["tables is empty", "half, kernels"]),
        (["--tokens", "0"], ["tokens is 0"]),
        (["--hidden-size", "-3"], ["hidden_size is -3"]),
        (["--intermediate-size", "0"], ["intermediate_size is 0"]),
        (["--rounds", "0"], ["rounds is 0"]),
        (["--dtype", "fp8"], ["dtype is 'fp8'"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--seed", "-1"], ["seed is -1"]),
        (["--csv", "/dev/null/ffn"], ["cannot write to /dev/null"]),
    ],
)
def test_bad_options_are_one_line_and_exit_2(args, words, capsys):
    assert cli.main(["bench", "ffn", *TINY, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("backfuse: error: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.gpu
def test_command_on_a_gpu(tmp_path, capsys):
    prefix = tmp_path / "ffn"
    args = ["bench", "ffn", "--hidden-size", "256", "--intermediate-size", "512"]
    args += ["--tokens", "512", "--rounds", "2", "--csv", str(prefix)]
    assert cli.main(args) == 0, capsys.readouterr().out
    for table in ("half", "kernels"):
        frame = pd.read_csv(tmp_path / f"ffn-{table}.csv")
        assert frame["status"].isin(["ok", "does not fit"]).all()
    assert "figure: backfuse keep" in capsys.readouterr().out
