"""What the elementwise kernels share: how tensors are cut into programs, and the gated unit itself."""

import math
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.native_library import pitch

LOG2_E = tl.constexpr(math.log2(math.e))


@triton.jit
def piece(vectors, pieces, BLOCK: tl.constexpr, VECTOR: tl.constexpr):
    """Of this program: its row, its first column, and how many columns are left from there."""
    program = tl.program_id(0).to(tl.int64)
    first = program % pieces * BLOCK
    return program // pieces, first, tl.cast(vectors, tl.int64) * VECTOR - first


@triton.jit
def gated(z, SLOPE: tl.constexpr):
    """z * sigmoid(SLOPE z), z in float32: of -inf NaN, as the product in eager is."""
    return z / (1 + tl.exp2(z * (-SLOPE * LOG2_E)))


class Rows(NamedTuple):
    """Where the rows of a tensor lie: after `start` vectors from `base`, `step` vectors apart."""

    base: Tensor  # at a multiple of 16 bytes: Triton knows of no other
    start: int
    step: int


class Cut(NamedTuple):
    """Tensors as rows, rows as pieces of `block` columns, a piece a program, `vector` columns an access."""

    grid: tuple[int]
    inputs: tuple[Rows, ...]
    vectors: int  # in a row
    pieces: int  # in a row
    block: int
    vector: int


def cut(config: Config, out: Tensor, *inputs: Tensor, ratio: int = 1) -> Cut:
    """Inputs of one shape are cut by their columns, of which `ratio` make one of `out`; a program takes TILE at most.

    Contiguous tensors are one row, which no odd width and no tail breaks up. An access is 16 bytes of the widest
    dtype, or as much less as addresses, distances between rows, and columns demand.
    """
    whole = all(x.is_contiguous() for x in inputs)
    columns = inputs[0].numel() if whole else inputs[0].shape[-1]
    block = min(config.constants["TILE"], triton.next_power_of_2(columns))
    steps = [0 if whole else pitch(x) or 0 for x in inputs]
    aligned = [math.gcd(16, x.data_ptr(), n * x.itemsize) // x.itemsize for x, n in zip(inputs, steps, strict=True)]
    vector = math.gcd(columns, ratio * 16 // out.itemsize, *aligned)
    rows = tuple(_rows(x, step, vector) for x, step in zip(inputs, steps, strict=True))
    pieces = triton.cdiv(columns, block)
    return Cut((inputs[0].numel() // columns * pieces,), rows, columns // vector, pieces, block, vector)


def _rows(x: Tensor, step: int, vector: int) -> Rows:
    over = x.data_ptr() % 16 // x.itemsize
    base = x.as_strided((1,), (1,), x.storage_offset() - over) if 0 < over <= x.storage_offset() else x
    return Rows(base, over // vector if base is not x else 0, step // vector)
