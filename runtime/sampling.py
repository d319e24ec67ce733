"""Flow-matching schedules and the steps that walk down them.

Flow convention: x_sigma = (1 - sigma) * x0 + sigma * noise, and the model predicts v = noise - x0. A sampler belongs to
one latent: video and audio have their own, with their own history.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor

SamplerName = Literal["distilled", "unipc", "sde"]


class Noise(Protocol):
    """Where normal draws come from: called once a draw, in the order in which the pipeline needs them."""

    def __call__(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 of `shape` on the CPU."""
        ...


class SeededNoise:
    """Draws from a CPU generator of its own, so that a seed means the same noise on every device.

    (torch's generator vectorises: CPUs without AVX2 round some draws otherwise.)
    """

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(tuple(shape), generator=self._generator)


class RecordedNoise:
    """Plays back recorded draws; raises ValueError when one has another shape or none is left."""

    def __init__(self, draws: Sequence[Tensor]):
        self._draws: Iterator[Tensor] = iter(draws)

    def __call__(self, shape: Sequence[int]) -> Tensor:
        draw = next(self._draws, None)
        if draw is None or draw.shape != torch.Size(shape):
            got = "the end of the recording" if draw is None else tuple(draw.shape)
            raise ValueError(f"noise: got {got}, allowed: a recorded draw of shape {tuple(shape)}")
        return draw


@dataclass(frozen=True)
class Schedule:
    """Noise levels: `sigmas` float32 values, N + 1 falling to 0; `timesteps` N integers in thousandths."""

    sigmas: tuple[float, ...]
    timesteps: tuple[int, ...]

    @property
    def steps(self) -> int:
        return len(self.timesteps)


def schedule(steps: int, shift: float = 5.0) -> Schedule:
    """The shifted-linear schedule of N steps; sigmas are rounded to float32, timesteps truncated before that."""
    s = np.linspace(float(np.float32(0.999)), 0.0, steps + 1)[:-1]
    sigma = shift * s / (1 + (shift - 1) * s)
    rounded = (*(float(value) for value in sigma.astype(np.float32)), 0.0)
    return Schedule(rounded, tuple(int(value) for value in sigma * 1000))


class Sampler(Protocol):
    """Carries one latent from noise to data."""

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        """From x at sigmas[i] with the model's velocity v to x at sigmas[i + 1]; float32, any shape."""
        ...


class Distilled:
    """Jump to the clean prediction, then back up with fresh noise (few-step distribution matching)."""

    def __init__(self, schedule: Schedule, noise: Callable[[Tensor], Tensor]):
        self.sigmas, self.noise = schedule.sigmas, noise

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        # Noise is drawn on the last step too, where its factor is 0: recorded draws count on it.
        following = self.sigmas[i + 1]
        return following * self.noise(x) + (1 - following) * (x - self.sigmas[i] * v)


class SDE:
    """Euler steps, some of them mixed with fresh noise by an angle theta in [0, 1]: 0 is Euler, 1 is `Distilled`."""

    def __init__(self, schedule: Schedule, noise: Callable[[Tensor], Tensor], theta: Sequence[float] | None = None):
        self.sigmas, self.noise = schedule.sigmas, noise
        self.theta = tuple(theta) if theta is not None else self.pattern(schedule.steps)

    @staticmethod
    def pattern(steps: int) -> tuple[float, ...]:
        """Every second step for the first three quarters, every third after that."""
        return tuple(float(i % 2 == 1 if i < int(0.75 * steps) else i % 3 == 0) for i in range(steps))

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        following = self.sigmas[i + 1]
        c, s = math.cos(self.theta[i] * math.pi / 2), math.sin(self.theta[i] * math.pi / 2)
        clean = x - self.sigmas[i] * v
        return (1 - following + following * c) * clean + following * c * v + following * s * self.noise(x)


class UniPC:
    """UniPC of order 2 (bh2, predicts x0, with corrector), as in Zhao et al. 2023, arXiv:2302.04867.

    Coefficients are float64 scalars. The first step and the last are of order 1.
    """

    def __init__(self, schedule: Schedule):
        self.sigmas = schedule.sigmas
        self.clean: list[Tensor] = []  # the last two predictions of x0, newest first
        self.corrected: Tensor | None = None

    def order(self, i: int) -> int:
        """Order of the predictor at step i."""
        return min(2, len(self.sigmas) - 1 - i, i + 1)

    def step(self, i: int, x: Tensor, v: Tensor) -> Tensor:
        clean = x - self.sigmas[i] * v  # of the uncorrected sample
        if self.corrected is not None:
            x = self._correct(i, clean, self.corrected)
        self.clean = [clean, *self.clean[:1]]
        self.corrected = x
        return self._predict(i, x)

    def _log_snr(self, i: int) -> float:
        sigma = self.sigmas[i]
        return math.inf if sigma == 0 else math.log(1 - sigma) - math.log(sigma)

    def _correct(self, i: int, clean: Tensor, x: Tensor) -> Tensor:
        h = self._log_snr(i) - self._log_snr(i - 1)
        e, alpha = math.expm1(-h), 1 - self.sigmas[i]
        last = self.clean[0]
        base = (self.sigmas[i] / self.sigmas[i - 1]) * x - alpha * e * last
        if self.order(i - 1) == 1:
            return base - alpha * e * 0.5 * (clean - last)
        r = (self._log_snr(i - 2) - self._log_snr(i - 1)) / h
        phi = e / -h - 1
        b1, b2 = phi / e, 2 * (phi / -h - 0.5) / e
        c1 = (b2 - b1) / (r - 1)  # solves c1 + c2 = b1, r * c1 + c2 = b2
        return base - alpha * e * (c1 * (self.clean[1] - last) / r + (b1 - c1) * (clean - last))

    def _predict(self, i: int, x: Tensor) -> Tensor:
        h = self._log_snr(i + 1) - self._log_snr(i)
        e, alpha = math.expm1(-h), 1 - self.sigmas[i + 1]
        base = (self.sigmas[i + 1] / self.sigmas[i]) * x - alpha * e * self.clean[0]
        if self.order(i) == 1:
            return base
        r = (self._log_snr(i - 1) - self._log_snr(i)) / h
        return base - alpha * e * 0.5 * (self.clean[1] - self.clean[0]) / r


def sampler(name: SamplerName, schedule: Schedule, noise: Callable[[Tensor], Tensor]) -> Sampler:
    """A fresh sampler for one latent; `noise` gives normal draws like its argument."""
    if name == "unipc":
        return UniPC(schedule)
    return Distilled(schedule, noise) if name == "distilled" else SDE(schedule, noise)


def zero_snr_signal() -> Tensor:
    """How much signal is left at each of 1000 noise indices, float32: scaled-linear betas with zero terminal SNR."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64).square()
    q = torch.cumprod(1 - betas, dim=0).float().sqrt()
    return (q - q[-1]) * q[0] / (q[0] - q[-1])
