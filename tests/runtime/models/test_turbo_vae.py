"""The Turbo VAED decoder against its recordings, and its sliding window against a plain re-computation."""

from typing import Any

import pytest
import torch
from torch import Tensor

from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder, rms_norm
from horsepower.runtime.models.wan_vae import LATENT_MEAN, LATENT_STD
from recordings import Recording, find, max_error

RELEASED: dict[str, Any] = {
    "_class_name": "AutoencoderKLTurboVAED",
    "aligned_feature_projection_dim": [1, 2],
    "decoder_block_out_channels": [64, 128, 256, 512],
    "decoder_causal": False,
    "decoder_dw_kernel_size": 5,
    "decoder_is_dw_conv": [False] * 5,
    "decoder_layers_per_block": [2, 2, 2, 3, 3],
    "decoder_spatio_only": [False, True, False, False],
    "decoder_spatio_temporal_scaling": [False, True, True, True],
    "first_chunk_size": 7,
    "in_channels": 3,
    "latent_channels": 48,
    "out_channels": 3,
    "patch_size": 2,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1,
    "spatial_compression_ratio": 16,
    "step_size": 7,
    "temporal_compression_ratio": 4,
    "use_unpatchify": True,
}


@pytest.fixture(scope="module")
def tiny() -> TurboDecoder:
    """Thin channels, random weights, outputs of about unit scale."""
    config = TurboConfig.from_dict(RELEASED | {"decoder_block_out_channels": [4, 4, 6, 8]})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TurboDecoder(config)


def latents(frames: int, seed: int = 1) -> Tensor:
    return torch.randn(1, 48, frames, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.golden
@pytest.mark.parametrize("recording", find("turbo_"), ids=str)
def test_as_recorded(recording: Recording) -> None:
    decoder = TurboDecoder(TurboConfig.from_dict(recording.info["config"]))
    decoder.load_state_dict({key[2:]: value for key, value in recording.tensors.items() if key.startswith("w.")})
    names = [key for key in recording.keys if key.startswith("z")]
    assert names
    for name in names:
        assert max_error(decoder(recording[name]), recording["video" + name[1:]]) < 1e-4


def test_released_shape() -> None:
    with torch.device("meta"):
        decoder = TurboDecoder(TurboConfig.from_dict(RELEASED))
    state = decoder.state_dict()
    assert TurboConfig() == decoder.config
    assert len(state) == 80
    assert sum(value.numel() for value in state.values()) == 107_122_892
    assert state["decoder.up_blocks.1.conv_in.conv_shortcut.conv.weight"].shape == (256, 512, 1, 1, 1)
    assert state["decoder.up_blocks.1.upsamplers.0.time_conv.conv.weight"].shape == (512, 256, 3, 1, 1)
    assert not any("up_blocks.2.upsamplers.0.time_conv" in key for key in state)


@pytest.mark.parametrize("frames", [1, 2, 6, 7, 8, 13, 14, 15, 22])
def test_frame_count_and_chunks(tiny: TurboDecoder, frames: int) -> None:
    chunks = list(tiny.decode_chunks(latents(frames)))
    assert sum(chunk.shape[2] for chunk in chunks) == 4 * frames - 3
    assert len(chunks) == 1 + max(0, -(-(frames - 7) // 7))
    video = tiny.decode(latents(frames))
    assert video.shape == (1, 3, 4 * frames - 3, 32, 48)
    assert torch.equal(torch.cat(chunks, dim=2), video)


def window_by_hand(decoder: TurboDecoder, z: Tensor) -> Tensor:
    """Each pixel frame taken from the chunk that owns its latent frame, found by indices instead of by cutting."""
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (LATENT_MEAN, LATENT_STD))
    T = z.shape[2]
    padded = T
    while padded < 7 or (padded - 7) % 7:
        padded += 1
    index = torch.arange(padded).clamp(max=T - 1)
    z = (z * std + mean)[:, :, index]
    frames = []
    for t in range(T):
        own = t // 7 * 7
        low, high = max(own - 1, 0), min(own + 8, padded)
        pixels = decoder.decoder(z[:, :, low:high], first_chunk=own == 0)
        begin = 4 * (t - low) - (3 if low == 0 and t > 0 else 0)
        frames.append(pixels[:, :, begin : begin + (1 if t == 0 else 4)])
    return torch.cat(frames, dim=2)


@pytest.mark.parametrize("frames", [1, 6, 7, 8, 15])
def test_window_equals_plain_recomputation(tiny: TurboDecoder, frames: int) -> None:
    error = max_error(tiny.decode(latents(frames)), window_by_hand(tiny, latents(frames)))
    assert error < 1e-4


def test_chunk_sees_one_frame_of_context(tiny: TurboDecoder) -> None:
    base, changed = latents(21), latents(21)
    changed[:, :, 8] += 1  # frame 7 is the first chunk's right context, frame 8 is not
    first, second, _ = zip(tiny.decode_chunks(base), tiny.decode_chunks(changed), strict=True)
    assert torch.equal(*first)
    assert not torch.equal(*second)
    changed = latents(21)
    changed[:, :, 7] += 1
    first, _, third = zip(tiny.decode_chunks(base), tiny.decode_chunks(changed), strict=True)
    assert not torch.equal(*first)
    assert torch.equal(*third)


def test_chunks_come_one_at_a_time(tiny: TurboDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = tiny.decoder.forward

    def counted(x: Tensor, first_chunk: bool) -> Tensor:
        calls.append(first_chunk)
        return original(x, first_chunk)

    monkeypatch.setattr(tiny.decoder, "forward", counted)
    chunks = tiny.decode_chunks(latents(15))
    assert next(chunks).shape[2] == 25
    assert calls == [True]


def test_other_window_sizes_agree_with_frame_count() -> None:
    sizes = {"decoder_block_out_channels": [2, 2, 2, 2], "first_chunk_size": 3, "step_size": 2}
    decoder = TurboDecoder(TurboConfig.from_dict(RELEASED | sizes))
    for frames in range(1, 9):
        assert decoder.decode(latents(frames)).shape[2] == 4 * frames - 3


def test_bfloat16_and_strides(tiny: TurboDecoder) -> None:
    z = latents(3)
    strided = torch.empty(1, 3, 2, 3, 48).permute(0, 4, 1, 2, 3).copy_(z)
    assert max_error(tiny(strided), tiny(z)) < 1e-5
    half = TurboDecoder(tiny.config)
    half.load_state_dict(tiny.state_dict())
    video = half.bfloat16()(z)
    assert video.dtype == torch.bfloat16
    error = (video.float() - tiny(z)).norm() / tiny(z).norm()
    assert error < 0.1


def test_no_leak_between_calls(tiny: TurboDecoder) -> None:
    before = tiny(latents(3))
    poisoned = tiny(latents(3) * torch.nan)
    assert poisoned.isnan().all()
    assert torch.equal(tiny(latents(3)), before)


def test_rms_norm_keeps_float32_inside() -> None:
    x = (torch.randn(2, 8, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * 100).bfloat16()
    expected = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-8).sqrt()
    assert torch.equal(rms_norm(x, 1e-8), expected.float().bfloat16())
    assert torch.equal(rms_norm(torch.zeros(1, 4, 1, 1, 1), 1e-8), torch.zeros(1, 4, 1, 1, 1))


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("decoder_is_dw_conv", [False, False, True, False, False], "all false"),
        ("use_unpatchify", False, "True"),
        ("decoder_causal", True, "False"),
        ("patch_size_t", 2, "1"),
        ("latent_channels", 16, "48"),
        ("out_channels", 4, "3"),
        ("scaling_factor", 0.5, "1"),
        ("decoder_layers_per_block", [2, 2, 2, 3], "5 for 4 blocks"),
        ("decoder_spatio_only", [True], "4 for 4 blocks"),
        ("decoder_block_out_channels", [], "allowed: 1"),
        ("first_chunk_size", 0, "allowed: values like"),
        ("step_size", -7, "allowed: values like"),
        ("patch_size", "2", "allowed: values like"),
    ],
)
def test_bad_configuration(field: str, value: Any, allowed: str) -> None:
    with pytest.raises(ValueError, match=f"^{field}: got .*{allowed}"):
        TurboConfig.from_dict(RELEASED | {field: value})


def test_missing_field() -> None:
    config = {key: value for key, value in RELEASED.items() if key != "step_size"}
    with pytest.raises(ValueError, match=r"^step_size: missing"):
        TurboConfig.from_dict(config)


@pytest.mark.parametrize("shape", [(48, 3, 2, 2), (1, 16, 3, 2, 2), (1, 48, 0, 2, 2)])
def test_bad_latents(tiny: TurboDecoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^latents: got shape"):
        tiny.decode(torch.zeros(shape))
