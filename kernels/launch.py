"""What every launcher needs: checks of its tensors, and how large the device is."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, TypeVar

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


class Layout(NamedTuple):
    """All of a tensor that a launch is planned by, and checked.

    Attributes:
        shape: its sizes.
        strides: in elements.
        dtype: of its elements.
        device: where it is.
        offset: bytes from the last multiple of 16 to its first element.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    offset: int


_new = tuple.__new__  # past the checks of `Layout(...)`: this runs for each tensor of each launch


def layout(x: Tensor) -> Layout:
    """The layout of a tensor."""
    return _new(Layout, (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16))


def layouts(*tensors: Tensor | None) -> tuple[Layout | None, ...]:
    """The layouts of several; None of None."""
    return tuple([None if x is None else layout(x) for x in tensors])


Planned = TypeVar("Planned")
_FORGET: list[Callable[[], None]] = []


def planned(function: Callable[..., Planned]) -> Callable[..., Planned]:
    """Remember what a function of layouts gave.

    A training step launches the same kernels on the same layouts again and again. What follows
    from those (that they fit, tile sizes, grids, strides) is found once; errors are not remembered.
    """
    remembered = functools.lru_cache(maxsize=4096)(function)
    _FORGET.append(remembered.cache_clear)
    return remembered


def forget_plans() -> None:
    """Plan anew from now on: tile sizes have changed."""
    for clear in _FORGET:
        clear()


class Plan(NamedTuple):
    """How a kernel is launched.

    Attributes:
        grid: programs.
        blocks: for each operand that is loaded in tiles, how it is described; None: by a pointer.
        numbers: sizes, strides and other numbers, in the kernel's order.
        flags: constexprs, and the compiler's options.
    """

    grid: tuple[int, ...]
    blocks: tuple[Described | None, ...]
    numbers: tuple[Any, ...]
    flags: dict[str, Any]


def check_matrix(name: str, x: Layout, shape: tuple[int, int], like: Layout) -> Layout:
    """Raise unless a kernel can read x.

    Args:
        name: what the tensor is called.
        x: its layout.
        shape: `(rows, columns)` it should have.
        like: of a tensor on the device it should be on.

    Returns:
        x.

    Raises:
        TypeError: for a dtype no kernel takes.
        ValueError: for another shape or device, or columns that are not next to each other.
    """
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, DTYPES))}")
    if x.shape != shape:
        raise ValueError(f"{name} has the shape {list(x.shape)}, expected {list(shape)}")
    if x.device != like.device:
        raise ValueError(f"{name} is on {x.device}, expected {like.device}")
    if x.strides[1] != 1 and shape[1] != 1:
        raise ValueError(
            f"{name} has the strides {x.strides}, expected a last one of 1: make it contiguous"
        )
    return x


def stride(x: Layout | None) -> int:
    """From row to row; 0 where there is nothing."""
    return 0 if x is None else x.strides[0]


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


_HERE: AbstractContextManager[None] = contextlib.nullcontext()


def on_device(x: Tensor) -> AbstractContextManager[None]:
    """Launch where x is: Triton itself launches on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return _HERE


def describable(x: Layout) -> bool:
    """Whether a tensor descriptor can describe x: last stride 1, the rest multiples of 16 bytes and
    not 0, and something in it."""
    *strides, last = x.strides
    if last != 1 or x.offset or not math.prod(x.shape):
        return False
    return not any(stride <= 0 or stride * x.dtype.itemsize % 16 for stride in strides)


#: The fields of a descriptor, but for the tensor.
Described = dict[str, Any]


def described(x: Layout, *block: int) -> Described:
    """A `describable` x, to be loaded in blocks of that shape."""
    sizes = {"shape": list(x.shape), "strides": list(x.strides), "block_shape": list(block)}
    return {**DESCRIPTOR_DEFAULTS, **sizes}


def operand(x: Tensor | None, how: Described | None) -> Tensor | TensorDescriptor | None:
    """x as a kernel takes it: as a descriptor, or as it is.

    Made without Triton's own checks, which cost more than the rest of a launch.
    """
    if how is None:
        return x
    made = object.__new__(TensorDescriptor)
    made.__dict__ = {"base": x, **how}
    return made


def dot_precision(dtype: torch.dtype) -> str:
    """fp32 operands are multiplied as fp32; it says nothing for shorter ones."""
    return "ieee" if dtype == torch.float32 else "tf32"


#: Triton's names of the dtypes.
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
