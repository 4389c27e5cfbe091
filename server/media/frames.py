"""One video frame becomes one packet per format, encoded once however many viewers there are.

A packet is a 16-byte header in network byte order (u8 version, u8 format, u16 width, u16 height, u16 flags, u64
presentation time in 1/90000 s) and the payload: a JPEG, height x width x 3 bytes of RGB24, or a piece of fragmented
MP4.
"""

import asyncio
import io
import struct
import threading
import time
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import Literal

from PIL import Image

from server.media.matte import Matte, stack
from server.metrics import Metrics

Format = Literal["mjpeg", "rgb24"]
NUMBERS: dict[Format, int] = {"mjpeg": 1, "rgb24": 2}
"""Of the format, in the header."""

FMP4 = 3
"""Number in the header of fragmented MP4, which a frame alone does not make: see `server.media.broadcast`."""

HEADER = struct.Struct("!BBHHHQ")
VERSION = 1
DISCONTINUITY = 1
"""Header flag: the scene starts afresh with this frame."""
KEY = 2
"""Header flag of fragmented MP4: can be shown without the fragments before it."""
HEAD = 4
"""Header flag of fragmented MP4: the init segment."""

JPEG_QUALITY = 85


@dataclass(slots=True, eq=False)
class Frame:
    """One frame on its way to the screen."""

    index: int
    """From the start of the stream."""
    pts: int
    """1/90000 s."""
    width: int
    height: int
    flags: int
    rgb: memoryview
    """height x width x 3 bytes, a slice of the chunk that it came in."""
    encoded: tuple[float, float] | None = None
    """When it was first being encoded, on the monotonic clock; None before that."""
    packets: dict[Format, asyncio.Future[bytes]] = field(default_factory=dict)
    stacked: "Stacked | None" = None

    def above(self, matte: Matte | None) -> "Stacked":
        """The frame above its matte, the same for all who ask."""
        if self.stacked is None or self.stacked.matte is not matte:
            self.stacked = Stacked(self, matte)
        return self.stacked


class Stacked:
    """A frame above its matte, which is made when it is first encoded."""

    def __init__(self, frame: Frame, matte: Matte | None) -> None:
        self.index, self.pts, self.flags, self.width = frame.index, frame.pts, frame.flags, frame.width
        self.height = 2 * frame.height
        self.matte = matte
        self.encoded: tuple[float, float] | None = None
        self.packets: dict[Format, asyncio.Future[bytes]] = {}
        self._frame_rgb = frame.rgb
        self._lock = threading.Lock()
        self._rgb: memoryview | None = None

    @property
    def rgb(self) -> memoryview:
        """As `Frame.rgb`. Not for the event loop: the first to ask does the work."""
        with self._lock:
            if self._rgb is None:
                self._rgb = stack(self._frame_rgb, self.width, self.height // 2, self.matte)
            return self._rgb


Picture = Frame | Stacked


Image.preinit()  # loads what writes JPEGs now, and not when there may be no file descriptor for it


class Encoder:
    """Turns frames into packets in a thread, so that the event loop never waits for a JPEG."""

    def __init__(self, executor: Executor, metrics: Metrics) -> None:
        self._executor = executor
        self._metrics = metrics

    def packet(self, frame: Picture, format: Format) -> asyncio.Future[bytes]:
        """The frame's packet, encoded on the first call and shared by every later one."""
        if (packet := frame.packets.get(format)) is None:
            loop = asyncio.get_running_loop()
            packet = frame.packets[format] = loop.run_in_executor(self._executor, self._encode, frame, format)
        # Whoever stops waiting must not cancel it for the others.
        return asyncio.shield(packet)

    def _encode(self, frame: Picture, format: Format) -> bytes:
        start = time.monotonic()
        packet = encode(frame, format)
        end = time.monotonic()
        frame.encoded = frame.encoded or (start, end)
        self._metrics.encode_seconds.labels(format).observe(end - start)
        return packet


def encode(frame: Picture, format: Format) -> bytes:
    """Header and payload. Runs in any thread."""
    number = NUMBERS[format]
    header = HEADER.pack(VERSION, number, frame.width, frame.height, frame.flags, frame.pts)
    if format == "rgb24":
        return header + frame.rgb
    image = Image.frombytes("RGB", (frame.width, frame.height), bytes(frame.rgb))
    # Full colour resolution: the page scales small pictures up, where halved chroma shows as coloured fringes.
    image.save(out := io.BytesIO(), "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return header + out.getbuffer()


def fmp4_packet(frame: Picture, pts: int, body: bytes, *, key: bool = False, head: bool = False) -> bytes:
    """Header and body of a piece of fragmented MP4; `pts` is in 1/90000 s."""
    flags = HEAD if head else frame.flags | KEY * key
    return HEADER.pack(VERSION, FMP4, frame.width, frame.height, flags, pts) + body
