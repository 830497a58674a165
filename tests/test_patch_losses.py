"""Patched models with others' losses, and with Liger's kernels in their parts."""

import types

import pytest
from tiny_models import batch, make_model, step
from transformers.models.llama import modeling_llama

from backfuse import linear_cross_entropy, patch
from backfuse.blocks.adapters import patched
from backfuse.blocks.adapters.patched import obstacle


@pytest.fixture(autouse=True)
def never_own(monkeypatch):
    def refuse(layer, original, state, reason, args, kwargs):
        raise AssertionError(f"{state.name} runs its own forward: {reason}")

    monkeypatch.setattr(patched, "_own_forward", refuse)


@pytest.fixture
def family(monkeypatch):
    """Llama's code, which Liger writes into."""
    for name in ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP"):
        monkeypatch.setattr(modeling_llama, name, getattr(modeling_llama, name))
    return modeling_llama


def close(model, loss, expected):
    """One step's loss and gradients are those of `step`."""
    model.zero_grad(set_to_none=True)
    loss.backward()
    scale = max(value.abs().max() for name, value in expected.items() if name.count("."))
    assert (loss - expected["loss"]).abs() <= 1e-5 * expected["loss"]
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert grads.keys() == expected.keys() - {"logits", "loss"}
    for name, grad in grads.items():
        assert (grad - expected[name]).abs().max() <= 1e-5 * scale, name


def ours(hidden, weight, labels):
    return linear_cross_entropy(hidden, weight, labels, chunk_size=16)


def ligers(hidden, weight, labels):
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return LigerFusedLinearCrossEntropyLoss()(weight, hidden, labels)


def cut(hidden, weight, labels):
    library = pytest.importorskip("cut_cross_entropy")
    return library.linear_cross_entropy(hidden, weight, labels, impl="torch_compile")


@pytest.mark.parametrize("head", [ours, ligers, cut])
def test_a_loss_without_logits(head):
    model, inputs = make_model("llama"), batch("llama")
    expected = step(model, inputs)
    patch(model, "lean")
    hidden = model.model(**inputs).last_hidden_state[:, :-1].flatten(0, 1)
    loss = head(hidden, model.lm_head.weight, inputs["input_ids"][:, 1:].flatten())
    close(model, loss, expected)


def like_ligers(function):
    function.__module__ = "liger_kernel.transformers.monkey_patch"
    return function


@like_ligers
def no_cpu(*_, **__):
    raise RuntimeError("0 active drivers")


def apply_in_part(model, family):
    """What Liger does to a model that is there, but for the norm behind the layers."""
    family.apply_rotary_pos_emb = no_cpu
    for layer in model.model.layers:
        for part in (layer.mlp, layer.input_layernorm, layer.post_attention_layernorm):
            part.casting_mode = "llama"
            part.forward = types.MethodType(no_cpu, part)


@pytest.mark.parametrize("first", [False, True])
def test_ligers_kernels_in_the_parts_are_what_a_block_computes(first, family):
    model, inputs = make_model("llama"), batch("llama")
    expected = step(model, inputs)
    if first:
        apply_in_part(model, family)
    assert patch(model, "keep").fused
    if not first:
        apply_in_part(model, family)
    assert family.apply_rotary_pos_emb is no_cpu  # as it was before `patch`
    for policy in ("keep", "lean"):
        report = patch(model, policy)
        assert len(report.fused) == 2 and {row.reason for row in report} == {None}
        found = step(model, inputs)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert (found[name] - value).abs().max() <= 2e-5 * expected["logits"].abs().max(), name
    model.model.layers[1].mlp.forward = lambda x: x
    assert "mlp has a hook, or a forward of its own" in obstacle(model.model.layers[1])


def test_ligers_classes_are_left_alone_with_the_reason():
    model = make_model("llama")
    kind = type(model.model.layers[0].mlp)
    name = like_ligers(type("LigerSwiGLUMLP", (kind,), {}))
    for layer in model.model.layers:
        layer.mlp.__class__ = name
    with pytest.raises(ValueError, match="mlp is Liger's LigerSwiGLUMLP, which no CPU runs"):
        patch(model)


@pytest.mark.parametrize("first", [False, True])
def test_liger_on_a_model_that_is_there(first, family):
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    model, inputs = make_model("llama"), batch("llama")
    labels = inputs["input_ids"]
    expected = step(model, inputs)
    plain = model.model.norm.forward
    for turn in (first, not first):
        if turn:
            apply_liger_kernel_to_llama(model=model)
            model.model.norm.forward = plain  # that kernel a CPU would have to run
        else:
            assert len(patch(model, "lean").fused) == 2
    loss = model(**inputs, labels=labels).loss  # Liger's, without logits
    close(model, loss, expected)
