"""Uploaded pictures and short clips, decoded to frames of the model's size in a sandboxed process."""

import asyncio
import base64
import binascii
from pathlib import Path

from server import sandbox
from server.errors import ApiError
from server.uploads import decode_worker
from server.uploads.decode_worker import (
    KEPT_FRAMES,
    MAX_CLIP_PIXELS,
    MAX_FRAMES,
    MAX_JPEG_PIXELS,
    MAX_PIXELS,
    MAX_STILL_PIXELS,
    Refusal,
)

MAX_BYTES = 8 << 20
DECODE_SECONDS = 30.0
"""Wall-clock limit, for a busy machine; `decode_worker` limits processor time."""

WANTED = "a PNG, JPEG, WebP or GIF picture or an MP4 or WebM clip"
UNREADABLE = "invalid_image", "it is of another kind or damaged"
REFUSALS: dict[int, tuple[str, str]] = {
    Refusal.PIXELS: (
        "image_too_large",
        f"send at most {MAX_PIXELS} pixels a frame, {MAX_STILL_PIXELS} in a still picture, {MAX_JPEG_PIXELS} in a JPEG",
    ),
    Refusal.FRAMES: ("too_many_frames", f"send at most {MAX_FRAMES} frames"),
    Refusal.CLIP_PIXELS: ("image_too_large", f"send at most {MAX_CLIP_PIXELS} pixels in all frames together"),
    Refusal.NO_FRAME: ("invalid_image", "it holds no frame"),
    Refusal.CODEC: ("invalid_image", "the clip must be H.264, H.265, VP8, VP9, AV1 or MPEG-4"),
    Refusal.AMBIGUOUS: ("invalid_image", "its first bytes are those of two kinds at once"),
    Refusal.HEIF: ("invalid_image", "HEIC, HEIF and AVIF pictures are not read; save it as JPEG or PNG"),
}
"""Error code and message by the worker's exit status. Every other outcome is `UNREADABLE`."""


def invalid_image(code: str, what: str, status: int = 400) -> ApiError:
    """The error for an upload that cannot be used; `what` says why."""
    return ApiError(status, code, f"`image` must be {WANTED}; {what}.", param="image")


def from_data_url(url: str) -> bytes:
    """The bytes of `data:...;base64,...`. Raises `ApiError`."""
    head, comma, body = url.partition(",")
    if not comma or not head.startswith("data:") or not head.endswith(";base64"):
        raise invalid_image("invalid_image", "in JSON, send it as a data URL: data:image/png;base64,...")
    if len(body) > MAX_BYTES * 4 // 3 + 4:
        raise too_large(len(body) * 3 // 4)
    try:
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError):
        raise invalid_image("invalid_image", "the base64 of the data URL is damaged") from None


def too_large(size: int) -> ApiError:
    return invalid_image("image_too_large", f"send at most {MAX_BYTES} bytes, not {size}", 413)


async def frames(data: bytes, width: int, height: int, fps: int) -> bytes:
    """Decode an upload to RGB24 frames, concatenated, height x width x 3 bytes each (see `decode_worker.decode`).

    Raises:
        ApiError: names the field `image`, what is wrong with it and the limit.
    """
    if len(data) > MAX_BYTES:
        raise too_large(len(data))
    size = width * height * 3
    process = await sandbox.start(Path(decode_worker.__file__), *map(str, (width, height, fps)))
    try:
        async with asyncio.timeout(DECODE_SECONDS):
            rgb, _ = await asyncio.gather(read_output(process, KEPT_FRAMES * size), write_input(process, data))
            status = await process.wait()
    except TimeoutError:
        raise invalid_image(*UNREADABLE) from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if status != 0 or not rgb or len(rgb) % size:
        raise invalid_image(*REFUSALS.get(status, UNREADABLE))
    return rgb


async def write_input(process: asyncio.subprocess.Process, data: bytes) -> None:
    """Write the upload to the worker, which may have exited already."""
    assert process.stdin is not None
    try:
        process.stdin.write(data)
        await process.stdin.drain()
    except (BrokenPipeError, ConnectionResetError):
        pass
    process.stdin.close()


async def read_output(process: asyncio.subprocess.Process, limit: int) -> bytes:
    """The worker's whole output; empty, and the worker killed, if that exceeds `limit` bytes."""
    assert process.stdout is not None
    parts, size = [], 0
    while size <= limit and (part := await process.stdout.read(1 << 20)):
        parts.append(part)
        size += len(part)
    if size > limit:
        process.kill()
        return b""
    return b"".join(parts)
