"""Every kernel in every configuration, as cases.

GEMM kernels, attention among them, are held against torch.mm, all others against a copy on the
device. `bench kernels` times the cases, `doctor` only checks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from backfuse.kernels import (
    activation,
    attention_delta,
    configs,
    ffn_dact,
    ffn_recompute,
    ffn_up,
    norm,
    qk_rope,
    reference,
    weight_grad,
)
from backfuse.kernels.reference.fp8 import DTYPE as FP8
from backfuse.kernels.reference.fp8 import quantize, scale_count
from backfuse.kernels.reference.norm import norm_statistics
from backfuse.kernels.tuning import config_for

from .attention_cases import attention_cases
from .kernel_case import Case, Cast, Operands, Outputs, Run, Sizes, config_text, same, wide
from .measure import COPY_BYTES
from .plain import rotary_tables
from .problem import relative_error, rounding


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
        case.config = config_text(config)
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
        yield _adapted_up(t, stacked, work, library)


#: Rank of the adapters in the cases that have some.
RANK = 16


def _products(t: Operands, stacked: bool) -> Callable[[Cast], list[tuple[Any, Any]]]:
    """What adapters of the first projections add, for `ffn_up`."""
    left, right = t.make(t.M, RANK), t.make(t.spec.preact_size, RANK, scale=RANK**-0.5)
    parts = right.split(t.spec.preact_size if stacked else t.spec.intermediate_size)
    return lambda cast: [(cast(left), cast(part)) for part in parts]


def _adapted_up(t: Operands, stacked: bool, work: float, library: Case) -> Case:
    """The forward kernel with adapters, in its default configuration."""
    products = _products(t, stacked)

    def run(ops: Any, cast: Cast, out: Outputs) -> Any:
        return ops.ffn_up(*t.up(stacked, cast), preact=out["preact"], products=products(cast))

    return t.case(
        "ffn_up", "adapters" + ", stacked" * stacked, run, ffn_up, {"preact": t.dpreact},
        work=work, baseline=library, terms=t.spec.hidden_size + RANK,
    )  # fmt: skip


def _has_fp8(t: Operands) -> bool:
    """Whether the device loads e4m3."""
    return t.device.type != "cuda" or torch.cuda.get_device_capability(t.device) >= (8, 9)


def _eight_bits(t: Operands, library: Case, config: Any) -> Case:
    """The backward kernel on a pre-activation that was kept in eight bits."""
    halves = 2 if t.spec.gated else 1
    stored = torch.empty_like(t.preact, dtype=FP8)
    scales = t.preact.new_empty(
        t.M, halves * scale_count(t.spec.intermediate_size), dtype=torch.float32
    )
    quantize(t.preact, halves, stored, scales)

    def dact(ops: Any, cast: Cast, out: Outputs, **options: Any) -> Any:
        operands = (cast(t.dy), cast(t.down), stored, *t.act, out["dpreact"])
        return ops.ffn_dact(*operands, scales=scales, need_dbias=t.spec.up_bias, **options)

    work = t.flops(t.spec.intermediate_size)
    return t.case(
        "ffn_dact", "eight bits", dact, ffn_dact, {"dpreact": t.dpreact},
        work=work, baseline=library, terms=t.spec.hidden_size, config=config,
    )  # fmt: skip


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
    if _has_fp8(t):
        yield from _configured("ffn_dact", t, partial(_eight_bits, t, library))

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
        for strategy in ("split", "fused"):
            yield _adapted_rebuild(t, stacked, strategy, work, both)


def _adapted_rebuild(t: Operands, stacked: bool, strategy: str, work: float, library: Case) -> Case:
    """The backward kernels with adapters on all projections, in their default configurations."""
    products = _products(t, stacked)
    left, right = t.make(t.M, RANK), t.make(RANK, t.spec.intermediate_size, scale=RANK**-0.5)

    def run(ops: Any, cast: Cast, out: Outputs, **options: Any) -> Any:
        return ops.ffn_recompute_dact(
            *t.up(stacked, cast), cast(t.dy), cast(t.down), out["dpreact"],
            need_dbias=t.spec.up_bias, products=products(cast),
            product=(cast(left), cast(right)), **options,
        )  # fmt: skip

    return t.case(
        "ffn_recompute", f"{strategy}, adapters" + ", stacked" * stacked, run, ffn_recompute,
        {"dpreact": t.dpreact}, work=work, baseline=library, terms=t.spec.hidden_size + RANK,
        strategy=strategy,
    )  # fmt: skip


def _weight_cases(t: Operands) -> Iterator[Case]:
    work, limit = t.flops(t.spec.intermediate_size), rounding(t.dtype, t.M)
    total = torch.zeros_like(t.down, dtype=torch.float32)
    library = Case("torch.mm", "dy^T hidden", lambda: torch.mm(t.dy.T, t.hidden), work)
    yield library

    def case(name: str, add: Callable[..., Tensor], **options: Any) -> Case:
        def check() -> float:
            start = torch.randn_like(total).mul_(t.M**0.5)
            right = start.to(t.exact) + t.dy.to(t.exact).T @ t.hidden.to(t.exact)
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
    if t.spec.rope is None:
        return
    yield from _rotations(t, copy, None)
    if t.spec.qk_norm:
        yield from _rotations(t, copy, t.spec.qk_norm)


def _rotations(t: Operands, copy: Case, qk_norm: Any) -> Iterator[Case]:
    """The rotary kernels, with qk-norm or without."""
    block = t.spec
    spec = replace(block.qk_spec, qk_norm=qk_norm)
    tables = rotary_tables(t.M, block.rotary_dim, device=t.device, dtype=t.dtype)
    cos, sin = (table[0] for table in tables)
    raw = t.make(t.M, spec.q_size + spec.kv_size)
    widths = {"full": (spec.q_size, spec.kv_size), "head": (spec.head_dim, spec.head_dim)}
    norms = [t.make(n).add_(1.0) for n in widths[qk_norm]] if qk_norm else [None, None]
    out, dqk = torch.empty_like(raw), raw.clone()
    delta = raw.new_empty(t.M, block.num_attention_heads, dtype=torch.float32)
    attention = {"attn_out": t.make(t.M, spec.q_size), "dout": t.make(t.M, spec.q_size)}
    work = float(2 * raw.nbytes + cos.nbytes + sin.nbytes)
    more = float(delta.nbytes + sum(x.nbytes for x in attention.values()))
    suffix = "qk-norm" if qk_norm else ""

    def forward(ops: Any, cast: Cast, out: Outputs) -> Any:
        options = {"delta": out["delta"]} if "delta" in out else {}
        if options:
            options |= {name: cast(x) for name, x in attention.items()}
        ops.qk_rope_forward(*map(cast, (raw, cos, sin, *norms)), spec, out["out"], **options)

    case = partial(t.case, "qk_rope_forward", baseline=copy, terms=spec.head_dim)
    yield case(suffix, forward, qk_rope, {"out": out}, work=work)
    with_delta = f"{suffix} + delta".strip()
    yield case(with_delta, forward, qk_rope, {"out": out, "delta": delta}, work=work + more)

    def backward(ops: Any, dqk: Tensor, cast: Cast) -> tuple[Tensor, ...]:
        operands = map(cast, (raw if qk_norm else None, cos, sin, *norms))
        dweights = ops.qk_rope_backward(dqk, *operands, spec)
        return (dqk, *dweights) if qk_norm else (dqk,)

    def check() -> float:
        exact = backward(reference, raw.to(t.exact).clone(), wide(t.exact))
        return max(map(relative_error, backward(qk_rope, raw.clone(), same), exact))

    # In place: a rotation keeps the norm, however often it runs.
    call, limit = partial(backward, qk_rope, dqk, same), rounding(t.dtype, t.M)
    work += raw.nbytes if qk_norm else 0
    yield Case("qk_rope_backward", suffix, call, work, copy, check, limit)


def _elementwise_cases(t: Operands, copy: Case) -> Iterator[Case]:
    """The activation alone, and delta alone."""
    spec = t.spec.qk_spec
    operands = {"attn_out": t.make(t.M, spec.q_size), "dout": t.make(t.M, spec.q_size)}
    delta = t.x.new_empty(t.M, t.spec.num_attention_heads, dtype=torch.float32)

    def activate(ops: Any, cast: Cast, out: Outputs) -> Any:
        return ops.activation_forward(cast(t.preact), *t.act)

    def deltas(ops: Any, cast: Cast, out: Outputs) -> Any:
        ops.attention_delta(*map(cast, operands.values()), out["delta"], spec)

    work = float(t.preact.nbytes + t.hidden.nbytes)
    yield t.case("activation_forward", "", activate, activation, {}, work, copy, terms=1)
    work = float(sum(x.nbytes for x in operands.values()) + delta.nbytes)
    yield t.case(
        "attention_delta", "", deltas, attention_delta, {"delta": delta}, work, copy,
        terms=spec.head_dim,
    )  # fmt: skip


def gemm_cases(t: Operands) -> Iterator[Case]:
    """The FFN's kernels and those of weights' gradients."""
    yield from _up_cases(t)
    yield from _dact_cases(t)
    yield from _weight_cases(t)


def memory_cases(t: Operands) -> Iterator[Case]:
    """The kernels of norms and of rotary embeddings."""
    source = torch.randn(COPY_BYTES[t.device.type] // 4, device=t.device)
    target = torch.empty_like(source)
    copy = Case("copy", "", lambda: target.copy_(source), 2.0 * source.nbytes, memory=True)
    yield copy
    yield from _norm_cases(t, copy)
    yield from _qk_rope_cases(t, copy)
    yield from _elementwise_cases(t, copy)


def cases(sizes: Sizes) -> list[Case]:
    """Everything there is, the baselines first in each group."""
    t = Operands(sizes)
    return [*memory_cases(t), *gemm_cases(t), *attention_cases(t)]
