"""Parts of an engine that take turns: who lies where when; clips do not depend on it. On a GPU if there is one."""

import weakref
from collections import Counter
from dataclasses import replace

import pytest
import torch
from PIL import Image

from gpu import DEVICE
from horsepower import Engine, Request
from horsepower.runtime.executor import weights_of
from horsepower.runtime.foal import Foal
from horsepower.runtime.fused import FusedDiT, plan_velocity
from horsepower.runtime.models import wan_vae
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.presets import FOAL_MODELS, PIPELINES, Pipeline
from horsepower.runtime.residence import Residence
from horsepower.runtime.source import WanDecoder
from horsepower.runtime.turns import Part, Phase, state
from models import TINY, random_model

CPU = torch.device("cpu")
MODELS = ("distill", "540p_sr")


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    """Few layers, and few pixels in both stages."""
    for name, pipeline in {"256p": Pipeline(64, 32, None), "540p": Pipeline(64, 96, "540p_sr")}.items():
        monkeypatch.setitem(PIPELINES, name, pipeline)
    few = {"num_layers": 3, "mm_layers": (0, 2), "gelu7_layers": (0,), "local_attn_layers": ()}
    for name, config in FOAL_MODELS.items():
        monkeypatch.setitem(FOAL_MODELS, name, replace(config, **few))


@pytest.fixture
def loads(monkeypatch):
    """How often the weights of each model were made."""
    counted, weights = Counter(), Foal.weights

    def count(self, name):
        counted[name] += 1
        return weights(self, name)

    monkeypatch.setattr(Foal, "weights", count)
    return counted


@pytest.mark.parametrize(("mode", "room"), [("fused", 0), ("fused", 10**9), ("eager", 10**9)])
def test_a_clip_made_in_turns_is_the_clip(loads, monkeypatch, mode, room):
    """Parts wait on the host and come back without being made again; where it has no room, they are made again."""
    monkeypatch.setattr(Engine, "_host_room", lambda self: room)
    image = Image.new("RGB", (64, 64), "red")
    request = Request(prompt="A horse", resolution="540p", duration=0.2, num_inference_steps=1, image=image)
    wide = Engine.from_pretrained("foal", device=DEVICE, mode=mode)
    clip, least = wide.run(request), wide.memory(request).least
    assert not any(note.startswith("memory") for note in clip.notes)

    tight = Engine.from_pretrained("foal", device=DEVICE, mode=mode, device_memory=least)
    stated, seen = tight.memory(request), {}
    assert {"text encoder", "image encoder", "audio codec", *MODELS} <= set(stated.alternating)

    def watch(progress):
        parts = tight._parts
        seen[progress.stage] = (set(parts.there), parts.waiting, parts.bytes)

    loads.clear()
    first, second = tight.run(request, watch), tight.run(request)
    assert dict(loads) == ({"540p_sr": 1} if room else {"distill": 2, "540p_sr": 2})
    assert clip == first == second
    assert stated.notes[0] in first.notes
    assert ("distill arena" in seen["base"][0]) == (mode == "fused")
    assert list(seen) == [turn.phase for turn in stated.turns]
    for turn in stated.turns:
        there, waiting, held = seen[turn.phase]
        assert (there, waiting) == (set(turn.device), set(turn.host))
        arenas_stated = sum(size for name, size in turn.device.items() if name.endswith(" arena"))
        assert sum(turn.device.values()) - arenas_stated <= held <= sum(turn.device.values())
        assert turn.peak <= least


def tiny(name):
    meta, model = DiT(TINY, torch.float32, "meta"), random_model(TINY, torch.float32)
    return FusedDiT(meta, plan=plan_velocity(meta, CPU), weights=weights_of(model))


def storages(dit):
    return [x.untyped_storage() for x in dit.compiled._run._fixed.values() if isinstance(x, torch.Tensor)]


def test_what_gives_way_is_freed_at_once():
    """Nothing keeps a model that is to be read again, no cycle of references either."""
    parts, phases = {"a": Part(2), "b": Part(3)}, (Phase("one", ("a",)), Phase("two", ("b",)))
    one, two = state(parts, phases, 3, 0).turns
    residence = Residence(CPU, tiny)
    residence.follow(one, parts)
    assert (residence.there, residence.bytes) == (("a",), 2)
    weights = [weakref.ref(each) for each in storages(residence["a"])]
    assert all(each() is not None for each in weights)
    residence.follow(two, parts)
    assert all(each() is None for each in weights)
    assert (residence.there, residence.waiting, residence.bytes, residence.host_bytes) == (("b",), frozenset(), 3, 0)


def test_a_part_whose_move_fails_is_read_again():
    class Heavy:
        def to(self, device):
            raise torch.OutOfMemoryError("the host is full")

    made = []

    def load(name):
        made.append(name)
        return Heavy()

    parts, phases = {"a": Part(2), "b": Part(3)}, (Phase("one", ("a",)), Phase("two", ("b",)))
    one, two = state(parts, phases, 3, 99).turns
    residence = Residence(CPU, load)
    residence.follow(one, parts)
    with pytest.raises(torch.OutOfMemoryError):
        residence.follow(two, parts)
    assert (residence.there, residence.waiting) == ((), frozenset())
    residence.follow(one, parts)
    assert made == ["a", "a"]


def tensors_in(value, seen):
    """All that can be reached through attributes, modules and containers."""
    if id(value) in seen or isinstance(value, type):
        return
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        yield value
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    own = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, torch.Tensor) else ()
    for each in (*inside, *own):
        yield from tensors_in(each, seen)


def used(foal, name):
    """A part of the preset after its first use, which may have made what it keeps."""
    if name == "text":
        part = foal.text_encoder()
        part("a horse")
    elif name == "image":
        part = foal.image_encoder()
        part(torch.zeros(1, 3, 1, 32, 32))
    elif name == "video":
        part = foal.video_decoder()
        list(part(torch.zeros(1, 48, 2, 2, 2)))
    elif name == "wan":
        vae = wan_vae.build("cpu", encoder_width=8, decoder_width=8)
        part = WanDecoder(wan_vae.halved(vae, "decoder"))
        list(part(torch.zeros(1, 48, 2, 2, 2)))
    else:
        part = foal.audio_codec()
        part.decode(part.encode(torch.zeros(2, 4096), torch.zeros))
    return part


@pytest.mark.parametrize("name", ["text", "image", "video", "wan", "audio"])
def test_a_part_leaves_nothing_behind(name):
    part = used(Foal(CPU, torch.float32), name)
    before = list(tensors_in(part, {}))
    assert sum(x.nbytes for x in before) > 100_000
    assert not any(x.is_meta for x in before)
    part.to(torch.device("meta"))
    assert all(x.is_meta for x in tensors_in(part, {}))
