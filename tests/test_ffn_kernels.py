"""kernels/ffn_*.py, activation.py and weight_grad.py against fp64 and against each other.

Without a GPU they run under Triton's interpreter, with the same tests.
"""

import inspect

import pytest
import torch
from conftest import DEVICE
from families import assert_as_good_as
from test_activation import PLAIN
from torch.nn import functional as F

from backfuse.kernels import ffn_up as ffn_up_module
from backfuse.kernels import fused, reference
from backfuse.kernels.activation import KINDS
from backfuse.kernels.configs import (
    CONFIGS,
    UNALIGNED,
    Config,
    accumulators,
    architecture,
    fits,
    shared_bytes,
    uses_descriptors,
)
from backfuse.kernels.reference.activation import ACTIVATIONS
from backfuse.kernels.reference.fp8 import dequantize, quantize
from backfuse.kernels.weight_grad import weight_grad

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: rows, f, h: one token; several tiles, ragged; sizes that no descriptor takes; whole tiles.
SIZES = [(1, 16, 8), (70, 200, 72), (33, 37, 45), (128, 128, 64)]
LAYOUTS = ["apart", "stacked", "plain"]


class Case:
    """The tensors of one FFN, random, on the device."""

    def __init__(self, size, layout, dtype, bias=True):
        rows, f, h = size
        count = 1 if layout == "plain" else 2
        self.gated = layout != "plain"

        def make(*shape, scale=1.0):
            return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)

        self.x, self.dy = make(rows, h), make(rows, h)
        self.down = make(h, f, scale=f**-0.5)
        self.weights = [make(f, h, scale=2 * h**-0.5) for _ in range(count)]
        self.biases = [make(f) if bias else None for _ in range(count)]
        if layout == "stacked":
            self.weights = [torch.cat(self.weights)]
            self.biases = [torch.cat(self.biases) if bias else None]
        self.width = f * count
        self.dtype = dtype

    def ups(self, dtype=None):
        """The arguments of the first projections, in another dtype if wanted."""
        to = [None if t is None else t.to(dtype or self.dtype) for t in self.biases]
        return (
            self.x.to(dtype or self.dtype),
            [w.to(dtype or self.dtype) for w in self.weights],
            to,
        )

    def poisoned(self, dtype=None, width=None):
        shape = (len(self.x), width or self.width)
        return torch.full(shape, float("nan"), dtype=dtype or self.dtype, device=DEVICE)

    def inputs(self):
        biases = [bias for bias in self.biases if bias is not None]
        return [self.x, self.dy, self.down, *self.weights, *biases]

    def plain(self, kind, dtype):
        """hidden, preact, dpreact, dbias by PyTorch and autograd in some dtype."""
        x, weights, biases = self.ups(dtype)
        preact = torch.cat(
            [F.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], -1
        ).requires_grad_()
        gate, up = preact.chunk(2, -1) if self.gated else (preact, None)
        hidden = PLAIN[kind](gate) * (up if self.gated else 1)
        z = hidden @ self.down.to(dtype).T
        [dpreact] = torch.autograd.grad(z, preact, self.dy.to(dtype))
        return hidden.detach(), preact.detach(), dpreact, dpreact.sum(0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", SIZES)
def test_kept_and_rebuilt(size, kind, layout, dtype, poisoned_empty):
    """As good as PyTorch, and the same bits whether preact is kept, rebuilt or never written."""
    case = Case(size, layout, dtype, bias=size[0] != 128)
    before = [t.clone() for t in case.inputs()]
    exact, theirs = case.plain(kind, torch.float64), case.plain(kind, dtype)
    activation = (kind, case.gated)
    preact = case.poisoned()
    hidden = fused.ffn_up(*case.ups(), *activation, preact=preact)
    assert torch.equal(fused.ffn_up(*case.ups(), *activation), hidden)
    assert torch.equal(fused.activation_forward(preact, *activation), hidden)
    again = case.poisoned()
    assert fused.ffn_up(*case.ups(), *activation, preact=again, need_hidden=False) is None
    assert torch.equal(again, preact)

    kept, dpreact = preact.clone(), case.poisoned()
    wanted = {"need_hidden": True, "need_dbias": True}
    second, dbias = fused.ffn_dact(case.dy, case.down, preact, *activation, dpreact, **wanted)
    assert torch.equal(second, hidden) and torch.equal(preact, kept)
    fused.ffn_dact(case.dy, case.down, preact, *activation, preact)  # over what it reads
    assert torch.equal(preact, dpreact)
    for strategy in ("split", "fused"):
        out = case.poisoned()
        rebuilt, dbias_again = fused.ffn_recompute_dact(
            *case.ups(), *activation, case.dy, case.down, out, strategy=strategy, **wanted
        )
        assert torch.equal(rebuilt, hidden) and torch.equal(out, dpreact)
        assert torch.equal(dbias_again, dbias)
    assert all(torch.equal(a, b) for a, b in zip(case.inputs(), before, strict=True))

    eps = torch.finfo(dtype).eps
    results = hidden, kept, dpreact, dbias
    for name, a, b, c in zip(("hidden", "preact", "dpreact", "dbias"), results, theirs, exact,
                             strict=True):  # fmt: skip
        assert_as_good_as(name, a, b, c, 4 * eps, c.abs().sum(0).max().item() * (name == "dbias"))


def test_what_is_not_wanted_is_not_made():
    case = Case((5, 16, 8), "apart", torch.float32)
    out = case.poisoned()
    result = fused.ffn_recompute_dact(
        *case.ups(), "silu", True, case.dy, case.down, out, need_hidden=False, strategy="fused"
    )
    assert result == (None, None) and out.isfinite().all()
    preact = case.poisoned().zero_()
    out = case.poisoned()
    assert fused.ffn_dact(
        case.dy, case.down, preact, "silu", True, out, need_hidden=False
    ) == (None, None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("f", [128, 200, 37])
def test_eight_bits(layout, f, dtype):
    """The kernel stores what the reference would store, and reads it as the reference would."""
    case = Case((35, f, 40), layout, dtype)
    case.weights[0][3] = 0.0  # a column whose values are the bias alone
    halves = 2 if case.gated else 1
    exact = case.poisoned()
    hidden = fused.ffn_up(*case.ups(), "silu", case.gated, preact=exact)
    stored = torch.zeros(exact.shape, dtype=torch.float8_e4m3fn, device=DEVICE)
    scales = case.poisoned(torch.float32, halves * -(-f // 128))
    again = fused.ffn_up(*case.ups(), "silu", case.gated, preact=stored, scales=scales)
    assert torch.equal(again, hidden)  # the forward pass does not see it
    theirs, their_scales = torch.empty_like(stored), torch.empty_like(scales)
    quantize(exact, halves, theirs, their_scales)
    if DEVICE == "cpu":  # a GPU's divisions round otherwise in a kernel and in PyTorch
        assert torch.equal(scales, their_scales)
        assert torch.equal(stored.view(torch.uint8), theirs.view(torch.uint8))
    torch.testing.assert_close(scales, their_scales, rtol=1e-6, atol=0)

    back = dequantize(stored, scales, halves, torch.empty_like(exact))
    largest = exact.float().unflatten(-1, (halves, -1)).abs().amax(-1).max()
    bound = exact.float().abs() * 2.0**-4 + largest * 2.0**-17
    assert ((back.float() - exact.float()).abs() <= bound).all()
    outs = case.poisoned(), case.poisoned()
    results = [
        fused.ffn_dact(case.dy, case.down, stored, "silu", case.gated, outs[0], scales=scales),
        fused.ffn_dact(case.dy, case.down, back, "silu", case.gated, outs[1]),
    ]
    assert torch.equal(outs[0], outs[1]) and torch.equal(results[0][0], results[1][0])
    elementwise = fused.activation_forward(stored, "silu", case.gated, scales, dtype)
    assert torch.equal(elementwise, results[1][0])


def test_zeros_survive_eight_bits():
    x = torch.zeros(3, 256)
    stored, scales = torch.empty(3, 256, dtype=torch.float8_e4m3fn), torch.empty(3, 2)
    quantize(x, 1, stored, scales)
    assert (scales == 1).all() and (dequantize(stored, scales, 1, torch.empty_like(x)) == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (150, 72, 200), (33, 37, 45), (256, 64, 64)])
def test_weight_gradients(shape, dtype, poisoned_empty):
    rows, n, k = shape
    wide = torch.randn(rows, n + 24).to(dtype).to(DEVICE)
    dy, x = wide[:, 16 : 16 + n], torch.randn(rows, k).to(dtype).to(DEVICE)  # a slice of columns
    total = weight_grad(None, dy, x)
    exact = dy.double().T @ x.double()
    bound = 2e-7 * (dy.double().abs().T @ x.double().abs()) * rows**0.5 + 1e-12
    assert total.dtype == torch.float32
    assert ((total.double() - exact).abs() <= bound).all()
    first = total.clone()
    assert weight_grad(total, dy, x) is total
    assert torch.equal(total, first + first)  # the same product, added in fp32
    rounded = weight_grad(None, dy, x, dtype)  # one chunk alone: rounded as it is written
    assert rounded.dtype == dtype and torch.equal(rounded, first.to(dtype))
    if dtype != torch.float32:
        assert weight_grad(None, dy, x, torch.float32).dtype == torch.float32
        with pytest.raises(TypeError, match="total is"):
            weight_grad(rounded, dy, x)


#: On a GPU its own configurations, under the interpreter everybody's.
OWN = [architecture(torch.device(DEVICE))] if DEVICE == "cuda" else list(CONFIGS["ffn_up"])
TABLE = sorted({(k, c) for k in CONFIGS for name in OWN for c in CONFIGS[k][name]}, key=str)


@pytest.mark.parametrize("kernel, config", TABLE)
def test_every_configuration_computes_the_same(kernel, config):
    dtype = torch.float16
    case = Case((150, 264, 136), "apart", dtype)
    plain = case.plain("silu", torch.float64)
    if kernel == "weight_grad":
        exact = case.dy.double().T @ case.x.double()
        pairs = [(weight_grad(None, case.dy, case.x, config=config), exact)]
    else:
        preact, out = case.poisoned(), case.poisoned()
        ups = (*case.ups(), "silu", True)
        if kernel == "ffn_up":
            hidden = fused.ffn_up(*ups, preact=preact, config=config)
            pairs = [(hidden, plain[0]), (preact, plain[1])]
        elif kernel == "ffn_dact":
            fused.ffn_up(*ups, preact=preact)
            hidden, dbias = fused.ffn_dact(
                case.dy, case.down, preact, "silu", True, out, need_dbias=True, config=config
            )
            pairs = [(hidden, plain[0]), (out, plain[2]), (dbias, plain[3])]
        else:
            hidden, dbias = fused.ffn_recompute_dact(
                *ups, case.dy, case.down, out, need_dbias=True, strategy="fused", config=config
            )
            pairs = [(hidden, plain[0]), (out, plain[2]), (dbias, plain[3])]
    for ours, exact in pairs:
        assert (ours.double() - exact).norm() <= 2e-3 * exact.norm(), config


def test_configurations_are_pruned_by_what_they_need():
    config = Config(128, 128, 64, 8, 4)
    assert shared_bytes("ffn_up", config, 2) == (128 + 256) * 64 * 2 * 4
    assert shared_bytes("ffn_up", config, 2, gated=False) == (128 + 128) * 64 * 2 * 4
    assert accumulators("ffn_recompute", config) == 192 and accumulators("ffn_up", config) == 128
    assert fits("ffn_up", config, "sm_90", 2) and not fits("ffn_up", config, "sm_90", 4)
    assert not fits("ffn_up", config, "sm_89", 2)
    for kernel in CONFIGS:
        for name in ("sm_80", "sm_89", "sm_90", "sm_100"):
            assert all(fits(kernel, UNALIGNED, name, size) for size in (2, 4))
    assert not fits("ffn_up", Config(256, 128, 32, 8, 2), "sm_90", 2)  # 256 accumulators a thread
    for kernel, table in CONFIGS.items():
        for name, configs in table.items():
            for itemsize in (2, 4):  # something runs in every dtype, everywhere
                assert any(fits(kernel, c, name, itemsize) for c in configs)
                if kernel in ("ffn_up", "ffn_dact"):  # eight bits need tiles of 128 columns
                    wide = [c for c in configs if c.block_n == 128]
                    where = (kernel, name, itemsize)
                    if itemsize == 2 or name not in ("sm_90", "sm_100"):
                        for gated in (True, False):
                            ok = [fits(kernel, c, name, itemsize, gated) for c in wide]
                            assert any(ok), where


def test_both_implementations_have_the_same_functions():
    """Names and parameters; a kernel may take a configuration more."""
    assert fused.__all__ == reference.__all__
    assert set(KINDS) == set(ACTIVATIONS)
    for name in reference.__all__:
        theirs, ours = (
            [(p.name, p.kind, p.default) for p in inspect.signature(f).parameters.values()]
            for f in (getattr(reference, name), getattr(fused, name))
        )
        assert [p for p in ours if p[0] != "config"] == theirs, name


def test_other_strides_are_read_right():
    case = Case((20, 40, 24), "apart", torch.float32)
    preact = case.poisoned()
    hidden = fused.ffn_up(*case.ups(), "silu", True, preact=preact)
    case.weights = [w.T.contiguous().T for w in case.weights]
    case.biases = [torch.stack([b, b + 1], -1)[:, 0] for b in case.biases]
    case.x, case.down = case.x.T.contiguous().T, case.down.T.contiguous().T
    assert torch.equal(fused.ffn_up(*case.ups(), "silu", True), hidden)
    out, strided = case.poisoned(), case.poisoned()
    fused.ffn_dact(case.dy, case.down.contiguous(), preact, "silu", True, out)
    dy = case.dy[:1].expand_as(case.dy)
    fused.ffn_dact(case.dy, case.down, preact, "silu", True, strided)
    assert torch.equal(out, strided)
    fused.ffn_dact(dy.contiguous(), case.down, preact, "silu", True, out)
    fused.ffn_dact(dy, case.down, preact, "silu", True, strided)  # rows of stride 0
    assert torch.equal(out, strided)


ZEROS = torch.zeros(16, 8)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": torch.zeros(5, 8, dtype=torch.float64)}, "x is torch.float64, expected one of"),
        ({"weights": [ZEROS, ZEROS[:15]]}, r"is torch.float32 \[15, 8\], expected .* \[16, 8\]"),
        ({"weights": [ZEROS[:, :7]] * 2}, r"has the shape \[16, 7\], expected \[16, 8\]"),
        ({"weights": [ZEROS] * 3}, "weights holds 3 tensors, expected gate and up"),
        ({"kind": "swish"}, "kind is 'swish', expected one of silu"),
        ({"preact": torch.zeros(5, 31)}, r"preact has the shape \[5, 31\], expected \[5, 32\]"),
        ({"preact": torch.zeros(5, 32).half()}, "preact is torch.float16, expected torch.float32"),
        ({"preact": torch.zeros(32, 5).T}, r"preact has the strides \(1, 5\), expected a last"),
        ({"preact": torch.zeros(5, 32), "scales": torch.zeros(5, 2)}, "expected float8_e4m3fn"),
        ({"biases": [torch.zeros(16), None]}, "biases hold some and lack some, expected one a w"),
        ({"biases": [torch.zeros(7)] * 2}, r"a bias is torch.float32 \[7\] on .*, expected .*\[16"),
        ({"biases": [torch.zeros(16).long()] * 2}, "a bias is torch.int64"),
    ],
)
def test_bad_input(change, message):
    arguments = {
        "x": torch.zeros(5, 8), "weights": [ZEROS, ZEROS],
        "biases": [None, None], "kind": "silu", "gated": True, **change,
    }  # fmt: skip
    with pytest.raises((ValueError, TypeError), match=message):
        fused.ffn_up(**arguments)


def test_bad_strategy_and_shapes_in_backward():
    case = Case((5, 16, 8), "apart", torch.float32)
    out = case.poisoned()
    with pytest.raises(ValueError, match="strategy is 'both', expected 'auto', 'split' or 'fused'"):
        fused.ffn_recompute_dact(
            *case.ups(), "silu", True, case.dy, case.down, out, strategy="both"
        )
    with pytest.raises(ValueError, match=r"dpreact has the shape \[5, 31\], expected \[5, 32\]"):
        fused.ffn_dact(case.dy, case.down, out, "silu", True, out[:, :31])
    with pytest.raises(TypeError, match="down is torch.float16, expected the dtype of dy"):
        fused.ffn_dact(case.dy, case.down.half(), out, "silu", True, out)


@pytest.mark.gpu
def test_more_than_two_billion_elements():
    rows, f, h = 2**31 // 28672 + 1024, 14336, 64
    x = torch.randn(rows, h, device="cuda", dtype=torch.bfloat16)
    weights = [torch.randn(f, h, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    preact = torch.full((rows, 2 * f), float("nan"), device="cuda", dtype=torch.bfloat16)
    hidden = fused.ffn_up(x, weights, [None, None], "silu", True, preact=preact)
    last = torch.full((512, 2 * f), float("nan"), device="cuda", dtype=torch.bfloat16)
    tail = fused.ffn_up(x[-512:].contiguous(), weights, [None, None], "silu", True, preact=last)
    assert torch.equal(preact[-512:], last) and torch.equal(hidden[-512:], tail)
    dy = torch.randn(rows, h, device="cuda", dtype=torch.bfloat16)
    down = torch.randn(h, f, device="cuda", dtype=torch.bfloat16)
    fused.ffn_dact(dy, down, preact, "silu", True, preact, need_hidden=False)
    fused.ffn_dact(dy[-512:].contiguous(), down, last, "silu", True, last, need_hidden=False)
    assert torch.equal(preact[-512:], last)


def test_a_plan_is_of_a_place_in_memory(monkeypatch):
    """The same sizes and strides, a few bytes further on: a descriptor cannot begin there."""
    loaded = []
    kernel = ffn_up_module.ffn_up_kernel

    class Spy:
        def __getitem__(self, grid):
            def launch(*args, **flags):
                loaded.append(flags["DESC"])
                return kernel[grid](*args, **flags)

            return launch

    monkeypatch.setattr(ffn_up_module, "ffn_up_kernel", Spy())
    weights = [torch.randn(32, 16, device=DEVICE).to(torch.float16) for _ in range(2)]
    memory = torch.randn(8 * 16 + 8, device=DEVICE).to(torch.float16)
    for start in (0, 1, 8, 0):
        x = memory[start : start + 8 * 16].view(8, 16)
        fused.ffn_up(x, weights, [None, None], "silu", True)
    assert loaded == [uses_descriptors(x), False, uses_descriptors(x), uses_descriptors(x)]
