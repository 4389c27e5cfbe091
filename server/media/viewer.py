"""What one viewer still has to be sent: a bounded queue that loses old frames, and never an event.

A viewer too slow for the frames sees fewer of them; where frames build on each other, it goes on at the next keyframe.
One that does not even take its events is overrun, and its shell lets it go. Neither ever makes the stream wait.
"""

import asyncio
from collections import deque
from enum import Enum
from typing import Literal

from server.media.encoder import Codec, EncodedFrame
from server.media.frames import Format

MAX_FRAMES = 8
MAX_EVENTS = 256

Watching = Format | Codec | Literal["fmp4", "events"]
"""What a viewer takes: pictures, a codec's packets over WebRTC, fragments of MP4, or no frames at all."""
PICTURES: dict[Watching, Format] = {"mjpeg": "mjpeg", "rgb24": "rgb24"}
"""Where every frame is a picture of its own."""
CODECS: dict[Watching, Codec] = {"h264": "h264", "vp8": "vp8", "fmp4": "h264"}
"""Where frames build on each other: which encoder they come from."""

Item = str | bytes | EncodedFrame


class _Kind(Enum):
    KEPT = 0
    """An event, or what the frames cannot be read without."""
    FRAME = 1
    KEY = 2
    """A frame that can be shown without those before it."""


class Viewer:
    """One consumer of a stream: text items are events, others are frames, in the order they happened."""

    def __init__(self, format: Watching, *, events: bool = True, alpha: bool = False) -> None:
        self.format = format
        self.alpha = alpha
        """It takes every frame above its matte (see `server.media.matte`)."""
        self.picture = PICTURES.get(format)
        self.codec = CODECS.get(format)
        self.dropped = 0
        """Frames this viewer was too slow for."""
        self.overrun = False
        """Events piled up too: there is nothing left to do but to disconnect."""
        self.close_code: int | None = None
        """Set with the last item: close with this code once the queue is empty."""
        self.awaits_key = self.codec is not None
        """Frames are of no use to it before the next keyframe."""
        self.started = False
        """It has been given a frame."""
        self._events = events
        self._items: deque[tuple[_Kind, Item]] = deque()
        self._frames = 0
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def event(self, text: str) -> None:
        """Queue an event, if this viewer takes any."""
        if not self._events:
            return
        if len(self._items) - self._frames >= MAX_EVENTS:
            self.overrun = True
            self._items.clear()
            self._frames = 0
        if not self.overrun:
            self._items.append((_Kind.KEPT, text))
        self._wake.set()

    def head(self, packet: bytes) -> None:
        """Queue what the frames that follow cannot be read without: it is never dropped."""
        if not self.overrun:
            self._items.append((_Kind.KEPT, packet))

    def frame(self, packet: bytes | EncodedFrame, *, key: bool = True) -> int:
        """Queue a frame; returns how many were dropped for it, itself included.

        `key` says that it can be shown without those before it. A viewer that has just come waits for such a frame;
        what it does not get until then does not count as dropped.
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
            self._items.append((_Kind.KEY if key else _Kind.FRAME, packet))
            self._frames += 1
            self._wake.set()
        self.dropped += dropped
        return dropped

    def finish(self, close_code: int) -> None:
        """The stream is over: close once everything has been sent."""
        self.close_code = close_code
        self._wake.set()

    def forget(self) -> None:
        """The viewer is gone: drop what it was not sent."""
        self._items.clear()
        self._frames = 0

    async def next(self) -> Item | None:
        """The next item, as soon as there is one; None when the socket should be closed instead."""
        while not self._items:
            if self.overrun or self.close_code is not None:
                return None
            self._wake.clear()
            await self._wake.wait()
        kind, item = self._items.popleft()
        self._frames -= kind is not _Kind.KEPT
        return item

    def _drop(self) -> int:
        """Drop the oldest frame, and those that build on it."""
        kept: deque[tuple[_Kind, Item]] = deque()
        before, found = self._frames, False
        for kind, item in self._items:
            found = found or (kind is _Kind.KEY and self._frames < before)
            if kind is _Kind.KEPT or found:
                kept.append((kind, item))
            else:
                self._frames -= 1
        self._items = kept
        return before - self._frames
