"""The one door: `Engine.from_pretrained(...).run(request)`."""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from horsepower.graph.plan import Plan
from horsepower.kernels.target import target_of
from horsepower.quant.scheme import Scheme, scheme_of
from horsepower.runtime import memory
from horsepower.runtime.devices import indexed
from horsepower.runtime.fused import FusedDiT, plan_velocity, velocity_sizes
from horsepower.runtime.media import image_pixels, open_image, read_audio
from horsepower.runtime.models.audio_vae import CODEC_RATE, OUTPUT_RATE, STRIDE
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.text import MAX_TOKENS, TextEncoder
from horsepower.runtime.pipeline import (
    BaseGuidance,
    Latents,
    Stage,
    SuperResolutionGuidance,
    Texts,
    denoise,
    prepare,
    super_resolve,
    to_frames,
)
from horsepower.runtime.presets import ModelName, Sizes, sizes
from horsepower.runtime.prompts import DEFAULT_NEGATIVE_PROMPT, structured_prompt
from horsepower.runtime.request import Cancelled, Progress, Request, Result
from horsepower.runtime.sampling import Noise, SeededNoise
from horsepower.runtime.source import AudioCodec, ImageEncoder, Source, VideoDecoder, eager_dit, te_dit
from horsepower.runtime.tokens import AUDIO_CHANNELS, FPS, PATCH, VIDEO_CHANNELS, Grid
from horsepower.runtime.watch import Watch

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = ("fused", "eager")
DTYPES = (torch.bfloat16, torch.float32)
SUPER_RESOLUTION = Stage("super-resolution", steps=5, sampler="unipc", coords="v1")


class Conditions(NamedTuple):
    """What a request gives beside its text, as latents: a frame for each stage's size, and sound."""

    base_image: Tensor | None
    final_image: Tensor | None
    audio: Tensor | None


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
    ):
        self._source, self.model, self.device, self.dtype, self.mode = source, model, device, dtype, mode
        self.scheme = scheme
        eight = () if scheme is None else (f"scheme: {scheme.name}, {scheme.says}",)
        self._strict, self._notes = strict, (*source.notes, *notes, *eight)
        self._plans: dict[ModelName, tuple[DiT, Plan]] = {}
        self._dits: dict[ModelName, DiT | FusedDiT] = {}
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
    ) -> "Engine":
        """Open a folder of released checkpoints, or the built-in preset "foal".

        model: "distill" or "base"; None takes the distilled one where there is one.
        device: None takes the first GPU, else the CPU.
        dtype: of the matrix products: torch.bfloat16 or torch.float32; None takes bfloat16 where it is fast.
        mode: "fused" compiles each model into one plan, in seconds; "eager" runs it as it is written. None takes
            fused on a CPU and on GPUs that there are kernels for, of capability 8.0 and newer.
        strict: a fusion that the model family expects and that does not happen is an error that says where; otherwise
            the model runs with those that did.
        scheme: linear layers in eight bits, quantised while they are loaded: "fp8" (Hopper), "fp8-weights"; "te" and
            "te-block" (Hopper, mode "eager") by Transformer Engine.
        The base model and the text encoder are loaded now, other parts when a request first needs them.
        Raises ValueError naming what is missing or wrong.
        """
        chosen = _device(device)
        scheme = scheme_of(scheme)
        mode, notes = _mode("eager" if mode is None and scheme is not None and scheme.recipe else mode, chosen)
        _check_scheme(scheme, mode, chosen, dtype)
        dtype = torch.bfloat16 if scheme is not None else _dtype(dtype, chosen)
        source = _open(folder, chosen, dtype)
        there = [name for name in ("distill", "base") if name in source.models()]
        if not there or model not in (None, *there):
            got = repr(model) if there else f"neither in {folder}"
            raise ValueError(f"model: got {got}, allowed: {', '.join(there or ('distill', 'base'))}")
        engine = cls(source, there[0] if model is None else model, chosen, dtype, mode, strict, scheme, notes)
        engine._dit(engine.model)
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
        if not isinstance(request, Request):
            raise ValueError(f"request: got {type(request).__name__}, allowed: a Request")
        stage, picture = self._stage(request), sizes(request.resolution)
        with self._turn(cancel), torch.no_grad():
            self._check_picture(request, picture)
            watch, noise = Watch(self.device, on_progress, cancel), SeededNoise(request.seed)
            texts, notes = self._read(request, stage, watch)
            given = self._condition(request, picture, noise, watch)
            latents = self._denoise(request, stage, picture, texts, given, noise, watch)
            if picture.super_resolution:
                latents = self._super_resolve(request, latents, picture, texts, given, noise, watch)
            video, sound = self._decode(latents, watch)
        notes = (*self._notes, *notes, *_rounding(request, picture))
        return Result(video, sound, FPS, OUTPUT_RATE, request.seed, watch.timings, notes)

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

    def _stage(self, request: Request) -> Stage:
        """How the base stage runs. Raises ValueError for what only the base model understands."""
        if self.model == "distill":
            guided_later = request.super_resolution_guidance is not None
            for name in ("guidance", "sampler", *(() if guided_later else ("negative_prompt",))):
                if (value := getattr(request, name)) is not None:
                    raise ValueError(f"{name}: got {value!r}, allowed: None with the distilled model")
            return Stage("base", request.num_inference_steps or 8, "distilled")
        guidance = BaseGuidance() if request.guidance is None else BaseGuidance(request.guidance, request.guidance)
        return Stage("base", request.num_inference_steps or 32, request.sampler or "unipc", guidance)

    def _check_picture(self, request: Request, picture: Sizes) -> None:
        """Raise ValueError if the model for this size is not there, or memory cannot hold the clip."""
        name = picture.super_resolution
        if name is None and request.super_resolution_guidance is not None:
            got = request.super_resolution_guidance
            raise ValueError(f"super_resolution_guidance: got {got}, allowed: None at {request.resolution!r}")
        if name is not None and name not in self._source.models():
            raise ValueError(
                f"resolution: got {request.resolution!r}, which needs the model {name}, allowed: 256p with these files"
            )
        grid = Grid.of(*picture.final, _audio_latents(request))
        name = name or self.model
        weights = 0 if name in self._dits else self._weight_bytes(name)
        activations = max(self._activation_bytes(name, grid), self._source.decode_bytes(grid))
        frames = memory.picture_bytes(grid) if self.device.type == "cpu" else 0
        memory.check_fits(weights + activations + frames, grid, self.device)

    def _weight_bytes(self, name: ModelName) -> int:
        """What loading a model takes at the most."""
        if self._has_stated_memory:
            return self._planned(name)[1].load_bytes
        return memory.weight_bytes(self._source.config(name), self.dtype)

    def _activation_bytes(self, name: ModelName, grid: Grid) -> int:
        """What a step takes beside what its model holds by now."""
        if not self._has_stated_memory:
            return memory.activation_bytes(self._source.config(name), grid)
        sizes = velocity_sizes((grid.video, grid.audio, MAX_TOKENS), grid.frames)
        dit = self._dits.get(name)
        held = dit.compiled.arena_bytes if isinstance(dit, FusedDiT) else 0
        return max(0, self._planned(name)[1].at(sizes).peak - held)

    @property
    def _has_stated_memory(self) -> bool:
        """Whether a plan says what its model takes; on a CPU, operators' own scratch memory is beside it."""
        return self.mode == "fused" and target_of(self.device) != "cpu"

    def _read(self, request: Request, stage: Stage, watch: Watch) -> tuple[Texts, tuple[str, ...]]:
        """Encode the prompts; and say if the prompt had to be cut."""
        with watch.stage("text"):
            prompt = structured_prompt(request.prompt, request.speech_text, request.speech_language)
            encoded, negative = self._text_encoder(prompt), None
            if stage.guidance is not None or request.super_resolution_guidance is not None:
                negative = self._text_encoder(request.negative_prompt or DEFAULT_NEGATIVE_PROMPT).features
        kept = len(encoded.features)
        cut = (f"prompt: {encoded.total_tokens} tokens, of which the first {kept} were used",)
        return Texts(encoded.features, negative), cut if encoded.total_tokens > kept else ()

    def _condition(self, request: Request, picture: Sizes, noise: Noise, watch: Watch) -> Conditions:
        """Encode the given image and sound, if any; sound first, since it draws noise."""
        if request.image is None and request.audio is None:
            return Conditions(None, None, None)
        with watch.stage("conditioning"):
            audio = base_image = final_image = None
            if request.audio is not None:
                wave = read_audio(request.audio, request.duration)
                if len(wave) < STRIDE:
                    got = f"{len(wave) / CODEC_RATE:.3f} seconds of sound"
                    raise ValueError(f"audio: got {got}, allowed: at least {STRIDE / CODEC_RATE}")
                audio = self._audio_codec.encode(wave.expand(2, -1).to(self.device), noise)
            if request.image is not None:
                image = open_image(request.image)
                base_image = self._encode_image(image, picture.base)
                if picture.super_resolution:
                    final_image = self._encode_image(image, picture.final)
            return Conditions(base_image, final_image, audio)

    def _encode_image(self, image: "Image", size: tuple[int, int]) -> Tensor:
        return self._image_encoder(image_pixels(image, *size).to(self.device))

    def _denoise(
        self,
        request: Request,
        stage: Stage,
        picture: Sizes,
        texts: Texts,
        given: Conditions,
        noise: Noise,
        watch: Watch,
    ) -> Latents:
        """The base stage."""
        audio = _audio_latents(request) if given.audio is None else given.audio.shape[1]
        start = prepare(Grid.of(*picture.base, audio), noise, self.device, given.audio)
        keep_audio = given.audio is not None and (request.keep_audio or self.model == "base")
        return denoise(self._dit(self.model), start, texts, stage, noise, watch, given.base_image, keep_audio)

    def _super_resolve(
        self,
        request: Request,
        latents: Latents,
        picture: Sizes,
        texts: Texts,
        given: Conditions,
        noise: Noise,
        watch: Watch,
    ) -> Latents:
        """The super-resolution stage of pictures that have one."""
        assert picture.super_resolution
        grid, model = Grid.of(*picture.final, latents.grid.audio), self._dit(picture.super_resolution)
        scale, stage = request.super_resolution_guidance, SUPER_RESOLUTION
        if scale is not None:
            stage = replace(stage, guidance=SuperResolutionGuidance(scale))
        return super_resolve(model, latents, grid, texts, stage, noise, watch, given.final_image)

    def _decode(self, latents: Latents, watch: Watch) -> tuple[Tensor, Tensor]:
        """Frames uint8 [F, H, W, 3] and sound float32 [S, 2], on the CPU."""
        grid = latents.grid
        width, height = grid.pixels
        with watch.stage("video"):
            video = to_frames(self._video_decoder(latents.video), (4 * grid.frames - 3, height, width))
        with watch.stage("audio"):
            return video, self._audio_codec.decode(latents.audio).cpu()

    def _dit(self, name: ModelName) -> DiT | FusedDiT:
        if name not in self._dits:
            self._check_channels(name)
            memory.check_loads(name, self._weight_bytes(name), self.device)
            self._dits[name] = self._fused(name) if self.mode == "fused" else self._eager(name)
        return self._dits[name]

    def _eager(self, name: ModelName) -> DiT:
        if self.scheme is not None:
            return te_dit(self._source, name, self.device, self.dtype, self.scheme)
        return eager_dit(self._source, name, self.device, self.dtype)

    def _fused(self, name: ModelName) -> FusedDiT:
        """Weights go from the source through the plan's recipes; the model itself has none."""
        model, plan = self._planned(name)
        return FusedDiT(model, plan=plan, weights=self._source.weights(name))

    def _planned(self, name: ModelName) -> tuple[DiT, Plan]:
        if name not in self._plans:
            model = DiT(self._source.config(name), self.dtype, "meta").eval()
            self._plans[name] = model, plan_velocity(model, self.device, self._strict, scheme=self.scheme)
        return self._plans[name]

    def _check_channels(self, name: ModelName) -> None:
        """Raise ValueError if a model does not read what the pipeline and the text encoder give."""
        config = self._source.config(name)
        got = (config.video_in_channels, config.audio_in_channels, config.text_in_channels)
        allowed = (VIDEO_CHANNELS * PATCH**2, AUDIO_CHANNELS, self._text_encoder.width)
        if got != allowed:
            raise ValueError(f"model {name}: got {got} channels of video, audio, text, allowed: {allowed}")

    @cached_property
    def _text_encoder(self) -> TextEncoder:
        return self._source.text_encoder()

    @cached_property
    def _image_encoder(self) -> ImageEncoder:
        return self._source.image_encoder()

    @cached_property
    def _video_decoder(self) -> VideoDecoder:
        return self._source.video_decoder()

    @cached_property
    def _audio_codec(self) -> AudioCodec:
        return self._source.audio_codec()


def _open(folder: str | os.PathLike[str], device: torch.device, dtype: torch.dtype) -> Source:
    if folder == "foal":
        from horsepower.runtime.foal import Foal

        return Foal(device, dtype)
    from horsepower.runtime.released import ReleasedFolder

    if not isinstance(folder, str | os.PathLike) or not Path(folder).is_dir():
        raise ValueError(f"folder: got {str(folder)!r}, allowed: a folder of checkpoints, or the preset foal")
    return ReleasedFolder(Path(folder), device, dtype)


def _device(device: str | torch.device | None) -> torch.device:
    if device is None:
        return indexed(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device: got {device!r}, allowed: cpu, cuda or cuda:N") from error
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"device: got {str(chosen)!r}, allowed: cpu, or cuda where torch finds a GPU")
    return indexed(chosen)


def _mode(mode: str | None, device: torch.device) -> tuple[str, tuple[str, ...]]:
    """The mode that was asked for, else the device's best, and what is to be said of it."""
    try:
        target_of(device)
    except ValueError as error:
        if mode not in (None, "eager"):
            raise ValueError(f"mode: got {mode!r}, allowed: eager on {device}; {error}") from None
        return "eager", (f"mode: eager, as there are no fused kernels; {error}",) if mode is None else ()
    if mode not in (None, *MODES):
        raise ValueError(f"mode: got {mode!r}, allowed: {', '.join(MODES)}")
    return mode or MODES[0], ()


def _check_scheme(scheme: Scheme | None, mode: str, device: torch.device, dtype: torch.dtype | None) -> None:
    """Raise ValueError for a scheme that cannot be had here."""
    if scheme is None:
        return
    allowed = "eager" if scheme.recipe else "fused"
    if mode != allowed:
        raise ValueError(f"scheme: got {scheme.name} with mode {mode}, allowed: with mode {allowed}")
    if dtype not in (None, torch.bfloat16):
        raise ValueError(f"scheme: got {scheme.name} with {dtype}, allowed: with torch.bfloat16")
    scheme.check(target_of(device))


def _dtype(dtype: torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        # CPUs without AVX-512 have no fast bfloat16 products.
        slow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512"
        return torch.float32 if slow else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype: got {dtype}, allowed: {', '.join(map(str, DTYPES))}")
    return dtype


def _audio_latents(request: Request) -> int:
    """One a video frame, and one for the end."""
    return int(round(request.duration * FPS, 6)) + 1  # rounded first: 4.6 * 25 is 114.99... in binary


def _rounding(request: Request, picture: Sizes) -> tuple[str, ...]:
    if isinstance(request.resolution, str) or request.resolution == picture.final:
        return ()
    asked, made = ("x".join(map(str, size)) for size in (request.resolution, picture.final))
    return (f"resolution: {asked} was rounded down to {made}, multiples of 32",)
