"""Memory is predicted before it is taken: bounds against a count of what lives, operator by operator."""

from dataclasses import replace

import pytest
import torch

from horsepower.bench.live import live_peak
from horsepower.runtime import memory
from horsepower.runtime.foal import AUDIO_WIDTH, generate
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.models.dit import Condition, DiT, FourierRope
from horsepower.runtime.models.text import HashedWordEncoder
from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder
from horsepower.runtime.pipeline import BaseGuidance, Stage, Texts, denoise, prepare
from horsepower.runtime.presets import FOAL, MODELS
from horsepower.runtime.released import ReleasedSizes
from horsepower.runtime.sampling import SeededNoise
from horsepower.runtime.tokens import Grid, coordinates
from horsepower.runtime.watch import Watch

CPU = torch.device("cpu")


def assert_bound(bound, run, slack=1.5):
    """Enough, and not much too much."""
    with torch.no_grad():
        counted = live_peak(run)
    assert counted <= bound <= slack * counted


def test_absurd_clips_are_refused_with_figures():
    grid, needed = Grid.of(8192, 8192, 1501), memory.activation_bytes(MODELS["base"], Grid.of(8192, 8192, 1501))
    with pytest.raises(ValueError, match=r"resolution, duration: got 8192x8192 .* GiB in base, allowed: .* 40.0 GiB"):
        memory.check_fits(needed, 40 * 2**30, grid, "base", CPU)
    memory.check_fits(needed, needed, grid, "base", CPU)


def test_weights_are_those_of_the_full_model():
    assert memory.weight_bytes(MODELS["base"], torch.bfloat16) == 2 * 15_277_834_240 + 4 * 21_584_896


def test_free_memory_of_this_machine():
    assert 2**28 < memory.free_bytes(CPU) < 2**50


@pytest.mark.parametrize(("hidden", "heads", "tokens"), [(64, 4, 300), (64, 8, 700), (224, 1, 100), (448, 2, 640)])
def test_t5gemma(hidden, heads, tokens):
    """Many heads and a long text, or a wide MLP and a short one, in the proportions of the published encoder."""
    from transformers import T5GemmaConfig, T5GemmaEncoderModel, T5GemmaModuleConfig

    sizes = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": 2, "vocab_size": 32}
    half = T5GemmaModuleConfig(**sizes, num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), head_dim=32)
    config = T5GemmaConfig(encoder=half, decoder=half, vocab_size=32, is_encoder_decoder=False)
    model, words = T5GemmaEncoderModel(config).bfloat16().eval(), torch.ones(1, tokens, dtype=torch.int64)
    assert_bound(memory.t5gemma_bytes(half, tokens), lambda: model(input_ids=words, attention_mask=words))


@pytest.mark.parametrize("width", [16, 64])
def test_the_stand_in_for_a_text_encoder(width):
    encoder = HashedWordEncoder(width)
    stated = memory.hashed_word_bytes(width)
    assert stated.weights == sum(x.nbytes for x in vars(encoder).values() if isinstance(x, torch.Tensor))
    assert_bound(stated.activations, lambda: encoder("horse " * 700))


@pytest.mark.parametrize("size", [(64, 32), (128, 96)])
@pytest.mark.parametrize("width", [8, 32])
def test_wan_encodes(width, size):
    vae = wan_vae.halved(wan_vae.build("cpu", torch.bfloat16, encoder_width=width, decoder_width=8), "encoder")
    assert memory.module_bytes(vae) == memory.wan_weights("encoder", (width, 8), torch.bfloat16)
    pixels = torch.zeros(1, 3, 1, *size[::-1])
    assert_bound(memory.wan_encode_bytes(width, size, torch.bfloat16), lambda: wan_vae.encode(vae, pixels))


@pytest.mark.parametrize(("width", "grid"), [(8, Grid(2, 4, 2, 5)), (32, Grid(4, 2, 4, 13)), (64, Grid(2, 2, 2, 5))])
def test_wan_decodes(width, grid):
    vae = wan_vae.halved(wan_vae.build("cpu", torch.bfloat16, encoder_width=8, decoder_width=width), "decoder")
    generate(vae, "memory")
    assert memory.module_bytes(vae) == memory.wan_weights("decoder", (8, width), torch.bfloat16)
    latents = torch.zeros(grid.video_shape)
    assert_bound(memory.wan_decode_bytes(width, grid, torch.bfloat16), lambda: wan_vae.decode(vae, latents))


@pytest.mark.parametrize("frames", [3, 13])
@pytest.mark.parametrize(("widths", "dtype"), [((8, 16, 24, 32), torch.float32), ((16, 32, 64, 128), torch.bfloat16)])
def test_the_turbo_decoder(frames, widths, dtype):
    config, grid = TurboConfig(decoder_block_out_channels=widths), Grid(frames, 4, 6, 4 * frames - 3)
    decoder = TurboDecoder(config).to(dtype)
    generate(decoder, "memory")
    assert memory.module_bytes(decoder) == memory.turbo_weights(config, dtype)

    def decode():
        for _ in decoder.decode_chunks(torch.zeros(grid.video_shape, dtype=dtype)):
            pass

    assert_bound(memory.turbo_bytes(config, grid, dtype), decode, 1.3)


@pytest.mark.parametrize("latents", [2, 40, 101])
def test_the_audio_codec(latents, monkeypatch):
    """Sound of less than a window, and of more; a window is 725 latents in truth."""
    monkeypatch.setattr(audio_vae, "WINDOW", 50)
    monkeypatch.setattr(audio_vae, "HOP", 25)
    config = {"encoder_width": AUDIO_WIDTH, "decoder_width": AUDIO_WIDTH}
    codec = audio_vae.build("cpu", **config)
    generate(codec, "memory")
    norms = memory.module_bytes(codec)
    audio_vae.without_weight_norm(codec)
    stated, given = (memory.audio_bytes(config, latents, also) for also in (False, True))
    assert memory.module_bytes(codec) == stated.weights == given.weights < norms
    assert_bound(stated.activations, lambda: audio_vae.decode(codec, torch.zeros(1, latents, 64)))
    wave = torch.zeros(2, latents * audio_vae.STRIDE)
    encode = memory.audio_encode_bytes(AUDIO_WIDTH, latents)
    assert_bound(encode, lambda: audio_vae.encode(codec, wave, torch.zeros))
    assert given.activations == max(encode, stated.activations)


@pytest.mark.parametrize("gelu7", [(), (0, 1)])
@pytest.mark.parametrize("mm", [(), (0, 1)])
def test_the_eager_model(gelu7, mm):
    config = replace(FOAL, num_layers=2, mm_layers=mm, gelu7_layers=gelu7)
    model, grid = DiT(config), Grid.of(256, 128, 25)
    generate(model, "memory")
    inputs = (torch.zeros(grid.video, 192), torch.zeros(grid.audio, 64), torch.zeros(40, 64), coordinates(grid, 40))
    assert_bound(memory.activation_bytes(config, grid, 40), lambda: model(*inputs, grid.frames), 1.3)


class Nothing:
    """Stands where a model stands, and takes nothing but what it returns."""

    def __init__(self, config):
        self.width, self.rope = config.hidden_size, FourierRope(config.head_dim, torch.float32, "cpu")

    def condition(self, text, coords):
        return Condition(torch.zeros(len(text), self.width), self.rope(coords))

    def velocity(self, video, audio, condition, frames):
        return torch.zeros_like(video), torch.zeros_like(audio)


@pytest.mark.parametrize("grid", [Grid(7, 16, 28, 26), Grid(4, 32, 32, 16)])
@pytest.mark.parametrize(
    "stage",
    [
        Stage("base", 4, "distilled"),
        Stage("base", 4, "sde", BaseGuidance()),
        Stage("base", 4, "unipc", BaseGuidance()),
        Stage("super-resolution", 5, "unipc", None, "v1"),
    ],
)
def test_a_stage_beside_its_model(grid, stage):
    noise, watch = SeededNoise(1), Watch(CPU)
    texts = Texts(torch.zeros(640, 8), torch.zeros(640, 8) if stage.guidance else None)

    def run():
        denoise(Nothing(FOAL), prepare(grid, noise, CPU), texts, stage, noise, watch)

    assert_bound(memory.stage_bytes(FOAL, grid, stage.sampler, 2 if stage.guidance else 1), run)


def test_the_released_parts():
    """As published: Gemma 2 of 9 B without its decoder half; 0.7 B of Wan's VAE in halves; float32 sound."""
    sizes = ReleasedSizes(torch.bfloat16)
    text = sizes.text_memory()
    layer = 2 * 3584 * (4096 + 2048) + 3 * 3584 * 14336 + 4 * 3584  # q, k, v, output; MLP; norms
    assert text.weights == 2 * (256_000 * 3584 + 42 * layer + 3584) + 1024  # rotary frequencies in float32
    assert sizes.text_width() == 3584
    assert text.activations == pytest.approx(2_910_912_512, rel=0.05)  # counted on the meta device
    halves = [memory.wan_weights(half, (160, 256), torch.bfloat16) for half in ("encoder", "decoder")]
    assert sum(halves) == 1_409_377_336
    assert sizes.image_memory((1920, 1088)).activations == pytest.approx(2_070_962_016, rel=0.1)
    assert sizes.video_memory(Grid.of(1920, 1088, 126)).activations == pytest.approx(27_242_388_480, rel=0.05)
    assert sizes.audio_memory(126, False).activations == pytest.approx(594_576_384, rel=0.01)
