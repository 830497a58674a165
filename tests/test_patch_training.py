"""Patched models in the hands of others: Trainer, and a sharding engine."""

import os
import string
import warnings

import pytest
import torch
import torch.distributed as dist
from families import held_bytes
from tiny_models import FUSED, HALF, batch, make_model, step
from transformers import Trainer, TrainingArguments

from backfuse import patch
from backfuse.blocks.adapters import patched


@pytest.fixture
def never_own(monkeypatch):
    def refuse(layer, original, state, reason, args, kwargs):
        raise AssertionError(f"{state.name} runs its own forward: {reason}")

    monkeypatch.setattr(patched, "_own_forward", refuse)


class Text(torch.utils.data.Dataset):
    """Windows of a module's source, its bytes folded into the tiny vocabulary."""

    def __init__(self, windows=64, tokens=32):
        with open(string.__file__, "rb") as file:
            data = torch.tensor(list(file.read(windows * tokens)))
        self.rows = (data % 61 + 3).view(windows, tokens)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def losses(model, folder, **arguments):
    """The loss of each of twelve steps, and those of the evaluation."""
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=str(folder), per_device_train_batch_size=4, max_steps=12, logging_steps=1,
            learning_rate=3e-3, report_to=[], use_cpu=True, seed=7, save_strategy="no",
            disable_tqdm=True, **arguments,
        ),
        train_dataset=Text(), eval_dataset=Text(8),
    )  # fmt: skip
    trainer.train()
    logged = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return [*logged, trainer.evaluate()["eval_loss"]]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trainer_gives_the_same_losses(family, tmp_path, never_own):
    pytest.importorskip("accelerate")
    expected = losses(make_model(family), tmp_path)
    assert expected[-1] < 0.85 * expected[0]  # it learns
    found = {}
    for name, policy, arguments in (
        ("patched", "lean", {}), ("checkpointing", "keep", {"gradient_checkpointing": True}),
    ):  # fmt: skip
        model = make_model(family)
        patch(model, policy)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*replay")
            found[name] = losses(model, tmp_path, **arguments)
        assert len(found[name]) == 13
        for a, b in zip(found[name], expected, strict=True):
            assert abs(a - b) <= 2e-3 * b
    assert found["patched"] == found["checkpointing"]  # bitwise, as all policies


def test_patched_first_and_sharded_then(never_own, tmp_path, monkeypatch):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, inputs = make_model("llama"), batch("llama")
    patch(model, "lean")
    expected = step(model, inputs)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1")):
        monkeypatch.setitem(os.environ, name, value)
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0,
                            world_size=1)  # fmt: skip
    try:
        mesh = init_device_mesh("cpu", (1,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        assert type(model.model.layers[0]).__name__ == "FSDPLlamaDecoderLayer"
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable()
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message=".*replay")
                ours = step(model, inputs)
            for name, value in ours.items():
                value = value.full_tensor() if hasattr(value, "full_tensor") else value
                assert torch.equal(value, expected[name]), name
        with pytest.raises(ValueError, match="is sharded by FSDP"):
            patch(model, "full")
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("family", HALF)
@pytest.mark.parametrize("policy", ["keep", "lean"])
def test_checkpointing_reaches_the_half_that_is_the_layers_own(family, policy):
    """Where one recomputes, the experts are replayed, as Hugging Face's checkpointing does."""
    model, inputs = make_model(family), batch(family)
    own = [*model.parameters(), *model.buffers()]
    expected = step(model, inputs)
    model.gradient_checkpointing_enable()
    theirs = held_bytes(lambda: model(**inputs), own)[0]
    assert len(patch(model, policy).half) == 2
    most = {"keep": 1.5, "lean": 2.5}[policy] * theirs
    assert held_bytes(lambda: model(**inputs), own)[0] < most
    found = step(model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    model.gradient_checkpointing_disable()
    assert held_bytes(lambda: model(**inputs), own)[0] > 3 * theirs


@pytest.mark.parametrize("family", ["llama", "gpt2", "vit"])
def test_a_patched_model_holds_much_less(family):
    assert family in FUSED
    model, inputs = make_model(family), batch(family)
    own = [*model.parameters(), *model.buffers()]
    held = {}
    for policy in (None, "keep", "selective"):
        if policy:
            patch(model, policy)
        held[policy] = held_bytes(lambda: model(**inputs), own)[0]
    assert held["keep"] < 0.75 * held[None] and held["selective"] < held["keep"]
