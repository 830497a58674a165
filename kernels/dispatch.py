"""Which implementation of the operations runs: the kernels, or the reference.

Both are modules with the same functions (`kernels.reference` lists them, `kernels.fused` has them
in Triton), so that whoever calls them need not know which one it has.

    auto        the kernels for bf16 and fp16 on a GPU of compute capability 8.0 or AMD's, with the
                attention core that was measured fastest (see `cores/choose.py`); else the
                reference, whose fp32 GEMMs are the library's
    triton      the kernels; an error where they cannot run
    sdpa        the kernels, and PyTorch's own attention; an error where either cannot run
    fa3, fa4    the kernels, and FlashAttention 3 or 4; likewise
    reference   PyTorch's operations, on any device
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from . import reference
from .cores.choose import Core, choose, load
from .reference.attention_request import AttentionRequest

#: A module with the operations: `kernels.reference` lists them.
Operations = ModuleType

IMPLEMENTATIONS = ("auto", "triton", "sdpa", "fa3", "fa4", "reference")

#: How the kernels rebuild a pre-activation: see `ffn_recompute.py`.
FFN_STRATEGIES = ("auto", "split", "fused")

#: The longest row that the norm and rotary kernels take.
MAX_WIDTH = 32768

#: The widest head that the attention kernels take.
MAX_HEAD_DIM = 256


@functools.cache
def _obstacle(
    device: torch.device, dtype: torch.dtype, width: int, head_dim: int, fp8: bool
) -> str | None:
    """Why the kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    from .launch import DTYPES, INTERPRETED

    if device.type != "cuda" and not (INTERPRETED and device.type == "cpu"):
        return f"the tensors are on {device.type}, expected a GPU (or TRITON_INTERPRET=1)"
    if dtype not in DTYPES:
        return f"the dtype is {dtype}, expected one of {', '.join(map(str, DTYPES))}"
    if device.type == "cuda" and not torch.version.hip:
        major, minor = torch.cuda.get_device_capability(device)
        least = (8, 9) if fp8 else (8, 0)
        if (major, minor) < least:
            return (
                f"the GPU's compute capability is {major}.{minor}, expected at least "
                f"{least[0]}.{least[1]}" + (" for fp8" if fp8 else "")
            )
    if width > MAX_WIDTH:
        return f"a row has {width} elements, expected at most {MAX_WIDTH}"
    if head_dim > MAX_HEAD_DIM:
        return f"a head has {head_dim} elements, expected at most {MAX_HEAD_DIM}"
    return None


def operations(
    impl: str,
    device: torch.device,
    dtype: torch.dtype,
    width: int,
    head_dim: int = 0,
    fp8: bool = False,
) -> Operations:
    """The module whose functions run.

    Args:
        impl: a name from `IMPLEMENTATIONS`.
        device: of the tensors.
        dtype: of the GEMMs' operands.
        width: the longest row of a norm, or of q.
        head_dim: the widest head; 0 without attention.
        fp8: whether something is kept in eight bits.

    Raises:
        ValueError: for an unknown name, or kernels that cannot run here.
    """
    if impl not in IMPLEMENTATIONS:
        raise ValueError(f"impl is {impl!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
    if impl == "reference":
        return reference
    if impl == "auto" and (device.type != "cuda" or dtype.itemsize != 2):
        return reference
    obstacle = _obstacle(device, dtype, width, head_dim, fp8)
    if obstacle is None:
        from . import fused

        return fused
    if impl == "auto":
        return reference
    raise ValueError(f"impl is {impl!r}, but {obstacle}")


def attention_core(impl: str, ops: Operations, request: AttentionRequest) -> Operations | Core:
    """Whose attention runs: that of the operations, or another core.

    Args:
        impl: a name from `IMPLEMENTATIONS`.
        ops: what `operations` gave for it.
        request: what is asked for.

    Raises:
        ValueError: for a core that cannot do what is asked.
    """
    own = "reference" if ops is reference else "triton"
    core = choose(impl, own, request)
    return ops if core == own else load(core)
