"""Frames: the header is the one that the server writes; pixels as bytes, NumPy and Pillow."""

import sys
from pathlib import Path

import numpy
import pytest
from livereel import LivereelError
from livereel.frames import parse_frame
from PIL import Image

from server.media import frames as served

RED = bytes([200, 30, 40]) * (6 * 4)


def packet(format: served.PictureFormat, flags: int = 0) -> bytes:
    """As the server encodes it: 6 pixels wide, 4 high."""
    frame = served.Frame(index=3, pts=16_875, width=6, height=4, flags=flags, rgb=memoryview(RED))
    return served.encode_picture(frame, format)


@pytest.mark.parametrize("format", ["mjpeg", "rgb24"])
def test_pictures(format: served.PictureFormat, tmp_path: Path) -> None:
    frame = parse_frame(packet(format))
    assert (frame.format, frame.width, frame.height, frame.pts, frame.seconds) == (format, 6, 4, 16_875, 0.1875)
    assert frame.key and not frame.init and not frame.discontinuity
    pixels = frame.numpy()
    assert pixels.shape == (4, 6, 3) and pixels.dtype == numpy.uint8
    assert numpy.abs(pixels.astype(int) - [200, 30, 40]).max() <= (6 if format == "mjpeg" else 0)
    assert frame.image().mode == "RGB" and frame.image().size == (6, 4)
    for name in ("frame.jpg", "frame.png"):
        frame.save(tmp_path / name)
        with Image.open(tmp_path / name) as picture:
            assert picture.size == (6, 4)
    if format == "mjpeg":
        assert (tmp_path / "frame.jpg").read_bytes() == frame.data


def test_flags() -> None:
    assert parse_frame(packet("rgb24", served.DISCONTINUITY)).discontinuity
    shown = served.Frame(0, 0, 6, 4, 0, memoryview(RED))
    init = parse_frame(served.fmp4_message(shown, 0, b"ftyp", init=True))
    assert (init.format, init.init, init.key, init.data) == ("fmp4", True, False, b"ftyp")
    assert parse_frame(served.fmp4_message(shown, 0, b"moof", key=True)).key
    for method in (init.numpy, init.image):
        with pytest.raises(LivereelError, match="mjpeg or rgb24"):
            method()


@pytest.mark.parametrize("message", [b"", b"\1" * 15, b"\2" + b"\1" * 20, b"\1\7" + b"\0" * 20])
def test_messages_that_are_no_frame(message: bytes) -> None:
    with pytest.raises(LivereelError):
        parse_frame(message)


@pytest.mark.parametrize(("module", "method", "extra"), [("numpy", "numpy", "numpy"), ("PIL.Image", "image", "pillow")])
def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, module: str, method: str, extra: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, module.split(".", maxsplit=1)[0], None)
    with pytest.raises(LivereelError, match=rf"pip install 'livereel\[{extra}\]'"):
        getattr(parse_frame(packet("rgb24")), method)()
