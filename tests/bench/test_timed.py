"""Each kernel of a plan is run with inputs of its own sizes, and timed once however often it runs."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils import _pytree as pytree

from horsepower import predicting
from horsepower.bench.roofline import grouped, ladder
from horsepower.bench.timed import kernel_seconds
from horsepower.kernels.target import target_of
from horsepower.quant.scheme import FP8_WEIGHTS
from horsepower.runtime.fused import velocity_example
from models import TINY, random_model

CONFIG = replace(TINY, num_layers=2, mm_layers=(0,), gelu7_layers=())
TOKENS = (12, 5, 4), 3  # of each modality, frames


@pytest.mark.parametrize("scheme", [None, FP8_WEIGHTS], ids=["bfloat16", "fp8-weights"])
def test_every_kernel_of_ours_is_run_once_and_timed(scheme):
    model = random_model(CONFIG)
    inputs = pytree.tree_leaves(velocity_example(model, *TOKENS))
    captured, parts, plans = predicting.graphs_of(model, "cpu", () if scheme is None else (scheme,))
    plan = plans[predicting.plan_name(scheme)]
    (*_, rung) = ladder(captured, parts, {"plan": plan}, inputs)
    ran = Counter()

    def timer(runs):
        ((way, run),) = runs.items()
        assert all(bool(x.float().isfinite().all()) for x in run())
        ran[way.kernel] += 1
        return {way: [3.0, 1.0, 2.0 + len(ran)]}

    seconds = kernel_seconds(plan, inputs, timer, "cpu")
    ours = [kernel for kernel, _ in grouped(rung.kernels) if not kernel.name.startswith("aten")]
    assert set(seconds) == set(ours)
    assert sum(ran.values()) == len(seconds) < len([k for k in rung.kernels if k in seconds])
    assert set(seconds.values()) == {3.0}


def test_what_was_timed_stands_beside_its_floor(monkeypatch):
    """As on a GPU: twice the floor is half of it."""
    gpu = predicting.GPUS["h100"]
    monkeypatch.setattr(predicting, "_gpu", lambda name: gpu)
    monkeypatch.setattr(predicting.step, "released", lambda variant: random_model(CONFIG))

    def twice(plan, inputs):
        (*_, rung) = ladder(plan, plan, {"plan": plan}, inputs)
        return {kernel: 2 * gpu.peak.seconds(kernel) for kernel in rung.kernels if kernel.name == "attention"}

    monkeypatch.setattr("horsepower.bench.timed.kernel_seconds", twice)
    tokens = predicting.Tokens(12, 5, 4, 3)
    report = predicting.predict("here", "256p", tokens)
    (table,) = (part for part in report.parts if getattr(part, "title", "") == predicting.KERNELS)
    rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
    shares = {row["kernel"]: row["share of the floor"] for row in rows}
    assert shares["attention"] == pytest.approx(0.5)
    assert [name for name, share in shares.items() if share is not None] == ["attention"]
    assert "its weights from memory" in report.text()
    assert "Measured times are missing" not in report.text()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu():
    model = random_model(replace(CONFIG, hidden_size=256, head_dim=128, num_query_groups=1))
    inputs = pytree.tree_leaves(velocity_example(model, *TOKENS))
    target = target_of(torch.device("cuda"))
    *_, plans = predicting.graphs_of(model, target, ())
    seconds = kernel_seconds(plans["plan"], inputs)
    assert seconds
    assert all(0 < each < 1 for each in seconds.values())
