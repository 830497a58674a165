"""The static report's cases of all kernels but the FFN's: as their launchers would call them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from backfuse.kernels import attention_configs, norm, qk_rope
from backfuse.kernels.activation import BLOCK_N
from backfuse.kernels.attention_delta import head_tiles
from backfuse.kernels.configs import CONFIGS, Config
from backfuse.kernels.launch import SAME_BITS
from backfuse.kernels.reference.fp8 import TILE
from backfuse.kernels.reference.norm import NormSpec
from backfuse.kernels.reference.qk_rope import QKSpec

from .static_case import Arguments, Case, Dot

#: Those whose kernels load through tensor descriptors.
DESCRIPTORS = ("sm_90", "sm_100")

#: Those on which Triton has e4m3.
E4M3 = ("sm_89", "sm_90", "sm_100", "gfx942")

#: Of Llama 3 8B: widths of the residual stream, of q and of k, and of a head.
HIDDEN, Q_SIZE, KV_SIZE, HEAD_DIM = 4096, 4096, 1024, 128


def _elementwise(
    kernel: str, architecture: str, variant: str, args: Arguments, tile: Sequence[int],
    options: Mapping[str, Any], unaligned: tuple[str, ...] = (),
) -> Case:  # fmt: skip
    shape = "x".join(map(str, tile))
    return Case(
        kernel, architecture, variant, "bf16", shape, args.types, args.constexprs, options,
        unaligned,
    )  # fmt: skip


def activation_cases(architecture: str) -> Iterator[Case]:
    for variant, e4m3 in (("main", False), ("e4m3", True)):
        if e4m3 and architecture not in E4M3:
            continue
        args = Arguments()
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


def norm_cases(kernel: str, architecture: str) -> Iterator[Case]:
    backward = kernel == "norm_backward"
    for variant, layernorm in (("main", False), ("layernorm", True)):
        args, tiles = Arguments(), dict(norm._tiles(HIDDEN))
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


def delta_case(architecture: str) -> Case:
    args, tiles = Arguments(), head_tiles(QKSpec(Q_SIZE, KV_SIZE, HEAD_DIM))
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


def qk_rope_cases(kernel: str, architecture: str) -> Iterator[Case]:
    backward = kernel == "qk_rope_backward"
    for variant, qk_norm in (("main", None), ("qk-norm", "head")):
        spec = QKSpec(Q_SIZE, KV_SIZE, HEAD_DIM, qk_norm=qk_norm, norm=NormSpec())
        constants = dict(qk_rope._constants(spec, HEAD_DIM))
        options = {name: constants.pop(name) for name in ("num_warps", *SAME_BITS)}
        tile = (constants["BLOCK_M"], constants["BLOCK_Q"], HEAD_DIM)
        args = Arguments()
        args.constexprs |= constants | {"HAS_NORM": qk_norm is not None}
        for name in ("raw_ptr", "cos_ptr", "sin_ptr"):
            args.pointer(name, "bf16")
        for name in ("q_weight_ptr", "k_weight_ptr"):
            args.pointer(name, "bf16", qk_norm is not None)
        args.scalars("M stride_rawm stride_cosm stride_sinm")
        args.scalars("eps offset", "fp32")
        if backward:
            args.pointer("dqk_ptr", "bf16")
            for name in ("dq_weight", "dk_weight"):
                args.pointer(f"{name}_ptr", "fp32", qk_norm is not None)
                args.constexprs[f"NEED_{name.upper()}"] = qk_norm is not None
            args.scalars("stride_dqkm")
        else:
            args.pointer("out_ptr", "bf16")
            for name, dtype in (("attn_out", "bf16"), ("dout", "bf16"), ("delta", "fp32")):
                args.pointer(f"{name}_ptr", dtype)
            args.scalars("stride_outm stride_attn_outm stride_doutm stride_deltam stride_deltah")
            args.constexprs |= {
                "HAS_DELTA": True, "ROUND_FIRST": True, "OUT_HEAD_DIM": HEAD_DIM,
                "BLOCK_D": HEAD_DIM,
            }  # fmt: skip
        yield _elementwise(kernel, architecture, variant, args, tile, options)


#: Variants of the attention kernels -> what is asked of them; all are causal.
ATTENTION_VARIANTS: dict[str, tuple[str, ...]] = {
    "main": (),
    "window": ("WINDOW",),
    "softcap": ("SOFTCAP",),
    "packed": ("VARLEN",),
    "dropout": ("DROPOUT",),
    "sinks": ("HAS_SINKS",),
    "cross": ("CROSS",),
    "cross+packed": ("CROSS", "VARLEN"),
    "192/128": (),
}

#: Variants that `choose` calls heavy.
HEAVY = ("softcap", "packed", "dropout", "cross", "cross+packed")

#: Channels of a head of q and k, and of v, in multi-head latent attention (DeepSeek V3).
MLA_DIMS = 192, 128


def _attention(kernel: str, architecture: str, variant: str, config: Config) -> Case:
    """A case of an attention kernel, for heads as wide as the configuration's, but for MLA's."""
    args, dtype, desc = Arguments(), "bf16", architecture in DESCRIPTORS
    m, n, d = config.block_m, config.block_n, config.block_k
    asked, head_dim, v_dim = ATTENTION_VARIANTS[variant], d, d
    if variant == "192/128":
        desc, (head_dim, v_dim) = False, MLA_DIMS
    d_v = min(d, v_dim)
    tiles = {"q": (m, d), "k": (n, d), "v": (n, d_v)}
    if kernel == "attention_forward":
        args.pointer("sinks", dtype, "HAS_SINKS" in asked)
        args.constexprs["HAS_SINKS"] = "HAS_SINKS" in asked
    else:
        tiles["dout"] = (m, d_v)
        args.pointer("delta", "fp32")
        args.scalars("stride_dt stride_dh stride_eb stride_eh")
        args.constexprs["stride_et"] = 1
    for name, block in tiles.items():
        args.matrix(name, dtype, desc, *(() if "VARLEN" in asked else (1,)), *block)
    args.scalars("stride_qt stride_qh stride_kt stride_kh stride_vt stride_vh")
    args.scalars("stride_lb stride_lh")
    args.constexprs["stride_lt"] = 1
    for name in {"attention_forward": ("out",), "attention_dq": ("dq",)}.get(kernel, ("dk", "dv")):
        args.pointer(name, dtype)
        short = "o" if name == "out" else name
        args.scalars(f"stride_{short}t stride_{short}h")
    args.pointer("lse", "fp32")
    args.pointer("seed", "i64", "DROPOUT" in asked)
    for name in ("cu_seqlens", "tile_sequence", "tile_block"):
        args.pointer(name, "i32", "VARLEN" in asked)
    args.pointer("cu_seqlens_k", "i32", {"VARLEN", "CROSS"} <= set(asked))
    args.scalars("tokens tokens_k heads group window threshold")
    args.scalars("scale softcap keep_scale", "fp32")
    flags = ("WINDOW", "SOFTCAP", "VARLEN", "CROSS", "DROPOUT")
    args.constexprs |= {flag: flag in asked for flag in flags}
    args.constexprs |= {
        "CAUSAL": True, "SITE": 0, "DTYPE": dtype, "PRECISION": "tf32", "DESC": desc,
        "HEAD_DIM": head_dim, "BLOCK_D": d, "V_DIM": v_dim, "BLOCK_DV": d_v,
        "BLOCK_M": m, "BLOCK_N": n,
    }  # fmt: skip
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return Case(
        kernel, architecture, variant, dtype, f"{m}x{n}x{d}", args.types, args.constexprs, options,
        unaligned=("group", "window"),
    )  # fmt: skip


def attention_cases(kernel: str, architecture: str) -> Iterator[Case]:
    configs = attention_configs.CONFIGS[kernel][architecture]
    default = attention_configs.choose(kernel, architecture, 2, HEAD_DIM)
    for config in (default, *(config for config in configs if config != default)):
        yield _attention(kernel, architecture, "main", config)
    for variant in ATTENTION_VARIANTS:
        if variant == "main" or (variant == "sinks" and kernel != "attention_forward"):
            continue
        width = 256 if variant == "192/128" else HEAD_DIM
        config = attention_configs.choose(kernel, architecture, 2, width, variant in HEAVY)
        yield _attention(kernel, architecture, variant, config)


def norm_prologue_case(architecture: str) -> Iterator[Case]:
    """The default configuration of `ffn_recompute`, with the norm in the loop."""
    if architecture not in DESCRIPTORS:
        return
    config = CONFIGS["ffn_recompute"][architecture][0]
    args, dtype = Arguments(), "bf16"
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
