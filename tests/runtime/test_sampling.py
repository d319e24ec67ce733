"""Schedules and steps against recordings, and against what they must be."""

import re

import pytest
import torch

from horsepower.runtime.sampling import (
    SDE,
    Distilled,
    RecordedNoise,
    SeededNoise,
    UniPC,
    sampler,
    schedule,
    zero_snr_signal,
)
from recordings import find

RUNS = [
    (recording, key.removesuffix(".velocity"))
    for recording in find("sampler_")
    for key in sorted(recording.keys)
    if key.endswith(".velocity")
]


def walk(stepper, x, velocity):
    for i, v in enumerate(velocity):
        x = stepper.step(i, x, v)
        yield x


@pytest.mark.golden
@pytest.mark.parametrize(("case", "run"), RUNS, ids=str)
def test_as_recorded(case, run):
    velocity, steps = case[f"{run}.velocity"], len(case[f"{run}.velocity"])
    plan = schedule(steps, case.info.get("shift", 5.0))
    torch.testing.assert_close(torch.tensor(plan.sigmas), case[f"{run}.sigmas"], rtol=0, atol=1e-7)
    if f"{run}.timesteps" in case:
        assert list(plan.timesteps) == case[f"{run}.timesteps"].tolist()
    kind = re.match("[a-z]+", run).group()
    suffixes = [""] if kind != "sde" else [s for s in ("", "_frac") if f"{run}.latents{s}" in case]
    for suffix in suffixes:
        noise = RecordedNoise(list(case.tensors.get(f"{run}.noise{suffix}", ())))
        draw = lambda x, noise=noise: noise(x.shape)  # noqa: E731
        if kind == "sde":
            stepper = SDE(plan, draw, case[f"{run}.theta{suffix}"].tolist())
        else:
            stepper = sampler({"unipc": "unipc", "distill": "distilled"}[kind], plan, draw)
        for got, want in zip(walk(stepper, case[f"{run}.init"], velocity), case[f"{run}.latents{suffix}"], strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    if f"{run}.order" in case:
        assert [UniPC(plan).order(i) for i in range(steps)] == case[f"{run}.order"].tolist()
    if kind == "sde":
        assert list(SDE.pattern(steps)) == case[f"{run}.theta"].tolist()


@pytest.mark.golden
@pytest.mark.parametrize("case", find("sampler_", "zero_snr_table"), ids=str)
def test_signal_table_as_recorded(case):
    torch.testing.assert_close(zero_snr_signal(), case["zero_snr_table"], rtol=0, atol=1e-6)


def test_signal_table():
    table = zero_snr_signal()
    assert table[220].item() == pytest.approx(0.8389104, abs=1e-6)
    assert table[999] == 0


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 50])
def test_unipc_recovers_a_straight_path(steps):
    """On x_sigma = (1 - sigma) x0 + sigma eps the velocity is constant, and every step lands on the path."""
    generator = torch.Generator().manual_seed(0)
    x0, eps = (torch.randn(3, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    plan, stepper = schedule(steps), UniPC(schedule(steps))
    x = (1 - plan.sigmas[0]) * x0 + plan.sigmas[0] * eps
    for i in range(steps):
        x = stepper.step(i, x, eps - x0)
        sigma = plan.sigmas[i + 1]
        torch.testing.assert_close(x, (1 - sigma) * x0 + sigma * eps, rtol=1e-6, atol=1e-6)


def test_theta_reaches_from_euler_to_distilled():
    plan = schedule(4)
    x, v, noise = (torch.randn(5, generator=torch.Generator().manual_seed(i)) for i in range(3))
    euler = SDE(plan, lambda _: noise, [0, 0, 0, 0]).step(1, x, v)
    torch.testing.assert_close(euler, x + (plan.sigmas[2] - plan.sigmas[1]) * v)
    distilled = Distilled(plan, lambda _: noise).step(1, x, v)
    torch.testing.assert_close(SDE(plan, lambda _: noise, [1, 1, 1, 1]).step(1, x, v), distilled)


def test_seeded_noise_is_its_own():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    first = SeededNoise(3)((4, 5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.randn(10)
    assert torch.equal(SeededNoise(3)((4, 5)), first)
    assert not torch.equal(SeededNoise(4)((4, 5)), first)


def test_recorded_noise_refuses_what_was_not_recorded():
    noise = RecordedNoise([torch.zeros(2)])
    with pytest.raises(ValueError, match="noise: got"):
        noise((3,))
    with pytest.raises(ValueError, match="end of the recording"):
        RecordedNoise([])((3,))
