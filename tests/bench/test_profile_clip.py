"""Profiles of clips: the same clip with ranges, and every range where it belongs."""

import shlex
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from horsepower.bench import profile_clip
from horsepower.bench.profile_clip import ClipOptions, RangedDiT, Ranges, run_clip_once
from horsepower.bench.profile_report import quartiles
from horsepower.bench.ranges import places, traced
from horsepower.bench.step import Tokens, inputs
from horsepower.runtime.fused import FusedDiT, plan_velocity
from horsepower.runtime.request import Progress
from models import TINY, random_model

CPU = torch.device("cpu")


def test_ranges_change_no_bit_and_the_plain_arena_goes():
    fused = FusedDiT(random_model(TINY))
    engine = SimpleNamespace(ranges=None)
    model, given = RangedDiT(fused, engine), inputs(fused._conditioner, Tokens(12, 5, 3, 3))
    plain = model.velocity(*given)
    assert not [event for event in traced(lambda: model.velocity(*given), CPU, None) if "layers" in event.name]
    assert fused.arena_bytes
    engine.ranges = ranges = Ranges(CPU)
    ranges(Progress("base", 0, 1))
    made = []
    events = traced(lambda: made.append(model.velocity(*given)), CPU, None)
    assert all(torch.equal(*pair) for pair in zip(made[0], plain, strict=True))
    assert fused.arena_bytes == 0
    known = ranges.known("base")
    works = {name for name, place in known.items() if place.work.bytes}
    assert len([name for name in works if name.endswith("attention attention")]) == TINY.num_layers
    assert works <= {event.name for event in events}


def test_under_guidance_a_step_runs_at_two_lengths():
    model = random_model(TINY)
    plan = plan_velocity(model, CPU, cache=False)
    short, long = (inputs(model, Tokens(12, 5, text, 3)) for text in (3, 7))
    ranges = Ranges(CPU)
    ranges(Progress("base", 0, 2))
    for given in (short, long) * 2:
        ranges.ran(plan, given)
    ranges(Progress("base", 2, 2))
    one, other, both = places(plan, short), places(plan, long), ranges.known("base")
    assert both.keys() == one.keys()
    for name, place in both.items():
        assert place.work.flops == one[name].work.flops + other[name].work.flops
        assert place.work.bytes == one[name].work.bytes + other[name].work.bytes


def test_the_command_says_all_that_makes_the_clip():
    options = ClipOptions("A horse", "a folder", "base", resolution=(64, 32), duration=1.5, steps=3, scheme="fp8")
    words = shlex.split(options.command)
    assert words[:4] == ["horsepower", "profile", "A horse", "--once"]
    given = dict(zip(words[4::2], words[5::2], strict=True))
    assert given == {
        "--model": "a folder", "--variant": "base", "--resolution": "64x32", "--duration": "1.5", "--steps": "3",
        "--scheme": "fp8",
    }  # fmt: skip


def test_once_is_one_clip_between_start_and_stop(monkeypatch):
    happened = []

    @contextmanager
    def recording():
        happened.append("start")
        yield
        happened.append("stop")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda.profiler, "profile", recording)
    monkeypatch.setattr(profile_clip, "_opened", lambda options: SimpleNamespace(device=CPU))
    monkeypatch.setattr(profile_clip, "_made", lambda engine, options: happened.append(engine.ranges is not None))
    run_clip_once(ClipOptions("A horse", device="cuda"))
    assert happened == [True, "start", True, "stop"]


def test_what_makes_no_clip_is_refused():
    for wrong, field in (({"duration": 0}, "duration"), ({"steps": 0}, "num_inference"), ({"trace": "a.txt"}, "trace")):
        with pytest.raises(ValueError, match=f"{field}.*: got .*, allowed: "):
            ClipOptions("A horse", **wrong)


def test_quartiles_of_few_steps_lie_between_them():
    assert quartiles([5.0]) == (5.0, 5.0, 5.0)
    assert quartiles([400.0, 2.0]) == (101.5, 201.0, 300.5)
