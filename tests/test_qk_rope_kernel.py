"""kernels/qk_rope.py against its reference: in fp64, and in the same dtype as plain PyTorch."""

from dataclasses import replace

import pytest
import torch
from conftest import DEVICE
from families import assert_as_good_as, same_bits

from backfuse.kernels import qk_rope
from backfuse.kernels.attention_delta import attention_delta
from backfuse.kernels.qk_rope import qk_rope_backward, qk_rope_forward
from backfuse.kernels.reference import qk_rope as reference
from backfuse.kernels.reference.norm import NormSpec
from backfuse.kernels.reference.qk_rope import QKSpec

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = 4

#: Heads of q and k, their width, rotating channels, layout, qk-norm.
CASES = [
    (4, 2, 12, 12, "half", None),
    (5, 3, 12, 4, "interleaved", "head"),
    (3, 1, 32, 32, "half", "full"),
    (7, 1, 32, 2, "half", None),
    (4, 2, 32, 0, "half", "head"),
    (3, 2, 12, 0, "half", "full"),
    (5, 2, 80, 80, "half", "head"),
    (2, 2, 80, 32, "interleaved", None),
    (2, 1, 128, 128, "half", "head"),
    (3, 3, 128, 64, "interleaved", "full"),
    (1, 3, 256, 256, "interleaved", "head"),
    (32, 8, 128, 128, "half", None),
]

NORMS = {
    "llama": NormSpec("rmsnorm", 1e-6),
    "gemma": NormSpec("rmsnorm", 1e-5, 1.0, False),
}


@pytest.fixture
def few_programs(monkeypatch):
    """A backward pass with so few programs that each has several blocks of rows."""
    monkeypatch.setattr(qk_rope, "resident_programs", lambda device, num_warps: 2)


def random(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def nan(*shape, dtype=FP32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def problem(case, norm="llama", dtype=FP32, angles=FP32, weights=None, rows=ROWS):
    """A spec, and by name: raw, cos, sin, weights, gradient, attention's output and gradient.

    cos and sin are of no rotation at all and differ in their two halves.
    """
    q_heads, kv_heads, dim, rotary_dim, layout, qk_norm = case
    spec = QKSpec(q_heads * dim, kv_heads * dim, dim, layout, qk_norm, NORMS[norm])
    width = spec.q_size + spec.kv_size
    sizes = {"head": (dim, dim), "full": (spec.q_size, spec.kv_size), None: ()}[qk_norm]
    norms = [random(size, dtype=weights or dtype) for size in sizes] or [None, None]
    return spec, {
        "raw": random(rows, width, dtype=dtype, scale=2.0),
        "cos": random(rows, rotary_dim, dtype=angles) if rotary_dim else None,
        "sin": random(rows, rotary_dim, dtype=angles) if rotary_dim else None,
        "q_weight": norms[0],
        "k_weight": norms[1],
        "dqk": random(rows, width, dtype=dtype),
        "attn_out": random(rows, spec.q_size, dtype=dtype),
        "dout": random(rows, spec.q_size, dtype=dtype),
    }


def run(ops, spec, t, in_place=False):
    """y, delta, draw, dq_weight, dk_weight."""
    high = torch.float64 if t["raw"].dtype == torch.float64 else FP32
    given = [t[name] for name in ("cos", "sin", "q_weight", "k_weight")]
    rows, width = t["raw"].shape
    raw = t["raw"].clone() if in_place else t["raw"]
    out = raw if in_place else nan(rows, width, dtype=raw.dtype)
    delta = nan(rows, spec.q_size // spec.head_dim, dtype=high)
    cores = {"attn_out": t["attn_out"], "dout": t["dout"], "delta": delta}
    assert ops.qk_rope_forward(raw, *given, spec, out, **cores) is None
    dqk = t["dqk"].clone()
    grads = ops.qk_rope_backward(dqk, t["raw"] if spec.qk_norm else None, *given, spec)
    return [out, delta, dqk, *grads]


def sizes(spec, t):
    """How large the terms are that y, delta, draw and the weight gradients are differences of."""

    def largest(*tensors):
        return torch.stack([x.abs().max() for x in tensors]).prod().item()

    angles = [x for x in (t["cos"], t["sin"]) if x is not None]
    delta = largest(t["attn_out"], t["dout"])
    if not spec.qk_norm:
        return [largest(t["raw"], *angles), delta, largest(t["dqk"], *angles), 0.0, 0.0]
    rotated = t["dqk"].clone()
    rotation = replace(spec, qk_norm=None)
    reference.qk_rope_backward(rotated, None, t["cos"], t["sin"], None, None, rotation)
    columns, projected, results = [spec.q_size, spec.kv_size], [], []
    for x, dy, weight in zip(
        t["raw"].split(columns, -1),
        rotated.split(columns, -1),
        (t["q_weight"] + spec.norm.offset, t["k_weight"] + spec.norm.offset),
        strict=True,
    ):
        x, dy = x.unflatten(-1, (-1, len(weight))), dy.unflatten(-1, (-1, len(weight)))
        rstd = x.square().mean(-1, keepdim=True).add(spec.norm.eps).rsqrt()
        results.append(largest(rstd, dy, weight))
        projected.append((dy * x * rstd).abs().sum((0, 1)).max().item())
    return [0.0, delta, max(results), *projected]


def compare(ours, spec, t):
    """Our results against fp64, by what the reference in PyTorch makes of the same tensors."""
    wide = {name: None if x is None else x.double() for name, x in t.items()}
    plain, exact = run(reference, spec, t), run(reference, spec, wide)
    assert [x is None for x in ours] == [x is None for x in plain]
    assert [x.dtype for x in ours if x is not None] == [x.dtype for x in plain if x is not None]
    names = ["y", "delta", "draw", "dq_weight", "dk_weight"]
    for name, a, b, c, scale in zip(names, ours, plain, exact, sizes(spec, wide), strict=True):
        if a is not None:
            assert_as_good_as(name, a, b, c, torch.finfo(a.dtype).eps, scale)


DTYPES = [
    (FP32, FP32, "gemma"), (BF16, BF16, "llama"), (FP16, FP16, "llama"), (BF16, FP32, "gemma"),
]  # fmt: skip


@pytest.mark.parametrize(
    "case, dtype, weights, norm",
    # without a norm there are no weights to be of another dtype
    [(case, *kinds) for case in CASES for kinds in DTYPES if case[-1] or kinds[0] == kinds[1]],
    ids=str,
)
def test_as_good_as_pytorch(case, dtype, weights, norm, poisoned_empty, few_programs):
    spec, t = problem(case, norm, dtype, weights=weights)
    before = {name: None if x is None else x.clone() for name, x in t.items()}
    ours = run(qk_rope, spec, t)
    assert same_bits(t.values(), before.values())
    compare(ours, spec, t)
    # again and in place, and a row alone: the same bits
    assert same_bits(ours, run(qk_rope, spec, t, in_place=True))
    rowwise = ("raw", "cos", "sin", "dqk", "attn_out", "dout")
    alone = {n: x[2:3] if n in rowwise and x is not None else x for n, x in t.items()}
    assert same_bits([x[2:3] for x in ours[:3]], run(qk_rope, spec, alone)[:3])


@pytest.mark.parametrize("case", CASES[:4] + CASES[6:8], ids=str)
def test_low_precision_rounds_where_the_reference_rounds(case):
    """Short sums: so the statistics are the same but for a last bit, which bf16 hardly sees."""
    spec, t = problem(case, dtype=BF16, angles=BF16)
    ours, plain = run(qk_rope, spec, t), run(reference, spec, t)
    for a, b in zip(ours[:3:2], plain[:3:2], strict=True):
        assert (a != b).float().mean().item() < 0.02


@pytest.mark.parametrize("angles", [FP32, BF16, FP16])
@pytest.mark.parametrize("layout", ["half", "interleaved"])
def test_dtypes_of_cos_and_sin(angles, layout):
    """They are read as they are: rounded ones give the bits of their fp32 copies."""
    spec, t = problem((3, 2, 12, 8, layout, "head"), dtype=FP16, angles=angles)
    exact = {**t, "cos": t["cos"].float(), "sin": t["sin"].float()}
    mixed = {**t, "cos": t["cos"].float()}
    ours = run(qk_rope, spec, t)
    assert same_bits(ours, run(qk_rope, spec, exact)) and same_bits(ours, run(qk_rope, spec, mixed))


@pytest.mark.parametrize("case", [CASES[1], CASES[2], CASES[6]], ids=str)
def test_strides(case, poisoned_empty):
    """q and k of a row that holds v too: v and what is around is neither read nor written."""
    spec, t = problem(case, dtype=BF16)
    width, heads = spec.q_size + spec.kv_size, spec.q_size // spec.head_dim
    qkv, dqkv, into = (nan(ROWS, width + 7, dtype=BF16) for _ in range(3))
    qkv[:, :width], dqkv[:, :width] = t["raw"], t["dqk"]
    angles = []
    for name in ("cos", "sin"):
        wide = nan(ROWS, t[name].shape[1] + 3)
        wide[:, 2:-1] = t[name]
        angles.append(wide[:, 2:-1])
    cores = []
    for name in ("attn_out", "dout"):
        wide = nan(ROWS, spec.q_size + 5, dtype=BF16)
        wide[:, 1:-4] = t[name]
        cores.append(wide[:, 1:-4])
    weights = t["q_weight"], t["k_weight"]
    grads = qk_rope_backward(dqkv[:, :width], qkv[:, :width], *angles, *weights, spec)
    for delta in (nan(heads, ROWS).t(), nan(ROWS, 2 * heads + 1)[:, 1::2], nan(ROWS, heads)):
        around = delta if delta._base is None else delta._base
        qk_rope_forward(
            qkv[:, :width], *angles, *weights, spec, into[:, :width],
            attn_out=cores[0], dout=cores[1], delta=delta,
        )  # fmt: skip
        compare([into[:, :width], delta, dqkv[:, :width], *grads], spec, t)
        assert around.isnan().sum() == around.numel() - delta.numel()
        joint = delta.clone()
        delta.fill_(float("nan"))
        attention_delta(*cores, delta, spec)
        assert torch.equal(delta, joint)
    for wide in (qkv, dqkv, into):
        assert wide[:, width:].isnan().all()


def test_one_angle_for_all_rows():
    """cos and sin may be expanded: a row stride of 0."""
    spec, t = problem(CASES[1])
    t |= {name: t[name][:1].expand(ROWS, -1) for name in ("cos", "sin")}
    copied = {**t, "cos": t["cos"].contiguous(), "sin": t["sin"].contiguous()}
    assert same_bits(run(qk_rope, spec, t), run(qk_rope, spec, copied))


@pytest.mark.parametrize("case", CASES[1::2], ids=str)
def test_delta_alone_has_the_bits_of_the_joint_launch(case):
    spec, t = problem(case, dtype=BF16)
    delta = nan(ROWS, case[0])
    attention_delta(t["attn_out"], t["dout"], delta, spec)
    joint, out = torch.full_like(delta, float("nan")), torch.empty_like(t["raw"])
    given = [t[name] for name in ("raw", "cos", "sin", "q_weight", "k_weight")]
    cores = {"attn_out": t["attn_out"], "dout": t["dout"], "delta": joint}
    qk_rope_forward(*given, spec, out, **cores)
    assert torch.equal(delta, joint)


@pytest.mark.parametrize("missing", ["attn_out", "dout", "delta"])
def test_no_delta_unless_all_of_it_is_there(missing):
    spec, t = problem(CASES[0])
    delta = nan(ROWS, 4)
    cores = {"attn_out": t["attn_out"], "dout": t["dout"], "delta": delta}
    del cores[missing]
    out = torch.empty_like(t["raw"])
    qk_rope_forward(t["raw"], t["cos"], t["sin"], None, None, spec, out, **cores)
    assert delta.isnan().all() and out.isfinite().all()


@pytest.mark.parametrize("qk_norm", ["head", "full"])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)])
def test_only_the_weight_gradients_that_are_wanted(qk_norm, wanted, poisoned_empty):
    spec, t = problem((3, 2, 12, 8, "half", qk_norm), rows=40)
    given = [t[name] for name in ("raw", "cos", "sin", "q_weight", "k_weight")]
    everything = t["dqk"].clone()
    expected = [everything, *qk_rope_backward(everything, *given, spec)]
    dqk = t["dqk"].clone()
    grads = qk_rope_backward(dqk, *given, spec, need_dweights=wanted)
    kept = [x if want else None for x, want in zip(expected[1:], wanted, strict=True)]
    assert same_bits([dqk, *grads], [expected[0], *kept])


def test_nothing_to_do():
    spec, t = problem((3, 2, 12, 0, "half", None))
    ours = run(qk_rope, spec, t)
    assert torch.equal(ours[0], t["raw"]) and same_bits(ours[2:], [t["dqk"], None, None])
    spec, t = problem((3, 2, 12, 12, "half", "head"), rows=0)
    ours = run(qk_rope, spec, t)
    assert ours[0].shape == (0, 60) and torch.equal(ours[3], torch.zeros_like(ours[3]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("qk_norm", ["head", "full"])
def test_without_epsilon_nothing_leaks_from_heads_and_rows_that_are_not_there(qk_norm):
    spec, t = problem((3, 5, 12, 4, "half", qk_norm))
    spec = replace(spec, norm=NormSpec("rmsnorm", 0.0))
    assert all(x.isfinite().all() for x in run(qk_rope, spec, t))


def test_rounding_between_dtypes():
    """raw in fp32, out in bf16: rounded after the norm, as the reference stores it there."""
    spec, t = problem(CASES[1])
    given = [t[name] for name in ("raw", "cos", "sin", "q_weight", "k_weight")]
    outs = [nan(*t["raw"].shape, dtype=BF16) for _ in range(2)]
    for ops, out in zip((qk_rope, reference), outs, strict=True):
        ops.qk_rope_forward(*given, spec, out)
    assert (outs[0] != outs[1]).float().mean().item() < 0.02


def test_wrong_arguments():
    spec, t = problem(CASES[1])

    def forward(spec=spec, out=None, **changed):
        given = t | changed
        names = ("raw", "cos", "sin", "q_weight", "k_weight")
        out = torch.empty_like(t["raw"]) if out is None else out
        cores = {n: given[n] for n in ("attn_out", "dout", "delta") if "delta" in given}
        qk_rope_forward(*(given[name] for name in names), spec, out, **cores)

    raw, cos = t["raw"], t["cos"]
    with pytest.raises(TypeError, match="raw is torch.float64"):
        forward(raw=raw.double())
    with pytest.raises(TypeError, match="delta is torch.float64, expected torch.float32"):
        forward(delta=nan(ROWS, 5).double())
    with pytest.raises(ValueError, match=r"delta is \[4, 4\] on .*, expected \[4, 5\]"):
        forward(delta=nan(ROWS, 4))
    with pytest.raises(ValueError, match="attn_out has 3 rows, expected 4"):
        forward(attn_out=t["attn_out"][1:], dout=t["dout"][1:], delta=nan(3, 5))
    with pytest.raises(ValueError, match="raw has the shape"):
        forward(raw=raw[:, 1:])
    with pytest.raises(ValueError, match="out has the strides"):
        forward(out=nan(*raw.t().shape).t())
    with pytest.raises(ValueError, match=r"cos has the shape \[3, 4\], expected \[4, 4\]"):
        forward(cos=cos[1:])
    with pytest.raises(ValueError, match=r"sin has the shape \[4, 2\], expected \[4, 4\]"):
        forward(sin=t["sin"][:, :2])
    with pytest.raises(ValueError, match="cos or sin is None, expected both or neither"):
        forward(sin=None)
    with pytest.raises(ValueError, match="cos has 14 columns, expected an even number up to"):
        forward(cos=random(ROWS, 14), sin=random(ROWS, 14))
    with pytest.raises(ValueError, match="cos has 3 columns, expected an even number up to"):
        forward(cos=random(ROWS, 3), sin=random(ROWS, 3))
    with pytest.raises(ValueError, match="q_weight or k_weight is None, expected both"):
        forward(k_weight=None)
    with pytest.raises(ValueError, match="q_weight is given, expected None where spec.qk_norm"):
        forward(replace(spec, qk_norm=None))
    with pytest.raises(ValueError, match=r"q_weight has the shape \[1, 12\], expected \[1, 60\]"):
        forward(replace(spec, qk_norm="full"))
    with pytest.raises(ValueError, match="'heads', expected 'head', 'full' or None"):
        forward(replace(spec, qk_norm="heads"))
    with pytest.raises(ValueError, match="'layernorm', expected 'rmsnorm'"):
        forward(replace(spec, norm=NormSpec("layernorm")))
    with pytest.raises(ValueError, match="'spiral', expected 'half' or 'interleaved'"):
        forward(replace(spec, layout="spiral"))
    with pytest.raises(ValueError, match="q_size is 60, expected a multiple of head_dim 8"):
        forward(replace(spec, head_dim=8))
    wide = QKSpec(32768 + 128, 128, 128)
    with pytest.raises(ValueError, match="q_size is 32896, expected a multiple .* up to 32768"):
        row = random(1, wide.q_size + 128)
        qk_rope_forward(row, None, None, None, None, wide, row)
    with pytest.raises(ValueError, match="dqk has the shape"):
        qk_rope_backward(raw[:, 1:], raw, cos, t["sin"], t["q_weight"], t["k_weight"], spec)
    with pytest.raises(ValueError, match="dout has the shape"):
        attention_delta(t["attn_out"], t["dout"][1:], nan(ROWS, 5), spec)
