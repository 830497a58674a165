"""The kernels of the FFN half one by one, in every configuration, against the library.

GEMM kernels are held against torch.mm of the same FLOPs, norm and rotary kernels against a copy on
the device. Before that, each result is held against the reference's in fp32: what a case runs is a
function of the operations (the kernels or the reference), a cast of its operands, and its outputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from backfuse.kernels import (
    configs,
    ffn_dact,
    ffn_recompute,
    ffn_up,
    norm,
    qk_rope,
    reference,
    weight_grad,
)
from backfuse.kernels.reference.norm import norm_statistics
from backfuse.kernels.tuning import config_for

from . import measure, rivals
from .ffn_results import Case, Results, Setup, first_line
from .ffn_rivals import relative_error, rounding
from .options import progress_bar

#: Bytes of the copy that the memory-bound kernels are held against.
COPY_BYTES = 2**30

Cast = Callable[[Any], Any]
Outputs = dict[str, Tensor]
Run = Callable[..., Any]


class Operands:
    """Random tensors that the cases of one set-up share.

    Attributes:
        x, dy, residual: `[M, h]`.
        hidden: `[M, f]`.
        preact, dpreact: `[M, 2 f or f]`; the second is written.
        stacked: the first projections' weights `[2 f or f, h]`.
        bias: theirs, or None.
        down: `[h, f]`.
        act: the activation, and whether there is a gate.
        layouts: whether the first projections' weights are one tensor.
    """

    def __init__(self, setup: Setup) -> None:
        self.spec, self.M = setup.spec, setup.rows
        self.device, self.dtype = torch.device(setup.device), setup.torch_dtype
        h, f, width = self.spec.hidden_size, self.spec.intermediate_size, self.spec.preact_size
        self.x, self.dy, self.residual = (self.make(self.M, h) for _ in range(3))
        self.hidden, self.preact = self.make(self.M, f), self.make(self.M, width)
        self.dpreact = torch.empty_like(self.preact)
        self.stacked = self.make(width, h, scale=h**-0.5)
        self.bias = self.make(width) if self.spec.up_bias else None
        self.down = self.make(h, f, scale=f**-0.5)
        self.act = (self.spec.hidden_act, self.spec.gated)
        self.layouts = (False, True) if self.spec.gated else (False,)

    def make(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Random numbers, never zeros: those would need less power, and run faster."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype).mul_(scale)

    def up(self, stacked: bool, cast: Cast) -> tuple[Any, ...]:
        """Arguments of the first projections, whose weights are one tensor or one each."""
        width = self.spec.preact_size if stacked else self.spec.intermediate_size
        weights = [cast(weight) for weight in self.stacked.split(width)]
        biases = len(weights) * [None] if self.bias is None else self.bias.split(width)
        return cast(self.x), weights, [cast(bias) for bias in biases], *self.act

    def flops(self, width: int) -> float:
        """Of a GEMM between the residual stream and so many columns."""
        return 2.0 * self.M * self.spec.hidden_size * width

    def case(
        self,
        kernel: str,
        variant: str,
        run: Run,
        ops: Any,
        outputs: Outputs,
        work: float,
        baseline: Case,
        terms: int,
        split: Case | None = None,
        **options: Any,
    ) -> Case:
        """The case that times `run(ops, cast, outputs, **options)`, which sums over `terms`."""
        call = partial(run, ops, same, outputs, **options)
        check = partial(error_of, run, ops, outputs, options)
        limit = rounding(self.dtype, terms)
        return Case(kernel, variant, call, work, baseline, check, limit, split)


def same(x: Tensor | None) -> Tensor | None:
    """The cast of what is timed."""
    return x


def wide(x: Tensor | None) -> Tensor | None:
    """The cast of what it is held against."""
    return None if x is None else x.float()


def error_of(run: Run, ops: Any, outputs: Outputs, options: dict[str, Any]) -> float:
    """The largest relative error of what `run` returns and writes."""
    for x in outputs.values():
        x.fill_(math.nan)  # what a kernel leaves out shows
    exact = {name: torch.empty_like(x, dtype=torch.float32) for name, x in outputs.items()}
    results, right = run(ops, same, outputs, **options), run(reference, wide, exact)
    pairs = list(zip(outputs.values(), exact.values(), strict=True))
    if isinstance(results, tuple):
        pairs += zip(results, right, strict=True)
    else:
        pairs.append((results, right))
    return max(relative_error(a, b) for a, b in pairs if b is not None)


def _configured(kernel: str, t: Operands, make: Callable[[Any], Case]) -> Iterator[Case]:
    """A case for each configuration of a kernel's table."""
    spec, size = t.spec, t.dtype.itemsize
    table = configs.table_of(configs.architecture(t.device), size)
    try:
        chosen = config_for(kernel, t.x, spec.intermediate_size, spec.gated)
    except ValueError:  # none fits
        chosen = None
    for config in configs.CONFIGS[kernel][table]:
        case = make(config)
        case.config = (
            f"{config.block_m}x{config.block_n}x{config.block_k}/{config.split} "
            f"{config.num_warps}w {config.num_stages}s"
        )
        case.default = config == chosen
        if not configs.fits(kernel, config, table, size, spec.gated):
            case.status = "does not fit"
        yield case


def _up_cases(t: Operands) -> Iterator[Case]:
    work = t.flops(t.spec.preact_size)
    library = Case("torch.mm", "x W_up^T", lambda: torch.mm(t.x, t.stacked.T), work)
    yield library

    def case(stacked: bool, hidden: bool, preact: bool, config: Any) -> Case:
        def run(ops: Any, cast: Cast, out: Outputs, **options: Any) -> Any:
            operands = t.up(stacked, cast)
            return ops.ffn_up(*operands, preact=out.get("preact"), need_hidden=hidden, **options)

        written = " + ".join(compress(("hidden", "preact"), (hidden, preact)))
        return t.case(
            "ffn_up", written + ", stacked" * stacked, run, ffn_up,
            {"preact": t.dpreact} if preact else {},
            work=work, baseline=library, terms=t.spec.hidden_size, config=config,
        )  # fmt: skip

    for stacked in t.layouts:
        for wanted in ((True, False), (True, True), (False, True)):
            yield from _configured("ffn_up", t, partial(case, stacked, *wanted))


def _dact_cases(t: Operands) -> Iterator[Case]:
    down, terms = t.flops(t.spec.intermediate_size), t.spec.hidden_size
    outputs, wanted = {"dpreact": t.dpreact}, {"need_dbias": t.spec.up_bias}
    library = Case("torch.mm", "dy W_down", lambda: torch.mm(t.dy, t.down), down)
    yield library

    def dact(ops: Any, cast: Cast, out: Outputs, **options: Any) -> Any:
        dy, weight, preact = map(cast, (t.dy, t.down, t.preact))
        return ops.ffn_dact(dy, weight, preact, *t.act, out["dpreact"], **wanted, **options)

    def kept(config: Any) -> Case:
        return t.case(
            "ffn_dact", "kept preact", dact, ffn_dact, outputs,
            work=down, baseline=library, terms=terms, config=config,
        )  # fmt: skip

    yield from _configured("ffn_dact", t, kept)

    work = down + t.flops(t.spec.preact_size)
    both = Case(
        "torch.mm", "both", lambda: (torch.mm(t.x, t.stacked.T), torch.mm(t.dy, t.down)), work
    )
    yield both

    def rebuilt(strategy: str, stacked: bool, split: Case | None, config: Any) -> Case:
        def run(ops: Any, cast: Cast, out: Outputs, **options: Any) -> Any:
            operands = (*t.up(stacked, cast), cast(t.dy), cast(t.down), out["dpreact"])
            return ops.ffn_recompute_dact(*operands, **wanted, **options)

        return t.case(
            "ffn_recompute", strategy + ", stacked" * stacked, run, ffn_recompute, outputs,
            work=work, baseline=both, terms=terms, split=split, strategy=strategy, config=config,
        )  # fmt: skip

    for stacked in t.layouts:
        split = rebuilt("split", stacked, None, None)
        yield split
        yield from _configured("ffn_recompute", t, partial(rebuilt, "fused", stacked, split))


def _weight_cases(t: Operands) -> Iterator[Case]:
    work, limit = t.flops(t.spec.intermediate_size), rounding(t.dtype, t.M)
    total = torch.zeros_like(t.down, dtype=torch.float32)
    library = Case("torch.mm", "dy^T hidden", lambda: torch.mm(t.dy.T, t.hidden), work)
    yield library

    def case(name: str, add: Callable[..., Tensor], **options: Any) -> Case:
        def check() -> float:
            start = torch.randn_like(total).mul_(t.M**0.5)
            right = start + t.dy.float().T @ t.hidden.float()
            return relative_error(add(start, t.dy, t.hidden, **options), right)

        call = partial(add, total, t.dy, t.hidden, **options)
        return Case(name, "+= in fp32", call, work, library, check, limit)

    yield case("library", reference.accumulate_outer)
    yield from _configured(
        "weight_grad", t, lambda config: case("weight_grad", weight_grad.weight_grad, config=config)
    )


def _norm_cases(t: Operands, copy: Case) -> Iterator[Case]:
    spec, h = t.spec.norm_spec, t.spec.hidden_size
    weight = t.make(h).add_(1.0)
    bias = t.make(h) if t.spec.norm_bias else None
    exact, written = (t.x.new_empty(spec.statistics, t.M, dtype=torch.float32) for _ in range(2))
    norm_statistics(t.x.float(), spec, exact)

    def case(name: str, run: Run, passes: int, outputs: Outputs, variant: str = "") -> Case:
        work = float(passes * t.x.nbytes + exact.nbytes)
        return t.case(name, variant, run, norm, outputs, work=work, baseline=copy, terms=h)

    def forward(ops: Any, cast: Cast, out: Outputs) -> Any:
        x, *parameters = map(cast, (t.x, weight, bias))
        return ops.norm_forward(x, *parameters, spec, out["statistics"], x.dtype)

    def apply(ops: Any, cast: Cast, out: Outputs) -> Any:
        x, *parameters = map(cast, (t.x, weight, bias))
        return ops.norm_apply(x, exact, *parameters, spec, x.dtype)

    def backward(ops: Any, cast: Cast, out: Outputs) -> Any:
        dy, x, residual, *parameters = map(cast, (t.dy, t.x, t.residual, weight, bias))
        options = {"residual": residual, "need_dbias": bias is not None, **out}
        return ops.norm_backward(dy, x, exact, *parameters, spec, **options)

    yield case("norm_forward", forward, 2, {"statistics": written})
    yield case("norm_apply", apply, 2, {})
    dx, normed = torch.empty_like(t.x), torch.empty_like(t.x)
    yield case("norm_backward", backward, 4, {"dx": dx}, "dx")
    yield case("norm_backward", backward, 5, {"dx": dx, "normed": normed}, "dx + normed")


def _qk_rope_cases(t: Operands, copy: Case) -> Iterator[Case]:
    block = t.spec
    if block.rope is None:
        return
    spec = replace(block.qk_spec, qk_norm=None)
    tables = rivals.rotary_tables(t.M, block.rotary_dim, device=t.device, dtype=t.dtype)
    cos, sin = (table[0] for table in tables)
    raw = t.make(t.M, spec.q_size + spec.kv_size)
    out, dqk = torch.empty_like(raw), raw.clone()
    delta = raw.new_empty(t.M, block.num_attention_heads, dtype=torch.float32)
    attention = {"attn_out": t.make(t.M, spec.q_size), "dout": t.make(t.M, spec.q_size)}
    work = float(2 * raw.nbytes + cos.nbytes + sin.nbytes)
    more = float(delta.nbytes + sum(x.nbytes for x in attention.values()))

    def forward(ops: Any, cast: Cast, out: Outputs) -> Any:
        options = {"delta": out["delta"]} if "delta" in out else {}
        if options:
            options |= {name: cast(x) for name, x in attention.items()}
        ops.qk_rope_forward(*map(cast, (raw, cos, sin)), None, None, spec, out["out"], **options)

    case = partial(t.case, "qk_rope_forward", baseline=copy, terms=spec.head_dim)
    yield case("", forward, qk_rope, {"out": out}, work=work)
    yield case("+ delta", forward, qk_rope, {"out": out, "delta": delta}, work=work + more)

    def backward(ops: Any, dqk: Tensor, cast: Cast) -> Tensor:
        ops.qk_rope_backward(dqk, None, cast(cos), cast(sin), None, None, spec)
        return dqk

    def check() -> float:
        exact = backward(reference, raw.float().clone(), wide)
        return relative_error(backward(qk_rope, raw.clone(), same), exact)

    # In place: a rotation keeps the norm, however often it runs.
    call, limit = partial(backward, qk_rope, dqk, same), rounding(t.dtype, spec.head_dim)
    yield Case("qk_rope_backward", "", call, work, copy, check, limit)


def cases(setup: Setup) -> list[Case]:
    """Everything the table holds, the baselines first in each group."""
    t = Operands(setup)
    source = torch.randn(COPY_BYTES // 4, device=t.device)
    target = torch.empty_like(source)
    copy = Case("copy", "1 GiB", lambda: target.copy_(source), 2.0 * COPY_BYTES, memory=True)
    gemms = (*_up_cases(t), *_dact_cases(t))
    return [copy, *gemms, *_norm_cases(t, copy), *_qk_rope_cases(t, copy), *_weight_cases(t)]


def bench_kernels(results: Results) -> None:
    """Checks and times every case; one that fails or is wrong says so in its row."""
    setup = results.setup
    torch.manual_seed(setup.seed)
    results.cases = cases(setup)
    named = {case.name: case for case in results.cases}
    with progress_bar(total=len(named) * (setup.rounds + 1), unit="run") as bar:

        def attempt(case: Case, what: str, work: Callable[[Case], None]) -> None:
            bar.set_description(f"{case.name}: {what}")
            if case.status == "ok":
                try:
                    work(case)
                except Exception as error:  # Triton's have no common base; the row says it
                    case.status = first_line(error)
            bar.update()

        def clock(case: Case) -> None:
            case.seconds.append(measure.kernel_seconds(case.call, setup.device))

        for case in results.cases:
            attempt(case, "check", _check)
        for index, name in measure.interleaved(list(named), setup.rounds):
            attempt(named[name], f"round {index + 1} of {setup.rounds}", clock)
    results.failed |= any(case.status not in ("ok", "does not fit") for case in results.cases)


def _check(case: Case) -> None:
    if case.check is None:
        case.call()
        return
    case.error = case.check()
    if not case.error <= case.limit:
        case.status = "WRONG"
