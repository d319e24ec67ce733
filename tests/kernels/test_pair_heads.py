"""The order of the dimensions in each head of each expert, and what is refused."""

import pytest
import torch

from horsepower.kernels.float8 import E4M3
from horsepower.kernels.ops import ops


@pytest.mark.parametrize("columns", [(), (3,)])
def test_partners_come_side_by_side_in_each_head_of_each_expert(columns):
    x = torch.arange(2 * 13.0).view(26, *(1 for _ in columns)).expand(26, *columns)
    paired = ops.pair_heads(x, 2, 2, 6, 4)
    order = [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12]
    assert torch.equal(paired, torch.cat((x[:13][order], x[13:][order])))
    for experts, heads in ((2, 3), (0, 2)):
        with pytest.raises(ValueError, match="x: got"):
            ops.pair_heads(x, experts, heads, 6, 4)


def test_codes_move_as_any_values_do():
    codes = torch.randn(26, 3, generator=torch.Generator().manual_seed(0)).to(E4M3)
    assert torch.equal(ops.pair_heads(codes, 2, 2, 6, 4).float(), ops.pair_heads(codes.float(), 2, 2, 6, 4))
