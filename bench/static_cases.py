"""What `backfuse bench static` compiles: the kernels, as their launchers would call them.

A case describes a kernel's arguments by name. `bind` holds that against the kernel's own names, so
that a kernel whose arguments have changed is an error here, not a table of something else.

The main variant of a kernel is compiled with all of its configurations, every other variant with
the one its launcher would choose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from backfuse.kernels.attention_configs import CONFIGS as ATTENTION_CONFIGS
from backfuse.kernels.attention_configs import HEAVY
from backfuse.kernels.configs import CONFIGS, UNALIGNED, Config, fits
from backfuse.kernels.reference.fp8 import LARGEST, TILE
from backfuse.kernels.reference.norm import NormSpec
from backfuse.kernels.reference.qk_rope import QKSpec

#: Names of the tables of configurations that have hardware behind them.
ARCHITECTURES = tuple(name for name in CONFIGS["ffn_up"] if name != "interpreter")

#: Those whose kernels load through tensor descriptors.
DESCRIPTORS = ("sm_90", "sm_100")

#: Those on which Triton has e4m3.
E4M3 = ("sm_89", "sm_90", "sm_100", "gfx942")

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

#: Of Llama 3 8B: widths of the residual stream, of q and of k, and of a head.
HIDDEN, Q_SIZE, KV_SIZE, HEAD_DIM = 4096, 4096, 1024, 128

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
        "pointers": {"descriptors": False},
        "unaligned": {"descriptors": False, "aligned": False},
        "fp16": {"dtype": "fp16"},
        "fp32": {"dtype": "fp32"},
    },
    "ffn_dact": {
        "plain": {"gated": False},
        "gelu": {"kind": "gelu"},
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


@dataclass(frozen=True)
class Dot:
    """A product of a step of a kernel's loop, of BLOCK_K depth.

    Attributes:
        rows: of the tile.
        columns: of the tile.
        new_rows: whether the left operand is loaded for it, not for the dot before.
    """

    rows: int
    columns: int
    new_rows: bool = True


@dataclass(frozen=True)
class Case:
    """One compilation.

    Attributes:
        kernel: a key of `MODULES`.
        architecture: one of `ARCHITECTURES`.
        variant: `"main"`, or what differs.
        dtype: of the operands.
        tile: the block sizes, as the table shows them.
        types: Triton's type of each argument that is one.
        constexprs: value of each other argument; a dtype by its name.
        options: of `triton.compile`.
        unaligned: integer arguments that may be no multiples of 16.
        dots: what a step multiplies; nothing for kernels whose dtype or work has no tensor cores.
    """

    kernel: str
    architecture: str
    variant: str
    dtype: str
    tile: str
    types: Mapping[str, str]
    constexprs: Mapping[str, Any]
    options: Mapping[str, Any]
    unaligned: tuple[str, ...] = ()
    dots: tuple[Dot, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """The case as JSON can hold it."""
        return asdict(self)


def bind(
    case: Mapping[str, Any], names: Sequence[str], unspecialized: Sequence[str] = ()
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], list[list[Any]]]]:
    """Signature, constexprs and attributes as Triton's `ASTSource` takes them.

    Args:
        case: a `Case`, as a dictionary.
        names: the kernel's arguments.
        unspecialized: those the kernel marks `do_not_specialize`.

    Raises:
        ValueError: if the case describes other arguments than the kernel has.
    """
    types, constexprs = case["types"], case["constexprs"]
    described = {**types, **constexprs}
    missing = [name for name in names if name not in described]
    surplus = [name for name in described if name not in names]
    if missing or surplus:
        raise ValueError(
            f"bench/static_cases.py describes {case['kernel']} wrongly: the kernel's "
            f"{', '.join(missing) or 'none'} are missing, {', '.join(surplus) or 'none'} too many"
        )
    signature = {name: types.get(name, "constexpr") for name in names}
    unaligned = {*case["unaligned"], *unspecialized}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (signature[name] == "i32" and name not in unaligned)
    }
    values: dict[tuple[int, ...], Any] = {
        (names.index(name),): value for name, value in constexprs.items()
    }
    return signature, values, attributes


class _Arguments:
    """Types and constexprs of a kernel under description."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self.constexprs: dict[str, Any] = {}

    def pointer(self, name: str, dtype: str, present: bool = True) -> None:
        if present:
            self.types[name] = f"*{dtype}"
        else:
            self.constexprs[name] = None

    def matrix(self, name: str, dtype: str, descriptor: bool, *block: int) -> None:
        shape = ", ".join(map(str, block))
        self.types[name] = f"tensordesc<{dtype}[{shape}]>" if descriptor else f"*{dtype}"

    def scalars(self, names: str, kind: str = "i32") -> None:
        self.types |= dict.fromkeys(names.split(), kind)


def _gemm(kernel: str, architecture: str, variant: str, config: Config, flags: Flags) -> Case:
    """A case of one of the kernels in `CONFIGS`."""
    from backfuse.kernels.launch import SAME_BITS

    args, dtype = _Arguments(), flags.dtype
    m, n, k = config.block_m, config.block_n, config.block_k
    desc = flags.descriptors and _table(architecture, flags) in DESCRIPTORS
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
            "DTYPE": dtype, "EVEN_K": flags.aligned,
        }  # fmt: skip
    if kernel in ("ffn_up", "ffn_recompute"):
        block = (2, n, k) if packed else (n, k)
        args.matrix("x", dtype, desc, m, k)
        for name in ("gate", "up"):
            args.matrix(f"w_{name}", dtype, desc, *block)
            args.pointer(f"b_{name}", dtype, flags.bias)
        args.scalars("stride_xm stride_gn stride_un")
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


def _table(architecture: str, flags: Flags) -> str:
    """Whose configurations are used, as `kernels.configs.table_of` says of a device."""
    return "sm_80" if flags.dtype == "fp32" and architecture in DESCRIPTORS else architecture


def _chosen(kernel: str, architecture: str, flags: Flags) -> Config | None:
    """The configuration the launcher would choose, as `kernels.configs.choose` does."""
    table = _table(architecture, flags)
    if not flags.aligned and table.startswith("sm_"):
        return UNALIGNED
    for config in CONFIGS[kernel][table]:
        wide = flags.preact != "e4m3" or config.block_n == TILE
        if wide and fits(kernel, config, table, ITEMSIZE[flags.dtype], flags.gated):
            return config
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


def _elementwise(
    kernel: str, architecture: str, variant: str, args: _Arguments, tile: Sequence[int],
    options: Mapping[str, Any], unaligned: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    shape = "x".join(map(str, tile))
    return Case(
        kernel, architecture, variant, "bf16", shape, args.types, args.constexprs, options,
        unaligned,
    )  # fmt: skip


def _activation_cases(architecture: str) -> Iterator[Case]:
    from backfuse.kernels.activation import BLOCK_N
    from backfuse.kernels.launch import SAME_BITS

    for variant, e4m3 in (("main", False), ("e4m3", True)):
        if e4m3 and architecture not in E4M3:
            continue
        args = _Arguments()
        args.pointer("preact", "fp8e4nv" if e4m3 else "bf16")
        args.pointer("scales", "fp32", e4m3)
        args.pointer("hidden", "bf16")
        args.scalars("N stride_pm stride_sm stride_hm")
        args.constexprs |= {
            "KIND": "silu", "GATED": True, "FP8": e4m3, "TILE_N": TILE, "BLOCK_N": BLOCK_N,
        }  # fmt: skip
        yield _elementwise(
            "activation", architecture, variant, args, (BLOCK_N,), SAME_BITS, ("stride_sm",)
        )


def _norm_cases(kernel: str, architecture: str) -> Iterator[Case]:
    from backfuse.kernels import norm
    from backfuse.kernels.launch import SAME_BITS

    backward = kernel == "norm_backward"
    for variant, layernorm in (("main", False), ("layernorm", True)):
        args, tiles = _Arguments(), dict(norm._tiles(HIDDEN))
        options = {"num_warps": tiles.pop("num_warps"), **SAME_BITS}
        args.constexprs |= tiles | {
            "LAYERNORM": layernorm, "ROUND_FIRST": not layernorm, "HAS_BIAS": layernorm,
            "HAS_RESIDUAL": True,
        }  # fmt: skip
        for name in ("x_ptr", "weight_ptr", "residual_ptr"):
            args.pointer(name, "bf16")
        args.pointer("bias_ptr", "bf16", layernorm)
        args.pointer("statistics_ptr", "fp32")
        args.scalars("M N stride_xm stride_residualm stride_statistics")
        args.scalars("offset", "fp32")
        if backward:
            for name in ("dy_ptr", "dx_ptr", "normed_ptr"):
                args.pointer(name, "bf16")
            args.pointer("dweight_ptr", "fp32")
            args.pointer("dbias_ptr", "fp32", layernorm)
            args.scalars("stride_dym stride_dxm stride_normedm")
            needed = ("NEED_DX", "NEED_NORMED", "NEED_DWEIGHT")
            args.constexprs |= dict.fromkeys(needed, True) | {"NEED_DBIAS": layernorm}
        else:
            args.pointer("out_ptr", "bf16")
            args.scalars("stride_outm")
            args.scalars("eps", "fp32")
            args.constexprs |= {"KNOWN": False, "Y_DTYPE": "bf16"}
        yield _elementwise(kernel, architecture, variant, args, tuple(tiles.values()), options)


def _delta_case(architecture: str) -> Case:
    from backfuse.kernels.attention_delta import head_tiles
    from backfuse.kernels.launch import SAME_BITS

    args, tiles = _Arguments(), head_tiles(QKSpec(Q_SIZE, KV_SIZE, HEAD_DIM))
    for name, dtype in (("attn_out", "bf16"), ("dout", "bf16"), ("delta", "fp32")):
        args.pointer(f"{name}_ptr", dtype)
    args.scalars("M stride_attn_outm stride_doutm stride_deltam stride_deltah")
    args.constexprs |= {
        "HEADS": Q_SIZE // HEAD_DIM, "HEAD_DIM": HEAD_DIM, "BLOCK_D": HEAD_DIM,
        "BLOCK_M": tiles["BLOCK_M"], "BLOCK_H": tiles["BLOCK_Q"],
    }  # fmt: skip
    tile = (tiles["BLOCK_M"], tiles["BLOCK_Q"], HEAD_DIM)
    options = {"num_warps": tiles["num_warps"], **SAME_BITS}
    return _elementwise("attention_delta", architecture, "main", args, tile, options)


def _qk_rope_cases(kernel: str, architecture: str) -> Iterator[Case]:
    from backfuse.kernels import qk_rope
    from backfuse.kernels.launch import SAME_BITS

    backward = kernel == "qk_rope_backward"
    for variant, norm in (("main", None), ("qk-norm", "head")):
        spec = QKSpec(Q_SIZE, KV_SIZE, HEAD_DIM, qk_norm=norm, norm=NormSpec())
        constants = dict(qk_rope._constants(spec, HEAD_DIM))
        options = {name: constants.pop(name) for name in ("num_warps", *SAME_BITS)}
        tile = (constants["BLOCK_M"], constants["BLOCK_Q"], HEAD_DIM)
        args = _Arguments()
        args.constexprs |= constants | {"HAS_NORM": norm is not None}
        for name in ("raw_ptr", "cos_ptr", "sin_ptr"):
            args.pointer(name, "bf16")
        for name in ("q_weight_ptr", "k_weight_ptr"):
            args.pointer(name, "bf16", norm is not None)
        args.scalars("M stride_rawm stride_cosm stride_sinm")
        args.scalars("eps offset", "fp32")
        if backward:
            args.pointer("dqk_ptr", "bf16")
            for name in ("dq_weight", "dk_weight"):
                args.pointer(f"{name}_ptr", "fp32", norm is not None)
                args.constexprs[f"NEED_{name.upper()}"] = norm is not None
            args.scalars("stride_dqkm")
        else:
            args.pointer("out_ptr", "bf16")
            for name, dtype in (("attn_out", "bf16"), ("dout", "bf16"), ("delta", "fp32")):
                args.pointer(f"{name}_ptr", dtype)
            args.scalars("stride_outm stride_attn_outm stride_doutm stride_deltam stride_deltah")
            args.constexprs |= {"HAS_DELTA": True, "ROUND_FIRST": True, "BLOCK_D": HEAD_DIM}
        yield _elementwise(kernel, architecture, variant, args, tile, options)


#: Variants of the attention kernels -> what is asked of them; all are causal.
ATTENTION_VARIANTS: dict[str, tuple[str, ...]] = {
    "main": (),
    "window": ("WINDOW",),
    "softcap": ("SOFTCAP",),
    "packed": ("VARLEN",),
    "dropout": ("DROPOUT",),
}


def _attention(kernel: str, architecture: str, variant: str, config: Config) -> Case:
    """A case of an attention kernel, for heads as wide as the configuration's."""
    args, dtype, desc = _Arguments(), "bf16", architecture in DESCRIPTORS
    m, n, d = config.block_m, config.block_n, config.block_k
    asked = ATTENTION_VARIANTS[variant]
    tiles = {"q": m, "k": n, "v": n}
    if kernel != "attention_forward":
        tiles["dout"] = m
        args.pointer("delta", "fp32")
        args.scalars("stride_dt stride_dh stride_eb stride_eh stride_et")
    for name, rows in tiles.items():
        args.matrix(name, dtype, desc, rows, d)
    args.scalars("stride_qt stride_qh stride_kt stride_kh stride_vt stride_vh")
    args.scalars("stride_lb stride_lh stride_lt")
    for name in {"attention_forward": ("out",), "attention_dq": ("dq",)}.get(kernel, ("dk", "dv")):
        args.pointer(name, dtype)
        short = "o" if name == "out" else name
        args.scalars(f"stride_{short}t stride_{short}h")
    args.pointer("lse", "fp32")
    args.pointer("seed", "i64", "DROPOUT" in asked)
    for name in ("cu_seqlens", "tile_sequence", "tile_block"):
        args.pointer(name, "i32", "VARLEN" in asked)
    args.scalars("tokens heads group window threshold")
    args.scalars("scale softcap keep_scale", "fp32")
    args.constexprs |= {flag: flag in asked for flag in ("WINDOW", "SOFTCAP", "VARLEN", "DROPOUT")}
    args.constexprs |= {
        "CAUSAL": True, "SITE": 0, "DTYPE": dtype, "PRECISION": "tf32", "DESC": desc,
        "HEAD_DIM": d, "BLOCK_D": d, "BLOCK_M": m, "BLOCK_N": n,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Case(
        kernel, architecture, variant, dtype, f"{m}x{n}x{d}", args.types, args.constexprs, options,
        unaligned=("group", "window", "stride_lt", "stride_et"),
    )  # fmt: skip


def _attention_cases(kernel: str, architecture: str) -> Iterator[Case]:
    configs = ATTENTION_CONFIGS[kernel][architecture]
    default = next(config for config in configs if config.block_k == HEAD_DIM)
    for config in (default, *(config for config in configs if config != default)):
        yield _attention(kernel, architecture, "main", config)
    heavy = (*HEAVY.get(kernel, {}).get(architecture, ()), default)[0]
    for variant in ATTENTION_VARIANTS:
        if variant != "main":
            chosen = default if variant == "window" else heavy
            yield _attention(kernel, architecture, variant, chosen)


def _norm_prologue_case(architecture: str) -> Iterator[Case]:
    """The default configuration of `ffn_recompute`, with the norm in the loop."""
    if architecture not in DESCRIPTORS:
        return
    config = CONFIGS["ffn_recompute"][architecture][0]
    args, dtype = _Arguments(), "bf16"
    m, n, k = config.block_m, config.block_n, config.block_k
    args.matrix("x", dtype, True, m, k)
    args.matrix("w_gate_up", dtype, True, 2, n, k)
    args.matrix("dy", dtype, True, m, k)
    args.matrix("down", dtype, True, k, n)
    for name in ("gamma", "dpreact", "hidden"):
        args.pointer(name, dtype)
    args.pointer("rstd", "fp32")
    args.scalars("M N K stride_ym stride_wk stride_dm stride_hm")
    args.constexprs |= {
        "KIND": "silu", "DTYPE": dtype, "PRECISION": "tf32", "BLOCK_M": m, "BLOCK_N": n,
        "BLOCK_K": k, "GROUP_M": config.group_m, "SPLIT": config.split,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    yield Case(
        "ffn_recompute_norm", architecture, "main", dtype, f"{m}x{n}x{k}/{config.split}",
        args.types, args.constexprs, options, dots=(Dot(m, 2 * n), Dot(m, n)),
    )  # fmt: skip


def cases(architectures: Sequence[str], kernels: Sequence[str]) -> list[Case]:
    """Every case of these architectures and kernels, defaults first within each."""
    found: list[Case] = []
    for architecture in architectures:
        for kernel in kernels:
            if kernel in CONFIGS:
                found += _gemm_cases(kernel, architecture)
            elif kernel in ATTENTION_CONFIGS:
                found += _attention_cases(kernel, architecture)
            elif kernel in EXPERIMENTS:
                found += _norm_prologue_case(architecture)
            elif kernel == "activation":
                found += _activation_cases(architecture)
            elif kernel == "attention_delta":
                found.append(_delta_case(architecture))
            elif MODULES[kernel] == "norm":
                found += _norm_cases(kernel, architecture)
            else:
                found += _qk_rope_cases(kernel, architecture)
    return found
