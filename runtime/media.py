"""Pictures and sound in, one mp4 out (spec/pipeline.md §8, §11, §12).

Everything goes through Pillow and PyAV, both imported on first use. Bad input is a `ValueError` with the field's name.
"""

import math
import os
import secrets
import struct
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from horsepower.runtime.models.audio_vae import CODEC_RATE

if TYPE_CHECKING:
    from av.audio.frame import AudioFrame
    from av.container import InputContainer
    from av.filter import Graph
    from numpy.typing import NDArray
    from PIL.Image import Image

_MAX_PIXELS = 64_000_000
# Named, since for other files Pillow would start programs (Ghostscript for EPS).
_IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "PPM")
_IMAGE_ALLOWED = f"a PIL image or a {', '.join(_IMAGE_FORMATS)} file, of 1 to {_MAX_PIXELS:,} pixels"
_AUDIO_ALLOWED = "a sound file, or a video file with sound, that FFmpeg can decode"
_MIN_SOURCE_RATE = 1_000  # Hz; a lower one is a damaged header, and each sample would become hundreds

# Fixed, since the encoder's bytes depend on both and must not follow the machine's number and kind of cores.
_X264_THREADS = 8
_X264_OPTIONS = {"crf": "17", "x264-params": "cpu-independent=1"}
_SWS_FLAGS = 0x2 | 0x4000 | 0x40000  # bilinear, all chroma samples read, accurate rounding: half a code at most
_BT709 = 1  # for swscale and as all three tags; a tag alone would leave swscale at its default matrix, BT.601
_LIMITED = 1  # luma 16..235


def _bad(field: str, got: str, allowed: str) -> ValueError:
    return ValueError(f"{field}: got {got}, allowed: {allowed}")


def _path(field: str, source: object, allowed: str) -> Path:
    if not isinstance(source, str | os.PathLike):
        raise _bad(field, f"an object of type {type(source).__name__}", allowed)
    return Path(source)


def _input_file(field: str, source: object, allowed: str) -> Path:
    """`source` as the path of a regular file that is not empty, or `ValueError`."""
    path = _path(field, source, allowed)
    if not os.path.isfile(path) or os.path.getsize(path) == 0:
        wrong = "is empty" if os.path.isfile(path) else "is not an existing, regular file"
        raise _bad(field, f"{str(path)!r}, which {wrong}", allowed)
    return path


def open_image(source: "str | os.PathLike[str] | Image") -> "Image":
    """Decode a picture completely: an upright RGB image of 8 bits a channel, independent of `source`.

    source: a file, whose first frame is taken, or a PIL image, whose current frame is taken and which stays open.
    EXIF orientation is applied, colour profiles are not; transparency is laid over white; 16-bit grey is scaled.

    Raises `ValueError` naming `image`: missing, empty, truncated, not a picture, or of more than 64 megapixels
    (judged by the header, before anything is decoded).
    """
    from PIL import Image, ImageOps

    given = source if isinstance(source, Image.Image) else _input_file("image", source, _IMAGE_ALLOWED)
    name = "a PIL image" if isinstance(given, Image.Image) else repr(str(given))
    bomb = (Image.DecompressionBombError, Image.DecompressionBombWarning)  # the latter where warnings are errors
    try:
        opened: AbstractContextManager[Image.Image] = (
            nullcontext(given) if isinstance(given, Image.Image) else Image.open(given, formats=_IMAGE_FORMATS)
        )
        with opened as image:
            if 0 < image.width * image.height <= _MAX_PIXELS:
                return _to_rgb(ImageOps.exif_transpose(image))
            size = f"{image.width}x{image.height}"
    except (OSError, SyntaxError, ValueError, struct.error, *bomb) as error:
        raise _bad("image", f"{name}, which cannot be decoded ({error})", _IMAGE_ALLOWED) from error
    raise _bad("image", f"{name} of {size} pixels", _IMAGE_ALLOWED)


def _to_rgb(image: "Image") -> "Image":
    """8-bit RGB, transparency over white; `ValueError` where the mode does not tell which value is white."""
    import numpy as np
    from PIL import Image

    if image.mode == "F":
        raise ValueError("floating-point pixels have no defined range")
    if image.mode.startswith("I"):  # Pillow's own conversion clips 16-bit grey at 255
        values = np.asarray(image).astype(np.int32)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError("32-bit pixels outside of 0..65535")
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def image_pixels(image: "Image", width: int, height: int) -> Tensor:
    """Crop and scale an RGB image from `open_image`: float32 [1, 3, 1, height, width] in [-1, 1].

    The largest centred box of the target's aspect ratio (size truncated to integers, edges rounded to the nearest
    pixel, ties to even) is resized with Lanczos; spec/pipeline.md §8.

    Raises `ValueError` naming `image` when the picture is so narrow that the box is empty.
    """
    import numpy as np
    from PIL import Image

    box_width = min(image.width, image.height * width // height)
    box_height = min(image.height, image.width * height // width)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    x0, y0, x1, y1 = round(left), round(top), round(left + box_width), round(top + box_height)
    if x0 == x1 or y0 == y1:
        raise _bad("image", f"{image.width}x{image.height} pixels", f"a shape to crop to {width}x{height}")
    scaled = image.crop((x0, y0, x1, y1)).resize((width, height), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.array(scaled)).permute(2, 0, 1).contiguous()
    return (pixels.float() / 127.5 - 1)[None, :, None]


def read_audio(path: str | os.PathLike[str], seconds: float) -> Tensor:
    """Decode the first `seconds` of a sound: float32 [S], mono, 51,200 Hz, in [-1, 1], S <= seconds * 51,200.

    path: anything FFmpeg can decode; of a video, the sound. Where the sound is shorter, so is S. Channels are mixed
    with FFmpeg's weights, scaled so that the mix stays within full scale. Decoding stops when enough was read:
    later damage goes unseen, earlier damage is an error where the decoder reports it.

    Raises `ValueError` naming `audio`: missing, empty, damaged, without sound, without samples, or not finite.
    """
    import av
    import numpy as np

    file = _input_file("audio", path, _AUDIO_ALLOWED)
    name = repr(str(file))
    limit = int(seconds * CODEC_RATE)
    chunks: list[NDArray[Any]] = []
    count = 0
    try:
        # "file:" keeps FFmpeg from finding a protocol in the name; tags of old files need not be UTF-8.
        with av.open(f"file:{file}", "r", metadata_errors="ignore") as container:
            for chunk in _mono_chunks(container, name):
                chunks.append(chunk)
                if (count := count + len(chunk)) >= limit:
                    break
    except av.FFmpegError as error:
        raise _bad("audio", f"{name}, which cannot be decoded ({error.strerror})", _AUDIO_ALLOWED) from error
    wave = torch.from_numpy(np.concatenate(chunks)[:limit]) if chunks else torch.empty(0)
    if len(wave) == 0:
        raise _bad("audio", f"{name} with no samples", "at least one sample")
    if not wave.isfinite().all():
        raise _bad("audio", f"{name} with samples that are not finite", "finite samples")
    return wave.clamp_(-1, 1)


def _mono_chunks(container: "InputContainer", name: str) -> "Iterator[NDArray[Any]]":
    """The first sound stream as float32 [n] pieces at `CODEC_RATE`, the resampler's tail included."""
    import av

    if not container.streams.audio or not container.streams.audio[0].codec_context:
        raise _bad("audio", f"{name} without sound in a known coding", _AUDIO_ALLOWED)
    graph: Graph | None = None
    for frame in chain(container.decode(audio=0), (None,)):  # None flushes the resampler
        if graph is None:
            if frame is None:
                return
            graph = _mono_graph(frame, name)
        graph.push(frame)
        with suppress(av.BlockingIOError, av.EOFError):
            while True:
                yield graph.pull().to_ndarray()[0]


def _mono_graph(first: "AudioFrame", name: str) -> "Graph":
    """libswresample set up for frames like `first` (a stream's header may tell half of an AAC's true rate)."""
    from av.filter import Graph

    if first.sample_rate < _MIN_SOURCE_RATE:
        raise _bad("audio", f"{name} at {first.sample_rate} Hz", f"at least {_MIN_SOURCE_RATE} Hz")
    graph = Graph()
    rate, kind, layout = first.sample_rate, first.format.name, first.layout.name
    source = graph.add("abuffer", f"sample_rate={rate}:sample_fmt={kind}:channel_layout={layout}:time_base=1/{rate}")
    # rematrix_maxval: for floats libswresample would otherwise let two equal channels add up to 1.41.
    resample = graph.add("aresample", f"{CODEC_RATE}:out_sample_fmt=flt:out_chlayout=mono:rematrix_maxval=1")
    graph.link_nodes(source, resample, graph.add("abuffersink")).configure()
    return graph


def check_output(path: str | os.PathLike[str]) -> Path:
    """`path`, if `write_mp4` can write it; to be called before a long generation.

    Raises `ValueError` naming `output`: no .mp4, no writable folder, an impossible name, not a regular file.
    """
    allowed = "the path of an .mp4 file in an existing, writable folder"
    target = _path("output", path, allowed)
    wrong = ""
    if target.suffix.lower() != ".mp4":
        wrong = "does not end in .mp4"
    elif not os.path.isdir(target.parent):
        wrong = "has no existing folder"
    elif not os.access(target.parent, os.W_OK | os.X_OK):
        wrong = "has a folder that is not writable"
    elif "\0" in target.name or len(os.fsencode(target.name)) > 255:
        wrong = "is no possible name"
    elif target.exists() and not target.is_file():
        wrong = "is there and not a regular file"
    if wrong:
        raise _bad("output", f"{str(target)!r}, which {wrong}", allowed)
    return target


def write_mp4(path: str | os.PathLike[str], video: Tensor, audio: Tensor, fps: int, sample_rate: int) -> None:
    """Write one clip: H.264 (yuv420p, BT.709, crf 17) and stereo AAC at 192 kbit/s, index first.

    video: uint8 [F, H, W, 3] RGB, H and W even. Frame i is shown at i/fps seconds, the track lasts F/fps.
    audio: float32 [S, 2], clipped to [-1, 1]. Starts at 0, lasts S/sample_rate, however long the video is.

    The file appears complete or not at all: whatever fails or interrupts, what was at `path` stays. Equal input gives
    equal bytes with equal library versions.

    Raises `ValueError` naming the field: `output` where `check_output` does, and when writing or encoding fails.
    """
    import av

    target = check_output(path)
    _check_clip(video, audio, fps, sample_rate)
    temporary = target.with_name(f".{secrets.token_hex(8)}.mp4.tmp")  # the same file system, for an atomic replace
    try:
        temporary.write_bytes(bytes(4096))  # a full disk shows here: PyAV leaks a file whose header it cannot write
        _encode(temporary, video, audio, fps, sample_rate)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())  # else a power failure could take both the old clip and the new one
        temporary.replace(target)
    except (av.FFmpegError, OSError) as error:
        got = f"{str(target)!r}, which cannot be written ({error.strerror})"
        raise _bad("output", got, "a path with room for the clip") from error
    finally:
        temporary.unlink(missing_ok=True)


def _check_clip(video: Tensor, audio: Tensor, fps: int, sample_rate: int) -> None:
    import av

    fits = video.dtype == torch.uint8 and video.ndim == 4 and video.shape[3] == 3 and video.numel() > 0
    if not fits or video.shape[1] % 2 or video.shape[2] % 2:
        raise _bad("video", f"{video.dtype} {list(video.shape)}", "uint8 [frames, even height, even width, 3]")
    if audio.dtype != torch.float32 or audio.ndim != 2 or audio.shape[1] != 2 or audio.numel() == 0:
        raise _bad("audio", f"{audio.dtype} {list(audio.shape)}", "float32 [samples, 2]")
    if not audio.isfinite().all():
        raise _bad("audio", "samples that are not finite", "finite samples")
    if fps < 1:
        raise _bad("fps", repr(fps), "a positive integer")
    rates = sorted(av.Codec("aac", "w").audio_rates or [])
    if sample_rate not in rates:
        raise _bad("sample_rate", repr(sample_rate), f"one of AAC's: {', '.join(map(str, rates))}")


def _encode(file: Path, video: Tensor, audio: Tensor, fps: int, sample_rate: int) -> None:
    import av
    from av.video.reformatter import VideoReformatter

    (frames, height, width, _), samples = video.shape, len(audio)
    wave = audio.clamp(-1, 1).T.cpu()
    to_yuv = VideoReformatter()
    # At the default timescale of 1000 the edit list would cut up to a millisecond off the end of a track.
    options = {"movflags": "+faststart", "movie_timescale": str(math.lcm(fps, sample_rate))}
    with av.open(f"file:{file}", "w", format="mp4", options=options) as container:
        picture = container.add_stream("libx264", rate=fps, options=_X264_OPTIONS)
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        context = picture.codec_context
        context.time_base = Fraction(1, fps)
        context.color_primaries = context.color_trc = context.colorspace = _BT709
        context.color_range = _LIMITED
        context.thread_count = _X264_THREADS
        sound = container.add_stream("aac", rate=sample_rate, layout="stereo")
        sound.bit_rate = 192_000
        for i in range(frames):
            seen = av.VideoFrame.from_ndarray(video[i].contiguous().cpu().numpy(), format="rgb24")
            seen = to_yuv.reformat(
                seen, format="yuv420p", dst_colorspace=_BT709, dst_color_range=_LIMITED, interpolation=_SWS_FLAGS
            )
            seen.pts, seen.time_base = i, Fraction(1, fps)
            container.mux(picture.encode(seen))
            # A frame's sound goes in next to it, so that a player finds both in one place.
            start = sample_rate * i // fps
            stop = sample_rate * (i + 1) // fps if i + 1 < frames else samples
            if start < min(stop, samples):
                piece = wave[:, start:stop].contiguous().numpy()
                heard = av.AudioFrame.from_ndarray(piece, format="fltp", layout="stereo")
                heard.sample_rate, heard.pts, heard.time_base = sample_rate, start, Fraction(1, sample_rate)
                container.mux(sound.encode(heard))
        container.mux(picture.encode())
        container.mux(sound.encode())
