"""PyTorch's own layers, patched."""

import copy
import itertools

import pytest
import torch
from families import same_bits
from torch import nn

from backfuse import NAMED_POLICIES, patch, unpatch
from backfuse.blocks.adapters import patched


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


def make(kind=nn.TransformerEncoderLayer, dtype=torch.float64, **options):
    torch.manual_seed(0)
    options = {"dropout": 0.0, "batch_first": True, **options}
    layer = kind(24, 4, 40, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return layer


def step(module, *args, **kwargs):
    module.zero_grad(set_to_none=True)
    torch.manual_seed(3)
    y = module(*args, **kwargs)
    (
        y * torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    ).sum().backward()
    return [y.detach(), *(p.grad for p in module.parameters())]


def assert_close(ours, theirs):
    largest = max(t.abs().max() for t in theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).abs().max() <= 1e-9 * max(b.abs().max(), largest)


def masks(prefix, tokens=9, batch=2):
    causal = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
    padding = torch.zeros(batch, tokens, dtype=torch.bool)
    padding[1, -3:] = True
    added = torch.zeros(tokens, tokens, dtype=torch.float64).masked_fill(causal, -torch.inf)
    heads = causal.expand(batch * 4, -1, -1)
    mask, keys = f"{prefix}_mask", f"{prefix}_key_padding_mask"
    return [
        {}, {mask: causal}, {keys: padding}, {mask: causal, keys: padding}, {mask: added},
        {mask: added, keys: padding}, {mask: heads},
    ]  # fmt: skip


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.functional.silu])
def test_encoder_layer(norm_first, batch_first, activation, own):
    layer = make(norm_first=norm_first, batch_first=batch_first, activation=activation)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    for given in masks("src"):
        unpatch(layer)
        expected = step(layer, x, **given)
        first = None
        for policy in NAMED_POLICIES:
            assert patch(layer, policy)[0].status == "fused"
            ours = step(layer, x, **given)
            assert_close(ours, expected)
            first = first or ours
            assert same_bits(ours, first)
    assert not own


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_decoder_layer(norm_first, batch_first, own):
    layer = make(nn.TransformerDecoderLayer, norm_first=norm_first, batch_first=batch_first)
    x, memory = torch.randn(2, 2, 9, 24, dtype=torch.float64)
    memory = memory[:, :5]
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for given in masks("tgt"):
        unpatch(layer)
        given["memory_key_padding_mask"] = padding
        expected = step(layer, x, memory, **given)
        assert patch(layer, "lean")[0].status == "half"
        assert_close(step(layer, x, memory, **given), expected)
    assert not own


def test_a_stack_of_them_keeps_less_and_trains(own):
    model = nn.TransformerEncoder(make(norm_first=True, dtype=torch.float32), 3)
    x = torch.randn(2, 9, 24)
    before = copy.deepcopy(model)
    expected = step(model, x)
    assert len(patch(model, "full").fused) == 3
    for a, b in zip(step(model, x), expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4)
    model.eval()
    padding = torch.tensor([[False] * 9, [False] * 6 + [True] * 3])
    with torch.no_grad():
        ours = model(x, src_key_padding_mask=padding)
        theirs = before.eval()(x, src_key_padding_mask=padding)
    assert torch.allclose(ours[~padding], theirs[~padding], atol=1e-5) and not own


def test_dropout_in_training(own):
    layer = make(dropout=0.25)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    expected = layer.eval()(x)
    report = patch(layer, "full")
    assert report[0].status == "fused"
    assert_close([layer(x)], [expected])
    layer.train()
    spec = layer._backfuse.recipe.spec
    rates = spec.attention_dropout, spec.residual_dropout, spec.activation_dropout
    assert rates == (0.25, 0.25, 0.25)
    assert not torch.equal(layer(x), layer(x))
    first = step(layer, x)
    patch(layer, "keep")
    assert same_bits(step(layer, x), first) and not own


def test_what_is_not_understood():
    class Other(nn.TransformerEncoderLayer):
        def _ff_block(self, x):
            return 2 * super()._ff_block(x)

    for layer, why in (
        (make(Other), "its _ff_block is not PyTorch's"),
        (make(activation=torch.tanh), "its activation is none of"),
    ):
        with pytest.raises(ValueError, match=why):
            patch(layer)
    for name, other in itertools.product(("norm1",), (nn.LayerNorm(24, eps=0.1), nn.Identity())):
        layer = make()
        setattr(layer, name, other)
        with pytest.raises(ValueError, match="its norms are not LayerNorms of one eps|no layer"):
            patch(layer)


class Positioned(nn.TransformerEncoderLayer):
    """As a detector's, whose queries get their positions anew in each layer."""

    def forward(self, src, src_mask=None, src_key_padding_mask=None, is_causal=False, pos=None):
        return super().forward(
            src if pos is None else src + pos, src_mask, src_key_padding_mask, is_causal
        )


def test_arguments_that_are_not_known(own):
    layer = make(Positioned)
    x, pos = torch.randn(2, 2, 9, 24, dtype=torch.float64)
    expected = [step(layer, x), step(layer, x, pos=pos), step(layer, x, None, None, False, pos)]
    assert patch(layer, "full")[0].status == "fused"
    with pytest.warns(UserWarning, match="it is given pos"):
        found = [step(layer, x), step(layer, x, pos=pos), step(layer, x, None, None, False, pos)]
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    assert len(own) == 2


class Reordered(nn.TransformerEncoderLayer):
    def forward(self, src, pos=None, src_mask=None, src_key_padding_mask=None, is_causal=False):
        return super().forward(
            src if pos is None else src + pos, src_mask, src_key_padding_mask, is_causal
        )


def test_arguments_in_another_order(own):
    layer = make(Reordered)
    x, pos = torch.randn(2, 2, 9, 24, dtype=torch.float64)
    causal = torch.ones(9, 9, dtype=torch.bool).triu(1)
    expected = step(layer, x, None, causal), step(layer, x, pos)
    assert patch(layer, "full")[0].status == "fused"
    assert_close(step(layer, x, None, causal), expected[0])
    assert not own
    assert_close(step(layer, x, pos), expected[1])
    assert own == ["it is given pos, which a block does not know"]


def test_errors_are_pytorchs():
    layer, decoder = make(), make(nn.TransformerDecoderLayer)
    x = torch.randn(2, 9, 24, dtype=torch.float64)
    calls = [
        lambda: layer(x, mask=None), lambda: layer(x, None, None, False, None),
        lambda: layer(x, is_causal=True), lambda: decoder(x),
    ]  # fmt: skip

    def errors():
        for call in calls:
            with pytest.raises((TypeError, RuntimeError)) as error:
                call()
            yield type(error.value), str(error.value)

    expected = list(errors())
    patch(layer), patch(decoder)
    assert list(errors()) == expected


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
@pytest.mark.parametrize("targets", [["linear1", "linear2"], ["linear2"]])
def test_adapters(kind, targets, first, own):
    peft = pytest.importorskip("peft")
    models = []
    for patched_too in (False, True):
        model = nn.ModuleList([make(kind, dtype=torch.float32)])
        if patched_too and first:
            patch(model, "full")
        torch.manual_seed(4)
        config = peft.LoraConfig(r=3, target_modules=targets, init_lora_weights=False)
        model = peft.get_peft_model(model, config)
        if patched_too and not first:
            patch(model, "full")
        models.append(model.base_model.model[0])
    args = torch.randn(2, 2, 9, 24)[: 1 if kind is nn.TransformerEncoderLayer else 2]
    found = []
    for layer in models:
        layer(*args).square().mean().backward()
        found.append([p.grad for p in layer.parameters() if p.requires_grad])
    assert len(found[0]) and all(grad is not None for grad in found[0])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    assert not own
