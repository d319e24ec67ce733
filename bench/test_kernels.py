"""Each kernel against its eager twin and Inductor's, at the shapes of the preset and of the full model."""

from typing import Any

import pytest
import torch

from horsepower.bench.measure import warm_allocator
from horsepower.kernels.activation import ACTIVATION, KINDS
from horsepower.kernels.add_rms_norm import ADD_RMS_NORM
from horsepower.kernels.attention import ATTENTION
from horsepower.kernels.linear import LINEAR
from horsepower.kernels.native_library import ISAS
from horsepower.kernels.ops import ops
from horsepower.kernels.qk_norm_rope import QK_NORM_ROPE
from horsepower.kernels.registry import Op
from horsepower.kernels.rms_norm import RMS_NORM

# L, Hq, Hkv, D, frames, video, window
ATTENTION_SHAPES = [
    (512, 4, 2, 64, 1, 0, -1),
    (1520, 4, 2, 64, 1, 0, -1),
    (2048, 4, 2, 128, 1, 0, -1),
    (2048, 4, 2, 64, 31, 1860, 11),
]

pytestmark = pytest.mark.benchmark
KERNELS = ["eager", "inductor", *ISAS]
SHAPES = [(1520, 256), (400, 5120)]  # below 32 MiB a tensor, so that eager reuses memory too


def compare(benchmark: Any, op: Op, kernel: str, case: str, *arguments: Any) -> None:
    """Time the op's reference, what Inductor makes of it, or its native kernel in one instruction set."""
    warm_allocator()
    benchmark.group = f"{op.name} {case}"
    if kernel == "eager":
        benchmark(op.reference, *arguments)
    elif kernel == "inductor":
        torch._dynamo.reset()  # each case is compiled for itself, however many there are
        compiled = torch.compile(op.reference, dynamic=False, fullgraph=True)
        for got, want in zip(compiled(*arguments), op.reference(*arguments), strict=True):
            torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
        benchmark(compiled, *arguments)
    else:
        native = next(each for each in op.kernels if each.name == "native")
        scratch = torch.empty(native.workspace(*arguments, isa=kernel), dtype=torch.uint8) if native.workspace else None
        benchmark(native.run, op.outputs(*arguments), scratch, *arguments, kernel)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("post_norm", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_add_rms_norm(benchmark: Any, kernel: str, shape: tuple[int, int], post_norm: bool) -> None:
    residual, gain = normal(*shape), normal(shape[1])
    arguments: Any = (residual, residual.bfloat16(), gain if post_norm else None, gain, [], 1e-6, torch.bfloat16)
    compare(benchmark, ADD_RMS_NORM, kernel, f"{shape} {post_norm=}", *arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_activation(benchmark: Any, kernel: str, kind: str) -> None:
    u = normal(1520, 1360).bfloat16()
    compare(benchmark, ACTIVATION, kernel, f"{tuple(u.shape)} {kind}", u, kind, torch.bfloat16)


@pytest.mark.parametrize(("rows", "heads_q", "heads_kv", "dim"), [(1520, 4, 2, 64), (400, 40, 8, 128)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_qk_norm_rope(benchmark: Any, kernel: str, rows: int, heads_q: int, heads_kv: int, dim: int) -> None:
    qkv = normal(rows, (heads_q + 2 * heads_kv) * dim + heads_q).bfloat16()  # with the values and the gate
    gain, rope = normal(dim), normal(rows, dim * 3 // 4)
    case = f"{rows} rows {heads_q} + {heads_kv} heads of {dim}"
    compare(benchmark, QK_NORM_ROPE, kernel, case, qkv, gain, gain, rope, 1, [], heads_q, heads_kv, 1e-6, False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_rms_norm(benchmark: Any, kernel: str, shape: tuple[int, int]) -> None:
    x, gain = normal(*shape), normal(shape[1])
    compare(benchmark, RMS_NORM, kernel, str(shape), x, gain, 1, [], 1e-6, torch.bfloat16)


@pytest.mark.parametrize("rows", [1, 8, 64, 512])
@pytest.mark.parametrize(("width", "depth"), [(516, 256), (256, 256), (1360, 256), (256, 680), (2048, 2048)])
@pytest.mark.parametrize("kernel", ["bfloat16", "dequantise", *ISAS])
def test_linear_of_float8_weights(benchmark: Any, kernel: str, rows: int, width: int, depth: int) -> None:
    """Beside torch's product of bfloat16 weights, and the same of weights that are decoded first."""
    x, weight = normal(rows, depth).bfloat16(), normal(width, depth).bfloat16()
    codes, scale = ops.quantise(weight)
    case = f"{rows} rows {width} x {depth}"
    if kernel in ISAS:
        compare(benchmark, LINEAR, kernel, case, x, codes, 1, [], None, scale)
        return
    benchmark.group, out = f"linear {case}", x.new_empty(rows, width)
    if kernel == "bfloat16":
        benchmark(lambda: torch.mm(x, weight.t(), out=out))
    else:
        benchmark(lambda: torch.mm(x, (codes.float() * scale).bfloat16().t(), out=out))


@pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_attention(benchmark: Any, kernel: str, shape: tuple[int, ...]) -> None:
    L, Hq, Hkv, D, frames, video, window = shape
    q, k, v = (normal(L, heads, D).bfloat16() for heads in (Hq, Hkv, Hkv))
    compare(benchmark, ATTENTION, kernel, str(shape), q, k, v, normal(L, Hq), 1, [], frames, video, window)
