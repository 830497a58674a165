"""Layers that differ where no weight tells, before `patch` or after it."""

import copy

import pytest
import torch
from torch import nn

from backfuse import patch, unpatch
from backfuse.blocks.adapters.patched import obstacle

transformers = pytest.importorskip("transformers")

IDS = torch.arange(14).view(2, 7)


def llama(num_layers=2):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=48, num_hidden_layers=num_layers,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).train()


MLP = type(llama(1).model.layers[0].mlp)


class Scaled(MLP):
    def forward(self, x):
        return super().forward(x) * self.factor()

    def factor(self):
        return 3.0


class Private(Scaled):
    def factor(self):
        return self._k


class Buffered(Scaled):
    def factor(self):
        return self.k


class Numbered(Scaled):
    def factor(self):
        return 3.0 if self.layer_idx == 1 else 1.0


def unlike(kind, number, mlp):
    mlp.__class__ = kind
    k = 3.0 if number == 1 else 1.0
    if kind is Private:
        mlp._k = k
    elif kind is Buffered:
        mlp.register_buffer("k", torch.tensor(k))
    else:
        mlp.layer_idx = number


@pytest.mark.parametrize("kind", [Private, Buffered, Numbered, None])
def test_a_layer_in_the_middle_that_differs(kind):
    model = llama(3)
    for number, layer in enumerate(model.model.layers):
        if kind is not None:
            unlike(kind, number, layer.mlp)
        else:
            layer.self_attn.scaling = torch.tensor(0.9 if number == 1 else 8**-0.5)
    expected = model(IDS, use_cache=False).logits
    report = patch(model)
    # the MLP runs as it is; a buffer, which may change at any time, is not read in any layer
    assert len(report.half) == {Buffered: 3, None: 0}.get(kind, 1)
    torch.testing.assert_close(model(IDS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.gate_proj, self.up_proj = inner.gate_proj, inner.up_proj
        self.down_proj, self.act_fn = inner.down_proj, inner.act_fn

    forward = MLP.forward


def biased(layer):
    layer.mlp.down_proj.register_parameter("bias", nn.Parameter(torch.ones(32)))


def set_to(part, name, value):
    return lambda layer: setattr(layer.get_submodule(part), name, value)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layer: setattr(layer, "mlp", Around(layer.mlp)), "mlp is a Around, was a"),
        (set_to("mlp", "__class__", Scaled), "mlp is a Scaled, was a LlamaMLP"),
        (biased, "mlp.down_proj has the parameters"),
        (set_to("mlp", "down_proj", nn.Linear(48, 32)), "mlp.down_proj has the parameters"),
        (set_to("mlp", "act_fn", nn.GELU()), "mlp.act_fn is a GELU"),
        (set_to("self_attn", "is_causal", False), "self_attn.is_causal is False, was True"),
        (set_to("self_attn", "scaling", 0.9), "self_attn.scaling is 0.9"),
        (set_to("input_layernorm", "variance_epsilon", 1.0), "variance_epsilon is 1.0"),
    ],
    ids=range(8),
)
def test_what_is_changed_after_patch_is_seen(change, why):
    model = llama()
    patch(model)
    twin = copy.deepcopy(model)
    for one in (model, twin):
        change(one.model.layers[0])
    unpatch(twin)
    assert why in obstacle(model.model.layers[0]) and obstacle(model.model.layers[1]) is None
    ours, theirs = (one(IDS, use_cache=False).logits for one in (model, twin))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_what_is_changed_in_a_layer_of_torch_is_seen():
    layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=True)
    x = torch.randn(2, 7, 32)
    twin = copy.deepcopy(layer)
    patch(layer)
    for one in (layer, twin):
        one.norm_first = True
    torch.testing.assert_close(layer(x), twin(x), rtol=1e-4, atol=1e-5)


def test_a_hook_on_all_modules_is_called():
    model = llama()
    patch(model)
    seen = []
    hook = nn.modules.module.register_module_forward_hook(lambda m, *_: seen.append(m))
    try:
        model(IDS, use_cache=False)
    finally:
        hook.remove()
    assert model.model.layers[0].mlp.down_proj in seen
