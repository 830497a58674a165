"""Layers that look like a block and are none: a layer is believed only as far as it was seen."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from backfuse import patch
from backfuse.blocks.adapters.verify import understand


class Layer(nn.Module):
    """A layer of no known family: other names, other order of definition, extras in the way."""

    def __init__(self, width=32, heads=4, hidden=56, act=F.silu, extra=None):
        super().__init__()
        self.heads_of, self.n_heads, self.act, self.extra = width // heads, heads, act, extra
        self.lower = nn.Linear(hidden, width)
        self.raise_, self.gateway = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.back = nn.Linear(width, width, bias=False)
        self.three = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(3))
        self.second, self.first = (nn.LayerNorm(width) for _ in range(2))

    def attend(self, q, k, v):
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, states):
        n = self.first(states)
        mid = states + self.back(self.attend(*(one(n) for one in self.three)))
        n = self.second(mid)
        inner = self.lower(self.act(self.gateway(n)) * self.raise_(n))
        return mid + (self.extra(inner) if self.extra else inner)


class Timm(nn.Module):
    """A block of the same structure as timm's vision transformers have."""

    class Attention(nn.Module):
        def __init__(self, width, heads, drop):
            super().__init__()
            self.num_heads, self.head_dim = heads, width // heads
            self.scale, self.fused_attn = self.head_dim**-0.5, True
            self.qkv = nn.Linear(width, 3 * width)
            self.q_norm, self.k_norm, self.norm = nn.Identity(), nn.Identity(), nn.Identity()
            self.attn_drop, self.proj = nn.Dropout(drop), nn.Linear(width, width)
            self.proj_drop = nn.Dropout(drop)

        def forward(self, x, attn_mask=None, is_causal=False):
            b, n, c = x.shape
            qkv = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            q, k = self.q_norm(q), self.k_norm(k)
            p = self.attn_drop.p if self.training else 0.0
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, dropout_p=p)
            return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).reshape(b, n, c))))

    class Mlp(nn.Module):
        def __init__(self, width, hidden, drop):
            super().__init__()
            self.fc1, self.act, self.drop1 = nn.Linear(width, hidden), nn.GELU(), nn.Dropout(drop)
            self.norm, self.fc2 = nn.Identity(), nn.Linear(hidden, width)
            self.drop2 = nn.Dropout(drop)

        def forward(self, x):
            return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))

    class LayerScale(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.gamma = nn.Parameter(torch.full((width,), 1e-5))

        def forward(self, x):
            return x * self.gamma

    class DropPath(nn.Module):
        def forward(self, x):
            kept = x.new_empty(len(x), 1, 1).bernoulli_(0.9) / 0.9
            return x * kept if self.training else x

    def __init__(self, scaled=False, drop=0.0, paths=False, width=32, heads=4):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = self.Attention(width, heads, drop), self.Mlp(width, 2 * width, drop)
        self.ls1, self.ls2 = (self.LayerScale(width) if scaled else nn.Identity() for _ in range(2))
        self.drop_path1, self.drop_path2 = (
            self.DropPath() if paths else nn.Identity() for _ in range(2)
        )

    def forward(self, x, attn_mask=None):
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def gradients(layer, x):
    layer.zero_grad()
    y = layer(x)
    (y * torch.arange(y.numel()).view(y.shape).cos()).sum().backward()
    return [y.detach(), *(p.grad for p in layer.parameters())]


def nodes(y):
    """Names of what autograd will run, back from y along the first inputs."""
    node = y.grad_fn
    while node is not None:
        yield node.name()
        node = node.next_functions[0][0] if node.next_functions else None


@pytest.mark.parametrize(
    "layer", [Layer(), Layer(act=F.gelu), Timm(), Timm(scaled=True)], ids=range(4)
)
def test_a_layer_of_no_known_family(layer):
    x = torch.randn(2, 9, 32)
    expected = gradients(layer, x)
    assert patch(layer, "lean")[0].status == "fused"
    ours = gradients(layer, x)
    assert any(node.startswith("RecomputeFunction") for node in nodes(layer(x)))  # a block's
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6


def test_dropout_is_told_by_what_it_is_handed():
    spec = understand(Timm(drop=0.2), Timm).spec
    rates = spec.attention_dropout, spec.residual_dropout, spec.activation_dropout
    assert rates == (0.2, 0.2, 0.2)
    layer = Timm(drop=0.2)
    layer.mlp.drop2.p = 0.3
    with pytest.raises(ValueError, match="its halves drop out with unlike probabilities"):
        patch(layer)
    layer = Layer(extra=None)
    layer.second = nn.Sequential(layer.second, nn.Dropout(0.1))
    with pytest.raises(ValueError, match="it drops out .p = 0.1. elsewhere"):
        patch(layer)


class Buffer(Layer):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.ones(64, 64).tril(), persistent=False)


class Window(Layer):
    window_of_attention = 300

    def __init__(self):
        super().__init__()
        self.attention_window = 300


class Late(Layer):
    """Scores that grow with the position, from where no short input reaches."""

    def forward(self, states, position_ids=None):
        if position_ids is None:
            return super().forward(states)
        scale = 1 + 0.1 * torch.log1p(torch.floor(position_ids / 8192))
        return super().forward(states * scale[..., None].to(states.dtype))


class ByTokens(Layer):
    def attend(self, q, k, v):
        return super().attend(q * math.log(7 + q.shape[1]), k, v)


class Clipped(Layer):
    def attend(self, q, k, v):
        return super().attend(q, k, v.clamp(-8.0, 8.0))


class ClippedScores(Layer):
    def attend(self, q, k, v):
        return super().attend(q.clamp(-8.0, 8.0), k, v)


class ClippedInput(Layer):
    def forward(self, states):
        return super().forward(states.clamp(-20.0, 20.0))


class Evaluated(Layer):
    def forward(self, states):
        return super().forward(states) * (1.0 if self.training else 0.8)


class DropsBeforeNorms(Layer):
    """As timm's blocks with norms behind the halves do: a block drops out behind such a norm."""

    def forward(self, states):
        out = F.dropout(self.back(self.attend(*(one(states) for one in self.three))), 0.3)
        mid = states + self.first(out)
        inner = self.lower(self.act(self.gateway(mid)) * self.raise_(mid))
        return mid + self.second(F.dropout(inner, 0.3))


class DropsTwice(Layer):
    def attend(self, q, k, v):
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        weights = F.dropout(F.dropout(weights, 0.5), 0.5)
        return (weights @ v).transpose(1, 2).flatten(2)


class DropsScores(Layer):
    def attend(self, q, k, v):
        q, k, v = (t.unflatten(-1, (self.n_heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = F.dropout(q @ k.mT * q.shape[-1] ** -0.5, 0.5).softmax(-1)
        return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (Layer(extra=lambda x: 1.001 * x), "gives other numbers"),
        (Layer(extra=lambda x: x + 1e-3), "gives other numbers"),
        (Layer(extra=torch.tanh), "gives other numbers"),
        (Layer(act=torch.tanh), "its activation is none of silu"),
        (Layer(act=lambda x: F.silu(1.02 * x)), "its activation is none of silu"),
        (Timm(paths=True), "it draws random numbers besides dropout"),
        (Buffer(), "it holds seen .64, 64., a mask of its own perhaps"),
        (Window(), "attention_window = 300, a window of its own perhaps"),
        (Late(), "what it computes depends on position_ids"),
        (ByTokens(), "gives other numbers"),
        (Clipped(), "large activations give other numbers"),
        (Layer(act=lambda x: F.silu(x).clamp(max=16.0)), "large activations give other numbers"),
        (ClippedScores(), "large activations give other numbers"),
        (ClippedInput(), "large activations give other numbers"),
        (Evaluated(), "in eval mode it gives other numbers"),
        (DropsBeforeNorms(), "gives other numbers"),
        (DropsTwice(), "it drops out twice in one place"),
        (DropsScores(), "it drops out .p = 0.5. elsewhere"),
        (Layer(extra=nn.Dropout1d(0.5)), "it draws random numbers besides dropout"),
    ],
    ids=range(19),
)
def test_what_differs_a_little_is_left_alone(layer, why):
    kind = type(layer)
    with pytest.raises(ValueError, match=why):
        patch(layer)
    assert type(layer) is kind


def test_norms_are_told_by_their_numbers():
    class Norm(nn.Module):
        def __init__(self, eps=1e-5, offset=0.0, shift=0.0):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(32))
            self.eps, self.offset, self.shift = eps, offset, shift

        def forward(self, x):
            rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps + self.shift)
            return (x.float() * rstd * (self.offset + self.weight.float())).to(x.dtype)

    for offset in (0.0, 1.0):
        layer = Layer()
        layer.first, layer.second = Norm(offset=offset), Norm(offset=offset)
        spec = understand(layer, Layer).spec
        assert (spec.norm, spec.norm_eps, spec.norm_offset) == ("rmsnorm", 1e-5, offset)
        assert not spec.norm_round_first
    for odd in (Norm(shift=1e-5), Norm(offset=0.5)):  # another eps than it says; no known offset
        layer = Layer()
        layer.first, layer.second = odd, Norm()
        with pytest.raises(ValueError, match="first is neither an RMSNorm nor a LayerNorm"):
            patch(layer)
    layer = Layer()
    layer.first, layer.second = Norm(), Norm(eps=1e-6)
    with pytest.raises(ValueError, match="its norms are unlike each other"):
        patch(layer)


def test_layers_that_differ_by_their_number_are_each_read():
    class Numbered(Layer):
        def __init__(self, layer_idx):
            super().__init__()
            self.layer_idx = layer_idx

        def attend(self, q, k, v):
            return super().attend(q / (1 + self.layer_idx), k, v)

    model = nn.ModuleList(Numbered(index) for index in range(3))
    report = patch(model)
    assert report.fused == ["0"] and list(report.skipped) == ["1", "2"]


class Deeper(Layer):
    """What its number does is seen in no output of a stand-in."""

    def __init__(self, index, how):
        super().__init__()
        self.layer_idx, self.how = index, how

    def forward(self, states):
        if self.how == "dropout":
            p = 0.2 * self.layer_idx
            self.extra = lambda x: F.dropout(x, p, self.training)
        y = super().forward(states)
        if self.how == "depth" and self.layer_idx and self.training and torch.rand(()) < 1e-6:
            return states
        if self.how == "clamp" and self.layer_idx:
            return y.clamp(-500.0, 500.0)
        return y


@pytest.mark.parametrize("how", ["depth", "clamp", "dropout"])
def test_numbers_that_change_what_a_stand_in_does_not_show(how):
    report = patch(nn.ModuleList([Deeper(index, how) for index in range(3)]))
    assert [row.status for row in report] == ["fused", "skipped", "skipped"]


def test_what_the_caller_set_for_all_of_pytorch_does_not_matter():
    x = torch.randn(2, 9, 32)
    expected = Layer()(x) is not None
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            state = torch.get_rng_state()
            layer = Layer()
            assert patch(layer)[0].status == "fused" and expected
            assert torch.equal(torch.get_rng_state(), state)
    finally:
        torch.set_default_dtype(torch.float32)
