"""`backfuse doctor` and `backfuse bench kernels`: what is wrong, fails or does not fit shows."""

import dataclasses
import math

import pytest
import torch
from conftest import DEVICE

from backfuse import BlockSpec, cli
from backfuse.bench import doctor, kernel_case, kernel_cases, kernels, measure
from backfuse.bench.options import DTYPES
from backfuse.bench.shapes import SHAPES
from backfuse.kernels import activation, attention, configs, ffn_dact, norm, qk_rope

LLAMA = BlockSpec(32, 48, 4, 2)
GPT2 = SHAPES["gpt2-xl"].replace(
    hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=8
)


@pytest.fixture(autouse=True)
def stubbed(monkeypatch):
    """No clock, a small copy: the kernels run where the tests do."""
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(measure, "kernel_seconds", lambda call, device: 0.002)


def sizes(spec, dtype="fp32"):
    return kernel_case.Sizes(spec, 40, DTYPES[dtype], DEVICE)


def measured(spec, dtype="fp32", rounds=1):
    results = kernels.Results()
    kernels.measure_cases(results, sizes(spec, dtype), rounds)
    return results


@pytest.mark.parametrize(("spec", "dtype"), [(LLAMA, "fp32"), (LLAMA, "bf16"), (GPT2, "fp32")])
def test_kernel_rows(spec, dtype):
    results = measured(spec, dtype, rounds=2)
    frame = results.frame()
    assert (frame["status"] == "ok").all(), frame[["kernel", "variant", "error", "status"]]
    assert not results.failed
    expected = {"copy", "torch.mm", "ffn_up", "ffn_dact", "ffn_recompute", "library"}
    expected |= {"norm_forward", "norm_apply", "norm_backward", "weight_grad"}
    expected |= {"activation_forward", "attention_delta"}
    expected |= {"attention_forward", "attention_dkdv", "attention_dq"}
    if spec is LLAMA:
        expected |= {"qk_rope_forward", "qk_rope_backward"}
    assert set(frame["kernel"]) == expected
    bound = ("norm", "qk_rope", "copy", "activation", "attention_delta")
    memory = frame["kernel"].str.startswith(bound)
    assert frame["gbps"].notna().equals(memory) and frame["tflops"].isna().equals(memory)
    assert not frame.duplicated(["kernel", "variant", "config"]).any()
    # Every call takes as long: rates are as the work, and fused as fast as split.
    gemms = frame[frame["baseline"].str.startswith("torch.mm")]
    same = gemms[~gemms["kernel"].str.startswith("attention")]
    assert same["share"].to_list() == pytest.approx([1] * len(same))
    assert (frame["time_vs_split"].dropna() == 1).all()
    assert frame["time_vs_split"].notna().any()
    up = frame[frame["kernel"] == "ffn_up"].iloc[0]
    h, f = 32, 48 * (2 if spec is LLAMA else 1)
    assert up["tflops"] == pytest.approx(2 * 40 * h * f / 0.002 / 1e12)
    assert up["default"] and up["config"]
    table = results.table()
    assert "ffn_up hidden + preact" in table and "nan" not in table
    lines = results.figures()
    assert any(line.startswith("ffn_up hidden: 1.000 of torch.mm") for line in lines)
    assert any("x the time of split" in line for line in lines)


def test_every_configuration_has_a_row_even_those_that_do_not_run(monkeypatch):
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
    results = measured(LLAMA, rounds=2)
    rows = [c for c in results.cases if c.kernel == "ffn_dact" and c.variant == "kept preact"]
    assert [case.status for case in rows] == [
        "ok", "RuntimeError: out of resource: shared memory", "WRONG", "does not fit"
    ]  # fmt: skip
    assert [len(case.seconds) for case in rows] == [2, 0, 0, 0]
    assert [case.default for case in rows] == [True, False, False, False]
    assert results.failed
    assert all(case.status == "ok" for case in results.cases if case.kernel != "ffn_dact")
    assert "WRONG" in results.table()


def test_a_slightly_wrong_kernel_is_wrong(monkeypatch):
    rope, backward = qk_rope.qk_rope_backward, norm.norm_backward
    core, activate = attention.attention_forward, activation.activation_forward

    def odd_rope(dqk, *args, **options):
        found = rope(dqk, *args, **options)
        dqk[-1] *= -1
        return found

    def odd_attention(*args, **options):
        out, lse = core(*args, **options)
        return out, lse + 0.3

    monkeypatch.setattr(qk_rope, "qk_rope_backward", odd_rope)
    monkeypatch.setattr(
        norm, "norm_backward", lambda *args, **options: (backward(*args, **options)[0] * 1.1, None)
    )
    monkeypatch.setattr(attention, "attention_forward", odd_attention)
    monkeypatch.setattr(activation, "activation_forward", lambda *args: activate(*args) * 1.05)
    results = measured(LLAMA, "bf16")
    wrong = {case.kernel for case in results.cases if case.status == "WRONG"}
    assert wrong == {
        "qk_rope_backward", "norm_backward", "attention_forward", "activation_forward"
    }  # fmt: skip


def test_kernel_that_fails_while_it_is_timed(monkeypatch):
    def clock(call, device):
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(measure, "kernel_seconds", clock)
    results = measured(LLAMA)
    assert {case.status for case in results.cases} == {"RuntimeError: the device is lost"}
    assert results.frame()["ms"].isna().all()


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--device", "cpu"], "expected a GPU; without one `backfuse bench static`"),
        (["--shape", "llama-9b"], "shape is 'llama-9b'"),
        (["--tokens", "2k,4k"], "expected one number of rows"),
        (["--rounds", "0"], "rounds is 0"),
        (["--dtype", "fp8"], "dtype is 'fp8'"),
    ],
)
def test_bad_options(args, words, capsys):
    assert cli.main(["bench", "kernels", *args]) == 2
    assert words in capsys.readouterr().err


# doctor


def test_doctor_checks_every_kernel_and_configuration(capsys):
    assert cli.main(["doctor", "--device", DEVICE]) == 0
    printed = capsys.readouterr().out
    assert f"torch     {torch.__version__}" in printed and "ptxas     12." in printed
    name = configs.table_of(configs.architecture(torch.device(DEVICE)), 2)
    for kernel, tables in configs.CONFIGS.items():
        for config in tables[name]:
            assert f"{kernel} " in printed and kernel_case.config_text(config) in printed
    for kernel in ("attention_forward", "attention_dkdv", "attention_dq", "qk_rope_backward"):
        assert f"gated: {kernel} " in printed
    last = printed.splitlines()[-1]
    assert last.split()[0] == last.split()[2] and "kernels and configurations are right" in last


def test_doctor_says_which_kernel_is_wrong(monkeypatch, capsys):
    real = ffn_dact.ffn_dact

    def odd(*args, **options):
        hidden, dbias = real(*args, **options)
        return hidden * (1.01 if options.get("scales") is None else 1), dbias

    def fail(*args, **options):
        raise RuntimeError("too many registers\nmore")

    monkeypatch.setattr(ffn_dact, "ffn_dact", odd)
    monkeypatch.setattr(activation, "activation_forward", fail)
    monkeypatch.setattr(doctor, "SPECS", {"gated": LLAMA})
    monkeypatch.setattr(doctor, "INTERPRETED_TOKENS", 9)
    assert cli.main(["doctor", "--device", DEVICE]) == 1
    lines = capsys.readouterr().out.splitlines()
    wrong = [line for line in lines if not line.startswith("ok ")][6:-1]
    assert len(wrong) == 2
    assert "WRONG gated: ffn_dact kept preact" in wrong[0]
    assert "too many registers" in wrong[1] and "activation_forward" in wrong[1]


def test_doctor_without_a_gpu_says_that_nothing_was_checked(monkeypatch, capsys):
    from backfuse.kernels import launch

    monkeypatch.setattr(launch, "INTERPRETED", False)
    assert cli.main(["doctor", "--device", "cpu"]) == 0
    assert "no kernel was checked: there is no GPU; TRITON_INTERPRET=1" in capsys.readouterr().out


def test_doctor_warns_of_a_suspect_compiler(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert len(list(doctor.warnings("cuda"))) == (doctor.ptxas_version() in doctor.SUSPECT_PTXAS)
    monkeypatch.setattr(doctor, "ptxas_version", lambda: "13.0.48")
    assert list(doctor.warnings("cuda")) == []


def test_baselines_are_no_findings():
    cases = kernel_cases.cases(sizes(LLAMA))
    assert {case.kernel for case in cases if case.check is None} == {"copy", "torch.mm"}
