"""timm's own vision transformers; run where timm is installed."""

import pytest
import torch

from backfuse import patch
from backfuse.blocks.adapters import patched

layers = pytest.importorskip("timm.layers")
vit = pytest.importorskip("timm.models.vision_transformer")

CASES = {
    "plain": {},
    "layer scale": {"init_values": 0.1},
    "norms behind": {"block_fn": vit.ResPostBlock},
    "gated": {"mlp_layer": layers.SwiGLUPacked, "act_layer": torch.nn.SiLU},
    "qk-norm": {"qk_norm": True, "norm_layer": layers.RmsNorm},
}


def make(**options):
    torch.manual_seed(0)
    model = vit.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=7, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train()


def step(model, x):
    model.zero_grad()
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return {"y": y.detach(), **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_a_step(options, monkeypatch):
    def refuse(layer, original, state, reason, args, kwargs):
        raise AssertionError(f"{state.name} runs its own forward: {reason}")

    monkeypatch.setattr(patched, "_own_forward", refuse)
    model, x = make(**options), torch.randn(2, 3, 32, 32)
    expected = step(model, x)
    assert patch(model, "lean").fused == ["blocks.0", "blocks.1"]
    found = step(model, x)
    scale = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"qk_norm": True}, "attn.q_norm is not an RMSNorm as the block's other norms"),
        ({"scale_mlp_norm": True}, "a norm is neither of the residual's width nor one of q or k"),
        ({"block_fn": vit.ParallelScalingBlock}, "its FFN is not understood"),
    ],
)
def test_what_is_left_alone(options, why):
    with pytest.raises(ValueError, match=why):
        patch(make(**options))


def test_stochastic_depth_leaves_the_layers_that_have_it():
    report = patch(make(drop_path_rate=0.2))
    assert report.fused == ["blocks.0"] and list(report.skipped) == ["blocks.1"]
