"""Memory is predicted before it is taken."""

import weakref
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from horsepower.runtime import memory
from horsepower.runtime.foal import generate
from horsepower.runtime.models import wan_vae
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder
from horsepower.runtime.presets import FOAL, MODELS
from horsepower.runtime.tokens import Grid, coordinates


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operators make and that still live."""

    def __init__(self, weights):
        super().__init__()
        self.live = self.peak = 0
        self.known = {weight.untyped_storage().data_ptr() for weight in weights}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor.untyped_storage())
        return result

    def note(self, storage):
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self.known:
            self.known.add(address)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.forget, address, size)

    def forget(self, address, size):
        self.known.discard(address)
        self.live -= size


def test_absurd_clips_are_refused_with_figures():
    grid, cpu = Grid.of(8192, 8192, 1501), torch.device("cpu")
    with pytest.raises(ValueError, match=r"resolution, duration: got 8192x8192 .* GiB, allowed: what fits .* GiB free"):
        memory.check_fits(memory.activation_bytes(MODELS["base"], grid), grid, cpu)
    memory.check_fits(memory.activation_bytes(FOAL, Grid.of(64, 64, 11)), grid, cpu)


def test_weights_are_those_of_the_full_model():
    assert memory.weight_bytes(MODELS["base"], torch.bfloat16) == 2 * 15_277_834_240 + 4 * 21_584_896


def test_the_prediction_covers_wan():
    """At the release's decoder width; the clip is short, so one frame's activations decide."""
    vae, grid = wan_vae.build("cpu", torch.bfloat16, encoder_width=8), Grid(2, 2, 2, 5)
    generate(vae, "memory")
    with torch.no_grad(), LiveBytes(vae.state_dict().values()) as count:
        wan_vae.decode(vae, torch.zeros(grid.video_shape))
    predicted = memory.wan_bytes(grid, torch.bfloat16)
    assert 0.5 * predicted < count.peak < 1.1 * predicted


@pytest.mark.parametrize("frames", [3, 13])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_prediction_is_what_the_turbo_decoder_takes(frames, dtype):
    config, grid = TurboConfig(decoder_block_out_channels=(8, 16, 24, 32)), Grid(frames, 4, 6, 4 * frames - 3)
    decoder = TurboDecoder(config).to(dtype)
    generate(decoder, "memory")
    with torch.no_grad(), LiveBytes(decoder.state_dict().values()) as count:
        for _ in decoder.decode_chunks(torch.zeros(grid.video_shape, dtype=dtype)):
            pass
    predicted = memory.turbo_bytes(config, grid, dtype)
    assert 0.85 * predicted < count.peak < 1.1 * predicted


def test_free_memory_of_this_machine():
    assert 2**28 < memory.free_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("gelu7", [(), (0, 1)])
@pytest.mark.parametrize("mm", [(), (0, 1)])
def test_the_prediction_is_what_eager_takes(gelu7, mm):
    config = replace(FOAL, num_layers=2, mm_layers=mm, gelu7_layers=gelu7)
    model, grid = DiT(config), Grid.of(256, 128, 25)
    generate(model, "memory")
    inputs = (torch.zeros(grid.video, 192), torch.zeros(grid.audio, 64), torch.zeros(40, 64), coordinates(grid, 40))
    with torch.no_grad(), LiveBytes(model.state_dict().values()) as count:
        model(*inputs, grid.frames)
    predicted = memory.activation_bytes(config, grid, 40)
    assert 0.8 * predicted < count.peak < 1.1 * predicted
