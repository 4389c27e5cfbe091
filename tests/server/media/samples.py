"""Frames to encode, and what the fake engine draws."""

from typing import Any

from PIL import Image

from server.backends.fake import FakeBackend
from server.media.frames import DISCONTINUITY, Frame


def frame(index: int = 0, width: int = 32, height: int = 16) -> Frame:
    """A gradient."""
    pixels = Image.linear_gradient("L").resize((width, height)).convert("RGB").tobytes()
    return Frame(index, 90000 * index, width, height, DISCONTINUITY, memoryview(pixels))


def original(backend: FakeBackend, stream: dict[str, Any], index: int) -> Image.Image:
    rgb = backend._picture(backend._streams[stream["id"]], index)
    return Image.frombytes("RGB", (backend.width, backend.height), rgb)
