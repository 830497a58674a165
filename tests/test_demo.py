"""`backfuse demo` from end to end, and the text it reads."""

import sysconfig

import pandas as pd
import pytest
import torch

from backfuse import cli
from backfuse.bench import data, demo, measure
from backfuse.bench.model import ByteModel, ModelSize, generate, printable
from backfuse.bench.plain import PlainBlock, PlainStack

TINY = ["--steps", "2", "--seq-len", "32", "--layers", "2", "--batch-size", "2"]
TINY += ["--hidden-size", "32", "--device", "cpu"]
NAMES = ["eager", "checkpoint", "sac-attention"]
NAMES += [f"backfuse {policy}" for policy in ("keep", "selective", "lean", "full")]


def small_stack(size):
    return PlainStack(PlainBlock(size.spec) for _ in range(size.layers))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(bytes(range(256)) * 20)
    return path


def test_demo_writes_what_it_promises(tmp_path, text, capsys):
    out = tmp_path / "new" / "folder"
    assert cli.main(["demo", *TINY, "--data", str(text), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "losses and final weights are bitwise equal over 2 steps" in printed
    assert "checkpoint against eager: bitwise equal losses" in printed
    assert "Written by the model" in printed
    assert f"{text}: 5,120 bytes" in printed

    frame = pd.read_csv(out / "summary.csv")
    assert list(frame["policy"]) == NAMES
    ours = frame[frame["policy"].str.startswith("backfuse")]
    assert (ours["kept_kib_predicted"] == ours["kept_kib_measured"]).all()
    assert ours["kept_kib_measured"].is_monotonic_decreasing
    assert ours["recompute_gflop"].is_monotonic_increasing
    assert ours["recompute_gflop"].iloc[0] == 0
    assert ours["validation_loss"].nunique() == 1
    assert frame.drop(columns=["kept_kib_predicted", "policy"]).notna().all(axis=None)

    losses = pd.read_csv(out / "losses.csv")
    assert list(losses.columns) == ["step", *NAMES]
    assert len(losses) == 2
    assert (out / "memory-vs-time.png").read_bytes().startswith(b"\x89PNG")


def test_interrupted_demo_writes_what_is_done(tmp_path, text, capsys, monkeypatch):
    calls = 0
    seconds = measure.seconds

    def interrupted(call, device):
        nonlocal calls
        calls += 1
        if calls > len(NAMES) + 3:
            raise KeyboardInterrupt
        return seconds(call, device)

    monkeypatch.setattr(measure, "seconds", interrupted)
    assert cli.main(["demo", *TINY, "--data", str(text), "--out", str(tmp_path)]) == 130
    assert "Interrupted after 1 of 2 steps" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "losses.csv")) == 1
    assert pd.read_csv(tmp_path / "summary.csv")["time_vs_eager"].notna().all()


def test_interrupted_before_the_first_step(tmp_path, text, monkeypatch):
    def interrupted(trainee, inputs, targets):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.Trainee, "examine", interrupted)
    assert cli.main(["demo", *TINY, "--data", str(text), "--out", str(tmp_path)]) == 130
    frame = pd.read_csv(tmp_path / "summary.csv")
    assert len(frame) == len(NAMES)
    # Nothing was measured, and nothing claims to be.
    assert frame.drop(columns=["policy", "kept_kib_predicted"]).isna().all(axis=None)
    assert not (tmp_path / "memory-vs-time.png").exists()


def refused(capsys, *args):
    """The one line that the command says about the user's mistake."""
    assert cli.main(["demo", *TINY, *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("backfuse: error: ")
    return lines[0]


def test_bad_input_is_one_line_and_exit_2(tmp_path, text, capsys):
    out = ("--out", str(tmp_path / "out"))
    occupied = refused(capsys, "--data", str(text), "--out", str(text / "below"))
    assert "cannot write" in occupied and str(text) in occupied
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert "0 bytes, expected at least" in refused(capsys, *out, "--data", str(empty))
    assert "cannot be read" in refused(capsys, *out, "--data", str(tmp_path / "missing"))
    assert "not a regular file" in refused(capsys, *out, "--data", str(tmp_path))
    assert "steps is 0" in refused(capsys, *out, "--steps", "0")
    assert "hidden_size is 33" in refused(capsys, *out, "--hidden-size", "33")
    assert "device is 'abacus'" in refused(capsys, *out, "--device", "abacus")
    for seed in (-1, 2**64 - 1, 2**64):
        assert f"seed is {seed}, expected 0 to" in refused(capsys, *out, "--seed", str(seed))


def test_defaults_of_the_command_are_the_settings():
    options = vars(cli._parser().parse_args(["demo"]))
    del options["run"]
    assert demo.Settings(**options) == demo.Settings()


def test_standard_library_is_deterministic_and_without_tests():
    corpus = data.load()
    assert corpus.sha256 == data.load().sha256
    assert len(corpus.train) + len(corpus.validation) > 5_000_000
    whole = bytes(torch.cat((corpus.train, corpus.validation)).numpy())
    # A file that is in, and one that is among the tests.
    stdlib = sysconfig.get_path("stdlib")
    with open(f"{stdlib}/this.py", "rb") as file:
        assert file.read() in whole
    assert b"import idlelib.idle_test" not in whole
    assert sysconfig.get_platform().encode() not in whole


def test_split_and_batches(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(bytes(range(200)))
    corpus = data.load(path, seq_len=9)
    assert bytes(torch.cat((corpus.train, corpus.validation)).numpy()) == path.read_bytes()
    assert len(corpus.validation) == 10
    generator = torch.Generator().manual_seed(0)
    inputs, targets = corpus.batch("validation", 64, 9, generator)
    assert inputs.shape == targets.shape == (64, 9)
    assert torch.equal(inputs + 1, targets)
    assert inputs.min() == 190 and targets.max() == 199


def test_shortest_text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"x" * 20)
    corpus = data.load(path, seq_len=9)
    assert len(corpus.train) == len(corpus.validation) == 10
    path.write_bytes(b"x" * 19)
    with pytest.raises(ValueError, match="19 bytes, expected at least 20"):
        data.load(path, seq_len=9)


def test_generated_text_is_safe_to_print():
    size = ModelSize(layers=1, hidden_size=32, seq_len=8)
    model = ByteModel(size.spec, 8, small_stack(size))
    written = generate(model, b"ab", 30, torch.Generator().manual_seed(0), temperature=1.0)
    assert len(written) == 32 and written.startswith("ab")
    assert printable([27, 91, 10, 65, 127, 200]) == "·[\nA··"


def test_model_is_causal():
    size = ModelSize(layers=2, hidden_size=32, seq_len=8)
    model = ByteModel(size.spec, 8, small_stack(size))
    inputs = torch.randint(256, (1, 8))
    changed = inputs.clone()
    changed[0, 5] = (changed[0, 5] + 1) % 256
    same = (model(inputs) == model(changed)).all(-1)[0]
    assert same[:5].all() and not same[5:].any()
