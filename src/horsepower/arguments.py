"""What can be said on the command line. Nothing heavy is imported: --help must not wait for torch."""

import argparse
from typing import NoReturn

from horsepower import __version__, commands

DEVICE = "cpu, cuda or cuda:N (default: a GPU if there is one)"
SCHEME = "linear layers in eight bits: fp8, fp8-attention (sm_90), fp8-weights"


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"horsepower: {message}; see {self.prog} --help\n")


def parser() -> argparse.ArgumentParser:
    """Of all commands; `command` of what it parses is the function that runs it."""
    parser = Parser(
        prog="horsepower", description="Single-stream audio-video diffusion: a prompt in, a clip with sound out."
    )
    parser.add_argument("--version", action="version", version=f"horsepower {__version__}")
    add = parser.add_subparsers(required=True, metavar="COMMAND").add_parser
    _generate(add("generate", help="make a clip from a prompt"))
    _convert(add("convert", help="turn a published pickle into safetensors"))
    _bench(add("bench", help="measure a step: eager, torch.compile, and each fusion"))
    _quantize(add("quantize", help="measure eight bits layer by layer, and write a checkpoint"))
    _verify(add("verify", help="execute every rewrite beside what it replaced, against float64"))
    _explain(add("explain", help="say what is fused, what is not and why, and what it saves"))
    _kernels(add("kernels", help="compile the GPU kernels, read their machine code; needs no GPU"))
    _tune(add("tune", help="measure every way to compute the released model's parts on this GPU"))
    _profile(add("profile", help="say where a step or a clip spends its time, entry by entry of its plans"))
    _roofline(add("roofline", help="say what a step of the released model must take on a GPU"))
    _memory(add("memory", help="say what a clip of the released model takes on a GPU, and when"))
    doctor = add("doctor", help="say what this machine has, what it lacks, and what that means")
    doctor.set_defaults(command=commands.doctor)
    return parser


def _generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", help="what to show and to sound; 150 to 200 English words work best")
    parser.add_argument("-o", "--output", default="clip.mp4", metavar="FILE", help="mp4 (default: %(default)s)")
    _add_source(parser)
    parser.add_argument("--mode", choices=("fused", "eager"), help="how models run (default: fused on a CPU)")
    parser.add_argument("--scheme", metavar="NAME", help="eight bits: fp8, fp8-attention, te (Hopper), fp8-weights")
    parser.add_argument("--variant", choices=("distill", "base"), help="model of that folder (default: distill)")
    parser.add_argument("--device", help=DEVICE)
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
    parser.set_defaults(command=commands.generate)


def _convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="checkpoint-340000.ckpt, Wan2.2_VAE.pth")
    parser.add_argument("target", nargs="?", help="file to write (default: beside the source, .safetensors)")
    parser.set_defaults(command=commands.convert)


def _bench(parser: argparse.ArgumentParser) -> None:
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
    _add_files(parser, "write the report as JSON too", "and as a page with plots")
    parser.set_defaults(command=commands.bench)


def _quantize(parser: argparse.ArgumentParser) -> None:
    _add_source(parser)
    parser.add_argument(
        "--variant", action="append", default=[], metavar="NAME",
        help="model of it; may be repeated (default: all of a folder, distill of the preset)",
    )  # fmt: skip
    parser.add_argument(
        "--scheme", default="fp8", metavar="NAME",
        help="fp8, fp8-attention, fp8-tensor or fp8-weights (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--calibrate", metavar="FILE", help="prompts to measure with, one a line (default: two)")
    parser.add_argument("--budget", type=float, metavar="E", help="of a layer, relative L2 (default: 0.06)")
    parser.add_argument("--latent-budget", type=float, metavar="E", help="of the final latents (default: 0.15)")
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("-o", "--output", metavar="FOLDER", help="new folder for the quantised checkpoint")
    _add_files(parser, html="write the report as one page, with a plot")
    parser.set_defaults(command=commands.quantize)


def _verify(parser: argparse.ArgumentParser) -> None:
    _add_step(parser)
    parser.add_argument("--scheme", metavar="NAME", help=SCHEME)
    parser.add_argument("--device", help=DEVICE)
    parser.set_defaults(command=commands.verify)


def _explain(parser: argparse.ArgumentParser) -> None:
    _add_step(parser, ("foal", "released"))
    parser.add_argument("--target", default="cpu", help="cpu, sm_80 or sm_90 (default: %(default)s)")
    parser.add_argument("--scheme", metavar="NAME", help=SCHEME)
    parser.set_defaults(command=commands.explain)


def _kernels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", default="sm_90", metavar="SM", help="sm_80 or sm_90 (default: %(default)s)")
    parser.add_argument("--op", action="append", default=[], metavar="OP", help="may be repeated (default: all)")
    _add_files(parser)
    parser.set_defaults(command=commands.kernels)


def _tune(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resolution", action="append", default=[], metavar="R", help="256p, 540p or 1080p; may be repeated (all)"
    )
    parser.add_argument("--op", action="append", default=[], metavar="OP", help="may be repeated (default: all)")
    parser.add_argument("--output", metavar="FOLDER", help="for the tables (default: where they are read)")
    parser.add_argument("--arch", metavar="SM", help="to predict for, where there is no GPU (default: sm_90)")
    _add_files(parser)
    parser.set_defaults(command=commands.tune)


def _profile(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="make a whole clip of it, and profile that in the place of a step")
    _add_step(parser)
    parser.add_argument("--device", help=DEVICE)
    parser.add_argument("--rounds", type=int, metavar="N", help="profiled steps (default: 7)")
    parser.add_argument("--trace", metavar="FILE", help="write them for ui.perfetto.dev or chrome://tracing")
    parser.add_argument("--once", action="store_true", help="run one step or clip, for ncu and nsys, without a report")
    clip = parser.add_argument_group("of a clip")
    clip.add_argument("--model", metavar="FOLDER", help="folder of released checkpoints (default: the preset)")
    clip.add_argument("--scheme", metavar="NAME", help="eight bits: fp8, fp8-attention, te (Hopper), fp8-weights")
    clip.add_argument("--resolution", metavar="R", help="256p, 540p, 1080p or WIDTHxHEIGHT (default: 256p)")
    clip.add_argument("--duration", type=float, metavar="S", help="seconds (default: 5)")
    clip.add_argument("--steps", type=int, metavar="N", help="of the base stage (default: 8, base model 32)")
    parser.set_defaults(command=commands.profile)


def _roofline(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--gpu", default="h100", metavar="NAME", help="h100, h200, a100, here (default: h100)")
    parser.add_argument(
        "--resolution", default="256p", metavar="R", help="256p, 540p or 1080p: its last stage (default: %(default)s)"
    )
    parser.add_argument("--tokens", metavar="V,A,T", help="of video, audio, text (default: those of a clip of 5 s)")
    parser.add_argument("--frames", type=int, metavar="N", help="latent frames of those tokens (default: 1)")
    parser.add_argument("--scheme", metavar="NAME", help="list that plan's kernels: fp8, fp8-attention, fp8-weights")
    _add_files(parser)
    parser.set_defaults(command=commands.roofline)


def _memory(parser: argparse.ArgumentParser) -> None:
    _add_clip(parser)
    parser.add_argument("--target", default="sm_90", metavar="SM", help="sm_80 or sm_90 (default: %(default)s)")
    parser.add_argument("--variant", default="distill", metavar="NAME", help="distill or base (default: %(default)s)")
    parser.add_argument("--model", metavar="FOLDER", help="folder of released checkpoints (default: as published)")
    parser.add_argument("--scheme", metavar="NAME", help=SCHEME)
    parser.add_argument(
        "--keep", action="append", default=[], metavar="PATTERN", help="layers that stay in 16 bits; may be repeated"
    )
    parser.add_argument(
        "--device-memory", metavar="SIZE", help="such as 40GB or 37GiB (default: the least that will do by turns)"
    )
    _add_files(parser)
    parser.set_defaults(command=commands.memory)


def _add_clip(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--resolution", default="256p", metavar="R", help="256p, 540p, 1080p or WIDTHxHEIGHT (default: %(default)s)"
    )
    parser.add_argument("--duration", type=float, default=5, metavar="S", help="seconds (default: %(default)s)")


def _add_step(parser: argparse.ArgumentParser, presets: tuple[str, ...] = ("foal",)) -> None:
    parser.add_argument("--preset", default="foal", choices=presets, help="model family (default: %(default)s)")
    parser.add_argument("--variant", default="distill", metavar="NAME", help="of its models (default: %(default)s)")
    parser.add_argument("--tokens", metavar="V,A,T", help="of video, audio and text (default: 446,26,40)")
    parser.add_argument("--frames", type=int, metavar="N", help="latent frames (default: 1)")
    _add_files(parser)


def _add_source(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--preset", default="foal", choices=("foal",), help="built-in model (default: %(default)s)")
    where.add_argument("--model", metavar="FOLDER", help="folder of released checkpoints")


def _add_files(
    parser: argparse.ArgumentParser,
    json: str = "write the report for programs",
    html: str = "write the report as one page",
) -> None:
    parser.add_argument("--json", metavar="FILE", help=json)
    parser.add_argument("--html", metavar="FILE", help=html)
