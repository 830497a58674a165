"""`backfuse bench OP`: all operations are right, rows hold what they say, what goes wrong shows."""

import dataclasses
import math
import shutil
import sys
from types import ModuleType

import pandas as pd
import pytest
import torch

import backfuse
from backfuse import BlockSpec, cli, cli_bench
from backfuse.bench import (
    measure,
    operations,
    options,
    own,
    peers,
    problem,
    registry,
    rows,
    run,
    shapes,
    ways,
)
from backfuse.bench.plain import is_llama

TINY = BlockSpec(32, 48, 4, 2)
TINY_SHAPES = {
    "tiny": TINY,
    "tiny-qwen3": TINY.replace(qk_norm="head"),
    "tiny-qwen2": TINY.replace(qkv_bias=True),
    "tiny-gpt2": shapes.SHAPES["gpt2-xl"].replace(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8,
    ),
    "tiny-vit": shapes.SHAPES["vit-l"].replace(
        hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4,
        head_dim=8,
    ),
}  # fmt: skip
OPS_AND_SHAPES = [
    (op, shape)
    for op in registry.OPERATIONS
    for shape, spec in TINY_SHAPES.items()
    if (op != "rope" or spec.rope) and (op not in ("model", "lora") or is_llama(spec))
]
NOT_COMPILED = (
    "eager", "checkpoint", "hf-checkpointing", "sac-attention", "sac-every-2nd-mm", "backfuse"
)  # fmt: skip
ARGS = ["--shape", "tiny", "--tokens", "40", "--rounds", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def tiny(monkeypatch, quick_collector):
    """Small shapes beside the real ones, and a small copy."""
    for name, spec in TINY_SHAPES.items():
        monkeypatch.setitem(shapes.ALL_SHAPES, name, spec)
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(measure, "KERNEL_SECONDS", 1e-4)


def setup(op, **changes):
    known = registry.OPERATIONS[op].providers
    providers = tuple(name for name in NOT_COMPILED if name in known)
    values = {"shape": ("tiny",), "tokens": "40", "rounds": 1, "providers": providers}
    return run.Setup(op, **{**values, "device": "cpu", **changes})


def measured(chosen, path=None, **options):
    """The rows of a set-up, and whether something of ours failed."""
    table = rows.Table(path)
    bench = run.Bench(chosen, table, **options)
    bench.run()
    return pd.DataFrame(table.rows, columns=list(rows.COLUMNS)), bench.failed


# Names


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_shapes_have_the_published_sizes(name):
    spec = shapes.SHAPES[name]
    sizes = {
        "llama-3.2-1b": (2048, 8192, 32, 8, 64),
        "llama-3-8b": (4096, 14336, 32, 8, 128),
        "llama-3-70b": (8192, 28672, 64, 8, 128),
        "qwen2.5-7b": (3584, 18944, 28, 4, 128),
        "qwen3-8b": (4096, 12288, 32, 8, 128),
        "gpt2-xl": (1600, 6400, 25, 25, 64),
        "vit-l": (1024, 4096, 16, 16, 64),
    }
    h, f, heads, kv, head_dim = sizes[name]
    assert (spec.hidden_size, spec.intermediate_size) == (h, f)
    assert (spec.q_size, spec.kv_size) == (heads * head_dim, kv * head_dim)
    assert spec.gated == (name not in ("gpt2-xl", "vit-l"))
    assert spec.causal == (name != "vit-l")


def test_the_command_knows_all_operations():
    assert {name: op.summary for name, op in registry.OPERATIONS.items()} == cli_bench.OPERATIONS
    assert registry.OPERATIONS.keys() == operations.PROBLEMS.keys()
    assert run.SEVERAL == cli_bench.SEVERAL
    assert all(next(iter(op.providers)) == "eager" for op in registry.OPERATIONS.values())


def test_list_names_everything_and_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setattr(peers, "installed", lambda module: module == "quack")
    assert cli.main(["bench", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = {provider for op in registry.OPERATIONS.values() for provider in op.providers}
    first_words = {line.split()[0] for line in lines if line.strip()}
    assert known | registry.OPERATIONS.keys() | shapes.ALL_SHAPES.keys() <= first_words
    [liger] = [line for line in lines if line.startswith("  liger ")]
    assert "pip install liger-kernel" in liger and liger.endswith("norm, rope, ffn")
    [quack] = [line for line in lines if line.startswith("  quack ")]
    assert "pip" not in quack


def test_cross_checks_are_what_their_sources_measure():
    quack = shapes.CROSS_CHECKS["quack-mlp"]
    assert (quack.batch_size, quack.seq_len, quack.layers) == (4, 2048, 4)
    spec = shapes.ALL_SHAPES[quack.shape]
    assert (spec.hidden_size, spec.intermediate_size) == (4096, 16384)
    for case in shapes.CROSS_CHECKS.values():
        assert set(case.providers) <= registry.OPERATIONS[case.op].providers.keys()


# Every operation


@pytest.mark.parametrize("dtype", ["fp64", "bf16"])
@pytest.mark.parametrize(("op", "shape"), OPS_AND_SHAPES)
def test_every_contender_is_right(op, shape, dtype):
    layers = 2 if op in run.SEVERAL else None
    chosen = setup(op, shape=(shape,), dtype=(dtype,), layers=layers, batch_size=2)
    frame, failed = measured(chosen)
    assert set(frame["status"]) == {"ok"} and not failed, frame[["provider", "status", "note"]]
    ours = frame[frame["provider"] == "backfuse-reference"]
    policies = {"norm": 1, "rope": 1, "attention": 1, "ffn": 2, "attention-half": 3, "offload": 2}
    assert len(ours) == policies.get(op, 4)
    assert (frame["error"] < (1e-12 if dtype == "fp64" else 0.1)).all()


@pytest.mark.parametrize("op", ["norm", "rope", "attention"])
def test_functions_around_the_kernels_are_right(op, monkeypatch):
    pytest.importorskip("triton")
    from backfuse.kernels import fused

    monkeypatch.setattr(own, "operations_for", lambda case: fused)
    for shape in ("tiny", "tiny-qwen3"):
        frame, failed = measured(setup(op, shape=(shape,), batch_size=2))
        assert list(frame["provider"]) == ["eager", "backfuse-triton"] and not failed
        assert set(frame["status"]) == {"ok"} and (frame["error"] < 1e-5).all()
        assert math.isnan(frame["gemms"].iloc[1])


@pytest.mark.slow
@pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++", "c++"))), reason="needs a C++ compiler"
)
@pytest.mark.parametrize("op", ["norm", "ffn", "stack"])
def test_compiled_contenders_are_right_and_hold_less(op):
    providers = [n for n in registry.OPERATIONS[op].providers if n.startswith("compile")]
    providers = [n for n in providers if n in ("compile", "compile-0.0", "compile-checkpoint")]
    frame, _ = measured(setup(op, providers=tuple(providers)))
    assert list(frame["status"]) == (1 + len(providers)) * ["ok"]
    kept = frame.set_index("provider")["kept_bytes"]
    assert kept["compile"] < kept["eager"]
    assert (frame["gemms"] > 0).all() == (op != "norm")
    flops = frame.set_index("provider")["flops"]
    assert flops["compile"] == flops["eager"]
    if op == "stack":
        assert flops["compile-0.0"] > flops["eager"]


def test_rows_hold_what_they_say():
    modes = ("fwd", "bwd", "both")
    frame, _ = measured(setup("stack", layers=2, batch_size=2, modes=modes, rounds=3))
    assert list(frame["mode"].unique()) == list(modes)
    both = frame[frame["mode"] == "both"]
    for policy in ("keep", "selective", "lean", "full"):
        kept = backfuse.kept_bytes(TINY, policy, batch_size=2, seq_len=20)
        [row] = both[both["policy"] == policy].to_dict("records")
        assert row["kept_bytes"] == 2 * sum(kept.values())
        assert row["peak_bytes"] > row["kept_bytes"]
    eager = both.iloc[0]
    assert eager["provider"] == "eager" and eager["vs_eager"] == 1 and eager["gemms"] == 42
    assert both.set_index("policy").loc["full", "gemms"] == 42 + 2 * 6
    sizes = {"batch_size": 2, "seq_len": 20, "dtype": torch.float32}
    for policy in ("keep", "full"):
        [row] = both[both["policy"] == policy].to_dict("records")
        assert row["flops"] == 2 * backfuse.block_flops(TINY, policy, **sizes).total
    weights = 2 * (32 * (32 + 2 * 16) + 32 * 32 + 3 * 32 * 48)
    attention = 2 * (4 * 2 * 20 * 20 * 32) / 2
    for mode, factor, cores in (("fwd", 1, 1), ("bwd", 2, 2.5), ("both", 3, 3.5)):
        row = frame[frame["mode"] == mode].iloc[0]
        flops = factor * 2 * 40 * weights + cores * attention
        assert row["tflops"] == pytest.approx(flops / row["ms_median"] / 1e9)
        assert row["ms_p20"] <= row["ms_median"] <= row["ms_p80"]
    assert (frame["gemm_share"] > 0).all() and frame["copy_share"].isna().all()
    for name in ("date", "device", "torch", "backfuse"):
        assert (frame[name].astype(str) != "").all()


def test_memory_bound_operations_are_held_to_a_copy():
    frame, _ = measured(setup("norm"))
    row = frame.iloc[0]
    assert row["gbps"] == pytest.approx(5 * 40 * 32 * 4 / row["ms_median"] / 1e6)
    assert row["copy_share"] > 0 and math.isnan(row["tflops"]) and math.isnan(row["gemm_share"])


def test_ratios_and_shares_are_taken_within_rounds():
    case = next(setup("ffn").cases())
    asked = operations.ffn(case)

    def contender(name, laps):
        return problem.Contender(name, lambda x: x, {}, laps=laps)

    eager = contender("eager", [[[1.0, 1.0]], [[4.0, 4.0]], [[2.0, 2.0]]])
    mine = contender("mine", [[[0.5, 0.5]], [[2.0, 2.0]], [[1.0, 1.0]]])
    flops = asked.flops("both")
    rates = {"gemm": [flops, flops / 4, flops / 2]}  # a machine that slows down and recovers
    row = rows.measured_row(asked, mine, "both", eager, rates)
    assert (row["vs_eager"], row["vs_eager_p20"], row["vs_eager_p80"]) == (0.5, 0.5, 0.5)
    assert row["gemm_share"] == pytest.approx(1)
    assert row["ms_median"] == 2000


def test_training_step_counts_the_optimizer_and_moves_nothing(monkeypatch):
    steps = []
    real = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW, "step", lambda self, *args: steps.append(1) or real(self, *args)
    )
    case = next(setup("train", layers=1).cases())
    asked = operations.train(case)
    before = {name: p.clone() for name, p in asked.module.named_parameters()}
    step = problem.Step(asked)
    contender = problem.plain(asked)
    step.examine(contender, step.exact())
    step.time(contender)
    assert len(steps) == 2
    assert [len(laps) for laps in contender.laps[0]] == [3]
    for name, parameter in asked.module.named_parameters():
        assert torch.equal(parameter, before[name])


@pytest.mark.parametrize("op", ["stack", "train", "model", "lora"])
def test_exact_runs_are_exact(op):
    """Hugging Face's norms compute in fp32 in any dtype: the exact run must not use them."""
    asked = operations.PROBLEMS[op](next(setup(op, layers=2).cases()))
    exact = problem.Step(asked).exact()
    wide = dataclasses.replace(asked.case, dtype="fp64")
    again = operations.PROBLEMS[op](wide)
    again.module.load_state_dict(asked.module.state_dict())
    for name, tensor in asked.inputs.items():
        again.inputs[name] = tensor.detach().to(again.inputs[name].dtype)
    again.douts = tuple(None if d is None else d.double() for d in asked.douts)
    rotary = [table for table in asked.module.buffers()]
    for mine, theirs in zip(again.module.buffers(), rotary, strict=True):
        mine.copy_(theirs)
    step = problem.Step(again)
    ours = registry.OPERATIONS[op].providers["backfuse"].make(again, "keep")
    found = problem.errors(step.results(ours, step(ours)), exact)
    assert max(found.values()) < 1e-12, found


@pytest.mark.parametrize("op", registry.OPERATIONS)
def test_gradients_do_not_add_up_and_nothing_shared_is_written(op, monkeypatch):
    asked = operations.PROBLEMS[op](next(setup(op).cases()))
    step = problem.Step(asked)
    shared = [*asked.inputs.values(), *asked.module.parameters()]
    shared += [dout for dout in asked.douts if dout is not None]
    before = [tensor.detach().clone() for tensor in shared]
    for name in NOT_COMPILED:
        provider = registry.OPERATIONS[op].providers.get(name)
        for policy in provider.policies if provider else ():
            contender = provider.make(asked, policy)
            first = step.results(contender, step(contender))
            first = {name: tensor.clone() for name, tensor in first.items()}
            second = step.results(contender, step(contender))
            assert all(torch.equal(first[name], second[name]) for name in first), name
            step.clear(contender)
    assert all(map(torch.equal, before, shared))


# What goes wrong


def broken(change, name="checkpoint", op="ffn"):
    """The provider `name` with its forward pass changed."""
    provider = registry.OPERATIONS[op].providers[name]

    def make(asked, policy):
        contender = provider.make(asked, policy)
        forward = contender.run
        contender.run = lambda *inputs: change(forward, *inputs)
        return contender

    return dataclasses.replace(provider, make=make)


@pytest.mark.parametrize(
    "change",
    [
        lambda run, x: run(x) * 1.001,
        lambda run, x: run(x).detach() + run(x) - run(x),
        lambda run, x: run(x.detach()),
        lambda run, x: run(x) * math.nan,
    ],
)
def test_wrong_rival_is_marked(change, monkeypatch, capsys):
    monkeypatch.setitem(registry.OPERATIONS["ffn"].providers, "checkpoint", broken(change))
    assert cli.main(["bench", "ffn", *ARGS, "--provider", "checkpoint,backfuse"]) == 0  # not ours
    printed = capsys.readouterr().out
    [row] = [line for line in printed.splitlines() if line.endswith("WRONG")]
    assert "checkpoint both" in row
    assert "checkpoint is WRONG: error of" in printed


def test_our_wrong_gradients_fail_the_command(monkeypatch, capsys):
    wrong = broken(lambda run, x: 2 * run(x) - x, "backfuse")
    monkeypatch.setitem(registry.OPERATIONS["ffn"].providers, "backfuse", wrong)
    assert cli.main(["bench", "ffn", *ARGS, "--provider", "backfuse"]) == 1
    assert "backfuse-reference keep is WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(("name", "code"), [("checkpoint", 0), ("backfuse", 1)])
def test_a_failure_is_a_row_and_the_run_goes_on(name, code, monkeypatch, capsys, tmp_path):
    def fail(run, x):
        raise OSError("no such kernel\nmore")

    monkeypatch.setitem(registry.OPERATIONS["ffn"].providers, name, broken(fail, name))
    csv = tmp_path / "a.csv"
    args = ["--provider", "checkpoint,backfuse", "--csv", str(csv), "--mode", "fwd,both"]
    assert cli.main(["bench", "ffn", *ARGS, *args]) == code
    frame = pd.read_csv(csv)
    failed = frame[frame["status"] == "failed"]
    assert set(failed["note"]) == {"OSError: no such kernel"}
    assert set(failed["mode"]) == {"fwd", "both"}
    assert (frame["status"] == "ok").any()
    assert f"{name}" in capsys.readouterr().out


def test_failure_in_a_timed_round(monkeypatch):
    calls = []
    real = problem.Step.time

    def timed(self, contender):
        calls.append(contender.name)
        if contender.provider == "checkpoint" and calls.count("checkpoint") == 2:
            raise RuntimeError("the device is lost")
        real(self, contender)

    monkeypatch.setattr(problem.Step, "time", timed)
    frame, failed = measured(setup("ffn", rounds=3, providers=("checkpoint",)))
    row = frame.set_index("provider").loc["checkpoint"]
    assert row["status"] == "failed" and "the device is lost" in row["note"]
    assert calls.count("checkpoint") == 2 and not failed


def test_what_does_not_fit_is_skipped_with_its_size(monkeypatch, capsys):
    monkeypatch.setattr(run, "free_bytes", lambda device: 400_000)
    chosen = setup("stack", tokens="40,8k", layers=2, providers=("checkpoint", "backfuse"))
    frame, failed = measured(chosen)
    sizes = frame.groupby(["tokens", "status"]).size()
    assert sizes[40, "ok"] == 6 and sizes[8192, "skipped"] == 6 and not failed
    assert frame[frame["tokens"] == 8192]["note"].str.contains("GiB are free").all()
    assert "skipped: needs about" in capsys.readouterr().out


def test_out_of_memory_is_a_skipped_row(monkeypatch):
    def fail(run, x):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    providers = registry.OPERATIONS["ffn"].providers
    monkeypatch.setitem(providers, "checkpoint", broken(fail))
    monkeypatch.setitem(providers, "backfuse", broken(fail, "backfuse"))
    frame, failed = measured(setup("ffn"))
    skipped = frame[frame["status"] == "skipped"]
    assert len(skipped) == 3 and skipped["note"].str.contains("2.00 GiB").all() and not failed


def test_nan_and_missing_gradients_are_infinitely_wrong():
    one, nan = torch.ones(3), torch.tensor([0.1, math.nan, 0.2])
    assert problem.relative_error(nan, one) == math.inf
    assert problem.errors({}, {"x": one}) == {"x": math.inf}
    assert problem.errors({"x": one}, {}) == {"x": math.inf}
    assert problem.errors({"x": one}, {"x": one}) == {"x": 0.0}


def test_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(options.shutil, "which", lambda name: None)
    frame, _ = measured(setup("ffn", providers=("compile",)))
    assert list(frame["provider"]) == ["eager"]
    said = capsys.readouterr().out
    assert "compile left out: torch.compile on a CPU needs a C++ compiler" in said


# Peers, as stand-ins


def stand_in(monkeypatch, op, name, **modules):
    for path, attributes in modules.items():
        module = ModuleType(path)
        vars(module).update(attributes)
        monkeypatch.setitem(sys.modules, path.replace("__", "."), module)
    provider = registry.OPERATIONS[op].providers[name]
    free = dataclasses.replace(provider, module="", obstacle=lambda case: None)
    monkeypatch.setitem(registry.OPERATIONS[op].providers, name, free)


@pytest.mark.parametrize("name", ["quack", "quack-recompute"])
def test_quack_gets_alternating_rows(name, monkeypatch):
    """Against a stand-in for QuACK that computes what QuACK's documentation says."""

    def mlp_func(x, first, down, activation, recompute=False):
        assert activation == "swiglu" and recompute == (name == "quack-recompute")
        pairs = (x @ first.T).unflatten(-1, (-1, 2))
        return (torch.nn.functional.silu(pairs[..., 0]) * pairs[..., 1]) @ down.T

    stand_in(monkeypatch, "ffn", name, quack={}, quack__mlp={"mlp_func": mlp_func})
    frame, _ = measured(setup("ffn", layers=2, providers=(name,)))
    assert list(frame["provider"]) == ["eager", name] and set(frame["status"]) == {"ok"}


def test_transformer_engines_stacked_weights_find_their_gradients(monkeypatch):
    class LayerNormMLP(torch.nn.Module):
        def __init__(self, h, f, *, eps, params_dtype, device, checkpoint, **rest):
            super().__init__()
            factory = {"dtype": params_dtype, "device": device}
            self.eps = eps
            self.layer_norm_weight = torch.nn.Parameter(torch.ones(h, **factory))
            self.fc1_weight = torch.nn.Parameter(torch.empty(2 * f, h, **factory))
            self.fc2_weight = torch.nn.Parameter(torch.empty(h, f, **factory))

        def forward(self, x):
            normed = torch.nn.functional.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps)
            gate, up = (normed @ self.fc1_weight.T).chunk(2, -1)
            return (torch.nn.functional.silu(gate) * up) @ self.fc2_weight.T

    te = {"LayerNormMLP": LayerNormMLP}
    stand_in(
        monkeypatch, "ffn", "te-checkpoint", transformer_engine={}, transformer_engine__pytorch=te
    )
    frame, _ = measured(setup("ffn", layers=2, providers=("te-checkpoint",)))
    assert list(frame["provider"]) == ["eager", "te-checkpoint"]
    assert set(frame["status"]) == {"ok"}


def test_a_peer_that_overwrites_gradients_gets_its_own(monkeypatch):
    """Liger's RoPE rotates the gradients where they are."""

    class Rotate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, cos, sin):
            ctx.save_for_backward(cos, sin)
            return tuple(plain_rotate(x, cos, sin) for x in (q, k))

        @staticmethod
        def backward(ctx, dq, dk):
            cos, sin = ctx.saved_tensors
            for grad in (dq, dk):
                grad.copy_(plain_rotate(grad, cos, -sin))
            return dq, dk, None, None

    def plain_rotate(x, cos, sin):
        low, high = x.chunk(2, -1)
        return x * cos + torch.cat((-high, low), -1) * sin

    functional = {"liger_rope": Rotate.apply}
    stand_in(
        monkeypatch, "rope", "liger", liger_kernel={}, liger_kernel__transformers={},
        liger_kernel__transformers__functional=functional,
    )  # fmt: skip
    frame, failed = measured(setup("rope", providers=("liger", "backfuse"), rounds=2))
    assert list(frame["provider"]) == ["eager", "liger", "backfuse-reference"]
    assert set(frame["status"]) == {"ok"} and not failed


# Files


def test_rows_are_appended_and_never_measured_twice(tmp_path, capsys, monkeypatch):
    csv = tmp_path / "new" / "results.csv"
    args = ["bench", "ffn", *ARGS, "--csv", str(csv), "--provider"]
    assert cli.main([*args, "checkpoint"]) == 0
    first = csv.read_text()
    assert cli.main([*args, "checkpoint"]) == 0
    assert csv.read_text() == first
    assert "checkpoint: there already" in capsys.readouterr().out
    assert cli.main([*args, "checkpoint,backfuse"]) == 0
    assert csv.read_text().startswith(first)
    lines = pd.read_csv(run.timeline_file(csv), keep_default_na=False)
    for _, line in lines.groupby(["provider", "policy"]):
        assert line["ms"].is_monotonic_increasing and len(line) <= 201  # of one step
    ours = 2 * ["backfuse-reference"]
    assert list(pd.read_csv(csv)["provider"]) == ["eager", "checkpoint", *ours]
    monkeypatch.setattr(torch, "__version__", "9.9")  # another version is another measurement
    assert cli.main([*args, "checkpoint"]) == 0
    assert list(pd.read_csv(csv)["torch"].astype(str)[-2:]) == ["9.9", "9.9"]


def test_another_table_is_refused(tmp_path, capsys):
    csv = tmp_path / "other.csv"
    csv.write_text("a,b\n1,2\n")
    assert cli.main(["bench", "ffn", *ARGS, "--csv", str(csv)]) == 2
    assert "has no column" in capsys.readouterr().err
    assert csv.read_text() == "a,b\n1,2\n"


def test_command_writes_what_is_asked(tmp_path, capsys):
    csv, plot, traces = tmp_path / "a.csv", tmp_path / "a.png", tmp_path / "traces"
    outputs = ["--csv", str(csv), "--plot", str(plot), "--trace", str(traces)]
    chosen = ["--provider", "checkpoint,backfuse", "--policy", "keep,full", "--layers", "2"]
    assert cli.main(["bench", "stack", *ARGS, *chosen, *outputs]) == 0
    frame = pd.read_csv(csv)
    names = ["eager", "checkpoint", "backfuse-reference", "backfuse-reference"]
    assert list(frame["provider"]) == names
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert len(list(traces.glob("*.json"))) == 4
    lines = pd.read_csv(tmp_path / "a-timeline.csv", keep_default_na=False)
    assert set(lines["provider"]) == set(names)
    for (provider, policy), line in lines.groupby(["provider", "policy"]):
        row = frame[(frame["provider"] == provider) & (frame["policy"].fillna("") == policy)]
        assert line["bytes"].max() == row["peak_bytes"].item()
        assert line["ms"].is_monotonic_increasing
    assert f"wrote {csv}" in capsys.readouterr().out


def test_several_sizes_make_several_groups_and_pictures(tmp_path):
    plot = tmp_path / "a.png"
    args = ["--shape", "tiny,tiny-qwen3", "--tokens", "16,32", "--provider", "backfuse"]
    fast = ["--rounds", "1", "--device", "cpu", "--plot", str(plot)]
    assert cli.main(["bench", "ffn", *args, *fast]) == 0
    assert len(list(tmp_path.glob("a-ffn-tiny-fp32-*.png"))) == 3
    assert len(list(tmp_path.glob("*.png"))) == 6


def test_interrupted_bench_writes_what_is_done(capsys, monkeypatch, tmp_path):
    real, calls = problem.Step.time, []

    def timed(self, contender):
        calls.append(contender)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self, contender)

    monkeypatch.setattr(problem.Step, "time", timed)
    csv = tmp_path / "a.csv"
    args = ["--provider", "checkpoint,backfuse", "--csv", str(csv)]
    assert cli.main(["bench", "ffn", *ARGS, *args]) == 130
    assert "interrupted" in capsys.readouterr().out
    assert list(pd.read_csv(csv)["provider"]) == ["eager", "checkpoint"]


def test_deadline_ends_rounds_and_keeps_what_is_done(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    real = problem.Step.time

    def timed(self, contender):
        clock[0] += 1
        real(self, contender)

    monkeypatch.setattr(problem.Step, "time", timed)
    chosen = setup("ffn", tokens="40,48", rounds=9, providers=("checkpoint",))
    frame, _ = measured(chosen, deadline=3.0)
    assert list(frame["tokens"]) == [40, 40]
    assert set(frame["rounds"]) == {2}


# The command


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--provider", "checkpiont"], ["provider", "'checkpiont'", "did you mean 'checkpoint'"]),
        (["--policy", "ful"], ["policy", "did you mean 'full'"]),
        (["--shape", "llama-3-9b"], ["shape", "did you mean 'llama-3-8b'"]),
        (["--mode", "forward"], ["mode is 'forward', expected one of fwd, bwd, both"]),
        (["--tokens", "2q"], ["tokens is '2q', expected numbers such as 2k"]),
        (["--tokens", "0"], ["tokens is '0'"]),
        (["--batch-size", "3"], ["tokens is 40, expected a multiple of batch_size (3)"]),
        (["--layers", "0"], ["layers is 0"]),
        (["--rounds", "-1"], ["rounds is -1"]),
        (["--threads", "0"], ["threads is 0"]),
        (["--dtype", "fp31"], ["dtype", "did you mean 'fp32'"]),
        (["--seed", "-1"], ["seed is -1, expected 0 to"]),
        (["--seed", str(2**64 - 1)], [f"seed is {2**64 - 1}, expected 0 to"]),
        (["--device", "gpu"], ["device is 'gpu'"]),
        (["--csv", "/dev/null/table.csv"], ["cannot write to /dev/null"]),
        (["--csv", "/tmp"], ["cannot write to /tmp: expected a file"]),
        (["--trace", "/dev/null/traces"], ["cannot write to /dev/null"]),
        (["--snapshot", "a.pickle"], ["snapshot is 'a.pickle', but only a CUDA device"]),
    ],
)
def test_bad_options_are_one_line_and_exit_2(args, words, capsys):
    assert cli.main(["bench", "stack", *ARGS, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("backfuse: error: ")
    for word in words:
        assert word in lines[0]


def test_bad_requests_name_what_there_is(capsys):
    assert cli.main(["bench", "fnn"]) == 2
    assert "did you mean 'ffn'" in capsys.readouterr().err
    assert cli.main(["bench", "rope", "--shape", "gpt2-xl", "--device", "cpu"]) == 2
    assert "has no rotary embedding" in capsys.readouterr().err
    with pytest.raises(ValueError, match="block is always one"):
        run.Setup("block", layers=2, device="cpu")
    for args in ([], ["bench"], ["bench", "ffn", "--rounds", "many"]):
        with pytest.raises(SystemExit) as left:
            cli.main(args)
        assert left.value.code == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
@pytest.mark.parametrize("args", [["ffn", "--device", "cuda"], ["all", "--device", "cuda"]])
def test_cuda_without_cuda(args, capsys):
    assert cli.main(["bench", *args]) == 2
    assert "PyTorch finds no CUDA device here" in capsys.readouterr().err


def test_defaults_of_the_command_are_the_setups():
    arguments = vars(cli._parser().parse_args(["bench", "stack"]))
    defaults = dataclasses.asdict(run.Setup("stack", device="cpu"))
    for name, value in arguments.items():
        if value is not None and name in defaults:
            assert value == defaults[name], name


def test_numbers_of_tokens():
    assert options.parse_tokens("2k, 8K,100") == (2048, 8192, 100)


def test_missing_package_is_named(monkeypatch, capsys):
    real = options.importlib.import_module

    def absent(name):
        if name == "tqdm":
            raise ModuleNotFoundError("No module named 'tqdm'", name="tqdm")
        return real(name)

    monkeypatch.setattr(options.importlib, "import_module", absent)
    assert cli.main(["bench", "ffn", *ARGS]) == 2
    assert 'pip install "backfuse[bench]"' in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out.strip() == f"backfuse {backfuse.__version__}"


def test_every_way_is_explained():
    assert all(name in ways.__doc__ for name in ways.WAYS if not name.startswith("compile-0"))
