"""examples/pretrain.py: what it is given, how it goes on, and what it says of it."""

import os
import shutil
import signal
import subprocess
import sys
import types
from dataclasses import fields

import pytest
import test_pretrain
import torch
from test_pretrain import arguments, assert_same, read, refused, started

from backfuse import block_flops

pretrain, text = test_pretrain.pretrain, test_pretrain.text

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip


def llama(folder, **changes):
    """A config.json; returns its path."""
    from transformers import LlamaConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300}
    LlamaConfig(**sizes | changes).save_pretrained(folder)
    return folder / "config.json"


@pytest.fixture
def config_of(pretrain, text, tmp_path):
    def make(**changes):
        sizes = {"hidden_size": 32, "intermediate_size": 64, "layers": 1, "heads": 4}
        sizes = {} if "model" in changes else sizes
        common = {"seq_len": 60, "batch_size": 2, "data": str(text), "device": "cpu"}
        return pretrain.Config(**sizes | common | {"out": str(tmp_path / "out")} | changes)

    return make


def test_a_changed_config_json_is_noticed_and_dropout_goes_on(pretrain, text, tmp_path, capsys):
    out, model = tmp_path / "out", llama(tmp_path / "one", attention_dropout=0.5)
    args = arguments(text, out, model=model, steps=2, checkpoint_every=1)
    assert pretrain.main(args) == 0
    whole = read(out)
    shutil.rmtree(out / "step-00000002")
    assert not torch.equal(whole["rng-0"], read(out)["rng-0"])
    changes = {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}, "rms_norm_eps": 1e-3}
    llama(tmp_path / "one", **changes, attention_dropout=0.5, tie_word_embeddings=True)
    told = refused(pretrain, capsys, [*args, "--resume"])
    for change in ("rope_theta 10000.0 -> 500000.0", "norm_eps 1e-06 -> 0.001", "tied False -> Tr"):
        assert change in told
    llama(tmp_path / "one", rope_parameters=LLAMA3, attention_dropout=0.5)
    told = refused(pretrain, capsys, [*args, "--resume"])
    assert told.endswith("frequencies, rope_theta 10000.0 -> None")
    # The same model and data in other places are the same.
    moved = text.rename(tmp_path / "moved.txt")
    model = llama(tmp_path / "other", attention_dropout=0.5)
    args = arguments(moved, out, "--resume", model=model, steps=2)
    assert pretrain.main(args) == 0
    assert_same(whole, read(out))
    assert torch.equal(whole["rng-0"], read(out)["rng-0"])


def test_resume_begins_where_there_is_nothing_and_steps_may_grow(
    pretrain, text, tmp_path, capsys, monkeypatch
):
    out, begun = tmp_path / "out", []
    snapshot = pretrain.memory_snapshot

    def counted(config, done):
        begun.append(done)
        return snapshot(config, done)

    monkeypatch.setattr(pretrain, "memory_snapshot", counted)
    assert pretrain.main(arguments(text, out, "--resume", steps=2)) == 0
    said = capsys.readouterr().out
    assert f"resume: there is no checkpoint in {out}: from the beginning" in said
    assert "0.0 M parameters: 2 layers of width 32, vocabulary 256; 1 x cpu" in said
    assert pretrain.main(arguments(text, out, "--resume", steps=4)) == 0
    assert "resume: steps 2 -> 4, the learning rate's cosine with it" in capsys.readouterr().out
    assert read(out)["step"] == 4 and begun == [0, 1, 0, 1]
    assert "steps 4 -> 3" in refused(pretrain, capsys, arguments(text, out, "--resume", steps=3))


def test_damaged_folders(pretrain, text, tmp_path, capsys):
    out = tmp_path / "out"
    assert pretrain.main(arguments(text, tmp_path / "whole", steps=4)) == 0
    assert pretrain.main(arguments(text, out, steps=2, checkpoint_every=1)) == 0
    shutil.rmtree(out / "step-00000001")
    for name in ("step-00000003", "step-00000004"):  # one begun, one whose end was lost
        (out / name).mkdir()
        (out / name / "0.distcp").write_bytes(b"rest")
    (out / "step-00000004" / "run.json").touch()
    capsys.readouterr()
    options = {"steps": 4, "checkpoint_every": 1, "checkpoints": 1}
    assert pretrain.main(arguments(text, out, "--resume", **options)) == 0
    assert f"pretrain: {out / 'step-00000004'} is damaged" in capsys.readouterr().err
    assert_same(read(tmp_path / "whole"), read(out))
    assert [path.name for path in out.glob("step-*")] == ["step-00000004"]
    [part] = out.glob("step-*/*.distcp")
    part.write_bytes(b"")
    told = refused(pretrain, capsys, arguments(text, out, "--resume", **options))
    assert told.endswith("is damaged: EOFError")
    (out / "step-00000004" / "run.json").write_bytes(b"")
    for flags in (["--resume"], []):
        told = refused(pretrain, capsys, arguments(text, out, *flags, **options))
        assert "step-00000004 is not a checkpoint of this script, or is damaged" in told


def test_a_second_sigterm_does_nothing_and_a_second_ctrl_c_stops(
    pretrain, text, tmp_path, capsys, monkeypatch
):
    train_step, sent = pretrain.Trainer.train_step, []

    def interrupted(trainer):
        for number in sent:
            os.kill(os.getpid(), number)
        return train_step(trainer)

    monkeypatch.setattr(pretrain.Trainer, "train_step", interrupted)
    sent[:] = [signal.SIGTERM] * 3
    assert pretrain.main(arguments(text, tmp_path / "out")) == 128 + signal.SIGTERM
    assert read(tmp_path / "out")["step"] == 1
    sent[:] = [signal.SIGTERM, signal.SIGINT]
    assert pretrain.main(arguments(text, tmp_path / "other")) == 130
    assert "the last checkpoint is whole" in capsys.readouterr().err
    assert not list((tmp_path / "other").glob("step-*"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--policy", "lean", "--budget", "1GiB"], "policy is lean beside budget (1GiB)"),
        (["--model", "small-64", "--hidden-size", "64"], "hidden_size is 64 beside model (small-6"),
        (["--model", "FILE", "--layers", "6"], "expected one of --layers and --model"),
        (["--model", "FILE", "--kv-heads", "2"], "kv_heads is 2 beside model"),
        (["--document-end", "256"], "document_end is 256, expected -1 or one of the vocabulary's"),
        (["--document-end", "-2"], "document_end is -2, expected -1 or"),
    ],
)
def test_flags_that_would_not_count_are_refused(
    pretrain, text, tmp_path, capsys, flags, message
):
    if "FILE" in flags:
        flags[1] = str(llama(tmp_path))
    common = ["--data", str(text), "--out", str(tmp_path / "out"), "--device", "cpu"]
    assert message in refused(pretrain, capsys, [*common, *flags])
    assert not list(tmp_path.glob("out/step-*"))


def test_models_that_are_no_language_models(pretrain, tmp_path):
    from transformers import CLIPConfig, ViTConfig

    for config, message in ((ViTConfig(), "a vit without a vocab_size"), (CLIPConfig(), "clip")):
        config.save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=message):
            pretrain.Shape.of(pretrain.Config(model=str(tmp_path / "config.json")))
    with pytest.raises(ValueError, match="expected layers, and all alike"):
        model = str(llama(tmp_path, num_hidden_layers=0))
        pretrain.Shape.of(pretrain.Config(model=model))


@pytest.mark.parametrize("kind", ["llama3", "linear", "yarn"])
def test_scaled_rope_is_hugging_faces(pretrain, config_of, tmp_path, kind):
    from transformers import AutoConfig, LlamaForCausalLM

    changes = {"rope_parameters": LLAMA3 | {"rope_type": kind}}
    model = str(llama(tmp_path, **changes, max_position_embeddings=512, initializer_range=0.5))
    torch.manual_seed(0)
    theirs = LlamaForCausalLM(AutoConfig.from_pretrained(model))
    with started(pretrain, config_of(model=model)) as trainer:
        batch, _ = trainer.batch("train", torch.Generator().manual_seed(3))
        for name, weight in theirs.model.layers.state_dict().items():
            mine = trainer.model.blocks.layers.get_parameter(name)
            mine.detach().to_local().copy_(weight)
        for mine, weight in (
            (trainer.model.embedding.weight, theirs.model.embed_tokens.weight),
            (trainer.model.head.weight, theirs.lm_head.weight),
        ):
            mine.detach().to_local().copy_(weight.detach())
        logits = theirs(batch["tokens"]).logits.flatten(0, 1)
        expected = torch.nn.functional.cross_entropy(
            logits, batch["labels"].flatten(), reduction="sum"
        )
        torch.testing.assert_close(trainer.loss(**batch), expected, rtol=2e-5, atol=0)
        plain = {n: part for n, part in batch.items() if n != "places"}
        with pytest.raises(ValueError, match="position_embeddings is None"):
            trainer.loss(**plain)


def test_scaled_rope_begins_anew_in_each_document(pretrain, config_of, tmp_path):
    model = str(llama(tmp_path, rope_parameters=LLAMA3))
    with started(pretrain, config_of(model=model, document_end=ord("."), bf16=True)) as trainer:
        batch, _ = trainer.batch("train", torch.Generator().manual_seed(3))
        seen = []
        trainer.model.blocks.layers[0].register_forward_pre_hook(
            lambda _, args, kwargs: seen.extend([*args, *kwargs["position_embeddings"]]),
            with_kwargs=True,
        )
        trainer.loss(**batch)
        assert [part.dtype for part in seen] == [torch.bfloat16, torch.float32, torch.float32]
        starts = batch["cu_seqlens"].tolist()
        assert len(starts) > 4
        for part in zip(starts, starts[1:], strict=False):
            for mine, alone in zip(
                seen[1:],
                trainer.shape.angles(torch.arange(part[1] - part[0])),
                strict=True,
            ):
                assert torch.equal(mine[0, slice(*part)], alone)
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    model = str(llama(tmp_path, rope_parameters=dynamic))
    with pytest.raises(ValueError, match="scaled by dynamic, expected one of linear, llama3, yarn"):
        pretrain.Shape.of(pretrain.Config(model=model))


def test_flops_are_of_documents(pretrain, config_of):
    flops = {}
    for end in (-1, ord(".")):
        with started(pretrain, config_of(document_end=end, accumulation=3)) as trainer:
            trainer.train_step()
            flops[end], lengths = trainer.step_flops, trainer.lengths
            assert sum(lengths) == 3 * 2 * 60
            spec, head = trainer.shape.spec, 6 * 360 * 32 * 256
    layer = block_flops(spec, "keep", batch_size=6, seq_len=60)
    assert flops[-1] == layer.forward + layer.backward + head
    missing = 4 * 60 * 60 * 6 - 4 * sum(n * n for n in lengths)  # Q K^T and P V, and 5 / 2 of it
    assert flops[-1] - flops[ord(".")] == missing * spec.q_size * 3.5 > 0


def test_every_flag_has_help(pretrain, capsys):
    assert all(len(one.metadata["help"]) > 3 for one in fields(pretrain.Config))
    with pytest.raises(SystemExit) as stopped:
        pretrain.main(["--help"])
    assert stopped.value.code == 0
    assert "that a process waits for the others" in " ".join(capsys.readouterr().out.split())


def test_tensorboard_forgets_what_is_done_again_and_is_closed(
    pretrain, text, tmp_path, monkeypatch
):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(purge_step)

        def add_scalar(self, name, value, step):
            calls.append((name, step))

        def close(self):
            calls.append("closed")

    stand_in = types.SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    monkeypatch.setattr(pretrain, "check_installed", lambda config: None)
    for steps, flags in ((1, []), (2, ["--resume"])):
        flags = ["--tensorboard", *flags]
        assert pretrain.main(arguments(text, tmp_path / "out", *flags, steps=steps)) == 0
        assert calls[0] == steps and calls[-1] == "closed" and ("loss", steps) in calls
        calls.clear()


def test_peak_memory_is_in_bytes(pretrain, monkeypatch):
    log = sys.modules["pretrain_log"]
    used = types.SimpleNamespace(ru_maxrss=7)
    monkeypatch.setattr(log.resource, "getrusage", lambda who: used)
    for platform, expected in (("linux", 7 * 1024), ("darwin", 7)):
        monkeypatch.setattr(sys, "platform", platform)
        assert log.peak_bytes("cpu") == expected


def test_lines_of_the_log_that_are_torn_are_dropped(pretrain, text, tmp_path):
    args = arguments(text, tmp_path, steps=2, checkpoint_every=1, log_every=1)
    assert pretrain.main(args) == 0
    log = tmp_path / "log.csv"
    whole = log.read_text()
    torn = "\0\0\0", "1,2,3,4,5,6,7,8,9,10,11", "2,3", f"x{whole.splitlines()[-1]}"
    log.write_text(whole + "\n".join(torn) + "\n")
    args = arguments(text, tmp_path, "--resume", steps=3, checkpoint_every=1, log_every=1)
    assert pretrain.main(args) == 0
    rows = log.read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]


@pytest.mark.parametrize("number", [signal.SIGTERM, None])
def test_nobody_listens_any_more(text, tmp_path, number):
    """The reader of a pipe goes, by the same Ctrl-C or before: a checkpoint is written still."""
    steps = 400 if number else 4
    args = arguments(text, tmp_path, steps=steps, checkpoint_every=10**6, log_every=1)
    run = subprocess.Popen(
        [sys.executable, str(test_pretrain.SCRIPT), *args], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    while b"step 1:" not in run.stdout.readline():
        assert run.poll() is None
    run.stdout.close()
    run.stderr.close()
    if number:
        run.send_signal(number)
    assert run.wait(60) == (128 + number if number else 0)
    assert len(list(tmp_path.glob("step-*"))) == 1


def test_dropout_of_another_layout_is_no_repetition(pretrain, text, tmp_path, monkeypatch):
    args = arguments(text, tmp_path, steps=2, checkpoint_every=2)
    assert pretrain.main(args) == 0
    monkeypatch.setattr(
        pretrain.Ranks, "layout", property(lambda ranks: [1, 1, "another"]), raising=True
    )
    config = pretrain.Config.parse("", [*args, "--resume", "--any-layout"])
    seeds = []
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or torch.Generator())
    with started(pretrain, config):
        pass
    assert len(set(seeds)) == len(seeds) == 3  # of the weights, of this rank, from step 2 on


def test_what_cannot_be_read_is_named(pretrain, text, tmp_path, capsys, monkeypatch):
    for odd in (None, 3):
        datasets = types.ModuleType("datasets")
        table = {"text": ["a" * 200, odd]}
        datasets.load_dataset = lambda *_, table=table, **__: type(
            "Rows", (), {"column_names": ["text"], "__getitem__": lambda self, name: table[name]}
        )()
        monkeypatch.setitem(sys.modules, "datasets", datasets)
        args = arguments("hf:some", tmp_path / "out")
        assert pretrain.main(args) == 2
        assert f"whose text holds {odd!r}, expected texts alone" in capsys.readouterr().err
    model = llama(tmp_path / "odd", embedding_dropout=0.5)
    assert pretrain.main(arguments(text, tmp_path / "out", model=model)) == 2
    assert "embedding_dropout is 0.5, expected 0.0" in capsys.readouterr().err
    assert pretrain.main(["--model", "small-64", "--out", str(tmp_path / "out")]) == 2
    assert "expected --layers too" in capsys.readouterr().err
