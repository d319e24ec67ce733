"""What the kernels that walk rows share: how rows are cut into programs and accesses, and which gain a row has.

A program takes a tile of ROWS x BLOCK, BLOCK the power of two that holds a row: read once, kept in registers, written
once. The width C is a compile-time constant: what lies outside then costs neither instructions nor wide accesses.
Kernels are not specialised on what changes with the prompt (rows, where modalities begin): one compilation serves all.
"""

import math
from collections.abc import Mapping

import torch
import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.native_library import pitch

WIDEST = 16384  # columns of a row that fit into the registers of a program


@triton.jit
def places(ROWS: tl.constexpr, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Rows [ROWS, 1] and columns [1, BLOCK] of this program; a thread takes VECTOR columns in one access."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    return row, tl.max_contiguous(tl.arange(0, BLOCK), VECTOR)[None, :]


@triton.jit
def shared_row(x, column, mask):
    """A row that every program reads, in float32: it is to stay in the caches while the others stream through."""
    return tl.load(x + column, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)


@triton.jit
def gain_of(gain, row, column, inside, second, third, C: tl.constexpr, EXPERTS: tl.constexpr):
    """The gain of each row, in float32: one for all, or that of the row's modality."""
    if EXPERTS > 1:
        own = shared_row(gain + ((row >= second).to(tl.int32) + (row >= third).to(tl.int32)) * C, column, inside)
    else:  # one return: the shapes differ
        own = shared_row(gain, column, column < C)
    return own


@triton.jit
def quantised(v):
    """Rows v [ROWS, BLOCK] of float32, zero outside, as e4m3 codes and scales [ROWS, 1], bit for bit as `quantise`.

    Magnitudes are compared as integers: that is one instruction for a warp, and a NaN is the largest. The cast, of
    the hardware, saturates.
    """
    LEAST: tl.constexpr = 27 << 23  # the bits of 2^-100
    bits = tl.max(v.to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1, keep_dims=True)
    largest = tl.maximum(bits, LEAST).to(tl.float32, bitcast=True)
    return (v * tl.div_rn(448.0, largest)).to(tl.float8e4nv), tl.div_rn(largest, 448.0)


@triton.jit
def store_codes(codes, scales, row, column, L, C: tl.constexpr, v):
    """Quantise and write rows v [ROWS, BLOCK]."""
    made, scale = quantised(v)
    tl.store(codes + row * C + column, made, mask=(row < L) & (column < C))
    tl.store(scales + row, scale, mask=row < L)


def refuses(*tensors: Tensor | None) -> str | None:
    """Why the row kernels cannot walk these tensors, or None."""
    for x in tensors:
        if x is None:
            continue
        if pitch(x) is None:
            return "its rows are not equally far apart"
        if x.stride(-1) != 1 and x.shape[-1] != 1:
            return "the last dimension is not contiguous"
        if x.dtype == torch.float64:
            return "float64"
    return None


def tile(C: int, config: Config, *tensors: Tensor) -> Mapping[str, int]:
    """The constants of `places` for rows of C columns; `tensors` are those that are read and written row by row.

    VECTOR fills 16 bytes of the widest dtype. Were it left to Triton, it would fill 16 bytes of the narrowest: float32
    would then be read in two halves of 32 bytes a thread, and pass through shared memory before it is written.
    """
    block = triton.next_power_of_2(C)
    rows = max(1, config.constants["TILE"] // block)
    return {"C": C, "ROWS": rows, "BLOCK": block, "VECTOR": min(block, 16 // max(x.itemsize for x in tensors))}


def step(*tensors: Tensor) -> int:
    """Elements, at most 16, of which the distance between rows is a multiple: accesses are as wide as that allows.

    Kernels are given distances in units of it, since Triton looks at no smaller power of two than 16.
    """
    return math.gcd(16, *(pitch(x) or 0 for x in tensors))
