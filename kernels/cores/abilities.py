"""What each attention core can do, in one place: `obstacle` says why one cannot do what is asked.

Sources, in PyTorch: `transformers/cuda/sdp_utils.cpp` for `flash` and `cudnn`,
`torch/nn/attention/_fa3.py` and `_fa4.py`; their packages for the head dims.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from backfuse.kernels.reference.attention_request import EXTRAS, Abilities, AttentionRequest
from backfuse.kernels.reference.cpu_attention import CPU

from .prototypes import FA3, FA4

HALF = (torch.bfloat16, torch.float16)

#: Core -> what it can do. Whether our kernels run on a device is `dispatch.py`'s question.
ABILITIES: dict[str, Abilities] = {
    "triton": Abilities(
        "Triton attention", EXTRAS, (torch.float32, *HALF), max_head_dim=256
    ),
    "reference": Abilities("the reference", EXTRAS),
    "cpu": CPU,
    "flash": Abilities(
        "PyTorch's flash kernel",
        frozenset({"sliding window", "packed sequences"}),
        HALF,
        "cuda",
        max_head_dim=256,
        head_dim_step=8,
    ),
    "cudnn": Abilities(
        "PyTorch's cuDNN kernel",
        frozenset({"other head dim of v"}),
        HALF,
        "cuda",
        max_head_dim=256,
        head_dim_step=8,
    ),
    "fa3": Abilities(
        "FlashAttention 3",
        frozenset({"sliding window", "packed sequences"}),
        HALF,
        "cuda",
        max_head_dim=256,
        head_dim_step=8,
    ),
    "fa4": Abilities(
        "FlashAttention 4",
        frozenset({"sliding window", "packed sequences"}),
        HALF,
        "cuda",
        max_head_dim=128,
        head_dim_step=8,
    ),
}  # fmt: skip


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) where there is none."""
    if device.type != "cuda" or torch.version.hip or not torch.cuda.is_available():
        return 0, 0
    return torch.cuda.get_device_capability(device)


def strictly_deterministic() -> bool:
    """Whether `torch.use_deterministic_algorithms(True)` is on, and more than a warning."""
    return (
        torch.are_deterministic_algorithms_enabled()
        and not torch.is_deterministic_algorithms_warn_only_enabled()
    )


def same_bits(core: str) -> bool:
    """Whether a core gives the same gradients each time, as it would be called now."""
    return core != "cudnn" and (core != "flash" or strictly_deterministic())


def _needs(wanted: str, found: tuple[int, int]) -> str:
    there = f"the GPU's is {found[0]}.{found[1]}" if found[0] else "there is no such GPU"
    return f"needs compute capability {wanted}, and {there}"


def _flash(request: AttentionRequest, found: tuple[int, int]) -> str | None:
    if torch.version.hip:
        return None
    if found < (8, 0):
        return _needs("8.0 or higher", found)
    small = (8, 6) <= found <= (8, 9) or found[0] == 12
    if small and 192 < request.head_dim <= 224:
        return f"has no backward for heads of 193 to 224 channels, and they have {request.head_dim}"
    return None


def _cudnn(request: AttentionRequest, found: tuple[int, int]) -> str | None:
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    if version is None or version < 90000:
        return f"needs cuDNN 9, and this PyTorch has {version or 'none'}"
    if found < (8, 0):
        return _needs("8.0 or higher", found)
    if strictly_deterministic():
        return "is not deterministic, and torch.use_deterministic_algorithms(True) is on"
    if request.tokens == 1:
        return "does not take sequences of one token"
    dims = request.head_dim, request.v_head_dim or request.head_dim
    if version >= 91100 and found[0] == 10 and dims == (192, 128):
        return None
    widest = 256 if version >= 91000 and found == (9, 0) else 128
    if max(dims) > widest:
        return f"takes heads of at most {widest} channels on this GPU, and they have {max(dims)}"
    return None


def _fa3(request: AttentionRequest, found: tuple[int, int]) -> str | None:
    return FA3.lacks(request) if found[0] == 9 else _needs("9", found)


def _fa4(request: AttentionRequest, found: tuple[int, int]) -> str | None:
    return FA4.lacks(request) if found[0] in (9, 10) else _needs("9 or 10", found)


#: Core -> what else may be in the way: the GPU, versions, what is installed.
LIMITS: dict[str, Callable[[AttentionRequest, tuple[int, int]], str | None]] = {
    "flash": _flash,
    "cudnn": _cudnn,
    "fa3": _fa3,
    "fa4": _fa4,
}


def obstacle(core: str, request: AttentionRequest) -> str | None:
    """Why a core cannot do what is asked, in words that begin with its name; or None."""
    abilities = ABILITIES[core]
    reason = abilities.obstacle(request)
    if reason is None and core in LIMITS:
        reason = LIMITS[core](request, capability(request.device))
    return None if reason is None else f"{abilities.label} {reason}"
