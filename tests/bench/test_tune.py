"""What a tuning does with times: a stand-in gives them, so that no GPU and no clock is needed."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch
from torch import nn

from horsepower.bench import tune
from horsepower.bench.tune import Job, jobs_of, measure
from horsepower.graph.capture import capture
from horsepower.kernels import tables
from horsepower.kernels.choice import candidates, choose
from horsepower.kernels.gpu import linear_activation as twin
from horsepower.kernels.ops import ops
from horsepower.kernels.registry import OPS, Kernel
from horsepower.kernels.tables import PARTS, Candidate
from horsepower.kernels.target import target_of

BF16 = torch.bfloat16
F32, E4M3 = torch.float32, torch.float8_e4m3fn
FIRST, SECOND, *_, WHOLE = candidates(OPS["linear_activation"], "sm_90")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Where tables are read and written instead of the package."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    return tmp_path


def meta(*shape):
    return torch.empty(shape, dtype=BF16, device="meta")


def attention(*kernels, window=1):
    """A job: two frames of 20 tokens, then 5 and 4."""
    gate = torch.empty(3 * 2, device="meta")
    q, k, v = (meta(49, heads, 16) for heads in (2, 1, 1))
    op = replace(OPS["attention"], kernels=tuple(kernels))
    return Job(op, (q, k, v, gate, 3, [40, 5, 4], 4, 40, window), 1)


def kernel(name, run=None, refused=None):
    def reference(out, workspace, *inputs):
        for into, result in zip(out, OPS["attention"].reference(*inputs), strict=True):
            into.copy_(result)

    return Kernel(name, lambda *_: refused, run or reference, devices=("cuda",))


def projection(tokens=40, experts=1):
    """A job whose Triton kernel is a stand-in."""
    op = replace(OPS["linear_activation"], kernels=(kernel("triton"),))
    counts = [tokens - 7, 4, 3] if experts == 3 else []
    return Job(op, (meta(tokens, 32), meta(experts * 48, 32), experts, counts, "swiglu7", BF16), 2)


def by_reference(out, workspace, *inputs, config):
    out[0].copy_(OPS["linear_activation"].reference(*inputs)[0])


def timer(**us):
    """Times by the text of a candidate's kernel and configuration; every candidate is run, as by a real one."""

    def times(runs):
        assert all(run()[0].isfinite().all() for run in runs.values())
        found = {way: us.get(way.kernel, 9.0) + 0.5 * (way == SECOND) for way in runs}
        return {way: [1e-6 * (t + i) for i in (-1, 0, 0, 0, 1)] for way, t in found.items()}

    return times


def test_the_fastest_candidate_is_chosen_from_then_on(folder, monkeypatch):
    monkeypatch.setattr(twin, "run", by_reference)
    jobs = [projection(), projection(50), projection(experts=3)]
    done = tune.tune(jobs, "sm_90", {"gpu": "none"}, folder, timer(triton=2.0, parts=3.0), device="cpu")
    assert [point.tokens for _, point in done] == [40, 50, 40]
    assert [path.name for path in folder.iterdir()] == ["linear_activation.sm_90.json"]
    found = tables.table(OPS["linear_activation"], "sm_90")
    assert found.machine == {"gpu": "none"}
    assert {key: [point.tokens for point in points] for key, points in found.sites.items()} == {
        jobs[0].site.key: [40, 50],
        jobs[2].site.key: [40],
    }
    point = found.at(jobs[0].site)
    assert [(each.candidate, each.us) for each in point.timed] == [
        (FIRST, (2.0, 2.0, 2.0)),
        (SECOND, (2.5, 2.5, 2.5)),
        (WHOLE, (3.0, 3.0, 3.0)),
    ]
    chosen = choose(projection().op, projection().inputs, "sm_90")
    assert (chosen.source, chosen.candidate) == ("measured", FIRST)
    tune.tune([projection()], "sm_90", {}, folder, timer(triton=4.0, parts=3.0), device="cpu")
    assert choose(projection().op, projection().inputs, "sm_90").parts
    assert len(tables.table(OPS["linear_activation"], "sm_90").sites) == 1  # a table is written anew


def test_a_candidate_that_is_wrong_or_cannot_run_is_said_and_never_chosen(monkeypatch):
    def run(out, workspace, *inputs, config):
        if config is twin.CONFIGS["sm_90"][0]:
            raise RuntimeError("out of resource: shared memory,\nRequired: 300000")
        by_reference(out, workspace, *inputs, config=config)
        out[0][-1, 0] *= 2.0  # one value of the last row

    monkeypatch.setattr(twin, "run", run)
    point = measure(projection(), "sm_90", timer(triton=1.0, parts=3.0), "cpu")
    first, second, parts = point.timed
    assert first.failed == "out of resource: shared memory, Required: 300000"
    assert second.failed.startswith("wrong: its error is ")
    assert (parts.failed, point.best().candidate.kernel) == (None, PARTS)

    def unwritten(out, workspace, *inputs, config):
        kept = out[0][3].clone()
        by_reference(out, workspace, *inputs, config=config)
        out[0][3] = kept

    monkeypatch.setattr(twin, "run", unwritten)
    point = measure(projection(), "sm_90", timer(), "cpu")
    assert [each.failed for each in point.timed[:2]] == ["wrong: it leaves values that are not finite"] * 2


@pytest.mark.parametrize("window", [-1, 0, 1])
def test_attention_by_any_kernel_is_checked_beside_the_edges_of_frames(window, monkeypatch):
    def off_at(row):
        def run(out, workspace, *inputs):
            out[0].copy_(OPS["attention"].reference(*inputs)[0])
            out[0][row] += 1.0

        return run

    good, refusing = kernel("cudnn"), kernel("torch_flash", refused="torch's own test of the inputs")
    rows = (0, 9, 10, 39, 40, 44, 45, 48) if window == 0 else (0, 39, 40, 44, 45, 48)
    wrong = [kernel(f"wrong at {row}", off_at(row)) for row in rows]
    job = attention(good, *wrong, refusing, window=window)
    monkeypatch.setattr(tune, "DRAWN", 0)
    point = measure(job, "sm_90", timer(), "cpu")
    assert [each.candidate for each in point.timed if each.us] == [Candidate("cudnn")]
    assert point.timed[-1].failed == "torch's own test of the inputs"
    assert all(each.failed.startswith("wrong: ") for each in point.timed[1:-1])


def test_nothing_that_runs_is_no_choice():
    point = measure(attention(kernel("cudnn", refused="no")), "sm_90", timer(), "cpu")
    assert (point.best(), [each.failed for each in point.timed]) == (None, ["no"])


def sized(*shape, dtype=F32):
    return torch.empty(shape, dtype=dtype, device="meta")


QUANTISED = {
    "linear_activation": (meta(40, 32), sized(96, 32, dtype=E4M3), 1, [], "gelu7", E4M3, None, sized(96, 1)),
    "linear_add_rms_norm_quantise": (
        sized(40, 32, dtype=E4M3), sized(96, 32, dtype=E4M3), 1, sized(40, 96), None, sized(96), [], 1e-6,
        sized(40, 1), sized(96, 1),
    ),
    "attention": (meta(40, 4, 16), meta(40, 2, 16), meta(40, 2, 16), None, 1, [], 2, 20, 0, sized(1)),
    "attention of codes": (
        sized(40, 4, 32, dtype=E4M3), sized(40, 2, 32, dtype=E4M3), sized(2, 32, 48, dtype=E4M3), meta(40, 4), 1, [],
        2, 20, 0, sized(1), sized(2),
    ),
    "transpose_to_codes": (meta(40, 2, 32), sized(1)),
}  # fmt: skip


@pytest.mark.parametrize("name", QUANTISED)
def test_codes_are_checked_and_only_configurations_for_them_are_tried(name, monkeypatch):
    op, wrong = OPS[name.split()[0]], [False]

    def run(out, workspace, *inputs, config):
        for into, result in zip(out, op.reference(*inputs), strict=True):
            into.copy_(result)
        codes = next(each for each in out if each.dtype == E4M3)
        row = codes[..., 39] if op.name == "transpose_to_codes" else codes[-1]
        if wrong[0]:
            row.copy_(-row.float())  # one of forty

    monkeypatch.setattr(import_module(f"horsepower.kernels.gpu.{op.name}"), "run", run)
    job = Job(replace(op, kernels=(kernel("triton"),)), QUANTISED[name], 1)

    def times(runs):
        return {way: [1e-6] * 5 for way in runs}

    point = measure(job, "sm_90", times, "cpu")
    tried = [each.candidate.config for each in point.timed if each.candidate.kernel == "triton"]
    form = {"linear_activation": "w8a16", "attention": "BLOCK_M", "transpose_to_codes": "TOKENS"}.get(name, "fp8")
    assert tried
    assert all(config.startswith(form) for config in tried)
    assert [each.failed for each in point.timed] == [None] * len(point.timed)
    wrong[0] = True
    point = measure(job, "sm_90", times, "cpu")
    assert all(each.failed.startswith("wrong: its error is") for each in point.timed if each.candidate.config)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Parameter(torch.randn(256, 512, dtype=BF16))

    def forward(self, x):
        return [ops.linear_activation(y, self.up, 1, [], "silu", BF16) for y in (x, x.sin(), x[:3])]


def test_the_sites_of_a_graph_and_of_its_parts():
    x = torch.randn(5, 512, dtype=BF16)
    graph = capture(Mlp(), (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    sizes = [torch.empty(7, 512, dtype=BF16)]
    assert [(job.op.name, job.site.tokens, job.runs) for job in jobs_of(graph, sizes)] == [
        ("linear_activation", 7, 2),
        ("linear_activation", 3, 1),
    ]
    found = {(job.op.name, job.site.tokens): job for job in jobs_of(graph, sizes, parts=True)}
    assert {name: job.runs for name, job in found.items()} == {
        (name, n): runs for n, runs in ((7, 2), (3, 1)) for name in ("linear_activation", "linear", "activation")
    }
    assert found["activation", 7].site.key == "u=bfloat16[256] kind=silu dtype=bfloat16"


def test_a_folder_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r"output: got .*nowhere', allowed: a folder that is there"):
        tune.tune([projection()], "sm_90", {}, tmp_path / "nowhere", timer(), device="cpu")


def test_parts_come_before_what_they_are_parts_of(folder, monkeypatch):
    said = []
    linear = replace(OPS["linear"], kernels=(kernel("library", OPS["linear"].kernels[0].run),))
    monkeypatch.setattr(twin, "run", by_reference)
    jobs = [projection(), Job(linear, (meta(40, 32), meta(48, 32), 1, []), 1)]
    tune.tune(jobs, "sm_90", {}, folder, timer(), device="cpu", say=said.append)
    assert [line.split(",")[0] for line in said] == ["linear", "linear_activation"]


class Clock:
    """Stands in for a GPU's events: what runs takes its own time, and an event notes when it is reached."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Clock.now

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_the_timer_lets_all_take_turns_and_counts_no_warm_up(monkeypatch):
    calls, empty = [], torch.empty

    def run(name, seconds):
        calls.append(name)
        Clock.now += seconds * (100 if len(calls) <= 3 * tune.WARMUP else 1)  # the first runs are slow

    class Flush:
        def zero_(self):
            Clock.now += 5.0

    monkeypatch.setattr(torch, "empty", lambda *shape, device=None, **how: Flush() if device == "cuda" else empty(1))
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(tune, "_captured", lambda run: run)
    ways = {Candidate(name): seconds for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 3.0))}
    found = tune.cuda_timer({way: lambda way=way: run(way.kernel, ways[way]) for way in ways})
    assert found == {way: pytest.approx([seconds] * tune.ROUNDS) for way, seconds in ways.items()}
    assert "".join(calls[3 * tune.WARMUP :])[:9] == "abcbcacab"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_on_a_gpu(folder):
    x, weight = meta(300, 512), meta(3 * 256, 512)
    job = Job(OPS["linear_activation"], (x, weight, 3, [200, 60, 40], "swiglu7", BF16), 1)
    arch = target_of(torch.device("cuda"))
    ((_, point),) = tune.tune([job], arch, {}, folder, tune.cuda_timer)
    assert [each.failed for each in point.timed] == [None] * len(point.timed)
    assert tables.table(job.op, arch).at(job.site) == point
    q, k, v = (meta(300, heads, 128) for heads in (4, 2, 2))
    gate = torch.empty(300, 4, device="meta")
    for window in (-1, 1):
        inputs = (q, k, v, gate, 1, [240, 40, 20], 6, 240, window)
        timed = measure(Job(OPS["attention"], inputs, 1), arch, tune.cuda_timer).timed
        assert not [each.failed for each in timed if each.failed and each.failed.startswith("wrong")]
        assert all(each.us for each in timed if each.candidate.kernel == "triton")
