"""Codes and scales, bit for bit, against the format's definition in float64."""

import numpy as np
import pytest
import torch
from exact_float8 import VALUES, encode, quantise

from horsepower.kernels.float8 import E4M3, codes_of
from horsepower.kernels.ops import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


def check(x):
    codes, scales = ops.quantise(x)
    assert (codes.dtype, scales.dtype, scales.shape) == (E4M3, torch.float32, (len(x), 1))
    want, want_scales = quantise(x)
    numbers = ~torch.from_numpy(np.isnan(codes.double().numpy()))
    assert torch.equal(codes.view(torch.uint8)[numbers], want[numbers])
    assert torch.equal(want[~numbers] & 127, torch.full_like(want[~numbers], 127))  # the sign of NaN is free
    assert torch.equal(scales.nan_to_num(-1), want_scales.nan_to_num(-1))


def test_the_table_is_the_format():
    every = torch.arange(127, dtype=torch.uint8).view(E4M3).double()
    assert torch.equal(every, torch.from_numpy(VALUES))


def test_every_tie_and_both_its_neighbours():
    """Also halfway to the smallest value, and between the largest and what would come next."""
    ties = np.concatenate(((VALUES[1:] + VALUES[:-1]) / 2, [464.0, 1e6]))
    x = np.concatenate([np.nextafter(np.float32(ties), np.float32(to)) for to in (0, 1e9)] + [ties, VALUES, [np.nan]])
    x = np.concatenate((x, -x))
    got = codes_of(torch.from_numpy(np.float32(x)), 1.0).view(torch.uint8).numpy()
    assert (got[~np.isnan(x)] == encode(x)[~np.isnan(x)]).all()
    assert (got[np.isnan(x)] & 127 == 127).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (7, 13), (3, 5120), (0, 8), (5, 0)], ids=str)
def test_random_rows_of_all_sizes(dtype, shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator) * torch.randn(shape[0], 1, generator=generator).exp2().pow(3)
    check(x.to(dtype))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hostile_rows(dtype):
    """Zeros, denormals, one outlier, the largest numbers, NaN, infinities, a constant."""
    limits = torch.finfo(dtype)
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[0] = 0
    rows[1] *= limits.smallest_normal / 4
    rows[2, 3] = 1e4
    rows[3] = rows[3].sign() * limits.max
    rows[4, 5] = torch.nan
    rows[5, 6] = -torch.inf
    rows[6] = 0.1
    check(rows)
    codes, scales = ops.quantise(rows)
    assert not codes[0].double().any()
    assert scales[[4, 5], 0].isfinite().logical_not().all()


def test_many_values_of_one_binade():
    """A float32 product is rounded once more on its way: where that meets a tie, the definition says what is right."""
    x = torch.linspace(1, 2, 200_001).view(3, -1)
    check(x)


def test_many_rows_of_coarse_values():
    """They meet ties often: an inverse that is rounded twice shows."""
    check(torch.randn(4000, 32, generator=torch.Generator().manual_seed(3)).bfloat16())


def test_a_row_is_a_code_times_a_scale():
    """The largest value exactly, the others to 2^-4."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    codes, scales = ops.quantise(x)
    back = codes.float() * scales
    largest = x.abs().argmax(1, keepdim=True)
    assert torch.allclose(back.gather(1, largest), x.gather(1, largest), rtol=2**-22)
    assert ((back - x).abs() <= (x.abs() / 16).clamp(min=scales * 2**-10)).all()


@pytest.mark.parametrize(
    "x",
    [torch.zeros(4), *(torch.zeros(2, 2).to(dtype) for dtype in (torch.int32, E4M3, torch.float8_e5m2))],
)
def test_what_is_refused(x):
    with pytest.raises(ValueError, match="x: got .*, allowed: "):
        ops.quantise(x)
