"""What each command does: a thin face on the Python interface. Nothing heavy is imported before it is needed."""

import argparse
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from horsepower.terminal import check_files, publish, say, show, summarise

if TYPE_CHECKING:
    from horsepower.bench.report import Report
    from horsepower.bench.step import Tokens

TOKENS = "446,26,40"
CLIP = ("model", "scheme", "resolution", "duration", "steps")  # options of a clip to profile


def generate(arguments: argparse.Namespace) -> int:
    from horsepower import Engine, Request
    from horsepower.runtime.media import check_output, open_image, read_audio

    output = check_output(arguments.output)
    request = Request(
        prompt=arguments.prompt,
        resolution=_resolution(arguments.resolution),
        duration=arguments.duration,
        num_inference_steps=arguments.steps,
        seed=arguments.seed,
        image=arguments.image,
        audio=arguments.audio,
        keep_audio=arguments.keep_audio,
        speech_text=arguments.speech,
        speech_language=arguments.language,
        negative_prompt=arguments.negative_prompt,
        guidance=arguments.guidance,
        super_resolution_guidance=arguments.sr_guidance,
        sampler=arguments.sampler,
    )
    if request.image is not None:  # now, not after minutes of loading
        open_image(request.image)
    if request.audio is not None:
        read_audio(request.audio, request.duration)
    where = (arguments.model or arguments.preset, arguments.variant, arguments.device)
    how = {"mode": arguments.mode, "scheme": arguments.scheme}
    engine = Engine.from_pretrained(*where, **how, device_memory=_size(arguments.device_memory))
    result = engine.run(request, None if arguments.quiet or not sys.stderr.isatty() else show)
    result.save(output)
    if not arguments.quiet:
        summarise(result, str(output))
    return 0


def convert(arguments: argparse.Namespace) -> int:
    from horsepower.runtime.convert import convert

    print(convert(arguments.source, arguments.target))
    return 0


def bench(arguments: argparse.Namespace) -> int:
    if arguments.resolution is not None:
        return _bench_full(arguments)
    if arguments.device is not None:
        raise ValueError(f"device: got {arguments.device} without a resolution, allowed: both or none")
    from horsepower.bench.ladder import QUICK, Options, climb
    from horsepower.bench.step import Tokens

    check_files(arguments)
    given = _given(arguments, ("window", "hidden", "layers", "rounds", "processes"))
    given["tokens"] = tuple(Tokens.parse(each, arguments.frames) for each in arguments.tokens or (TOKENS,))
    if arguments.skip:
        given["skip"] = tuple(arguments.skip)
    options = Options(**{**(QUICK if arguments.quick else {}), **given})
    report = climb(options, say)
    publish(arguments, report, report)
    return 0


def _bench_full(arguments: argparse.Namespace) -> int:
    """The ladder of a released model on a GPU; what is predicted of it where there is none."""
    from horsepower.bench.step import Tokens
    from horsepower.measuring import measure_full

    check_files(arguments)
    _refuse(arguments, ("window", "hidden", "layers", "processes"), "with a resolution")
    if len(arguments.tokens or ()) > 1:
        raise ValueError(f"tokens: got {len(arguments.tokens)} lengths, allowed: one with a resolution")
    tokens = Tokens.parse(arguments.tokens[0], arguments.frames) if arguments.tokens else None
    report = measure_full(
        arguments.resolution, arguments.device, tokens, arguments.rounds, arguments.skip or (), arguments.quick, say
    )
    publish(arguments, report, report)
    return 0


def quantize(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from horsepower.quantizing import Options, quantise, read_prompts

    check_files(arguments)
    given = _given(arguments, ("scheme", "budget", "latent_budget"))
    given["variants"] = tuple(arguments.variant)
    if arguments.calibrate is not None:
        given["prompts"] = read_prompts(arguments.calibrate)
    if arguments.output is not None:
        given["output"] = Path(arguments.output)
    options = Options(**given)
    preset = None if arguments.model else arguments.preset
    holds, brief, full = quantise(preset, arguments.model, options, _device(arguments), say)
    publish(arguments, brief, full)
    return 0 if holds else 1


def verify(arguments: argparse.Namespace) -> int:
    from horsepower.verifying import verify_preset

    check_files(arguments)
    checks, brief, full = verify_preset(arguments.variant, _tokens(arguments), _device(arguments), arguments.scheme)
    publish(arguments, brief, full)
    return 0 if all(check.passed for check in checks) else 1


def explain(arguments: argparse.Namespace) -> int:
    from horsepower.explaining import explain_preset

    check_files(arguments)
    where = (_tokens(arguments), arguments.target, arguments.scheme)
    report = explain_preset(arguments.preset, arguments.variant, *where)
    publish(arguments, report, report)
    return 0


def kernels(arguments: argparse.Namespace) -> int:
    from horsepower.gating import gate_kernels

    check_files(arguments)
    passed, report = gate_kernels(arguments.arch, arguments.op)
    publish(arguments, report, report)
    return 0 if passed else 1


def tune(arguments: argparse.Namespace) -> int:
    from horsepower.tuning import tune_released

    check_files(arguments)
    report = tune_released(arguments.resolution, arguments.op, arguments.output, arguments.arch, say)
    publish(arguments, report, report)
    return 0


def profile(arguments: argparse.Namespace) -> int:
    if arguments.prompt is not None:
        return _profile_clip(arguments)
    from horsepower.bench.profile import Options, profile, run_once

    _refuse(arguments, CLIP, "without a prompt")
    check_files(arguments)
    given = _given(arguments, ("rounds", "trace"))
    options = Options(_tokens(arguments), arguments.variant, _device(arguments), **given)
    return _profiled(arguments, options, profile, run_once)


def _profile_clip(arguments: argparse.Namespace) -> int:
    from horsepower.bench.profile_clip import ClipOptions, profile_clip, run_clip_once

    _refuse(arguments, ("tokens", "frames", "rounds"), "with a prompt")
    check_files(arguments)
    given = _given(arguments, ("duration", "steps", "scheme", "trace"))
    if arguments.resolution is not None:
        given["resolution"] = _resolution(arguments.resolution)
    where = (arguments.model or arguments.preset, arguments.variant, _device(arguments))
    options = ClipOptions(arguments.prompt, *where, **given)
    return _profiled(arguments, options, profile_clip, run_clip_once)


def _profiled(
    arguments: argparse.Namespace, options: Any, profile: Callable[[Any], "Report"], once: Callable[[Any], str]
) -> int:
    """Once for NVIDIA's profilers, or as a report."""
    if arguments.once:
        print(once(options))
        return 0
    report = profile(options)
    publish(arguments, report, report)
    return 0


def roofline(arguments: argparse.Namespace) -> int:
    from horsepower.bench.step import Tokens
    from horsepower.predicting import predict

    check_files(arguments)
    tokens, frames = None, arguments.frames
    if arguments.tokens is not None:
        tokens = Tokens.parse(arguments.tokens, 1 if frames is None else frames)
    elif frames is not None:
        raise ValueError(f"frames: got {frames} without tokens, allowed: both or none")
    report = predict(arguments.gpu, arguments.resolution, tokens, arguments.scheme)
    publish(arguments, report, report)
    return 0


def memory(arguments: argparse.Namespace) -> int:
    from horsepower import Request
    from horsepower.quant.scheme import scheme_of
    from horsepower.stating import Options, stated

    check_files(arguments)
    request = Request(prompt="-", resolution=_resolution(arguments.resolution), duration=arguments.duration)
    scheme = scheme_of(arguments.scheme)
    if scheme is None and arguments.keep:
        raise ValueError(f"keep: got {arguments.keep[0]} without a scheme, allowed: both or none")
    scheme = scheme and scheme.keeping(arguments.keep)
    options = Options(request, arguments.target, arguments.variant, arguments.model, scheme)
    report = stated(options, _size(arguments.device_memory))
    publish(arguments, report, report)
    return 0


def doctor(arguments: argparse.Namespace) -> int:
    from horsepower.doctor import report

    print(report())
    return 0


def _given(arguments: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """The options among these that were given."""
    return {name: value for name in names if (value := getattr(arguments, name)) is not None}


def _refuse(arguments: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise ValueError for the first of these options that was given."""
    for name, value in _given(arguments, names).items():
        raise ValueError(f"{name}: got {value} {why}, allowed: none")


def _tokens(arguments: argparse.Namespace) -> "Tokens":
    """Of a step. Raises ValueError."""
    from horsepower.bench.step import Tokens

    return Tokens.parse(
        TOKENS if arguments.tokens is None else arguments.tokens, 1 if arguments.frames is None else arguments.frames
    )


def _device(arguments: argparse.Namespace) -> str:
    """The one asked for, else a GPU if there is one."""
    import torch

    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _resolution(text: str) -> str | tuple[int, int]:
    width, cross, height = text.partition("x")
    return (int(width), int(height)) if cross and width.isdecimal() and height.isdecimal() else text


def _size(text: str | None) -> int | None:
    """Bytes, of a number with or without a unit. Raises ValueError."""
    if text is None:
        return None
    units = {"GiB": 2**30, "MiB": 2**20, "GB": 10**9, "MB": 10**6, "": 1}
    unit = next(unit for unit in units if text.endswith(unit))
    try:
        size = int(float(text.removesuffix(unit)) * units[unit])
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"device_memory: got {text!r}, allowed: bytes, or a size such as 40GB or 37GiB")
    return size
