"""The structured prompt that the model was trained on."""

from horsepower.runtime.presets import SPEECH_LANGUAGES

# Words of the project's own; the released model's list differs, which matters only for equality with its outputs.
DEFAULT_NEGATIVE_PROMPT = (
    "low resolution, out of focus, compression blocks, flicker, jitter, washed-out or garish colours, overexposure, "
    "subtitles, captions, watermark, logo, frozen picture, cartoonish rendering, warped anatomy, extra or fused "
    "fingers, extra limbs, asymmetric eyes, drifting identity, sliding feet, cluttered background; muffled, clipped or "
    "distorted sound, hiss, hum, echo, robotic or monotone voice, slurred or wrong words, lips out of step with speech"
)


def structured_prompt(prompt: str, speech_text: str | None = None, speech_language: str | None = None) -> str:
    """The description, then a `Dialogue:` part with the spoken line, before `Background Sound:` if there is one.

    Chinese, Japanese and Korean lines are spaced out by character, as in training.
    """
    if speech_text is None or speech_language is None:
        return prompt
    line = " ".join(speech_text.split()).replace('"', "'")
    if speech_language in ("zh", "yue", "ja", "ko"):
        line = _spaced(line)
    dialogue = f'Dialogue:\n<Speaker, {SPEECH_LANGUAGES[speech_language]}>: "{line}"'
    description, background, sounds = prompt.partition("Background Sound:")
    return "\n\n".join(part for part in (description.strip(), dialogue, (background + sounds).strip()) if part)


def _spaced(line: str) -> str:
    spaced = "".join(f" {c} " if _is_cjk(c) else c for c in line)
    return " ".join(spaced.split())


def _is_cjk(character: str) -> bool:
    blocks = (
        (0x3040, 0x30FF),  # kana
        (0x3400, 0x4DBF),  # ideographs, extension A
        (0x4E00, 0x9FFF),  # ideographs
        (0xAC00, 0xD7AF),  # hangul syllables
        (0xF900, 0xFAFF),  # compatibility ideographs
        (0x20000, 0x323AF),  # further extensions
    )
    return any(low <= ord(character) <= high for low, high in blocks)
