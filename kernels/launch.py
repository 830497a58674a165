"""What every launcher needs: checks of its tensors, and how large the device is."""

from __future__ import annotations

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

#: Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`), on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)

#: What a kernel can load and compute with.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check_matrix(name: str, x: Tensor, shape: tuple[int, int], like: Tensor) -> Tensor:
    """Raise unless a kernel can read x.

    Args:
        name: what the tensor is called.
        x: the tensor.
        shape: `(rows, columns)` it should have.
        like: a tensor on the device it should be on.

    Returns:
        x.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for another shape or device, or columns that are not next to each other.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has the shape {list(x.shape)}, expected {list(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}")
    if x.stride(1) != 1 and x.shape[1] != 1:
        raise ValueError(
            f"{name} has the strides {x.stride()}, expected a last one of 1: make it contiguous"
        )
    return x


def readable(x: Tensor) -> Tensor:
    """x itself where its last stride is 1, else a copy: for what a kernel only reads."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 under the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Launch where x is: Triton itself launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe x: last stride 1, the rest multiples of 16 bytes."""
    size = x.element_size()
    return (
        x.stride(-1) == 1
        and x.data_ptr() % 16 == 0
        and all(stride * size % 16 == 0 for stride in x.stride()[:-1])
    )


def descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of x that loads blocks of that shape."""
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(block))


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied as fp32; it says nothing for shorter ones."""
    return "ieee" if dtype == torch.float32 else "tf32"


#: Triton's names of the dtypes.
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
