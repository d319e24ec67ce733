"""The ladder: one velocity step of a DiT as eager, as torch.compile, and as a plan with one fusion more a rung.

All rungs of a length take turns in one run. Only ratios are reported: absolute times of a CPU mean little elsewhere.
"""

import copy
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from horsepower.bench.live import allocated_peak
from horsepower.bench.measure import Ratio, machine, paired, ratio
from horsepower.bench.plot import Bar, bars
from horsepower.bench.report import Cell, Figure, Paragraph, Report, Table
from horsepower.bench.step import Tokens, inputs
from horsepower.graph.passes import PASSES, Pass
from horsepower.kernels.native_library import ISAS
from horsepower.quant.scheme import FP8, FP8_ATTENTION, FP8_TENSOR, FP8_WEIGHTS, TE, TE_BLOCK, TE_DELAYED, Scheme
from horsepower.runtime.compiled import Compiled
from horsepower.runtime.foal import generate
from horsepower.runtime.fused import compile_velocity
from horsepower.runtime.models.dit import Condition, DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.presets import FOAL

Velocity = Callable[..., Any]
Say = Callable[[str], None]

FUSIONS = tuple(each for each in PASSES if each.__name__.startswith("fuse_"))
SCHEMES = (FP8_WEIGHTS, FP8_TENSOR, FP8, FP8_ATTENTION)  # of plans
RECIPES = (TE, TE_BLOCK, TE_DELAYED)  # of Transformer Engine, in the place of a plan
LABELS = {
    "eager": "eager",
    "whole": "torch.compile, whole",
    "regional": "torch.compile, each layer",
    **{scheme.name: f"eager, {scheme.name}" for scheme in RECIPES},
    "plan": "plan without fusion",
    **{each.__name__: f"+ {each.__name__}" for each in FUSIONS},
}
ALL = FUSIONS[-1].__name__
LABELS[ALL] += " (all)"
LABELS |= {scheme.name: f"all, {scheme.name}" for scheme in SCHEMES}


@dataclass(frozen=True)
class Options:
    """What is measured. Raises ValueError for what cannot be."""

    tokens: tuple[Tokens, ...] = (Tokens(446, 26, 40),)
    window: int | None = None  # of layers n % 4 != 3, in latent frames on either side; None: all layers see everything
    hidden: int = FOAL.hidden_size
    layers: int = FOAL.num_layers
    rounds: int = 11
    processes: int = 1  # more than one: each run in a fresh process
    skip: tuple[str, ...] = ()  # keys of LABELS

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("tokens: got none, allowed: counts of video, audio and text, once or more")
        if self.hidden not in (128, 256, 512):
            raise ValueError(f"hidden: got {self.hidden}, allowed: 128, 256, 512")
        for name, least in (("layers", 1), ("rounds", 3), ("processes", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: got {getattr(self, name)}, allowed: at least {least}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"window: got {self.window}, allowed: at least 0")
        allowed = [name for name in LABELS if name != "eager"]
        if wrong := [name for name in self.skip if name not in allowed]:
            raise ValueError(f"skip: got {wrong[0]!r}, allowed: {', '.join(allowed)}")

    @property
    def config(self) -> DiTConfig:
        """The preset's model in this size: heads of 64, two to a key-value head; the first and the last tenth of the
        layers with weights of their own for each modality."""
        edge = -(-self.layers // 10)
        first, last = range(min(edge, self.layers)), range(max(self.layers - edge, 0), self.layers)
        return replace(
            FOAL,
            hidden_size=self.hidden,
            num_query_groups=self.hidden // 128,
            num_layers=self.layers,
            mm_layers=tuple(sorted({*first, *last})),
            gelu7_layers=tuple(first),
            local_attn_layers=() if self.window is None else tuple(n for n in range(self.layers) if n % 4 != 3),
            frame_receptive_field=FOAL.frame_receptive_field if self.window is None else self.window,
        )


# Options: eager and the whole plan.
QUICK: dict[str, Any] = {"rounds": 5, "skip": tuple(key for key in LABELS if key not in ("eager", ALL))}


@dataclass(frozen=True)
class Rung:
    """One way to run the step, as one process measured it."""

    key: str
    seconds: tuple[float, ...] = ()  # of each round; none if it failed
    compile_seconds: float | None = None  # until the first result
    peak: int | None = None  # bytes
    error: float | None = None  # relative L2 against float64
    failed: str = ""  # why it could not be measured


@dataclass(frozen=True)
class _Step:
    """A step's inputs, and its exact result."""

    inputs: tuple[Any, ...]
    exact: Tensor

    def error(self, result: Sequence[Tensor]) -> float:
        return float((flat(result).double() - self.exact).norm() / self.exact.norm())


def climb(options: Options, say: Say = lambda _: None) -> Report:
    """Measure every rung at every length. `say` gets a line now and then: it takes minutes."""
    if options.processes == 1:
        runs = [measure(options, say)]
    else:
        runs = []
        for i in range(options.processes):
            say(f"process {i + 1} of {options.processes}")
            runs.append(_fresh(replace(options, processes=1)))
    return _report(options, runs)


def measure(options: Options, say: Say = lambda _: None) -> list[list[Rung]]:
    """The rungs at each length, in this process."""
    model = DiT(options.config)
    generate(model, "bench")
    _warm_compilers(options)
    with torch.no_grad():
        plans: dict[str, Compiled] = {}
        for key, passes, scheme in climbed(options.skip, "cpu"):
            say(f"compiling {LABELS[key]}")
            plans[key] = compile_velocity(model, passes, cache=False, scheme=scheme)
        return [list(_measure(model, plans, tokens, options, say)) for tokens in options.tokens]


def _measure(model: DiT, plans: Mapping[str, Compiled], tokens: Tokens, options: Options, say: Say) -> Iterator[Rung]:
    """The rungs at one length."""
    step = _step(model, tokens)
    ways: dict[str, Velocity] = {"eager": model.velocity}
    rungs = {"eager": Rung("eager")}
    torch._dynamo.reset()
    for key, build in _TORCH.items():
        if key not in options.skip:
            say(f"compiling {LABELS[key]}")
            try:
                ways[key], rungs[key] = compile_cold(key, partial(build, model), step.inputs)
            except Exception as error:  # a compiler that is not there, or code that it cannot compile: the row says so
                rungs[key] = Rung(key, failed=f"{type(error).__name__}: {first_line(error)}")
    for key, plan in plans.items():
        start = time.perf_counter()
        plan(*step.inputs)
        ways[key] = plan
        rungs[key] = Rung(key, compile_seconds=plan.seconds + time.perf_counter() - start)
    say(f"measuring {tokens.total} tokens, {options.rounds} rounds")
    calls = {key: _call(run, step.inputs) for key, run in ways.items()}
    seconds = paired(calls, options.rounds, warmup=2)
    for key, rung in rungs.items():
        if not rung.failed:
            held = plans[key].peak(*step.inputs) if key in plans else 0  # the arena is there before
            peak = held + allocated_peak(calls[key])
            rung = replace(rung, seconds=seconds[key], peak=peak, error=step.error(calls[key]()))
        yield rung


def _call(run: Velocity, inputs: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: run(*inputs)


def climbed(skip: Sequence[str], target: str) -> Iterator[tuple[str, tuple[Pass, ...], Scheme | None]]:
    """Each plan's key and passes: all that are no fusion, and one fusion more each time; then under each scheme.

    Schemes are as they are: who makes the plan calibrates them.
    """
    for i, key in enumerate(("plan", *(each.__name__ for each in FUSIONS))):
        if key not in skip:
            yield key, tuple(each for each in PASSES if each not in FUSIONS[i:]), None
    for scheme in SCHEMES:
        if target in scheme.targets and scheme.name not in skip:
            yield scheme.name, PASSES, scheme


def _whole(model: DiT) -> Velocity:
    return torch.compile(model.velocity, dynamic=False)


def _regional(model: DiT) -> Velocity:
    """Each layer by itself, in a copy that shares all tensors: equal layers share their code."""
    twin: DiT = copy.deepcopy(model, {id(x): x for x in (*model.parameters(), *model.buffers())})
    for layer in twin.block.layers:
        layer.compile(dynamic=False)
    return twin.velocity


_TORCH: dict[str, Callable[[DiT], Velocity]] = {"whole": _whole, "regional": _regional}


def compile_cold(key: str, build: Callable[[], Velocity], inputs: tuple[Any, ...]) -> tuple[Velocity, Rung]:
    """From an empty cache to the first result. Raises RuntimeError if it ran eager: Dynamo does so in silence."""
    from torch._dynamo.utils import counters
    from torch._inductor.utils import fresh_cache

    before = counters["stats"]["unique_graphs"]
    with fresh_cache(), torch._dynamo.config.patch(fail_on_recompile_limit_hit=True, suppress_errors=False):
        start = time.perf_counter()
        run = build()
        run(*inputs)
        seconds = time.perf_counter() - start
    if counters["stats"]["unique_graphs"] == before:
        raise RuntimeError("nothing was compiled, it ran eager; is torch.compile disabled?")
    return run, Rung(key, compile_seconds=seconds)


def _warm_compilers(options: Options) -> None:
    """Let both compilers import what they need, so that the first to run does not pay for it."""
    from torch._inductor.utils import fresh_cache

    model = DiT(replace(options.config, num_layers=1, mm_layers=(), gelu7_layers=(), local_attn_layers=()))
    compile_velocity(model)
    if not set(_TORCH).issubset(options.skip):
        torch._dynamo.reset()
        with fresh_cache(), torch.no_grad():
            try:
                torch.compile(torch.sin, dynamic=False)(torch.ones(64))
            except Exception:  # the rungs will say what is wrong
                return


def _step(model: DiT, tokens: Tokens) -> _Step:
    """Random inputs, and the result of the same weights in float64."""
    exact = DiT(replace(model.config, params_dtype=torch.float64), torch.float64)
    for own, narrow in zip(exact.parameters(), model.parameters(), strict=True):
        own.copy_(narrow)
    given = video, audio, condition, frames = inputs(model, tokens)
    wide = Condition(condition.text.double(), condition.rope.double())
    return _Step(given, flat(exact.velocity(video.double(), audio.double(), wide, frames)))


def flat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def _fresh(options: Options) -> list[list[Rung]]:
    """The rungs as a process of its own measures them. Raises RuntimeError with its last words if it fails."""
    command = [sys.executable, "-m", "horsepower.bench.ladder", json.dumps(dataclasses.asdict(options))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"a process failed with code {done.returncode}: {done.stderr.strip()[-2000:]}")
    lengths = json.loads(done.stdout.splitlines()[-1])
    return [[Rung(**{**rung, "seconds": tuple(rung["seconds"])}) for rung in rungs] for rungs in lengths]


def _main() -> None:
    """The other side of `_fresh`: options as JSON in, rungs as one line of JSON out."""
    values = json.loads(sys.argv[1])
    values |= {"tokens": tuple(Tokens(**each) for each in values["tokens"]), "skip": tuple(values["skip"])}
    print(json.dumps([[dataclasses.asdict(rung) for rung in rungs] for rungs in measure(Options(**values))]))


def _report(options: Options, runs: Sequence[list[list[Rung]]]) -> Report:
    """`runs`: of each process, the rungs at each length."""
    config, several = options.config, len(runs) > 1
    window = "" if options.window is None else f", a window of {options.window} frames in layers n % 4 != 3"
    model = (
        f"Model: {config.num_layers} layers, hidden {config.hidden_size}, {config.num_heads_q} + "
        f"{config.num_query_groups} heads of {config.head_dim}, bfloat16{window}."
    )
    taken = f"{options.rounds} rounds in which the rungs take turns"
    of = f"{len(runs)} fresh processes, each the median of {taken}" if several else taken
    spread = ("lowest", "highest") if several else ("lower quartile", "upper quartile")
    columns = ("rung", "eager / rung", *spread, "torch.compile / rung", "compile s", "peak MiB", "error", "note")
    parts: list[Paragraph | Table | Figure] = [Paragraph(model), Paragraph(f"Ratios: medians of {of}.{_COLUMNS}")]
    for i, tokens in enumerate(options.tokens):
        frames = f"{tokens.frames} frame{'s' * (tokens.frames != 1)}"
        title = f"{tokens.total} tokens: {tokens.video} video in {frames}, {tokens.audio} audio, {tokens.text} text"
        rungs = list(zip(*(run[i] for run in runs), strict=True))
        best = [best_rival(run[i]) for run in runs]
        parts.append(Table(title, columns, tuple(_row(rung, rungs[0], best) for rung in rungs)))
        ran = [(rung[0].key, speedup(rungs[0], rung)) for rung in rungs if not _failed(rung)]
        drawn = [Bar(LABELS[key], speed.median, speed.low, speed.high) for key, speed in ran]
        parts.append(Figure(f"{title}: how many times as fast as eager", bars(f"{title}: eager / rung", drawn)))
    policy = f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'unset')}"
    return Report("One velocity step, rung by rung", f"{machine()}, {ISAS[0]}, {policy}", tuple(parts))


_COLUMNS = """
eager / rung: how many times as fast as eager; torch.compile / rung: as the faster of its two ways, once compiled.
compile s: from an empty cache to the first result, imports not counted; a plan is compiled once for all lengths.
peak MiB: the most in use at one time in a step, the arena included. error: relative L2 against float64."""


def _row(rungs: Sequence[Rung], eager: Sequence[Rung], best: Sequence[Rung | None]) -> tuple[Cell, ...]:
    """One rung at one length, as each process measured it, beside each process's eager and best torch.compile."""
    label = LABELS[rungs[0].key]
    if failed := _failed(rungs):
        return (label, *[None] * 7, failed)
    speed = speedup(eager, rungs)
    rivals = [rung for rung in best if rung is not None]
    compiled = [rung.compile_seconds for rung in rungs if rung.compile_seconds is not None]
    return (
        label,
        speed.median,
        speed.low,
        speed.high,
        speedup(rivals, rungs).median if len(rivals) == len(rungs) else None,
        statistics.median(compiled) if compiled else None,
        max(rung.peak or 0 for rung in rungs) / 2**20,
        max(rung.error or 0.0 for rung in rungs),
        "",
    )


def _failed(rungs: Sequence[Rung]) -> str:
    return next((rung.failed for rung in rungs if rung.failed), "")


def best_rival(rungs: Sequence[Rung]) -> Rung | None:
    """The fastest of torch.compile's."""
    ran = [rung for rung in rungs if rung.key in _TORCH and rung.seconds]
    return min(ran, key=lambda rung: statistics.median(rung.seconds), default=None)


def speedup(numerators: Sequence[Rung], denominators: Sequence[Rung]) -> Ratio:
    """Of one process, median and quartiles; of several, the median of their medians, the lowest and the highest."""
    ratios = [ratio(a.seconds, b.seconds) for a, b in zip(numerators, denominators, strict=True)]
    if len(ratios) == 1:
        return ratios[0]
    medians = [each.median for each in ratios]
    return Ratio(statistics.median(medians), min(medians), max(medians))


if __name__ == "__main__":
    _main()
