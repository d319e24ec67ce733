"""The one door: `Engine.from_pretrained(...).run(request)`."""

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch

from horsepower.graph.plan import Plan
from horsepower.quant.scheme import Scheme, scheme_of
from horsepower.runtime import memory
from horsepower.runtime.asked import bytes_of, checked_device, dtype_of, mode_of, scheme_for
from horsepower.runtime.fused import FusedDiT, plan_velocity
from horsepower.runtime.job import Job
from horsepower.runtime.memory import DiTBytes
from horsepower.runtime.models.audio_vae import OUTPUT_RATE
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.phases import (
    AUDIO,
    IMAGE,
    TEXT,
    VIDEO,
    audio_latents,
    base_stage,
    phases_of,
    with_frames,
)
from horsepower.runtime.presets import MODELS, ModelName, Sizes, sizes
from horsepower.runtime.request import Cancelled, Progress, Request, Result
from horsepower.runtime.residence import HOST, Movable, Residence
from horsepower.runtime.sampling import SeededNoise
from horsepower.runtime.source import Source, eager_dit, open_source
from horsepower.runtime.te_dit import Scales
from horsepower.runtime.tokens import AUDIO_CHANNELS, FPS, PATCH, VIDEO_CHANNELS, Grid
from horsepower.runtime.turns import MemoryStatement, Part, Phase, least, state
from horsepower.runtime.watch import Watch


class Engine:
    """Turns requests into clips on one device. One request runs at a time; others wait, from any thread."""

    def __init__(
        self,
        source: Source,
        model: ModelName,
        device: torch.device,
        dtype: torch.dtype,
        mode: str,
        strict: bool,
        scheme: Scheme | None = None,
        notes: tuple[str, ...] = (),
        device_memory: int | None = None,
    ):
        self._source, self.model, self.device, self.dtype, self.mode = source, model, device, dtype, mode
        self._asked, self.scheme = scheme, scheme_for(scheme, source.stored(model), mode, device, dtype)
        eight = () if self.scheme is None else (f"scheme: {self.scheme.name}, {self.scheme.says}",)
        self._strict, self._notes, self._device_memory = strict, (*source.notes, *notes, *eight), device_memory
        self._plans: dict[ModelName, tuple[DiT, Plan]] = {}
        self._scales = Scales()
        self._parts = Residence(device, self._load)
        self._lock = threading.Lock()
        self._owner: int | None = None  # the thread whose request runs

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        model: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        mode: str | None = None,
        strict: bool = True,
        scheme: str | Scheme | None = None,
        device_memory: int | None = None,
    ) -> "Engine":
        """Open a folder of released checkpoints, or the built-in preset "foal".

        model: "distill" or "base"; None takes the distilled one where there is one.
        device: None takes the first GPU, else the CPU.
        dtype: of the matrix products: torch.bfloat16 or torch.float32; None takes bfloat16 where it is fast.
        mode: "fused" compiles each model into one plan, in seconds; "eager" runs it as it is written. None takes
            fused on a CPU and on GPUs that there are kernels for, of capability 8.0 and newer.
        strict: a fusion that the model family expects and that does not happen is an error that says where; otherwise
            the model runs with those that did.
        scheme: linear layers in eight bits: "fp8-weights" or, on Hopper, "fp8", quantised while they are loaded;
            "fp8-attention" (Hopper) has attention in eight bits too; "te", "te-block" and "te-delayed" (Hopper, mode
            "eager") are Transformer Engine's, the last once it is calibrated. None takes a quantised checkpoint's.
        device_memory: bytes of the device that the engine may take; None: what is free. Where not all parts of a
            request fit beside each other they take turns, waiting on the host; bits of clips do not depend on it.
        The base model and the text encoder are loaded now, other parts when a request first needs them.
        Raises ValueError naming what is missing or wrong.
        """
        chosen, asked = checked_device(device), scheme_of(scheme)
        mode, notes = mode_of("eager" if mode is None and asked is not None and asked.recipe else mode, chosen)
        source = open_source(folder, chosen, torch.bfloat16)  # to look at: the scheme decides the dtype
        there = [name for name in ("distill", "base") if name in source.models()]
        if not there or model not in (None, *there):
            got = repr(model) if there else f"neither in {folder}"
            raise ValueError(f"model: got {got}, allowed: {', '.join(there or ('distill', 'base'))}")
        name = there[0] if model is None else model
        quantised = scheme_for(asked, source.stored(name), mode, chosen, dtype) is not None
        dtype = torch.bfloat16 if quantised else dtype_of(dtype, chosen)
        source = open_source(folder, chosen, dtype)
        engine = cls(source, name, chosen, dtype, mode, strict, asked, notes, bytes_of(device_memory))
        engine._open()
        return engine

    def run(
        self,
        request: Request,
        on_progress: Callable[[Progress], None] | None = None,
        cancel: threading.Event | None = None,
    ) -> Result:
        """Make one clip; the same bits for the same request, whatever ran before or runs beside it.

        on_progress is called before the first and after every step of every stage. Setting `cancel` ends the request
        at the next step with `Cancelled`. Raises ValueError for what the model cannot do or the files do not hold.
        """
        _check_request(request, self.model)
        with self._turn(cancel), torch.no_grad():
            self._scales.check(self.scheme, self._models(sizes(request.resolution)))
            job = self._job(request, on_progress, cancel)
            latents, notes = job.latents()
            video, sound = job.decode(latents)
        notes = (*self._notes, *notes, *_rounding(request, job.picture), *job.statement.notes)
        return Result(video, sound, FPS, OUTPUT_RATE, request.seed, job.watch.timings, notes)

    def calibrate(self, requests: Sequence[Request]) -> None:
        """Learn the scales of the scheme "te-delayed" from what these requests make each layer read.

        They are denoised in 16-bit weights, and not decoded; then the models are loaded anew in eight bits. The scales
        take the place of any before, and no other request moves them. Raises ValueError for another scheme, and as
        `run` does.
        """
        if self.scheme is None or self.scheme.recipe != "delayed":
            got = "none" if self.scheme is None else self.scheme.name
            raise ValueError(f"calibrate: got an engine of scheme {got}, allowed: te-delayed")
        if isinstance(requests, Request) or not requests:
            raise ValueError(f"requests: got {requests!r}, allowed: a list of them")
        for request in requests:
            _check_request(request, self.model)
        with self._turn(None), torch.no_grad():
            if self._scales.known:
                self._forget_models()  # they cannot learn any more
            try:
                with self._scales.learning():
                    for request in requests:
                        self._job(request, None, None).latents()
            finally:
                self._forget_models()

    def _job(
        self, request: Request, on_progress: Callable[[Progress], None] | None, cancel: threading.Event | None
    ) -> Job:  # fmt: skip
        stage, picture = base_stage(request, self.model), sizes(request.resolution)
        statement, known = self._state(request, picture)
        given = (request, self.model, picture, stage, self.device, statement)
        watch = Watch(self.device, on_progress, cancel)
        return Job(*given, known, self._parts, self._scales, SeededNoise(request.seed), watch)

    def _models(self, picture: Sizes) -> list[ModelName]:
        """Those that a clip of this size runs through."""
        return [self.model] if picture.super_resolution is None else [self.model, picture.super_resolution]

    def _forget_models(self) -> None:
        for name in MODELS:
            self._parts.forget(name)
        gc.collect()  # models may refer to themselves

    @contextmanager
    def _turn(self, cancel: threading.Event | None) -> Iterator[None]:
        """Hold the engine. Raises Cancelled if the caller gave up while others had it."""
        if self._owner == threading.get_ident():
            raise RuntimeError("run() was called from a callback of its own request")
        while not self._lock.acquire(timeout=0.1):
            if cancel is not None and cancel.is_set():
                raise Cancelled("cancelled while waiting for other requests")
        try:
            self._owner = threading.get_ident()
            yield
        finally:
            self._owner = None
            self._lock.release()

    def memory(self, request: Request) -> MemoryStatement:
        """What `run` would take, phase by phase, from what lies where now; nothing is loaded for it.

        Waits for a request that runs. Raises ValueError as `run` does, with the bytes that are missing if not even
        parts that take turns fit.
        """
        with self._turn(None):
            return self._state(request, sizes(request.resolution))[0]

    def _state(self, request: Request, picture: Sizes) -> tuple[MemoryStatement, dict[str, Part]]:
        """And the parts, with those that are there of other requests. Raises ValueError."""
        self._check_models(request, picture)
        parts, phases = phases_of(request, self.model, picture, self._source, self._dit_bytes)
        grid = Grid.of(*picture.final, audio_latents(request))
        if self.device.type == "cpu":
            phases = with_frames(phases, grid)
        budget = self._budget()
        needed, phase = least(parts, phases)
        memory.check_fits(needed, budget, grid, phase.name, self.device)
        parts = {**self._parts.parts, **parts}
        return state(parts, phases, budget, self._host_room(), self._parts.there, self._parts.waiting), parts

    def _budget(self) -> int:
        """Bytes of the device that are the engine's, those that it holds by now with them."""
        free = memory.free_bytes(self.device) + self._parts.bytes
        return free if self._device_memory is None else min(free, self._device_memory)

    def _host_room(self) -> int:
        """Bytes for parts that wait, those that wait by now with them; a CPU has no memory but the device's."""
        return 0 if self.device.type == "cpu" else memory.free_bytes(HOST) + self._parts.host_bytes

    def _open(self) -> None:
        """Load the base model, then the text encoder, for which it gives way if both do not fit."""
        self._check_channels(self.model)
        text = self._source.text_memory().weights
        weights, load = self._dit_bytes(self.model, Grid.of(32, 32, 5), 1)[:2]
        parts = {self.model: Part(weights, load), TEXT: Part(text, host_load=text)}
        phases = (Phase(f"model {self.model}", (self.model,)), Phase(TEXT, (TEXT,)))
        for phase in phases:
            memory.check_loads(phase.name, least(parts, (phase,))[0], self._budget(), self.device)
        for turn in state(parts, phases, self._budget(), self._host_room()).turns:
            self._parts.follow(turn, parts)

    def _check_models(self, request: Request, picture: Sizes) -> None:
        """Raise ValueError if the model for this size is not there, or does not fit the others."""
        name = picture.super_resolution
        if name is None and request.super_resolution_guidance is not None:
            got = request.super_resolution_guidance
            raise ValueError(f"super_resolution_guidance: got {got}, allowed: None at {request.resolution!r}")
        if name is not None and name not in self._source.models():
            raise ValueError(
                f"resolution: got {request.resolution!r}, which needs the model {name}, allowed: 256p with these files"
            )
        if name is not None:
            self._check_channels(name)

    def _dit_bytes(self, name: ModelName, grid: Grid, passes: int) -> DiTBytes:
        """From its plan, if it has one."""
        if self.mode != "fused":
            return memory.eager_bytes(self._source.config(name), self.dtype, grid)
        size = memory.planned_bytes(*self._planned(name), grid, passes)
        dit = self._parts[name] if name in self._parts.there else None
        held = dit.arena_bytes if isinstance(dit, FusedDiT) else 0  # of a larger clip, perhaps
        return size._replace(arena=max(size.arena, held))

    def _load(self, name: str) -> Movable:
        """A part on the device, from the source."""
        made: dict[str, Callable[[], Movable]] = {
            TEXT: self._source.text_encoder,
            IMAGE: self._source.image_encoder,
            VIDEO: self._source.video_decoder,
            AUDIO: self._source.audio_codec,
            **{each: partial(self._dit, each) for each in MODELS},
        }
        return made[name]()

    def _dit(self, name: ModelName) -> DiT | FusedDiT:
        if self.mode == "eager":
            scheme = scheme_for(self._asked, self._source.stored(name), self.mode, self.device, self.dtype)
            if scheme is None:
                return eager_dit(self._source, name, self.device, self.dtype)
            return self._scales.model(name, self._source, self.device, self.dtype, scheme)
        model, plan = self._planned(name)
        # Weights go from the source through the plan's recipes; the model itself has none.
        return FusedDiT(model, plan=plan, weights=self._source.weights(name))

    def _planned(self, name: ModelName) -> tuple[DiT, Plan]:
        if name not in self._plans:
            model = DiT(self._source.config(name), self.dtype, "meta").eval()
            scheme = scheme_for(self._asked, self._source.stored(name), self.mode, self.device, self.dtype)
            self._plans[name] = model, plan_velocity(model, self.device, self._strict, scheme=scheme)
        return self._plans[name]

    def _check_channels(self, name: ModelName) -> None:
        """Raise ValueError if a model does not read what the pipeline and the text encoder give."""
        config = self._source.config(name)
        got = (config.video_in_channels, config.audio_in_channels, config.text_in_channels)
        allowed = (VIDEO_CHANNELS * PATCH**2, AUDIO_CHANNELS, self._source.text_width())
        if got != allowed:
            raise ValueError(f"model {name}: got {got} channels of video, audio, text, allowed: {allowed}")


def _check_request(request: Request, model: ModelName) -> None:
    """Raise ValueError for what is no request, or one that a model does not understand."""
    if not isinstance(request, Request):
        raise ValueError(f"request: got {type(request).__name__}, allowed: a Request")
    base_stage(request, model)


def _rounding(request: Request, picture: Sizes) -> tuple[str, ...]:
    if isinstance(request.resolution, str) or request.resolution == picture.final:
        return ()
    asked, made = ("x".join(map(str, size)) for size in (request.resolution, picture.final))
    return (f"resolution: {asked} was rounded down to {made}, multiples of 32",)
