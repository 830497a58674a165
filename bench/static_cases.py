"""What `backfuse bench static` compiles: the kernels, as their launchers would call them.

A case describes a kernel's arguments by name. `bind` holds that against the kernel's own names, so
that a kernel whose arguments have changed is an error here, not a table of something else.

The main variant of a kernel is compiled with all of its configurations, every other variant with
the one its launcher would choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from backfuse.kernels import attention_configs
from backfuse.kernels.configs import CONFIGS, Config, choose, table_of
from backfuse.kernels.launch import SAME_BITS
from backfuse.kernels.reference.fp8 import LARGEST, TILE

from . import static_rows
from .static_case import Arguments, Case, Dot
from .static_rows import DESCRIPTORS, E4M3

#: Names of the tables of configurations that have hardware behind them.
ARCHITECTURES = tuple(name for name in CONFIGS["ffn_up"] if name != "interpreter")

#: Kernel -> its module in `backfuse.kernels`; the kernel is called `<name>_kernel` there.
MODULES = {
    "ffn_up": "ffn_up",
    "ffn_dact": "ffn_dact",
    "ffn_recompute": "ffn_recompute",
    "weight_grad": "weight_grad",
    "activation": "activation",
    "norm_forward": "norm",
    "norm_backward": "norm",
    "qk_rope_forward": "qk_rope",
    "qk_rope_backward": "qk_rope",
    "attention_delta": "attention_delta",
    "attention_forward": "attention",
    "attention_dkdv": "attention_backward",
    "attention_dq": "attention_backward",
    "ffn_recompute_norm": "norm_prologue",
}

#: Kernels that stand in `backfuse.bench` instead: compiled to be compared, called by nobody.
EXPERIMENTS = ("ffn_recompute_norm",)

ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}


@dataclass(frozen=True)
class Flags:
    """How a kernel is called; the defaults are the main variant.

    Attributes:
        gated: the FFN has a gate.
        stacked: gate and up are one tensor, which one descriptor loads.
        descriptors: operands are loaded through descriptors, on architectures that have them.
        aligned: widths and strides are multiples of 16, as a model's are.
        kind: the activation.
        preact: how the pre-activation is kept: `"kept"`, `"e4m3"` or `"dropped"`.
        hidden: the activated hidden is written.
        bias: the first projections have biases.
        lora: adapters add products of low rank to what is projected.
        accumulate: the weight gradient is added to what is there.
        dtype: of the operands.
    """

    gated: bool = True
    stacked: bool = True
    descriptors: bool = True
    aligned: bool = True
    kind: str = "silu"
    preact: str = "kept"
    hidden: bool = True
    bias: bool = False
    lora: bool = False
    accumulate: bool = True
    dtype: str = "bf16"


#: Kernel -> variant -> how it differs from the main one.
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "ffn_up": {
        "plain": {"gated": False},
        "separate": {"stacked": False},
        "gelu": {"kind": "gelu"},
        "bias": {"bias": True},
        "separate+bias": {"stacked": False, "bias": True},
        "dropped": {"preact": "dropped"},
        "e4m3": {"preact": "e4m3"},
        "rebuild": {"hidden": False},
        "lora": {"lora": True},
        "separate+lora": {"stacked": False, "lora": True},
        "plain+lora": {"gated": False, "lora": True},
        "unaligned+lora": {"descriptors": False, "aligned": False, "lora": True},
        "pointers": {"descriptors": False},
        "unaligned": {"descriptors": False, "aligned": False},
        "fp16": {"dtype": "fp16"},
        "fp32": {"dtype": "fp32"},
    },
    "ffn_dact": {
        "plain": {"gated": False},
        "gelu": {"kind": "gelu"},
        "lora": {"lora": True},
        "plain+lora": {"gated": False, "lora": True},
        "e4m3": {"preact": "e4m3"},
        "pointers": {"descriptors": False},
        "unaligned": {"descriptors": False, "aligned": False},
        "fp16": {"dtype": "fp16"},
        "fp32": {"dtype": "fp32"},
    },
    "ffn_recompute": {
        "plain": {"gated": False},
        "separate": {"stacked": False},
        "gelu": {"kind": "gelu"},
        "bias": {"bias": True},
        "lora": {"lora": True},
        "separate+lora": {"stacked": False, "lora": True},
        "pointers": {"descriptors": False},
        "unaligned": {"descriptors": False, "aligned": False},
        "fp16": {"dtype": "fp16"},
        "fp32": {"dtype": "fp32"},
    },
    "weight_grad": {
        "first": {"accumulate": False},
        "pointers": {"descriptors": False},
        "unaligned": {"descriptors": False, "aligned": False},
        "fp16": {"dtype": "fp16"},
        "fp32": {"dtype": "fp32"},
    },
}


def _products(args: Arguments, flags: Flags, matrices: str, numbers: str) -> None:
    """What adapters add: there all together, or not at all."""
    for name in matrices.split():
        args.pointer(name, flags.dtype, flags.lora)
    if flags.lora:
        args.scalars(numbers)
    else:
        args.constexprs |= dict.fromkeys(numbers.split())


def _gemm(kernel: str, architecture: str, variant: str, config: Config, flags: Flags) -> Case:
    """A case of one of the kernels in `CONFIGS`."""
    args, dtype = Arguments(), flags.dtype
    m, n, k = config.block_m, config.block_n, config.block_k
    desc = flags.descriptors and table_of(architecture, ITEMSIZE[dtype]) in DESCRIPTORS
    packed = desc and flags.gated and flags.stacked
    e4m3 = flags.preact == "e4m3"
    args.constexprs |= {
        "BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "GROUP_M": config.group_m, "DESC": desc,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32", "SPLIT": config.split,
    }  # fmt: skip
    args.scalars("M N K")
    dots: tuple[Dot, ...] = (Dot(m, n),)
    if kernel == "weight_grad":
        args.matrix("dy", dtype, desc, k, m)
        args.matrix("x", dtype, desc, k, n)
        args.pointer("out", "fp32")
        args.scalars("stride_ym stride_xm stride_on")
        args.constexprs["ACCUMULATE"] = flags.accumulate
    else:
        args.pointer("hidden", dtype, flags.hidden)
        args.scalars("stride_hm")
        args.constexprs |= {
            "KIND": flags.kind, "GATED": flags.gated, "STORE_HIDDEN": flags.hidden,
            "DTYPE": dtype, "EVEN_K": flags.aligned, "BLOCK_R": 64 if flags.lora else None,
        }  # fmt: skip
    if kernel in ("ffn_up", "ffn_recompute"):
        block = (2, n, k) if packed else (n, k)
        args.matrix("x", dtype, desc, m, k)
        for name in ("gate", "up"):
            args.matrix(f"w_{name}", dtype, desc, *block)
            args.pointer(f"b_{name}", dtype, flags.bias)
        args.scalars("stride_xm stride_gn stride_un")
        _products(args, flags, "t_gate v_gate t_up v_up", "R_gate R_up stride_tm")
        args.constexprs |= {"PACKED": packed, "HAS_BIAS": flags.bias}
        if packed:
            dots = (Dot(m, 2 * n),)
        elif flags.gated:
            dots = (Dot(m, n), Dot(m, n, new_rows=False))
    if kernel in ("ffn_dact", "ffn_recompute"):
        args.matrix("dy", dtype, desc, m, k)
        args.matrix("down", dtype, desc, k, n)
        args.pointer("dpreact", dtype)
        args.scalars("stride_ym stride_wk stride_dm")
        rank = "R" if kernel == "ffn_dact" else "R_down"
        _products(args, flags, "u a", f"{rank} stride_ua")
    if kernel == "ffn_recompute":
        dots += (Dot(m, n),)
    if kernel in ("ffn_up", "ffn_dact"):
        kept = kernel == "ffn_dact" or flags.preact != "dropped"
        args.pointer("preact", "fp8e4nv" if e4m3 else dtype, kept)
        args.pointer("scales", "fp32", e4m3)
        args.scalars("stride_pm stride_sm")
        args.constexprs |= {"FP8": e4m3, "TILE_N": TILE}
    if kernel == "ffn_up":
        args.constexprs |= {
            "STORE_PREACT": kept, "LARGEST_FP8": LARGEST,
            "SPLIT": 1 if e4m3 else config.split,
        }  # fmt: skip
    unaligned = ["stride_sm"]
    if not flags.aligned:
        unaligned += [name for name, kind in args.types.items() if kind == "i32"]
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if kernel != "weight_grad":
        options |= SAME_BITS
    return Case(
        kernel, architecture, variant, dtype, f"{m}x{n}x{k}/{args.constexprs['SPLIT']}",
        args.types, args.constexprs, options,
        unaligned=tuple(unaligned), dots=() if dtype == "fp32" else dots,
    )  # fmt: skip


def _chosen(kernel: str, architecture: str, flags: Flags) -> Config | None:
    """The configuration the launcher would choose; None where it would raise."""
    block_n = TILE if flags.preact == "e4m3" else None
    size = ITEMSIZE[flags.dtype]
    try:
        return choose(kernel, architecture, size, flags.gated, block_n, flags.aligned)
    except ValueError:
        return None


def _gemm_cases(kernel: str, architecture: str) -> Iterator[Case]:
    for config in CONFIGS[kernel][architecture]:
        yield _gemm(kernel, architecture, "main", config, Flags())
    for variant, changes in VARIANTS[kernel].items():
        flags = Flags(**changes)
        plain_loads = architecture not in DESCRIPTORS
        if plain_loads and flags.aligned and not (flags.descriptors and flags.stacked):
            continue  # the same kernel as without
        if flags.preact == "e4m3" and architecture not in E4M3:
            continue
        chosen = _chosen(kernel, architecture, flags)
        if chosen:
            yield _gemm(kernel, architecture, variant, chosen, flags)


def cases(architectures: Sequence[str], kernels: Sequence[str]) -> list[Case]:
    """Every case of these architectures and kernels, defaults first within each."""
    found: list[Case] = []
    for architecture in architectures:
        for kernel in kernels:
            if kernel in CONFIGS:
                found += _gemm_cases(kernel, architecture)
            elif kernel in attention_configs.CONFIGS:
                found += static_rows.attention_cases(kernel, architecture)
            elif kernel in EXPERIMENTS:
                found += static_rows.norm_prologue_case(architecture)
            elif kernel == "activation":
                found += static_rows.activation_cases(architecture)
            elif kernel == "attention_delta":
                found.append(static_rows.delta_case(architecture))
            elif MODULES[kernel] == "norm":
                found += static_rows.norm_cases(kernel, architecture)
            else:
                found += static_rows.qk_rope_cases(kernel, architecture)
    return found
