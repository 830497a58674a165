"""Plans of live models: what they know of them, what an applied one holds, and the way back."""

import dataclasses

import pytest
import torch
from families import FAMILIES, held_bytes
from test_step import CPU
from tiny_models import batch, make_model
from torch import nn
from transformers import LlamaForCausalLM

import backfuse
from backfuse import BlockStack, ModelSpec, Plan, TransformerBlock, patch, unpatch
from backfuse.bench.measure import allocator_trace
from backfuse.blocks.planner import profile
from backfuse.blocks.planner.optimal import BudgetError
from backfuse.blocks.policy import KEEP, NAMED_POLICIES

SIZES = {"batch_size": 2, "seq_len": 40, "device": CPU, "allow": ("recompute",)}
LEAN, FULL = NAMED_POLICIES["lean"], NAMED_POLICIES["full"]


def lora(**options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj", "down_proj"], r=2, **options)
    return peft.get_peft_model(make_model("llama"), config)


def half(model, **options):
    """A plan that keeps about half of what `keep` keeps."""
    free = backfuse.plan(model, **SIZES)
    return backfuse.plan(model, **SIZES, budget=free.kept_bytes // 2, **options)


def held(model):
    """Bytes that the layers hold between the passes, of a model without a head."""
    tensors = [*model.parameters(), *model.buffers()]
    x = torch.randn(2, 40, 32, requires_grad=True)
    bytes_, _ = held_bytes(lambda: model(x), exclude=tensors)
    return bytes_


@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_a_plan_of_a_model_and_back(family, patched):
    model = make_model(family)
    if patched:
        patch(model, "full", chunk_size=64)
    plan = half(model)
    assert plan.num_layers == 2 and plan.dtype == torch.float32
    before = backfuse.apply(model, plan)
    assert before == (([FULL] * 2, [1] * 2) if patched else ([], []))
    states = [m._backfuse for m in model.modules() if "_backfuse" in vars(m)]
    assert [state.policy for state in states] == list(plan.policies) != [KEEP] * 2
    assert {state.chunk_size for state in states} == ({64} if patched else {None})
    assert [state.recipe.spec for state in states] == list(plan.specs)
    again = half(model)
    assert again == plan  # a patched model is what it was
    assert backfuse.apply(model, again)[0] == list(plan.policies)
    assert {row.policy for row in patch(model, before[0] or "keep")} != set(plan.policies)
    unpatch(model)
    assert not any("_backfuse" in vars(m) for m in model.modules())


def test_a_budget_of_patch_is_plan_and_apply():
    model = make_model("llama")
    free = backfuse.plan(model, **SIZES)
    sizes = {"batch_size": 2, "seq_len": 40, "device": CPU}
    for name, limit in (("budget", free.kept_bytes // 2), ("peak_budget", free.peak_bytes - 9000)):
        plan = backfuse.plan(model, **SIZES, **{name: limit})
        report = patch(model, **sizes, **{name: limit})
        assert [row.policy for row in report] == list(plan.policies) != [KEEP] * 2
    patch(model, budget="auto", **sizes)
    with pytest.raises(ValueError, match="more than one is given"):
        patch(model, "lean", peak_budget="1GiB", **sizes)
    with pytest.raises(ValueError, match="seq_len is None"):
        patch(model, peak_budget="1GiB", batch_size=2)
    with pytest.raises(BudgetError, match="^peak_budget is 5 bytes"):
        patch(model, peak_budget=5, **sizes)


def test_a_budget_of_patch_by_a_profile(monkeypatch, tmp_path):
    monkeypatch.setenv("BACKFUSE_CACHE", str(tmp_path))
    monkeypatch.setattr(profile, "SECONDS", 0.01)
    model = make_model("llama")
    patch(model, budget="1GiB", batch_size=1, seq_len=4, profile=True)
    assert list((tmp_path / "profiles").iterdir())
    plan = backfuse.plan(model, batch_size=1, seq_len=4, profile=True)
    assert plan.device.name == "cpu" and plan.device.blocks


def test_what_is_frozen_keeps_nothing():
    """The embedding and the first layer are frozen: nothing reaches them."""
    model = make_model("llama")
    inner = model.model
    for part in (inner.embed_tokens, inner.layers[0]):
        part.requires_grad_(False)
    plan = backfuse.plan(model, **SIZES)
    assert plan.requires_grad[0] == () and "hidden_states" not in plan.requires_grad[1]
    one = backfuse.plan(plan.spec, num_layers=1, **SIZES, dtype=torch.float32)
    assert plan.kept_bytes <= one.kept_bytes
    inner.embed_tokens.register_forward_hook(lambda module, args, out: out.requires_grad_())
    assert "hidden_states" in backfuse.plan(model, **SIZES).requires_grad[0]


def test_surroundings():
    for family in ("llama", "gpt2", "gemma3_text"):
        model = make_model(family)
        model.tie_weights()
        found = ModelSpec.from_model(model, optimizer="sgd", world_size=2)
        head = model.get_output_embeddings().weight
        assert found.tied == (head is model.get_input_embeddings().weight)
        assert (found.vocab_size, found.optimizer, found.world_size) == (len(head), "sgd", 2)
        assert found.trained_bytes == sum(p.nbytes for p in model.parameters())
        assert found.parameter_bytes >= found.trained_bytes
        assert backfuse.plan(model, **SIZES).model == ModelSpec.from_model(model)
    model = lora()
    found = ModelSpec.from_model(model)
    assert not found.trained
    assert found.trained_bytes == sum(p.nbytes for n, p in model.named_parameters() if "lora" in n)
    with pytest.raises(ValueError, match="Sequential, expected one with an embedding"):
        ModelSpec.from_model(nn.Sequential(nn.Linear(4, 4), nn.Embedding(5, 4)))
    with pytest.raises(TypeError, match="model is a str"):
        ModelSpec.from_model("gpt2")
    with pytest.raises(ValueError, match="names 'optimiser'.*did you mean 'optimizer'"):
        ModelSpec.from_model(model, optimiser="sgd")
    with pytest.raises(ValueError, match="trained_bytes is -1"):
        ModelSpec(5, trained_bytes=-1)


def measured_peak(model, ids):
    """Bytes at most in a step with AdamW, with what was there before it."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)

    def step():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        for parameter in trained:
            parameter.grad = None

    step()
    states = optimizer.state_dict()["state"].values()
    there = [v for one in states for v in one.values() if torch.is_tensor(v)]
    there += [*model.parameters(), *model.buffers(), ids, ids]
    return sum(t.nbytes for t in there) + allocator_trace(step).peak_bytes


@pytest.mark.parametrize(
    ("kind", "policy"), [("llama", "keep"), ("lora", "full"), ("gpt2", "lean")]
)
def test_the_predicted_peak_of_a_model_is_the_measured_one(kind, policy):
    model = (lora() if kind == "lora" else make_model(kind)).train()
    plan = backfuse.plan(
        model, batch_size=2, seq_len=128, device=CPU, strategy="manual", policies={"*": policy}
    )
    backfuse.apply(model, plan)
    ids = torch.randint(plan.model.vocab_size, (2, 128))
    assert plan.peak_bytes == pytest.approx(measured_peak(model, ids), rel=0.05)


def test_what_is_held_is_what_was_planned(tmp_path):
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
    plan = half(encoder)
    assert plan.model is None
    plan.save(tmp_path / "plan.json")
    backfuse.apply(encoder, Plan.load(tmp_path / "plan.json"))
    assert held(encoder) == plan.kept_bytes <= plan.budget


def test_stacks_and_blocks_of_its_own():
    spec = FAMILIES["llama"]
    stack = BlockStack(spec, 3, "lean", segments=3)
    model = nn.Sequential(nn.Embedding(50, spec.hidden_size), stack, nn.Linear(32, 50, bias=False))
    plan = backfuse.plan(model, **SIZES, strategy="sqrt")
    assert plan.model == ModelSpec.from_model(model) and plan.specs == (spec,) * 3
    assert backfuse.apply(model, plan) == ([LEAN] * 3, [3])
    assert stack.policies == [FULL] * 3
    backfuse.apply(stack, dataclasses.replace(plan, segments=(2, 1)))
    assert stack.segments == [2, 1]
    blocks = nn.ModuleDict({str(i): TransformerBlock(spec, "lean") for i in range(2)})
    plan = half(blocks)
    assert backfuse.apply(blocks, plan) == ([LEAN] * 2, [1] * 2)
    assert [block.policy for block in blocks.values()] == list(plan.policies)
    with pytest.raises(ValueError, match="expected none: the layers of this model are called one"):
        backfuse.apply(blocks, dataclasses.replace(plan, policies=(FULL,) * 2, segments=(2,)))
    assert [block.policy for block in blocks.values()] == list(plan.policies)
    with pytest.raises(ValueError, match="of this library, which needs no patch"):
        patch(blocks)


def test_a_model_on_the_meta_device():
    config = make_model("llama").config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    sizes = {"batch_size": 1, "seq_len": 64}
    plan = backfuse.plan(model, **sizes, dtype=torch.bfloat16, device="h200")
    assert plan.dtype == torch.bfloat16 and plan.peak_bytes > plan.kept_bytes > 0
    with pytest.raises(ValueError, match="device is None and the model is on meta"):
        backfuse.plan(model, **sizes)


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: make_model("llama"), {"num_layers": 3}, "num_layers is 3, expected 2: so many"),
        (lambda: make_model("mixtral"), {}, "only the attention half of model.layers.0"),
        (lambda: nn.Linear(2, 2), {}, "Linear with no layer that is understood"),
    ],
)
def test_models_of_which_there_is_no_plan(make, options, message):
    with pytest.raises(ValueError, match=message):
        backfuse.plan(make(), **SIZES, **options)


def test_a_layer_that_is_not_understood_has_no_peak():
    model = make_model("llama")
    layer = model.model.layers[1]
    layer.forward = layer.forward  # on the instance, as hooks of accelerate are
    plan = backfuse.plan(model, **SIZES)
    assert plan.num_layers == 1 and plan.model is None
    with pytest.raises(ValueError, match="model.layers.1 is a layer that is not understood"):
        backfuse.plan(model, **SIZES, peak_budget="1GiB")


def test_a_plan_of_another_model_changes_nothing():
    plan = half(make_model("llama"))
    other, inputs = make_model("qwen2"), batch("qwen2")
    expected = other(**inputs).logits
    with pytest.raises(ValueError, match="the plan's .* is .*, expected .* as model.layers.0 has"):
        backfuse.apply(other, plan)
    assert not any("_backfuse" in vars(m) for m in other.modules())
    assert torch.equal(other(**inputs).logits, expected)
    patch(other, "lean")
    with pytest.raises(ValueError, match="as model.layers.0 has it"):
        backfuse.apply(other, plan)
    assert other.model.layers[0]._backfuse.policy == LEAN
