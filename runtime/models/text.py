"""Text encoders: prompt in, one feature row a token out; at most MAX_TOKENS rows enter the diffusion transformer."""

from __future__ import annotations

import json
import re
import unicodedata
import zlib
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import T5GemmaConfig

MAX_TOKENS = 640
READ_TOKENS = 4096  # T5Gemma's attention window

# Ideographs, kana and hangul stand for themselves; other letters and digits make words; the rest is single signs.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3\uf900-\ufaff\U00020000-\U0003ffff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]")


@dataclass(frozen=True, eq=False)
class TextFeatures:
    """What the transformer sees of a prompt."""

    features: Tensor  # [n, width] float32, n = min(total_tokens, MAX_TOKENS)
    total_tokens: int  # of the whole prompt: larger than n if the prompt was cut


class TextEncoder(Protocol):
    """What the pipeline needs of a text encoder."""

    width: int

    def __call__(self, prompt: str) -> TextFeatures: ...

    def to(self, device: torch.device) -> TextEncoder: ...


_ALLOWED = "a T5Gemma checkpoint with config.json, its tokenizer and whole safetensors files"


def t5gemma_config(folder: str | Path | None = None) -> T5GemmaConfig:
    """The configuration of a checkpoint; without a folder, of t5gemma-9b-9b-ul2, whose halves are Gemma 2 of 9 B.

    Raises ValueError if the folder holds none.
    """
    from transformers import T5GemmaConfig, T5GemmaModuleConfig

    if folder is None:
        widths = {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "vocab_size": 256_000}
        half = T5GemmaModuleConfig(**widths, num_attention_heads=16, num_key_value_heads=8, head_dim=256)
        return T5GemmaConfig(encoder=half, decoder=half, vocab_size=256_000)
    try:
        values = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        if values.get("model_type") != "t5gemma":
            raise ValueError(f"model_type {values.get('model_type')!r} in config.json")
        return T5GemmaConfig.from_dict(values)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"folder: got {str(folder)!r} ({said}), allowed: {_ALLOWED}") from error


def t5gemma_on_meta(config: T5GemmaConfig) -> nn.Module:
    """The encoder half in bfloat16, without weights."""
    from transformers import T5GemmaEncoderModel

    config.is_encoder_decoder = False
    with torch.device("meta"):
        model: nn.Module = T5GemmaEncoderModel(config)
    for parameter in model.parameters():  # and no buffer: the rotary frequencies stay in float32
        parameter.data = parameter.data.bfloat16()
    return model


class T5GemmaEncoder:
    """The encoder half of T5Gemma in bfloat16, from a local folder; nothing is downloaded and no pickle is read.

    `folder` holds the published checkpoint (config, safetensors shards, tokenizer), whose decoder is not loaded.
    Raises ValueError if the folder holds none, or one without some of the encoder's weights.
    """

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu") -> None:
        from safetensors import SafetensorError
        from transformers import AutoTokenizer, T5GemmaEncoderModel

        # transformers would take a wrong path for a model on the hub, and make up a tokenizer where there is none.
        there = {file.name for file in Path(folder).glob("*")}
        if "config.json" not in there or not there & {"tokenizer.json", "tokenizer.model"}:
            raise ValueError(f"folder: got {str(folder)!r} without config.json or tokenizer, allowed: {_ALLOWED}")
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            model, report = T5GemmaEncoderModel.from_pretrained(
                folder,
                is_encoder_decoder=False,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.bfloat16,
                output_loading_info=True,
            )
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"folder: got {str(folder)!r} ({said}), allowed: {_ALLOWED}") from error
        # transformers fills missing weights with random numbers and only logs it.
        if missing := sorted(report["missing_keys"]):
            named = ", ".join(missing[:8])
            raise ValueError(
                f"folder: got {str(folder)!r} without {len(missing)} weights: {named}, allowed: {_ALLOWED}"
            )
        self.model = model.to(device).eval()
        for name, weight in self.model.named_parameters():
            if not all(torch.isfinite(bound) for bound in torch.aminmax(weight)):
                raise ValueError(f"folder: got {str(folder)!r} with NaN or infinite {name}, allowed: finite weights")
        self.width: int = model.get_input_embeddings().embedding_dim

    def to(self, device: torch.device) -> T5GemmaEncoder:
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, prompt: str) -> TextFeatures:
        """The last hidden state, rounded to float16 as the transformer saw it in training; no template, no padding.

        Rows depend on the whole text, but of a huge one only READ_TOKENS tokens are read: memory grows as their square.
        """
        tokens = self.tokenizer([prompt], return_tensors="pt").to(self.model.device)
        total = tokens["input_ids"].shape[1]
        read = {name: value[:, :READ_TOKENS] for name, value in tokens.items()}
        hidden: Tensor = self.model(**read).last_hidden_state[0]
        return TextFeatures(hidden.half()[:MAX_TOKENS].float(), total_tokens=total)


class HashedWordEncoder:
    """A deterministic stand-in for small models: hashed word embeddings through one seeded transformer layer.

    It understands nothing, but the same text always gives the same rows, and another word, order or neighbour gives
    others: order and context must be in the rows, as the diffusion transformer is not told where a text token stands.
    """

    ROWS = 4096

    def __init__(self, width: int, seed: int = 0, device: torch.device | str = "cpu") -> None:
        if width < 1:
            raise ValueError(f"width: got {width}, allowed: 1 and more")
        generator = torch.Generator().manual_seed(seed)

        def draw(rows: int, columns: int, variance: float) -> Tensor:
            return (torch.randn(rows, columns, generator=generator) * sqrt(variance)).to(device)

        self.width = width
        self.table = draw(self.ROWS, width, 1)
        self.position = _sinusoids(MAX_TOKENS, width).to(device)
        self.qkv = draw(width, 3 * width, 1 / width)
        self.proj = draw(width, width, 1 / width)
        self.up = draw(width, 4 * width, 1 / width)
        self.down = draw(4 * width, width, 1 / (4 * width))

    def to(self, device: torch.device) -> HashedWordEncoder:
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def __call__(self, prompt: str) -> TextFeatures:
        """Rows of root mean square 1: one for the beginning of the text, one for each word, sign or CJK character."""
        words = ["", *_WORD.findall(unicodedata.normalize("NFC", prompt))]
        # crc32, since Python's hash() changes from one process to the next.
        rows = [zlib.crc32(word.encode()) % self.ROWS for word in words[:MAX_TOKENS]]
        x = self.table[rows] + self.position[: len(rows)]
        q, k, v = (F.rms_norm(x, [self.width]) @ self.qkv)[None].chunk(3, dim=-1)
        x = x + F.scaled_dot_product_attention(q, k, v)[0] @ self.proj
        x = x + F.gelu(F.rms_norm(x, [self.width]) @ self.up) @ self.down
        return TextFeatures(F.rms_norm(x, [self.width]), total_tokens=len(words))


def _sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of the position, [length, width], as in "Attention Is All You Need"."""
    half = (width + 1) // 2
    rates = 10_000.0 ** (-torch.arange(half) / half)
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)[:, :width]
