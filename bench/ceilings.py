"""What the GPU at hand reaches: a large copy, large products, attention at the model's heads."""

import statistics
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F

from horsepower.bench.measure import paired
from horsepower.kernels.rates import GPU, OF_TARGET, Rates
from horsepower.kernels.target import target_of

ROUNDS = 15
BYTES, SIDE, TOKENS = 2**30, 8192, 16384  # of the copy, of the square products, of the attention


def measure(device: torch.device, copied: int = BYTES, side: int = SIDE, tokens: int = TOKENS) -> GPU:
    """Its rates, which stand for the datasheet's too: medians of rounds in which all take turns.

    Raises ValueError for a device that there are no kernels for.
    """
    target = target_of(device)
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    source, into = (torch.empty(copied // 2, dtype=torch.uint8, device=device) for _ in range(2))
    a, b = normal(side, side), normal(side, side)
    small = normal(side // 4, side // 4, dtype=torch.float32)
    q, k, v = (normal(1, heads, tokens, 128) for heads in (40, 8, 8))
    work: dict[str, tuple[Callable[[], object], float]] = {
        "memory": (lambda: into.copy_(source), copied),
        "matrix": (lambda: torch.mm(a, b), 2 * side**3),
        "attention": (lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True), 4 * 40 * 128 * tokens**2),
        "vector": (lambda: torch.mm(small, small), 2 * (side // 4) ** 3),  # float32 without matrix units
    }
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9):
        one = torch.ones((), device=device)
        coded, other = (x.to(torch.float8_e4m3fn) for x in (a, b))
        product = lambda: torch._scaled_mm(coded, other.t(), one, one, out_dtype=torch.bfloat16)  # noqa: E731
        work["fp8"] = product, 2 * side**3
    seconds = paired({name: run for name, (run, _) in work.items()}, ROUNDS)
    reached = {name: amount / statistics.median(seconds[name]) for name, (_, amount) in work.items()}
    rates = Rates(fp8=reached.pop("fp8", None), **reached)
    like = OF_TARGET.get(target, OF_TARGET["sm_90"])  # what is assumed of Triton's kernels
    return replace(like, name=_name(device), target=target, peak=rates, reached=rates)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
