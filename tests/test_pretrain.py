"""examples/pretrain.py: learns, resumes bit by bit, and never leaves a broken checkpoint."""

import errno
import importlib.util
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "pretrain.py"
TINY = {
    "hidden-size": 32,
    "intermediate-size": 64,
    "layers": 2,
    "heads": 4,
    "kv-heads": 2,
    "seq-len": 32,
    "batch-size": 2,
    "accumulation": 2,
    "steps": 6,
    "warmup": 2,
    "checkpoint-every": 100,
    "validation-batches": 1,
    "device": "cpu",
}


def load_script():
    spec = importlib.util.spec_from_file_location("pretrain_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pretrain():
    handler = signal.getsignal(signal.SIGINT)
    yield load_script()
    signal.signal(signal.SIGINT, handler)
    sys.modules.pop("pretrain_example", None)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"The quick brown fox jumps over the lazy dog. " * 100)
    return path


def arguments(text, out, *more, **changes):
    flags = {**TINY, **{name.replace("_", "-"): value for name, value in changes.items()}}
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*pairs, "--data", str(text), "--out", str(out), *more]


def read(out):
    return torch.load(out / "checkpoint.pt", weights_only=True)


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert one["step"] == other["step"]
    assert torch.equal(one["pieces"], other["pieces"])
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    for index, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][index][name]), (index, name)


def interrupt_after(pretrain, monkeypatch, steps):
    train_step = pretrain.Trainer.train_step

    def interrupted(trainer):
        result = train_step(trainer)
        if trainer.step == steps:
            os.kill(os.getpid(), signal.SIGINT)
        return result

    monkeypatch.setattr(pretrain.Trainer, "train_step", interrupted)


def test_resumed_run_equals_uninterrupted_one(pretrain, text, tmp_path, monkeypatch, capsys):
    assert pretrain.main(arguments(text, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(pretrain, patch, 3)
        assert pretrain.main(arguments(text, tmp_path / "parts")) == 130
    assert read(tmp_path / "parts")["step"] == 3
    assert "Ctrl-C again" in capsys.readouterr().out
    # Another policy may take over: no policy changes the result.
    again = arguments(text, tmp_path / "parts", "--resume", policy="full")
    assert pretrain.main(again) == 0
    assert_same(read(tmp_path / "whole"), read(tmp_path / "parts"))


def test_loss_falls_under_bf16_autocast(pretrain, text, tmp_path, capsys):
    args = arguments(text, tmp_path / "out", "--bf16", steps=30, log_every=1, learning_rate=5e-3)
    assert pretrain.main(args) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": loss " in line]
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in lines]
    assert len(losses) == 30
    assert losses[-1] < 0.75 * losses[0]


def test_accumulation_is_the_larger_batch(pretrain, text, tmp_path):
    losses = []
    for batch_size, accumulation in ((4, 1), (2, 2)):
        config = pretrain.Config(
            hidden_size=32, intermediate_size=64, layers=1, heads=4, seq_len=16,
            batch_size=batch_size, accumulation=accumulation, data=str(text),
        )  # fmt: skip
        trainer = pretrain.Trainer(config, pretrain.load(text, 16), "cpu")
        losses.append([trainer.train_step() for _ in range(3)])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


def test_schedule(pretrain, text):
    config = pretrain.Config(
        hidden_size=32, intermediate_size=64, layers=1, heads=4, steps=10, warmup=4,
        learning_rate=1.0, final_rate=0.1,
    )  # fmt: skip
    trainer = pretrain.Trainer(config, pretrain.load(text, 16), "cpu")
    rates = []
    for trainer.step in range(11):
        rates.append(trainer.rate())
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


KILLED_WHILE_SAVING = """
import importlib.util, os, signal, sys, torch
spec = importlib.util.spec_from_file_location("pretrain_example", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
save = torch.save
def half(state, file):
    if state["step"] < 4:
        return save(state, file)
    file.write(b"half of a checkpoint")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
sys.exit(module.main(sys.argv[2:]))
"""


def test_killed_while_saving_leaves_the_last_checkpoint(pretrain, text, tmp_path):
    out = tmp_path / "out"
    args = arguments(text, out, checkpoint_every=2)
    command = [sys.executable, "-c", KILLED_WHILE_SAVING, str(SCRIPT), *args]
    died = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert read(out)["step"] == 2
    assert pretrain.main([*args, "--resume"]) == 0
    assert pretrain.main(arguments(text, tmp_path / "whole")) == 0
    assert_same(read(tmp_path / "whole"), read(out))


def refused(pretrain, capsys, args):
    assert pretrain.main(args) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("pretrain: error: ")
    return lines[0]


class Full:
    """A file on a disk that has room for a few bytes more."""

    def __init__(self, file):
        self.file, self.room = file, 1000

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.EFBIG, "File too large")
        return self.file.write(data)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("torch_writes", [False, True])
def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    pretrain, text, tmp_path, capsys, monkeypatch, torch_writes
):
    out = tmp_path / "out"
    args = arguments(text, out, checkpoint_every=2)
    save = torch.save

    def full(state, file):
        if state["step"] < 4:
            save(state, file)
        elif torch_writes:  # which raises a RuntimeError on top of the file's error
            save(state, Full(file))
        else:
            file.write(b"half of a checkpoint")
            raise OSError(errno.EFBIG, "File too large")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        message = refused(pretrain, capsys, args)
    assert message.endswith(f"cannot write {out / 'checkpoint.pt'}: File too large")
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]
    assert read(out)["step"] == 2
    assert pretrain.main([*args, "--resume"]) == 0


def test_resume_refuses_what_is_not_its_own(pretrain, text, tmp_path, capsys):
    out = tmp_path / "out"
    missing = arguments(text, out, "--resume")
    assert "no checkpoint" in refused(pretrain, capsys, missing)
    assert pretrain.main(arguments(text, out, steps=1)) == 0
    capsys.readouterr()
    assert "--resume" in refused(pretrain, capsys, arguments(text, out))
    changed = arguments(text, out, "--resume", steps=1, layers=3)
    assert "layers 2 -> 3" in refused(pretrain, capsys, changed)
    text.write_bytes(b"other text " * 300)
    other = arguments(text, out, "--resume", steps=1)
    assert "the text" in refused(pretrain, capsys, other)
    (out / "checkpoint.pt").write_bytes(b"rubbish")
    rubbish = arguments(text, out, "--resume", steps=1)
    assert "not a checkpoint" in refused(pretrain, capsys, rubbish)


@pytest.mark.parametrize(
    ("flag", "values"),
    {
        "clip": ["0", "-1", "nan", "inf"],
        "warmup": ["-3"],
        "learning-rate": ["0", "-1", "nan", "inf"],
        "final-rate": ["-1", "7", "nan"],
        "weight-decay": ["-1", "nan", "inf"],
        "seed": ["-1", str(2**64 - 1), str(2**64)],
    }.items(),
)
def test_bad_numbers_are_refused_before_any_work(
    pretrain, text, tmp_path, capsys, monkeypatch, flag, values
):
    monkeypatch.setattr(pretrain, "load", None)
    for value in values:
        message = refused(pretrain, capsys, arguments(text, tmp_path / "out", **{flag: value}))
        name = flag.replace("-", "_")
        number = value if flag in ("seed", "warmup") else float(value)
        assert f"{name} is {number}, expected" in message
    assert not (tmp_path / "out").exists()


def test_extreme_numbers_that_work(pretrain, text, tmp_path):
    limits = {"seed": 2**64 - 2, "warmup": 0, "final_rate": 1.0, "weight_decay": 0.0, "steps": 1}
    assert pretrain.main(arguments(text, tmp_path / "high", **limits)) == 0
    assert pretrain.main(arguments(text, tmp_path / "low", steps=1, final_rate=0, seed=0)) == 0
    with pytest.raises(ValueError, match="warmup is 2.5"):
        pretrain.Config(warmup=2.5).check()


def test_bad_settings(pretrain, text, tmp_path, capsys):
    def message(**changes):
        return refused(pretrain, capsys, arguments(text, tmp_path / "out", **changes))

    assert "layers" in message(layers=0)
    assert "accumulation" in message(accumulation=0)
    assert "num_key_value_heads is 3" in message(kv_heads=3)
    assert "selective" in message(policy="selectiv")
    assert "device" in message(device="typewriter")
    assert not (tmp_path / "out" / "checkpoint.pt").exists()
    occupied = arguments(text, text)
    assert str(text) in refused(pretrain, capsys, occupied)
