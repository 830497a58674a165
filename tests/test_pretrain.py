"""examples/pretrain.py: learns, resumes bit by bit, and never leaves a broken checkpoint."""

import contextlib
import errno
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import filesystem, format_utils

TEXT = b"The quick brown fox jumps over the lazy dog. " * 100
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
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("pretrain_example", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def pretrain():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    path = list(sys.path)
    yield load_script()
    sys.path[:] = path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    sys.modules.pop("pretrain_example", None)
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(TEXT)
    return path


def arguments(text, out, *more, **changes):
    sizes = ("hidden-size", "intermediate-size", "layers", "heads", "kv-heads")
    tiny = {n: v for n, v in TINY.items() if not ("model" in changes and n in sizes)}
    flags = {**tiny, **{name.replace("_", "-"): value for name, value in changes.items()}}
    pairs = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [*pairs, "--data", str(text), "--out", str(out), *more]


def read(out):
    """What the last checkpoint holds."""
    *_, last = sorted(path for path in out.glob("step-*") if (path / "run.json").exists())
    file = out / "whole.pt"
    format_utils.dcp_to_torch_save(last, file)
    state = torch.load(file, weights_only=True)
    file.unlink()
    return state


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert one["step"] == other["step"]
    assert torch.equal(one["pieces"], other["pieces"])
    assert one["model"].keys() == other["model"].keys()
    assert one["model"] and one["optimizer"]["state"]
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    for index, state in one["optimizer"]["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["optimizer"]["state"][index][name]), (index, name)


def interrupt_after(pretrain, monkeypatch, steps, number=signal.SIGINT):
    train_step = pretrain.Trainer.train_step

    def interrupted(trainer):
        result = train_step(trainer)
        if trainer.step == steps:
            os.kill(os.getpid(), number)
        return result

    monkeypatch.setattr(pretrain.Trainer, "train_step", interrupted)


def test_resumed_run_equals_uninterrupted_one(pretrain, text, tmp_path, monkeypatch, capsys):
    assert pretrain.main(arguments(text, tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        interrupt_after(pretrain, patch, 3)
        assert pretrain.main(arguments(text, tmp_path / "parts")) == 130
    assert read(tmp_path / "parts")["step"] == 3
    assert "Ctrl-C again" in capsys.readouterr().err
    # Another policy may take over: no policy changes the result.
    again = arguments(text, tmp_path / "parts", "--resume", policy="full")
    with monkeypatch.context() as patch:
        interrupt_after(pretrain, patch, 5, signal.SIGTERM)
        assert pretrain.main(again) == 128 + signal.SIGTERM
    assert pretrain.main(again) == 0
    assert_same(read(tmp_path / "whole"), read(tmp_path / "parts"))
    assert len(list((tmp_path / "parts").glob("step-*"))) == 2  # the older ones are gone
    rows = [row.split(",") for row in (tmp_path / "parts" / "log.csv").read_text().splitlines()]
    assert rows[0][:3] == ["step", "loss", "norm"]
    assert [row[0] for row in rows[1:]] == ["6"]


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
            out=str(tmp_path), device="cpu",
        )  # fmt: skip
        with started(pretrain, config) as trainer:
            losses.append([trainer.train_step() for _ in range(3)])
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]))


@contextlib.contextmanager
def started(pretrain, config):
    yield pretrain.start(config)[0]
    dist.destroy_process_group()


def test_schedule(pretrain, text, tmp_path):
    config = pretrain.Config(
        hidden_size=32, intermediate_size=64, layers=1, heads=4, steps=10, warmup=4,
        learning_rate=1.0, final_rate=0.1, data=str(text), out=str(tmp_path), device="cpu",
    )  # fmt: skip
    with started(pretrain, config) as trainer:
        rates = []
        for trainer.step in range(11):
            rates.append(trainer.rate())
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[10] == pytest.approx(0.1)
    assert rates[4:] == sorted(rates[4:], reverse=True)


KILLED_WHILE_SAVING = """
import importlib.util, os, signal, sys
import torch.distributed.checkpoint as dcp
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1]).parent))
spec = importlib.util.spec_from_file_location("pretrain_example", sys.argv[1])
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
save = dcp.save
def half(state, checkpoint_id):
    save(state, checkpoint_id=checkpoint_id)
    if state["step"] >= 4:
        next(checkpoint_id.glob("*.distcp")).write_bytes(b"half of a checkpoint")
        (checkpoint_id / ".metadata").unlink()
        os.kill(os.getpid(), signal.SIGKILL)
dcp.save = half
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

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_full_disk_leaves_the_last_checkpoint_and_nothing_else(
    pretrain, text, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    args = arguments(text, out, checkpoint_every=2)
    create = filesystem.FileSystem.create_stream

    @contextlib.contextmanager
    def full(self, path, mode):
        with create(self, path, mode) as stream:
            fourth = "00000004" in str(path) and "w" in mode
            yield Full(stream) if fourth else stream

    with monkeypatch.context() as patch:
        patch.setattr(filesystem.FileSystem, "create_stream", full)
        message = refused(pretrain, capsys, args)
    assert message.endswith(f"cannot write {out / 'step-00000004'}: [Errno 27] File too large")
    assert sorted(path.name for path in out.iterdir()) == ["log.csv", "step-00000002"]
    assert read(out)["step"] == 2
    assert pretrain.main([*args, "--resume"]) == 0


def test_resume_refuses_what_is_not_its_own(pretrain, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrain.main(arguments(text, out, steps=1)) == 0
    capsys.readouterr()
    assert "--resume" in refused(pretrain, capsys, arguments(text, out))
    changed = arguments(text, out, "--resume", steps=1, layers=3)
    assert "layers 2 -> 3" in refused(pretrain, capsys, changed)
    lossy = arguments(text, out, "--resume", steps=2, policy="preact=fp8, qkv=recompute")
    assert "lossy  -> preact=fp8" in refused(pretrain, capsys, lossy)
    text.write_bytes(b"other text " * 300)
    other = arguments(text, out, "--resume", steps=1)
    assert "data " in refused(pretrain, capsys, other)
    [step] = out.glob("step-*")
    again = arguments(text, out, "--resume", steps=1)
    text.write_bytes(TEXT)
    for file in step.glob("*.distcp"):
        file.write_bytes(b"rubbish")
    assert "is damaged" in refused(pretrain, capsys, again)
    (step / "run.json").write_bytes(b"rubbish")
    assert "not a checkpoint" in refused(pretrain, capsys, again)


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
    assert "batch_size" in message(batch_size=0)
    assert "model is 'llama-8b', expected" in message(model="llama-8b")
    assert "gpt2-xl, expected rotary" in message(model="gpt2-xl", layers=2)
    assert "token_dtype is 'int8'" in message(token_dtype="int8")
    assert "vocabulary is 10, expected at least 256" in message(vocabulary=10)
    assert "tensor_parallel is 2, expected a divisor of the 1 processes" in message(
        tensor_parallel=2
    )
    assert "budget is 1,024 bytes, expected at least" in message(budget="1KiB")
    assert not list((tmp_path / "out").glob("step-*"))
    occupied = arguments(text, text)
    assert str(text) in refused(pretrain, capsys, occupied)


def test_missing_packages_are_named_before_any_work(pretrain, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for flags in (["--tensorboard"], ["--wandb", "project"]):
        message = refused(pretrain, capsys, arguments(text, tmp_path / "out", *flags))
        assert f"pip install {flags[0][2:]}" in message
    if not torch.cuda.is_available():
        message = refused(pretrain, capsys, arguments(text, tmp_path / "o", "--memory-snapshot"))
        assert "memory_snapshot is True, expected False" in message
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused(pretrain, capsys, arguments("hf:some/text", tmp_path / "out"))
    assert "pip install datasets" in message


def test_a_budget_is_met_and_changes_no_bit(pretrain, text, tmp_path, capsys):
    for policy, name in (("keep", "kept"), ("full", "least")):
        assert pretrain.main(arguments(text, tmp_path / name, steps=2, policy=policy)) == 0
    kept, least = (int(last_row(tmp_path / name)["kept_bytes"]) for name in ("kept", "least"))
    budget = (kept + least) // 2
    assert pretrain.main(arguments(text, tmp_path / "planned", steps=2, budget=str(budget))) == 0
    assert int(last_row(tmp_path / "planned")["kept_bytes"]) <= budget < kept
    assert_same(read(tmp_path / "kept"), read(tmp_path / "planned"))


def last_row(out):
    lines = (out / "log.csv").read_text().splitlines()
    return dict(zip(lines[0].split(","), lines[-1].split(","), strict=True))


def test_a_config_json_says_what_the_model_is(pretrain, text, tmp_path):
    from transformers import Qwen3Config

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    Qwen3Config(**sizes, tie_word_embeddings=True).save_pretrained(tmp_path)
    args = arguments(text, tmp_path / "out", steps=2, model=tmp_path / "config.json")
    assert pretrain.main(args) == 0
    model = read(tmp_path / "out")["model"]
    assert model["embedding.weight"].shape == (300, 32)
    assert torch.equal(model["embedding.weight"], model["head.weight"])
    assert "blocks.layers.1.self_attn.q_norm.weight" in model


def test_a_config_json_of_another_kind_of_model_is_refused(pretrain, tmp_path):
    from transformers import Gemma2Config, GemmaConfig, GraniteConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    for config, told in (
        (GraniteConfig(**sizes, embedding_multiplier=12.0), "embedding_multiplier is 12.0"),
        (GraniteConfig(**sizes, logits_scaling=8.0), "logits_scaling is 8.0, expected 1.0"),
        (Gemma2Config(**sizes, layer_types=["full_attention"] * 2), "final_logit_softcapping is"),
        (GemmaConfig(**sizes), "norm_offset is 1.0, expected 0.0"),
    ):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=f"whose {told}"):
            pretrain.Shape.of(pretrain.Config(model=str(tmp_path / "config.json")))
    GraniteConfig(**sizes, embedding_multiplier=1.0, logits_scaling=1.0).save_pretrained(tmp_path)
    pretrain.Shape.of(pretrain.Config(model=str(tmp_path / "config.json")))


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_gradient_that_is_no_number_stops_before_the_step(
    pretrain, text, tmp_path, capsys, monkeypatch, value
):
    out = tmp_path / "out"
    train_step = pretrain.Trainer.train_step

    def broken(trainer):
        if trainer.step == 2:
            hidden = trainer.model.norm
            hidden.register_forward_hook(lambda _, __, y: y * float(value))
        return train_step(trainer)

    monkeypatch.setattr(pretrain.Trainer, "train_step", broken)
    message = refused(pretrain, capsys, arguments(text, out, checkpoint_every=1))
    assert "step 3: the gradient's norm is" in message
    assert read(out)["step"] == 2
    assert all(weight.isfinite().all() for weight in read(out)["model"].values())


def test_documents_do_not_see_each_other(pretrain, text, tmp_path):
    """Packed: the loss is that of each document alone, and what follows one is not learnt."""
    config = pretrain.Config(
        hidden_size=32, intermediate_size=64, layers=2, heads=4, seq_len=60, batch_size=2,
        data=str(text), out=str(tmp_path), device="cpu", document_end=ord("."),
    )  # fmt: skip
    with started(pretrain, config) as trainer:
        batch, count = trainer.batch("train", torch.Generator().manual_seed(3))
        tokens, labels = batch["tokens"], batch["labels"]
        assert tokens.shape == (1, 120) and batch["cu_seqlens"][-1] == 120
        assert (labels[tokens == ord(".")] == -100).all()
        assert count == int((labels != -100).sum()) < 120
        whole = trainer.model(**batch)
        parts = 0.0
        for start, end in zip(batch["cu_seqlens"], batch["cu_seqlens"][1:], strict=False):
            assert start in (0, 60) or tokens[0, start - 1] == ord(".")
            parts += trainer.model(tokens[:, start:end], labels[:, start:end])
        torch.testing.assert_close(whole, parts)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs a C++ compiler")
def test_compiled_layers_learn_the_same(pretrain, text, tmp_path):
    for name, flags in (("plain", []), ("compiled", ["--compile"])):
        assert pretrain.main(arguments(text, tmp_path / name, *flags, steps=2, layers=1)) == 0
    plain, compiled = (last_row(tmp_path / name) for name in ("plain", "compiled"))
    for name in ("loss", "norm", "validation_loss"):
        assert float(compiled[name]) == pytest.approx(float(plain[name]), rel=1e-5)
