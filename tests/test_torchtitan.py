"""The recipe for torchtitan, on blocks that are built as torchtitan 0.3's, in plain PyTorch."""

import collections
import copy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from families import assert_as_good_as
from torch import nn

from backfuse import kept_bytes

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
DIM, HEADS, KV_HEADS, HIDDEN, LENGTH = 32, 4, 2, 48, 24

VarlenMetadata = collections.namedtuple("VarlenMetadata", "cu_seq_q cu_seq_k max_q max_k")


class ComplexRoPE(nn.Module):
    def __init__(self, dim, max_seq_len):
        super().__init__()
        freqs = 1.0 / 500000.0 ** (torch.arange(0, dim, 2).double() / dim)
        angles = torch.outer(torch.arange(max_seq_len), freqs).float()
        self.register_buffer(
            "cache", torch.polar(torch.ones_like(angles), angles), persistent=False
        )

    def forward(self, q, k, positions):
        cache = self.cache[: q.shape[1]][None] if positions is None else self.cache[positions]
        return (self.turn(part, cache.unsqueeze(2)) for part in (q, k))

    @staticmethod
    def turn(x, cache):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        pairs = torch.view_as_complex(wide.reshape(*x.shape[:-1], -1, 2))
        return torch.view_as_real(pairs * cache).flatten(3).type_as(x)


class QKVLinear(nn.Module):
    def __init__(self, dim, heads, kv_heads, head_dim):
        super().__init__()
        self.wq = nn.Linear(dim, heads * head_dim, bias=False)
        self.wk = nn.Linear(dim, kv_heads * head_dim, bias=False)
        self.wv = nn.Linear(dim, kv_heads * head_dim, bias=False)


class GQAttention(nn.Module):
    def __init__(self, head_dim, qk_norm):
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = HEADS, KV_HEADS, head_dim
        self.rope = ComplexRoPE(head_dim, 64)
        self.qkv_linear = QKVLinear(DIM, HEADS, KV_HEADS, head_dim)
        self.wo = nn.Linear(HEADS * head_dim, DIM, bias=False)
        self.q_norm = nn.RMSNorm(head_dim, 1e-5) if qk_norm else None
        self.k_norm = nn.RMSNorm(head_dim, 1e-5) if qk_norm else None

    def forward(self, x, attention_masks, positions):
        names = ("wq", "wk", "wv")
        q, k, v = (
            getattr(self.qkv_linear, name)(x).unflatten(-1, (-1, self.head_dim)) for name in names
        )
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.rope(q, k, positions)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        if positions is not None:
            document = (positions == 0).cumsum(-1)
            seen = seen & (document[:, None, :, None] == document[:, None, None, :])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
        return self.wo(out.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self):
        super().__init__()
        self.w1 = nn.Linear(DIM, HIDDEN, bias=False)
        self.w2 = nn.Linear(HIDDEN, DIM, bias=False)
        self.w3 = nn.Linear(DIM, HIDDEN, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Llama3TransformerBlock(nn.Module):
    def __init__(self, head_dim, qk_norm):
        super().__init__()
        self.attention = GQAttention(head_dim, qk_norm)
        self.feed_forward = FeedForward()
        self.attention_norm = nn.RMSNorm(DIM, 1e-5)
        self.ffn_norm = nn.RMSNorm(DIM, 1e-5)

    def forward(self, x, attention_masks, positions=None):
        h = x + self.attention(self.attention_norm(x), attention_masks, positions)
        return h + self.feed_forward(self.ffn_norm(h))


class Decoder(nn.Module):
    def __init__(self, head_dim=8, qk_norm=False):
        super().__init__()
        self.layers = nn.ModuleDict(
            {str(index): Llama3TransformerBlock(head_dim, qk_norm) for index in range(2)}
        )

    def forward(self, x, attention_masks=None, positions=None):
        for layer in self.layers.values():
            x = layer(x, attention_masks, positions)
        return x


@pytest.fixture
def recipe(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import torchtitan_blocks

    yield torchtitan_blocks
    sys.modules.pop("torchtitan_blocks")


def results(model, x, grad, **given):
    x = x.clone().requires_grad_()
    out = model(x, **given)
    return [out.detach(), *torch.autograd.grad(out, [x, *model.parameters()], grad)]


def documents(lengths):
    """Positions of two rows, and the documents' offsets in both one after the other."""
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])
    ends = torch.tensor([n for row in lengths for n in row]).cumsum(0)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).int()
    longest = max(max(row) for row in lengths)
    return positions, VarlenMetadata(offsets, offsets, longest, longest)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("head_dim", "qk_norm"), [(8, False), (12, True)])
def test_it_computes_what_torchtitan_does(recipe, head_dim, qk_norm, packed):
    model = Decoder(head_dim, qk_norm)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    x, grad = torch.randn(2, 2, LENGTH, DIM)
    positions, masks = documents(((7, 17), (24,))) if packed else (None, None)
    plain = results(model, x, grad, positions=positions)
    exact = copy.deepcopy(model).double()
    for layer in exact.layers.values():  # complex numbers have a double of their own
        layer.attention.rope.cache = model.layers["0"].attention.rope.cache.to(torch.complex128)
    exact = results(exact, x.double(), grad.double(), positions=positions)
    keys = list(model.state_dict())
    first = None
    for policy in ("keep", "selective", "lean", "full"):
        again = recipe.use_backfuse(copy.deepcopy(model), policy)
        assert list(again.state_dict()) == keys
        assert isinstance(again.layers["0"], Llama3TransformerBlock)
        mine = results(again, x, grad, attention_masks=masks, positions=positions)
        eps = torch.finfo(torch.float32).eps
        for index, values in enumerate(zip(mine, plain, exact, strict=True)):
            assert_as_good_as(str(index), *values, 4 * eps)
        first = first or mine
        assert all(map(torch.equal, mine, first))


def test_what_is_kept(recipe):
    """What the policy says, and `mid`."""
    model = recipe.use_backfuse(Decoder(), "lean")
    spec = model.layers["0"].backfuse_spec
    sizes = {"batch_size": 2, "seq_len": LENGTH, "dtype": torch.float32}
    lean = kept_bytes(spec, "lean", **sizes)
    with_mid = kept_bytes(spec, {**dict.fromkeys(("qkv", "preact"), "recompute")}, **sizes)
    assert sum(with_mid.values()) == sum(lean.values()) + 2 * LENGTH * DIM * 4
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    x = torch.randn(2, LENGTH, DIM)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = model(x)
    angles = 2 * 2 * 8 * LENGTH * 4  # cos and sin of each layer
    assert sum(held.values()) == 2 * sum(with_mid.values()) + angles
    out.sum().backward()


def test_what_it_cannot_be_is_refused(recipe):
    model = Decoder()
    model.layers["1"].attention.qkv_linear = nn.Linear(DIM, 64)
    with pytest.raises(ValueError, match="has no attention.qkv_linear.wq, .*projections apart"):
        recipe.use_backfuse(model)
    assert type(model.layers["0"]) is Llama3TransformerBlock
    model = Decoder()
    model.layers["0"].feed_forward.w1 = nn.Linear(DIM, HIDDEN)
    with pytest.raises(ValueError, match="feed_forward.w1 have biases"):
        recipe.use_backfuse(model)
    model = Decoder()
    model.layers["0"].attention.rope = nn.Identity()
    with pytest.raises(ValueError, match="rope is a Identity, expected a ComplexRoPE"):
        recipe.use_backfuse(model)
    with pytest.raises(ValueError, match="lene"):
        recipe.use_backfuse(Decoder(), "lene")
    with pytest.raises(TypeError, match="attention_masks is a dict, expected VarlenMetadata"):
        recipe.use_backfuse(Decoder())(torch.randn(1, 4, DIM), attention_masks={})
