"""The Triton kernel against float64 on hostile shapes: on a GPU, or else in Triton's interpreter."""

import pytest
import torch
from tiles import BF16, BOTH, F16, F32, FP8, codes, config, normal

from gpu import DEVICE, check
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu import linear
from horsepower.kernels.linear import LINEAR

ALL = [*BOTH, config(1, columns=32, MORE=16)]


def inputs(rows, depth, columns, experts=1, counts=()):
    """All arguments of the op."""
    return [normal(rows, depth), normal(experts * columns, depth, seed=2), experts, list(counts)]


@pytest.mark.parametrize("config", ALL, ids=str)
@pytest.mark.parametrize(
    ("rows", "depth", "columns"), [(0, 16, 16), (1, 16, 16), (1, 1, 1), (17, 31, 33), (53, 8, 47), (32, 48, 32)]
)
def test_odd_and_prime_sizes(config, rows, depth, columns):
    check(LINEAR, linear, *inputs(rows, depth, columns), config=config)


@pytest.mark.parametrize("config", ALL, ids=str)
@pytest.mark.parametrize("counts", [(20, 3, 17), (40, 0, 0), (0, 0, 40), (0, 39, 1), (16, 0, 24), (0, 0, 0)])
def test_a_weight_for_each_modality(config, counts):
    check(LINEAR, linear, *inputs(sum(counts), 24, 21, 3, counts), config=config)


@pytest.mark.parametrize("tma", [0, 1])
def test_tiles_that_are_not_square(tma):
    check(LINEAR, linear, *inputs(70, 40, 50, 3, (33, 1, 36)), config=config(tma, 32, 16, 32))
    check(LINEAR, linear, *inputs(70, 40, 50), config=config(tma, 16, 32, 32))


@pytest.mark.parametrize("config", ALL, ids=str)
def test_strided_rows_and_a_padded_result(config):
    x, weight, *rest = inputs(19, 64, 21)
    x, weight = x[:, 8:48], weight[:, 16:56]
    check(LINEAR, linear, x, weight, *rest, config=config)
    out = torch.full((19, 32), torch.nan, dtype=x.dtype, device=DEVICE)
    linear.run((out[:, :21],), None, x, weight, *rest, config=config)
    assert torch.equal(out[:, :21], check(LINEAR, linear, x, weight, *rest, config=config)[0])
    assert out[:, 21:].isnan().all()


def test_rows_of_one_modality_do_not_meet_those_of_another():
    counts = (5, 7, 4)
    x, weight, *rest = inputs(16, 24, 21, 3, counts)
    x[5:12] = torch.nan
    (out,) = LINEAR.outputs(x, weight, *rest)
    linear.run((out,), None, x, weight, *rest, config=BOTH[0])
    assert torch.equal(out.isnan().any(dim=1).nonzero()[:, 0].cpu(), torch.arange(5, 12))


def of_codes(rows, depth, columns, experts=1, counts=(), dtype=E4M3, static=False):
    """All arguments of the op, with e4m3 weights; x in `dtype`; static: no scales of x."""
    weight, weight_scale = codes(experts * columns, depth, seed=2)
    x, x_scale = codes(rows, depth) if dtype is E4M3 else (normal(rows, depth).to(dtype), None)
    if dtype is BF16:
        x = torch.cat((x, torch.full((rows, -depth % 8), torch.nan, dtype=dtype, device=DEVICE)), dim=1)[:, :depth]
    return [x, weight, experts, list(counts), None if static else x_scale, weight_scale]


SIZES = [(0, 16, 16), (1, 4, 1), (17, 36, 33), (53, 8, 47), (32, 96, 32)]


@pytest.mark.parametrize("config", FP8, ids=str)
@pytest.mark.parametrize(("rows", "depth", "columns"), [*SIZES, (1, 1, 1), (19, 31, 21)])
@pytest.mark.parametrize("static", [False, True])
def test_products_of_codes(config, rows, depth, columns, static):
    check(LINEAR, linear, *of_codes(rows, depth, columns, static=static), config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize(("rows", "depth", "columns"), SIZES)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_weights_alone_as_codes(config, rows, depth, columns, dtype):
    check(LINEAR, linear, *of_codes(rows, depth, columns, dtype=dtype), config=config)


@pytest.mark.parametrize("config", [*FP8, *BOTH], ids=str)
@pytest.mark.parametrize("counts", [(20, 3, 17), (40, 0, 0), (0, 39, 1), (0, 0, 0)])
def test_scales_for_each_modality(config, counts):
    dtype = E4M3 if config in FP8 else BF16
    check(LINEAR, linear, *of_codes(sum(counts), 24, 21, 3, counts, dtype), config=config)


@pytest.mark.parametrize("config", BOTH, ids=str)
@pytest.mark.parametrize("dtype", [BF16, F16])
def test_every_code_is_decoded_as_it_is(config, dtype):
    """Denormals and both zeros too; what is not a number stays so."""
    weight = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(E4M3).view(16, 16)
    one = torch.ones(16, 1, device=DEVICE)
    bytes_of = weight.view(torch.uint8)
    weight = torch.where(bytes_of % 128 == 127, 0, bytes_of).view(E4M3)
    (out,) = LINEAR.outputs(torch.eye(16, dtype=dtype, device=DEVICE), weight, 1, [], None, one)
    linear.run((out,), None, torch.eye(16, dtype=dtype, device=DEVICE), weight, 1, [], None, one, config=config)
    assert torch.equal(out.t().float(), weight.float())
    for code in (0x7F, 0xFF):
        for place in range(4):
            bad = weight.clone().view(torch.uint8)
            bad[3, 4 + place] = code
            linear.run((out,), None, torch.ones_like(out), bad.view(E4M3), 1, [], None, one, config=config)
            assert torch.equal(out.isnan().any(dim=0).nonzero()[:, 0].cpu(), torch.tensor([3]))


def test_strided_codes():
    x, weight, experts, counts, *scales = of_codes(19, 64, 21)
    check(LINEAR, linear, x[:, 16:48], weight[:, 16:48], experts, counts, *scales, config=FP8[0])
    check(LINEAR, linear, normal(19, 64)[:, 8:40], weight[:, 16:48], experts, counts, None, scales[1], config=BOTH[1])


def test_sums_of_codes_are_kept_in_float32():
    """With the 14 bits that FP8's own sums have on a GPU, the error would be a hundred times as large."""
    x, weight, *rest = of_codes(3, 4096, 5)
    out = torch.empty(3, 5, dtype=F32, device=DEVICE)
    linear.run((out,), None, x, weight, *rest, config=config(1, depth=256))
    exact = x.double() * rest[2] @ (weight.double() * rest[3]).t()
    assert float((out - exact).norm() / exact.norm()) < 1e-6


def test_what_the_kernel_does_not_take():
    x, weight, *rest = inputs(6, 24, 16)
    for other, reason in [
        (x.float(), "x is neither bfloat16 nor float16"),
        (x[None], "x has 3 dimensions"),
        (x[:, :0], "x has no columns"),
        (x[:, 1:], "its rows do not begin at multiples of 16 bytes"),
        (x[:, :23].contiguous(), "its rows do not begin at multiples of 16 bytes"),
        (x.T.contiguous().T, "its rows do not begin at multiples of 16 bytes"),
        (x[:1].expand(6, 24), "its rows do not begin at multiples of 16 bytes"),
    ]:
        assert linear.supports(other, weight, *rest) == reason
    x, weight, experts, counts, x_scale, weight_scale = of_codes(6, 24, 16)
    spread, half = torch.cat((x_scale, x_scale), dim=1)[:, :1], normal(6, 22)
    for arguments, reason in [
        ((x, weight, experts, counts, spread, weight_scale), "its scales are not contiguous"),
        ((x, weight, experts, counts, None, weight_scale[:1]), "the weight has one scale for all outputs"),
        ((x[:, 1:], weight[:, 1:], *rest, x_scale, weight_scale), "its rows do not begin at multiples of 16 bytes"),
        ((half, weight[:, :22], experts, counts, None, weight_scale), "22 codes a row are no multiple of 4"),
    ]:
        assert linear.supports(*arguments) == reason


def test_a_storage_that_begins_between_multiples_of_16_bytes():
    """Memory of other libraries may: descriptors would not be made of it."""
    x, weight, *rest = inputs(6, 24, 16)
    memory = torch.zeros(x.numel() * x.itemsize + 8, dtype=torch.uint8).numpy()
    other = torch.from_numpy(memory[8:]).view(x.dtype).view(x.shape)
    assert other.storage_offset() == 0
    assert other.data_ptr() % 16 == 8
    assert linear.supports(other, weight, *rest) == "its rows do not begin at multiples of 16 bytes"
