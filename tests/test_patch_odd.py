"""`patch` on layers that somebody did something to: hooks, wrappers, ties, chance, odd classes."""

import copy
import threading
import warnings

import pytest
import torch
import transformers
from families import same_bits
from tiny_models import batch, make_model, step
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn import functional as F

from backfuse import patch, unpatch
from backfuse.blocks.adapters import patched

IDS = batch("llama")


def layers_of(model):
    return model.model.layers


@pytest.fixture
def never_own(monkeypatch):
    """Fails where a layer runs its own forward."""
    monkeypatch.setattr(patched, "_own_forward", lambda *args: pytest.fail(args[3]))


def test_hooks_are_neither_called_nor_copied_by_patch():
    model = make_model("llama")
    seen, lock = [], threading.Lock()

    def count(module, *rest):
        with lock:  # which cannot be copied
            seen.append(module)

    for layer in layers_of(model):
        layer.register_forward_hook(count)
        layer.register_forward_pre_hook(count)
        layer.mlp.register_forward_hook(count)
    report = patch(model, "full")
    assert not seen
    assert len(report.fused) == 2
    assert "mlp has a hook" in str(report)  # which goes on being called
    model(**IDS)
    assert len(seen) == 6


def test_a_hook_that_changes_the_layers_output(never_own):
    plain, ours = make_model("llama"), make_model("llama")
    for model in (plain, ours):
        for layer in layers_of(model):
            layer.register_forward_hook(lambda module, args, output: output + 0.5)
    patch(ours, "full")
    expected, found = step(plain, IDS), step(ours, IDS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


def test_replicas_hold_their_weights_as_plain_attributes(never_own):
    """As `torch.nn.parallel.replicate` makes them."""

    def replicate(module):
        replica = module._replicate_for_data_parallel()
        for name, child in module.named_children():
            setattr(replica, name, replicate(child))
            replica._modules[name] = getattr(replica, name)
        for name, parameter in module._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.view_as(parameter))
        return replica

    model = make_model("llama")
    expected = step(model, IDS)
    patch(model, "full")
    replica = replicate(model)
    assert not list(replica.parameters())
    model.zero_grad(set_to_none=True)
    logits = replica(**IDS).logits
    F.cross_entropy(logits[:, :-1].flatten(0, 1), IDS["input_ids"][:, 1:].flatten()).backward()
    torch.testing.assert_close(logits, expected["logits"], rtol=1e-4, atol=1e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_orig_params", [False, True])
def test_fsdps_first_kind(use_orig_params, tmp_path, never_own):
    expected = step(make_model("llama"), IDS)["logits"]
    model = make_model("llama")
    patch(model, "full")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # FSDP's own, about one rank
            sharded = FullyShardedDataParallel(
                model, auto_wrap_policy=ModuleWrapPolicy({type(layers_of(model)[0])}),
                use_orig_params=use_orig_params, device_id=torch.device("cpu"),
                sharding_strategy=ShardingStrategy.FULL_SHARD,
            )  # fmt: skip
        logits = sharded(**IDS).logits
        logits.square().mean().backward()
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-5)
    assert all(p.grad is not None and p.grad.any() for p in sharded.parameters())


class Quantised(torch.Tensor):
    """Stands for a quantised weight."""


def test_a_weight_of_another_kind_of_tensor_is_its_layers_own():
    model = make_model("llama")
    expected = step(model, IDS)
    weight = layers_of(model)[1].self_attn.q_proj.weight
    layers_of(model)[1].self_attn.q_proj.weight = nn.Parameter(weight.data.as_subclass(Quantised))
    report = patch(model, "full")
    assert "q_proj.weight is a Quantised" in str(report)
    with pytest.warns(UserWarning, match="is a Quantised"):
        found = step(model, IDS)
    torch.testing.assert_close(
        found["logits"].as_subclass(torch.Tensor), expected["logits"], rtol=1e-4, atol=1e-5
    )
    assert unpatch(model) == 2


@pytest.mark.parametrize("last", [0, 1])
def test_weights_that_are_tied_inside_a_layer(last, never_own):
    models = [make_model("llama", mlp_bias=False) for _ in range(2)]
    for model in models:
        for layer in layers_of(model)[last:]:
            layer.mlp.gate_proj.weight = layer.mlp.up_proj.weight
    expected = step(models[0], IDS)
    assert len(patch(models[1], "full").fused) == 2
    found = step(models[1], IDS)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("saved", ["down_proj", "mlp", "self_attn", "input_layernorm"])
def test_modules_to_save_are_read_at_each_call(saved, first, never_own):
    peft = pytest.importorskip("peft")

    def make():
        target = "gate_proj" if saved == "self_attn" else "q_proj"
        lora = peft.LoraConfig(r=2, target_modules=[target], modules_to_save=[saved])
        model = make_model("llama")
        if first:
            patch(model, "full")
        model = peft.get_peft_model(model, lora)
        model.add_adapter("b", copy.copy(lora))
        if not first:
            patch(model, "full")
        with torch.no_grad():
            for number, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(number)
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    ours, plain = make(), make()
    unpatch(plain)
    for model in (ours, plain):
        model.set_adapter("b")
    for change in (lambda m: None, lambda m: m.set_adapter("default")):
        change(ours), change(plain)
        expected, found = step(plain, IDS), step(ours, IDS)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)
        with torch.no_grad(), ours.disable_adapter(), plain.disable_adapter():
            base = plain(**IDS, use_cache=False).logits
            torch.testing.assert_close(ours(**IDS, use_cache=False).logits, base)
        assert not torch.allclose(base, expected["logits"], atol=1e-3)


def test_a_part_that_is_gone():
    model = make_model("llama")
    patch(model)
    layer = layers_of(model)[0]
    down = layer.mlp.down_proj
    del layer.mlp.down_proj
    vars(layer.mlp)["down_proj"] = down  # a plain attribute, which is called all the same
    with pytest.warns(UserWarning, match="mlp.down_proj is not where it was when it was patched"):
        model(**IDS)


Llamas = type(layers_of(make_model("llama"))[0])


class Skipping(Llamas):
    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        if self.training and torch.rand(()) < 1e-3:
            return hidden_states
        return super().forward(hidden_states, attention_mask, None, None, False,
                               position_embeddings=position_embeddings, **kwargs)  # fmt: skip


class Scaled(Llamas):
    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        y = super().forward(hidden_states, attention_mask, None, None, False,
                            position_embeddings=position_embeddings, **kwargs)  # fmt: skip
        return y * self.layer_scalar


class Picky(Llamas):
    def __init_subclass__(cls, *, tag, **options):
        super().__init_subclass__(**options)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (Skipping, "it draws random numbers besides dropout"),
        (Scaled, "gives other numbers than it does .it may read layer_scalar"),
        (Picky, "no class can be made of its own: TypeError"),
    ],
)
def test_a_layer_that_is_skipped(kind, why):
    """One of two; chance and a buffer of one would go unseen in most runs."""
    model = make_model("llama")
    layer = layers_of(model)[1]
    layer.__class__ = kind
    layer.register_buffer("layer_scalar", torch.ones(1))
    state = torch.get_rng_state()
    report = patch(model, "full")
    assert same_bits([state], [torch.get_rng_state()])
    assert [row.status for row in report] == ["fused", "skipped"]
    assert type(layer) is kind
    with pytest.raises(ValueError, match=why):
        patch(nn.ModuleList([copy.deepcopy(layer)]))


def test_arguments_of_a_plan_without_a_budget():
    model = make_model("llama")
    for given in ({"batch_size": 4}, {"seq_len": 8}, {"device": "h200"}, {"profile": True}):
        with pytest.raises(ValueError, match=f"{next(iter(given))} is .* without a budget"):
            patch(model, "full", **given)
    assert unpatch(model) == 0


class Optional(Llamas):
    def forward(
        self, hidden_states, attention_mask=None, position_embeddings=None, with_ffn=True, **kwargs
    ):
        y = super().forward(hidden_states, attention_mask, None, None, False,
                            position_embeddings=position_embeddings)  # fmt: skip
        return y if with_ffn else hidden_states


def test_an_argument_whose_default_is_true():
    model = make_model("llama")
    layer = layers_of(model)[0]
    layer.__class__ = Optional
    assert len(patch(model, "full").fused) == 2
    x = torch.randn(1, 5, 48)
    angles = model.model.rotary_emb(x, torch.arange(5)[None])
    with pytest.warns(UserWarning, match="it is given with_ffn"):
        assert layer(x, position_embeddings=angles, with_ffn=False) is x


def test_another_thread_may_draw_random_numbers():
    ended = threading.Event()

    def draw():
        while not ended.is_set():
            torch.rand(3)

    other = threading.Thread(target=draw)
    other.start()
    try:
        assert len(patch(make_model("llama")).fused) == 2
    finally:
        ended.set()
        other.join()


def test_experts_may_draw_random_numbers(never_own):
    """They run as they were: with the same numbers, from the same generator."""
    models = [make_model("mixtral", router_jitter_noise=0.3) for _ in range(2)]
    assert len(patch(models[1], "full").half) == 2
    found = []
    for model in models:
        torch.manual_seed(5)
        found.append(step(model, IDS))
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-4, atol=1e-5)
    torch.manual_seed(6)
    assert not torch.equal(step(models[1], IDS)["logits"], found[1]["logits"])


def test_losses_of_the_router(never_own):
    models = [make_model("mixtral") for _ in range(2)]
    assert len(patch(models[1], "full").half) == 2
    grads = []
    for model in models:
        out = model(**IDS, labels=IDS["input_ids"], output_router_logits=True)
        assert out.aux_loss is not None
        out.loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    for name, value in grads[0].items():
        torch.testing.assert_close(grads[1][name], value, rtol=1e-4, atol=1e-5)


def tiny(family, **sizes):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        family, hidden_size=48, num_attention_heads=4, num_hidden_layers=2, intermediate_size=64,
        attn_implementation="sdpa", **sizes,
    )  # fmt: skip
    return config


def test_projections_that_run_in_another_order(never_own):
    """Keys, values, queries."""
    config = tiny("yolos", image_size=[32, 32], patch_size=8, num_detection_tokens=3)
    model = transformers.AutoModel.from_config(config).train()
    twin = copy.deepcopy(model)
    assert len(patch(model, "full").fused) == 2
    pixels = torch.randn(2, 3, 32, 32)
    for one in (model, twin):
        torch.manual_seed(0)
        one(pixels).last_hidden_state.square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_angles_without_a_batch(never_own):
    """Pixtral's packed images."""
    model = transformers.AutoModel.from_config(tiny("pixtral", image_size=32, patch_size=8)).train()
    twin = copy.deepcopy(model)
    assert len(patch(model, "full").fused) == 2
    pixels = torch.randn(1, 3, 32, 32)
    for one in (model, twin):
        out = one(pixels, image_sizes=torch.tensor([[32, 32]])).last_hidden_state
        out.square().mean().backward()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_shared_experts_are_no_ffn(never_own):
    config = tiny(
        "glm4_moe", num_key_value_heads=2, moe_intermediate_size=32, n_routed_experts=4,
        num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=0, vocab_size=64,
        head_dim=12, pad_token_id=0,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    expected = model(**IDS).logits
    assert len(patch(model, "full").half) == 2
    torch.testing.assert_close(model(**IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_layers_with_cross_attention():
    """A decoder alone is fused; behind an encoder it is its own, and has no plan."""
    config = transformers.BartConfig(
        d_model=48, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=4, decoder_attention_heads=4, vocab_size=64,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).train()
    with pytest.raises(ValueError, match="reach encoder_attn.k_proj.weight"):
        patch(model, budget="1MiB", batch_size=2, seq_len=40)
    report = patch(model, "full")
    assert len(report.fused) == 4 and "calls that reach encoder_attn.k_proj.weight" in str(report)
    with pytest.warns(UserWarning, match="it is given encoder_hidden_states"):
        model(**IDS, labels=IDS["input_ids"])
    alone = transformers.BartForCausalLM(config).eval()
    expected = alone(**IDS, use_cache=False).logits
    patch(alone, "full")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = alone(**IDS, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("removed", [True, False])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_full_backward_hooks(family, removed, never_own):
    """Which leave a flag on the module that had one."""
    model = make_model(family)
    inputs = batch(family)
    expected = step(model, inputs)
    layers = model.model.layers if family == "llama" else model.transformer.h
    for layer in layers:
        handle = (layer.mlp if removed else layer).register_full_backward_hook(lambda *args: None)
        if removed:
            handle.remove()
    assert len(patch(model, "full").fused) == 2
    found = step(model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
