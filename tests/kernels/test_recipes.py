"""Weight recipes: what each expert's part becomes, and what is refused."""

import pytest
import torch

from horsepower.kernels.ops import ops


def test_zeros_below_and_beside_each_expert():
    weight = torch.arange(1.0, 13).view(6, 2)
    padded = ops.pad_weight(weight, 3, 1, 2)
    assert padded.shape == (9, 4)
    for i in range(3):
        assert torch.equal(padded[3 * i : 3 * i + 2, :2], weight[2 * i : 2 * i + 2])
    assert padded.count_nonzero() == 12
    with pytest.raises(ValueError, match=r"weight: got \[6, 2\], allowed: \[4 O, I\]"):
        ops.pad_weight(weight, 4, 1, 2)


@pytest.mark.parametrize("columns", [(), (3,)])
def test_partners_come_side_by_side_in_each_head_of_each_expert(columns):
    x = torch.arange(2 * 13.0).view(26, *(1 for _ in columns)).expand(26, *columns)
    paired = ops.pair_heads(x, 2, 2, 6, 4)
    order = [0, 2, 1, 3, 4, 5, 6, 8, 7, 9, 10, 11, 12]
    assert torch.equal(paired, torch.cat((x[:13][order], x[13:][order])))
    with pytest.raises(ValueError, match="x: got"):
        ops.pair_heads(x, 2, 3, 6, 4)
