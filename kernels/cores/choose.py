"""Which attention core runs.

    triton, reference   the one that belongs to the other operations
    sdpa                PyTorch's: the CPU's on a CPU; on a GPU flash or cuDNN, whichever was
                        measured faster, else the first of them that can
    fa3, fa4            FlashAttention 3 or 4
    auto                ours, or one that `backfuse tune` measured faster on this device for this
                        dtype, head dim, kind of mask and length; only one that gives the same
                        bits each time

The choice depends on what is asked, on the records and on PyTorch's determinism flag alone: never
on a policy, so that every policy runs the same core. Nothing is measured during a call.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from backfuse.kernels.reference.attention_request import AttentionRequest

from .abilities import obstacle, same_bits, strictly_deterministic
from .prototypes import FA3, FA4, FlashPrototype

#: A module or an object with `attention_forward`, `attention_backward` and `needs_delta`.
Core = ModuleType | FlashPrototype

#: PyTorch's by type of device, the first choice first.
PYTORCHS = {"cpu": ["cpu"], "cuda": ["flash", "cudnn"]}

#: Those that are not ours, on a GPU.
BORROWED = ("flash", "cudnn", "fa3", "fa4")


def load(core: str) -> Core:
    """The core itself."""
    if core in ("fa3", "fa4"):
        return FA3 if core == "fa3" else FA4
    modules = {
        "triton": "attention_core",
        "reference": "reference.attention",
        "cpu": "reference.cpu_attention",
        "flash": "cores.flash",
        "cudnn": "cores.cudnn",
    }
    return importlib.import_module(f"backfuse.kernels.{modules[core]}")


def record_name(core: str) -> str:
    """What a core's time is recorded as: flash has two, with atomics and without."""
    return "flash deterministic" if core == "flash" and strictly_deterministic() else core


def _times(request: AttentionRequest) -> dict[str, float]:
    from backfuse.kernels.tuning import attention_times  # imports triton, which may be missing

    return attention_times(request)


def _fastest(cores: list[str], request: AttentionRequest) -> str:
    """The fastest of these by what was measured; the first one where that was not."""
    if len(cores) == 1:
        return cores[0]
    times = _times(request)
    measured = [core for core in cores if record_name(core) in times]
    if cores[0] not in measured:
        return cores[0]
    return min(measured, key=lambda core: times[record_name(core)])


def _automatic(own: str, request: AttentionRequest) -> list[str]:
    """Our own core, and those that were measured, give the same bits each time, and can do it."""
    if own != "triton" or request.device.type != "cuda":
        return [own]
    times = _times(request)
    measured = [core for core in BORROWED if record_name(core) in times and same_bits(core)]
    return [own, *(core for core in measured if obstacle(core, request) is None)]


def choose(impl: str, own: str, request: AttentionRequest) -> str:
    """The name of the core that runs.

    Args:
        impl: a name from `dispatch.IMPLEMENTATIONS`.
        own: the core that belongs to the operations: `"triton"` or `"reference"`.
        request: what is asked for.

    Raises:
        ValueError: for a core that cannot do it: which one, what was asked, and why not.
    """
    if impl == "sdpa":
        cores = PYTORCHS.get(request.device.type, PYTORCHS["cuda"])
    else:
        cores = [impl] if impl in ("fa3", "fa4") else [own]
    obstacles = {core: obstacle(core, request) for core in cores}
    able = [core for core, reason in obstacles.items() if reason is None]
    if not able:
        reasons = "; ".join(reason for reason in obstacles.values() if reason)
        raise ValueError(f"impl is {impl!r}, but {reasons}")
    return _fastest(_automatic(own, request) if impl == "auto" else able, request)
