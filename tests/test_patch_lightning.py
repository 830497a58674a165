"""The callback of Lightning: with Lightning where that is installed, and by its hook alone."""

import importlib
import sys
import types

import pytest
import torch
from tiny_models import batch, make_model, step

from backfuse.blocks.adapters.patched import state_of


@pytest.fixture
def by_hook(monkeypatch):
    """The callback's module, over a base class that has nothing."""
    package, inner = types.ModuleType("lightning"), types.ModuleType("lightning.pytorch")
    inner.Callback = type("Callback", (), {})
    monkeypatch.setitem(sys.modules, "lightning", package)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", inner)
    monkeypatch.delitem(sys.modules, "backfuse.lightning", raising=False)
    yield importlib.import_module("backfuse.lightning")
    del sys.modules["backfuse.lightning"]


def test_setup_patches_before_fit_alone_and_the_first_rank_prints(by_hook, capsys):
    model = torch.nn.ModuleDict({"inner": make_model("llama")})
    callback = by_hook.Patch(["lean", "full"], chunk_size=64)
    callback.setup(types.SimpleNamespace(is_global_zero=False), model, "validate")
    layers = model["inner"].model.layers
    assert callback.report is None and not any(state_of(layer) for layer in layers)
    for first in (False, True):
        callback.setup(types.SimpleNamespace(is_global_zero=first), model, "fit")
        assert ("inner.model.layers.0" in capsys.readouterr().out) == first
    assert [str(row.policy) for row in callback.report] == [
        str(state_of(layer).policy) for layer in layers
    ]
    assert state_of(layers[0]).chunk_size == 64
    assert len({row.policy for row in callback.report}) == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'polcy'"):
        by_hook.Patch(polcy="lean")
    with pytest.raises(ValueError, match="Linear holds nothing with a norm and projections yet"):
        callback.setup(types.SimpleNamespace(is_global_zero=True), torch.nn.Linear(2, 2), "fit")


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def pl(request):
    return pytest.importorskip(request.param)


def fit(pl, folder, model, callbacks=(), resume=None, steps=4):
    """Losses of each step, and the trainer."""

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, inputs, index):
            loss = self.model(**inputs, labels=inputs["input_ids"]).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), 1e-2)

    rows = [{"input_ids": batch("llama")["input_ids"][:1, 8 * i : 8 * i + 8]} for i in range(4)]
    module = Module()
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        gradient_clip_val=0.5, accumulate_grad_batches=2, callbacks=list(callbacks),
        default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(rows, batch_size=None), ckpt_path=resume)
    return module.losses, trainer


def test_a_trainer_fits_and_resumes_with_the_same_losses(pl, tmp_path, capsys, monkeypatch):
    from backfuse.lightning import Patch

    expected, _ = fit(pl, tmp_path, make_model("llama"))
    model = make_model("llama")
    callback = Patch("lean")
    losses, trainer = fit(pl, tmp_path, model, [callback])
    assert callback.report.fused == [f"model.model.layers.{i}" for i in range(2)]
    assert "model.model.layers.0 to 1  LlamaDecoderLayer  fused" in capsys.readouterr().out
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    assert len(losses) == 8 and losses[-1] < losses[0]

    trainer.save_checkpoint(tmp_path / "patched.ckpt")
    plain, _ = fit(pl, tmp_path, make_model("llama"), resume=tmp_path / "patched.ckpt", steps=6)
    again, _ = fit(
        pl, tmp_path, make_model("llama"), [Patch("full")], tmp_path / "patched.ckpt", steps=6
    )
    assert 0 < len(again) == len(plain) < 8 and again[0] < losses[0]  # it went on
    torch.testing.assert_close(again, plain, rtol=1e-4, atol=0)
    assert step(model, batch("llama"))["loss"] < expected[0]
