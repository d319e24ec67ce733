"""Verification under a scheme: what is right passes, and codes or scales that are wrong are found."""

from dataclasses import replace

import pytest
import torch

import horsepower
from horsepower.graph import provenance
from horsepower.graph.capture import capture
from horsepower.graph.graph import args_of
from horsepower.graph.passes import PASSES
from horsepower.graph.passes.quantise import quantise
from horsepower.graph.verify import AS_GIVEN, STEP_BUDGET, check_sites
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import OPS, Kernel
from horsepower.quant import quantised
from horsepower.quant.budget import BUDGET
from horsepower.quant.scheme import FP8, FP8_ATTENTION
from horsepower.runtime.executor import weights_of
from models import DYNAMIC, TINY, random_inputs, random_model

SMALL = replace(TINY, num_layers=1, mm_layers=(0,), gelu7_layers=())
SIZES = (4, 7, 5, 3)  # frames, video tokens a frame, audio, text


def verified(config=SMALL, only=PASSES, **options):
    model = random_model(config)
    example, given = ((*random_inputs(config, *sizes), sizes[0]) for sizes in ((3, 2, 5, 4), SIZES))
    how = {"dynamic_shapes": DYNAMIC, "scheme": "fp8-weights", **options}
    return horsepower.verify(model, example, given, only=only, **how)


def test_what_is_right_passes():
    checks = verified(TINY)
    assert [check for check in checks if not check.passed] == []
    distances = [check for check in checks if check.scheme]
    assert {check.scheme for check in distances} == {"fp8-weights"}
    products, outputs = ([c for c in distances if (c.site is None) is whole] for whole in (False, True))
    assert sum(check.count for check in products) == 4 * TINY.num_layers
    assert {check.bound for check in products} == {BUDGET}
    assert all(0.02 < check.error_fused < 0.04 and check.error_eager < 0.004 for check in products)
    assert [(check.value, check.bound) for check in outputs] == [("output 0", STEP_BUDGET), ("output 1", STEP_BUDGET)]
    assert all(check.error_eager < check.error_fused for check in outputs)
    (whole,) = (check for check in checks if check.site is None and not check.scheme)
    assert whole.error_fused < min(check.error_fused for check in outputs) / 2  # beside references on the same codes
    assert {check.rewrite for check in checks} >= {"quantise", "fuse_qkv", "fuse_gate"}


def wrong_in(checks):
    return {(check.module, bool(check.scheme)) for check in checks if not check.passed and check.site is not None}


def test_scales_that_a_pass_made_too_large_are_found():
    """Kernels and references read the same ones: only the distance from the model shows it."""

    def quantise_wrongly(graph):
        quantise(graph)
        last = [node for node in graph.nodes.nodes if node.target is ops.quantise.default][-1]
        (scales,) = (item for item in last.users if args_of(item)[1] == 1)
        with graph.nodes.inserting_after(scales):
            larger = graph.call(torch.ops.aten.mul.Tensor, scales, 1.1, like=scales)
        scales.replace_all_uses_with(larger, delete_user_cb=lambda user: user is not larger)

    checks = verified(only=[quantise_wrongly if each is quantise else each for each in PASSES])
    assert wrong_in(checks) == {("block.layers.0.mlp.down_proj", True)}


def test_a_kernel_that_forgets_a_scale_is_found(monkeypatch):
    op = OPS["linear"]
    (native,) = (kernel for kernel in op.kernels if kernel.name == "native")

    def run(out, scratch, x, weight, experts, counts, x_scale, weight_scale):
        native.run(
            out, scratch, x, weight, experts, counts, x_scale, weight_scale.clone().index_fill_(0, torch.tensor(3), 1.0)
        )

    wrong = Kernel("wrong", native.supports, run, native.workspace)
    monkeypatch.setitem(OPS, "linear", replace(op, kernels=(wrong, *op.kernels)))
    checks = verified()
    assert ("block.layers.0.attention", False) in wrong_in(checks)


def test_one_weight_whose_scales_are_tampered_with_at_load_is_found(monkeypatch):
    real = quantised.QUANTISE

    def tampered(weight):
        codes, scales = real(weight)
        return codes, scales * (1.1 if weight.shape[0] == 3 * SMALL.hidden_size else 1.0)

    monkeypatch.setattr(quantised, "QUANTISE", tampered)
    (whole,) = (check for check in verified() if check.site is None and not check.scheme)
    assert not whole.passed


@pytest.mark.parametrize("scheme", [FP8, FP8_ATTENTION], ids=lambda scheme: scheme.name)
def test_rows_of_codes_are_checked_by_plain_operators(scheme):
    config = replace(SMALL, hidden_size=128, head_dim=32)
    model = random_model(config)
    captured = capture(model, (*random_inputs(config, 3, 2, 5, 4), 3), dynamic_shapes=DYNAMIC)
    captured.target = "sm_90"
    compiled = replace(provenance.snapshot(captured), scheme=scheme)
    changed = provenance.rewrite(compiled, PASSES[:-1])
    inputs = [*random_inputs(config, *SIZES), SIZES[0]]
    checks = check_sites(captured, compiled, changed, weights_of(model), inputs, (AS_GIVEN, "random"))
    assert [check for check in checks if not check.passed] == []
    (step,) = (check for check in checks if check.scheme)
    assert BUDGET < step.error_fused < STEP_BUDGET


@pytest.mark.parametrize("scheme", ["fp8", "fp8-tensor", "te"])
def test_what_this_device_cannot_compute_is_refused(scheme):
    with pytest.raises(
        ValueError, match=f"scheme: got {scheme} for cpu, which cannot compute it, allowed: fp8-weights"
    ):
        verified(scheme=scheme)
