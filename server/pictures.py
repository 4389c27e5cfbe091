"""Uploaded pictures and short clips, made into frames of the model's size. Untrusted bytes: every limit comes first.

Bytes, pixels and frames are bounded by what a header says before anything is decoded, only the listed formats are
tried, and decoding stops at the limits whatever the header said.
"""

import base64
import binascii
import io
from collections.abc import Iterator
from fractions import Fraction

import av
from av.container import InputContainer
from av.video.frame import VideoFrame
from PIL import Image, ImageOps

from server.errors import ApiError

MAX_BYTES = 8 << 20
MAX_PIXELS = 1 << 24
"""Of one frame."""
MAX_FRAMES = 300
"""Of a clip, as it is stored."""
MAX_CLIP_PIXELS = 1 << 29
"""Of all frames of a clip together: some seconds of work."""
KEPT_FRAMES = 33
"""The newest frames at the model's rate that are handed to the engine: three chunks of the usual length."""
PICTURES = ("PNG", "JPEG", "WEBP", "GIF")
CLIPS = {b"ftyp": "mp4", b"\x1aE\xdf\xa3": "matroska"}
"""What bytes 4 to 8, or 0 to 4, of a file say about its container."""

WANTED = "a PNG, JPEG, WebP or GIF picture or an MP4 or WebM clip"


def refuse(code: str, what: str, status: int = 400) -> ApiError:
    return ApiError(status, code, f"`image` must be {WANTED}; {what}.", param="image")


def from_data_url(url: str) -> bytes:
    """The bytes of `data:...;base64,...`."""
    head, comma, body = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise refuse("invalid_image", "in JSON, send it as a data URL: data:image/png;base64,...")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise too_large(len(body) * 3 // 4)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise refuse("invalid_image", "the base64 of the data URL is damaged") from None


def too_large(size: int) -> ApiError:
    return refuse("image_too_large", f"send at most {MAX_BYTES} bytes, not {size}", 413)


def check_size(width: int, height: int) -> None:
    if width < 1 or height < 1 or width * height > MAX_PIXELS:
        raise refuse("image_too_large", f"send at most {MAX_PIXELS} pixels a frame, not {width}x{height}")


def frames(data: bytes, width: int, height: int, fps: int) -> bytes:
    """RGB24 frames of width x height, one after the other: the newest of the clip, or the one picture.

    Each is cut to the model's proportions about its middle; what is transparent becomes black.

    Raises:
        ApiError: names the field `image`, what is wrong and the limit.
    """
    if len(data) > MAX_BYTES:
        raise too_large(len(data))
    container = CLIPS.get(data[4:8]) or CLIPS.get(data[:4])
    try:
        pictures = clip_frames(data, container, fps) if container else picture_frames(data, fps)
        kept: list[bytes] = []
        for picture, ticks in pictures:
            fitted = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
            kept = [*kept, *[fitted.tobytes()] * ticks][-KEPT_FRAMES:]
    except ApiError:
        raise
    except Image.DecompressionBombError:
        raise refuse("image_too_large", f"send at most {MAX_PIXELS} pixels a frame") from None
    except Exception:  # decoders of damaged files raise nearly anything
        raise refuse("invalid_image", "it is of another kind or damaged") from None
    if not kept:
        raise refuse("invalid_image", "it holds no frame")
    return b"".join(kept)


def check_clip(count: int, pixels: int) -> None:
    if count > MAX_FRAMES:
        raise refuse("too_many_frames", f"send at most {MAX_FRAMES} frames, not {count}")
    if count * pixels > MAX_CLIP_PIXELS:
        raise refuse("image_too_large", f"send at most {MAX_CLIP_PIXELS} pixels in all frames together")


def picture_frames(data: bytes, fps: int) -> Iterator[tuple[Image.Image, int]]:
    """The one frame of a picture, or those of an animated one, each with the ticks of `fps` that it is shown for."""
    with Image.open(io.BytesIO(data), formats=PICTURES) as image:
        check_size(*image.size)
        count = getattr(image, "n_frames", 1)
        check_clip(count, image.width * image.height)
        shown = Fraction(0)
        for index in range(count):
            image.seek(index)
            shown += Fraction(image.info.get("duration", 0) or 100, 1000) * fps if count > 1 else 1
            if ticks := min(int(shown), KEPT_FRAMES):
                yield flatten(ImageOps.exif_transpose(image)), ticks
            shown %= 1


def flatten(image: Image.Image) -> Image.Image:
    """RGB of any picture, on black."""
    rgba = image.convert("RGBA")
    black = Image.new("RGBA", rgba.size, (0, 0, 0, 255))
    return Image.alpha_composite(black, rgba).convert("RGB")


def clip_frames(data: bytes, format: str, fps: int) -> Iterator[tuple[Image.Image, int]]:
    """The frames of a clip, each with the ticks of `fps` that it is on screen for."""
    with av.open(io.BytesIO(data), format=format) as container:
        assert isinstance(container, InputContainer)
        if not container.streams.video:
            raise refuse("invalid_image", "the clip has no video")
        video = container.streams.video[0]
        check_size(video.codec_context.width, video.codec_context.height)
        check_clip(video.frames, video.codec_context.width * video.codec_context.height)  # 0 where nothing says
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
    """The frame as RGB."""
    image: Image.Image = frame.to_image()  # type: ignore[no-untyped-call]
    return image
