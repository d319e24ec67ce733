"""The text encoders: a tiny T5Gemma checkpoint made here, and the hashed stand-in."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from horsepower.runtime.models.text import MAX_TOKENS, HashedWordEncoder, T5GemmaEncoder
from tiny_release import WORDS, write_t5gemma


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A whole random encoder-decoder in the published layout, and the model loaded from it."""
    from transformers import T5GemmaForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5gemma")
    write_t5gemma(folder)
    # Loaded anew, since bfloat16() also rounded the rotary frequencies, which are no weights.
    return folder, T5GemmaForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def t5gemma(reference: tuple[Path, Any]) -> T5GemmaEncoder:
    return T5GemmaEncoder(reference[0])


def hidden(model: Any, ids: list[int]) -> Tensor:
    with torch.no_grad():
        rows: Tensor = model.model.encoder(torch.tensor([ids])).last_hidden_state[0]
    return rows


def test_t5gemma_has_the_encoders_weights(reference: tuple[Path, Any], t5gemma: T5GemmaEncoder) -> None:
    loaded, saved = t5gemma.model.encoder.state_dict(), reference[1].model.encoder.state_dict()
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(value, saved[key]) for key, value in loaded.items())
    assert all(value.dtype == torch.bfloat16 for value in t5gemma.model.parameters())
    assert not any("decoder" in key for key in t5gemma.model.state_dict())


def test_t5gemma_features(reference: tuple[Path, Any], t5gemma: T5GemmaEncoder) -> None:
    result = t5gemma("the cat walks")
    expected = hidden(reference[1], [WORDS.index(word) for word in ("<bos>", "the", "cat", "walks")])
    assert t5gemma.width == 16
    assert result.total_tokens == 4
    assert result.features.dtype == torch.float32
    assert not result.features.requires_grad
    assert torch.equal(result.features, expected.half().float())


def test_t5gemma_is_cut_after_encoding(reference: tuple[Path, Any], t5gemma: T5GemmaEncoder) -> None:
    result = t5gemma("a cat " * 400)
    ids = [WORDS.index("<bos>"), *[WORDS.index("a"), WORDS.index("cat")] * 400]
    assert result.total_tokens == 801
    assert result.features.shape == (MAX_TOKENS, 16)
    assert torch.equal(result.features, hidden(reference[1], ids).half().float()[:MAX_TOKENS])
    assert not torch.equal(result.features, hidden(reference[1], ids[:MAX_TOKENS]).half().float())
    assert t5gemma("a " * (MAX_TOKENS - 1)).features.shape == (MAX_TOKENS, 16)


def test_t5gemma_empty_prompt(t5gemma: T5GemmaEncoder) -> None:
    assert t5gemma("").features.shape == (1, 16)


def test_t5gemma_missing_weights(reference: tuple[Path, Any], tmp_path: Path) -> None:
    for file in reference[0].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    state = load_file(tmp_path / "model.safetensors")
    del state["model.encoder.layers.1.mlp.up_proj.weight"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"^folder: .*without 1 weights: encoder\.layers\.1\.mlp\.up_proj"):
        T5GemmaEncoder(tmp_path)


def test_t5gemma_refuses_pickles(reference: tuple[Path, Any], tmp_path: Path) -> None:
    for file in reference[0].iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(reference[0] / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="no file named model.safetensors"):
        T5GemmaEncoder(tmp_path)


def test_t5gemma_takes_no_hub_name(tmp_path: Path) -> None:
    for folder in ("google/t5gemma-9b-9b-ul2", tmp_path, tmp_path / "nowhere"):
        with pytest.raises(ValueError, match=r"^folder: got .*config\.json"):
            T5GemmaEncoder(folder)


def test_hashed_shape_and_scale() -> None:
    for width in (1, 7, 64):
        result = HashedWordEncoder(width)("A red cat, singing.")
        assert result.features.shape == (7, width)
        assert result.features.dtype == torch.float32
        assert result.total_tokens == 7
        assert torch.allclose(result.features.square().mean(1).sqrt(), torch.ones(7), atol=1e-3)


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    [
        ("", 1),
        (" \n\t ", 1),
        ("one", 2),
        ("don't stop!", 6),
        ("你好\uff0c世界", 6),
        ("abc你好def", 5),
        ("한국 カナ", 5),
        ("cafe\u0301 café", 3),
        ("\U00020000\U0001f600", 3),
    ],
)
def test_hashed_words(prompt: str, tokens: int) -> None:
    assert HashedWordEncoder(8)(prompt).total_tokens == tokens


def test_hashed_cap() -> None:
    encoder = HashedWordEncoder(8)
    for words in (638, 639, 640, 5000):
        result = encoder("x " * words)
        assert result.total_tokens == words + 1
        assert result.features.shape == (min(words + 1, MAX_TOKENS), 8)


def test_hashed_rows_carry_order_and_context() -> None:
    encoder = HashedWordEncoder(64)
    straight, turned = encoder("dog bites man").features, encoder("man bites dog").features
    assert (straight[1] - turned[3]).norm() > 0.05 * straight[1].norm()
    before, after = encoder("the dog").features, encoder("the cat").features
    assert (before[1] - after[1]).norm() > 0.05 * before[1].norm()
    assert (before[2] - after[2]).norm() > 0.5 * before[2].norm()
    assert torch.equal(encoder("cafe\u0301").features, encoder("café").features)


def test_hashed_depends_on_nothing_but_seed_and_text() -> None:
    before = torch.get_rng_state()
    first = HashedWordEncoder(16, seed=3)("a cat").features
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, HashedWordEncoder(16, seed=3)("a cat").features)
    assert not torch.equal(first, HashedWordEncoder(16, seed=4)("a cat").features)
    module = "horsepower.runtime.models.text"
    code = f"from {module} import *; print(HashedWordEncoder(16, seed=3)('a cat').features.tolist())"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert torch.equal(first, torch.tensor(json.loads(printed)))


def test_hashed_bad_width() -> None:
    with pytest.raises(ValueError, match=r"^width: got 0"):
        HashedWordEncoder(0)
