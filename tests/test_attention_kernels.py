"""kernels/attention*.py against an explicit fp64 softmax, under autograd.

Without a GPU they run under Triton's interpreter, with the same tests.
"""

import pytest
import torch
from conftest import DEVICE
from test_attention import MASKS, check

from backfuse.kernels import fused, reference
from backfuse.kernels.attention import attention_forward
from backfuse.kernels.attention_backward import attention_backward
from backfuse.kernels.attention_configs import CONFIGS, HEAVY, choose, shared_bytes
from backfuse.kernels.attention_launch import packed_tiles
from backfuse.kernels.configs import SHARED_MEMORY, Config, architecture
from backfuse.kernels.reference.explicit_attention import AttentionMask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BOUNDS = [0, 5, 5, 75, 76, 133]  # an empty sequence, one of one token, several blocks


def heads(batch, tokens, heads, kv_heads, dim, dtype, *, keys=None, v_dim=None):
    """q, k and v side by side in one buffer, as a block has them; k and v where keys differ."""
    keys, v_dim = keys or tokens, v_dim or dim
    widths = [heads * dim, kv_heads * dim, kv_heads * v_dim]
    rows = max(tokens, keys)
    qkv = torch.randn(batch * rows, sum(widths)).to(dtype).to(DEVICE)
    parts = zip(qkv.split(widths, -1), (dim, dim, v_dim), strict=True)
    q, k, v = (part.unflatten(-1, (-1, width)).unflatten(0, (batch, rows)) for part, width in parts)
    if keys == tokens:
        return q, k, v
    return q[:, :tokens].contiguous(), k[:, :keys].contiguous(), v[:, :keys].contiguous()


ALL_MASKS = {
    **MASKS,
    "window-40": AttentionMask(window=40, scale=0.3),
    "window-40-full": AttentionMask(window=40, causal=False, scale=0.3),
}

#: Every mask in every dtype with two heads of k; in fp32 also with one and with six.
CASES = [(name, 2, dtype) for name in ALL_MASKS for dtype in DTYPES]
CASES += [(name, n, torch.float32) for name in ("causal", "dropout", "window-40") for n in (1, 6)]


@pytest.mark.parametrize("name, kv_heads, dtype", CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_as_good_as_pytorch(name, kv_heads, packed, dtype, poisoned_empty):
    tokens = 133 if packed else 70
    q, k, v = heads(1 if packed else 2, tokens, 6, kv_heads, 24, dtype)
    seed = torch.tensor([77], device=DEVICE)
    check(
        q, k, v, ALL_MASKS[name], bounds=BOUNDS if packed else None, seed=seed,
        forward=fused.attention_forward, backward=fused.attention_backward,
    )  # fmt: skip


@pytest.mark.parametrize("dim", [1, 8, 20, 32, 64, 80, 96, 128, 192, 256])
def test_head_dims(dim, poisoned_empty):
    q, k, v = heads(1, 45, 3, 1, dim, torch.float32)
    check(
        q, k, v, AttentionMask(scale=dim**-0.5),
        forward=fused.attention_forward, backward=fused.attention_backward,
    )  # fmt: skip


@pytest.mark.parametrize("tokens", [1, 2, 31, 32, 33, 64])
@pytest.mark.parametrize("name", ["causal", "full", "window"])
def test_lengths(tokens, name, poisoned_empty):
    q, k, v = heads(2, tokens, 2, 1, 16, torch.float32)
    check(
        q, k, v, MASKS[name],
        forward=fused.attention_forward, backward=fused.attention_backward,
    )  # fmt: skip


#: On a GPU its own configurations, under the interpreter everybody's.
OWN = [architecture(torch.device(DEVICE))] if DEVICE == "cuda" else list(CONFIGS["attention_dq"])
TABLE = sorted(
    {
        (kernel, config)
        for tables in (CONFIGS, HEAVY)
        for kernel, table in tables.items()
        for name in OWN
        for config in table.get(name, ())
    },
    key=str,
)


@pytest.mark.parametrize("kernel, config", TABLE)
@pytest.mark.parametrize("causal", [True, False])
def test_every_configuration(kernel, config, causal):
    """With heads as wide as it is for; windows and edges fall differently into every shape."""
    dim = config.block_k
    mask = AttentionMask(window=50, causal=causal, scale=dim**-0.5, dropout=0.1)
    seed = torch.tensor([3], device=DEVICE)
    q, k, v = heads(1, 200, 2, 1, dim, torch.float16)
    dout = torch.randn_like(q)
    out, lse = reference.attention_forward(q, k, v, mask, seed=seed)
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2)
    if kernel == "attention_forward":
        ours = attention_forward(q, k, v, mask, seed=seed, config=config)
        theirs = out, lse
    else:
        name = "dkdv_config" if kernel == "attention_dkdv" else "dq_config"
        ours = attention_backward(dout, q, k, v, lse, mask, delta, seed=seed, **{name: config})
        theirs = reference.attention_backward(dout, q, k, v, out, lse, mask, delta=delta, seed=seed)
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        assert (a.float() - b.float()).norm() <= 2e-3 * b.float().norm(), config


def test_something_fits_every_head_everywhere():
    for kernel, table in CONFIGS.items():
        for name, configs in table.items():
            for itemsize in (2, 4):
                if itemsize == 4 and name in ("sm_90", "sm_100"):
                    continue  # sm_80's are used
                for dim in (16, 32, 64, 128, 256):
                    assert any(
                        c.block_k >= dim
                        and shared_bytes(kernel, c, itemsize) <= SHARED_MEMORY[name]
                        for c in configs
                    ), (kernel, name, itemsize, dim)
    assert shared_bytes("attention_dkdv", Config(64, 128, 128, 8, 2), 2) == (256 + 256) * 128 * 2
    place = torch.device(DEVICE)
    assert choose("attention_forward", architecture(place), 2, 64).block_k >= 64


def test_the_same_bits_each_time_and_inputs_only_read():
    q, k, v = heads(2, 70, 4, 2, 16, torch.bfloat16)
    dout = torch.randn_like(q)
    before = [t.clone() for t in (q, k, v, dout)]
    runs = []
    for _ in range(2):
        out, lse = fused.attention_forward(q, k, v, AttentionMask())
        delta = (out.float() * dout.float()).sum(-1).transpose(1, 2)
        grads = fused.attention_backward(dout, q, k, v, out, lse, AttentionMask(), delta=delta)
        runs.append([out, lse, *grads[:3]])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip((q, k, v, dout), before, strict=True))


def test_gradients_of_other_strides():
    q, k, v = heads(2, 40, 2, 2, 16, torch.float32)
    out, lse = fused.attention_forward(q, k, v, AttentionMask())
    other = torch.randn_like(q).mT.contiguous().mT
    for dout in (torch.ones((), device=DEVICE).expand_as(q), other):
        delta = (out * dout).sum(-1).transpose(1, 2)
        arguments = (q, k, v, out, lse, AttentionMask())
        strided = fused.attention_backward(dout, *arguments, delta=delta)
        plain = fused.attention_backward(dout.contiguous(), *arguments, delta=delta.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(strided[:3], plain[:3], strict=True))


def test_offsets_of_any_stride():
    q, k, v = heads(1, 60, 2, 1, 16, torch.float32)
    bounds = torch.tensor([0, 7, 20, 7, 60, 7], dtype=torch.int32, device=DEVICE)
    mask = AttentionMask()
    strided = fused.attention_forward(q, k, v, mask, cu_seqlens=bounds[::2])
    plain = fused.attention_forward(q, k, v, mask, cu_seqlens=bounds[::2].contiguous())
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


@pytest.mark.parametrize("block", [16, 32, 128])
def test_tiles_of_packed_sequences(block):
    cu_seqlens = torch.tensor(BOUNDS, dtype=torch.int32, device=DEVICE)
    tiles = packed_tiles(cu_seqlens, BOUNDS[-1], block)
    found = [(s, b) for s, b in zip(*(t.tolist() for t in tiles), strict=True) if b >= 0]
    lengths = [b - a for a, b in zip(BOUNDS, BOUNDS[1:], strict=False)]
    assert found == [(s, b) for s, n in enumerate(lengths) for b in range(-(-n // block))]


def test_masks_that_are_tensors_are_written_out():
    q, k, v = heads(1, 20, 2, 1, 8, torch.float32)
    bias = torch.randn(1, 1, 20, 20, device=DEVICE)
    check(
        q, k, v, MASKS["causal"], bias=bias,
        forward=fused.attention_forward, backward=fused.attention_backward,
    )  # fmt: skip


GOOD = torch.zeros(1, 4, 2, 8)


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": GOOD[0]}, ValueError, r"q has the shape \[4, 2, 8\], expected \[batch, tokens"),
        (
            {"k": GOOD.half()},
            TypeError,
            "k is torch.float16, expected a floating-point dtype, all the",
        ),
        (
            {"k": GOOD.long()},
            TypeError,
            "k is torch.int64, expected a floating-point dtype, all the",
        ),
        ({"k": GOOD[:, :3]}, ValueError, r"v has the shape \[1, 4, 2, 8\], expected \[1, 3, heads"),
        ({"v": GOOD[:, :, :1]}, ValueError, "2, 2 and 1 heads, expected as many of k as of v"),
        ({"k": GOOD.repeat(1, 1, 2, 1), "v": GOOD.repeat(1, 1, 2, 1)}, ValueError, "2, 4 and 4"),
        ({"k": GOOD.mT.contiguous().mT}, ValueError, "k has the strides .* expected a last one"),
        ({"mask": AttentionMask(dropout=0.1)}, ValueError, "seed is None, expected one for a dr"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"q": GOOD, "k": GOOD, "v": GOOD, "mask": AttentionMask(), **change}
    with pytest.raises(error, match=message):
        attention_forward(**arguments)


def test_bad_input_of_the_backward():
    lse = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"delta is torch.float32 \[1, 2, 3\] on .*, expected"):
        attention_backward(GOOD, GOOD, GOOD, GOOD, lse, AttentionMask(), lse[..., :3])
    with pytest.raises(ValueError, match="delta is None, expected"):
        fused.attention_backward(GOOD, GOOD, GOOD, GOOD, GOOD, lse, AttentionMask())
    rows = torch.zeros(1, 2, 4)
    with pytest.raises(ValueError, match=r"dout is torch.float32 \[1, 4, 1, 8\] on .*, expected"):
        attention_backward(GOOD[:, :, :1], GOOD, GOOD, GOOD, rows, AttentionMask(), rows)
    wide = torch.zeros(1, 4, 1, 264)
    with pytest.raises(ValueError, match="q has heads of 264, expected at most 256"):
        attention_forward(wide, wide, wide, AttentionMask())
    two = torch.zeros(2, 4, 2, 8)
    with pytest.raises(ValueError, match="q has a batch of 2, expected 1 with cu_seqlens"):
        attention_forward(two, two, two, AttentionMask(), cu_seqlens=torch.tensor([0, 4]))


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    q = torch.randn(1, 2**31 // (8 * 128) + 512, 8, 128, device="cuda", dtype=torch.bfloat16)
    mask = AttentionMask(window=64, scale=0.1)
    out, lse = fused.attention_forward(q, q, q, mask)
    last = q[:, -600:].contiguous()
    tail, tail_lse = fused.attention_forward(last, last, last, mask)
    assert (out[:, -256:] - tail[:, -256:]).abs().max() < 0.02
    assert (lse[..., -256:] - tail_lse[..., -256:]).abs().max() < 1e-3


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nothing_of_a_neighbour_spreads(packed, poison, poisoned_empty):
    """The rows past a sequence's end are those of the next one: descriptors load them too."""
    q, k, v = (x.contiguous() for x in heads(2, 40, 2, 1, 16, torch.float32))
    dout = torch.randn_like(q)
    cu_seqlens = None
    if packed:
        q, k, v, dout = (x.flatten(0, 1).unsqueeze(0) for x in (q, k, v, dout))
        cu_seqlens = torch.tensor([0, 40, 80], dtype=torch.int32, device=DEVICE)

    def run():
        mask = AttentionMask(dropout=0.2)
        options = {"cu_seqlens": cu_seqlens, "seed": torch.tensor([3], device=DEVICE)}
        out, lse = attention_forward(q, k, v, mask, **options)
        delta = (out * dout).sum(-1).transpose(1, 2)
        return [out, *attention_backward(dout, q, k, v, lse, mask, delta, **options)[:3]]

    clean = [x.flatten(0, 1)[:40].clone() for x in run()]
    for x in (q, k, v, dout):
        x.flatten(0, 1)[40:] = poison
    assert all(map(torch.equal, clean, (x.flatten(0, 1)[:40] for x in run())))


def test_configurations_that_would_be_wrong_do_not_compile():
    q, k, v = heads(1, 20, 1, 1, 16, torch.float32)
    seed = torch.tensor([3], device=DEVICE)
    mask = AttentionMask(dropout=0.1)
    with pytest.raises(Exception, match="keys drop out in groups of four"):
        attention_forward(q, k, v, mask, seed=seed, config=Config(32, 2, 16, 4, 1))


@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_of_q_in_its_place(packed, poisoned_empty):
    """As a block asks for it: the same bits, where q was."""
    q, k, v = (x.clone() for x in heads(1 if packed else 2, 133, 4, 2, 16, torch.float32))
    options = {"cu_seqlens": torch.tensor(BOUNDS, device=DEVICE)} if packed else {}
    mask = ALL_MASKS["window-40"]
    out, lse = attention_forward(q, k, v, mask, **options)
    dout = torch.randn_like(out)
    delta = (out * dout).sum(-1).transpose(1, 2)
    fresh = attention_backward(dout, q, k, v, lse, mask, delta, **options)
    found = attention_backward(dout, q, k, v, lse, mask, delta, dq=q, **options)
    assert found[0] is q and all(torch.equal(a, b) for a, b in zip(found[:3], fresh, strict=False))
