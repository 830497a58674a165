"""`patch` and `unpatch` as things that happen to a model people go on using."""

import copy
import dataclasses
import pickle
import warnings

import pytest
import torch
from families import held_bytes, same_bits
from tiny_models import SIZES, batch, make_model, step
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

import backfuse
from backfuse import NAMED_POLICIES, Policy, kept_bytes, patch, plan, rope_cos_sin, unpatch
from backfuse.blocks.adapters import calls, patched, verify


@pytest.fixture(autouse=True)
def warn_anew():
    patched._warned.clear()


@pytest.fixture
def own(monkeypatch):
    """Why layers ran their own forward."""
    reasons = []
    run = patched._own_forward

    def note(layer, original, state, reason, args, kwargs):
        reasons.append(reason)
        return run(layer, original, state, reason, args, kwargs)

    monkeypatch.setattr(patched, "_own_forward", note)
    return reasons


def bits(model, **inputs):
    return list(step(model, inputs or batch("llama")).values())


def kept(model, inputs):
    """Bytes that a forward pass holds for backward, without parameters."""
    own = [*model.parameters(), *model.buffers()]
    return held_bytes(lambda: model(**inputs, use_cache=False).logits, own)[0]


def test_the_class_is_a_subclass_with_the_same_name_and_comes_back():
    model = make_model("llama")
    names = [name for name, _ in model.named_modules()]
    before = bits(model)
    report = patch(model)
    layer = model.model.layers[0]
    assert type(layer) is not LlamaDecoderLayer and isinstance(layer, LlamaDecoderLayer)
    assert type(layer).__name__ == "LlamaDecoderLayer"  # accelerate and FSDP match on names
    assert [name for name, _ in model.named_modules()] == names
    assert report.fused == ["model.layers.0", "model.layers.1"] and not report.skipped
    fused = bits(model)
    assert not same_bits(fused, before)  # another order of sums: it is not the model's own
    assert unpatch(model) == 2 and unpatch(model) == 0
    assert {type(layer) for layer in model.model.layers} == {LlamaDecoderLayer}
    assert same_bits(bits(model), before)
    assert patched.STATE not in vars(layer)


def test_patch_again_changes_the_policy():
    model, inputs = make_model("llama"), batch("llama")
    held = {}
    for policy in ("keep", "full", "keep"):
        patch(model, policy)
        held.setdefault(policy, []).append(kept(model, inputs))
    assert held["keep"][0] == held["keep"][1] > 1.5 * held["full"][0]
    assert type(model.model.layers[0]).__mro__[1] is LlamaDecoderLayer


def test_what_is_kept_is_what_is_predicted():
    model, inputs = make_model("llama"), batch("llama")
    sizes = {"batch_size": 2, "seq_len": 40}
    patch(model, "keep")
    spec = model.model.layers[0]._backfuse.recipe.spec
    most = kept(model, inputs)
    for policy in ("selective", "lean", "full"):
        patch(model, policy)
        saved = sum(kept_bytes(spec, "keep", **sizes).values())
        saved -= sum(kept_bytes(spec, policy, **sizes).values())
        assert most - kept(model, inputs) == 2 * saved


def test_one_policy_a_layer():
    model = make_model("llama")
    report = patch(model, ["full", {"preact": "recompute"}])
    assert [row.policy for row in report] == [NAMED_POLICIES["full"], NAMED_POLICIES["selective"]]
    assert "keep x; recompute" in str(report) and "selective" in str(report)
    frame = report.to_frame()
    assert list(frame.columns) == ["name", "kind", "status", "policy", "reason"]
    assert list(frame["status"]) == ["fused", "fused"]


def test_like_layers_are_one_line_of_the_report():
    text = str(patch(make_model("llama"), "lean"))
    assert text.count("\n") == 1 and "model.layers.0 to 1" in text and "lean" in text


def untouched(model):
    return {type(layer) for layer in model.model.layers} == {LlamaDecoderLayer}


@pytest.mark.parametrize(
    ("error", "match", "arguments"),
    [
        (ValueError, "policy is 'leen'.* did you mean 'lean'", {"policy": "leen"}),
        (TypeError, "policy is a float", {"policy": 1.5}),
        (ValueError, "policy holds 1 policies, .* \\(2\\)", {"policy": ["full"]}),
        (ValueError, "expected one that keeps x", {"policy": {"x": "recompute"}}),
        (ValueError, "more than one is given", {"policy": "full", "budget": 1}),
        (ValueError, "batch_size is None, expected", {"budget": "1GiB"}),
        (ValueError, "seq_len is None, expected", {"budget": "1GiB", "batch_size": 2}),
        (ValueError, "budget is 1.0 KiB|budget is", {"budget": 1, "batch_size": 2, "seq_len": 40}),
        (TypeError, "plan is a str, expected a Plan", {"plan": "lean"}),
        (ValueError, "impl is 'tritn'", {"impl": "tritn"}),
        (ValueError, "chunk_size is 3", {"chunk_size": 3}),
        (ValueError, "offload_dir is", {"offload_dir": "/nowhere"}),
    ],
)
def test_a_patch_that_fails_leaves_the_model_as_it_was(error, match, arguments):
    model = make_model("llama")
    with pytest.raises(error, match=match):
        patch(model, **arguments)
    assert untouched(model)


def test_budget_and_plan():
    model, inputs = make_model("llama"), batch("llama")
    spec = backfuse.BlockSpec.from_config(model.config)
    sizes = {"batch_size": 2, "seq_len": 40}
    full, keep = (
        2 * sum(kept_bytes(spec, policy, **sizes).values()) for policy in ("full", "keep")
    )
    report = patch(model, budget=(full + keep) // 2, **sizes)
    assert {row.policy for row in report} != {NAMED_POLICIES["keep"]}
    assert patch(model, budget=keep, **sizes)[0].policy == NAMED_POLICIES["keep"]
    live = model.model.layers[0]._backfuse.recipe.spec
    made = plan(live, num_layers=2, budget=full, device="cpu", dtype=torch.float32, **sizes)
    report = patch(model, plan=made)
    assert [row.policy for row in report] == list(made.policies)
    assert bits(model, **inputs)
    with pytest.raises(ValueError, match="the plan has 3 layers, expected 2"):
        patch(model, plan=plan(live, num_layers=3, device="cpu", dtype=torch.float32, **sizes))
    with pytest.raises(ValueError, match="expected none: the layers of this model are called"):
        both = (NAMED_POLICIES["full"],) * 2
        patch(model, plan=dataclasses.replace(made, policies=both, segments=(2,)))
    unlike, inputs = make_model("gemma3_text"), batch("gemma3_text")
    patch(unlike, budget=keep // 2, **sizes)
    recipes = [layer._backfuse.recipe.spec for layer in unlike.model.layers]
    assert len(set(recipes)) == 2
    made = plan(recipes, budget=keep // 2, device="cpu", dtype=torch.float32, **sizes)
    report = patch(unlike, plan=made)
    assert [row.policy for row in report] == list(made.policies)
    assert bits(unlike, **inputs)
    turned = plan(recipes[::-1], device="cpu", dtype=torch.float32, **sizes)
    with pytest.raises(ValueError, match="expected .*, as model.layers.0 has it"):
        patch(unlike, plan=turned)
    with pytest.raises(ValueError, match="only the attention half of model.layers.0"):
        patch(make_model("mixtral"), budget=keep, **sizes)


def test_a_budget_counts_what_is_trained():
    """With LoRA on frozen weights the plan is of what their gradients read."""
    peft = pytest.importorskip("peft")
    sizes = {"batch_size": 2, "seq_len": 40}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
    model = peft.get_peft_model(make_model("llama"), config)
    patch(model, "keep")
    layer = model.base_model.model.model.layers[0]
    weights, adapters = calls.weights_of(layer, layer._backfuse.recipe)
    trained = [name for name, weight in weights.items() if weight.requires_grad]
    assert len(trained) == 4
    need = 2 * sum(
        kept_bytes(
            layer._backfuse.recipe.spec, "keep", adapters=dict(adapters),
            requires_grad=[*trained, "hidden_states"], **sizes,
        ).values()
    )  # fmt: skip
    assert {row.policy for row in patch(model, budget=need, **sizes)} == {NAMED_POLICIES["keep"]}
    assert {row.policy for row in patch(model, budget=need - 1, **sizes)} != {
        NAMED_POLICIES["keep"]
    }
    layer.self_attn.v_proj = layer.self_attn.v_proj.base_layer
    with pytest.raises(ValueError, match="the layers have unlike adapters"):
        patch(model, budget=need, **sizes)
    layer.mlp.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layers.0 runs its own forward for now: mlp has a hook"):
        patch(model, budget=need, **sizes)


def test_copies_and_pickles_are_patched_and_their_own():
    model = make_model("llama")
    patch(model, "lean")
    expected = bits(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(bits(other), expected)
        assert type(other.model.layers[0]) is type(model.model.layers[0])
        patch(other, "keep")
        assert model.model.layers[0]._backfuse.policy == NAMED_POLICIES["lean"]
        assert unpatch(other) == 2 and untouched(other)


def test_save_and_load(tmp_path):
    model = make_model("llama")
    patch(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert untouched(loaded)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    patch(loaded)
    assert same_bits(bits(loaded.train()), bits(model))


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "gpt_neox", "mixtral"])
def test_generate_runs_the_layers_own_forward(family, own):
    model = make_model(family).eval()
    ids = batch(family)["input_ids"][:, :7]
    expected = model.generate(ids, max_new_tokens=9, do_sample=False)
    patch(model)
    assert torch.equal(model.generate(ids, max_new_tokens=9, do_sample=False), expected)
    assert set(own) == {"it is given a cache of keys and values"}


def test_a_cache_that_training_does_not_need_is_left_empty(own):
    """Models make one by default; Hugging Face's checkpointing drops it too."""
    model, inputs = make_model("llama"), batch("llama")
    patch(model)
    out = model(**inputs)
    assert not own and out.past_key_values.get_seq_length() == 0
    filled = model.eval()(**inputs).past_key_values
    assert filled.get_seq_length() == 40 and len(own) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.train()(**inputs, past_key_values=filled)
    assert len(own) == 4


@pytest.mark.parametrize("older", [False, True])
def test_checkpointing_is_a_policy(older, own):
    model, inputs = make_model("llama"), batch("llama")
    expected = bits(model)
    patch(model, "keep")
    fused, least = bits(model), None
    most = kept(model, inputs)
    if older:
        with pytest.warns(FutureWarning):
            model.gradient_checkpointing_enable()
    else:
        model.activation_checkpointing_enable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no replay within a replay
        assert same_bits(bits(model), fused)
        least = kept(model, inputs)
    patch(model, "full")
    assert kept(model, inputs) == least < most
    patch(model, "lean")  # recomputes by itself: goes before
    assert least < kept(model, inputs) < most
    assert model.is_activation_checkpointing
    model.activation_checkpointing_disable()
    patch(model, "keep")
    assert kept(model, inputs) == most and not own
    model.activation_checkpointing_enable()
    unpatch(model)
    assert all(layer.gradient_checkpointing for layer in model.model.layers)
    assert kept(model, inputs) < most  # Hugging Face's own again
    assert same_bits(bits(model), expected)


def test_checkpointing_every_few_layers_and_offloaded(own):
    model = make_model("llama")
    patch(model, "keep")
    fused = bits(model)
    model.activation_checkpointing_enable(every_n_layers=2)
    policies = [patched.current_policy(layer, layer._backfuse) for layer in model.model.layers]
    assert policies == [NAMED_POLICIES["full"], NAMED_POLICIES["keep"]]
    assert same_bits(bits(model), fused)
    model.activation_checkpointing_enable(offload=True)
    policies = [patched.current_policy(layer, layer._backfuse) for layer in model.model.layers]
    assert policies == [NAMED_POLICIES["offload"]] * 2
    assert same_bits(bits(model), fused) and not own
    model.eval()
    policies = [patched.current_policy(layer, layer._backfuse) for layer in model.model.layers]
    assert policies == [NAMED_POLICIES["keep"]] * 2


def test_a_layers_own_forward_is_checkpointed_where_that_was_asked_for(own):
    model, inputs = make_model("llama"), batch("llama")
    expected = bits(model)
    model.activation_checkpointing_enable()
    least = kept(model, inputs)
    patch(model, "keep")
    calls = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="runs its own forward.*self_attn has a hook"):
        assert kept(model, inputs) == least and len(calls) == 2
    assert same_bits(bits(model), expected) and len(calls) == 6  # replayed


def test_hooks_on_parts_are_called(own):
    model, inputs = make_model("llama"), batch("llama")
    expected = bits(model)
    patch(model)
    seen = []
    handle = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: seen.append(output.shape)
    )
    with pytest.warns(UserWarning, match="self_attn.q_proj has a hook"):
        model(**inputs)
    assert len(seen) == len(own) == 1
    report = patch(model)
    assert "runs its own forward for now: self_attn.q_proj has a hook" in report[1].reason
    handle.remove()
    model(**inputs)
    assert len(own) == 1
    for kind in ("register_forward_pre_hook", "register_full_backward_hook"):
        handle = getattr(model.model.layers[0].mlp, kind)(lambda *_: None)
        own.clear()
        step(model, inputs)
        assert len(own) == 1
        handle.remove()
    # hooks on the layer itself are PyTorch's business, and those on parameters autograd's
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append("layer"))
    model.model.layers[0].mlp.up_proj.weight.register_hook(lambda grad: grad * 0)
    own.clear()
    grads = step(model, inputs)
    assert seen[-1] == "layer" and not own
    assert not grads["model.layers.0.mlp.up_proj.weight"].any()
    assert expected is not None


def test_attentions_that_are_asked_for_are_the_models(own):
    model, inputs = make_model("llama", attn_implementation="eager").eval(), batch("llama")
    expected = model(**inputs, use_cache=False, output_attentions=True).attentions
    patch(model)
    ours = model(**inputs, use_cache=False, output_attentions=True).attentions
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)) and len(own) == 2
    own.clear()
    assert model(**inputs, use_cache=False, output_hidden_states=True).attentions is None
    assert not own  # transformers leaves its hooks behind
    model.config.output_attentions = True  # asked for without a word to the layers
    ours = model(**inputs, use_cache=False).attentions
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True)) and len(own) == 2


def test_another_attention_implementation_is_noticed(own):
    model, inputs = make_model("llama"), batch("llama")
    patch(model)
    model.set_attn_implementation("eager")
    with pytest.warns(UserWarning, match="was 'sdpa' when it was patched and is 'eager'"):
        model(**inputs)
    patch(model)
    own.clear()
    model(**inputs)
    assert not own


def test_calls_that_a_block_does_not_know(own):
    model = make_model("llama")
    layer, x = model.model.layers[0], torch.randn(2, 6, 48)
    angles = model.model.rotary_emb(x, torch.arange(6)[None])
    patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        y = layer(x, position_embeddings=angles)
        assert not own
        for given in (
            {"is_causal": False}, {"position_bias": torch.zeros(1)},
            {"attention_mask": torch.ones(2, 1, 6, 9, dtype=torch.bool)},
        ):  # fmt: skip
            before = len(own)
            try:
                layer(x, position_embeddings=angles, **given)
            except (RuntimeError, TypeError):
                pass  # the layer's own error
            assert len(own) == before + 1, given
        assert torch.equal(layer(hidden_states=x, position_embeddings=angles), y)
        half = tuple(part[..., :4] for part in angles)
        with pytest.raises(RuntimeError):
            layer(x, position_embeddings=half)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_mask_that_says_what_the_spec_says_is_not_read(attention, monkeypatch):
    model = make_model("gemma3_text", attn_implementation=attention)
    inputs = batch("gemma3_text")
    patch(model)
    masks = []
    run = verify.block

    def note(*args, **given):
        masks.append(given.get("attention_mask"))
        return run(*args, **given)

    monkeypatch.setattr(verify, "block", note)
    model(**inputs)
    assert masks == [None, None]
    seen = torch.ones(2, 40, dtype=torch.long)
    seen[1, -3:] = 0
    model(**inputs, attention_mask=seen)
    assert all(mask.shape[-2:] == (40, 40) for mask in masks[2:])
    layer, x = model.model.layers[0], torch.randn(1, 20, 48)
    angles = rope_cos_sin(torch.arange(20)[None], 16)
    distance = torch.arange(20)[:, None] - torch.arange(20)
    for window in (8, 9, 10):  # the layer's is 9
        visible = ((distance >= 0) & (distance < window))[None, None]
        added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
        eager = model.config._attn_implementation == "eager"  # which adds a boolean mask
        for mask in (visible, added, added * 0.9, added + 0.1)[eager:]:
            masks.clear()
            layer(x, position_embeddings=angles, attention_mask=mask)
            plain = window == 9 and (mask.dtype == torch.bool or mask.max() == 0)
            assert (masks[0] is None) == plain
    masks.clear()
    hidden = (distance < 0) | (distance >= 9)
    mask = torch.zeros(1, 1, 20, 20).masked_fill(hidden, torch.finfo(torch.float32).min)
    for change in (False, True):  # the answer is that of the tensor as it is
        if change:
            mask[0, 0, 3, 3] = mask.min()
        layer(x, position_embeddings=angles, attention_mask=mask)
    assert masks[0] is None and masks[1] is not None


def test_a_forward_of_the_instance_is_left_alone():
    model = make_model("llama")
    layer = model.model.layers[0]
    layer.forward = layer.forward
    report = patch(model)
    assert list(report.skipped) == ["model.layers.0"] and type(layer) is LlamaDecoderLayer
    assert "replaced on the instance" in str(report)


def test_training_toggled_in_the_middle_of_a_step(own):
    model = make_model("gpt_neox", attention_dropout=0.2, hidden_dropout=0.2)
    patch(model)
    inputs = batch("gpt_neox")

    def loss(then):
        model.zero_grad()
        torch.manual_seed(5)
        out = model.train()(**inputs, labels=inputs["input_ids"]).loss
        then(model)
        out.backward()
        return [out.detach(), *(p.grad for p in model.parameters())]

    expected = loss(lambda model: None)
    assert same_bits(loss(nn.Module.eval), expected)
    assert not own
    model.train().gpt_neox.layers[0].mlp.eval()
    with pytest.warns(UserWarning, match="another mode than its layer"):
        model(**inputs)


def test_dropout_in_training_only():
    model = make_model("gpt_neox", attention_dropout=0.3, hidden_dropout=0.3)
    report = patch(model)
    assert len(report.fused) == 2
    spec = model.gpt_neox.layers[0]._backfuse.recipe.spec
    assert (spec.attention_dropout, spec.residual_dropout) == (0.3, 0.3)
    inputs = batch("gpt_neox")
    with torch.no_grad():
        first, second = (model(**inputs).logits for _ in range(2))
        assert not torch.equal(first, second)
        model.eval()
        first, second = (model(**inputs, use_cache=False).logits for _ in range(2))
    assert torch.equal(first, second)


def test_tied_weights_and_frozen_ones():
    model = make_model("llama", tie_word_embeddings=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("mlp" not in name)
    expected = step(model, batch("llama"))
    patch(model)
    ours = step(model, batch("llama"))
    assert ours.keys() == expected.keys() and not any("mlp" in name for name in ours)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_model_on_the_meta_device_and_then_materialised(own):
    config = make_model("llama").config
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert patch(model, "lean").fused == ["model.layers.0", "model.layers.1"]
    source = make_model("llama")
    patch(source, "lean")
    model.load_state_dict(source.state_dict(), assign=True)
    model.model.rotary_emb = copy.deepcopy(source.model.rotary_emb)
    assert same_bits(bits(model.train()), bits(source)) and not own


def test_models_without_a_layer_that_is_understood():
    with pytest.raises(TypeError, match="model is a str, expected a torch.nn.Module"):
        patch("llama")
    with pytest.raises(ValueError, match="nothing in it has a norm .with a weight."):
        patch(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)))

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8)
            self.head_dim = 4

        def forward(self, x):
            return x + self.b(self.a(self.norm(x)).relu())

    with pytest.raises(ValueError, match="understood .0: its FFN is not understood"):
        patch(nn.ModuleList([Odd()]))


@pytest.mark.parametrize("kind", ["VeraConfig", "IA3Config"])
def test_adapters_that_are_no_lora_are_reported(kind):
    peft = pytest.importorskip("peft")
    config = getattr(peft, kind)(task_type="CAUSAL_LM")
    model = peft.get_peft_model(make_model("llama"), config)
    expected = step(model, batch("llama"))
    report = patch(model)
    assert [row.status for row in report] == ["skipped"] * 2
    assert all("of PEFT's a block has LoRA alone" in row.reason for row in report)
    ours = step(model, batch("llama"))
    assert all(torch.equal(ours[name], expected[name]) for name in expected)


def test_a_cache_that_was_left_empty_is_warned_of_when_it_comes_again():
    model, ids = make_model("llama").train(), batch("llama")["input_ids"]
    patch(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        cache = model(ids[:, :3], use_cache=True).past_key_values
    with pytest.warns(UserWarning, match="a second time that a patched layer left empty"):
        model(ids[:, 3:], past_key_values=cache)


def test_a_budget_offloads_nothing_of_a_model_on_a_cpu(tmp_path):
    model = make_model("llama")
    sizes = {"batch_size": 2, "seq_len": 16}
    spec = backfuse.BlockSpec.from_config(model.config)
    budget = 2 * sum(kept_bytes(spec, "full", dtype=torch.float32, **sizes).values())
    assert not any(row.policy.offloads for row in patch(model, budget=budget, **sizes))
    with pytest.raises(ValueError, match="budget"):
        patch(model, budget=budget // 2, **sizes)
    report = patch(model, budget=budget // 2, **sizes, offload_dir=tmp_path)
    assert any(row.policy.offloads for row in report)


def test_sharded_models_are_told_to_be_patched_first():
    class FSDPModule:
        pass

    model = make_model("llama")
    layer = model.model.layers[1]
    layer.__class__ = type("FSDPLlamaDecoderLayer", (FSDPModule, LlamaDecoderLayer), {})
    for function in (patch, unpatch):
        with pytest.raises(ValueError, match="model.layers.1 is sharded by FSDP.*patch"):
            function(model)
    assert type(model.model.layers[0]) is LlamaDecoderLayer


@pytest.mark.parametrize("dora", [False, True])
def test_peft_before_and_after(dora, own):
    """LoRA is run inside the block (see test_lora.py); what is more than that is PEFT's own."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=dora)
    inputs = batch("llama")

    def adapted(model):
        model = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.rand(parameter.shape, generator=generator) * 0.1)
        return model

    before = adapted(make_model("llama"))
    expected = before(**inputs).logits
    report = patch(before)
    assert len(report.fused) == 2
    after = make_model("llama")
    patch(after)
    after = adapted(after)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for model in (before, after):
            own.clear()
            assert torch.allclose(model(**inputs).logits, expected, atol=1e-4)
            assert len(own) == (2 if dora else 0)
    if dora:
        why = "self_attn.q_proj: the adapter 'default' is a DoraLinearVariant"
        assert f"runs its own forward for now: {why}" in report[0].reason
        assert any(why in str(warning.message) for warning in caught)
    merged = after.merge_and_unload()
    own.clear()
    assert torch.allclose(merged(**inputs).logits, expected, atol=1e-3)
    assert not own and unpatch(merged) == 2


def test_one_layer_is_a_model_too():
    layer = make_model("llama").model.layers[0]
    report = patch(layer, "lean")
    assert report.fused == [""] and "(the model)" in str(report)
    assert layer._backfuse.policy == Policy.parse("lean")
    assert SIZES["hidden_size"] == layer._backfuse.recipe.spec.hidden_size
