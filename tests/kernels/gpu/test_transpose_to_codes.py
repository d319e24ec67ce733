"""The Triton kernel, bit for bit: on a GPU, or else in Triton's interpreter."""

import pytest
import torch

from gpu import DEVICE
from horsepower.kernels.gpu import transpose_to_codes as twin
from horsepower.kernels.gpu.launch import Config
from horsepower.kernels.transpose_to_codes import TRANSPOSE_TO_CODES

FEW = Config(4, constants={"TOKENS": 16})


@pytest.mark.parametrize("config", [FEW, None], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "heads", "dim"), [(0, 2, 16), (1, 1, 1), (16, 3, 20), (37, 2, 32), (131, 1, 7)])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
def test_columns_of_wider_rows(config, dtype, rows, heads, dim):
    generator = torch.Generator().manual_seed(rows)
    x = (100 * torch.randn(rows, heads * dim + 5, generator=generator)).to(DEVICE, dtype)[:, : heads * dim]
    x = x.unflatten(1, (heads, dim))
    x[-1:, 0, 0] = torch.nan
    given = x, torch.tensor([4.0], device=DEVICE)
    assert twin.supports(*given) is None
    out = TRANSPOSE_TO_CODES.outputs(*given)
    out[0].view(torch.uint8).fill_(0x7F)
    twin.run(out, None, *given, config=config)
    (want,) = TRANSPOSE_TO_CODES.reference(*given)
    assert torch.equal(out[0].view(torch.uint8), want.view(torch.uint8))


def test_what_the_kernel_refuses():
    x, inverse = torch.zeros(4, 2, 16, device=DEVICE), torch.ones(1, device=DEVICE)
    assert twin.supports(x.double(), inverse) == "float64"
    assert twin.supports(x.transpose(1, 2), inverse) == "the last dimension is not contiguous"
    assert twin.supports(x[..., :0], inverse) == "a head has 0 dimensions, allowed: up to 256"
