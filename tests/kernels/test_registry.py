"""The registry."""

import pytest
import torch

from horsepower.kernels.add_rms_norm import ADD_RMS_NORM
from horsepower.kernels.registry import OPS, register


def test_every_op_is_known_to_torch():
    assert ADD_RMS_NORM in OPS.values()
    for name in OPS:
        assert hasattr(torch.ops.horsepower, name)


def test_a_name_is_taken_once():
    with pytest.raises(ValueError, match="'add_rms_norm', which is registered"):
        register(ADD_RMS_NORM)


def test_an_unknown_instruction_set_is_refused():
    from horsepower import _native

    with pytest.raises(ValueError, match="isa: got 'mmx'"):
        _native.add_rms_norm("mmx", *([0] * 10), 0, 1, 0, 0, 1e-6, False, False, 1)
