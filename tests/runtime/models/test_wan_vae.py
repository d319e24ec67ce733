"""The Wan2.2 VAE against its recordings."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from horsepower.runtime.models import wan_vae
from recordings import Recording, find, max_error

pytestmark = pytest.mark.golden


@pytest.fixture(scope="module", params=find("wan22_"), ids=str)
def recording(request: pytest.FixtureRequest) -> Recording:
    return request.param


@pytest.fixture(scope="module")
def weights(recording: Recording) -> dict[str, Tensor]:
    return {wan_vae.rename(key[2:]): value for key, value in recording.tensors.items() if key.startswith("w.")}


@pytest.fixture(scope="module")
def tiny(recording: Recording, weights: dict[str, Tensor]) -> Any:
    config = recording.info["config"]
    vae = wan_vae.build("meta", encoder_width=config["dim"], decoder_width=config["dec_dim"])
    vae.load_state_dict(weights, assign=True)
    return vae


def test_statistics(recording: Recording) -> None:
    assert torch.equal(torch.tensor(wan_vae.LATENT_MEAN), recording["mean"])
    assert torch.equal(torch.tensor(wan_vae.LATENT_STD), recording["std"])


def test_halves_are_as_good_as_the_whole(recording: Recording, tiny: Any) -> None:
    encoder, decoder = (wan_vae.halved(copy.deepcopy(tiny), half) for half in ("encoder", "decoder"))
    pixels = recording["video"]
    latents = wan_vae.encode(tiny, pixels)
    assert torch.equal(wan_vae.encode(encoder, pixels), latents)
    assert torch.equal(wan_vae.decode(decoder, latents), wan_vae.decode(tiny, latents))
    sizes = [sum(x.numel() for x in vae.parameters()) for vae in (encoder, decoder, tiny)]
    assert sizes[0] + sizes[1] == sizes[2]


def test_encode_golden(recording: Recording, tiny: Any) -> None:
    assert max_error(wan_vae.encode(tiny, recording["video"]), recording["latent_video"]) < 1e-4
    assert max_error(wan_vae.encode(tiny, recording["video"][:, :, :1]), recording["latent_image"]) < 1e-4


def test_decode_golden(recording: Recording, tiny: Any) -> None:
    expected = recording["decoded_unclamped"]
    assert expected.abs().max() > 1  # so that the clamp is seen
    assert max_error(wan_vae.decode(tiny, recording["z"]), expected.clamp(-1, 1)) < 1e-4


def test_every_released_key_is_renamed(weights: dict[str, Tensor]) -> None:
    released = wan_vae.build("meta").state_dict()
    assert len(weights) == 196
    assert set(weights) == set(released)
    assert sum(value.numel() for value in released.values()) == 704_688_668


def test_meta_build_is_free_of_side_effects() -> None:
    before = torch.get_rng_state()
    vae = wan_vae.build("meta", torch.bfloat16)
    assert all(value.is_meta and value.dtype == torch.bfloat16 for value in vae.state_dict().values())
    assert not vae.training
    assert torch.equal(torch.get_rng_state(), before)


def test_bfloat16_rounds_the_statistics_first(tiny: Any) -> None:
    vae = copy.deepcopy(tiny)
    torch.nn.Module.to(vae, torch.bfloat16)
    pixels = torch.rand(1, 3, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    latents = wan_vae.encode(vae, pixels)
    mu = vae.encode(pixels.bfloat16()).latent_dist.mode()
    mean, std = (torch.tensor(v).bfloat16().view(-1, 1, 1, 1) for v in (wan_vae.LATENT_MEAN, wan_vae.LATENT_STD))
    assert latents.dtype == torch.float32
    assert torch.equal(latents, ((mu - mean) * (torch.ones((), dtype=torch.bfloat16) / std)).float())
    assert (latents - wan_vae.encode(tiny, pixels)).norm() < 0.1 * latents.norm()
    assert wan_vae.decode(vae, latents).dtype == torch.bfloat16


def test_mean_not_a_sample(recording: Recording, tiny: Any) -> None:
    before = torch.get_rng_state()
    first, second = (wan_vae.encode(tiny, recording["video"][:, :, :5]) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_sizes(tiny: Any, frames: int) -> None:
    video = wan_vae.decode(tiny, torch.zeros(1, 48, frames, 1, 3))
    assert video.shape == (1, 3, 4 * frames - 3, 16, 48)
    assert wan_vae.encode(tiny, video).shape == (1, 48, frames, 1, 3)


def test_latent_frame_does_not_see_the_future(tiny: Any) -> None:
    latents = torch.randn(1, 48, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    short, long = wan_vae.decode(tiny, latents[:, :, :2]), wan_vae.decode(tiny, latents)
    assert max_error(short, long[:, :, :5]) < 1e-5


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 4, 32, 32), "4 frames, allowed: 4n"),
        ((1, 3, 0, 32, 32), "shape"),
        ((1, 3, 1, 40, 32), "height 40 and width 32"),
        ((1, 3, 1, 32, 24), "multiples of 16"),
        ((1, 4, 1, 32, 32), "shape"),
        ((3, 1, 32, 32), "shape"),
    ],
)
def test_bad_pixels(tiny: Any, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^pixels: got .*{message}"):
        wan_vae.encode(tiny, torch.zeros(shape))


@pytest.mark.parametrize("shape", [(48, 2, 2, 2), (1, 16, 2, 2, 2), (1, 48, 0, 2, 2)])
def test_bad_latents(tiny: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^latents: got shape"):
        wan_vae.decode(tiny, torch.zeros(shape))
