"""examples/pretrain.py in several processes: one process's losses, the same bits after a resume."""

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys

import pytest
import torch
from test_pretrain import SCRIPT, TEXT, arguments, assert_same, read
from test_pretrain_start import LLAMA3, llama

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed"),
]

#: Seconds that a run may take before it counts as hanging.
LIMIT = 150

OPTIONS = {"checkpoint_every": 3, "log_every": 1, "kv_heads": 4, "timeout": 60}


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_bytes(TEXT)
    return path


def start(ranks, args, driver=(str(SCRIPT),)):
    """One process a rank, without torchrun, which would end the others itself."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world |= {"OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *driver, *args],
            env={**os.environ, **world, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        for rank in range(ranks)
    ]


def finish(processes):
    """Exit codes, and what each rank said on standard error."""
    try:
        said = [process.communicate(timeout=LIMIT)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], said


def train(ranks, args):
    codes, said = finish(start(ranks, args))
    assert not any(codes), said


def column(out, name):
    with open(out / "log.csv", newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.fixture(scope="module")
def main():
    """The script's, in this process."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(number) for number in numbers]
    sys.path.insert(0, str(SCRIPT.parent))
    import pretrain

    yield pretrain.main
    sys.path.remove(str(SCRIPT.parent))
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def alone(main, text, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "out"
    assert main(arguments(text, out, **OPTIONS)) == 0
    return out


def assert_like(out, alone):
    for name in ("loss", "norm", "validation_loss"):
        assert column(out, name) == pytest.approx(column(alone, name), rel=2e-5)


def test_two_processes_and_a_resume(main, text, alone, tmp_path, capsys):
    out = tmp_path / "out"
    args = arguments(text, out, **OPTIONS)
    train(2, args)
    assert_like(out, alone)
    assert column(out, "kept_bytes")[0] == column(alone, "kept_bytes")[0] / 2
    whole, half = read(out), tmp_path / "half"
    assert not torch.equal(whole["rng-0"], whole["rng-1"])  # other dropout
    half.mkdir()
    shutil.copytree(out / "step-00000003", half / "step-00000003")
    train(2, [*arguments(text, half, **OPTIONS), "--resume"])
    assert_same(whole, read(half))
    # One process refuses to go on from there, unless it is told to.
    shutil.rmtree(half / "step-00000006")
    args = [*arguments(text, half, **OPTIONS), "--resume"]
    assert main(args) == 2
    changed = "layout [2, 1, 'cpu'] -> [1, 1, 'cpu'] (--any-layout allows it)"
    assert changed in capsys.readouterr().err
    assert main([*args, "--any-layout"]) == 0
    run = json.loads((half / "step-00000006" / "run.json").read_text())
    assert run["layout"] == [1, 1, "cpu"]
    for name, weight in read(half)["model"].items():
        torch.testing.assert_close(weight, whole["model"][name], rtol=1e-4, atol=1e-5)


def test_tensor_parallel(main, text, tmp_path):
    """Two times two ranks, packed documents, scaled rotary embeddings."""
    options = {**OPTIONS, "model": llama(tmp_path, rope_parameters=LLAMA3)}
    options |= {"document_end": ord(".")}
    del options["kv_heads"]
    assert main(arguments(text, tmp_path / "alone", **options)) == 0
    train(4, arguments(text, tmp_path / "out", tensor_parallel=2, **options))
    assert_like(tmp_path / "out", tmp_path / "alone")
    rngs = [read(tmp_path / "out")[f"rng-{rank}"] for rank in range(4)]
    same = [torch.equal(rngs[0], rng) for rng in rngs]
    assert same == [True, True, False, False] and torch.equal(rngs[2], rngs[3])


OTHERWISE = """
import os, sys
from pathlib import Path
script, text = sys.argv[1:3]
sys.path.insert(0, str(Path(script).parent))
import pretrain
other = ["--data", text, "--layers", "3"] if os.environ["RANK"] == "1" else []
sys.exit(pretrain.main(sys.argv[3:] + other))
"""


def test_a_rank_that_is_given_something_else_is_named_by_all(text, tmp_path):
    other = tmp_path / "other.txt"
    other.write_bytes(TEXT[::-1])
    driver = ("-c", OTHERWISE, str(SCRIPT), str(other))
    codes, said = finish(start(2, arguments(text, tmp_path / "out", **OPTIONS), driver))
    assert codes == [2, 2], said
    for one in said:
        assert "given the same as rank 0: rank 1 (layers 2 -> 3, data " in one


DYING = """
import os, signal, sys
from pathlib import Path
script = sys.argv.pop(1)
sys.path.insert(0, str(Path(script).parent))
import pretrain
train_step = pretrain.Trainer.train_step
def dies(trainer):
    if trainer.step == 4 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return train_step(trainer)
pretrain.Trainer.train_step = dies
sys.exit(pretrain.main(sys.argv[1:]))
"""


def test_a_rank_that_dies_stops_the_other_with_a_message(text, tmp_path):
    out = tmp_path / "out"
    driver = ("-c", DYING, str(SCRIPT))
    codes, said = finish(start(2, arguments(text, out, **OPTIONS), driver))
    assert codes == [3, -signal.SIGKILL], said
    assert "pretrain: error: another process is gone" in said[0]
    assert read(out)["step"] == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "batch_size is 3, expected a multiple of 2"),
        ({"tensor_parallel": 2, "kv_heads": 1}, "num_key_value_heads is 1, expected a multiple"),
        ({"tensor_parallel": 2, "seq_len": 33}, "seq_len is 33, expected a multiple of 2"),
        ({"tensor_parallel": 3}, "tensor_parallel is 3, expected a divisor of the 2 processes"),
    ],
)
def test_worlds_that_do_not_divide(main, text, tmp_path, monkeypatch, change, message, capsys):
    """Refused by every rank alone, before it waits for the others."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    args = arguments(text, tmp_path / "out", **{**OPTIONS, **change})
    assert main(args) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
