"""Triton's interpreter with the bfloat16 and e4m3 of the hardware: products of values, casts that round to nearest.

As it comes, it multiplies the bits of bfloat16 as integers, and cuts float32 off. In a cast to e4m3 it rounds ties away
from even, loses the carry from the mantissa into the exponent (124 becomes 64), and wraps what is too large.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot, _multiply = InterpreterBuilder.create_dot, InterpreterBuilder.create_fmul
_cast, _convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
NARROW = {tl.bfloat16: (torch.bfloat16, np.uint16), tl.float8e4nv: (torch.float8_e4m3fn, np.uint8)}  # as bits


def use_exact_narrow_floats() -> None:
    """For the whole process."""
    InterpreterBuilder.create_dot = _exact_dot
    InterpreterBuilder.create_fmul = _exact_multiply
    InterpreterBuilder.cast_impl = _exact_cast
    InterpreterBuilder.create_fp_to_fp = _exact_conversion


def _exact_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _dot(self, _widened(a), _widened(b), *rest)


def _exact_multiply(self: Any, a: TensorHandle, b: TensorHandle) -> TensorHandle:
    made = _multiply(self, _widened(a), _widened(b))
    return _converted(made, tl.bfloat16) if a.dtype.scalar == tl.bfloat16 else made


def _exact_cast(self: Any, x: TensorHandle, dtype: Any) -> TensorHandle:
    return _converted(x, dtype) if _known(x, dtype) else _cast(self, x, dtype)


def _exact_conversion(self: Any, x: TensorHandle, dtype: Any, rounding: Any) -> TensorHandle:
    return _converted(x, dtype) if _known(x, dtype) else _convert(self, x, dtype, rounding)


def _known(x: TensorHandle, dtype: Any) -> bool:
    both = {x.dtype.scalar, dtype.scalar}
    return tl.float32 in both and not both.isdisjoint(NARROW)


def _converted(x: TensorHandle, dtype: Any) -> TensorHandle:
    """Between float32 and what is narrow."""
    if dtype.scalar == tl.float32:
        return _widened(x)
    narrow, bits = NARROW[dtype.scalar]
    wide = torch.from_numpy(np.array(x.data, dtype=np.float32))
    if dtype.scalar == tl.float8e4nv:  # as cvt.satfinite
        wide = wide.clamp(-448, 448)
    return TensorHandle(wide.to(narrow).view(getattr(torch, np.dtype(bits).name)).numpy(), dtype.scalar)


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar not in NARROW:
        return x
    narrow, bits = NARROW[x.dtype.scalar]
    wide = torch.from_numpy(np.array(x.data, dtype=bits)).view(narrow).float()
    return TensorHandle(wide.numpy(), tl.float32)
