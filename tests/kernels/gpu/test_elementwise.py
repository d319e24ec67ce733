"""How tensors are cut for the elementwise kernels."""

import pytest
import torch
import triton
import triton.language as tl

from gpu import DEVICE
from horsepower.kernels.gpu.elementwise import cut, piece
from horsepower.kernels.gpu.launch import Config

CONFIG = Config(warps=4, constants={"TILE": 64})


@triton.jit
def _piece_kernel(out, vectors, pieces, block: tl.constexpr, vector: tl.constexpr):
    row, first, left = piece(vectors, pieces, block, vector)
    if tl.program_id(0) == 2:
        tl.store(out + 0, row)
        tl.store(out + 1, first)
        tl.store(out + 2, left)


@pytest.mark.parametrize(("vectors", "pieces"), [(1, 1), (2**29, 3), (2**29 + 1, 2)])
def test_more_columns_than_an_int32_counts(vectors, pieces):
    out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    _piece_kernel[(3,)](out, vectors, pieces, block=64, vector=8)
    first = 2 % pieces * 64
    assert out.tolist() == [2 // pieces, first, 8 * vectors - first]


@pytest.mark.parametrize(
    ("columns", "first", "width", "dtype", "vector"),
    [
        (13652, 0, 13652, torch.bfloat16, 8),  # contiguous: odd rows do not matter
        (27304, 0, 13652, torch.bfloat16, 4),
        (27304, 13652, 13652, torch.bfloat16, 4),
        (27304, 8, 13656, torch.bfloat16, 8),
        (27304, 2, 13654, torch.bfloat16, 2),
        (27304, 1, 13652, torch.bfloat16, 1),
        (20480, 0, 20480, torch.float32, 4),
    ],
)
def test_accesses_are_as_wide_as_the_alignment_allows(columns, first, width, dtype, vector):
    x = torch.empty(4, columns, dtype=dtype)[:, first : first + width]
    found = cut(CONFIG, torch.empty(x.shape, dtype=dtype), x)
    assert found.vector == vector
    base, start, step = found.inputs[0]
    assert base.data_ptr() % 16 == 0
    assert base.data_ptr() + start * vector * x.itemsize == x.data_ptr()
    assert step * vector in (0, x.stride(0))
    assert found.grid[0] * 64 >= x.numel()
    assert found.vectors * vector * (1 if step == 0 else 4) == x.numel()
