"""The latent pipeline, end to end, against recordings; then its parts."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from itertools import cycle

import pytest
import torch

from horsepower.quant.budget import LATENT_BUDGET
from horsepower.quant.scheme import SCHEMES
from horsepower.quantizing import plan_under
from horsepower.runtime.calibration import calibrated, largest_inputs
from horsepower.runtime.executor import weights_of
from horsepower.runtime.foal import generate
from horsepower.runtime.fused import FusedDiT
from horsepower.runtime.models import attention, dit
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.phases import super_resolution_stage
from horsepower.runtime.pipeline import (
    BaseGuidance,
    Latents,
    Stage,
    SuperResolutionGuidance,
    Texts,
    Upscale,
    denoise,
    prepare,
    super_resolve,
    to_frames,
    upscale,
)
from horsepower.runtime.request import Request
from horsepower.runtime.sampling import RecordedNoise, SeededNoise
from horsepower.runtime.tokens import Grid
from horsepower.runtime.watch import Watch
from recordings import Recording, find, relative_error

CASES = find("e2e_", "noise.00", "final.video")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def load(weights: Recording, local_layers: list[int], window: int) -> DiT:
    config = DiTConfig.from_dict(
        weights.info["config"] | {"local_attn_layers": local_layers, "frame_receptive_field": window}
    )
    model = DiT(config, device="meta")
    model.load_state_dict(weights.tensors, strict=True, assign=True)
    return model.eval()


def base_stage(settings: dict) -> Stage:
    guided = settings["cfg_number"] == 2
    guidance = BaseGuidance(settings["video_txt_guidance_scale"], settings["audio_txt_guidance_scale"])
    name = ("sde" if settings["using_sde_flag"] else "unipc") if guided else "distilled"
    coords = settings["data_proxy_config"]["coords_style"]
    return Stage("base", settings["num_inference_steps"], name, guidance if guided else None, coords, settings["shift"])


def sr_stage(settings: dict) -> Stage:
    first = settings["cfg_trick_start_frame"] if settings["use_cfg_trick"] else 0
    guidance = SuperResolutionGuidance(settings["sr_video_txt_guidance_scale"], first, settings["cfg_trick_value"])
    guided = guidance if settings["sr_cfg_number"] == 2 else None
    return Stage("sr", settings["sr_num_inference_steps"], "unipc", guided, "v1", settings["shift"])


def exact_attention(q, k, v):
    """As in the recordings: softmax in float32, one rounding at the end. A kernel's own rounding is not on trial."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.float().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("ihd,jhd->hij", q.float(), k) * q.shape[-1] ** -0.5
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).to(q.dtype)


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_end_to_end_as_recorded(case, monkeypatch):
    """The recordings' own attention, so that what is left is meaning; guidance would magnify a kernel's rounding."""
    monkeypatch.setattr(attention, "full_attention", exact_attention)
    monkeypatch.setattr(dit, "full_attention", exact_attention)
    for name, (got, want) in end_to_end(case).items():
        assert relative_error(got, want) < 0.05, name


@pytest.mark.golden
@pytest.mark.parametrize("mode", ["eager", "fused"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_end_to_end_with_the_models_own_attention(case, mode):
    """8 %, for guidance multiplies a kernel's rounding; more only where the reference itself strays a third as far."""
    floor = case.info.get("rel_l2_other_attention_kernel", 0.0)
    floor = max(floor.values()) if isinstance(floor, dict) else floor
    results = end_to_end(case, FusedDiT) if mode == "fused" else as_it_is_written(case)[0]
    for name in ("final.video", "final.audio"):
        assert relative_error(*results[name]) < max(0.08, 3 * floor), name


@pytest.mark.golden
@pytest.mark.parametrize(
    ("case", "scheme"),
    [*zip(CASES, cycle(("fp8", "fp8-weights"))), *((CASES[0], each) for each in ("fp8-attention", "fp8-tensor"))],
    ids=str,
)
def test_end_to_end_in_eight_bits(case, scheme, monkeypatch):
    """Final latents within the default budget of those in 16 bits, and of the recording but for what 16 bits lose."""
    passes = sys.modules["horsepower.graph.passes.quantise_attention"]
    monkeypatch.setattr(passes, "HEADS_OF_CODES", (16,))  # of the recordings: too narrow for a kernel, not for this

    plain, largest = as_it_is_written(case)
    of_models = iter(largest)

    def under(model: DiT) -> FusedDiT:
        chosen, seen = SCHEMES[scheme], next(of_models)
        chosen = calibrated(chosen, seen) if chosen.inputs == "tensor" else chosen
        return FusedDiT(model, plan=plan_under(model, chosen, CPU), weights=weights_of(model))

    eight = end_to_end(case, under)
    for name in ("final.video", "final.audio"):
        error, off = relative_error(eight[name][0], plain[name][0]), relative_error(*eight[name])
        assert error < LATENT_BUDGET, f"{name}: {scheme} is off by {error:.4f} from bf16"
        assert off < LATENT_BUDGET + 0.02, f"{name}: {scheme} is off by {off:.4f} from the recording"


@cache
def as_it_is_written(case: Recording) -> tuple[dict[str, tuple[torch.Tensor, torch.Tensor]], list[dict]]:
    """What `end_to_end` gives, and the largest inputs of each model's layers."""
    largest = []
    with ExitStack() as watching:

        def watched(model: DiT) -> DiT:
            largest.append(watching.enter_context(largest_inputs(model)))
            return model

        return end_to_end(case, watched), largest


def end_to_end(case: Recording, prepared=lambda model: model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Run the recorded clip with models so prepared; every tensor recorded on the way, as it is here and was there."""
    settings, info, results = case.info["evaluation_config"], case.info, {}
    window = settings["data_proxy_config"]["frame_receptive_field"]
    texts = Texts(case["ctx"][0, : info["ctx_len"]], case["ctx_null"][0, : info["ctx_null_len"]])
    noise = RecordedNoise([case[key] for key in sorted(case.keys) if key.startswith("noise.")])
    watch, given = Watch(CPU), case.tensors.get("audio.given")
    audio = given.shape[1] if given is not None else info["seconds"] * settings["fps"] + 1
    grid, stage = Grid.of(*info["br_width_height"], audio), base_stage(settings)

    def note(name: str, latents: Latents) -> None:
        for kind in ("video", "audio"):
            if f"{name}.{kind}" in case:
                results[f"{name}.{kind}"] = (getattr(latents, kind), case[f"{name}.{kind}"])

    start = prepare(grid, noise, CPU, given)
    note("base.in", start)
    base = load(case.sibling(info["base_weights"]), [], window)
    keep = given is not None and stage.guidance is not None
    latents = denoise(prepared(base), start, texts, stage, noise, watch, case.tensors.get("image.base"), keep)
    note("base.out", latents)
    if info["sr_weights"]:
        model = load(case.sibling(info["sr_weights"]), info.get("local_attn_layers", []), window)
        final = Grid.of(*info["sr_width_height"], audio)
        how = Upscale(settings["noise_value"], settings["sr_audio_noise_scale"])
        image = case.tensors.get("image.sr")
        latents = super_resolve(prepared(model), latents, final, texts, sr_stage(settings), noise, watch, image, how)
    note("final", latents)
    with pytest.raises(ValueError, match="end of the recording"):  # every draw was used
        noise((1,))
    return results


@pytest.mark.golden
@pytest.mark.parametrize("case", [case for case in CASES if "sr.in.video" in case], ids=str)
def test_upscaling_as_recorded(case):
    settings = case.info["evaluation_config"]
    base = Latents(case["base.out.video"], case["base.out.audio"])
    draws = [case[key] for key in sorted(case.keys) if key.startswith("noise.")][-2:]
    if settings["sr_cfg_number"] and settings["noise_value"] == 0:
        draws = draws[-1:]
    final = Grid.of(*case.info["sr_width_height"], base.grid.audio)
    how = Upscale(settings["noise_value"], settings["sr_audio_noise_scale"])
    got = upscale(base, final, RecordedNoise(draws), how)
    assert relative_error(got.video, case["sr.in.video"]) < 1e-5
    assert relative_error(got.audio, case["sr.in.audio"]) < 1e-5


CONFIG = DiTConfig(
    num_layers=2, hidden_size=32, head_dim=16, num_query_groups=1, text_in_channels=8, mm_layers=(0,), gelu7_layers=(0,)
)
GRID = Grid(frames=2, height=4, width=4, audio=6)


@pytest.fixture(scope="module")
def model() -> DiT:
    made = DiT(CONFIG)
    generate(made, "test")
    return made


def texts(n: int = 3, seed: int = 0) -> Texts:
    generator = torch.Generator().manual_seed(seed)
    return Texts(torch.randn(n, 8, generator=generator), torch.randn(n + 2, 8, generator=generator))


def run(model, stage, **kwargs) -> Latents:
    noise = SeededNoise(0)
    return denoise(model, prepare(GRID, noise, CPU), texts(), stage, noise, Watch(CPU), **kwargs)


@pytest.mark.parametrize("name", ["distilled", "unipc", "sde"])
def test_image_and_kept_audio_come_out_as_they_went_in(model, name):
    image = torch.randn(1, 48, 1, 4, 4, generator=torch.Generator().manual_seed(3))
    stage = Stage("base", 3, name)
    latents = run(model, stage, image=image, keep_audio=True)
    assert torch.equal(latents.video[:, :, :1], image)
    assert torch.equal(latents.audio, prepare(GRID, SeededNoise(0), CPU).audio)
    assert not torch.equal(run(model, stage).video, latents.video)


def test_guidance_of_one_is_no_guidance(model):
    class One:
        def __call__(self, timestep, frames):
            return 1.0, 1.0

    plain, guided = run(model, Stage("base", 3, "unipc")), run(model, Stage("base", 3, "unipc", One()))
    torch.testing.assert_close(guided.video, plain.video, rtol=1e-4, atol=1e-4)
    strong = run(model, Stage("base", 3, "unipc", BaseGuidance()))
    assert relative_error(strong.video, plain.video) > 0.01


def test_guidance_scales():
    assert BaseGuidance()(501, 9) == (5.0, 5.0)
    assert BaseGuidance()(500, 9) == (2.0, 5.0)
    scale, _ = SuperResolutionGuidance()(999, 15)
    assert scale.flatten().tolist() == [2.0] * 13 + [3.5] * 2
    weak, _ = SuperResolutionGuidance(video=1.5)(0, 14)
    assert weak.flatten().tolist() == [1.5] * 14


def test_guidance_needs_a_negative_prompt(model):
    noise = SeededNoise(0)
    with pytest.raises(ValueError, match=r"texts\.negative"):
        denoise(
            model, prepare(GRID, noise, CPU), replace(texts(), negative=None), Stage("b", 1, "unipc", BaseGuidance()),
            noise, Watch(CPU),
        )  # fmt: skip


def test_upscaling_aligns_corners():
    ramp = torch.arange(4.0).expand(GRID.video_shape)
    large = Grid(frames=2, height=10, width=10, audio=6)
    clean = upscale(Latents(ramp, torch.zeros(GRID.audio_shape)), large, SeededNoise(2), Upscale(0, 0.0))
    torch.testing.assert_close(clean.video, torch.linspace(0, 3, 10).expand(large.video_shape))


def test_upscaling_keeps_the_variance_and_mixes_the_sound():
    ones, zeros = torch.ones(GRID.video_shape), torch.zeros(GRID.audio_shape)
    draws = RecordedNoise([torch.full(GRID.video_shape, 2.0), torch.full(GRID.audio_shape, 10.0)])
    noised = upscale(Latents(ones, zeros + 1), GRID, draws, Upscale())
    signal = 0.8389104
    torch.testing.assert_close(noised.video, ones * (signal + 2 * (1 - signal**2) ** 0.5))
    torch.testing.assert_close(noised.audio, zeros + 0.7 * 10 + 0.3 * 1)


def test_order_of_the_draws(model):
    """Audio before video at the start, video before audio in each step and before super-resolution."""
    drawn = []

    def noise(shape):
        drawn.append("audio" if len(shape) == 3 else "video")
        return torch.zeros(tuple(shape))

    latents = denoise(model, prepare(GRID, noise, CPU), texts(), Stage("base", 2, "distilled"), noise, Watch(CPU))
    large = Grid(frames=2, height=6, width=6, audio=6)
    super_resolve(model, latents, large, texts(), Stage("sr", 1, "unipc", coords="v1"), noise, Watch(CPU))
    assert drawn == ["audio", "video", *["video", "audio"] * 2, "video", "audio"]
    drawn.clear()
    prepare(GRID, noise, CPU, torch.zeros(GRID.audio_shape))
    assert drawn == ["video"]


def test_the_released_settings():
    assert Upscale() == Upscale(noise_index=220, audio_noise=0.7)
    assert super_resolution_stage(Request(prompt="x")) == Stage("super-resolution", 5, "unipc", None, "v1", 5.0)
    assert Stage("base", 8, "distilled").coords == "v2"


def test_frames_are_truncated_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    chunk = values.expand(1, 3, 1, 1, 6)
    frames = to_frames([chunk, -chunk], (2, 1, 6))
    assert frames[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert frames[1, 0, :, 2].tolist() == [255, 255, 127, 0, 0, 0]
    with pytest.raises(RuntimeError, match="1 frames where the latents hold 2"):
        to_frames([chunk], (2, 1, 6))
