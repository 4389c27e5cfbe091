"""Video frames, and the picture formats in which each frame stands alone. Each frame is encoded once per format, for
all viewers.

An encoded picture starts with a 16-byte header in network byte order: u8 version, u8 format, u16 width, u16 height,
u16 flags, u64 presentation time in 1/90000 s. The payload is a JPEG, height x width x 3 bytes of RGB24, or a piece of
fragmented MP4.
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

PictureFormat = Literal["mjpeg", "rgb24"]
FORMAT_NUMBERS: dict[PictureFormat, int] = {"mjpeg": 1, "rgb24": 2}
"""The formats' numbers in the header."""

FMP4 = 3
"""The number of fragmented MP4 in the header. `server.media.broadcast` makes it: it takes more than one frame."""

HEADER = struct.Struct("!BBHHHQ")
VERSION = 1
DISCONTINUITY = 1
"""Header flag: a new scene starts with this frame."""
KEY = 2
"""Header flag of fragmented MP4: this fragment can be decoded without those before it."""
INIT = 4
"""Header flag of fragmented MP4: this is the init segment."""

JPEG_QUALITY = 85


@dataclass(slots=True, eq=False)
class Frame:
    """One frame of a stream, from the engine to the viewers."""

    index: int
    """Counted from the start of the stream."""
    pts: int
    """Presentation time in 1/90000 s."""
    width: int
    height: int
    flags: int
    rgb: memoryview
    """RGB24, height x width x 3 bytes: a slice of the chunk that it arrived in."""
    encode_period: tuple[float, float] | None = None
    """Start and end of its first encoding, on the monotonic clock; None before that."""
    encoded: dict[PictureFormat, asyncio.Future[bytes]] = field(default_factory=dict)
    stacked: "StackedFrame | None" = None

    def stacked_on(self, matte: Matte | None) -> "StackedFrame":
        """The frame stacked on its matte; made once for all viewers."""
        if self.stacked is None or self.stacked.matte is not matte:
            self.stacked = StackedFrame(self, matte)
        return self.stacked


class StackedFrame:
    """A frame stacked on its matte, twice as high. The matte is computed when the pixels are first needed."""

    def __init__(self, frame: Frame, matte: Matte | None) -> None:
        self.index, self.pts, self.flags, self.width = frame.index, frame.pts, frame.flags, frame.width
        self.height = 2 * frame.height
        self.matte = matte
        self.encode_period: tuple[float, float] | None = None
        self.encoded: dict[PictureFormat, asyncio.Future[bytes]] = {}
        self._frame_rgb = frame.rgb
        self._lock = threading.Lock()
        self._rgb: memoryview | None = None

    @property
    def rgb(self) -> memoryview:
        """As `Frame.rgb`. The first access computes it: do not call this on the event loop."""
        with self._lock:
            if self._rgb is None:
                self._rgb = stack(self._frame_rgb, self.width, self.height // 2, self.matte)
            return self._rgb


AnyFrame = Frame | StackedFrame


Image.preinit()  # loads the JPEG encoder now; later there might be no free file descriptor for it


class PictureEncoder:
    """Encodes frames as pictures in a thread, so that the event loop never waits for a JPEG."""

    def __init__(self, executor: Executor, metrics: Metrics) -> None:
        self._executor = executor
        self._metrics = metrics

    def encode(self, frame: AnyFrame, format: PictureFormat) -> asyncio.Future[bytes]:
        """The frame as a picture with its header; encoded on the first call and shared by later ones."""
        if (picture := frame.encoded.get(format)) is None:
            loop = asyncio.get_running_loop()
            picture = frame.encoded[format] = loop.run_in_executor(self._executor, self._encode, frame, format)
        # A caller that is cancelled must not cancel the work of the others.
        return asyncio.shield(picture)

    def _encode(self, frame: AnyFrame, format: PictureFormat) -> bytes:
        start = time.monotonic()
        picture = encode_picture(frame, format)
        end = time.monotonic()
        frame.encode_period = frame.encode_period or (start, end)
        self._metrics.encode_seconds.labels(format).observe(end - start)
        return picture


def encode_picture(frame: AnyFrame, format: PictureFormat) -> bytes:
    """Header and payload of a frame as a picture. Thread-safe."""
    header = HEADER.pack(VERSION, FORMAT_NUMBERS[format], frame.width, frame.height, frame.flags, frame.pts)
    if format == "rgb24":
        return header + frame.rgb
    image = Image.frombytes("RGB", (frame.width, frame.height), bytes(frame.rgb))
    # Full chroma resolution: pages scale small pictures up, which makes subsampled chroma visible as colour fringes.
    image.save(out := io.BytesIO(), "JPEG", quality=JPEG_QUALITY, subsampling="4:4:4")
    return header + out.getbuffer()


def fmp4_message(frame: AnyFrame, pts: int, body: bytes, *, key: bool = False, init: bool = False) -> bytes:
    """Header and body of a piece of fragmented MP4. `pts` is in 1/90000 s; `init` marks the init segment."""
    flags = INIT if init else frame.flags | KEY * key
    return HEADER.pack(VERSION, FMP4, frame.width, frame.height, flags, pts) + body
