"""Runs as CUDA graphs: buffers of their own, and a run without one where none can be captured.

On a machine without a GPU a graph is played: it records functions, and calls them again when it is replayed.
"""

import contextlib
import threading
from dataclasses import replace

import pytest
import torch

from horsepower.graph.contract import TensorRule
from horsepower.runtime import executor
from horsepower.runtime.devices import StreamOrder, check_free
from horsepower.runtime.replay import Replay, capture
from models import TINY, compiled, random_inputs, random_model


class Played:
    """As much of a CUDA graph as `Replay` asks for."""

    recording = None

    def __init__(self):
        self.functions = []

    def replay(self):
        for function in self.functions:
            function()


class Streams:
    """Which stream is current."""

    current = "caller's"

    @staticmethod
    @contextlib.contextmanager
    def use(stream):
        before, Streams.current = Streams.current, stream
        try:
            yield
        finally:
            Streams.current = before


@contextlib.contextmanager
def play(graph, stream, capture_error_mode):
    assert capture_error_mode == "thread_local"
    before, Streams.current = Streams.current, stream
    Played.recording = graph
    try:
        yield
    finally:
        Played.recording = None
    Streams.current = before  # as in torch, not after an error


def do(function):
    """What a kernel is to a graph: recorded, or done."""
    if Played.recording is None:
        function()
    else:
        Played.recording.functions.append(function)


@pytest.fixture
def played(monkeypatch):
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Played)
    monkeypatch.setattr(torch.cuda, "graph", play)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: Streams.current)
    monkeypatch.setattr(torch.cuda, "stream", Streams.use)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: "side")


def doubled():
    """A run that writes into one buffer."""
    out = torch.full((3,), torch.nan)

    def run(given):
        x, factor = given
        do(lambda: torch.mul(x, 2 * factor, out=out))
        return [out, x, factor]

    return run


def test_inputs_are_copied_in_and_results_out(played):
    first = torch.arange(3.0)
    replay = Replay(doubled(), [first, 2], "side")
    one = replay.run([first, 2])
    other = replay.run([first + 1, 2])
    assert torch.equal(one[0], first * 4)
    assert torch.equal(other[0], first * 4 + 4)
    assert one[2] == 2
    other[0].zero_(), other[1].zero_()
    assert torch.equal(replay.run([first, 2])[0], first * 4)
    assert torch.equal(first, torch.arange(3.0))


def test_what_cannot_be_captured_is_said(monkeypatch, played, caplog):
    def run(given):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    assert capture(run, [], "side") is None
    assert Streams.current == "caller's"
    assert "without a CUDA graph: operation not permitted when stream is capturing" in caplog.text


def test_a_plan_is_recorded_captured_replayed(monkeypatch, played):
    """The second run captures; the plan's calls are played at each further one, with inputs that were never seen."""
    model = random_model(TINY)
    inputs = []
    for i, frames in enumerate((3, 3, 3, 2, 2, 3)):
        tensors = random_inputs(TINY, frames, 2, 5, 4)
        inputs.append((*(x * (1 + i) for x in tensors), frames))
    want = [compiled(model)(*each) for each in inputs]
    bind, programs = executor._Program._bound, set()

    def bound(self, i, call, env):
        programs.add(self)
        self._captures = True  # as on a GPU
        step = bind(self, i, call, env)
        return step if step is None else lambda env: do(lambda: step(env))

    monkeypatch.setattr(executor._Program, "_bound", bound)
    run = compiled(model)
    for each, expected in zip(inputs, want, strict=True):
        assert all(map(torch.equal, run(*each), expected))
    assert [len(program._replay._graph.functions) > 40 for program in programs] == [True, True]


def test_one_capture_at_a_time(played):
    begun, other, end = threading.Event(), threading.Event(), threading.Event()

    def first(given):
        begun.set()
        end.wait(10)
        return []

    def second(given):
        other.set()
        return []

    threads = [threading.Thread(target=capture, args=(run, [], "side")) for run in (first, second)]
    threads[0].start()
    assert begun.wait(10)
    threads[1].start()
    together = other.wait(0.3)
    end.set()
    for thread in threads:
        thread.join()
    assert not together
    assert other.is_set()


def test_what_the_cpu_gives_is_not_captured():
    """A number in its memory becomes an argument of a kernel, and would stay what it was."""
    plan, gpu = compiled(random_model(TINY)).plan, torch.device("cuda", 0)
    sizes = dict.fromkeys(("video_0", "audio_0", "text_0", "coords_0", "frames"), 2) | {"coords_0": 6}
    layout = replace(plan.at(sizes), device=gpu)

    def captures(*on_cpu):
        rules = tuple(
            replace(rule, spec=replace(rule.spec, device=gpu))
            if isinstance(rule, TensorRule) and rule.name not in on_cpu
            else rule
            for rule in plan.contract.rules
        )
        moved = replace(plan, contract=replace(plan.contract, rules=rules))
        return executor._Program(moved, {}, layout, torch.empty(0), None)._captures

    assert (captures(), captures("audio")) == (True, False)


def test_a_plan_runs_on_its_own_gpu(monkeypatch):
    """Streams, events and graphs are those of the current device."""
    run = compiled(random_model(TINY))._run
    run.plan.__dict__["device"] = torch.device("cuda", 1)
    devices = [0]

    def exchange(device):
        devices.append(device)
        return devices[-2]

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    monkeypatch.setattr(executor._Arena, "run", lambda *_: devices.append("run"))
    monkeypatch.setattr(executor.pytree, "tree_unflatten", lambda *_: None)
    run(*random_inputs(TINY, 3, 2, 5, 4), 3)
    assert devices == [0, 1, "run", 0]


def test_missing_memory_is_said_before_it_is_taken(monkeypatch):
    monkeypatch.setattr("horsepower.runtime.devices.free_bytes", lambda device: 3 * 2**30)
    check_free(3 * 2**30, torch.device("cuda", 0))
    with pytest.raises(torch.OutOfMemoryError, match=r"got 4.50 GiB .* allowed: 3.00 GiB .* 1.50 GiB are missing"):
        check_free(9 * 2**29, torch.device("cuda", 0))


def test_one_stream_waits_for_the_other(monkeypatch):
    events = []

    class Event:
        def record(self):
            events.append("record")

        def synchronize(self):
            events.append("synchronize")

    class Stream:
        def wait_event(self, event):
            events.append("wait")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    for device, want in (("cpu", []), ("cuda", ["record", "wait", "record", "synchronize"])):
        order = StreamOrder(torch.device(device))
        for _ in range(2):
            with order:
                pass
        order.finish()
        assert events == want
