"""kernels/norm.py against its reference: in fp64, and in the same dtype as plain PyTorch."""

import inspect

import pytest
import torch
from conftest import DEVICE
from families import assert_as_good_as, same_bits

from backfuse.kernels import norm
from backfuse.kernels.norm import norm_apply, norm_backward, norm_forward
from backfuse.kernels.reference import norm as reference
from backfuse.kernels.reference.norm import NormSpec

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16

#: Of x, of the parameters, of y and dy.
DTYPES = [(FP32, FP32, FP32), (BF16,) * 3, (FP16,) * 3, (FP32, FP32, BF16), (BF16, FP32, BF16)]

SPECS = {
    "llama": (NormSpec("rmsnorm", 1e-5), False),
    "gemma": (NormSpec("rmsnorm", 1e-6, 1.0, False), False),
    "everything": (NormSpec("rmsnorm", 1e-6, 0.25, True), True),
    "layernorm": (NormSpec("layernorm", 1e-5, 0.0, False), True),
    "layernorm, rounded": (NormSpec("layernorm", 1e-5, 1.0, True), False),
}


@pytest.fixture
def few_programs(monkeypatch):
    """A backward pass with so few programs that each has several blocks of rows."""
    monkeypatch.setattr(norm, "resident_programs", lambda device, num_warps: 2)


def random(*shape, dtype=FP32, scale=1.0):
    return (torch.randn(*shape) * scale).to(dtype).to(DEVICE)


def nan(*shape, dtype=FP32):
    return torch.full(shape, float("nan"), dtype=dtype, device=DEVICE)


def framed(x, before=3, after=5):
    """The same numbers, as columns of a wider tensor that is NaN elsewhere."""
    wide = nan(x.shape[0], before + x.shape[1] + after, dtype=x.dtype)
    view = wide[:, before : before + x.shape[1]]
    view.copy_(x)
    return view


def frame_is_nan(view, before=3):
    """Whether nothing around a `framed` tensor was written."""
    wide = view._base.clone()
    wide[:, before : before + view.shape[1]] = float("nan")
    return bool(wide.isnan().all())


def problem(rows, width, bias, dtypes=(FP32,) * 3):
    """x, weight, bias, dy, and a residual in x's dtype."""
    dtype, parameters, low = dtypes
    return (
        random(rows, width, dtype=dtype, scale=3.0) + random(1, width, dtype=dtype),
        random(width, dtype=parameters),
        random(width, dtype=parameters) if bias else None,
        random(rows, width, dtype=low),
        random(rows, width, dtype=dtype),
    )


def run(ops, x, weight, bias, dy, residual, spec, low, place=lambda x: x):
    """Every result there is: y, y + residual, dx, dx + residual, y again, dweight, dbias, rstd.

    Args:
        place: where x, dy, residual, statistics and all outputs are to stand.
    """
    high = torch.float64 if x.dtype == torch.float64 else FP32
    x, dy, residual = place(x), place(dy), place(residual)
    statistics = place(nan(spec.statistics, len(x), dtype=high))
    y = ops.norm_forward(x, weight, bias, spec, statistics, low)
    added, dx, dx_added = (place(nan(*x.shape, dtype=x.dtype)) for _ in range(3))
    returned = ops.norm_apply(x, statistics, weight, bias, spec, low, residual=residual, out=added)
    assert returned is added
    normed = place(nan(*x.shape, dtype=low))
    grads = ops.norm_backward(
        dy, x, statistics, weight, bias, spec, dx=dx, normed=normed, need_dbias=True
    )
    ops.norm_backward(
        dy, x, statistics, weight, bias, spec, residual=residual, dx=dx_added, need_dweight=False
    )
    return [y, added, dx, dx_added, normed, *grads, *statistics]


NAMES = ["y", "y + residual", "dx", "dx + residual", "normed", "dweight", "dbias", "rstd", "mean"]


def compare(ours, tensors, spec, low):
    """Our results against fp64, by what the reference in PyTorch makes of the same tensors."""
    plain = run(reference, *tensors, spec, low)
    x, weight, bias, dy, residual = (None if t is None else t.double() for t in tensors)
    exact = run(reference, x, weight, bias, dy, residual, spec, torch.float64)
    assert [t.dtype for t in ours] == [t.dtype for t in plain]
    scale = (exact[7].unsqueeze(-1) * dy * (weight + spec.offset)).abs().max().item()
    shares = dy * reference._normalized(x, torch.stack(exact[7:]))
    scales = {
        "dx": scale,
        "dx + residual": scale,
        "dweight": shares.abs().sum(0).max().item(),
        "dbias": dy.abs().sum(0).max().item(),
        "mean": x.abs().mean().item(),
    }
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=False):
        assert_as_good_as(name, a, b, c, torch.finfo(a.dtype).eps, scales.get(name, 0.0))


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("rows, width", [(1, 1), (150, 3), (37, 65), (9, 1000), (5, 4096)])
def test_as_good_as_pytorch(case, dtypes, rows, width, poisoned_empty, few_programs):
    spec, bias = SPECS[case]
    tensors = problem(rows, width, bias, dtypes)
    before = [None if t is None else t.clone() for t in tensors]
    ours = run(norm, *tensors, spec, dtypes[2])
    assert same_bits(tensors, before)
    compare(ours, tensors, spec, dtypes[2])
    # what is rebuilt has the bits of the first pass
    assert torch.equal(ours[0], ours[4])
    statistics = torch.stack(ours[7:])
    again = norm_apply(*tensors[:1], statistics, *tensors[1:3], spec, dtypes[2])
    assert torch.equal(ours[0], again)
    assert torch.equal(ours[1], tensors[4] + ours[0])


@pytest.mark.parametrize("case", SPECS)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_rounds_where_the_reference_rounds(case, dtypes):
    spec, bias = SPECS[case]
    x, weight, bias, _, _ = problem(21, 200, bias, dtypes)
    statistics = nan(spec.statistics, 21)
    norm_forward(x, weight, bias, spec, statistics, dtypes[2])
    ours, theirs = (
        ops.norm_apply(x, statistics, weight, bias, spec, dtypes[2]) for ops in (norm, reference)
    )
    if reference._is_librarys(x, weight, spec):  # finds its own statistics; nothing is rounded
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    else:
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("case", ["everything", "layernorm"])
@pytest.mark.parametrize("dtypes", DTYPES[:4:3], ids=str)
@pytest.mark.parametrize("width", [65, 2048])
def test_rows_of_wider_tensors(case, dtypes, width, poisoned_empty):
    """Statistics too are a slice of wider ones; nothing around them is read or written."""
    spec, bias = SPECS[case]
    tensors = problem(21, width, bias, dtypes)
    views = []

    def place(x):
        views.append(framed(x))
        return views[-1]

    ours = run(norm, *tensors, spec, dtypes[2], place)
    compare(ours, tensors, spec, dtypes[2])
    assert torch.equal(ours[0], ours[4])
    assert len(views) == 8 and all(map(frame_is_nan, views))


def test_a_gradient_that_is_one_row_for_all():
    spec, _ = SPECS["layernorm"]
    x, weight, bias, dy, _ = problem(9, 48, True)
    stats, grads = nan(2, 9), []
    norm_forward(x, weight, bias, spec, stats, FP32)
    for given in (dy[:1].expand(9, 48), dy[:1].repeat(9, 1)):
        dx = nan(9, 48)
        grads.append([dx, *norm_backward(given, x, stats, weight, bias, spec, dx=dx)])
    assert same_bits(*grads)


@pytest.mark.parametrize("width", [65, 1000])
def test_in_place(width):
    """dx may take the place of dy or of the residual, the sum that of the residual."""
    spec, _ = SPECS["layernorm"]
    x, weight, bias, dy, residual = problem(11, width, True)
    _, added, dx, dx_added, _, dweight, _, *stats = run(
        norm, x, weight, bias, dy, residual, spec, FP32
    )
    stats = torch.stack(stats)
    place = dy.clone()
    again, _ = norm_backward(place, x, stats, weight, bias, spec, dx=place)
    assert same_bits([place, again], [dx, dweight])
    place = residual.clone()
    norm_backward(dy, x, stats, weight, bias, spec, residual=place, dx=place)
    assert torch.equal(place, dx_added)
    place = residual.clone()
    norm_apply(x, stats, weight, bias, spec, FP32, residual=place, out=place)
    assert torch.equal(place, added)


@pytest.mark.parametrize("case", ["llama", "layernorm"])
def test_bits_do_not_depend_on_the_run_or_the_neighbours(case):
    spec, bias = SPECS[case]
    tensors = problem(70, 300, bias, (BF16,) * 3)
    first = run(norm, *tensors, spec, BF16)
    assert same_bits(first, run(norm, *tensors, spec, BF16))
    x, weight, bias, dy, residual = tensors
    alone = run(norm, x[40:41], weight, bias, dy[40:41], residual[40:41], spec, BF16)
    assert same_bits([t[40:41] for t in first[:5]], alone[:5])
    assert same_bits([t[40:41] for t in first[7:]], alone[7:])


@pytest.mark.parametrize("want_dx", [False, True])
@pytest.mark.parametrize("want_normed", [False, True])
@pytest.mark.parametrize("need_dweight", [False, True])
@pytest.mark.parametrize("need_dbias", [False, True])
def test_only_what_is_wanted(want_dx, want_normed, need_dweight, need_dbias, poisoned_empty):
    spec, _ = SPECS["layernorm"]
    tensors = problem(19, 33, True)
    x, weight, bias, dy, residual = tensors
    _, _, _, dx_added, normed, dweight, dbias, *stats = run(norm, *tensors, spec, FP32)
    dx = nan(19, 33) if want_dx else None
    again = nan(19, 33) if want_normed else None
    grads = norm_backward(
        dy, x, torch.stack(stats), weight, bias, spec, residual=residual, dx=dx, normed=again,
        need_dweight=need_dweight, need_dbias=need_dbias,
    )  # fmt: skip
    assert same_bits(
        [dx, again, *grads],
        [
            dx_added if want_dx else None,
            normed if want_normed else None,
            dweight if need_dweight else None,
            dbias if need_dbias else None,
        ],
    )


def test_no_rows():
    spec, _ = SPECS["layernorm"]
    tensors = problem(0, 20, True)
    y, *_, dweight, dbias, _, _ = run(norm, *tensors, spec, BF16)
    assert y.shape == (0, 20) and y.dtype == BF16
    assert torch.equal(dweight, torch.zeros_like(dweight)) and torch.equal(dweight, dbias)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_without_epsilon_nothing_leaks_from_beyond_the_edge():
    spec = NormSpec("layernorm", 0.0, 0.0, False)
    tensors = problem(3, 9, True)
    assert all(t.isfinite().all() for t in run(norm, *tensors, spec, FP32))


def test_a_residual_without_out_gives_a_fresh_sum():
    spec, _ = SPECS["gemma"]
    x, weight, _, _, residual = problem(4, 20, False)
    stats = nan(1, 4)
    y = norm_forward(x, weight, None, spec, stats, BF16, residual=residual)
    theirs = reference.norm_apply(x, stats, weight, None, spec, BF16, residual=residual)
    assert torch.equal(y, theirs) and y.dtype == theirs.dtype


def test_the_widest_rows():
    spec, _ = SPECS["llama"]
    tensors = problem(2, norm.MAX_WIDTH, False)
    ours, plain = (run(ops, *tensors, spec, FP32) for ops in (norm, reference))
    exact = run(reference, *(None if t is None else t.double() for t in tensors), spec, FP32)
    for name, a, b, c in zip(NAMES, ours, plain, exact, strict=False):
        assert_as_good_as(name, a, b, c, torch.finfo(FP32).eps, 1.0)


def test_offsets_beyond_two_to_the_31():
    """Row 2 begins more than 2^31 numbers in; most of the 4 GiB are never touched."""
    stride = 2**30 + 16
    x = torch.empty(2 * stride + 64, dtype=FP16, device=DEVICE).as_strided((3, 64), (stride, 1))
    x.copy_(random(3, 64, dtype=FP16))
    spec, stats = NormSpec(), nan(1, 3)
    weight, dx = random(64), nan(3, 64)
    y = norm_forward(x, weight, None, spec, stats, FP16)
    assert torch.equal(y, norm_forward(x.contiguous(), weight, None, spec, stats, FP16))
    dweight, _ = norm_backward(x, x, stats, weight, None, spec, dx=dx)
    assert dx.isfinite().all() and dweight.isfinite().all()


def test_wrong_arguments():
    x, weight, bias, dy, _ = problem(4, 20, True)
    spec, stats = NormSpec(), nan(1, 4)

    def forward(x=x, weight=weight, bias=None, spec=spec, stats=stats, dtype=FP32, **more):
        return norm_forward(x, weight, bias, spec, stats, dtype, **more)

    def backward(dy=dy, **more):
        return norm_backward(dy, x, stats, weight, bias, spec, **more)

    with pytest.raises(TypeError, match="x is torch.float64, expected one of"):
        forward(x.double())
    with pytest.raises(TypeError, match="dtype is torch.float64, expected one of"):
        forward(dtype=torch.float64)
    with pytest.raises(TypeError, match="weight is torch.float64"):
        forward(weight=weight.double())
    with pytest.raises(TypeError, match="statistics is torch.bfloat16, expected torch.float32"):
        forward(stats=stats.bfloat16())
    with pytest.raises(TypeError, match="dy is torch.float64"):
        backward(dy.double())
    with pytest.raises(ValueError, match=r"width 32769, expected 1 to 32768"):
        forward(random(1, 32769))
    with pytest.raises(ValueError, match=r"width 0, expected 1 to 32768"):
        forward(random(4, 0))
    with pytest.raises(ValueError, match=r"x has the strides \(1, 4\), expected a last one of 1"):
        forward(random(20, 4).t())
    with pytest.raises(ValueError, match=r"weight has the shape \[1, 19\], expected \[1, 20\]"):
        forward(weight=weight[:-1])
    with pytest.raises(ValueError, match="weight has the strides"):
        forward(weight=random(40)[::2])
    with pytest.raises(ValueError, match="bias has the shape"):
        forward(bias=bias[:-1])
    with pytest.raises(ValueError, match=r"statistics has the shape \[1, 4\], expected \[2, 4\]"):
        forward(spec=NormSpec("layernorm"))
    with pytest.raises(ValueError, match="'groupnorm', expected 'rmsnorm' or 'layernorm'"):
        forward(spec=NormSpec("groupnorm"))
    with pytest.raises(ValueError, match="residual has the shape"):
        forward(residual=x[:2], out=x.clone())
    with pytest.raises(ValueError, match="out has the shape"):
        forward(residual=x, out=x[:2].clone())
    for name in ("residual", "dx", "normed"):
        with pytest.raises(ValueError, match=rf"{name} has the shape \[2, 20\], expected \[4, "):
            backward(**{name: x[:2].clone()})
    with pytest.raises(ValueError, match="is on meta, expected"):
        forward(weight=weight.to("meta"))


@pytest.mark.parametrize("name", ["norm_forward", "norm_apply", "norm_backward"])
def test_called_as_the_reference(name):
    ours, theirs = (inspect.signature(getattr(ops, name)) for ops in (norm, reference))
    assert [(p.name, p.kind, p.default) for p in ours.parameters.values()] == [
        (p.name, p.kind, p.default) for p in theirs.parameters.values()
    ]
