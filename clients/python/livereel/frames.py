"""Frames: the binary messages of a stream's WebSocket."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from livereel.errors import LivereelError

if TYPE_CHECKING:
    import numpy
    import PIL.Image

PictureFormat = Literal["mjpeg", "rgb24"]
Format = Literal["mjpeg", "rgb24", "fmp4"]

HEADER = struct.Struct("!BBHHHQ")
"""Version, format, width, height, flags and presentation time, in network byte order."""
VERSION = 1
FORMATS: dict[int, Format] = {1: "mjpeg", 2: "rgb24", 3: "fmp4"}
DISCONTINUITY, KEY, INIT = 1, 2, 4
"""Flags."""
CLOCK_RATE = 90_000


@dataclass(frozen=True, slots=True)
class Frame:
    """One frame, or with the format `fmp4` one piece of a fragmented MP4."""

    format: Format
    width: int
    height: int
    pts: int
    """Presentation time in 1/90000 s of video."""
    flags: int
    data: bytes
    """A JPEG, height x width x 3 bytes of RGB24, or a piece of fragmented MP4."""

    @property
    def seconds(self) -> float:
        """Presentation time in seconds of video since the start of the stream."""
        return self.pts / CLOCK_RATE

    @property
    def discontinuity(self) -> bool:
        """Whether a new scene starts with this frame."""
        return bool(self.flags & DISCONTINUITY)

    @property
    def key(self) -> bool:
        """Whether it can be decoded without those before it. Pictures always can."""
        return self.format != "fmp4" or bool(self.flags & KEY)

    @property
    def init(self) -> bool:
        """Whether this is the init segment of a fragmented MP4, which the fragments after it need."""
        return bool(self.flags & INIT)

    def image(self) -> "PIL.Image.Image":
        """The frame as a Pillow image in RGB. Needs the extra `pillow`."""
        self._check_picture()
        try:
            import PIL.Image
        except ImportError:
            raise LivereelError("Frame.image() needs Pillow: pip install 'livereel[pillow]'") from None
        if self.format == "rgb24":
            return PIL.Image.frombytes("RGB", (self.width, self.height), self.data)
        import io

        return PIL.Image.open(io.BytesIO(self.data)).convert("RGB")

    def numpy(self) -> "numpy.typing.NDArray[numpy.uint8]":
        """The frame as an array of uint8, (height, width, 3) in RGB. Needs the extra `numpy`."""
        self._check_picture()
        try:
            import numpy
        except ImportError:
            raise LivereelError("Frame.numpy() needs NumPy: pip install 'livereel[numpy]'") from None
        if self.format == "rgb24":
            return numpy.frombuffer(self.data, numpy.uint8).reshape(self.height, self.width, 3)
        return numpy.asarray(self.image(), numpy.uint8)

    def save(self, path: str | Path) -> None:
        """Write the frame to a file: a JPEG as it is, RGB24 as what the file's name ends in. RGB24 needs Pillow."""
        if self.format == "mjpeg" and Path(path).suffix.lower() in (".jpg", ".jpeg"):
            Path(path).write_bytes(self.data)
        else:
            self.image().save(path)

    def _check_picture(self) -> None:
        if self.format == "fmp4":
            raise LivereelError("A piece of MP4 is no picture: watch with format mjpeg or rgb24")


def parse_frame(message: bytes) -> Frame:
    """The frame in a binary message. Raises `LivereelError` if this package does not know its version or format."""
    if len(message) < HEADER.size:
        raise LivereelError("The server sent a message that is too short for a frame: is this a Livereel server?")
    version, number, width, height, flags, pts = HEADER.unpack_from(message)
    if version != VERSION or number not in FORMATS:
        raise LivereelError("The server sends frames that this version does not know: pip install --upgrade livereel")
    return Frame(FORMATS[number], width, height, pts, flags, message[HEADER.size :])
