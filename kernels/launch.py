"""What every launcher needs: checks of its tensors, and how large the device is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from contextlib import AbstractContextManager

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

#: Whether Triton's interpreter runs the kernels (`TRITON_INTERPRET=1`), on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)

#: Compiler options of kernels that make the same numbers: with a multiplication fused into an
#: addition in one of them and not in the other, they would differ in the last bit.
SAME_BITS = {"enable_fp_fusion": False}

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
    if (
        x.shape == shape
        and x.dtype in DTYPES
        and x.device == like.device
        and (x.stride(1) == 1 or shape[1] == 1)
    ):
        return x
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if tuple(x.shape) != shape:
        raise ValueError(f"{name} has the shape {list(x.shape)}, expected {list(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}")
    raise ValueError(
        f"{name} has the strides {x.stride()}, expected a last one of 1: make it contiguous"
    )


def readable(x: Tensor) -> Tensor:
    """x itself where its last stride is 1, else a copy: for what a kernel only reads."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 4 under the interpreter."""
    if device.type != "cuda":
        return 4
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


#: The fields of a descriptor that have a default, which differ from version to version.
DESCRIPTOR_DEFAULTS = {
    field.name: field.default
    for field in dataclasses.fields(TensorDescriptor)
    if field.default is not dataclasses.MISSING
}


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. (`triton.cdiv` on the host goes through the compiler's machinery.)"""
    return -(-a // b)


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Launch where x is: Triton itself launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def describable(x: Tensor) -> bool:
    """Whether a tensor descriptor can describe x: last stride 1, the rest multiples of 16 bytes and
    not 0, and something in it."""
    *strides, last = x.stride()
    if last != 1 or x.data_ptr() % 16 or not x.numel():
        return False
    size = x.element_size()
    return not any(stride <= 0 or stride * size % 16 for stride in strides)


def descriptor(x: Tensor, *block: int) -> TensorDescriptor:
    """A descriptor of an x that is `describable`; it loads blocks of that shape.

    Made without Triton's own checks, which cost more than the rest of a launch.
    """
    made = object.__new__(TensorDescriptor)
    made.__dict__.update(DESCRIPTOR_DEFAULTS)
    made.base, made.block_shape = x, list(block)
    made.shape, made.strides = list(x.shape), list(x.stride())
    return made


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied as fp32; it says nothing for shorter ones."""
    return "ieee" if dtype == torch.float32 else "tf32"


#: Triton's names of the dtypes.
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
