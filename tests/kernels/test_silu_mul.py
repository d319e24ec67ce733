"""The op against float64 on hostile shapes and values, in every instruction set that this CPU runs."""

import pytest
import torch

from exactness import check_exactness
from horsepower.kernels.native_library import ISAS
from horsepower.kernels.silu_mul import SILU_MUL, native, native_supports, outputs, reference

F32, BF16 = torch.float32, torch.bfloat16


def values(*shape, dtype=BF16, scale=4.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def run(isa, gate, up, dtype):
    """Outputs are poisoned first: what is not written shows."""
    out = outputs(gate, up, dtype)
    out[0].fill_(torch.nan)
    native(out, None, gate, up, dtype, isa)
    return out[0]


def check(isa, gate, up, dtype):
    exact = reference(gate.double(), up.double(), torch.float64)[0]
    check_exactness(run(isa, gate, up, dtype), reference(gate, up, dtype)[0], exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (7, 14), (3, 257), (2, 5, 34), (4, 0)])
@pytest.mark.parametrize("x_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_odd_sizes_and_dtypes(isa, shape, x_dtype, dtype):
    check(isa, values(*shape, dtype=x_dtype), values(*shape, dtype=x_dtype, scale=1.0), dtype)


@pytest.mark.parametrize("isa", ISAS)
def test_the_halves_of_one_projection(isa):
    both = values(2, 6, 70, dtype=F32)
    check(isa, *both.chunk(2, dim=-1), F32)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [1e-42, 1e-20, 30, 1e4, 1e18])
def test_tiny_and_huge(isa, scale):
    check(isa, values(9, 100, dtype=F32, scale=scale), values(9, 100, dtype=F32), F32)


@pytest.mark.parametrize("isa", ISAS)
def test_every_bfloat16_is_as_in_eager(isa):
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)[None]
    got, eager = (
        f(every, torch.ones_like(every)) for f in (lambda *x: run(isa, *x, F32), lambda *x: reference(*x, F32)[0])
    )
    assert torch.equal(got.isnan(), eager.isnan())
    torch.testing.assert_close(got, eager, rtol=2e-5, atol=2e-37, equal_nan=True)


def test_the_kernel_is_what_the_registered_op_runs():
    gate, up = values(6, 40), values(6, 40, scale=2.0)
    torch.library.opcheck(torch.ops.horsepower.silu_mul.default, (gate, up, BF16))
    assert torch.equal(torch.ops.horsepower.silu_mul(gate, up, BF16), run(ISAS[0], gate, up, BF16))


@pytest.mark.parametrize(
    ("x", "dtype", "reason"),
    [
        (torch.ones(2, 3, 8)[:, :2], F32, "their rows are not equally far apart"),
        (torch.ones(8, 4).T, F32, "the last dimension is not contiguous"),
        (torch.ones(4, 8, dtype=torch.float64), F32, "neither float32 nor bfloat16"),
        (torch.ones(4, 8), torch.float64, "neither float32 nor bfloat16"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(x, dtype, reason):
    assert native_supports(x, x, dtype) == reason
    torch.testing.assert_close(SILU_MUL(x, x, dtype), reference(x, x, dtype))


def test_wrong_inputs_name_the_field():
    with pytest.raises(ValueError, match=r"^up: got \[2, 8\]"):
        SILU_MUL(torch.ones(2, 7), torch.ones(2, 8), F32)


def test_cost_counts_each_tensor_once():
    cost = SILU_MUL.cost(values(10, 64), values(10, 64), F32)
    assert (cost.bytes, cost.flops) == (640 * 8, 3200)
