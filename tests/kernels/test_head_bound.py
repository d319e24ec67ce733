"""A bound that no head exceeds, and that the worst one comes near."""

import pytest
import torch

from horsepower.kernels.ops import ops
from horsepower.kernels.qk_norm_rope import QK_NORM_ROPE

EPS = 1e-6


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_no_head_exceeds_it(experts, size):
    """Heads of one number alone, in the dimension with the largest gain: normed, that is sqrt(D)."""
    generator = torch.Generator().manual_seed(experts)
    gain = size * torch.randn(experts * 32, generator=generator)
    (bound,) = ops.head_bound(gain, experts).tolist()
    assert bound == 2.0 ** round(torch.tensor(bound).log2().item())
    rows = torch.cat((torch.eye(32), torch.randn(32, 32, generator=generator))).repeat(1, 2)
    angles = 10 * torch.randn(len(rows), 12, generator=generator)
    rope = torch.cat((angles.sin(), angles.cos()), 1)
    largest = max(
        float(heads.abs().max())
        for own in gain.chunk(experts)
        for heads in QK_NORM_ROPE.reference(rows, own, own, rope, 1, [], 1, 1, EPS, False)
    )
    assert 448 * bound / 4 < largest <= 448 * bound


def test_gains_that_experts_do_not_divide():
    for gain, experts in ((torch.ones(7), 3), (torch.ones(2, 3), 1), (torch.ones(3), 0), (torch.ones(0), 1)):
        with pytest.raises(ValueError, match=r"gain: got \["):
            ops.head_bound(gain, experts)
