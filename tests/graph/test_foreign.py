"""Models that nobody here wrote: captured at first try, computed as eager does, and what is raised of them."""

import pytest
import torch

from foreign import FOREIGN, cast, example, tensors
from horsepower.explaining import explain
from horsepower.runtime.compiled import compile
from recordings import relative_error

TAKEN = {
    "llama": {"raise_mask": 2, "raise_rms_norm": 5, "raise_silu_mul": 2, "raise_linear": 14},
    "llama_block": {"raise_rms_norm": 2, "raise_silu_mul": 1, "raise_linear": 7},
    "wan": {"raise_rms_norm": 8, "raise_layer_norm": 7, "raise_attention": 4, "raise_activation": 5},
    "ltx": {"raise_rms_norm": 12, "raise_layer_norm": 1, "raise_attention": 2, "raise_activation": 5},
    "ltx2": {"raise_rms_norm": 40, "raise_layer_norm": 2, "raise_attention": 8},
    "vit": {"raise_mask": 2, "raise_layer_norm": 5, "raise_attention": 2, "raise_activation": 2},
    "encoder_layer": {"raise_layer_norm": 2, "raise_attention": 1},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_float32_is_as_eager(name):
    module, args, kwargs = example(name)
    run = compile(module, args, kwargs)
    with torch.no_grad():
        want = module(*args, **kwargs)
    got = run(*args, **kwargs)
    assert type(got) is type(want)
    for one, other in zip(tensors(got), tensors(want), strict=True):
        assert relative_error(one, other) < 1e-5
    counts = {name: sum(s.rewrite == name and not s.refused for s in run.plan.sites) for name in TAKEN[name]}
    assert counts == TAKEN[name]


@pytest.mark.parametrize("name", ["llama", "wan", "ltx", "vit", "encoder_layer"])
def test_bfloat16_is_not_further_from_float64_than_eager(name):
    module, args, kwargs = example(name, torch.bfloat16)
    run = compile(module, args, kwargs)
    with torch.no_grad():
        got, eager = run(*args, **kwargs), module(*args, **kwargs)
        exact = module.double()(*cast(args, torch.float64), **cast(kwargs, torch.float64))
    for one, other, true in zip(*map(tensors, (got, eager, exact)), strict=True):
        assert one.dtype == other.dtype
        assert relative_error(one, true) <= max(1.1 * relative_error(other, true), 4 * 2.0**-8)


def test_other_values_of_the_same_shapes():
    """Nothing that depends on the inputs was computed at compile time."""
    module, args, kwargs = example("ltx")
    run = compile(module, args, kwargs)
    hidden, text, time, mask = args
    mask = mask.clone()
    mask[1, 3:] = 0
    other = (hidden * 2, text - 1, time + 100, mask)
    with torch.no_grad():
        for one, two in zip(tensors(run(*other, **kwargs)), tensors(module(*other, **kwargs)), strict=True):
            assert relative_error(one, two) < 1e-5


def test_explain_lists_what_is_fused_of_them():
    module, args, kwargs = example("wan")
    said = explain(module, args, example_keywords=kwargs).text()
    assert all(name in said for name in ("raise_attention", "raise_layer_norm", "raise_rms_norm", "it has a bias"))
