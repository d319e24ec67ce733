"""What GPUs can do: arithmetic and memory, by the datasheet and as the best published kernels reach it.

time of a launch = max(FLOPs / rate of its unit, bytes / bandwidth)
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

import torch

Unit = Literal["matrix", "fp8", "attention", "attention_fp8", "vector"]
UNITS: tuple[Unit, ...] = get_args(Unit)


class Launch(Protocol):
    """What one kernel does at the least."""

    @property
    def unit(self) -> Unit: ...
    @property
    def flops(self) -> float: ...
    @property
    def bytes(self) -> int: ...


@dataclass(frozen=True)
class Rates:
    """FLOP/s by unit, bytes/s of memory. A unit that is not there is None."""

    matrix: float  # dense bfloat16
    fp8: float | None  # dense
    attention: float  # bfloat16
    vector: float  # float32 without matrix units: elementwise work, products of float32
    memory: float
    attention_fp8: float | None = None

    def seconds(self, launch: Launch) -> float:
        return max(launch.flops / self.of(launch.unit), launch.bytes / self.memory)

    def of(self, unit: Unit) -> float:
        rate: float | None = getattr(self, unit)
        return rate or math.nan  # no kernel asks for a unit that its GPU has not

    def bound(self, launch: Launch) -> str:
        """What the launch waits for: its unit, or memory."""
        return launch.unit if launch.flops / self.of(launch.unit) >= launch.bytes / self.memory else "memory"


@dataclass(frozen=True)
class GPU:
    name: str
    target: str  # whose kernels it runs
    peak: Rates  # datasheet: no kernel is faster
    reached: Rates  # by the best published kernels at sizes like these
    triton: float  # assumed: the share of that rate of matrix products that one in Triton reaches
    triton_attention: float  # assumed: the same of attention


def unit_of_product(x: torch.dtype) -> Unit:
    """What multiplies rows of a dtype by a weight."""
    return "vector" if x.itemsize > 2 else "matrix" if x.itemsize == 2 else "fp8"


def unit_of_attention(q: torch.dtype) -> Unit:
    """What computes attention of queries of a dtype."""
    return "attention_fp8" if q.itemsize == 1 else "attention"


# peak: NVIDIA H100 datasheet, SXM5, without sparsity. reached: cuBLAS bfloat16 700 to 800 TFLOP/s; FP8 scaled by rows
# 1083 to 1141 in CUTLASS (FBGEMM pull request 2546), 1190 in Triton, of which that is planned with; cuBLASLt's 1200 to
# 1500 are of tensors with one scale. FlashAttention 3 at head 128, not causal, long: 640 to 650, of which 620 are
# planned with; the best RMS norms reach 3.0 TB/s. triton: persistent products with TMA are published at 90 to 95 % of
# cuBLAS; in FP8 they are what is planned with. The upper end: where the difference decides nothing else, a fused kernel
# needs less memory and fewer launches. triton_attention: 395 to 477 TFLOP/s are published where FlashAttention 3
# reaches 640; in eight bits, where that reaches 880 to 1000, of which 880 are planned with, nothing is.
_H100 = GPU(
    "NVIDIA H100 SXM",
    "sm_90",
    Rates(matrix=989.4e12, fp8=1978.9e12, attention=989.4e12, vector=66.9e12, memory=3.35e12, attention_fp8=1978.9e12),
    Rates(matrix=800e12, fp8=1190e12, attention=620e12, vector=66.9e12, memory=3.0e12, attention_fp8=880e12),
    triton=0.95,
    triton_attention=477 / 640,
)

# peak: NVIDIA H200 datasheet, SXM: an H100's arithmetic, faster memory. reached: as an H100, in memory its share.
_H200 = GPU(
    "NVIDIA H200 SXM",
    "sm_90",
    Rates(matrix=989.4e12, fp8=1978.9e12, attention=989.4e12, vector=66.9e12, memory=4.8e12, attention_fp8=1978.9e12),
    Rates(
        matrix=800e12, fp8=1190e12, attention=620e12, vector=66.9e12, memory=4.8e12 * 3.0 / 3.35, attention_fp8=880e12
    ),
    triton=0.95,
    triton_attention=477 / 640,
)

# peak: NVIDIA A100 datasheet, SXM4, 80 GB; no FP8. reached: FlashAttention 2 204 TFLOP/s; products and memory are not
# published at these sizes: the shares of the peaks that an H100 reaches. triton: its tutorial on matrix products says
# "on par with cuBLAS"; of attention nothing is known that tells it from FlashAttention 2.
_A100 = GPU(
    "NVIDIA A100 SXM 80 GB",
    "sm_80",
    Rates(matrix=312e12, fp8=None, attention=312e12, vector=19.5e12, memory=2.039e12),
    Rates(matrix=312e12 * 800 / 989.4, fp8=None, attention=204e12, vector=19.5e12, memory=2.039e12 * 3.0 / 3.35),
    triton=1.0,
    triton_attention=1.0,
)
GPUS = {"h100": _H100, "h200": _H200, "a100": _A100}
OF_TARGET = {"sm_80": _A100, "sm_90": _H100}  # whom predictions for an architecture are made for
