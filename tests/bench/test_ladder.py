"""The ladder, small: what it measures, how it is told, and what happens when a rung fails."""

import json
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest
import torch

from horsepower.bench import ladder
from horsepower.bench.ladder import LABELS, Options, Rung, climb, measure
from horsepower.bench.report import Figure, Paragraph, Table
from horsepower.bench.step import Tokens
from horsepower.graph.passes import PASSES
from horsepower.quant.scheme import FP8, FP8_ATTENTION, FP8_TENSOR, FP8_WEIGHTS
from horsepower.runtime.presets import FOAL

SMALL = Options(
    tokens=(Tokens(12, 5, 4, 2), Tokens(30, 2, 0, 2)), window=1, hidden=128, layers=3, rounds=3,
    skip=("whole", "regional", "fuse_gate", "fuse_qkv", "fuse_activation"),
)  # fmt: skip

TINY = Options(tokens=(Tokens(4, 3, 2),), hidden=128, layers=1, rounds=3, skip=ladder.QUICK["skip"])


@pytest.fixture(scope="module")
def report():
    said = []
    return climb(SMALL, said.append), said


def test_every_rung_is_measured_at_every_length(report):
    tables = [part for part in report[0].parts if isinstance(part, Table)]
    assert [table.title.split(":")[0] for table in tables] == ["21 tokens", "32 tokens"]
    for table in tables:
        rows = [dict(zip(table.columns, row, strict=True)) for row in table.rows]
        names = ["eager", "plan without fusion", "+ fuse_add_norm (all)", "all, fp8-weights"]
        assert [row["rung"] for row in rows] == names
        assert [rows[0][name] for name in ("eager / rung", "lower quartile", "upper quartile")] == [1.0] * 3
        assert all(0 < row["lower quartile"] <= row["eager / rung"] <= row["upper quartile"] for row in rows)
        assert all(row["torch.compile / rung"] is None and row["note"] == "" for row in rows)
        assert rows[0]["compile s"] is None
        assert all(row["compile s"] > 0 for row in rows[1:])
        assert all(1e-4 < row["error"] < 0.02 for row in rows[:-1])  # bfloat16 products of three layers
        assert 0.02 < rows[-1]["error"] < 0.1
        assert all(row["peak MiB"] > 0.05 for row in rows)


def test_the_report_says_what_it_is_of(report):
    made, said = report
    assert all(word in made.machine for word in ("torch", "threads", ladder.ISAS[0], "OMP_WAIT_POLICY"))
    model = next(part.text for part in made.parts if isinstance(part, Paragraph))
    assert "3 layers, hidden 128, 2 + 1 heads of 64, bfloat16, a window of 1 frames" in model
    assert [line for line in said if "compiling" in line] == [
        f"compiling {LABELS[key]}" for key in ("plan", "fuse_add_norm", "fp8-weights")
    ]
    figures = [part for part in made.parts if isinstance(part, Figure)]
    assert len(figures) == 2
    assert figures[0].svg.count("<rect") == 4
    assert len(json.loads(made.json())["tables"]) == 2
    assert made.html().count("<svg") == 2
    assert "ms" not in made.text().split()  # no absolute times of a CPU


def test_the_model_is_the_preset_in_another_size():
    assert Options().config == FOAL
    small = Options(hidden=512, layers=6, window=2).config
    assert (small.num_heads_q, small.num_query_groups, small.head_dim) == (8, 4, 64)
    assert (small.mm_layers, small.gelu7_layers, small.local_attn_layers) == ((0, 5), (0,), (0, 1, 2, 4, 5))
    assert Options(layers=1).config.mm_layers == (0,)


def test_each_rung_adds_one_fusion_and_the_last_is_what_the_engine_runs():
    plans = list(ladder.climbed((), "sm_90"))
    others = ("eager", "whole", "regional", "te", "te-block", "te-delayed")
    assert [key for key, *_ in plans] == [key for key in LABELS if key not in others]
    fusions, schemes = plans[:-4], (FP8_WEIGHTS, FP8_TENSOR, FP8, FP8_ATTENTION)
    assert plans[-4:] == [(scheme.name, PASSES, scheme) for scheme in schemes]
    assert [key for key, *_ in ladder.climbed(("plan",), "cpu")][-2:] == [ladder.ALL, "fp8-weights"]
    assert fusions[-1] == (ladder.ALL, PASSES, None)
    assert not any(each.__name__.startswith("fuse_") for each in fusions[0][1])
    for (_, fewer, _), (key, more, _) in pairwise(fusions):
        assert [each.__name__ for each in more if each not in fewer] == [key]
        assert [each for each in more if each in fewer] == list(fewer)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"tokens": ()}, "tokens"),
        ({"hidden": 192}, "hidden"),
        ({"layers": 0}, "layers"),
        ({"rounds": 2}, "rounds"),
        ({"processes": 0}, "processes"),
        ({"window": -1}, "window"),
        ({"skip": ("eager",)}, "skip"),
        ({"skip": ("nonsense",)}, "skip"),
    ],
)
def test_what_cannot_be_measured(change, field):
    with pytest.raises(ValueError, match=rf"^{field}: got .*, allowed: "):
        replace(SMALL, **change)


def test_without_a_compiler_the_row_says_so_and_the_ladder_goes_on(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", ("no-such-compiler",))
    options = replace(TINY, skip=tuple(key for key in TINY.skip if key != "whole"))
    (rungs,) = measure(options)
    assert [rung.key for rung in rungs] == ["eager", "whole", "fuse_add_norm"]
    assert "no-such-compiler" in rungs[1].failed
    assert not rungs[1].seconds
    assert all(len(rung.seconds) == 3 for rung in (rungs[0], rungs[2]))
    report = ladder._report(options, [[rungs]])
    table = next(part for part in report.parts if isinstance(part, Table))
    assert table.rows[1][:-1] == ("torch.compile, whole", *[None] * 7)
    assert "no-such-compiler" in table.rows[1][-1]
    assert next(part for part in report.parts if isinstance(part, Figure)).svg.count("<rect") == 2


def test_eager_is_not_passed_off_as_torch_compile():
    with torch.compiler.set_stance("force_eager"):
        (rungs,) = measure(replace(TINY, skip=tuple(key for key in TINY.skip if key not in ("whole", "regional"))))
    assert [rung.failed.partition(",")[0] for rung in rungs] == ["", *["RuntimeError: nothing was compiled"] * 2, ""]


def process(eager, whole, fused):
    rung = {"peak": 2**20, "error": 0.01}
    return [[
        Rung("eager", eager, **rung),
        Rung("whole", whole, 60.0, **rung),
        Rung("regional", failed="no"),
        Rung("fuse_add_norm", fused, 3.0, **rung),
    ]]  # fmt: skip


def test_of_several_processes_the_median_of_medians_and_the_span():
    runs = [
        process((8.0, 8.0, 80.0), (4.0, 4.0, 40.0), (4.0, 4.0, 40.0)),
        process((9.0, 9.0, 9.0), (6.0, 6.0, 6.0), (3.0, 3.0, 3.0)),
        process((20.0, 20.0, 20.0), (10.0, 10.0, 10.0), (2.0, 2.0, 2.0)),
    ]
    made = ladder._report(Options(processes=3), runs)
    table = next(part for part in made.parts if isinstance(part, Table))
    assert table.columns[1:5] == ("eager / rung", "lowest", "highest", "torch.compile / rung")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["+ fuse_add_norm (all)"] == (3.0, 2.0, 10.0, 2.0, 3.0, 1.0, 0.01, "")
    assert rows["torch.compile, whole"] == (2.0, 1.5, 2.0, 1.0, 60.0, 1.0, 0.01, "")
    assert rows["torch.compile, each layer"] == (*[None] * 7, "no")
    assert "3 fresh processes" in made.text()


def test_processes_are_fresh(monkeypatch):
    monkeypatch.setattr(ladder, "_fresh", cache(ladder._fresh))  # one is enough to see that it works
    said = []
    made = climb(replace(TINY, processes=2), said.append)
    table = next(part for part in made.parts if isinstance(part, Table))
    assert said == ["process 1 of 2", "process 2 of 2"]
    assert [row[0] for row in table.rows] == ["eager", "+ fuse_add_norm (all)"]
    assert table.rows[1][1] == table.rows[1][2] == table.rows[1][3] > 0


def test_a_process_that_fails_is_an_error_with_its_last_words(monkeypatch):
    monkeypatch.setattr(ladder.sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="failed with code 1"):
        climb(Options(processes=2))


@pytest.mark.slow
def test_beside_torch_compile():
    """Both ways of torch.compile, a minute or so: compiled code is what is timed, and the ratios are to the faster."""
    options = replace(SMALL, tokens=(Tokens(12, 5, 4, 2),), skip=("plan", "fuse_gate", "fuse_qkv", "fuse_activation"))
    (rungs,) = measure(options)
    assert [rung.failed for rung in rungs] == [""] * 4
    eager, whole, regional, _ = rungs
    assert whole.peak < eager.peak  # it fuses: had it fallen back to eager, they would be equal
    assert regional.peak < eager.peak
    assert all(1e-4 < rung.error < 0.02 for rung in rungs)
    tables = [part for part in ladder._report(options, [[rungs]]).parts if isinstance(part, Table)]
    assert 1.0 in [row[4] for row in tables[0].rows[1:3]]  # the faster one beside itself
