"""The static report's model of a kernel: programs at a time, share of a GEMM's speed, time.

**Share.** A step of a GEMM's loop takes as long as the slowest of: its products; the bytes of its
operands through shared memory (sm_90: each m64nNk16 reads 2048 bytes of its left and 32 N of its
right operand, at 128 bytes a cycle, and what is loaded is written once); the bytes of its operands
from L2, at what feeds a GEMM of that tile. Elsewhere than on sm_90 only the last counts. The share
is that of a 128 x 256 GEMM's speed. In attention operands are no limit (on sm_90 they take 0.9 of
the products' cycles), but the softmax is: one exponential and some four other fp32 operations a
score, which are taken to wait for the products, and these for them.

**Time.** The larger of the FLOPs at that share of the rate that a good GEMM reaches on the device,
in whole waves of programs, and of the bytes at the memory's bandwidth. Launches, prologues and
epilogues are not in it, nor is L2's part in what memory sees.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from backfuse import BlockSpec
from backfuse.blocks.costs import visible_scores
from backfuse.blocks.devices import DEVICES
from backfuse.kernels.configs import SHARED_MEMORY

from .shapes import SHAPES
from .static_case import Case, Dot

#: Warps, programs, registers and bytes of shared memory of a multiprocessor.
PROCESSORS = {
    "sm_80": (64, 32, 65536, 164 * 1024),
    "sm_89": (48, 24, 65536, 100 * 1024),
    "sm_90": (64, 32, 65536, 228 * 1024),
    "sm_100": (64, 32, 65536, 228 * 1024),
}

#: Of a multiprocessor, in a cycle: dense bf16 FLOPs of the tensor cores (data sheet, over clock and
#: multiprocessors), fp32 operations and exponentials (CUDA C++ programming guide, throughput of
#: arithmetic instructions).
CYCLE = {
    "sm_80": (2048, 64, 16),
    "sm_89": (1024, 128, 16),
    "sm_90": (4096, 128, 16),
    "sm_100": (8192, 128, 16),
}

#: fp32 operations of a score beside its exponential: scale, maximum or subtraction, sum or product,
#: and the conversions.
SOFTMAX_OPERATIONS = 4

#: Attention kernel -> its products with a head's width, for each score.
PRODUCTS = {"attention_forward": 2, "attention_dkdv": 4, "attention_dq": 3}

#: Architecture -> the device whose rates its times are of.
TIMED_ON = {
    "sm_80": "a100",
    "sm_89": "l40s",
    "sm_90": "h200",
    "sm_100": "b200",
    "gfx942": "mi300x",
}

#: Tokens, in one sequence, of the modelled times.
TOKENS = 8192

#: Columns of the modelled times, in microseconds, in the order of the shapes.
TIMES = tuple(f"us_{name}" for name in SHAPES)


def programs_per_processor(architecture: str, registers: int, shared: int, warps: int) -> int:
    """Programs that a multiprocessor runs at once; 0 if one alone does not fit."""
    if shared > SHARED_MEMORY[architecture]:
        return 0
    if architecture not in PROCESSORS:
        waves = 4 * min(8, 512 // max(8, -(-registers // 8) * 8))  # of 4 SIMDs with 512 registers
        return min(waves // warps, SHARED_MEMORY[architecture] // max(shared, 1))
    most_warps, most, file, memory = PROCESSORS[architecture]
    by_registers = file // (-(-registers // 8) * 8 * 32 * warps)
    return min(most_warps // warps, most, by_registers, memory // (shared + 1024))


def widths(dot: Dot, warps: int) -> int:
    """N of the m64nNk16 instructions that compute a product on sm_90."""
    across = max(1, warps // 4 // max(1, dot.rows // 64))
    return min(256, dot.columns // across)


def gemm_share(dots: Sequence[Dot], architecture: str, warps: int) -> float:
    """The modelled share of a 128 x 256 GEMM's speed.

    Args:
        dots: what a step multiplies.
        architecture: one of `ARCHITECTURES`.
        warps: of a program.
    """
    flops = loaded = read = 0.0  # of a step of depth 1, bytes of 2-byte operands
    for dot in dots:
        flops += 2 * dot.rows * dot.columns
        loaded += 2 * ((dot.rows if dot.new_rows else 0) + dot.columns)
        n = widths(dot, warps)
        read += dot.rows / 64 * dot.columns / n * (2048 + 32 * n) / 16
    share = flops / loaded / (2 * 128 * 256 / (2 * (128 + 256)))
    if architecture == "sm_90":
        products = flops / 4096
        share = min(share, products / max(products, (read + loaded) / 128))
    return share


def attention_share(kernel: str, head_dim: int, architecture: str) -> float | None:
    """The modelled share of a GEMM's speed; None where the softmax's rate is not known."""
    if architecture not in CYCLE:
        return None
    tensor, fp32, exponentials = CYCLE[architecture]
    products = 2 * PRODUCTS[kernel] * head_dim / tensor
    return products / (products + 1 / exponentials + SOFTMAX_OPERATIONS / fp32)


def speed_share(case: Case, warps: int) -> float | None:
    """The modelled share of a GEMM's speed; None for kernels that multiply nothing."""
    if case.kernel in PRODUCTS:
        return attention_share(case.kernel, case.constexprs["HEAD_DIM"], case.architecture)
    return gemm_share(case.dots, case.architecture, warps) if case.dots else None


@dataclass(frozen=True)
class Work:
    """What a kernel has to do for one shape.

    Attributes:
        flops: of its products.
        bytes: that it reads and writes, each once.
        programs: that share the work evenly; 0 where they do not, or no matter.
    """

    flops: float
    bytes: float
    programs: int = 0


def serves(case: Case, spec: BlockSpec) -> bool:
    """Whether a block of that shape would run this case, or one that differs in nothing costly."""
    flags = case.constexprs
    rotates = spec.rope is not None or spec.qk_norm is not None
    expected: dict[str, bool | int] = {
        "GATED": spec.gated, "LAYERNORM": spec.norm == "layernorm",
        "HAS_NORM": spec.qk_norm is not None,
    }  # fmt: skip
    if case.kernel in PRODUCTS:
        expected["HEAD_DIM"] = spec.head_dim
    used = {
        "qk_rope_forward": rotates, "qk_rope_backward": rotates,
        "attention_delta": not rotates,  # where q and k rotate, that pass computes it
        "ffn_recompute_norm": spec.gated,
    }.get(case.kernel, True)  # fmt: skip
    return (
        used
        and case.variant in ("main", "plain", "layernorm")
        and all(flags[name] == value for name, value in expected.items() if name in flags)
    )


def work(case: Case, spec: BlockSpec, tokens: int) -> Work:
    """What a kernel has to do for `tokens` tokens in one sequence.

    Args:
        case: one that `serves` the block.
        spec: the block.
        tokens: rows.
    """
    h, f, preact = spec.hidden_size, spec.intermediate_size, spec.preact_size
    q, kv = spec.q_size, spec.kv_size
    rows, columns = case.constexprs.get("BLOCK_M", 1), case.constexprs.get("BLOCK_N", 1)
    tiles = ceil(tokens / rows) * ceil(f / columns)
    if case.kernel == "ffn_up":
        moved = tokens * (h + preact + f) + h * preact
        return Work(2 * tokens * h * preact, 2 * moved, tiles)
    if case.kernel == "ffn_dact":
        return Work(2 * tokens * h * f, 2 * (tokens * (h + 2 * preact + f) + h * f), tiles)
    if case.kernel.startswith("ffn_recompute"):
        moved = tokens * (2 * h + preact + f) + h * (preact + f)
        return Work(2 * tokens * h * (preact + f), 2 * moved, tiles)
    if case.kernel == "weight_grad":  # of the first projections, added to what is there in fp32
        tiles = ceil(preact / rows) * ceil(h / columns)
        return Work(2 * tokens * h * preact, 2 * tokens * (preact + h) + 2 * 4 * preact * h, tiles)
    if case.kernel in PRODUCTS:
        flops = 2 * PRODUCTS[case.kernel] * q * visible_scores(spec, tokens)
        moved = {
            "attention_forward": 2 * (q + kv), "attention_dkdv": 2 * q + 4 * kv,
            "attention_dq": 3 * q + 2 * kv,
        }[case.kernel]  # fmt: skip
        return Work(flops, 2 * tokens * moved)
    moved = {
        "activation": preact + f,
        "norm_forward": 3 * h,  # with a residual
        "norm_backward": 5 * h,  # and the normed input again
        "qk_rope_forward": 2 * (q + kv) + 2 * q,  # with delta
        "qk_rope_backward": 2 * (q + kv),
        "attention_delta": 2 * q,
    }[case.kernel]
    return Work(0, 2 * tokens * moved)


def seconds(done: Work, architecture: str, share: float | None, at_a_time: int) -> float | None:
    """Modelled seconds of a kernel.

    Args:
        done: what it does.
        architecture: a key of `TIMED_ON`.
        share: of a GEMM's speed; None if it is not known.
        at_a_time: programs a multiprocessor runs.
    """
    device = DEVICES[TIMED_ON[architecture]]
    by_memory = done.bytes / device.memory_bandwidth
    if not done.flops:
        return by_memory
    if share is None:
        return None
    by_products = done.flops / (device.matmul_rate * share)
    if done.programs:
        waves = done.programs / (at_a_time * device.processors)
        by_products *= ceil(waves) / waves
    return max(by_products, by_memory)


def times(case: Case, share: float | None, at_a_time: int | None) -> dict[str, float | None]:
    """The columns `TIMES` of a row: microseconds by shape; None where it serves no such block.

    Args:
        case: the row's.
        share: of a GEMM's speed.
        at_a_time: programs a multiprocessor runs; None or 0 for a case that does not run.
    """
    found: dict[str, float | None] = dict.fromkeys(TIMES)
    for column, spec in zip(TIMES, SHAPES.values(), strict=True):
        if at_a_time and case.dtype == "bf16" and serves(case, spec):
            took = seconds(work(case, spec, TOKENS), case.architecture, share, at_a_time)
            found[column] = None if took is None else round(1e6 * took, 1)
    return found
