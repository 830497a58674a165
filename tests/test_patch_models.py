"""Patched models of every family do what they did, under every policy."""

import pytest
import torch
from families import same_bits
from tiny_models import ENCODERS, FUSED, HALF, SEQ_LEN, batch, make_model, step

from backfuse import NAMED_POLICIES, patch
from backfuse.blocks.adapters import patched

LANGUAGE = [family for family in FUSED if family not in ENCODERS]


@pytest.fixture(autouse=True)
def only_blocks(monkeypatch):
    """A layer's own forward must not be what gives the numbers."""

    def refuse(layer, original, state, reason, args, kwargs):
        raise AssertionError(f"{state.name} runs its own forward: {reason}")

    monkeypatch.setattr(patched, "_own_forward", refuse)


def assert_close(ours, theirs, bound):
    """Largest differences as shares of the largest values."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = theirs[name.replace("bias", "weight")].abs().max().item()
        difference = (value - theirs[name]).abs().max().item()
        assert difference <= bound * max(scale, 1e-3), f"{name}: {difference:.2e} of {scale:.2e}"


@pytest.mark.parametrize("family", [*FUSED, *HALF])
def test_a_step_in_fp32_under_every_policy(family):
    model, inputs = make_model(family), batch(family)
    expected = step(model, inputs)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    first = None
    for policy in NAMED_POLICIES:
        report = patch(model, policy)
        assert len(report.half if family in HALF else report.fused) == 2, report
        ours = step(model, inputs)
        if first is None:
            first = ours
            assert_close(ours, expected, 2e-5)
        assert same_bits(list(ours.values()), list(first.values())), policy
    after = model.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], value) for name, value in state.items())


@pytest.mark.parametrize("family", FUSED)  # which experts are chosen is no continuous function
def test_a_step_in_bf16_is_as_good_as_the_models_own(family):
    exact = step(make_model(family, torch.float64), batch(family, torch.float64))
    model, inputs = make_model(family, torch.bfloat16), batch(family, torch.bfloat16)
    plain = step(model, inputs)
    patch(model, "lean")
    ours = step(model, inputs)
    eps = torch.finfo(torch.bfloat16).eps
    for name, value in exact.items():
        own, other = ((x[name].double() - value).norm().item() for x in (ours, plain))
        scale = exact[name.replace("bias", "weight")].norm().item()
        assert own <= 2 * other + eps * scale, f"{name}: {own:.3e}, the model's own {other:.3e}"


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "bert", "mixtral"])
def test_padded_batches(family, padding, attention):
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("transformers has no softcap there")
    model, inputs = make_model(family, attn_implementation=attention), batch(family)
    seen = torch.ones(2, SEQ_LEN, dtype=torch.long)
    seen[1, slice(-9, None) if padding == "right" else slice(9)] = 0
    labels = inputs["input_ids"].masked_fill(seen == 0, -100)
    inputs["attention_mask"] = seen
    expected = step(model, inputs, labels)
    patch(model)
    ours = step(model, inputs, labels)
    for values in (ours, expected):  # what a padded token computes is nobody's business
        values["logits"] = values["logits"] * seen[..., None]
    assert_close(ours, expected, 3e-5)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "qwen3_moe"])
def test_packed_position_ids(family):
    model = make_model(family)
    ids = batch(family)["input_ids"].flatten()[None]
    positions = torch.cat([torch.arange(n) for n in (11, 40, 29)])[None]
    inputs = {"input_ids": ids, "position_ids": positions, "use_cache": False}
    expected = step(model, inputs)
    patch(model)
    assert_close(step(model, inputs), expected, 2e-5)
    # the sequences do not see each other
    alone = model(ids[:, :11], use_cache=False).logits
    assert torch.allclose(model(**inputs).logits[:, :11], alone, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "bert", "vit", "mixtral"])
def test_eval_and_hidden_states(family):
    model, inputs = make_model(family).eval(), batch(family)
    if family not in ENCODERS:
        inputs["use_cache"] = False
    with torch.no_grad():
        expected = model(**inputs, output_hidden_states=True).hidden_states
        patch(model)
        ours = model(**inputs, output_hidden_states=True).hidden_states
    assert len(ours) == len(expected) == 3
    for a, b in zip(ours, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())
