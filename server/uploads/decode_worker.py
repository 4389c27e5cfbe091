"""The sandboxed process that decodes one uploaded picture or clip, started by `server.uploads.images`.

It reads the upload from standard input and writes RGB24 frames to standard output, or exits with the status of a
`Refusal`; no decoder's message ever leaves it. Before decoding, it checks the sizes and frame counts in the headers and
accepts only the listed formats and codecs; while decoding, it stops at the limits whatever the headers said. Beyond
that the kernel limits memory and processor time, and allows no new file descriptor, so the process can open no file and
no connection.

It is run by its path and imports nothing from this project.
"""

import importlib
import io
import os
import resource
import sys
from collections.abc import Iterator
from enum import IntEnum
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from PIL import Image, ImageOps

MAX_PIXELS = 1 << 24
"""Per frame."""
MAX_FRAMES = 300
"""Per clip, as stored."""
MAX_CLIP_PIXELS = 1 << 29
"""Over all frames of a clip: some seconds of work."""
KEPT_FRAMES = 33
"""How many of the last frames, at the model's frame rate, go to the engine: three chunks of the usual length."""
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "mpeg4"})
"""Allowed codecs of clips, by decoder name: what browsers and cameras produce. JPEG 2000 is not among them."""

LAZY_MODULES = (
    *("av.audio.stream", "av.subtitles.stream", "av.video.stream", "av.video.reformatter"),
    *("PIL.MpoImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin"),
)
"""Modules that PyAV and Pillow import on first use. `confine` imports them before it forbids opening files."""

CPU_SECONDS = 15
MEMORY_BYTES = 1536 << 20
"""Limit on address space. A clip of the largest frames with all its reference frames takes half of it."""


class Refusal(IntEnum):
    """Why an upload is refused, as the process's exit status."""

    DAMAGED = 80
    PIXELS = 81
    FRAMES = 82
    CLIP_PIXELS = 83
    NO_FRAME = 84
    CODEC = 85
    AMBIGUOUS = 86


class Refused(Exception):
    """The upload is refused; `args[0]` is a `Refusal`."""


def detect_format(data: bytes) -> str:
    """The format by the first bytes alone: Pillow's name for a picture, FFmpeg's for a container. Raises `Refused`."""
    signatures = {
        "PNG": data[:8] == b"\x89PNG\r\n\x1a\n",
        "JPEG": data[:3] == b"\xff\xd8\xff",
        "GIF": data[:6] in (b"GIF87a", b"GIF89a"),
        "WEBP": data[:4] == b"RIFF" and data[8:12] == b"WEBP",
        "mp4": data[4:8] == b"ftyp",
        "matroska": data[:4] == b"\x1aE\xdf\xa3",
    }
    kinds = [kind for kind, matches in signatures.items() if matches]
    if len(kinds) != 1:
        raise Refused(Refusal.AMBIGUOUS if kinds else Refusal.DAMAGED)
    return kinds[0]


def decode(data: bytes, width: int, height: int, fps: int) -> bytes:
    """RGB24 frames, concatenated, height x width x 3 bytes each: the last ones of a clip, or the one of a picture.

    Each frame is center-cropped to the model's proportions; transparent parts become black. Raises `Refused`, or
    whatever a decoder raises.
    """
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS
    kind = detect_format(data)
    pictures = clip_frames(data, kind, fps) if kind in ("mp4", "matroska") else picture_frames(data, kind, fps)
    kept: list[bytes] = []
    for picture, ticks in pictures:
        fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        kept = [*kept, *[fitted.tobytes()] * ticks][-KEPT_FRAMES:]
    if not kept:
        raise Refused(Refusal.NO_FRAME)
    return b"".join(kept)


def check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise Refused(Refusal.PIXELS)


def check_clip(count: int, pixels: int) -> None:
    if count > MAX_FRAMES:
        raise Refused(Refusal.FRAMES)
    if count * pixels > MAX_CLIP_PIXELS:
        raise Refused(Refusal.CLIP_PIXELS)


def picture_frames(data: bytes, kind: str, fps: int) -> Iterator[tuple[Image.Image, int]]:
    """The frames of a picture, still or animated, each with its duration in ticks of 1/`fps` s."""
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        check_size(*image.size)
        # Further pictures in a JPEG are thumbnails and depth maps, not frames.
        count = 1 if kind == "JPEG" else frame_count(image)
        check_clip(count, image.width * image.height)
        shown = Fraction(0)
        for index in range(count):
            image.seek(index)
            shown += Fraction(image.info.get("duration", 0) or 100, 1000) * fps if count > 1 else 1
            if ticks := min(int(shown), KEPT_FRAMES):
                yield flatten(ImageOps.exif_transpose(image)), ticks
            shown %= 1


def frame_count(image: Image.Image) -> int:
    """The number of frames, without decoding any."""
    count: int = getattr(image, "n_frames", 1)
    return count


def flatten(image: Image.Image) -> Image.Image:
    """The picture as RGB, on a black background."""
    rgba = image.convert("RGBA")
    black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, rgba).convert("RGB")


def clip_frames(data: bytes, format: str, fps: int) -> Iterator[tuple[Image.Image, int]]:
    """The frames of a clip, each with its duration in ticks of 1/`fps` s."""
    with av.open(io.BytesIO(data), format=format) as container:
        assert isinstance(container, InputContainer)
        if not container.streams.video:
            raise Refused(Refusal.NO_FRAME)
        video = container.streams.video[0]
        if video.codec_context.codec.name not in CODECS:
            raise Refused(Refusal.CODEC)
        check_size(video.codec_context.width, video.codec_context.height)
        check_clip(video.frames, video.codec_context.width * video.codec_context.height)  # 0 if the header has no count
        video.thread_count = 1
        ticks = 0
        last: VideoFrame | None = None
        for count, frame in enumerate(container.decode(video), start=1):
            check_size(frame.width, frame.height)
            check_clip(count, frame.width * frame.height)
            due = round(float(frame.time or 0.0) * fps)
            if last is not None and due > ticks:
                yield as_image(last), min(due - ticks, KEPT_FRAMES)
                ticks = due
            last = frame
        if last is not None:
            yield as_image(last), 1


def as_image(frame: VideoFrame) -> Image.Image:
    """The frame as RGB. `confine` forbids the threads that a scaler starts by default."""
    image: Image.Image = frame.to_image(threads=1)  # type: ignore[no-untyped-call]
    return image


def confine() -> None:
    """Give up, for good, every resource that decoding does not need."""
    Image.preinit()
    for module in LAZY_MODULES:
        importlib.import_module(module)
    os.nice(10)  # live streams go first
    limits: list[tuple[int, int]] = [
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ]
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))


def main(arguments: list[str]) -> int:
    width, height, fps = map(int, arguments)
    confine()
    data = sys.stdin.buffer.read()
    try:
        rgb: Any = decode(data, width, height, fps)
    except Refused as refused:
        return int(refused.args[0])
    except Image.DecompressionBombError:
        return Refusal.PIXELS
    except Exception:  # on damaged files, decoders raise nearly anything
        return Refusal.DAMAGED
    sys.stdout.buffer.write(rgb)
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # without running decoders' exit handlers
