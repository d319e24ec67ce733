"""The Triton kernel against float64 on hostile shapes: on a GPU, or else in Triton's interpreter."""

import pytest
import torch
from tiles import BOTH, config, normal

from gpu import DEVICE, check
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


def test_a_storage_that_begins_between_multiples_of_16_bytes():
    """Memory of other libraries may: descriptors would not be made of it."""
    x, weight, *rest = inputs(6, 24, 16)
    memory = torch.zeros(x.numel() * x.itemsize + 8, dtype=torch.uint8).numpy()
    other = torch.from_numpy(memory[8:]).view(x.dtype).view(x.shape)
    assert other.storage_offset() == 0
    assert other.data_ptr() % 16 == 8
    assert linear.supports(other, weight, *rest) == "its rows do not begin at multiples of 16 bytes"
