"""The latent pipeline, end to end, against recordings; then its parts."""

from dataclasses import replace

import pytest
import torch

from horsepower.runtime.foal import generate
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
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


@pytest.mark.golden
@pytest.mark.parametrize("case", CASES, ids=str)
def test_end_to_end_as_recorded(case):
    settings, info = case.info["evaluation_config"], case.info
    window = settings["data_proxy_config"]["frame_receptive_field"]
    texts = Texts(case["ctx"][0, : info["ctx_len"]], case["ctx_null"][0, : info["ctx_null_len"]])
    noise = RecordedNoise([case[key] for key in sorted(case.keys) if key.startswith("noise.")])
    watch, given = Watch(CPU), case.tensors.get("audio.given")
    audio = given.shape[1] if given is not None else info["seconds"] * settings["fps"] + 1
    grid, stage = Grid.of(*info["br_width_height"], audio), base_stage(settings)
    start = prepare(grid, noise, CPU, given)
    assert torch.equal(start.video, case["base.in.video"])
    base = load(case.sibling(info["base_weights"]), [], window)
    keep = given is not None and stage.guidance is not None
    latents = denoise(base, start, texts, stage, noise, watch, case.tensors.get("image.base"), keep)
    assert relative_error(latents.video, case["base.out.video"]) < 0.05
    assert relative_error(latents.audio, case["base.out.audio"]) < 0.05
    if info["sr_weights"]:
        model = load(case.sibling(info["sr_weights"]), info.get("local_attn_layers", []), window)
        final = Grid.of(*info["sr_width_height"], audio)
        how = Upscale(settings["noise_value"], settings["sr_audio_noise_scale"])
        image = case.tensors.get("image.sr")
        latents = super_resolve(model, latents, final, texts, sr_stage(settings), noise, watch, image, how)
    assert relative_error(latents.video, case["final.video"]) < 0.05
    assert relative_error(latents.audio, case["final.audio"]) < 0.05
    with pytest.raises(ValueError, match="end of the recording"):  # every draw was used
        noise((1,))


CONFIG = DiTConfig(
    num_layers=2, hidden_size=32, head_dim=16, num_query_groups=1, text_in_channels=8, mm_layers=(0,), gelu7_layers=(0,)
)
GRID = Grid(frames=2, height=4, width=4, audio=6)


@pytest.fixture(scope="module")
def model() -> DiT:
    dit = DiT(CONFIG)
    generate(dit, "test")
    return dit


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


def test_upscaling_keeps_corners_and_time():
    latents = prepare(GRID, SeededNoise(1), CPU)
    large = Grid(frames=2, height=10, width=12, audio=6)
    clean = upscale(latents, large, SeededNoise(2), Upscale(noise_index=0, audio_noise=0.0))
    assert clean.video.shape == large.video_shape
    torch.testing.assert_close(clean.video[..., ::9, ::11], latents.video[..., ::3, ::3])
    assert torch.equal(clean.audio, latents.audio)


def test_frames_are_truncated_and_clamped():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.999, 1.0, 3.0])
    chunk = values.expand(1, 3, 1, 1, 6)
    frames = to_frames([chunk, -chunk], (2, 1, 6))
    assert frames[0, 0, :, 0].tolist() == [0, 0, 127, 254, 255, 255]
    assert frames[1, 0, :, 2].tolist() == [255, 255, 127, 0, 0, 0]
    with pytest.raises(RuntimeError, match="1 frames where the latents hold 2"):
        to_frames([chunk], (2, 1, 6))
