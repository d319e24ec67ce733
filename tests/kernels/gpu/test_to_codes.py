"""The Triton kernel, bit for bit: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from gpu import DEVICE
from horsepower.kernels.gpu import to_codes as twin
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.to_codes import TO_CODES

SMALL = Config(warps=4, constants={"TILE": 64})


@pytest.mark.parametrize("config", [SMALL, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("shape", "first"), [((0, 8), 0), ((1, 1), 0), ((7, 33), 0), ((5, 130), 2), ((3, 2, 40), 1)])
@pytest.mark.filterwarnings("ignore:(invalid|overflow):RuntimeWarning")  # of the interpreter
def test_odd_sizes_and_strided_rows(config, dtype, shape, first):
    x = (100 * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))).to(DEVICE, dtype)
    x[..., -1:] = torch.nan
    x[..., first : first + 1] *= 100
    x = x[..., first:]
    for inverse in (3.0, 1 / 3):  # no float32 holds the second
        assert twin.supports(x, inverse) is None
        out = TO_CODES.outputs(x, inverse)
        out[0].view(torch.uint8).fill_(0x7F)
        twin.run(out, None, x, inverse, config=config)
        assert torch.equal(out[0].view(torch.uint8), TO_CODES.reference(x, inverse)[0].view(torch.uint8))


def test_what_the_kernel_refuses():
    assert twin.supports(torch.zeros(2, 4, dtype=torch.float64, device=DEVICE), 1.0) == "float64"
