"""The check end to end on outputs of every kind: right ones pass, wrong ones are found."""

import pytest
import torch
from torch import nn

from horsepower.graph.capture import capture
from horsepower.graph.verify import check_whole


class Parts(nn.Module):
    """Floats, an index, a mask and complex numbers, or only some of them."""

    def __init__(self, only=slice(None)):
        super().__init__()
        self.only = only

    def forward(self, x):
        return (x.softmax(-1), x.argmax(-1), x > 0, torch.complex(x.sin(), x.cos()))[self.only]


def end_to_end(module, run):
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(0))
    return check_whole(capture(module, (x,)), lambda x: run(module(x)), {}, [x])


@pytest.mark.parametrize("only", [slice(None), slice(1, 3), slice(3, 4)])
def test_every_kind_of_output_passes_end_to_end(only):
    check = end_to_end(Parts(only), list)
    assert check.passed
    assert check.error_fused < 1e-6


@pytest.mark.parametrize(
    ("place", "change", "note"),
    [
        (0, lambda x: x * 1.001, ""),
        (0, lambda x: x.double(), "[7, 8] torch.float64 instead of [7, 8] torch.float32"),
        (0, lambda x: x[:, None], "[7, 1, 8] torch.float32 instead of [7, 8] torch.float32"),
        (1, lambda x: (x + 1) % 8, "differs from eager"),
        (1, lambda x: x.int(), "[7] torch.int32 instead of [7] torch.int64"),
        (1, lambda x: 3, "3 instead of a tensor"),
        (2, torch.logical_not, "differs from eager"),
        (3, torch.conj, ""),
    ],
)
def test_every_kind_of_wrong_output_is_found_end_to_end(place, change, note):
    check = end_to_end(Parts(), lambda out: [change(x) if i == place else x for i, x in enumerate(out)])
    assert not check.passed
    assert check.note == note
    assert check.value == (f"output {place}" if note else "outputs")


def test_a_missing_output_is_found_end_to_end():
    check = end_to_end(Parts(), lambda out: list(out[:3]))
    assert (check.passed, check.note) == (False, "3 outputs instead of 4")
