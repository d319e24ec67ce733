"""A plan for a GPU, run whole by its Triton kernels: on a GPU, or else in the interpreter."""

from collections import Counter
from dataclasses import replace
from importlib import import_module

import pytest
import torch

from gpu import DEVICE
from horsepower.graph.passes import PASSES
from horsepower.kernels.gate import twins
from horsepower.kernels.registry import OPS, Kernel
from horsepower.runtime.compiled import compile
from horsepower.runtime.models.dit import DiT
from models import DYNAMIC, TINY, VARIANTS, random_inputs, random_model
from recordings import relative_error


@pytest.fixture
def calls(monkeypatch):
    """How often each operator's Triton kernel ran: it is the only one that there is."""
    counted = Counter()
    for name in twins():
        op, twin = OPS[name], import_module(f"horsepower.kernels.gpu.{name}")
        (kernel,) = (each for each in op.kernels if each.name == "triton")

        def run(*inputs, name=name, twin=twin):
            counted[name] += 1
            twin.run(*inputs)

        only = Kernel("triton", twin.supports, run, kernel.workspace, ("cpu", "cuda"))
        monkeypatch.setitem(OPS, name, replace(op, kernels=(only,)))
    return counted


LAYERS = {"attention": 3, "linear_activation": 3, "linear_qk_norm_rope": 3}
EXPECTED = {**LAYERS, "rms_norm": 3, "linear": 1, "linear_add_rms_norm": 5}
WITH_POST_NORM = {**LAYERS, "rms_norm": 4, "linear": 6, "add_rms_norm": 5}  # no tile has all of a branch's row


@pytest.mark.parametrize("name", ["default", "windowed", "post_norm"])
def test_a_step_of_a_model(name, calls):
    """Three layers, two of them with experts: a kernel at each site, no further from float64 than eager."""
    config = replace(TINY, hidden_size=256, head_dim=128, num_query_groups=1, **VARIANTS[name])
    model = random_model(config).to(DEVICE)
    exact = DiT(replace(config, params_dtype=torch.float64), torch.float64)
    exact.load_state_dict(model.state_dict())
    given = [x.to(DEVICE) for x in random_inputs(config, 3, 2, 5, 4)]
    run = compile(model, (*given, 3), dynamic_shapes=DYNAMIC, target="sm_90", cache=False)
    lengths = random_inputs(config, 3, 3, 0 if name == "default" else 2, 5)
    with torch.no_grad():
        true = exact.to(DEVICE)(*(x.to(DEVICE).double() for x in lengths), 3)
        eager, got = (each(*(x.to(DEVICE) for x in lengths), 3) for each in (model, run))
    assert dict(calls) == (WITH_POST_NORM if name == "post_norm" else EXPECTED)
    for one, other, want in zip(got, eager, true, strict=True):
        if want.numel():
            assert relative_error(one, want) <= max(1.1 * relative_error(other, want), 4 * 2.0**-8)


TWO = {"attention": 2, "linear_activation": 2, "linear_qk_norm_rope": 2, "linear": 1}
WEIGHTS = {**TWO, "rms_norm": 3, "linear_add_rms_norm": 3}
IN_CODES = {**TWO, "rms_norm_quantise": 1, "rms_norm": 2, "linear_add_rms_norm_quantise": 3}
OF_CODES = {**IN_CODES, "transpose_to_codes": 2}


@pytest.mark.parametrize(("scheme", "ran"), [("fp8", IN_CODES), ("fp8-attention", OF_CODES), ("fp8-weights", WEIGHTS)])
def test_a_step_in_eight_bits(scheme, ran, calls, monkeypatch):
    """Two layers, one with experts: a kernel at each site, as near to float64 as the same plan by plain operators."""
    config = replace(TINY, num_layers=2, mm_layers=(0,), hidden_size=256, head_dim=128, num_query_groups=1)
    model = random_model(config).to(DEVICE)
    exact = DiT(replace(config, params_dtype=torch.float64), torch.float64)
    exact.load_state_dict(model.state_dict())
    given, how = (*(x.to(DEVICE) for x in random_inputs(config, 3, 2, 5, 4)), 3), {"dynamic_shapes": DYNAMIC}
    how |= {"target": "sm_90", "scheme": scheme, "cache": False}
    run = compile(model, given, **how)
    lengths = random_inputs(config, 3, 3, 2, 5)
    with torch.no_grad():
        true = exact.to(DEVICE)(*(x.to(DEVICE).double() for x in lengths), 3)
        got = run(*(x.to(DEVICE) for x in lengths), 3)
        assert {name: n for name, n in calls.items() if name in ran} == ran
        plain = compile(model, given, only=[each for each in PASSES if each.__name__ != "lower"], **how)
        for name in twins():
            monkeypatch.setitem(OPS, name, replace(OPS[name], kernels=()))
        want = plain(*(x.to(DEVICE) for x in lengths), 3)
    one, other, right = (torch.cat([x.double().flatten() for x in each]) for each in (got, want, true))
    assert relative_error(one, right) <= 1.1 * relative_error(other, right) < 0.2
