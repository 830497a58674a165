"""What can be measured, and who takes part: operations and their providers, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import pandas as pd

from . import away, hf_model, operations, own, peers
from .options import choose, compiler_missing
from .problem import Case, Contender, Problem, plain
from .shapes import ALL_SHAPES
from .ways import WAYS, checkpointed, eager, make_way


def _nothing(case: Case) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """Somebody who computes an operation.

    Attributes:
        make: the contender of a problem, under a policy.
        policies: of ours; one empty name where there are none.
        package: on PyPI; "" for PyTorch and ours.
        module: that has to be there.
        obstacle: why it cannot run a case here, though installed.
        keeps_all: whether it keeps about what eager PyTorch keeps.
    """

    make: Callable[[Problem, str], Contender]
    policies: tuple[str, ...] = ("",)
    package: str = ""
    module: str = ""
    obstacle: Callable[[Case], str | None] = _nothing
    keeps_all: bool = True

    @property
    def install(self) -> str | None:
        """The line that installs it; None if it is there."""
        if not self.module or peers.installed(self.module):
            return None
        return f"pip install {self.package}"

    def missing(self, case: Case) -> str | None:
        """Why it cannot run a case here, in one line; None if it can."""
        if self.install:
            return f"{self.package} is not installed; this does it: {self.install}"
        reason = self.obstacle(case)
        return f"{self.package} {reason}".strip() if reason else None


@dataclass(frozen=True)
class Operation:
    """Something to measure.

    Attributes:
        summary: one line.
        problem: makes it.
        providers: by name; eager first.
    """

    summary: str
    problem: Callable[[Case], Problem]
    providers: dict[str, Provider]


def _way(name: str) -> Provider:
    def make(problem: Problem, policy: str) -> Contender:
        return plain(problem, make_way(name), name)

    package, module = ("torch-remat", "torch_remat") if name == "torch-remat" else ("", "")
    obstacle = compiler_missing if name.startswith("compile") else _nothing
    keeps_all = not name.startswith(("checkpoint", "sac-attention", "torch-remat"))
    return Provider(make, ("",), package, module, obstacle, keeps_all)


def _ways(*names: str) -> dict[str, Provider]:
    return {name: _way(name) for name in names}


def _ours(
    make: Callable[[Problem, str], Contender], policies: tuple[str, ...] = ("",)
) -> dict[str, Provider]:
    return {"backfuse": Provider(make, policies, keeps_all=False)}


_liger = partial(Provider, package="liger-kernel", module="liger_kernel")
_quack = partial(Provider, package="quack-kernels", module="quack")
_te = partial(Provider, package="transformer-engine[pytorch]", module="transformer_engine")

_NORMS = {
    "liger": _liger(peers.liger_norm, obstacle=peers.needs_rmsnorm),
    "quack": _quack(peers.quack_norm, obstacle=peers.needs_rmsnorm),
}
_ROPES = {"liger": _liger(peers.liger_rope, obstacle=peers.needs_plain_rope)}
_FFNS = {
    name: _liger(partial(peers.liger_mlp, kind=kind, name=name), obstacle=peers.needs_llama_ffn)
    for name, kind in {
        "liger": "LigerSwiGLUMLP", "liger-mlp": "LigerMLP", "liger-tiled": "LigerTiledSwiGLUMLP",
    }.items()
}  # fmt: skip
for _name, _recompute in {"quack": False, "quack-recompute": True}.items():
    _FFNS[_name] = _quack(
        partial(peers.quack_mlp, recompute=_recompute), obstacle=peers.needs_quack_ffn
    )
for _name, _recompute in {"te": False, "te-checkpoint": True}.items():
    _FFNS[_name] = _te(partial(peers.te_half, recompute=_recompute), obstacle=peers.needs_llama_ffn)
_FFNS |= _ours(own.ffn, ("keep", "selective"))
_FFNS["backfuse-fused"] = Provider(
    own.fused_ffn, ("selective",), obstacle=own.needs_kernels, keeps_all=False
)
_FFNS = {name: replace(how, make=operations.each_half(how.make)) for name, how in _FFNS.items()}
_CORES = {
    f"sdpa-{backend.lower().removesuffix('_attention')}": Provider(
        partial(peers.sdpa_backend, backend=backend), obstacle=peers.needs_gpu
    )
    for backend in ("MATH", "FLASH_ATTENTION", "CUDNN_ATTENTION")
}
_CORES["flex"] = Provider(peers.flex, obstacle=peers.needs_gpu)  # no backward on a CPU
_CORES["flash-attn"] = Provider(
    peers.flash_attention, package="flash-attn", module="flash_attn", obstacle=peers.needs_half
)

_COMPILED = {
    "backfuse-compile": Provider(
        own.compiled_stack, ("selective", "full"), obstacle=compiler_missing, keeps_all=False
    )
}


def _of_model(
    summary: str, problem: Callable[[Case], Problem], package: str = "transformers"
) -> Operation:
    """A whole model: its own checkpointing, the compiler's, and ours."""
    needs: dict[str, Any] = {
        "package": package,
        "module": package,
        "obstacle": hf_model.needs_llama,
    }
    providers = {
        **{name: replace(_way(name), **needs) for name in ("eager", "compile")},
        "hf-checkpointing": Provider(hf_model.checkpointing, keeps_all=False, **needs),
        "backfuse": Provider(hf_model.patched, own.POLICIES, keeps_all=False, **needs),
    }
    return Operation(summary, problem, providers)


#: Name -> operation.
OPERATIONS: dict[str, Operation] = {
    "norm": Operation(
        "RMSNorm or LayerNorm",
        operations.norm,
        {**_ways("eager", "compile"), **_NORMS, **_ours(own.norm)},
    ),
    "rope": Operation(
        "qk-norm (where the block has it) and RoPE",
        operations.rope,
        {**_ways("eager", "compile"), **_ROPES, **_ours(own.rope)},
    ),
    "ffn": Operation(
        "the FFN half: norm, FFN, residual",
        operations.ffn,
        {
            **_ways("eager", "compile", "checkpoint", "compile-checkpoint", "compile-0.5"),
            **_ways("torch-remat"),
            **_FFNS,
        },
    ),
    "attention": Operation(
        "the attention core",
        operations.attention,
        {**_ways("eager"), **_CORES, **_ours(own.attention)},
    ),
    "attention-half": Operation(
        "the attention half: norm, projections, attention, residual",
        operations.attention_half,
        {
            **_ways("eager", "compile", "checkpoint", "compile-0.5"),
            **_ours(own.attention_half, ("keep", "lean", "full")),
        },
    ),
    "block": Operation(
        "a transformer block",
        operations.stack,
        {**_ways(*WAYS), **_ours(own.stack, own.POLICIES)},
    ),
    "stack": Operation(
        "a stack of blocks",
        operations.stack,
        {**_ways(*WAYS), **_ours(own.stack, own.POLICIES), **_COMPILED},
    ),
    "offload": Operation(
        "a stack that keeps what it can in host memory; on a CPU, in files",
        operations.stack,
        {
            **_ways("eager", "checkpoint"),
            **{
                name: Provider(partial(away.contender, name=name, way=way), keeps_all=False)
                for name, way in {"save-on-cpu": eager, "checkpoint-on-cpu": checkpointed}.items()
            },
            **_ours(away.ours, ("lean", "offload")),
        },
    ),
    "train": Operation(
        "a training step with AdamW of a small model around a stack",
        operations.train,
        {
            **_ways("eager", "checkpoint", "sac-attention", "compile", "compile-0.5"),
            **_ours(own.train, own.POLICIES),
        },
    ),
    "model": _of_model("a whole Hugging Face model: loss and gradients", hf_model.problem),
    "lora": _of_model(
        "the same with LoRA on all projections, the rest frozen", hf_model.lora, "peft"
    ),
}


def choose_providers(op: str, names: tuple[str, ...] | None) -> list[str]:
    """The operation's providers of those names; eager always, for it is what others are held to.

    Raises:
        ValueError: for a name that the operation does not have, with the nearest one.
    """
    known = OPERATIONS[op].providers
    for name in names or ():
        choose("provider", name, known)
    return [name for name in known if names is None or name in names or name == "eager"]


def listing() -> str:
    """Operations, providers and shapes, as text."""
    lines = ["operations"]
    lines += [f"  {name:<16}{op.summary}" for name, op in OPERATIONS.items()]
    lines += ["", "providers"]
    install: dict[str, str] = {}
    takes_part: dict[str, list[str]] = {}
    for name, op in OPERATIONS.items():
        for provider, how in op.providers.items():
            takes_part.setdefault(provider, []).append(name)
            install[provider] = how.install or "here"
    for provider, ops in takes_part.items():
        lines.append(f"  {provider:<20}{install[provider]:<42}{', '.join(ops)}")
    lines += ["", "shapes"]
    rows = [
        {
            "": f"  {name}", "hidden": s.hidden_size, "FFN": s.intermediate_size,
            "heads": f"{s.num_attention_heads}/{s.num_key_value_heads} of {s.head_dim}",
            "norm": s.norm, "act": s.hidden_act + (", gated" if s.gated else ""),
        }
        for name, s in ALL_SHAPES.items()
    ]  # fmt: skip
    return "\n".join(lines) + "\n" + pd.DataFrame(rows).to_string(index=False)
