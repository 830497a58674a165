"""Matmul FLOPs of a block: forward, backward, and what a policy recomputes.

Counted as `torch.utils.flop_counter.FlopCounterMode` counts them, two a multiply-add: GEMMs and
attention, nothing elementwise. PyTorch's CPU attention kernel is counted by its formula, which does
not see causality; everybody else by the blocks of keys that some query sees. `block_matmuls`
lists the products one by one, `block_flops` adds them up.

Importing this module gives PyTorch the formulas it lacks: for its CPU flash attention, for oneDNN's
linear layer, and, where it has none (2.11), for attention with fewer heads of keys than of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.flop_counter import (
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from backfuse.kernels.reference.attention_request import AttentionRequest
from backfuse.kernels.reference.cpu_attention import CPU
from backfuse.kernels.reference.explicit_attention import AttentionMask, score_flops

from .errors import nearest
from .keep import Needs, block_needs, block_reads
from .lora import Adapters, AdaptersLike, all_parameters, parse_adapters, widths
from .memory import check_dtype, check_sizes, wanted_set
from .policy import Policy, PolicyLike
from .spec import LAYER_SCALE, BlockSpec, check_spec

aten = torch.ops.aten


def _all_heads(q: Any, k: Any, v: Any) -> tuple[Any, ...]:
    """The shapes as if each head of q had keys of its own."""
    return q, (k[0], q[1], *k[2:]), (v[0], q[1], *v[2:])


def _forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(*_all_heads(q, k, v))


def _backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(grad, *_all_heads(q, k, v))


def _counts_groups() -> bool:
    """Whether PyTorch's formulas take fewer heads of keys than of q; 2.11's raise."""
    try:
        sdpa_flop_count((1, 2, 1, 1), (1, 1, 1, 1), (1, 1, 1, 1))
    except AssertionError:
        return False
    return True


def _register() -> None:
    if aten._scaled_dot_product_flash_attention_for_cpu in flop_registry:
        return
    kernels = ["flash_attention_for_cpu"]
    if not _counts_groups():
        kernels += ["flash_attention", "efficient_attention", "cudnn_attention"]
    for kernel in kernels:
        formulas: dict[str, Any] = {"": _forward, "_backward": _backward}
        for suffix, formula in formulas.items():
            operator = getattr(aten, f"_scaled_dot_product_{kernel}{suffix}", None)
            if operator is not None:
                flop_registry.pop(operator, None)
                register_flop_formula(operator)(formula)

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def linear(x: Any, weight: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * x[0] * x[1] * weight[0]


_register()


@dataclass(frozen=True)
class Flops:
    """Matmul FLOPs of one block.

    Attributes:
        forward: of the forward pass.
        backward: of the gradients alone.
        recompute: of what the backward pass rebuilds.
    """

    forward: int
    backward: int
    recompute: int

    @property
    def total(self) -> int:
        """Of a training step."""
        return self.forward + self.backward + self.recompute


@dataclass(frozen=True)
class Matmul:
    """A GEMM or an attention of a training step.

    Attributes:
        phase: `"forward"`, `"backward"`, or `"recompute"` for what a backward pass rebuilds.
        name: the activation it makes, or `down`; in backward `<name>_input` where it makes the
            gradient of that one's input, and a parameter's name where it makes a weight's.
        flops: two a multiply-add.
        elements: that its kernel reads and writes, each once, what is fused into it included.
    """

    phase: str
    name: str
    flops: int
    elements: int


def block_matmuls(
    spec: BlockSpec,
    policy: Policy,
    wanted: frozenset[str],
    tokens: int,
    scores: int,
    weighted: int,
    adapters: Adapters = (),
) -> list[Matmul]:
    """The products of one block's training step, in order.

    Args:
        spec: the block.
        policy: what it keeps.
        wanted: names of what wants a gradient.
        tokens: rows.
        scores: FLOPs of `Q K^T` (see `score_flops`).
        weighted: FLOPs of `P V`.
        adapters: of its projections.
    """
    h, out = spec.hidden_size, spec.attn_out_size
    f, preact = spec.intermediate_size, spec.preact_size
    kept, rebuilt = block_reads(spec, policy, wanted)

    def gemm(phase: str, name: str, columns: int, depth: int, fused: int = 0) -> Matmul:
        elements = tokens * (depth + columns + fused) + depth * columns
        return Matmul(phase, name, 2 * tokens * depth * columns, elements)

    residual = 0 if spec.post_norm and not spec.norm_after_residual else h  # added by the GEMM
    heads = tokens * (spec.qkv_size + out)
    stored = preact if "preact" in kept else 0
    forward = {
        "qkv": gemm("forward", "qkv", spec.qkv_size, h),
        "attn_out": Matmul("forward", "attn_out", scores + weighted, heads),
        "mid": gemm("forward", "mid", h, out, residual),
        "preact": gemm("forward", "preact", preact, h, f + stored - preact),
        "down": gemm("forward", "down", h, f, residual),
    }
    found = list(forward.values())
    again = forward | {"preact": gemm("recompute", "preact", preact, h)}
    branches = {"attn_branch": "mid", "ffn_branch": "down"}
    names = {branches.get(name, name) for name in rebuilt}
    found += [replace(again[name], phase="recompute") for name in again if name in names]

    attn, ffn = block_needs(spec, wanted)
    if ffn.inner:  # reads preact, writes its gradient and the activated hidden
        found.append(gemm("backward", "down_input", f, h, 2 * preact))
        if ffn.input or ffn.norm:
            found.append(gemm("backward", "preact_input", h, preact))
    if attn.inner:
        found.append(gemm("backward", "mid_input", out, h))
        flops = 3 * scores + 2 * weighted
        found.append(Matmul("backward", "attn_out_input", flops, 2 * heads))
        if attn.input or attn.norm:
            found.append(gemm("backward", "qkv_input", h, spec.qkv_size))
    for name, shape in all_parameters(spec, adapters).items():
        if len(shape) == 2 and _computed(name, wanted):
            found.append(gemm("backward", name, *shape))
    if adapters:
        found += _adapter_matmuls(spec, adapters, names, wanted, gemm, {"attn": attn, "ffn": ffn})
    return found


def _computed(name: str, wanted: frozenset[str]) -> bool:
    """Whether a parameter's gradient is: it is wanted, or a layer scale's is made from it."""
    if name in wanted or ".lora_A." in name:
        return name in wanted
    halves = {"self_attn.o_proj.": "attn", "mlp.down_proj.": "ffn"}
    return any(
        name.startswith(start) and LAYER_SCALE[half] in wanted for start, half in halves.items()
    )


#: What a half's projections make, and their names; the first of each half read its normed input.
_GROUPS = {
    "attn": {"qkv": ("q", "k", "v", "qkv"), "mid": ("o",)},
    "ffn": {"preact": ("gate", "up", "gate_up"), "down": ("down",)},
}


def _adapter_matmuls(
    spec: BlockSpec,
    adapters: Adapters,
    rebuilt: set[str],
    wanted: frozenset[str],
    gemm: Callable[..., Matmul],
    needs: Mapping[str, Needs],
) -> Iterator[Matmul]:
    """The products of the adapters, but for A's and B's gradients (see `low_rank.py`).

    Args:
        spec: the block.
        adapters: of its projections.
        rebuilt: what a backward pass makes again, `down` included.
        wanted: names of what wants a gradient.
        gemm: makes one, of a phase, a name, columns and depth, and elements a token besides.
        needs: of each half.
    """
    for half, groups in _GROUPS.items():
        part = "self_attn" if half == "attn" else "mlp"
        for group, members in groups.items():
            own = {n: a for n, a in adapters if n in {f"{part}.{m}_proj" for m in members}}
            if not own:
                continue
            first, need = group in ("qkv", "preact"), needs[half]
            ranks = {name: sum(lora.rank for lora in several) for name, several in own.items()}
            rank, depth = sum(ranks.values()), widths(spec, next(iter(own)))[1]
            columns = {name: widths(spec, name)[0] for name in own}
            names = [lora.parameters(n) for n, several in own.items() for lora in several]
            for phase in ("forward", "recompute"):
                if phase == "recompute" and group not in rebuilt:
                    continue
                yield gemm(phase, f"{group}_lora_a", rank, depth)
                for name, r in ranks.items():
                    width = columns[name]
                    more = -width if group == "preact" else width  # added where it stands
                    yield gemm(phase, f"{group}_lora_b", width, r, more)
            if not (need.inner or (need.out and not first)):
                continue
            through = need.input or need.norm if first else need.inner
            if through or any(a in wanted for a, _, _ in names):
                for name, r in ranks.items():
                    yield gemm("backward", f"{group}_lora_b_input", r, columns[name])
            if through:
                more = -depth if group == "down" else depth
                yield gemm("backward", f"{group}_lora_a_input", depth, rank, more)
            if any(_computed(b, wanted) for _, b, _ in names):
                yield gemm("backward", f"{group}_lora_a", rank, depth)


def _check_lengths(lengths: Sequence[int], batch_size: int, seq_len: int) -> None:
    if not isinstance(lengths, Sequence):
        raise TypeError(f"lengths is {lengths!r}, expected a sequence of integers")
    whole = all(isinstance(length, int) and length >= 0 for length in lengths)
    if batch_size != 1 or not whole or sum(lengths) != seq_len:
        raise ValueError(
            f"lengths is {list(lengths)} with a batch_size of {batch_size}, expected integers of "
            f"at least 0 that add up to seq_len ({seq_len}) and a batch_size of 1"
        )


def _device(device: torch.device | str) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        known = ("cpu", "cuda")
        raise ValueError(
            f"device is {device!r}, expected {' or '.join(known)}" + nearest(device, known)
        ) from error


def block_flops(
    spec: BlockSpec,
    policy: PolicyLike,
    *,
    batch_size: int,
    seq_len: int,
    lengths: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    masked: bool = False,
    requires_grad: bool | Collection[str] = True,
    adapters: AdaptersLike | Adapters | None = None,
    training: bool = True,
) -> Flops:
    """Matmul FLOPs of one block's training step.

    Args:
        spec: the block.
        policy: what it keeps.
        batch_size: sequences.
        seq_len: tokens a sequence.
        lengths: lengths of the packed sequences, for a batch of 1.
        dtype: of the GEMMs' operands.
        device: where it runs: which attention kernel counts, and how.
        masked: whether an attention mask is given.
        requires_grad: names of what wants a gradient (see `kept_bytes`).
        adapters: projection -> its `LoRA`, or several.
        training: whether dropout is active.

    Raises:
        TypeError: for a spec, a dtype, lengths or names that are none.
        ValueError: for sizes, lengths, devices, policies or names that do not exist.
    """
    check_spec(spec)
    check_sizes(batch_size, seq_len)
    check_dtype("dtype", dtype)
    where = _device(device)
    parsed = Policy.parse(policy)
    parsed.check_available()
    if lengths is not None:
        _check_lengths(lengths, batch_size, seq_len)
    own = parse_adapters(spec, adapters)
    wanted = wanted_set(spec, requires_grad, own)
    mask = AttentionMask(
        causal=spec.causal,
        window=spec.sliding_window,
        softcap=spec.attn_logit_softcapping,
        dropout=spec.attention_dropout if training else 0.0,
    )
    request = AttentionRequest(
        mask, dtype, where, seq_len, spec.head_dim, spec.v_head_dim, bias=masked,
        packed=lengths is not None, sinks=spec.attention_sinks,
    )  # fmt: skip
    library = CPU.obstacle(request) is None
    scores, weighted = (  # Q K^T and P V
        batch_size
        * score_flops(seq_len, list(lengths) if lengths else None, width, mask, library, masked)
        for width in (spec.q_size, spec.attn_out_size)
    )
    totals = dict.fromkeys(("forward", "backward", "recompute"), 0)
    tokens = batch_size * seq_len
    for matmul in block_matmuls(spec, parsed, wanted, tokens, scores, weighted, own):
        totals[matmul.phase] += matmul.flops
    return Flops(**totals)
