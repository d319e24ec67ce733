"""Triton's interpreter with the bfloat16 of the hardware: products of its values, and casts that round to nearest.

As it comes, it multiplies the bits of bfloat16 as integers, and cuts float32 off.
"""

from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_dot, _cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl


def use_exact_bfloat16() -> None:
    """For the whole process."""
    InterpreterBuilder.create_dot = _exact_dot
    InterpreterBuilder.cast_impl = _exact_cast


def _exact_dot(self: Any, a: TensorHandle, b: TensorHandle, *rest: Any) -> TensorHandle:
    return _dot(self, _widened(a), _widened(b), *rest)


def _exact_cast(self: Any, x: TensorHandle, dtype: Any) -> TensorHandle:
    if (x.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
        rounded = torch.from_numpy(np.array(x.data, dtype=np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
    if (x.dtype.scalar, dtype.scalar) == (tl.bfloat16, tl.float32):
        return _widened(x)
    return _cast(self, x, dtype)


def _widened(x: TensorHandle) -> TensorHandle:
    if x.dtype.scalar != tl.bfloat16:
        return x
    return TensorHandle((np.asarray(x.data).astype(np.uint32) << 16).view(np.float32), tl.float32)
