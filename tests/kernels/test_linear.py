"""Matrix products by modality, and the ops that begin with one."""

import pytest
import torch

from horsepower.kernels.activation import ACTIVATION, FP8_GAINS
from horsepower.kernels.float8 import E4M3, codes_of
from horsepower.kernels.linear import LINEAR, scaled
from horsepower.kernels.linear_activation import LINEAR_ACTIVATION
from horsepower.kernels.linear_add_rms_norm import LINEAR_ADD_RMS_NORM
from horsepower.kernels.linear_add_rms_norm_quantise import LINEAR_ADD_RMS_NORM_QUANTISE
from horsepower.kernels.linear_qk_norm_rope import LINEAR_QK_NORM_ROPE
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import OPS
from recordings import relative_error

BF16, F64 = torch.bfloat16, torch.float64
COUNTS = [(5, 3, 4), (12, 0, 0), (0, 0, 12), (1, 11, 0)]


def normal(*shape, dtype=BF16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).to(dtype)


def exact(arguments):
    return [x.double() if isinstance(x, torch.Tensor) else F64 if x is BF16 else x for x in arguments]


@pytest.mark.parametrize("dtype", [torch.float32, BF16, F64])
@pytest.mark.parametrize("counts", COUNTS)
def test_each_modality_meets_its_own_weight(dtype, counts):
    x, weight = normal(12, 7, dtype=dtype), normal(3 * 5, 7, dtype=dtype)
    (got,) = LINEAR(x, weight, 3, counts)
    starts = (0, counts[0], counts[0] + counts[1])
    for start, count, own in zip(starts, counts, weight.double().chunk(3), strict=True):
        want = x.double()[start : start + count] @ own.t()
        torch.testing.assert_close(got.double()[start : start + count], want, rtol=0.02, atol=0.02)


def test_leading_dimensions_go_to_the_reference():
    x, weight = normal(2, 3, 7), normal(5, 7)
    assert LINEAR.kernels[0].supports(x, weight, 1, []) == "x has 3 dimensions"
    assert torch.equal(LINEAR(x, weight, 1, [])[0], torch.nn.functional.linear(x, weight))
    torch.library.opcheck(torch.ops.horsepower.linear.default, (x, weight, 1, []))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight": torch.zeros(5, 6)}, "weight"),
        ({"weight": torch.zeros(5, 7, dtype=BF16)}, "weight"),
        ({"weight": torch.zeros(35)}, "weight"),
        ({"experts": 3, "counts": [1, 2, 1]}, "weight"),
        ({"experts": 0}, "experts"),
        ({"x": torch.zeros(2, 2, 7), "weight": torch.zeros(6, 7), "experts": 3, "counts": [1, 1, 0]}, "x"),
        ({"weight": torch.zeros(6, 7), "experts": 3, "counts": [1, 2]}, "counts"),
        ({"weight": torch.zeros(6, 7), "experts": 3, "counts": [1, 2, 2]}, "counts"),
    ],
)
def test_wrong_inputs_name_the_field(change, field):
    good = {"x": torch.zeros(4, 7), "weight": torch.zeros(5, 7), "experts": 1, "counts": []}
    with pytest.raises(ValueError, match=f"{field}: got"):
        LINEAR(*(good | change).values())


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("x_codes", [False, True])
def test_codes_are_multiplied_and_scaled(counts, x_codes):
    """Of both operands or of the weight alone; each modality's rows with the scales of its own weight."""
    x, (weight, weight_scale) = normal(12, 64), ops.quantise(normal(3 * 48, 64))
    x_scale = None
    if x_codes:
        x, x_scale = ops.quantise(x * torch.arange(1, 13)[:, None])
    (got,) = LINEAR(x, weight, 3, counts, x_scale, weight_scale)
    assert got.dtype == BF16
    true_x = x.double() if x_scale is None else x.double() * x_scale
    parts = zip(true_x.split(counts), (weight.double() * weight_scale).chunk(3), strict=True)
    want = torch.cat([rows @ own.t() for rows, own in parts])
    assert relative_error(got, want) < 2.0**-8
    if x_codes:
        library = torch.full_like(got, torch.nan)
        scaled((library,), None, x, weight, 3, counts, x_scale, weight_scale)
        assert relative_error(library, want) < 2.0**-8


def test_a_scale_of_x_may_be_folded_into_that_of_the_weight():
    x, (weight, weight_scale) = codes_of(normal(12, 64, dtype=torch.float32), 8), ops.quantise(normal(48, 64))
    (got,) = LINEAR(x, weight, 1, [], None, weight_scale / 8)
    assert relative_error(got, x.double() / 8 @ (weight.double() * weight_scale).t()) < 2.0**-8


@pytest.mark.parametrize("counts", COUNTS)
def test_a_scale_for_all_outputs_of_a_weight(counts):
    weight, weight_scale = ops.quantise_tensor(normal(3 * 48, 64) * torch.arange(1, 145)[:, None], 3)
    x = ops.to_codes(normal(12, 64), 100.0)
    (got,) = LINEAR(x, weight, 3, counts, None, weight_scale / 100)
    parts = zip(x.double().split(counts), weight.double().chunk(3), weight_scale / 100, strict=True)
    assert relative_error(got, torch.cat([rows @ own.t() * scale for rows, own, scale in parts])) < 2.0**-8
    library = torch.full_like(got, torch.nan)
    scaled((library,), None, x, weight, 3, counts, None, weight_scale / 100)
    assert relative_error(library, got) < 2.0**-8


def test_who_takes_codes():
    x, (weight, weight_scale) = normal(12, 64), ops.quantise(normal(48, 64))
    codes, x_scale = ops.quantise(x)
    library, scaled_mm = LINEAR.kernels[0], next(each for each in LINEAR.kernels if each.name == "scaled_mm")
    assert library.supports(x, weight, 1, [], None, weight_scale) == "the weight is quantised"
    assert scaled_mm.supports(x, weight, 1, [], None, weight_scale) == "x is not quantised"
    assert scaled_mm.supports(codes, weight, 1, [], x_scale, weight_scale) is None
    native = next(each for each in LINEAR.kernels if each.name == "native")
    shared = "the weight has one scale for all outputs"
    assert native.supports(x, weight, 1, [], None, weight_scale) is None
    assert native.supports(x, weight, 1, [], None, weight_scale[:1]) == shared
    odd = "a dimension of the weight is no multiple of 16"
    assert scaled_mm.supports(codes[:, :24], weight[:, :24], 1, [], x_scale, weight_scale) == odd
    assert scaled_mm.supports(codes, weight[:24], 1, [], x_scale, weight_scale[:24]) == odd


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "weight: got .* torch.float8_e4m3fn, allowed: .* torch.bfloat16"),
        ({"weight_scale": torch.ones(48)}, r"weight_scale: got \[48\] torch.float32, allowed: \[48, 1\]"),
        ({"weight_scale": torch.tensor(1.0)}, r"weight_scale: got \[\] torch.float32, allowed: \[48, 1\]"),
        ({"weight_scale": torch.ones(48, 1).double()}, "weight_scale: got .* torch.float64"),
        ({"weight": normal(48, 64)}, "weight: got .* torch.bfloat16, allowed: .* torch.float8_e4m3fn"),
        ({"x_scale": torch.ones(12, 1)}, "x_scale: got one for torch.bfloat16"),
        ({"x": normal(12, 64).to(E4M3), "x_scale": torch.ones(11, 1)}, r"x_scale: got \[11, 1\]"),
        ({"x": normal(1, 12, 64).to(E4M3)}, r"x: got \[1, 12, 64\]"),
    ],
)
def test_wrong_scales_name_the_field(change, message):
    weight, weight_scale = ops.quantise(normal(48, 64))
    good = {"x": normal(12, 64), "weight": weight, "experts": 1, "counts": []}
    good |= {"x_scale": None, "weight_scale": weight_scale}
    with pytest.raises(ValueError, match=f"^{message}"):
        LINEAR(*(good | change).values())


def test_cost_counts_each_tensor_once():
    cost = LINEAR.cost(normal(12, 7), normal(15, 7), 3, (5, 3, 4))
    assert cost.flops == 2 * 12 * 7 * 5
    assert cost.bytes == 2 * (12 * 7 + 15 * 7 + 12 * 5)
    x, x_scale = ops.quantise(normal(12, 7))
    weight, weight_scale = ops.quantise(normal(15, 7))
    cost = LINEAR.cost(x, weight, 3, (5, 3, 4), x_scale, weight_scale)
    assert cost.bytes == 12 * 7 + 4 * 12 + 15 * 7 + 4 * 15 + 2 * 12 * 5


FUSED = {
    "linear_activation": (LINEAR_ACTIVATION, (normal(12, 64), normal(3 * 32, 64), 3, (5, 3, 4), "swiglu7", BF16)),
    "linear_add_rms_norm": (
        LINEAR_ADD_RMS_NORM,
        (
            normal(12, 48), normal(3 * 64, 48), 3, normal(12, 64, dtype=torch.float32),
            normal(64, dtype=torch.float32), normal(192, dtype=torch.float32), (5, 3, 4), 1e-6, BF16,
        ),
    ),
    "linear_qk_norm_rope": (
        LINEAR_QK_NORM_ROPE,
        (
            normal(12, 64), normal(3 * 132, 64), normal(48, dtype=torch.float32), normal(48, dtype=torch.float32),
            normal(12, 12, dtype=torch.float32), 3, (5, 3, 4), 4, 2, 16, 1e-6, True,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_op_is_its_parts(name):
    op, arguments = FUSED[name]
    got, want, shapes = op(*arguments), op(*exact(arguments)), op.outputs(*arguments)
    for a, b, shape in zip(got, want, shapes, strict=True):
        assert (a.shape, a.dtype) == (shape.shape, shape.dtype)
        assert relative_error(a, b) < 0.01
    fake = getattr(torch.ops.horsepower, name).default
    torch.library.opcheck(fake, arguments, test_utils=("test_schema", "test_faketensor"))
    assert op.cost(*arguments).flops > LINEAR.cost(*arguments[:2], 3, (5, 3, 4)).flops


QUANTISED = {
    "linear_activation": (LINEAR_ACTIVATION, FUSED["linear_activation"][1]),
    "into eight bits": (LINEAR_ACTIVATION, (*FUSED["linear_activation"][1][:-1], E4M3)),
    "linear_add_rms_norm": FUSED["linear_add_rms_norm"],
    "linear_add_rms_norm_quantise": (LINEAR_ADD_RMS_NORM_QUANTISE, FUSED["linear_add_rms_norm"][1][:-1]),
    "linear_qk_norm_rope": FUSED["linear_qk_norm_rope"],
}


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("x_codes", [False, True])
def test_a_fused_op_of_codes_is_its_parts(name, x_codes):
    """Beside the same op of what the codes stand for."""
    op, (x, weight, *rest) = QUANTISED[name]
    weight, weight_scale = ops.quantise(weight)
    x, x_scale = ops.quantise(x) if x_codes else (x, None)
    true_x = x.double() if x_scale is None else x.double() * x_scale
    got = op(x, weight, *rest, x_scale, weight_scale)
    want, shapes = (
        op(true_x, weight.double() * weight_scale, *exact(rest)),
        op.outputs(x, weight, *rest, x_scale, weight_scale),
    )
    assert len(got) == len(want) == len(shapes)
    for a, b, shape in zip(got, want, shapes, strict=True):
        assert (a.shape, a.dtype) == (shape.shape, shape.dtype)
        assert relative_error(a.double(), b.double()) < (0.04 if a.dtype == E4M3 else 0.01)


@pytest.mark.parametrize("kind", ["swiglu7", "gelu7"])
def test_the_gains_of_bounded_activations_never_overflow(kind):
    """Over all that they can be given: no code is beyond 448, and the largest comes near it."""
    u = torch.linspace(-20, 20, 2001)
    pairs = torch.cartesian_prod(u, u).flatten() if kind == "swiglu7" else u
    (codes,) = ACTIVATION(pairs[None], kind, E4M3)
    exact_values = ACTIVATION(pairs[None].double(), kind, F64)[0] * FP8_GAINS[kind]
    assert 416 < exact_values.abs().max() <= 448
    torch.testing.assert_close(codes.double(), exact_values, rtol=2.0**-4, atol=2.0**-10)


def test_an_activation_without_bounds_is_refused():
    with pytest.raises(ValueError, match="dtype: got torch.float8_e4m3fn for silu, allowed: for swiglu7, gelu7"):
        ACTIVATION(normal(2, 4), "silu", E4M3)


@pytest.mark.parametrize("counts", COUNTS)
def test_norms_are_quantised_from_float32(counts):
    """Not from bfloat16: one rounding less."""
    x, branch, gain = normal(12, 64, dtype=torch.float32), normal(12, 64), normal(3 * 64, dtype=torch.float32)
    (normed,) = OPS["rms_norm"](x, gain, 3, counts, 1e-6, torch.float32)
    for got, want in zip(OPS["rms_norm_quantise"](x, gain, 3, counts, 1e-6), ops.quantise(normed), strict=True):
        assert torch.equal(got.float(), want.float())
    total, normed = OPS["add_rms_norm"](x, branch, None, gain, counts, 1e-6, torch.float32)
    got = OPS["add_rms_norm_quantise"](x, branch, None, gain, counts, 1e-6)
    for one, other in zip(got, (total, *ops.quantise(normed)), strict=True):
        assert torch.equal(one.float(), other.float())
