"""Kernels whose rows leave in eight bits, bit for bit: on a GPU, or else in Triton's interpreter."""

import numpy as np
import pytest
import torch
from exact_float8 import VALUES, quantise
from tiles import BF16, F16, F32, codes, config, normal

from exactness import check_exactness
from gpu import DEVICE, widened, workspace
from horsepower.kernels.add_rms_norm import ADD_RMS_NORM
from horsepower.kernels.add_rms_norm_quantise import ADD_RMS_NORM_QUANTISE
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import (
    add_rms_norm,
    add_rms_norm_quantise,
    linear_add_rms_norm_quantise,
    rms_norm,
    rms_norm_quantise,
)
from horsepower.kernels.gpu import quantise as twin
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.linear_add_rms_norm_quantise import LINEAR_ADD_RMS_NORM_QUANTISE
from horsepower.kernels.quantise import QUANTISE
from horsepower.kernels.rms_norm import RMS_NORM
from horsepower.kernels.rms_norm_quantise import RMS_NORM_QUANTISE

EPS = 1e-6
SMALL = Config(warps=4, constants={"TILE": 64})  # of several rows and programs, short as the tests' tensors are
pytestmark = pytest.mark.filterwarnings("ignore:(invalid|divide|overflow):RuntimeWarning")  # of the interpreter


def run(op, module, *arguments, config=None):
    """What the twin writes into outputs that are poisoned."""
    assert module.supports(*arguments) is None
    outputs = op.outputs(*arguments)
    for out in outputs:
        (out.view(torch.uint8) if out.dtype is E4M3 else out).fill_(0x7F if out.dtype is E4M3 else torch.nan)
    module.run(outputs, workspace(op, *arguments), *arguments, config=config)
    return outputs


def same(got, x):
    """Whether codes and scales are those of x by the format's definition."""
    made, scales = (each.cpu() for each in got)
    want, want_scales = quantise(x.cpu())
    bad = want & 127 == 127
    assert torch.equal(made.float().isnan(), bad)  # the sign of NaN is free
    assert torch.equal(made.view(torch.uint8)[~bad], want[~bad])
    assert torch.equal(scales.nan_to_num(-1), want_scales.nan_to_num(-1))


def values(*shape, dtype=F32, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 13), (5, 64), (3, 257), (1, 16384)])
def test_rows_of_all_sizes(shape, dtype):
    x = values(*shape) * values(shape[0], 1, seed=2).exp2().pow(3)
    same(run(QUANTISE, twin, x.to(dtype), config=SMALL), x.to(dtype))


def test_every_tie_and_both_its_neighbours():
    """Of a row whose scale is one: all values, what lies halfway between them and beside that, of either sign."""
    ties = np.float32((VALUES[1:] + VALUES[:-1]) / 2)
    x = np.concatenate([np.nextafter(ties, np.float32(to)) for to in (0, 1e9)] + [ties, np.float32(VALUES)])
    x = torch.from_numpy(np.concatenate((x, -x))).to(DEVICE)
    got = run(QUANTISE, twin, x[None])
    assert got[1].item() == 1
    same(got, x[None])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_hostile_rows(dtype):
    """Zeros, denormals, the largest numbers, an outlier, NaN, an infinity, a constant."""
    x, limits = values(8, 60, dtype=dtype), torch.finfo(dtype)
    x[0] = 0
    x[1] *= limits.smallest_normal / 4
    x[2] = x[2].sign() * limits.max
    x[3, 7] = 1e30
    x[4, 5], x[5, 6] = torch.nan, -torch.inf
    x[6] = 0.1
    same(run(QUANTISE, twin, x, config=SMALL), x)
    same(run(QUANTISE, twin, x), x)


def test_coarse_values_and_strided_rows():
    x = values(64, 48, dtype=BF16)
    same(run(QUANTISE, twin, x[::2, 3:40], config=SMALL), x[::2, 3:40])


@pytest.mark.parametrize("dtype", [F32, BF16])
@pytest.mark.parametrize(("experts", "counts"), [(1, ()), (3, (5, 3, 4)), (3, (12, 0, 0)), (0, ())])
def test_normed_rows_are_never_rounded_before(dtype, experts, counts):
    """They are the codes of what the kernel that leaves in float32 gives."""
    for dim in (1, 33, 250):
        x = values(12, dim, dtype=dtype)
        x[4], x[7, 0] = 0, torch.nan
        gain = 1 + 0.3 * values(experts * dim) if experts else None
        arguments = (x, gain, max(experts, 1), list(counts), EPS)
        (normed,) = run(RMS_NORM, rms_norm, *arguments, F32, config=SMALL)
        same(run(RMS_NORM_QUANTISE, rms_norm_quantise, *arguments, config=SMALL), normed)


@pytest.mark.parametrize(("experts", "post_experts"), [(1, 0), (3, 1), (1, 3)])
@pytest.mark.parametrize("dim", [15, 250])
def test_sums_and_normed_rows(experts, post_experts, dim):
    residual, branch = values(13, dim), values(13, dim, dtype=BF16, seed=2)
    residual[6, 0] = torch.inf
    gains = [1 + 0.3 * values(n * dim, seed=n) if n else None for n in (post_experts, experts)]
    arguments = (residual, branch, *gains, [5, 2, 6], EPS)
    want, normed = run(ADD_RMS_NORM, add_rms_norm, *arguments, F32, config=SMALL)
    total, *got = run(ADD_RMS_NORM_QUANTISE, add_rms_norm_quantise, *arguments, config=SMALL)
    assert torch.equal(total.nan_to_num(), want.nan_to_num())
    same(got, normed)


WIDE = [config(1, columns=128, depth=32, PARTS=2), config(1, columns=128, depth=32, PARTS=2, MORE=128)]


@pytest.mark.parametrize("config", WIDE, ids=str)
@pytest.mark.parametrize(("experts", "counts"), [(1, ()), (3, (5, 0, 14)), (3, (0, 0, 0))])
@pytest.mark.parametrize("dtype", [E4M3, F16])
def test_projections_leave_as_codes(config, experts, counts, dtype):
    """The sum against float64; the codes bit for bit those of its norm."""
    rows, depth, columns = sum(counts) if experts == 3 else 19, 40, 172
    weight, weight_scale = codes(experts * columns, depth, seed=2)
    x, x_scale = codes(rows, depth) if dtype is E4M3 else (normal(rows, depth), None)
    if dtype is F16 and "MORE" in config.constants:
        weight, weight_scale = normal(experts * columns, depth, seed=2), None
    residual, gain = values(rows, columns), 1 + 0.3 * values(experts * columns)
    arguments = (x, weight, experts, residual, None, gain, list(counts), EPS, x_scale, weight_scale)
    total, *got = run(LINEAR_ADD_RMS_NORM_QUANTISE, linear_add_rms_norm_quantise, *arguments, config=config)
    eager = LINEAR_ADD_RMS_NORM_QUANTISE.reference(*arguments)
    exact, *_ = LINEAR_ADD_RMS_NORM_QUANTISE.reference(*widened(LINEAR_ADD_RMS_NORM_QUANTISE, *arguments))
    check_exactness(total, eager[0], exact)
    same(got, run(RMS_NORM, rms_norm, total, gain, experts, list(counts), EPS, F32)[0])


def test_what_the_kernels_do_not_take():
    x, gain = values(6, 16385), values(16385)
    reason = "a row does not fit into registers"
    assert twin.supports(x) == rms_norm_quantise.supports(x, gain, 1, [], EPS) == reason
    assert add_rms_norm_quantise.supports(x, x, None, gain, [], EPS) == reason
    none = x[:, :0]
    assert twin.supports(none) == rms_norm_quantise.supports(none, gain[:0], 1, [], EPS) == "there are no columns"
    assert twin.supports(x.double()[:, :8]) == "float64"
    assert twin.supports(x[:, :8].T) == "the last dimension is not contiguous"
    weight, weight_scale = codes(24, 32)
    x, x_scale = codes(6, 32)
    arguments = (x, weight, 1, values(6, 24), gain[:24], gain[:24], [], EPS, x_scale, weight_scale)
    assert linear_add_rms_norm_quantise.supports(*arguments).startswith("the branch is normed before it is added")
