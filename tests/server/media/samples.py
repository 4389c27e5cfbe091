"""Frames to encode."""

from PIL import Image

from server.media.frames import DISCONTINUITY, Frame


def frame(index: int = 0, width: int = 32, height: int = 16) -> Frame:
    """A gradient."""
    pixels = Image.linear_gradient("L").resize((width, height)).convert("RGB").tobytes()
    return Frame(index, 90000 * index, width, height, DISCONTINUITY, memoryview(pixels))
