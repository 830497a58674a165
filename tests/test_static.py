"""The kernels compile for every architecture, fit, and keep their loops in registers.

Compiled ahead of time, in processes of their own: no GPU is needed, and Triton's interpreter,
which runs the kernels in the other tests, is not involved.
"""

import importlib
import importlib.metadata
import json
import os
import re
from pathlib import Path

import pandas as pd
import pytest
import torch

from backfuse import cli
from backfuse.bench import static_cases, static_report
from backfuse.bench.static_case import Case, bind
from backfuse.bench.static_cases import ARCHITECTURES, cases
from backfuse.bench.static_check import read_tables, regressions
from backfuse.bench.static_model import widths
from backfuse.bench.static_report import (
    Compiler,
    compile_all,
    frame,
    loop_spills,
    read_amdgcn,
    read_assembly,
    read_ptxas,
    read_sass,
    row,
    tensor_core,
)
from backfuse.kernels import attention_configs
from backfuse.kernels.configs import CONFIGS, Config, shared_bytes

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

GEMMS = tuple(CONFIGS)
TABLES = Path(__file__).parents[1] / "bench" / "results" / "static"


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """A folder that the processes of one test run share, so that each case is compiled once."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "static"


def compiled(wanted, cache):
    found = dict(compile_all(wanted, 1, cache))
    return [(case, found[index]) for index, case in enumerate(wanted)]


def defaults(architecture):
    """The first case of every kernel, with its configuration if it is a GEMM."""
    return [case for k in static_cases.MODULES for case in cases([architecture], [k])[:1]]


def check_not_worse(pairs):
    """Against the table that is checked in, where this version of Triton compiled it."""
    earlier = read_tables(TABLES, sorted({case.architecture for case, _ in pairs}))
    worse = regressions(
        frame([row(*pair) for pair in pairs]), earlier, importlib.metadata.version("triton")
    )
    assert not worse, "\n".join([*worse, "if so it must be: backfuse bench static --csv"])


# What holds for the kernels


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_default_compiles_and_fits(architecture, cache):
    pairs = compiled(defaults(architecture), cache)
    check_not_worse(pairs)
    for case, found in pairs:
        where = f"{case.kernel} {architecture}: {found}"
        assert "error" not in found, where
        assert row(case, found)["programs_per_sm"] >= 1, where
        if case.kernel in GEMMS:
            assert found["loop_spills"] == 0, where
            assert not found["serialized"], where
            assert found["tensor_core"] != "none", where
            config = CONFIGS[case.kernel][architecture][0]
            check_estimate(case.kernel, config, architecture, found["shared_bytes"])


def check_estimate(kernel, config, architecture, actual):
    """`configs.shared_bytes`, by which configurations are chosen, against the compiler's figure."""
    estimate = shared_bytes(kernel, config, 2)
    where = f"{kernel} {architecture}: estimated {estimate}, actual {actual}"
    if architecture in static_cases.DESCRIPTORS:
        assert estimate <= actual <= estimate + 128, where  # and barriers
    elif architecture == "gfx942":
        # the epilogue moves a tile of fp32 through it, where the loop takes less
        assert actual <= max(estimate, 4 * config.block_m * config.block_n), where
    else:
        assert 0.3 * estimate <= actual <= estimate, where  # one buffer fewer than stages


@pytest.mark.slow
@pytest.mark.parametrize("kernel", GEMMS)
def test_hopper_spills_nothing_in_a_loop_and_serialises_nothing(kernel, cache):
    pairs = compiled(cases(["sm_90"], [kernel]), cache)
    check_not_worse(pairs)
    for index, (case, found) in enumerate(pairs):
        where = f"{kernel} {case.variant} {case.tile}: {found}"
        assert "error" not in found, where
        assert not found["serialized"], where
        if case.dtype == "fp32":  # without tensor cores; through descriptors it would be 47,000
            assert found["spill_bytes"] <= 1500 and not found["tma"], where
            continue
        assert found["loop_spills"] == 0, where
        assert found["tensor_core"].startswith("wgmma"), where
        pointers = case.variant.startswith(("pointers", "unaligned"))
        assert found["tma"] == (not pointers), where
        if index == 0:  # the main variant's default
            assert found["spill_bytes"] <= (40 if kernel == "ffn_recompute" else 0), where
        modelled = {widths(dot, case.options["num_warps"]) for dot in case.dots}
        assert modelled == set(map(int, re.findall(r"n(\d+)k", found["tensor_core"]))), where


@pytest.mark.slow
@pytest.mark.parametrize("kernel", attention_configs.CONFIGS)
def test_hopper_attention_spills_nothing_in_a_loop_and_serialises_nothing(kernel, cache):
    pairs = compiled(cases(["sm_90"], [kernel]), cache)
    check_not_worse(pairs)
    for case, found in pairs:
        where = f"{kernel} {case.variant} {case.tile}: {found}"
        assert "error" not in found, where
        assert not found["serialized"] and found["loop_spills"] == 0, where
        assert found["tensor_core"].startswith("wgmma"), where
        assert found["tma"] == (case.variant != "192/128"), where  # 192 is no power of two


@pytest.mark.slow
def test_a_spilling_kernel_is_seen(cache):
    # Four accumulators' worth of a tile on four warps: it cannot fit into registers.
    config = Config(128, 256, 64, 4, 3)
    case = static_cases._gemm("ffn_up", "sm_90", "main", config, static_cases.Flags())
    ((_, found),) = compiled([case], cache)
    assert found["spill_bytes"] > 1000
    assert found["loop_spills"] > 0
    assert found["registers"] == 255


# Reading

LOG = """ptxas info    : 11 bytes gmem
ptxas info    : Compiling entry function 'k' for 'sm_90a'
ptxas info    : Function properties for k
    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers
"""
SERIALIZED = (
    "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are "
    "serialized due to non wgmma instructions defining accumulator registers of a wgmma\n"
)


def test_a_log_is_read():
    assert read_ptxas(LOG) == {"registers": 168, "spill_bytes": 28, "serialized": False}
    assert read_ptxas(SERIALIZED + LOG)["serialized"]
    with pytest.raises(ValueError, match="log is 'nothing'"):
        read_ptxas("nothing")


def sass(*lines):
    """Lines as `cuobjdump -sass` prints them, 16 bytes apart."""
    return "\n".join(f"    /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(lines))


@pytest.mark.parametrize(
    ("lines", "spills"),
    [
        (["STL [R1], R2", "HGMMA.64x256x16.F32.BF16 R24", "@P0 BRA 0x10", "LDL R2, [R1]"], 0),
        (["HMMA.16816.F32.BF16 R24", "LDL R2, [R1]", "STL [R1], R2", "@P0 BRA 0x0", "EXIT"], 2),
        (["LDL R2, [R1]", "HMMA.16816.F32 R4", "@P0 BRA 0x10", "@P1 BRA 0x0"], 0),
        (["LDL R2, [R1]", "UTCHMMA gdesc[UR4]", "BRA 0x50", "EXIT", "NOP", "@P0 BRA 0x0"], None),
        (["LDL R2, [R1]", "HFMA2.MMA R4, -RZ", "@P0 BRA 0x0"], None),
        (["HMMA.16816.F32 R4", "@P0 BRA 0x30", "LDL R2, [R1]", "EXIT"], None),
    ],
    ids=["outside", "inside", "outer", "slow path", "no tensor core", "forward"],
)
def test_spills_are_counted_inside_loops_only(lines, spills):
    assert loop_spills(*read_sass(sass(*lines))) == spills


def test_two_loops_are_added_up():
    lines = ["HGMMA R1", "LDL R2, [R1]", "@P0 BRA 0x0", "HGMMA R1", "STL [R1], R2", "@P1 BRA 0x30"]
    assert loop_spills(*read_sass(sass(*lines, "EXIT"))) == 2


AMD = """k:
\ts_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1:                                ; %loop
\tv_mfma_f32_32x32x8_bf16 a[0:15], v[0:1], v[2:3], a[0:15]
\tREAD
\ts_cbranch_scc1 .LBB0_1
\tscratch_store_dword off, v1, off     ; 4-byte Folded Spill
\ts_endpgm
    .sgpr_spill_count: 1
    .vgpr_count:     112
    .vgpr_spill_count: 3
"""


def test_amd_assembly_is_read():
    clean, spilling = AMD.replace("READ", "s_nop 0"), AMD.replace("READ", "scratch_load_dword v1")
    assert read_amdgcn(clean) == {"registers": 112, "spill_bytes": 16, "serialized": False}
    assert loop_spills(*read_assembly(clean)) == 0
    assert loop_spills(*read_assembly(spilling)) == 1
    assert tensor_core(AMD) == "mfma f32_32x32x8_bf16"
    with pytest.raises(ValueError, match="no metadata"):
        read_amdgcn("s_endpgm")


def test_tensor_core_instructions_are_named():
    wgmma = "wgmma.mma_async.sync.aligned.{}.f32.bf16.bf16 {{}}, 0, 1;"
    ptx = wgmma.format("m64n64k16") + wgmma.format("m64n128k16")
    assert tensor_core(ptx) == "wgmma m64n128k16+m64n64k16"
    assert tensor_core("mma.sync.aligned.m16n8k16.row.col.f32.bf16") == "mma m16n8k16"
    assert tensor_core("tcgen05.mma.cta_group::1.kind::f16 [%r1]") == "tcgen05.mma"
    assert tensor_core("fma.rn.f32") == "none"


# Describing, compiling, keeping


def test_a_changed_kernel_is_an_error():
    case = cases(["sm_90"], ["weight_grad"])[0].as_dict()
    names = [*case["types"], *case["constexprs"]]
    signature, constexprs, attributes = bind(case, names, unspecialized=["M"])
    assert signature["dy"] == "tensordesc<bf16[64, 128]>"
    assert signature["ACCUMULATE"] == "constexpr" and constexprs[names.index("ACCUMULATE"),]
    aligned = {names[index] for (index,) in attributes}
    assert {"out", "N", "K", "stride_on"} <= aligned and not {"M", "dy"} & aligned
    with pytest.raises(ValueError, match="NEW are missing, none too many"):
        bind(case, [*names, "NEW"])
    with pytest.raises(ValueError, match="none are missing, x too many"):
        bind(case, [name for name in names if name != "x"])


def launches(module, name, monkeypatch):
    """A kernel of a module replaced by one that only notes how it was launched."""
    noted = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **options: noted.append((args, options))

    monkeypatch.setattr(module, f"{name}_kernel", Kernel())
    return noted


@pytest.mark.parametrize("kernel", GEMMS)
def test_a_case_is_what_the_launcher_launches(kernel, monkeypatch):
    module = importlib.import_module(f"backfuse.kernels.{static_cases.MODULES[kernel]}")
    noted = launches(module, kernel, monkeypatch)
    config = CONFIGS[kernel]["interpreter"][0]
    x, dy = torch.zeros(64, 64, device=DEVICE), torch.zeros(64, 64, device=DEVICE)
    weights, down, preact = [x, x], x, torch.zeros(64, 128, device=DEVICE)
    if kernel == "ffn_up":
        module.ffn_up(x, weights, [None] * 2, "silu", True, preact=preact, config=config)
    elif kernel == "ffn_dact":
        module.ffn_dact(dy, down, preact, "silu", True, preact, config=config)
    elif kernel == "ffn_recompute":
        module.ffn_recompute_dact(
            x, weights, [None] * 2, "silu", True, dy, down, preact, strategy="fused", config=config
        )
    else:
        module.weight_grad(x.clone(), dy, x, config=config)
    ((args, options),) = noted
    case = static_cases._gemm(kernel, "sm_80", "main", config, static_cases.Flags(dtype="fp32"))
    constexprs = {name: value for name, value in case.constexprs.items() if name in options}
    absent = [n for n, value in case.constexprs.items() if value is None and n not in options]
    assert set(options) == set(constexprs) | set(case.options)
    assert len(args) == len(case.types) + len(absent)
    assert {name: options[name] for name in case.options} == dict(case.options)
    elsewhere = ("DESC", "DTYPE")  # what depends on the device, and a type that has a name here
    for name in constexprs.keys() - set(elsewhere):
        assert options[name] == constexprs[name], name


def test_every_configuration_and_variant_is_a_case():
    for architecture in ARCHITECTURES:
        for kernel in GEMMS:
            found = cases([architecture], [kernel])
            main = [case for case in found if case.variant == "main"]
            assert len(main) == len(CONFIGS[kernel][architecture])
            assert len({json.dumps(case.as_dict()) for case in found}) == len(found)
    hopper = {case.variant for case in cases(["sm_90"], GEMMS)} - {"main"}
    assert hopper == {name for kernel in GEMMS for name in static_cases.VARIANTS[kernel]}


@pytest.mark.slow
def test_a_failure_or_a_crash_is_a_row_and_the_next_case_goes_on(tmp_path):
    (good,) = cases(["sm_80"], ["attention_delta"])
    types = {name: kind for name, kind in good.types.items() if name != "M"}
    bad = Case(**{**vars(good), "types": types})
    compiler = Compiler(tmp_path / "scratch")
    try:
        assert compiler(bad)["error"].endswith("M are missing, none too many")
        assert compiler(good)["registers"] > 0
        compiler._process.kill()
        assert "ended with status -9" in compiler(good)["error"]
        assert compiler(good)["registers"] > 0
    finally:
        compiler.close()
    failed = row(bad, {"error": "no"})
    assert failed["error"] == "no" and failed["registers"] is None


@pytest.mark.slow
def test_results_are_kept_and_failures_are_not(tmp_path, monkeypatch):
    wanted = cases(["sm_80"], ["attention_delta"])
    first = dict(compile_all(wanted, 1, tmp_path))
    assert len(list(tmp_path.iterdir())) == 1

    class Broken(Compiler):
        def __call__(self, case):
            return {"error": "no compiler"}

    monkeypatch.setattr(static_report, "Compiler", Broken)
    assert dict(compile_all(wanted, 1, tmp_path)) == first
    other = cases(["sm_90"], ["attention_delta"])
    assert dict(compile_all(other, 1, tmp_path)) == {0: {"error": "no compiler"}}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_key_depends_on_the_case_and_the_sources(monkeypatch, tmp_path):
    first, second = cases(["sm_80", "sm_90"], ["attention_delta"])
    key = static_report.cache_key(first)
    assert key == static_report.cache_key(first) != static_report.cache_key(second)
    (tmp_path / "attention_delta.py").write_text("from .tiles import load_tile\n")
    (tmp_path / "tiles.py").write_text("one\n")
    monkeypatch.setattr("backfuse.kernels.__path__", [str(tmp_path)])
    changed = static_report.cache_key(first)
    (tmp_path / "tiles.py").write_text("two\n")
    assert len({key, changed, static_report.cache_key(first)}) == 3


def test_ctrl_c_keeps_what_was_compiled(monkeypatch, tmp_path, capsys):
    def interrupted(wanted, jobs, cache):
        yield 0, {"registers": 40, "spill_bytes": 0, "shared_bytes": 0, "serialized": False}
        raise KeyboardInterrupt

    monkeypatch.setattr(static_report, "compile_all", interrupted)
    path = tmp_path / "table.csv"
    assert static_report.run(["sm_80"], ["attention_delta", "activation"], csv=path) == 130
    assert "interrupted" in capsys.readouterr().out
    assert list(pd.read_csv(path)["kernel"]) == ["attention_delta"]


# The command


@pytest.mark.slow
def test_the_command_prints_and_writes(monkeypatch, tmp_path, cache, capsys):
    monkeypatch.setattr(static_report, "default_cache", lambda: cache)
    path = tmp_path / "new" / "table.csv"
    arguments = ["--arch", "sm_80,gfx942", "--kernel", "attention_delta", "--jobs", "1"]
    assert cli.main(["bench", "static", *arguments, "--csv", str(path)]) == 0
    assert "attention_delta" in capsys.readouterr().out
    table = pd.read_csv(path)
    assert list(table["arch"]) == ["sm_80", "gfx942"]
    assert (table["spill_bytes"] == 0).all()
    assert {"triton", "ptxas", "date"} < set(table)


def test_a_failed_case_is_the_exit_code(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(
        static_report, "compile_all", lambda *_: iter([(0, {"error": "ValueError: why"})])
    )
    assert static_report.run(["sm_80"], ["attention_delta"]) == 1
    assert "failed: attention_delta sm_80 main: ValueError: why" in capsys.readouterr().out


@pytest.mark.parametrize("before, code", [(39, 1), (40, 0)])
def test_a_worse_case_is_the_exit_code(before, code, monkeypatch, tmp_path, capsys):
    found = {"registers": 40, "spill_bytes": 0, "shared_bytes": 0, "serialized": False, "stages": 3}
    monkeypatch.setattr(static_report, "compile_all", lambda *_: iter([(0, found)]))
    path = tmp_path / "sm_80.csv"
    assert static_report.run(["sm_80"], ["attention_delta"], csv=path) == 0
    table = pd.read_csv(path)
    table["registers"] = before
    table.to_csv(path, index=False)
    assert static_report.run(["sm_80"], ["attention_delta"], check=tmp_path) == code
    said = capsys.readouterr().out
    assert ("worse: attention_delta sm_80 bf16 main 1x32x128: registers 39 -> 40" in said) == code
    table.assign(triton="3.0.0").to_csv(path, index=False)
    assert static_report.run(["sm_80"], ["attention_delta"], check=tmp_path) == 0
    assert "nothing was compared" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--arch", "sm_91", "arch is 'sm_91', expected one of sm_80, .*did you mean 'sm_90'"),
        ("--kernel", "ffn_dakt", "kernel is 'ffn_dakt', expected .*did you mean 'ffn_dact'"),
        ("--jobs", "0", "jobs is 0, expected at least 1"),
        ("--check", "/nowhere", "No such file.*/nowhere/sm_80.csv"),
    ],
)
def test_bad_options_are_named(option, value, message, capsys):
    assert cli.main(["bench", "static", option, value]) == 2
    assert re.search(message, capsys.readouterr().err)
