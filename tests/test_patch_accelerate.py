"""A patched model in a hand-written loop of accelerate."""

import pytest
import torch
from tiny_models import batch, make_model

from backfuse import patch
from backfuse.blocks.adapters import patched

accelerate = pytest.importorskip("accelerate")


@pytest.fixture(autouse=True)
def never_own(monkeypatch):
    def refuse(layer, original, state, reason, args, kwargs):
        raise AssertionError(f"{state.name} runs its own forward: {reason}")

    monkeypatch.setattr(patched, "_own_forward", refuse)


def trained(patched_when, precision="no", steps=8):
    """Losses and norms of gradients of a loop; the model's layers patched when that is said."""
    accelerate.state.AcceleratorState._reset_state(True)
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=2
    )
    model = make_model("qwen3")
    if patched_when == "before":
        patch(model, "lean")
    ids = batch("qwen3")["input_ids"]
    count = 2 * steps * accelerator.num_processes
    rows = [ids[i % 2, 8 * (i % 4) : 8 * (i % 4) + 8] for i in range(count)]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    loader = torch.utils.data.DataLoader(rows, batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    if patched_when == "after":
        assert len(patch(model, "lean").fused) == 2
    found = []
    for ids in loader:
        with accelerator.accumulate(model):
            loss = model(input_ids=ids, labels=ids).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                found.append(accelerator.clip_grad_norm_(model.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad()
        found.append(loss.detach())
    assert len(found) == steps + steps // 2
    return torch.stack(found)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_loop_of_accelerate_gives_the_same_losses(precision):
    expected = trained(None, precision)
    assert expected[-1] < 0.8 * expected[0]
    tolerance = 2e-4 if precision == "no" else 2e-2
    before, after = (trained(when, precision) for when in ("before", "after"))
    torch.testing.assert_close(before, expected, rtol=tolerance, atol=0)
    assert torch.equal(before, after)


def ranks_agree():
    expected = trained(None, steps=4)
    assert accelerate.PartialState().num_processes == 2
    for when in ("before", "after"):
        torch.testing.assert_close(trained(when, steps=4), expected, rtol=2e-4, atol=0)


def test_two_processes_of_accelerate():
    accelerate.debug_launcher(ranks_agree, num_processes=2)
