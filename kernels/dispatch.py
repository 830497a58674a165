"""Which implementation of the operations runs: the kernels, or the reference.

Both are modules with the same functions (`kernels.reference` lists them, `kernels.fused` has them
in Triton), so that whoever calls them need not know which one it has.

    auto        the kernels for bf16 and fp16 on a GPU of compute capability 8.0 or AMD's; else the
                reference, whose fp32 GEMMs are the library's
    triton      the kernels; an error where they cannot run
    reference   PyTorch's operations, on any device
"""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

from . import reference

#: A module with the operations: `kernels.reference` lists them.
Operations = ModuleType

IMPLEMENTATIONS = ("auto", "triton", "reference")

#: How the kernels rebuild a pre-activation: see `ffn_recompute.py`.
FFN_STRATEGIES = ("auto", "split", "fused")

#: The longest row that the norm and rotary kernels take.
MAX_WIDTH = 32768


@functools.cache
def _obstacle(device: torch.device, dtype: torch.dtype, width: int, fp8: bool) -> str | None:
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
    return None


def operations(
    impl: str, device: torch.device, dtype: torch.dtype, width: int, fp8: bool = False
) -> Operations:
    """The module whose functions run.

    Args:
        impl: `"auto"`, `"triton"` or `"reference"`.
        device: of the tensors.
        dtype: of the GEMMs' operands.
        width: the longest row of a norm, or of q.
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
    obstacle = _obstacle(device, dtype, width, fp8)
    if obstacle is None:
        from . import fused

        return fused
    if impl == "auto":
        return reference
    raise ValueError(f"impl is 'triton', but {obstacle}")
