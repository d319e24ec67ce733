"""Inputs of matrix products by tiles, and tiles that are small enough for Triton's interpreter."""

import torch

from gpu import DEVICE
from horsepower.kernels.float8 import E4M3
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.quantise import QUANTISE

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


def config(tma, rows=16, columns=16, depth=16, **more):
    """Tiles of so many rows and columns, with descriptors or with pointers."""
    return Config(4, 2, {"BM": rows, "BN": columns, "BK": depth, "GROUP": 2, "TMA": tma, **more})


BOTH = [config(1), config(0)]
FP8 = [config(1, depth=32), config(1, depth=32, MORE=16)]


def normal(*shape, dtype=F16, seed=1):
    """Of unit variance; in 16 bits, rows are padded with NaN to a pitch of 16 bytes."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE, dtype)
    if dtype is not F16:
        return values
    padded = torch.full((shape[0], -(-shape[1] // 8) * 8 + 8), torch.nan, dtype=dtype, device=DEVICE)
    padded[:, : shape[1]] = values
    return padded[:, : shape[1]]


def codes(*shape, seed=1):
    """Rows of all sizes in e4m3, padded with NaN to a pitch of 16 bytes, and their scales."""
    sizes = normal(shape[0], 1, dtype=F32, seed=seed + 1).exp2()
    made, scales = QUANTISE.reference(normal(*shape, dtype=F32, seed=seed) * sizes)
    padded = torch.full((shape[0], -(-shape[1] // 16) * 16 + 16), 0x7F, dtype=torch.uint8, device=DEVICE).view(E4M3)
    padded[:, : shape[1]] = made
    return padded[:, : shape[1]], scales
