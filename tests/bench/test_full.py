"""The ladder of a model of any size, on a CPU that stands for the GPU."""

import sys
from dataclasses import replace

import pytest
import torch
import transformer_engine_twin

from horsepower.bench import full, ladder, step
from horsepower.bench.full import Options, climb, exact_velocity, measure
from horsepower.bench.ladder import LABELS, Rung, flat
from horsepower.bench.live import live_peak
from horsepower.bench.report import Figure, Table
from horsepower.bench.seats import Modules, Planned, Pool, TransformerEngine
from horsepower.bench.step import RandomWeights, Tokens
from horsepower.graph.passes import PASSES
from horsepower.graph.passes.lower import lower
from horsepower.quant.scheme import TE, TE_DELAYED
from horsepower.runtime import compiled
from horsepower.runtime.calibration import largest_inputs
from horsepower.runtime.checkpoint import fill
from horsepower.runtime.executor import weights_of
from horsepower.runtime.fused import plan_velocity
from horsepower.runtime.models.dit import DiT
from models import TINY

CPU = torch.device("cpu")
META = DiT(replace(TINY, hidden_size=128, head_dim=32), device="meta")
ONE = DiT(replace(META.config, num_layers=1, mm_layers=(), gelu7_layers=()), device="meta")
PLANS = ("plan", "fuse_gate", "fuse_qkv", "fuse_activation", "fp8-weights")
QUICK = Options(Tokens(12, 5, 4, 2), rounds=3, skip=("regional", *PLANS[1:]))


@pytest.fixture
def te(monkeypatch):
    return transformer_engine_twin.install(monkeypatch)


@pytest.fixture
def loads(monkeypatch):
    """What was loaded and dropped, in order."""
    seen = []
    for kind in (Modules, Planned):
        for name in ("load", "drop"):
            monkeypatch.setattr(kind, name, noted(seen, f"{name} {kind.__name__}", getattr(kind, name)))
    return seen


def noted(seen, what, own):
    def run(self):
        seen.append(what)
        own(self)

    return run


def test_all_rungs_are_timed_and_nothing_is_made_twice(loads):
    rungs = measure(META, QUICK, CPU)
    assert [rung.key for rung in rungs] == ["eager", "plan", "fuse_add_norm"]
    assert all(len(rung.seconds) == 3 and not rung.failed for rung in rungs)
    assert all(1e-4 < rung.error < 0.03 for rung in rungs)
    assert [rung.compile_seconds is None for rung in rungs] == [True, False, False]
    assert all(rung.peak > sum(x.nbytes for x in META.state_dict().values()) for rung in rungs)
    assert loads == ["load Modules", "load Planned", "load Planned"]


def test_where_memory_is_short_rungs_take_turns(loads):
    seats = [Modules(META, RandomWeights(META, CPU), CPU)]
    most = seats[0].bytes + full.memory.activation_bytes(META.config, QUICK.tokens.grid, QUICK.tokens.text)
    said = []
    rungs = measure(META, replace(QUICK, skip=("regional", *PLANS)), CPU, said.append, capacity=most)
    assert [len(rung.seconds) for rung in rungs] == [3, 3]
    # eager, plan | plan, eager | eager, plan
    there = ["load Modules", "drop Modules", "load Planned", "drop Planned", "load Modules", "drop Modules"]
    assert loads == [*there, "load Planned"]
    assert said == ["computing a sample in float64", "planning + fuse_add_norm (all)"] + [
        f"round {i} of 3" for i in (1, 2, 3)
    ]


def test_a_rung_that_cannot_fit_says_what_is_missing(loads):
    alone = Planned(plan_velocity(META, CPU, False), {}, QUICK.tokens).bytes
    rungs = measure(META, replace(QUICK, skip=("regional", *PLANS)), CPU, capacity=alone)
    assert "ValueError: device: got 0.0 GiB free, allowed: at least 0.0; 0.0 GiB are missing" in rungs[0].failed
    assert loads == ["load Planned"]
    assert [rung.failed == "" for rung in rungs] == [False, True]
    made = full.report("A step", QUICK, rungs, "here")
    table = next(part for part in made.parts if isinstance(part, Table))
    assert [row[4] for row in table.rows] == [None, None]  # there is no eager to compare with
    assert not [part for part in made.parts if isinstance(part, Figure)]


def test_a_rung_that_fails_is_told_and_the_others_go_on(monkeypatch):
    def fail(self):
        raise torch.OutOfMemoryError("no room\nat all")

    monkeypatch.setattr(Modules, "load", fail)
    eager, fused = measure(META, replace(QUICK, skip=("regional", *PLANS)), CPU)
    assert eager.failed == "OutOfMemoryError: no room"
    assert (fused.failed, len(fused.seconds)) == ("", 3)


@pytest.fixture
def hopper(monkeypatch):
    """The CPU plays a GPU whose kernels are the plain operators."""
    for module in (full, compiled):
        monkeypatch.setattr(module, "target_of", lambda device: "sm_90")
    plain = tuple(each for each in PASSES if each is not lower)
    monkeypatch.setattr(ladder, "PASSES", plain)


EIGHT = ["fp8-weights", "fp8-tensor", "fp8", "fp8-attention"]
ENGINES = ["te", "te-block", "te-delayed"]
FUSIONS = tuple(key for key in PLANS if key not in EIGHT)


def test_all_schemes_climb_on_a_hopper_without_transformer_engine(hopper, loads, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)
    skip = ("regional", "fuse_add_norm", *FUSIONS)
    rungs = {rung.key: rung for rung in measure(ONE, replace(QUICK, skip=skip), CPU)}
    assert list(rungs) == ["eager", *ENGINES, *EIGHT]
    for key, rung in rungs.items():
        assert (rung.failed == "") == (len(rung.seconds) == 3) == (key not in ENGINES)
    assert all("allowed: where Transformer Engine is installed" in rungs[key].failed for key in ENGINES)
    assert all(0.01 < rungs[key].error < 0.15 for key in EIGHT)
    assert loads == ["load Modules", *["load Planned"] * len(EIGHT)]  # nobody gave way for what is not there
    table = next(part for part in full.report("", QUICK, [*rungs.values()], "").parts if isinstance(part, Table))
    assert [row[0] for row in table.rows if "installed" in row[-1]] == [LABELS[key] for key in ENGINES]


def test_transformer_engine_climbs_in_the_same_rounds(hopper, te):
    skip = ("regional", "fuse_add_norm", *FUSIONS, *EIGHT)
    rungs = plain, *engines = measure(META, replace(QUICK, skip=skip), CPU)
    assert [rung.key for rung in rungs] == ["eager", *ENGINES]
    assert all(len(rung.seconds) == 3 and not rung.failed for rung in rungs)
    assert all(rung.error < 1.1 * plain.error for rung in engines[:2])  # the stand-in has 16 bits
    assert 0.01 < engines[2].error < 0.15
    learners = [layer for _, layer in te.made if not layer.eight]
    assert len(learners) == 2 * 4 * 3 + 4
    assert {layer.ran for layer in learners} == {2}


def test_what_transformer_engine_holds_and_that_it_learns_once(te):
    weights, given = RandomWeights(META, CPU), step.inputs(filled(), QUICK.tokens)
    for scheme in (TE, TE_DELAYED):
        seat = TransformerEngine(META, weights, CPU, scheme, given)
        wide = sum(x.nbytes for x in weights_of(META).values())
        linear = sum(x.numel() for name, x in META.named_parameters() if x.dtype == torch.bfloat16)
        assert seat.bytes == (wide if scheme is TE_DELAYED else wide - linear)
        with torch.no_grad():
            for _ in range(2):
                seat.load()
                assert seat.bytes == wide - linear
                assert all(x.isfinite().all() for x in seat.velocity(*given))
                seat.drop()
    assert sum(not layer.eight for _, layer in te.made) == 28


def test_a_plan_that_cannot_be_made_says_so(monkeypatch):
    plan = full.plan_velocity

    def fail(model, device, strict, passes, **how):
        if passes == ladder.PASSES:
            raise ValueError("no plan\nat all")
        return plan(model, device, strict, passes, **how)

    monkeypatch.setattr(full, "plan_velocity", fail)
    eager, first, last = measure(ONE, QUICK, CPU)
    assert (eager.failed, first.failed, last.failed) == ("", "", "ValueError: no plan")
    assert [len(rung.seconds) for rung in (eager, first, last)] == [3, 3, 0]


class Chair:
    def __init__(self, size, events):
        self.bytes, self._events = size, events

    def load(self):
        self._events.append(("load", self.bytes))

    def drop(self):
        self._events.append(("drop", self.bytes))


def test_who_sat_longest_without_a_turn_goes_first():
    events = []
    a, b, c = (Chair(size, events) for size in (1, 2, 3))
    pool = Pool(5)
    assert [pool.take(each, 1) for each in (a, b, a)] == [True, True, False]
    assert pool.take(c, 1)  # b goes, a stays
    assert events == [("load", 1), ("load", 2), ("drop", 2), ("load", 3)]
    assert (pool.beside(a), pool.beside(c), pool.beside(b)) == (3, 1, 4)
    assert not pool.take(c, 2)  # more room for its run: a goes
    assert events[4:] == [("drop", 1)]
    with pytest.raises(ValueError, match="device: got .* GiB are missing"):
        pool.take(b, 4)
    pool.clear()
    assert events[5:] == [("drop", 3)]


def test_on_a_gpu_the_allocator_counts(monkeypatch):
    """Played: what the others hold is not the rung's."""
    said = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: said.append("reset"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait"))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100)
    pool, mine, other = Pool(90), Chair(30, []), Chair(40, [])
    for chair in (mine, other):
        pool.take(chair, 0)
    assert full._peak(lambda: said.append("run"), torch.device("cuda", 0), mine, pool) == 60
    assert said == ["reset", "run", "wait"]


def test_seats_hold_what_they_state():
    weights, tokens = RandomWeights(META, CPU), QUICK.tokens
    for seat in (Modules(META, weights, CPU), Planned(plan_velocity(META, CPU), weights, tokens)):
        held = live_peak(seat.load)
        assert 0 < held < 1.1 * seat.bytes
        seat.drop()
    modules = Modules(META, weights, CPU)
    modules.load()
    shared = zip(modules.eager.parameters(), modules.regional.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in shared)
    modules.drop()
    assert all(x.is_meta for each in (modules.eager, modules.regional) for x in each.state_dict().values())


def filled():
    whole = DiT(META.config, device="meta")
    fill(whole, RandomWeights(META, CPU), CPU)
    return whole


def test_float64_comes_a_layer_at_a_time():
    weights, whole = RandomWeights(META, CPU), filled()
    given = step.inputs(whole, QUICK.tokens)
    exact = DiT(replace(META.config, params_dtype=torch.float64), torch.float64, "meta")
    fill(exact, {name: x.double() for name, x in whole.state_dict().items()}, CPU)
    wide = [x.double() for x in (*given[:2], *given[2])]
    with torch.no_grad():
        wanted = exact.velocity(*wide[:2], type(given[2])(*wide[2:]), given[3])
        got = []
        held = live_peak(lambda: got.extend(exact_velocity(META, weights, given)))
        with largest_inputs(exact) as largest:
            exact.velocity(*wide[:2], type(given[2])(*wide[2:]), given[3])
    assert torch.equal(flat(got[0]), flat(wanted))
    assert got[1] == largest
    assert len(largest) == 12
    assert held < 0.7 * sum(x.nbytes for x in exact.state_dict().values())


def test_the_report_gives_times_and_ratios():
    rungs = [
        Rung("eager", (0.2, 0.2, 0.2), peak=2**31, error=0.01),
        Rung("regional", (0.1, 0.1, 0.1), 60.0, 2**30),
        Rung("fuse_add_norm", (0.05, 0.05, 0.04), 7.0, 2**30, 0.01),
    ]
    made = full.report("A step of the distilled model", QUICK, rungs, "a GPU")
    table = next(part for part in made.parts if isinstance(part, Table))
    rows = {row[0]: dict(zip(table.columns, row, strict=True)) for row in table.rows}
    fused = rows[LABELS["fuse_add_norm"]]
    assert (fused["ms"], fused["eager / rung"], fused["torch.compile / rung"]) == (50.0, 4.0, 2.0)
    assert (rows["eager"]["peak GiB"], rows["eager"]["compile s"]) == (2.0, None)
    assert rows[LABELS["regional"]]["error"] is None
    assert "21 tokens" in table.title
    assert next(part for part in made.parts if isinstance(part, Figure)).svg.count("<rect") == 3


@pytest.mark.parametrize(("field", "value"), [("rounds", 2), ("skip", ("eager",)), ("skip", ("warp",))])
def test_what_cannot_be_measured_is_refused(field, value):
    with pytest.raises(ValueError, match=f"^{field}: got .*, allowed: "):
        replace(QUICK, **{field: value})


def test_climb_says_where(monkeypatch):
    monkeypatch.setattr(full, "measure", lambda *_: [Rung("eager", (1.0, 1.0, 1.0))])
    made = climb(META, QUICK, CPU, "A step")
    assert made.title == "A step"
    assert "torch" in made.machine
