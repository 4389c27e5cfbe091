"""One viewer's send queue: bounded, drops old frames, never drops an event.

A slow viewer gets fewer frames; with a codec whose frames depend on each other, it continues at the next keyframe. A
viewer that does not even read its events is overrun and gets disconnected. Neither delays the stream.
"""

import asyncio
from collections import deque
from enum import Enum
from typing import Literal

from server.media.encoder import Codec, EncodedFrame
from server.media.frames import PictureFormat

MAX_FRAMES = 8
MAX_EVENTS = 256

ViewerFormat = PictureFormat | Codec | Literal["fmp4", "events"]
"""What a viewer receives: pictures, a codec's frames over WebRTC, fragments of MP4, or events only."""
PICTURE_FORMATS: dict[ViewerFormat, PictureFormat] = {"mjpeg": "mjpeg", "rgb24": "rgb24"}
"""Formats in which each frame stands alone."""
CODEC_OF: dict[ViewerFormat, Codec] = {"h264": "h264", "vp8": "vp8", "fmp4": "h264"}
"""Formats in which frames depend on earlier ones, and the codec that makes them."""

Item = str | bytes | EncodedFrame
"""An event (JSON text), a picture or piece of MP4 (with its header), or a frame for WebRTC."""


class _Kind(Enum):
    REQUIRED = 0
    """Never dropped: an event or an init segment."""
    FRAME = 1
    KEY = 2
    """A frame that can be decoded without those before it."""


class Viewer:
    """One consumer of a stream, with the queue of what it is still to be sent, in order."""

    def __init__(self, format: ViewerFormat, *, events: bool = True, alpha: bool = False) -> None:
        self.format = format
        self.alpha = alpha
        """It gets every frame stacked on its matte (see `server.media.matte`)."""
        self.picture_format = PICTURE_FORMATS.get(format)
        self.codec = CODEC_OF.get(format)
        self.dropped = 0
        """Frames dropped because the viewer was too slow."""
        self.overrun = False
        """Too many events are queued: the viewer must be disconnected."""
        self.close_code: int | None = None
        """Once set, nothing more is queued: close with this code when the queue is empty."""
        self.awaits_key = self.codec is not None
        """It can decode nothing before the next keyframe."""
        self.started = False
        """A frame has been queued for it."""
        self._events = events
        self._items: deque[tuple[_Kind, Item]] = deque()
        self._frames = 0
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def event(self, text: str) -> None:
        """Queue an event, unless the viewer wants none."""
        if not self._events:
            return
        if len(self._items) - self._frames >= MAX_EVENTS:
            self.overrun = True
            self._items.clear()
            self._frames = 0
        if not self.overrun:
            self._items.append((_Kind.REQUIRED, text))
        self._wake.set()

    def init_segment(self, item: bytes) -> None:
        """Queue an init segment, which the following frames need. It is never dropped."""
        if not self.overrun:
            self._items.append((_Kind.REQUIRED, item))

    def frame(self, item: bytes | EncodedFrame, *, key: bool = True) -> int:
        """Queue a frame; returns how many frames were dropped, possibly including this one.

        `key` says that it can be decoded without those before it. A new viewer waits for such a frame; the frames it
        misses until then do not count as dropped.
        """
        if self.overrun:
            return 1
        dropped = 0
        if self._frames == MAX_FRAMES:
            dropped = self._drop()
            self.awaits_key = self._frames == 0 and self.codec is not None
        if self.awaits_key and not key:
            dropped += self.started
        else:
            self.awaits_key, self.started = False, True
            self._items.append((_Kind.KEY if key else _Kind.FRAME, item))
            self._frames += 1
            self._wake.set()
        self.dropped += dropped
        return dropped

    def finish(self, close_code: int) -> None:
        """The stream has ended: close once the queue is empty."""
        self.close_code = close_code
        self._wake.set()

    def clear(self) -> None:
        """Empty the queue: the viewer has left."""
        self._items.clear()
        self._frames = 0

    async def next(self) -> Item | None:
        """Wait for the next item; None when the connection should be closed instead."""
        while not self._items:
            if self.overrun or self.close_code is not None:
                return None
            self._wake.clear()
            await self._wake.wait()
        kind, item = self._items.popleft()
        self._frames -= kind is not _Kind.REQUIRED
        return item

    def _drop(self) -> int:
        """Drop the oldest frame and those that depend on it; returns how many."""
        kept: deque[tuple[_Kind, Item]] = deque()
        before, found = self._frames, False
        for kind, item in self._items:
            found = found or (kind is _Kind.KEY and self._frames < before)
            if kind is _Kind.REQUIRED or found:
                kept.append((kind, item))
            else:
                self._frames -= 1
        self._items = kept
        return before - self._frames
