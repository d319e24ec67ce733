"""Matrix products by modality, and the ops that begin with one."""

import pytest
import torch

from horsepower.kernels.linear import LINEAR
from horsepower.kernels.linear_activation import LINEAR_ACTIVATION
from horsepower.kernels.linear_add_rms_norm import LINEAR_ADD_RMS_NORM
from horsepower.kernels.linear_qk_norm_rope import LINEAR_QK_NORM_ROPE
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
    assert LINEAR.kernels[0].supports(x) == "x has 3 dimensions"
    assert torch.equal(LINEAR(x, weight, 1, [])[0], torch.nn.functional.linear(x, weight))
    torch.library.opcheck(torch.ops.horsepower.linear.default, (x, weight, 1, []))


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"weight": torch.zeros(5, 6)}, "weight"),
        ({"weight": torch.zeros(5, 7, dtype=BF16)}, "weight"),
        ({"weight": torch.zeros(35)}, "weight"),
        ({"experts": 3}, "weight"),
        ({"weight": torch.zeros(6, 7), "experts": 3, "counts": [1, 2]}, "counts"),
        ({"weight": torch.zeros(6, 7), "experts": 3, "counts": [1, 2, 2]}, "counts"),
    ],
)
def test_wrong_inputs_name_the_field(change, field):
    good = {"x": torch.zeros(4, 7), "weight": torch.zeros(5, 7), "experts": 1, "counts": []}
    with pytest.raises(ValueError, match=f"{field}: got"):
        LINEAR(*(good | change).values())


def test_cost_counts_each_tensor_once():
    cost = LINEAR.cost(normal(12, 7), normal(15, 7), 3, (5, 3, 4))
    assert cost.flops == 2 * 12 * 7 * 5
    assert cost.bytes == 2 * (12 * 7 + 15 * 7 + 12 * 5)


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
