"""The op against float64 on hostile shapes and values, in every instruction set that this CPU runs."""

import pytest
import torch

from exactness import check_exactness
from horsepower.kernels.activation import ACTIVATION, KINDS, native, native_supports, outputs, reference
from horsepower.kernels.native_library import ISAS

F32, BF16 = torch.float32, torch.bfloat16
TAILS = {  # the same functions, written so that nothing cancels
    "gelu": lambda x: x * torch.erfc(-x * 0.5**0.5) / 2,
    "gelu_tanh": lambda x: x * torch.sigmoid(2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)),
}


def values(rows, columns, dtype=BF16, scale=4.0):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)) * scale).to(dtype)


def run(isa, u, kind, dtype):
    """Outputs are poisoned first: what is not written shows."""
    out = outputs(u, kind, dtype)
    out[0].fill_(torch.nan)
    native(out, None, u, kind, dtype, isa)
    return out[0]


def check(isa, u, kind, dtype):
    exact = reference(u.double(), kind, torch.float64)[0]
    check_exactness(run(isa, u, kind, dtype), reference(u, kind, dtype)[0], exact)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("columns", [0, 2, 14, 32, 34, 2 * 257, 1360])
def test_odd_and_prime_sizes(isa, kind, rows, columns):
    check(isa, values(rows, columns), kind, BF16)
    if kind == "gelu7":
        check(isa, values(rows, columns + 1), kind, BF16)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("u_dtype", [F32, BF16])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_dtypes(isa, kind, u_dtype, dtype):
    check(isa, values(13, 250, u_dtype), kind, dtype)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1e-42, 1e-37, 1e-20, 1e-3, 30, 1e4, 1e37])
def test_tiny_and_huge(isa, kind, scale):
    check(isa, values(9, 100, F32, scale), kind, F32)


@pytest.mark.parametrize("isa", ISAS)
def test_every_value_is_close_not_only_their_norm(isa):
    """As eager: from where the sigmoid leaves float32 up to the clamp, within the rounding of 1.702 z itself."""
    z = torch.linspace(-51.5, 9, 200_001)[None]
    exact = reference(z.double(), "gelu7", torch.float64)[0]
    error = ((run(isa, z, "gelu7", F32) - exact) / exact).abs()
    assert (error <= 5e-7 + 1e-7 * (1.702 * z).abs()).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("kind", "relative", "low"), [("gelu", 3e-6, -5), ("gelu_tanh", 3e-6, -4), ("silu", 1e-6, -50)]
)
def test_every_value_of_a_plain_activation_is_close(isa, kind, relative, low):
    """Where eager loses digits to 1 + erf and 1 + tanh, too."""
    z = torch.linspace(low, 20, 200_001)[None]
    exact = reference(z.double(), kind, torch.float64)[0]
    error = ((run(isa, z, kind, F32) - exact) / exact.where(exact != 0, 1)).abs()
    assert (error <= relative).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_rows(isa, kind):
    u = values(12, 64).unflatten(0, (3, 4))
    assert torch.equal(run(isa, u, kind, BF16), run(isa, u.flatten(0, 1), kind, BF16).unflatten(0, (3, 4)))
    check(isa, values(12, 64).unflatten(0, (3, 4))[:, :, 2:40], kind, F32)


@pytest.mark.parametrize("isa", ISAS)
def test_every_bfloat16_is_as_in_eager(isa):
    """NaN, infinities, zeros and denormals included; to one rounding."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(BF16)
    pairs = torch.stack((every, every.flip(0)), dim=1).view(256, -1)
    plain = [(every[None], kind) for kind in KINDS if kind != "swiglu7"]
    for u, kind in (*plain, (pairs, "swiglu7"), (pairs.flip(1), "swiglu7")):
        got, eager = run(isa, u, kind, F32), reference(u, kind, F32)[0]
        if kind in TAILS:  # eager loses all digits of the left tail, and gelu(inf)
            eager = TAILS[kind](u.double()).float()
        assert torch.equal(got.isnan(), eager.isnan())
        torch.testing.assert_close(got, eager, rtol=5e-5, atol=2e-37, equal_nan=True)
        assert torch.equal(run(isa, u, kind, BF16).isnan(), eager.isnan())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_strided_rows(isa, kind, dtype):
    """From an odd column on: a pair need not be aligned."""
    check(isa, values(22, 131, dtype)[::2, 1:67], kind, BF16)


def test_the_kernel_is_what_the_registered_op_runs():
    u = values(6, 40)
    for kind in KINDS:
        torch.library.opcheck(torch.ops.horsepower.activation.default, (u, kind, BF16))
        assert torch.equal(torch.ops.horsepower.activation(u, kind, BF16), run(ISAS[0], u, kind, BF16))


@pytest.mark.parametrize(
    ("u", "dtype", "reason"),
    [
        (torch.ones(2, 3, 8)[:, :2], F32, "its rows are not equally far apart"),
        (torch.ones(8, 4).T, F32, "the last dimension is not contiguous"),
        (torch.ones(4, 8, dtype=torch.float64), F32, "neither float32 nor bfloat16"),
        (torch.ones(4, 8), torch.float64, "neither float32 nor bfloat16"),
    ],
)
def test_what_the_kernel_does_not_take_goes_to_the_reference(u, dtype, reason):
    assert native_supports(u, "swiglu7", dtype) == reason
    torch.testing.assert_close(ACTIVATION(u, "swiglu7", dtype), reference(u, "swiglu7", dtype))


def test_wrong_inputs_name_the_field():
    with pytest.raises(ValueError, match="^u: got 7 columns"):
        ACTIVATION(torch.ones(2, 7), "swiglu7", F32)
    with pytest.raises(ValueError, match="^kind: got 'relu'"):
        ACTIVATION(torch.ones(2, 8), "relu", F32)


def test_cost_counts_each_tensor_once():
    gated, plain = (ACTIVATION.cost(values(10, 64), kind, F32) for kind in ("swiglu7", "gelu7"))
    assert (gated.bytes, gated.flops) == (640 * 2 + 320 * 4, 3200)
    assert (plain.bytes, plain.flops) == (640 * 2 + 640 * 4, 3840)
