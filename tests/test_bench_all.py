"""`bench all`, `bench check` and `bench report`: in time, resumable, never after a wrong kernel."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import DEVICE

from backfuse import BlockSpec, cli
from backfuse.bench import doctor, everything, measure, pictures, plot, problem, report, rows, run
from backfuse.bench.registry import OPERATIONS
from backfuse.bench.shapes import ALL_SHAPES, CROSS_CHECKS, CrossCheck

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("eager", "checkpoint", "backfuse")


@pytest.fixture(autouse=True)
def tiny(monkeypatch, quick_collector):
    """A small shape, a small copy, and no kernels to check."""
    monkeypatch.setitem(ALL_SHAPES, "tiny", BlockSpec(32, 48, 4, 2))
    monkeypatch.setitem(measure.COPY_BYTES, "cpu", 2**12)
    monkeypatch.setattr(measure, "KERNEL_SECONDS", 1e-4)
    monkeypatch.setattr(doctor, "unchecked", lambda device: "this is a test")


@pytest.fixture
def jobs(monkeypatch):
    """Three small jobs."""

    def made(device):
        options = {"shape": ("tiny",), "tokens": "40", "rounds": 2, "providers": NAMES}
        ops = ("ffn", "block", "stack")
        return [run.Setup(op, device=device, modes=("fwd", "both"), **options) for op in ops]

    monkeypatch.setattr(everything, "jobs", made)


def test_all_measures_in_order_and_goes_on_where_it_stopped(jobs, tmp_path, capsys, monkeypatch):
    clock, real = [0.0], run.Bench.measure

    def slow(self, case):
        clock[0] += 25
        real(self, case)

    monkeypatch.setattr(everything.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run.Bench, "measure", slow)
    args = ["bench", "all", "--device", "cpu", "--minutes", "1", "--out", str(tmp_path / "new")]
    assert cli.main(args) == 0
    printed = capsys.readouterr().out
    assert "out of time: 1 of 3 jobs are left for next time" in printed
    csv = tmp_path / "new" / "results.csv"
    first = csv.read_text()
    assert list(pd.read_csv(csv)["op"].unique()) == ["ffn", "block"]
    monkeypatch.setattr(run.Bench, "measure", real)
    assert cli.main(args) == 0
    assert csv.read_text().startswith(first)
    frame = pd.read_csv(csv)
    assert list(frame["op"].unique()) == ["ffn", "block", "stack"]
    assert not frame.duplicated(list(rows.KEY)).any()
    assert "there already" in capsys.readouterr().out


def test_all_ends_with_one_table(jobs, tmp_path, capsys):
    assert cli.main(["bench", "all", "--device", "cpu", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    table = printed[printed.index("minutes") :]
    assert {"ffn", "block", "stack"} <= {line.split()[0] for line in table.splitlines() if line}
    assert table.count("backfuse-reference") == 2 * (2 + 4 + 4)


def test_all_stops_on_a_wrong_kernel_before_any_timing(jobs, tmp_path, capsys, monkeypatch):
    findings = [doctor.Finding("a", 0.0, 1.0, "ok"), doctor.Finding("b", 2.0, 1.0, "WRONG")]
    monkeypatch.setattr(doctor, "unchecked", lambda device: None)
    monkeypatch.setattr(doctor, "findings", lambda device, defaults_only: iter(findings))
    monkeypatch.setattr(run.Bench, "measure", lambda self, case: pytest.fail("something was timed"))
    assert cli.main(["bench", "all", "--device", "cpu", "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "WRONG b" in printed and "stopped before any timing" in printed
    assert not (tmp_path / "results.csv").exists()


def test_interrupted_all_prints_what_is_done(jobs, tmp_path, capsys, monkeypatch):
    real, calls = problem.Step.time, []

    def timed(self, contender):
        calls.append(contender)
        if len(calls) == 12:
            raise KeyboardInterrupt
        real(self, contender)

    monkeypatch.setattr(problem.Step, "time", timed)
    assert cli.main(["bench", "all", "--device", "cpu", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().out
    assert list(pd.read_csv(tmp_path / "results.csv")["op"].unique()) == ["ffn", "block"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--minutes", "0"], "minutes is 0.0, expected more than 0"),
        (["--minutes", "nan"], "minutes is nan"),
        (["--out", "/dev/null/results"], "cannot write to /dev/null/results"),
    ],
)
def test_bad_options_of_all(args, words, capsys):
    assert cli.main(["bench", "all", "--device", "cpu", *args]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_jobs_are_measurable(device, monkeypatch):
    monkeypatch.setattr(run, "check_device", lambda device: None)
    setups = everything.jobs(device)
    assert {setup.op for setup in setups} == OPERATIONS.keys()
    assert all(list(setup.cases()) for setup in setups)
    expected = "stack" if device == "cpu" else "ffn"
    assert setups[0].op == expected


def test_cross_check_measures_and_says_what_the_source_says(tmp_path, capsys, monkeypatch):
    providers = ("eager", "checkpoint", "liger", "backfuse")
    case = CrossCheck("ffn", "tiny", 2, 16, 3, providers, "a lot")
    monkeypatch.setitem(CROSS_CHECKS, "mine", case)
    csv = tmp_path / "a.csv"
    assert cli.main(["bench", "check", "mine", "--device", "cpu", "--csv", str(csv)]) == 0
    assert "mine as published: a lot" in capsys.readouterr().out
    frame = pd.read_csv(csv)
    assert set(frame["layers"]) == {3} and set(frame["batch_size"]) == {2}
    assert list(frame["status"]) == ["ok"] * 4
    assert cli.main(["bench", "check", "quack"]) == 2
    assert "did you mean 'quack-mlp'" in capsys.readouterr().err


# The report


@pytest.fixture
def checkout(tmp_path):
    """A repository with the README and one device's measurements."""
    shutil.copy(ROOT / "README.md", tmp_path / "README.md")
    folder = tmp_path / "bench" / "results" / "cpu"
    folder.mkdir(parents=True)
    shutil.copy(ROOT / "bench" / "results" / "cpu" / "results.csv", folder)
    return tmp_path


def test_report_writes_pages_and_every_picture_they_show(checkout, capsys):
    csv = checkout / "bench" / "results" / "cpu" / "results.csv"
    args = ["--shape", "tiny", "--tokens", "32,64", "--rounds", "1", "--device", "cpu"]
    chosen = ["--provider", "checkpoint,backfuse", "--csv", str(csv)]
    assert cli.main(["bench", "ffn", *args, *chosen]) == 0
    assert cli.main(["bench", "report", "--root", str(checkout)]) == 0
    page = (checkout / "docs" / "benchmarks.md").read_text()
    assert "### ffn: tiny, 1 x 32 tokens, fp32" in page and "| backfuse-reference keep |" in page
    shown = {line.split("](")[1].rstrip(")\n") for line in page.splitlines() if line[:2] == "!["}
    shown = {(checkout / "docs" / link).resolve() for link in shown}
    kinds = [path.name.split("-")[0] for path in shown]
    assert {kind: kinds.count(kind) for kind in kinds} == {
        "activations.png": 1, "bytes": 3, "rate": 1, "timeline": 2
    }  # fmt: skip
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in shown)
    drawn = set((checkout / "bench").rglob("*.png"))
    assert drawn == shown
    for path, text in report.render(checkout).items():
        assert path.read_text() == text
    frame = pd.read_csv(csv)
    frame["vs_eager"] += 0.25
    frame.to_csv(csv, index=False)
    assert all(path.read_text() != text for path, text in report.render(checkout).items())


def test_a_second_run_is_shown_beside_the_first(checkout):
    folder = checkout / "bench" / "results" / "cpu"
    frame = pd.read_csv(folder / "results.csv")
    frame["vs_eager"] *= 1.1
    frame.to_csv(folder / "results-2.csv", index=False)
    page = report.render(checkout)[checkout / "docs" / "benchmarks.md"]
    assert "| run 2 |" in page and page.count("### ") == 1
    [row] = [line for line in page.splitlines() if line.startswith("| backfuse-reference full ")]
    assert "| 0.862 | 0.948 |" in row


def test_kernels_are_on_the_page(checkout, monkeypatch):
    pytest.importorskip("triton")
    from backfuse.bench import kernel_case, kernels

    monkeypatch.setattr(measure, "kernel_seconds", lambda call, device: 0.002)
    results = kernels.Results()
    sizes = kernel_case.Sizes(ALL_SHAPES["tiny"], 9, torch.float32, DEVICE)
    kernels.measure_cases(results, sizes, rounds=1)
    results.cases[-1].status = "WRONG"
    csv = checkout / "bench" / "results" / "cpu" / "kernels.csv"
    results.frame().assign(shape="tiny", tokens=9, dtype="fp32").to_csv(csv, index=False)
    page = report.render(checkout)[checkout / "docs" / "benchmarks.md"]
    [row] = [line for line in page.splitlines() if line.startswith("| ffn_up hidden |")]
    assert "| 2 | 100% | torch.mm" in row
    assert f"1 of {len(results.cases)} are wrong or failed" in page


def test_kernels_stop_at_the_deadline():
    from backfuse.bench import kernel_case, kernels

    results = kernels.Results()
    sizes = kernel_case.Sizes(ALL_SHAPES["tiny"], 9, torch.float32, DEVICE)
    kernels.measure_cases(results, sizes, rounds=1, deadline=0.0)
    assert results.frame()["ms"].isna().all() and not results.failed


def test_noise_is_called_noise(checkout):
    folder = checkout / "bench" / "results" / "cpu"
    for file in folder.glob("results-*.csv"):
        file.unlink()
    rows = pd.read_csv(folder / "results.csv")
    spread = ["vs_eager_p20", "vs_eager", "vs_eager_p80"]

    def called_noise(**ratios):
        """Whose ratios carry the mark, when the newest file says this of them."""
        for provider, values in ratios.items():
            rows.loc[rows["provider"] == provider, spread] = values
        number = len(list(folder.glob("results*.csv")))
        rows.to_csv(folder / (f"results-{number}.csv" if runs else "results.csv"), index=False)
        page = report.render(checkout)[checkout / "docs" / "benchmarks.md"].splitlines()
        lines = {line.split(" | ")[0].removeprefix("| "): line for line in page if " | " in line}
        return {name for name in ("compile", "checkpoint") if " ~ " in lines[name]}

    runs = 0
    assert called_noise(compile=(0.9, 0.95, 1.01), checkpoint=(1.1, 1.2, 1.3)) == {"compile"}
    assert called_noise(compile=(0.9, 0.95, 0.99)) == set()
    runs = 1
    assert called_noise(compile=(0.8, 0.81, 0.82), checkpoint=(1.3, 1.31, 1.32)) == set()
    assert called_noise(checkpoint=(0.8, 0.85, 0.9)) == {"checkpoint"}
    assert called_noise(compile=(0.99, 1.02, 1.1)) == {"compile", "checkpoint"}


def test_several_sizes_are_shown_at_a_glance(checkout):
    folder = checkout / "bench" / "results" / "cpu"
    rows = pd.read_csv(folder / "results.csv").assign(op="block")
    sizes = [rows.assign(hidden_size=h, tokens=1024 * k) for h, k in ((8, 2), (8, 4), (16, 2))]
    for number, ratio in (("5", 1.254), ("6", 1.346)):
        for size in sizes:
            size.loc[size["provider"] == "checkpoint", "vs_eager"] = ratio
        pd.concat(sizes[: 3 if number == "5" else 2]).to_csv(folder / f"results-{number}.csv")
    page = report.render(checkout)[checkout / "docs" / "benchmarks.md"]
    part = page[page.index("### block, fp32: time / eager") :]
    assert "| | 8, 2k | 8, 4k | 16, 2k |" in part
    assert "| checkpoint | 1.25 1.35 | 1.25 1.35 | 1.25 |" in part


@pytest.mark.parametrize("broken", ["markers", "rows", "columns", "folder"])
def test_report_says_what_it_misses(broken, checkout, capsys):
    csv = checkout / "bench" / "results" / "cpu" / "results.csv"
    readme = checkout / "README.md"
    words = {
        "markers": "has no markers", "rows": "has no rows of", "columns": "has no column note",
        "folder": "expected the repository's",
    }  # fmt: skip
    if broken == "markers":
        readme.write_text(readme.read_text().replace(report.END, ""))
    elif broken == "rows":
        pd.read_csv(csv).assign(tokens=1).to_csv(csv, index=False)
    elif broken == "columns":
        pd.read_csv(csv).drop(columns="note").to_csv(csv, index=False)
    else:
        shutil.rmtree(checkout / "bench")
    before = readme.read_text()
    assert cli.main(["bench", "report", "--root", str(checkout)]) == 2
    assert words[broken] in capsys.readouterr().err
    assert readme.read_text() == before


# Pictures


def test_labels_do_not_leave_the_picture(tmp_path):
    names = [name for op in OPERATIONS.values() for name in op.providers]
    points = [plot.Point(name, 2.0 + i / 10, 1.0 + i / 50) for i, name in enumerate(names)]
    plot.tradeoff(points, tmp_path / "a.png", title="t", subtitle="s", time_label="time")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_every_provider_has_a_family():
    families = {
        "eager": "plain PyTorch", "compile-0.5": "torch.compile", "torch-remat": "torch_remat",
        "te-checkpoint": "Liger, QuACK, TransformerEngine", "flash-attn": "attention libraries",
        "sac-attention": "torch.utils.checkpoint", "backfuse-triton keep": "backfuse",
    }  # fmt: skip
    assert {name: plot.family(name) for name in families} == families
    assert plot.label("backfuse-triton lean") == "lean"
    assert plot.label("backfuse-fused selective") == "selective (fused)"
    assert plot.label("compile-0.5") == "budget 0.5"


def test_frontier_is_what_nobody_beats():
    values = {"a": (2.0, 1.5), "b": (2.001, 1.2), "c": (4.0, 1.3), "d": (8.0, 1.0), "e": (9.0, 1.0)}
    points = [plot.Point(name, *value) for name, value in values.items()]
    assert [point.name for point in plot.frontier(points)] == ["b", "d"]


def test_bars_add_up_to_what_is_kept():
    kept = {"x": 1024, "preact": 4096, "lse": 512}
    parts = pictures._by_activation(kept, tokens=1)
    assert parts["x"] == 1 and parts["preact"] == 4 and parts["rest"] == 0.5
    assert sum(parts.values()) == sum(kept.values()) / 1024
