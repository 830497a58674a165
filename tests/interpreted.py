"""Triton's interpreter, made right for bf16 and fp8.

The interpreter stores bf16 as 16-bit integers and fp8 as bytes. Its casts truncate (bf16) or round
half up without carry (fp8), and `tl.dot` and arithmetic work on the raw bits of a bf16 operand:
silently wrong. Here PyTorch does the casts, dots are computed in fp32, and arithmetic on bf16 or
fp8, which no kernel of ours asks for, is an error.

Triton 3.6 also cannot loop up to a run-time bound with NumPy 2.4 and newer.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

#: Types the interpreter keeps as integers: with PyTorch's type, and integers of that size.
PACKED = {
    tl.bfloat16: (torch.bfloat16, torch.int16, np.uint16),
    tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8, np.uint8),
}


def _unpack(handle):
    """The numbers of a tensor, in fp32 where it holds packed ones."""
    scalar = handle.dtype.scalar
    if scalar not in PACKED:
        return handle.data
    real, bits, _ = PACKED[scalar]
    data = np.ascontiguousarray(handle.data)
    signed = data.view(np.int16) if bits == torch.int16 else data
    return torch.from_numpy(signed).view(real).float().numpy()


def _pack(values, scalar):
    """fp32 numbers as the bits of a packed type, rounded to nearest even."""
    real, bits, stored = PACKED[scalar]
    values = torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32))
    return values.to(real).view(bits).numpy().view(stored)


def install():
    """Patch the interpreter of this process."""
    builder = InterpreterBuilder
    plain_cast, plain_fp = builder.cast_impl, builder.create_fp_to_fp
    plain_dot, plain_binary = builder.create_dot, builder.binary_op

    def cast(self, source, target, plain):
        if source.dtype.scalar == target.scalar:
            return source
        if target.scalar in PACKED:
            return TensorHandle(_pack(_unpack(source), target.scalar), target.scalar)
        if source.dtype.scalar in PACKED:
            dtype = interpreter._get_np_dtype(target)
            return TensorHandle(_unpack(source).astype(dtype), target.scalar)
        return plain()

    def cast_impl(self, source, target):
        return cast(self, source, target, lambda: plain_cast(self, source, target))

    def create_fp_to_fp(self, source, target, rounding):
        return cast(self, source, target, lambda: plain_fp(self, source, target, rounding))

    def create_dot(self, a, b, d, precision, imprecise):
        if a.dtype.scalar in PACKED or b.dtype.scalar in PACKED:
            product = np.matmul(_unpack(a), _unpack(b), dtype=np.float32)
            return TensorHandle(product + d.data, d.dtype.scalar)
        return plain_dot(self, a, b, d, precision, imprecise)

    def binary_op(self, left, right, op):
        if left.dtype.scalar in PACKED or right.dtype.scalar in PACKED:
            raise TypeError(f"{op.__name__} of {left.dtype} and {right.dtype}: cast to fp32 first")
        return plain_binary(self, left, right, op)

    builder.cast_impl = cast_impl
    builder.create_fp_to_fp = create_fp_to_fp
    builder.create_dot = create_dot
    builder.binary_op = binary_op
    for name in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
        setattr(builder, f"create_{name}", cast_impl)

    plain_patch = interpreter._patch_lang_tensor

    def patch_lang_tensor(tensor, *args):
        result = plain_patch(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.item())
        return result

    interpreter._patch_lang_tensor = patch_lang_tensor
