"""A folder in the layout of the released checkpoints, with models of a few thousand parameters."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from horsepower.runtime.foal import generate
from horsepower.runtime.models import audio_vae, wan_vae
from horsepower.runtime.models.dit import DiT
from horsepower.runtime.models.dit_config import DiTConfig
from horsepower.runtime.models.turbo_vae import TurboConfig, TurboDecoder
from horsepower.runtime.presets import MODELS

TEXT_WIDTH = 16
WORDS = ["<pad>", "<eos>", "<bos>", "<unk>", "a", "cat", "walks", "on", "the", "red", "wall", "and", "sings"]
DIT = DiTConfig(
    num_layers=5, hidden_size=64, head_dim=16, num_query_groups=2, text_in_channels=TEXT_WIDTH,
    mm_layers=(0, 4), gelu7_layers=(0,),
)  # fmt: skip
TURBO = TurboConfig(decoder_block_out_channels=(4, 8, 8, 8))
STABLE_AUDIO = {
    "sample_rate": 44100,
    "model": {
        "pretransform": {
            "config": {
                "encoder": {
                    "type": "oobleck",
                    "config": {
                        "channels": 4, "in_channels": 2, "latent_dim": 128, "use_snake": True,
                        "c_mults": [1, 1, 1, 1, 1], "strides": [2, 4, 4, 8, 8],
                    },
                },
                "decoder": {
                    "type": "oobleck",
                    "config": {
                        "channels": 4, "out_channels": 2, "latent_dim": 64, "use_snake": True, "final_tanh": False,
                        "c_mults": [1, 1, 1, 1, 1], "strides": [2, 4, 4, 8, 8],
                    },
                },
                "bottleneck": {"type": "vae"},
                "downsampling_ratio": 2048,
            }
        }
    },
}  # fmt: skip


def write_dit(folder: Path, config: DiTConfig, shards: int = 2) -> None:
    """Everything in float32 and in shards, as the distilled model is published."""
    model = DiT(config, torch.float32)
    generate(model, folder.name)
    folder.mkdir(parents=True)
    state = model.state_dict()
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(state.items())[i::shards])
        save_file(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config.to_dict()))


def write_turbo(folder: Path) -> None:
    """As it is published: a pickle with averaged weights, and the training's leftovers."""
    decoder = TurboDecoder(TURBO)
    generate(decoder, "turbo")
    averaged = {f"module.{key}": value for key, value in decoder.state_dict().items()}
    averaged["module.aligned_head.weight"] = torch.zeros(2)
    folder.mkdir()
    torch.save({"ema_state_dict": averaged, "step": 340000}, folder / "checkpoint-340000.ckpt")
    config = {name: getattr(TURBO, name) for name in TURBO.__dataclass_fields__}
    (folder / "TurboV3-Wan22-TinyShallow_7_7.json").write_text(json.dumps(config | {"_class_name": "Turbo"}))


def write_wan(folder: Path) -> None:
    """The released pickle's keys; they are found by trying diffusers' names in reverse."""
    vae = wan_vae.build("cpu", encoder_width=8, decoder_width=8)
    generate(vae, "wan")
    folder.mkdir()
    torch.save(released_wan(vae.state_dict()), folder / "Wan2.2_VAE.pth")


def released_wan(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' keys turned back into the release's."""
    names = {}
    residual = ("residual.0.gamma", "residual.2.weight", "residual.2.bias", "residual.3.gamma")
    residual += ("residual.6.weight", "residual.6.bias", "shortcut.weight", "shortcut.bias")
    resample = ("resample.1.weight", "resample.1.bias", "time_conv.weight", "time_conv.bias")
    for half, way in (("encoder", "downsamples"), ("decoder", "upsamples")):
        for stage in range(4):
            for block in range(4):
                for leaf in (*residual, *resample):
                    key = f"{half}.{way}.{stage}.{way}.{block}.{leaf}"
                    names.setdefault(wan_vae.rename(key), key)
        for block in (0, 2):
            for leaf in residual:
                names[wan_vae.rename(f"{half}.middle.{block}.{leaf}")] = f"{half}.middle.{block}.{leaf}"
        for leaf in ("norm.gamma", "to_qkv.weight", "to_qkv.bias", "proj.weight", "proj.bias"):
            names[wan_vae.rename(f"{half}.middle.1.{leaf}")] = f"{half}.middle.1.{leaf}"
        for leaf in ("conv1.weight", "conv1.bias", "head.0.gamma", "head.2.weight", "head.2.bias"):
            names[wan_vae.rename(f"{half}.{leaf}")] = f"{half}.{leaf}"
    for leaf in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"):
        names[wan_vae.rename(leaf)] = leaf
    return {names[key]: value for key, value in state.items()}


def write_audio(folder: Path) -> None:
    """The whole published file: the autoencoder behind its prefix, and a diffusion model that nobody reads."""
    vae = audio_vae.build("cpu", **audio_vae.config_from_stable_audio(STABLE_AUDIO))
    generate(vae, "audio")
    state, names = vae.state_dict(), {}
    for half in ("encoder", "decoder"):
        for top in range(8):
            for leaf in ("weight_g", "weight_v", "bias", "alpha", "beta"):
                paths = (
                    [f"{half}.layers.{top}.{leaf}"]
                    if top in (0, 6, 7)
                    else [
                        f"{half}.layers.{top}.layers.{inner}{unit}.{leaf}"
                        for inner in range(5)
                        for unit in ("", *(f".layers.{n}" for n in range(4)))
                    ]
                )
                names |= {audio_vae.rename(path): path for path in paths if _renames(path)}
    tensors = {f"pretransform.model.{names[key]}": _flat(key, value) for key, value in state.items()}
    folder.mkdir()
    save_file(tensors | {"model.model.transformer.weight": torch.zeros(3)}, folder / "model.safetensors")
    (folder / "model_config.json").write_text(json.dumps(STABLE_AUDIO))


def _renames(path: str) -> bool:
    try:
        audio_vae.rename(path)
    except ValueError:
        return False
    return True


def _flat(key: str, value: Tensor) -> Tensor:
    return value.flatten().contiguous() if key.endswith(("alpha", "beta")) else value.contiguous()


def write_t5gemma(folder: Path) -> None:
    """A whole random encoder-decoder with a tokenizer, as transformers writes it."""
    import tokenizers
    from transformers import (
        PreTrainedTokenizerFast,
        T5GemmaConfig,
        T5GemmaForConditionalGeneration,
        T5GemmaModuleConfig,
    )

    sizes: dict[str, Any] = {"vocab_size": 32, "hidden_size": TEXT_WIDTH, "intermediate_size": 24, "head_dim": 4}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"query_pre_attn_scalar": 4, "sliding_window": 8}
    halves = {half: T5GemmaModuleConfig(**sizes) for half in ("encoder", "decoder")}
    model = T5GemmaForConditionalGeneration(T5GemmaConfig(**halves, vocab_size=32))
    generator = torch.Generator().manual_seed(0)
    for value in model.parameters():
        value.data.copy_(torch.randn(value.shape, generator=generator) * 0.3)
    model.bfloat16().save_pretrained(folder)
    vocabulary = tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(vocabulary)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", WORDS.index("<bos>"))]
    )
    special = {name: f"<{name[:3]}>" for name in ("pad_token", "eos_token", "bos_token", "unk_token")}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def write_release(folder: Path) -> None:
    """The whole folder, pickles not yet converted."""
    for name, config in MODELS.items():
        local = tuple(n for n in config.local_attn_layers if n < DIT.num_layers)
        write_dit(folder / name, replace(DIT, local_attn_layers=local))
    write_turbo(folder / "turbo_vae")
    write_wan(folder / "Wan2.2-TI2V-5B")
    write_audio(folder / "stable-audio-open-1.0")
    write_t5gemma(folder / "t5gemma-9b-9b-ul2")
