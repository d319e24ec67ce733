"""Each kernel against its eager twin, at the shapes of the preset and of the full model."""

from typing import Any

import pytest
import torch

from horsepower.bench.measure import warm_allocator
from horsepower.kernels.add_rms_norm import native, outputs, reference
from horsepower.kernels.native_library import ISAS

pytestmark = pytest.mark.benchmark
SHAPES = [(1520, 256), (400, 5120)]  # below 32 MiB a tensor, so that eager reuses memory too


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["eager", *ISAS])
def test_add_rms_norm(benchmark: Any, kernel: str, shape: tuple[int, int]) -> None:
    warm_allocator()
    benchmark.group = f"add_rms_norm {shape}"
    generator = torch.Generator().manual_seed(0)
    residual, gain = torch.randn(shape, generator=generator), torch.randn(shape[1], generator=generator)
    arguments: Any = (residual, residual.bfloat16(), gain, [], 1e-6, torch.bfloat16)
    out = outputs(*arguments)
    if kernel == "eager":
        benchmark(reference, *arguments)
    else:
        benchmark(native, out, *arguments, kernel)
