"""What all native kernels ask of tensors, and how many threads they wake."""

import pytest
import torch

from horsepower.kernels.native_library import ELEMENTS_A_THREAD, pitch, threads


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.ones(4, 6), 6),
        (torch.ones(8, 6)[::2, 1:5], 12),
        (torch.ones(2, 3, 6), 6),
        (torch.ones(2, 3, 6)[:, :, :4], 6),
        (torch.ones(2, 3, 6)[:, :2], None),
        (torch.ones(2, 3, 6).transpose(0, 1), None),
        (torch.ones(1, 3, 6).transpose(0, 1), 6),
        (torch.ones(2, 3, 4, 6)[:, :, ::2], 12),
        (torch.ones(3, 6).expand(2, 3, 6), None),
        (torch.ones(6), 6),
    ],
)
def test_rows_that_are_equally_far_apart(x, expected):
    assert pitch(x) == expected
    if expected is not None:
        rows = torch.as_strided(x, (x.numel() // x.shape[-1], x.shape[-1]), (expected, 1), x.storage_offset())
        assert torch.equal(rows, x.reshape(-1, x.shape[-1]))


def test_little_work_wakes_nobody():
    assert threads(0) == threads(ELEMENTS_A_THREAD) == 1
    assert threads(2 * ELEMENTS_A_THREAD) == min(2, torch.get_num_threads())
    assert threads(10**12) == torch.get_num_threads()
