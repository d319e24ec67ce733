"""runtime/media.py: every input is made here, every output is read back with PyAV."""

import math
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import warnings
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from torch import Tensor

from horsepower.runtime import media

RATE = media.CODEC_RATE
MP4_RATE = 44_100


def noise_picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def sine(hertz: float, seconds: float, rate: int, amplitude: float = 0.5) -> np.ndarray[Any, np.dtype[np.float32]]:
    return (amplitude * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


def frequency(wave: Tensor, rate: int = RATE) -> float:
    bins = 1 << 18
    spectrum = torch.fft.rfft(wave * torch.hann_window(len(wave)), n=bins).abs()
    return int(spectrum.argmax()) * rate / bins


def riff(path: Path, channels: list[Any], rate: int, code: int = 3, chunk: bytes = b"") -> Path:
    """A WAV file by hand (code 3: float32, 1: int16), since some of what is tested here no encoder would write."""
    data = np.stack(channels, 1).astype("<f4" if code == 3 else "<i2").tobytes()
    size = 4 if code == 3 else 2
    head = struct.pack(
        "<HHIIHH", code, len(channels), rate, rate * size * len(channels), size * len(channels), 8 * size
    )
    body = b"WAVEfmt " + struct.pack("<I", len(head)) + head + chunk + b"data" + struct.pack("<I", len(data)) + data
    path.write_bytes(b"RIFF" + struct.pack("<I", len(body)) + body)
    return path


def encoded(path: Path, codec: str, wave: np.ndarray[Any, Any], rate: int, layout: str = "mono") -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        assert isinstance(stream, av.AudioStream)
        frame = av.AudioFrame.from_ndarray(np.atleast_2d(wave), format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def clip(frames: int = 6, height: int = 32, width: int = 48, seconds: float = 0.25) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    video = torch.randint(0, 256, (frames, height, width, 3), generator=generator, dtype=torch.uint8)
    audio = torch.from_numpy(np.stack([sine(440, seconds, MP4_RATE), sine(1000, seconds, MP4_RATE)], 1))
    return video, audio


# --- images ---------------------------------------------------------------------------------------------------------


def pixels(source: Any, width: int, height: int) -> Tensor:
    return media.image_pixels(media.open_image(source), width, height)


def test_an_image_becomes_one_frame_between_minus_one_and_one(tmp_path: Path) -> None:
    picture = noise_picture(64, 32)
    picture.save(tmp_path / "a.png")
    frame = pixels(tmp_path / "a.png", 64, 32)
    assert frame.shape == (1, 3, 1, 32, 64)
    assert frame.dtype == torch.float32
    assert frame.is_contiguous()
    expected = torch.from_numpy(np.array(picture)).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(frame[0, :, 0].double(), expected, rtol=0, atol=1e-7)
    assert (frame.min().item(), frame.max().item()) == (-1, 1)
    assert torch.equal(frame, pixels(str(tmp_path / "a.png"), 64, 32))
    assert torch.equal(frame, pixels(picture, 64, 32))


@pytest.mark.parametrize(
    ("size", "target", "box"),
    [
        ((100, 50), (32, 32), (25, 0, 75, 50)),
        ((50, 100), (64, 32), (0, 38, 50, 62)),  # 37.5 and 62.5: ties to even
        ((7, 4), (32, 32), (2, 0, 6, 4)),  # 1.5 and 5.5
        ((6, 3), (32, 32), (2, 0, 4, 3)),  # 1.5 and 4.5: one column less than the box was wide
        ((1000, 601), (96, 64), (50, 0, 950, 601)),  # 901.5 columns: truncated to 901; then 49.5 and 950.5
        ((448, 256), (448, 256), (0, 0, 448, 256)),
        ((1920, 1080), (448, 256), (15, 0, 1905, 1080)),
        ((31, 57), (448, 256), (0, 20, 31, 37)),
    ],
)
def test_the_centre_is_cropped_and_resized_with_lanczos(
    size: tuple[int, int], target: tuple[int, int], box: tuple[int, int, int, int]
) -> None:
    picture = noise_picture(*size)
    expected = np.array(picture.crop(box).resize(target, Image.Resampling.LANCZOS)).transpose(2, 0, 1)
    frame = pixels(picture, *target)
    assert torch.equal(frame[0, :, 0], torch.from_numpy(expected.copy()).float() / 127.5 - 1)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif"])
def test_exif_orientation_is_applied(tmp_path: Path, name: str) -> None:
    picture = Image.new("RGB", (64, 32), "red")
    picture.paste("blue", (0, 0, 32, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    picture.save(tmp_path / name, exif=exif)
    upright = media.open_image(tmp_path / name)
    assert upright.size == (32, 64)
    red, _, blue = upright.getpixel((16, 8))  # type: ignore[misc]
    assert blue > 200 > 50 > red  # what was left is up now


def test_damaged_exif_is_no_reason_to_refuse_a_picture(tmp_path: Path) -> None:
    noise_picture(16, 8).save(tmp_path / "a.jpg", exif=b"Exif\0\0junkjunkjunk")
    assert media.open_image(tmp_path / "a.jpg").size == (16, 8)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "LA", "RGBA", "I", "I;16"])
def test_every_mode_keeps_black_and_white(mode: str) -> None:
    grey = np.zeros((8, 16), np.uint8)
    grey[:, 8:] = 255
    picture = Image.fromarray(grey)
    if mode.startswith("I"):
        wide = grey.astype(np.uint16) * 257
        picture = Image.fromarray(wide if mode == "I;16" else wide.astype(np.int32))
    else:
        picture = picture.convert("RGB").convert(mode)
    if mode == "LA":
        assert picture.getpixel((0, 0)) == (0, 255)
    opened = media.open_image(picture)
    assert opened.mode == "RGB"
    assert opened.getpixel((1, 4)) == (0, 0, 0)
    assert opened.getpixel((14, 4)) == (255, 255, 255)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_grey_of_16_bits_keeps_its_range(tmp_path: Path, name: str) -> None:
    values = np.array([[0, 128, 129, 32_768, 65_406, 65_407, 65_535]], np.uint16)
    Image.fromarray(values).save(tmp_path / name)
    opened = np.array(media.open_image(tmp_path / name))
    assert opened[0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]


@pytest.mark.parametrize("value", [-1, 65_536])
def test_grey_of_unknown_range_is_refused(value: int) -> None:
    with pytest.raises(ValueError, match=r"^image: got a PIL image.*0\.\.65535.*, allowed: "):
        media.open_image(Image.new("I", (4, 4), value))
    with pytest.raises(ValueError, match=r"^image: got .*floating-point.*, allowed: "):
        media.open_image(Image.new("F", (4, 4), 0.5))


def transparent_pictures(folder: Path) -> Iterator[Path]:
    """A red left half; a right half whose hidden colour is black."""
    rgba = Image.new("RGBA", (16, 8), (0, 0, 0, 0))
    rgba.paste((255, 0, 0, 255), (0, 0, 8, 8))
    for name in ("a.png", "a.webp", "a.tif"):
        rgba.save(folder / name, lossless=True, exact=True)  # two options of WebP
        yield folder / name
    palette = Image.new("P", (16, 8), 1)
    palette.putpalette([255, 0, 0, 0, 0, 0])
    palette.paste(0, (0, 0, 8, 8))
    for name in ("p.png", "p.gif"):
        palette.save(folder / name, transparency=1)
        yield folder / name
    rgba.convert("RGB").save(folder / "key.png", transparency=(0, 0, 0))
    yield folder / "key.png"


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    for path in transparent_pictures(tmp_path):
        opened = media.open_image(path)
        assert opened.getpixel((2, 2)) == (255, 0, 0), path
        assert opened.getpixel((12, 2)) == (255, 255, 255), path
    half = media.open_image(Image.new("RGBA", (4, 4), (0, 0, 0, 128)))
    assert half.getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif"])
def test_of_an_animation_the_first_frame_is_used(tmp_path: Path, name: str) -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    red, _, blue = media.open_image(tmp_path / name).getpixel((4, 4))  # type: ignore[misc]
    assert red > 240 > 15 > blue


def test_a_given_pil_image_stays_as_it_was(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with Image.open(tmp_path / "a.gif") as animation:
        animation.seek(1)
        opened = media.open_image(animation)
        assert opened.getpixel((4, 4)) == (0, 0, 255)
        assert animation.tell() == 1
        animation.seek(0)
        assert animation.convert("RGB").getpixel((4, 4)) == (255, 0, 0)
    given = noise_picture(8, 8)
    before = given.tobytes()
    media.open_image(given).paste("red", (0, 0, 8, 8))
    assert given.tobytes() == before


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp", "a.tif", "a.ppm"])
def test_a_truncated_image_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise_picture(64, 48).save(path)
    data = path.read_bytes()
    media.open_image(path)
    for share in (0.1, 0.5, 0.95):
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=r"^image: got .*a\.\w+', which cannot be decoded .*, allowed: "):
            media.open_image(path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


def header_only_png(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [8001, 9500, 14_000, 60_000])
def test_a_decompression_bomb_is_refused_by_its_header(tmp_path: Path, side: int) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(header_only_png(side, side))
    limit, filters = Image.MAX_IMAGE_PIXELS, list(warnings.filters)
    # Had anything been decoded, the complaint would be about the missing pixels.
    with pytest.raises(
        ValueError, match=rf"^image: got .*({side}x{side}|{side * side}) pixels.*, allowed: .*64,000,000"
    ):
        media.open_image(path)
    if side == 8001:
        with Image.open(path) as lazy, pytest.raises(ValueError, match="got a PIL image of 8001x8001 pixels"):
            media.open_image(lazy)
    assert (limit, filters) == (Image.MAX_IMAGE_PIXELS, list(warnings.filters))


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_decompression_bomb_is_a_value_error_where_warnings_are_errors(tmp_path: Path) -> None:
    (tmp_path / "bomb.png").write_bytes(header_only_png(9500, 9500))
    with pytest.raises(ValueError, match=r"^image: got .*, allowed: "):
        media.open_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("source", [5, None, b"a.png", 1.5, ["a.png"]])
def test_an_image_of_another_type_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match=rf"^image: got an object of type {type(source).__name__}, allowed: "):
        media.open_image(source)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture at all\n" * 20)
    (tmp_path / "program.eps").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    )
    os.mkfifo(tmp_path / "pipe.png")
    for name, complaint in {
        "missing.png": "not an existing, regular file",
        "pipe.png": "not an existing, regular file",
        "nul\0.png": "not an existing, regular file",
        "": "not an existing, regular file",
        "empty.png": "is empty",
        "text.png": "cannot be decoded",
        "program.eps": "cannot identify",  # and not that Ghostscript could not be found
    }.items():
        with pytest.raises(ValueError, match=rf"^image: got .*{complaint}.*, allowed: .*PNG"):
            media.open_image(tmp_path / name)
    with pytest.raises(ValueError, match=r"^image: got a PIL image of 0x5 pixels, allowed: "):
        media.open_image(Image.new("RGB", (0, 5)))


@pytest.mark.parametrize(("size", "target"), [((1, 1000), (448, 256)), ((1000, 1), (256, 448)), ((4, 1), (32, 32))])
def test_an_image_too_narrow_to_crop_is_refused(size: tuple[int, int], target: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"^image: got {size[0]}x{size[1]} pixels, allowed: "):
        pixels(Image.new("RGB", size), *target)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.webp", "a.gif", "a.bmp"])
def test_a_damaged_image_is_a_value_error_or_a_picture(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    noise_picture(20, 16).save(path)
    data, dice, complaints = path.read_bytes(), random.Random(0), []
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(dice.choice((1, 2, 8))):
            damaged[dice.randrange(min(len(data), 200))] = dice.randrange(256)
        path.write_bytes(damaged)
        try:
            assert media.open_image(path).mode == "RGB"
        except ValueError as error:
            complaints.append(str(error))
    assert complaints
    assert all(complaint.startswith("image: got ") for complaint in complaints)


# --- sound ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000, 51_200, 96_000])
def test_a_tone_keeps_its_length_level_and_frequency(tmp_path: Path, rate: int) -> None:
    wave = media.read_audio(riff(tmp_path / "a.wav", [sine(440, 1, rate)], rate), 10)
    assert wave.dtype == torch.float32
    assert wave.shape == (RATE,)  # flushed: without its tail the resampler would swallow some milliseconds
    expected = torch.from_numpy(sine(440, 1, RATE))
    middle = slice(RATE // 10, -RATE // 10)
    torch.testing.assert_close(wave[middle], expected[middle], rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.wav", "pcm_s16le"),
        ("a.wav", "pcm_u8"),
        ("a.flac", "flac"),
        ("a.m4a", "aac"),
        ("a.mkv", "aac"),
        ("a.aac", "aac"),
    ],
)
def test_containers_and_codecs(tmp_path: Path, name: str, codec: str) -> None:
    tone = np.stack([sine(440, 1, 48_000)] * 2)
    wave = media.read_audio(encoded(tmp_path / name, codec, tone, 48_000, "stereo"), 10)
    assert abs(len(wave) - RATE) <= 3 * 1024 * RATE / 48_000  # AAC comes in blocks
    assert abs(frequency(wave) - 440) < 1
    assert abs(wave[RATE // 4 : RATE // 2].square().mean().sqrt().item() - 0.5 / math.sqrt(2)) < 0.01


def test_the_sound_of_a_video_is_read(tmp_path: Path) -> None:
    video, audio = clip()
    media.write_mp4(tmp_path / "a.mp4", video, audio, 25, MP4_RATE)
    assert len(media.read_audio(tmp_path / "a.mp4", 0.2)) == int(0.2 * RATE)


def test_channels_are_mixed_without_exceeding_full_scale(tmp_path: Path) -> None:
    loud, silent = sine(440, 0.5, RATE, 0.9), np.zeros(RATE // 2, np.float32)
    for channels, level in (([loud, loud], 0.9), ([loud, silent], 0.45), ([loud, -loud], 0.0), ([loud] * 6, 0.9)):
        wave = media.read_audio(riff(tmp_path / "a.wav", channels, RATE), 1)
        assert abs(wave.abs().max().item() - level) < 1e-3, len(channels)


def test_sound_beyond_full_scale_is_clipped(tmp_path: Path) -> None:
    wave = media.read_audio(riff(tmp_path / "a.wav", [sine(440, 0.1, RATE, 3)], RATE), 1)
    assert (wave.min().item(), wave.max().item()) == (-1, 1)


@pytest.mark.parametrize("seconds", [0.02, 0.5, 0.99999, 1])
def test_no_more_than_asked_for_is_returned(tmp_path: Path, seconds: float) -> None:
    path = riff(tmp_path / "a.wav", [sine(440, 2, 44_100)], 44_100)
    wave = media.read_audio(path, seconds)
    assert len(wave) == int(seconds * RATE)
    assert torch.equal(wave, media.read_audio(path, 2)[: len(wave)])


def test_decoding_stops_when_enough_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = riff(tmp_path / "long.wav", [np.zeros(60 * 8_000, np.float32)], 8_000)
    produced = []
    chunks = media._mono_chunks

    def counted(container: Any, name: str) -> Iterator[Any]:
        for chunk in chunks(container, name):
            produced.append(len(chunk))
            yield chunk

    monkeypatch.setattr(media, "_mono_chunks", counted)
    assert len(media.read_audio(path, 0.5)) == RATE // 2
    assert sum(produced) < 2 * RATE


def test_a_decoding_error_counts_only_before_enough_was_read(tmp_path: Path) -> None:
    path = encoded(tmp_path / "a.m4a", "aac", sine(440, 4, 44_100), 44_100)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat") + 4
    end = data.index(b"moov") - 4
    middle = (start + end) // 2
    data[middle : middle + 2000] = random.Random(0).randbytes(2000)
    path.write_bytes(data)
    assert len(media.read_audio(path, 1)) == RATE
    with pytest.raises(ValueError, match=r"^audio: got .*a\.m4a', which cannot be decoded \(.*\), allowed: "):
        media.read_audio(path, 4)
    path.write_bytes(data[: len(data) // 2])  # the index was at the end
    with pytest.raises(ValueError, match=r"^audio: got .*cannot be decoded"):
        media.read_audio(path, 1)


def test_names_and_tags_need_not_be_tame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    title = b"LIST" + struct.pack("<I", 16) + b"INFOINAM" + struct.pack("<I", 4) + b"\xe9\xe8\xff\0"  # Latin-1
    for name in ("a.wav", "http:b.wav", "c %41?#.wav", "d \udcff.wav"):
        assert len(media.read_audio(riff(Path(name), [sine(440, 0.1, RATE)], RATE, chunk=title), 1)) == RATE // 10


def test_what_is_no_sound_is_refused(tmp_path: Path) -> None:
    tone, bad = sine(440, 0.1, RATE), sine(440, 0.1, RATE)
    bad[1000] = np.nan
    riff(tmp_path / "nan.wav", [bad], RATE)
    bad[1000] = np.inf
    riff(tmp_path / "inf.wav", [tone, bad], RATE)
    riff(tmp_path / "none.wav", [tone[:0]], RATE)
    riff(tmp_path / "slow.wav", [tone], 1)
    riff(tmp_path / "unknown.wav", [tone], RATE, code=0x1234)
    (tmp_path / "empty.wav").touch()
    (tmp_path / "text.mp3").write_text("no sound at all\n" * 100)
    (tmp_path / "junk.wav").write_bytes(random.Random(0).randbytes(5000))
    noise_picture(16, 16).save(tmp_path / "picture.png")
    with av.open(str(tmp_path / "silent.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    for name, complaint in {
        "nan.wav": "samples that are not finite",
        "inf.wav": "samples that are not finite",
        "none.wav": "no samples",
        "slow.wav": "at 1 Hz",
        "unknown.wav": "without sound in a known coding",
        "empty.wav": "is empty",
        "text.mp3": "cannot be decoded",
        "junk.wav": "cannot be decoded",
        "picture.png": "without sound",
        "silent.mp4": "without sound",
        "missing.wav": "not an existing, regular file",
        "": "not an existing, regular file",
    }.items():
        with pytest.raises(ValueError, match=rf"^audio: got .*{complaint}.*, allowed: "):
            media.read_audio(tmp_path / name, 1)


@pytest.mark.parametrize("source", [5, None, b"a.wav"])
def test_a_sound_of_another_type_is_refused(source: Any) -> None:
    with pytest.raises(ValueError, match=rf"^audio: got an object of type {type(source).__name__}, allowed: "):
        media.read_audio(source, 1)


# --- mp4 ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fps", "frames"), [(25, 101), (24, 7), (30, 1)])
def test_frames_and_samples_come_back_in_number_and_time(tmp_path: Path, fps: int, frames: int) -> None:
    video, audio = clip(frames=frames, seconds=frames / fps + 0.01001)
    path = tmp_path / "a.mp4"
    media.write_mp4(path, video, audio, fps, MP4_RATE)
    with av.open(str(path)) as container:
        picture, sound = container.streams.video[0], container.streams.audio[0]
        assert picture.time_base is not None
        assert picture.duration is not None
        assert (picture.codec_context.name, picture.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert (picture.width, picture.height, picture.frames) == (48, 32, frames)
        assert picture.average_rate == fps
        assert picture.duration * picture.time_base == Fraction(frames, fps)
        assert (sound.codec_context.name, sound.rate, sound.layout.name) == ("aac", MP4_RATE, "stereo")
        assert (sound.time_base, sound.duration) == (Fraction(1, MP4_RATE), len(audio))
        assert (picture.start_time, sound.start_time) == (0, 0)
        assert "creation_time" not in {*container.metadata, *picture.metadata, *sound.metadata}
        times = [frame.pts * picture.time_base for frame in container.decode(video=0) if frame.pts is not None]
        assert times == [Fraction(i, fps) for i in range(frames)]
    with av.open(str(path)) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) >= len(audio)
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


def rgb_of_bt709(frame: av.VideoFrame) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean colour [3] in 0..255, from the planes themselves: limited range, BT.709 matrix."""
    height, width = frame.height, frame.width
    planes = frame.to_ndarray().astype(np.float64)
    luma = (planes[:height].mean() - 16) / 219
    blue, red = ((plane.mean() - 128) / 224 for plane in np.split(planes[height:].reshape(-1), [height * width // 4]))
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    return 255 * np.array([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b])


def test_colours_are_bt709_in_matrix_and_tags(tmp_path: Path) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (200, 120, 40)]
    video = torch.tensor(colours, dtype=torch.uint8)[:, None, None].expand(-1, 64, 64, 3)
    media.write_mp4(tmp_path / "a.mp4", video, torch.zeros(100, 2), 25, MP4_RATE)
    with av.open(str(tmp_path / "a.mp4")) as container:
        context = container.streams.video[0].codec_context
        assert (context.color_primaries, context.color_trc, context.colorspace, context.color_range) == (1, 1, 1, 1)
        decoded = list(container.decode(video=0))
    for frame, colour in zip(decoded, colours, strict=True):
        assert np.abs(rgb_of_bt709(frame) - colour).max() < 3, colour


def test_a_picture_survives(tmp_path: Path) -> None:
    ramp = torch.linspace(0, 255, 96)
    still = torch.stack([ramp.expand(64, 96), ramp.flip(0).expand(64, 96), torch.full((64, 96), 90.0)], -1)
    video = still.to(torch.uint8).expand(5, -1, -1, -1)
    media.write_mp4(tmp_path / "a.mp4", video, torch.zeros(100, 2), 25, MP4_RATE)
    luma = 16 + 219 / 255 * (video[0].numpy() @ np.array([0.2126, 0.7152, 0.0722]))
    with av.open(str(tmp_path / "a.mp4")) as container:
        for frame in container.decode(video=0):  # the plane itself: older PyAV reads every file as BT.601
            assert np.abs(frame.to_ndarray()[:64] - luma).mean() < 2


def test_sound_comes_back_at_its_time_level_and_frequency(tmp_path: Path) -> None:
    video, _ = clip(frames=50)
    sweep = np.sin(2 * np.pi * (300 + 500 * np.arange(2 * MP4_RATE) / MP4_RATE) * np.arange(2 * MP4_RATE) / MP4_RATE)
    audio = torch.from_numpy(np.stack([sine(440, 2, MP4_RATE), 0.5 * sweep.astype(np.float32)], 1))
    media.write_mp4(tmp_path / "a.mp4", video, audio, 25, MP4_RATE)
    with av.open(str(tmp_path / "a.mp4")) as container:
        heard = torch.from_numpy(np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], 1))
    assert abs(frequency(heard[0], MP4_RATE) - 440) < 0.5
    part = slice(MP4_RATE // 2, MP4_RATE)
    for channel in (0, 1):
        ratio = heard[channel, part].square().mean() / audio[part, channel].square().mean()
        assert abs(ratio.item() - 1) < 0.05
    match = [(heard[1, part] * audio[part.start + lag : part.stop + lag, 1]).sum().item() for lag in range(-40, 41)]
    assert match.index(max(match)) == 40  # no encoder delay left


def test_sound_beyond_full_scale_is_written_clipped(tmp_path: Path) -> None:
    video, audio = clip()
    media.write_mp4(tmp_path / "a.mp4", video, audio * 4, 25, MP4_RATE)
    media.write_mp4(tmp_path / "b.mp4", video, (audio * 4).clamp(-1, 1), 25, MP4_RATE)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()


@pytest.mark.parametrize("samples", [1, 1000, 3 * MP4_RATE])
def test_sound_may_be_shorter_or_longer_than_the_picture(tmp_path: Path, samples: int) -> None:
    media.write_mp4(tmp_path / "a.mp4", clip()[0], torch.zeros(samples, 2), 25, MP4_RATE)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.audio[0].duration == samples
        assert container.streams.video[0].frames == 6


def test_equal_input_gives_equal_bytes_also_from_several_threads(tmp_path: Path) -> None:
    video, audio = clip(frames=30, height=64, width=96)
    strided = video.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0), audio.T.contiguous().T
    assert not strided[0].is_contiguous()
    names = [tmp_path / f"{i % 5}.mp4" for i in range(10)]

    def write(i: int) -> None:
        media.write_mp4(names[i], *(strided if i % 2 else (video, audio)), 25, MP4_RATE)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(10)))
    assert len({path.read_bytes() for path in names}) == 1
    assert len(list(tmp_path.iterdir())) == 5


def test_relative_names_and_the_mode_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("http:").mkdir()
    mask = os.umask(0)
    os.umask(mask)
    for name in ("clip.MP4", "http:/clip.mp4"):
        media.write_mp4(name, *clip(), 25, MP4_RATE)
        assert Path(name).stat().st_mode & 0o777 == 0o666 & ~mask
    assert {path.name for path in tmp_path.iterdir()} == {"clip.MP4", "http:"}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"video": torch.zeros(2, 33, 32, 3, dtype=torch.uint8)}, "video"),
        ({"video": torch.zeros(2, 32, 33, 3, dtype=torch.uint8)}, "video"),
        ({"video": torch.zeros(0, 32, 32, 3, dtype=torch.uint8)}, "video"),
        ({"video": torch.zeros(2, 32, 32, 4, dtype=torch.uint8)}, "video"),
        ({"video": torch.zeros(32, 32, 3, dtype=torch.uint8)}, "video"),
        ({"video": torch.zeros(2, 32, 32, 3)}, "video"),
        ({"audio": torch.zeros(100)}, "audio"),
        ({"audio": torch.zeros(2, 100)}, "audio"),
        ({"audio": torch.zeros(0, 2)}, "audio"),
        ({"audio": torch.zeros(100, 2, dtype=torch.float64)}, "audio"),
        ({"audio": torch.full((100, 2), math.nan)}, "audio"),
        ({"audio": torch.full((100, 2), math.inf)}, "audio"),
        ({"fps": 0}, "fps"),
        ({"sample_rate": 51_200}, "sample_rate"),
    ],
)
def test_a_clip_that_cannot_be_written_is_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    video, audio = clip()
    arguments = {"video": video, "audio": audio, "fps": 25, "sample_rate": MP4_RATE, **change}
    with pytest.raises(ValueError, match=rf"^{field}: got .*, allowed: "):
        media.write_mp4(tmp_path / "a.mp4", **arguments)
    assert list(tmp_path.iterdir()) == []


# --- failing to write -----------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Iterator[Path]:
    """The path of an older clip, which must be there alone and unchanged after the test."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(b"an older clip")
    yield path
    assert path.read_bytes() == b"an older clip"
    assert list(tmp_path.iterdir()) == [path]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process can grow beyond `size` bytes: writes fail half-way, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, kept: Path) -> None:
    video, audio = clip(frames=20, height=64, width=96)
    probe = tmp_path / "probe.mp4"
    media.write_mp4(probe, video, audio, 25, MP4_RATE)
    size = probe.stat().st_size
    probe.unlink()
    assert size > 50_000
    opened = len(os.listdir("/proc/self/fd"))
    # Nothing at all, the header, the frames, and at the very end the index being moved to the front.
    for limit in (0, 30, 4096, size // 2, size - 4000, size - 100, size - 1):
        with largest_file(limit), pytest.raises(ValueError, match="^output: got .*cannot be written"):
            media.write_mp4(kept, video, audio, 25, MP4_RATE)
        assert list(tmp_path.iterdir()) == [kept], limit
    assert len(os.listdir("/proc/self/fd")) == opened
    with largest_file(size):
        media.write_mp4(probe, video, audio, 25, MP4_RATE)
    probe.unlink()


def test_an_interrupt_leaves_what_was_there(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from av.video import reformatter

    real = reformatter.VideoReformatter

    class Interrupted:
        def __init__(self) -> None:
            self.real, self.calls = real(), 0

        def reformat(self, *arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == 4:
                signal.raise_signal(signal.SIGINT)
            return self.real.reformat(*arguments, **options)

    monkeypatch.setattr(reformatter, "VideoReformatter", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        media.write_mp4(kept, *clip(), 25, MP4_RATE)


def test_an_encoder_error_leaves_what_was_there(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media, "_X264_OPTIONS", {"preset": "no such preset"})
    with pytest.raises(ValueError, match="^output: got .*cannot be written"):
        media.write_mp4(kept, *clip(), 25, MP4_RATE)


def test_a_failing_replace_leaves_what_was_there(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(ValueError, match="^output: got .*Permission denied"):
        media.write_mp4(kept, *clip(), 25, MP4_RATE)


def test_a_folder_in_which_no_file_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: True)  # as where permission is lost during the generation
    with pytest.raises(ValueError, match="^output: got .*cannot be written"):
        media.write_mp4("/proc/self/clip.mp4", *clip(), 25, MP4_RATE)


def test_an_output_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    (tmp_path / "file").touch()
    for name, complaint in {
        "clip.avi": "does not end in .mp4",
        "clip": "does not end in .mp4",
        ".mp4": "does not end in .mp4",
        "": "does not end in .mp4",
        "missing/clip.mp4": "has no existing folder",
        "file/clip.mp4": "has no existing folder",
        "nul\0.mp4": "is no possible name",
        "n" * 252 + ".mp4": "is no possible name",
        "folder.mp4": "is there and not a regular file",
        "pipe.mp4": "is there and not a regular file",
    }.items():
        for check in (media.check_output, lambda path: media.write_mp4(path, *clip(), 25, MP4_RATE)):
            with pytest.raises(ValueError, match=rf"^output: got .*{complaint}, allowed: .*\.mp4 file"):
                check(tmp_path / name)
    for other in (5, None, b"clip.mp4"):
        with pytest.raises(ValueError, match=rf"^output: got an object of type {type(other).__name__}, allowed: "):
            media.check_output(other)  # type: ignore[arg-type]


def test_an_unwritable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tmp_path.chmod(0o500)
    if os.access(tmp_path, os.W_OK):  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(ValueError, match=r"^output: got .*, which has a folder that is not writable, allowed: "):
        media.check_output(tmp_path / "clip.mp4")


def test_a_good_output_is_returned_as_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old.mp4").touch()
    for path in (tmp_path / "new.mp4", str(tmp_path / "old.mp4"), "new.MP4", "n" * 251 + ".mp4"):
        assert media.check_output(path) == Path(path)
    assert [path.name for path in tmp_path.iterdir()] == ["old.mp4"]


def test_the_import_is_cheap() -> None:
    code = "import sys, horsepower.runtime.media; print([m for m in ('av', 'PIL') if m in sys.modules])"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    answer = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
