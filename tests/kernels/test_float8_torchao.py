"""Beside torchao's products of eight bits, of the same granularity and on the same tensors."""

import pytest
import torch

from horsepower.kernels.ops import ops
from recordings import relative_error

torchao = pytest.importorskip("torchao.quantization")

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))


def outliers(x):
    """A few channels a hundred times as large, as residual streams have them."""
    x[:, ::97] *= 100
    return x


TENSORS = {
    "normal": (normal(96, 512), normal(128, 512)),
    "outlying channels": (outliers(normal(96, 512)), normal(128, 512)),
    "outlying weights": (normal(96, 512), outliers(normal(128, 512))),
    "heavy tails": (normal(96, 512) ** 3, normal(128, 512) ** 3),
    "tokens of all sizes": (normal(96, 512) * normal(96, 1).mul(3).exp(), normal(128, 512) * normal(128, 1).exp()),
    "one channel": (torch.eye(96, 512) + normal(96, 512) / 1e4, normal(128, 512)),
}


def theirs(x, granularity):
    """What torchao's codes stand for."""
    made = torchao.Float8Tensor.from_hp(x, float8_dtype=E4M3, granularity=granularity)
    return made.dequantize(torch.float64)


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("inputs", [False, True], ids=["fp8-weights", "fp8"])
def test_rows(name, inputs):
    x, weight = (each.to(BF16) for each in TENSORS[name])
    exact = x.double() @ weight.double().t()
    codes, weight_scale = ops.quantise(weight)
    x_codes, x_scale = ops.quantise(x) if inputs else (x, None)
    ours = ops.linear(x_codes, codes, 1, [], x_scale, weight_scale)
    rows = torchao.PerRow()
    wanted = (theirs(x, rows) if inputs else x.double()) @ theirs(weight, rows).t()
    assert relative_error(ours, exact) <= 1.05 * relative_error(wanted.to(BF16), exact)


@pytest.mark.parametrize("name", TENSORS)
def test_whole_tensors(name):
    x, weight = (each.to(BF16) for each in TENSORS[name])
    exact = x.double() @ weight.double().t()
    codes, scale = ops.quantise_tensor(weight, 1)
    inverse = 448 / x.abs().max().item()
    ours = ops.linear(ops.to_codes(x, inverse), codes, 1, [], None, scale / inverse)
    whole = torchao.PerTensor()
    wanted = theirs(x, whole) @ theirs(weight, whole).t()
    assert relative_error(ours, exact) <= 1.05 * relative_error(wanted.to(BF16), exact)
