"""`horsepower bench --resolution`: a step of a released model at full size, measured on a GPU or else predicted."""

from collections.abc import Callable, Sequence

import torch

from horsepower.bench import full, step
from horsepower.bench.ladder import QUICK
from horsepower.bench.report import Report
from horsepower.bench.step import Tokens
from horsepower.kernels.target import target_of
from horsepower.predicting import tokens_of, unmeasured, variant_of
from horsepower.runtime.devices import indexed


def measure_full(
    resolution: str,
    device: str | None = None,
    tokens: Tokens | None = None,
    rounds: int | None = None,
    skip: Sequence[str] = (),
    quick: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Report:
    """The ladder of a step of a pipeline's last stage (256p, 540p, 1080p), with random weights.

    device: None takes the first GPU; tokens: others than those of a clip of 5 seconds; quick: eager and the whole plan.
    Raises ValueError.
    """
    tokens, variant = tokens or tokens_of(resolution), variant_of(resolution)
    options = full.Options(
        tokens, full.Options.rounds if rounds is None else rounds, (*skip, *(QUICK["skip"] if quick else ()))
    )
    if device is None and not torch.cuda.is_available():
        return unmeasured(resolution, tokens, "this machine has no GPU")
    gpu = torch.device("cuda" if device is None else device)
    if gpu.type != "cuda" or not torch.cuda.is_available():
        raise ValueError(f"device: got {str(device)!r}, allowed: cuda or cuda:N, where torch finds a GPU")
    target_of(gpu)
    title = f"One velocity step of {variant} at full size, {tokens} tokens in {tokens.frames} frames"
    return full.climb(step.released(variant), options, indexed(gpu), title, say)
