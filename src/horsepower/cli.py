"""The command line: a thin face on the Python interface. Nothing heavy is imported before a command needs it."""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from horsepower.bench.report import Report
    from horsepower.runtime.request import Progress, Result


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; 0 if it succeeded, 1 for a fault that it looked for and found, 2 for what the user has to mend."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        return command(arguments)
    except ValueError as error:
        print(f"horsepower: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # nobody reads what is printed
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (until the process ends)
        return 1
    except KeyboardInterrupt:
        print("horsepower: interrupted", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"horsepower: {message}; see {self.prog} --help\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="horsepower", description="Single-stream audio-video diffusion: a prompt in, a clip with sound out."
    )
    from horsepower import __version__

    parser.add_argument("--version", action="version", version=f"horsepower {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="make a clip from a prompt"))
    _add_convert(commands.add_parser("convert", help="turn a published pickle into safetensors"))
    _add_bench(commands.add_parser("bench", help="measure a step: eager, torch.compile, and each fusion"))
    _add_quantize(commands.add_parser("quantize", help="measure eight bits layer by layer, and write a checkpoint"))
    verify = commands.add_parser("verify", help="execute every rewrite beside what it replaced, against float64")
    _add_report(verify, _verify, ("foal",))
    verify.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    explain = commands.add_parser("explain", help="say what is fused, what is not and why, and what it saves")
    _add_report(explain, _explain, ("foal", "released"))
    explain.add_argument("--target", default="cpu", help="cpu, sm_80 or sm_90 (default: %(default)s)")
    explain.add_argument("--scheme", metavar="NAME", help="linear layers in eight bits: fp8 (sm_90), fp8-weights")
    _add_kernels(commands.add_parser("kernels", help="compile the GPU kernels, read their machine code; needs no GPU"))
    _add_tune(commands.add_parser("tune", help="measure every way to compute the released model's parts on this GPU"))
    _add_profile(commands.add_parser("profile", help="say where a step spends its time, entry by entry of its plan"))
    _add_roofline(commands.add_parser("roofline", help="say what a step of the released model must take on a GPU"))
    _add_memory(commands.add_parser("memory", help="say what a clip of the released model takes on a GPU, and when"))
    doctor = commands.add_parser("doctor", help="say what this machine has, what it lacks, and what that means")
    doctor.set_defaults(command=_doctor)
    return parser


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to show and to sound; 150 to 200 English words work best")
    parser.add_argument("-o", "--output", default="clip.mp4", metavar="FILE", help="mp4 (default: %(default)s)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--preset", default="foal", choices=("foal",), help="built-in model (default: %(default)s)")
    where.add_argument("--model", metavar="FOLDER", help="folder of released checkpoints")
    parser.add_argument("--mode", choices=("fused", "eager"), help="how models run (default: fused on a CPU)")
    parser.add_argument("--scheme", metavar="NAME", help="linear layers in eight bits: fp8, te (Hopper), fp8-weights")
    parser.add_argument("--variant", choices=("distill", "base"), help="model of that folder (default: distill)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--device-memory", metavar="SIZE", help="such as 40GB or 37GiB (default: what is free)")
    _add_clip(parser)
    parser.add_argument("--steps", type=int, metavar="N", help="of the base stage (default: 8, base model 32)")
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="default: %(default)s")
    parser.add_argument("--image", metavar="FILE", help="first frame")
    parser.add_argument("--audio", metavar="FILE", help="sound to follow")
    parser.add_argument("--keep-audio", action="store_true", help="keep the given sound as it is")
    parser.add_argument("--speech", metavar="LINE", help="line to be spoken")
    parser.add_argument("--language", metavar="L", help="of the line: en zh yue ja ko de fr")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what to avoid (base model)")
    parser.add_argument("--guidance", type=float, metavar="G", help="strength of guidance (base model; default: 5)")
    parser.add_argument("--sr-guidance", type=float, metavar="G", help="of the super-resolution stage (default: none)")
    parser.add_argument("--sampler", metavar="NAME", help="unipc or sde (base model; default: unipc)")
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    parser.set_defaults(command=_generate)


def _add_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resolution", default="256p", metavar="R", help="256p, 540p, 1080p or WIDTHxHEIGHT (default: %(default)s)"
    )
    parser.add_argument("--duration", type=float, default=5, metavar="S", help="seconds (default: %(default)s)")


def _add_memory(parser: argparse.ArgumentParser) -> None:
    _add_clip(parser)
    parser.add_argument("--target", default="sm_90", metavar="SM", help="sm_80 or sm_90 (default: %(default)s)")
    parser.add_argument("--variant", default="distill", metavar="NAME", help="distill or base (default: %(default)s)")
    parser.add_argument("--model", metavar="FOLDER", help="folder of released checkpoints (default: as published)")
    parser.add_argument("--scheme", metavar="NAME", help="linear layers in eight bits: fp8 (sm_90), fp8-weights")
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help="layers that stay in 16 bits; may be repeated"
    )
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="such as 40GB or 37GiB (default: the least that will do by turns)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report for programs")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page")
    parser.set_defaults(command=_memory)


def _add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint-340000.ckpt, Wan2.2_VAE.pth")
    parser.add_argument("target", nargs="?", help="file to write (default: beside the source, .safetensors)")
    parser.set_defaults(command=_convert)


def _add_quantize(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--preset", default="foal", choices=("foal",), help="built-in model (default: %(default)s)")
    where.add_argument("--model", metavar="FOLDER", help="folder of released checkpoints")
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME",
        help="model of it; may be repeated (default: all of a folder, distill of the preset)",
    )  # fmt: skip
    parser.add_argument("--scheme", default="fp8", metavar="NAME", help="fp8 or fp8-weights (default: %(default)s)")
    parser.add_argument("--calibrate", metavar="FILE", help="prompts to measure with, one a line (default: two)")
    parser.add_argument("--budget", type=float, metavar="E", help="of a layer, relative L2 (default: 0.06)")
    parser.add_argument("--latent-budget", type=float, metavar="E", help="of the final latents (default: 0.15)")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("-o", "--output", metavar="FOLDER", help="new folder for the quantised checkpoint")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page, with a plot")
    parser.set_defaults(command=_quantize)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", default="foal", choices=("foal",), help="model family (default: %(default)s)")
    parser.add_argument(
        "--resolution", metavar="R", help="256p, 540p or 1080p: a released model at full size, on a GPU, in its stead"
    )
    parser.add_argument("--device", help="of the full size: cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument(
        "--tokens", action="append", metavar="V,A,T", help="of video, audio, text; may be repeated (default: 446,26,40)"
    )
    parser.add_argument("--frames", type=int, default=1, metavar="N", help="latent frames (default: %(default)s)")
    parser.add_argument("--window", type=int, metavar="N", help="frames on either side that three layers of four see")
    parser.add_argument("--hidden", type=int, metavar="C", help="128, 256 or 512 (default: 256)")
    parser.add_argument("--layers", type=int, metavar="N", help="default: 40")
    parser.add_argument("--rounds", type=int, metavar="N", help="in which all take turns (default: 11)")
    parser.add_argument("--processes", type=int, metavar="N", help="fresh ones, each a whole run (default: 1)")
    parser.add_argument(
        "--skip", action="append", metavar="RUNG", help="whole or regional (torch.compile), plan, fuse_gate, ..."
    )
    parser.add_argument("--quick", action="store_true", help="eager and the whole plan alone, in 5 rounds")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON too")
    parser.add_argument("--html", metavar="FILE", help="and as a page with plots")
    parser.set_defaults(command=_bench)


def _add_report(
    parser: argparse.ArgumentParser, command: Callable[[argparse.Namespace], int], presets: tuple[str, ...]
) -> None:
    parser.add_argument("--preset", default="foal", choices=presets, help="model family (default: %(default)s)")
    parser.add_argument("--variant", default="distill", metavar="NAME", help="of its models (default: %(default)s)")
    parser.add_argument(
        "--tokens", default="446,26,40", metavar="V,A,T", help="of video, audio and text (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=1, metavar="N", help="latent frames (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page")
    parser.set_defaults(command=command)


def _add_kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sm_90", metavar="SM", help="sm_80 or sm_90 (default: %(default)s)")
    parser.add_argument("--op", action="append", default=[], metavar="OP", help="may be repeated (default: all)")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page")
    parser.set_defaults(command=_kernels)


def _add_tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resolution", action="append", default=[], metavar="R", help="256p, 540p or 1080p; may be repeated (all)"
    )
    parser.add_argument("--op", action="append", default=[], metavar="OP", help="may be repeated (default: all)")
    parser.add_argument("--output", metavar="FOLDER", help="for the tables (default: where they are read)")
    parser.add_argument("--arch", metavar="SM", help="to predict for, where there is no GPU (default: sm_90)")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page")
    parser.set_defaults(command=_tune)


def _add_profile(parser: argparse.ArgumentParser) -> None:
    _add_report(parser, _profile, ("foal",))
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--rounds", type=int, metavar="N", help="profiled steps (default: 7)")
    parser.add_argument("--trace", metavar="FILE", help="write them for ui.perfetto.dev or chrome://tracing")
    parser.add_argument("--once", action="store_true", help="run one step, for ncu and nsys, and report nothing")


def _add_roofline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="h100, h200, a100, here (default: h100)")
    parser.add_argument(
        "--resolution", default="256p", metavar="R", help="256p, 540p or 1080p: its last stage (default: %(default)s)"
    )
    parser.add_argument("--tokens", metavar="V,A,T", help="of video, audio, text (default: those of a clip of 5 s)")
    parser.add_argument("--frames", type=int, metavar="N", help="latent frames of those tokens (default: 1)")
    parser.add_argument("--scheme", metavar="NAME", help="list the kernels of that plan: fp8, fp8-weights")
    parser.add_argument("--json", metavar="FILE", help="write the report for programs")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page")
    parser.set_defaults(command=_roofline)


def _generate(arguments: argparse.Namespace) -> int:
    _prepare_process()
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
    result = engine.run(request, None if arguments.quiet or not sys.stderr.isatty() else _show)
    result.save(output)
    if not arguments.quiet:
        _report(result, str(output))
    return 0


def _memory(arguments: argparse.Namespace) -> int:
    _prepare_process()
    from horsepower import Request
    from horsepower.quant.scheme import scheme_of
    from horsepower.stating import Options, stated

    _check_files(arguments)
    request = Request(prompt="-", resolution=_resolution(arguments.resolution), duration=arguments.duration)
    scheme = scheme_of(arguments.scheme)
    if scheme is None and arguments.keep:
        raise ValueError(f"keep: got {arguments.keep[0]} without a scheme, allowed: both or none")
    scheme = scheme and scheme.keeping(arguments.keep)
    options = Options(request, arguments.target, arguments.variant, arguments.model, scheme)
    report = stated(options, _size(arguments.device_memory))
    _publish(arguments, report, report)
    return 0


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


def _quantize(arguments: argparse.Namespace) -> int:
    _prepare_process()
    from pathlib import Path

    from horsepower.quantizing import Options, quantise, read_prompts

    _check_files(arguments)
    given = {name: getattr(arguments, name) for name in ("scheme", "budget", "latent_budget")}
    given["variants"] = tuple(arguments.variant)
    given["prompts"] = None if arguments.calibrate is None else read_prompts(arguments.calibrate)
    given["output"] = None if arguments.output is None else Path(arguments.output)
    options = Options(**{name: value for name, value in given.items() if value is not None})
    preset = None if arguments.model else arguments.preset
    holds, brief, full = quantise(preset, arguments.model, options, _device(arguments), _say)
    _publish(arguments, brief, full)
    return 0 if holds else 1


def _prepare_process() -> None:
    """What must be set before torch and others are imported, in a process that is ours alone."""
    import warnings

    # Threads that wait by spinning slow a shared machine down tenfold; sleeping ones cost an idle one a fifth.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # torch's profiler says on stderr when it starts and stops

    # What diffusers and transformers say of themselves is not the user's.
    warnings.filterwarnings("ignore", category=FutureWarning)
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _resolution(text: str) -> str | tuple[int, int]:
    width, cross, height = text.partition("x")
    return (int(width), int(height)) if cross and width.isdecimal() and height.isdecimal() else text


def _show(progress: "Progress") -> None:
    """One line on the terminal that is written over."""
    bar = "#" * (20 * progress.step // progress.steps)
    done = progress.step == progress.steps
    line = f"\r{progress.stage:<18} [{bar:<20}] {progress.step}/{progress.steps}"
    print(line, end="\n" if done else "", file=sys.stderr, flush=True)


def _report(result: "Result", output: str) -> None:
    width, height = result.size
    frames = len(result.video)
    print(f"{output}: {width}x{height}, {frames} frames at {result.fps} a second, sound at {result.sample_rate} Hz")
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.timings.stages.items())
    print(f"{result.timings.total:.1f} s ({stages}), peak memory {result.timings.peak_memory / 2**30:.2f} GiB")
    for note in result.notes:
        print(f"note: {note}")


def _bench(arguments: argparse.Namespace) -> int:
    _prepare_process()
    if arguments.resolution is not None:
        return _bench_full(arguments)
    if arguments.device is not None:
        raise ValueError(f"device: got {arguments.device} without a resolution, allowed: both or none")
    from horsepower.bench.ladder import QUICK, Options, climb
    from horsepower.bench.step import Tokens

    _check_files(arguments)
    given = {name: getattr(arguments, name) for name in ("window", "hidden", "layers", "rounds", "processes")}
    given["tokens"] = tuple(Tokens.parse(each, arguments.frames) for each in arguments.tokens or ("446,26,40",))
    given["skip"] = tuple(arguments.skip) if arguments.skip else None
    options = Options(**{**(QUICK if arguments.quick else {}), **{k: v for k, v in given.items() if v is not None}})
    report = climb(options, _say)
    _publish(arguments, report, report)
    return 0


def _bench_full(arguments: argparse.Namespace) -> int:
    """The ladder of a released model on a GPU; what is predicted of it where there is none."""
    from horsepower.bench.step import Tokens
    from horsepower.measuring import measure_full

    _check_files(arguments)
    for name in ("window", "hidden", "layers", "processes"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"{name}: got {getattr(arguments, name)}, allowed: none with a resolution")
    if len(arguments.tokens or ()) > 1:
        raise ValueError(f"tokens: got {len(arguments.tokens)} lengths, allowed: one with a resolution")
    tokens = Tokens.parse(arguments.tokens[0], arguments.frames) if arguments.tokens else None
    report = measure_full(
        arguments.resolution, arguments.device, tokens, arguments.rounds, arguments.skip or (), arguments.quick, _say
    )
    _publish(arguments, report, report)
    return 0


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(f"... {line}", file=sys.stderr, flush=True)


def _verify(arguments: argparse.Namespace) -> int:
    _prepare_process()
    from horsepower.bench.step import Tokens
    from horsepower.verifying import verify_preset

    _check_files(arguments)
    tokens = Tokens.parse(arguments.tokens, arguments.frames)
    checks, brief, full = verify_preset(arguments.variant, tokens, _device(arguments))
    _publish(arguments, brief, full)
    return 0 if all(check.passed for check in checks) else 1


def _explain(arguments: argparse.Namespace) -> int:
    _prepare_process()
    from horsepower.bench.step import Tokens
    from horsepower.explaining import explain_preset

    _check_files(arguments)
    tokens = Tokens.parse(arguments.tokens, arguments.frames)
    report = explain_preset(arguments.preset, arguments.variant, tokens, arguments.target, arguments.scheme)
    _publish(arguments, report, report)
    return 0


def _kernels(arguments: argparse.Namespace) -> int:
    from horsepower.gating import gate_kernels

    _check_files(arguments)
    passed, report = gate_kernels(arguments.arch, arguments.op)
    _publish(arguments, report, report)
    return 0 if passed else 1


def _tune(arguments: argparse.Namespace) -> int:
    _prepare_process()
    from horsepower.tuning import tune_released

    _check_files(arguments)
    quiet = not sys.stderr.isatty()
    report = tune_released(
        arguments.resolution,
        arguments.op,
        arguments.output,
        arguments.arch,
        lambda line: None if quiet else print(f"... {line}", file=sys.stderr, flush=True),
    )
    _publish(arguments, report, report)
    return 0


def _device(arguments: argparse.Namespace) -> str:
    """The one asked for, else a GPU if there is one."""
    import torch

    return arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")


def _profile(arguments: argparse.Namespace) -> int:
    _prepare_process()
    from horsepower.bench.profile import Options, profile, run_once
    from horsepower.bench.step import Tokens

    _check_files(arguments)
    given = {name: getattr(arguments, name) for name in ("rounds", "trace") if getattr(arguments, name) is not None}
    options = Options(Tokens.parse(arguments.tokens, arguments.frames), arguments.variant, _device(arguments), **given)
    if arguments.once:
        print(run_once(options))
        return 0
    report = profile(options)
    _publish(arguments, report, report)
    return 0


def _roofline(arguments: argparse.Namespace) -> int:
    _prepare_process()
    from horsepower.bench.step import Tokens
    from horsepower.predicting import predict

    _check_files(arguments)
    tokens, frames = None, arguments.frames
    if arguments.tokens is not None:
        tokens = Tokens.parse(arguments.tokens, 1 if frames is None else frames)
    elif frames is not None:
        raise ValueError(f"frames: got {frames} without tokens, allowed: both or none")
    report = predict(arguments.gpu, arguments.resolution, tokens, arguments.scheme)
    _publish(arguments, report, report)
    return 0


def _check_files(arguments: argparse.Namespace) -> None:
    """Before the work, not after it. Raises ValueError."""
    from horsepower.bench.report import check_file

    for path in (arguments.json, arguments.html):
        if path is not None:
            check_file(path)


def _publish(arguments: argparse.Namespace, brief: "Report", full: "Report") -> None:
    from horsepower.bench.report import write

    print(brief.text())
    if arguments.json is not None:
        write(arguments.json, full.json())
    if arguments.html is not None:
        write(arguments.html, full.html())


def _convert(arguments: argparse.Namespace) -> int:
    from horsepower.runtime.convert import convert

    print(convert(arguments.source, arguments.target))
    return 0


def _doctor(arguments: argparse.Namespace) -> int:
    from horsepower.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
