"""What one viewer still has to be sent: a bounded queue that loses old frames, and never an event.

A viewer too slow for the frames sees fewer of them. One that does not even take its events is overrun, and its
shell lets it go. Neither ever makes the stream wait.
"""

import asyncio
from collections import deque

from server.media.packets import Format

MAX_FRAMES = 8
MAX_EVENTS = 256


class Viewer:
    """One consumer of a stream: text items are events, byte items are frames, in the order they happened."""

    def __init__(self, format: Format) -> None:
        self.format = format
        self.dropped = 0
        """Frames this viewer was too slow for."""
        self.overrun = False
        """Events piled up too: there is nothing left to do but to disconnect."""
        self.close_code: int | None = None
        """Set with the last item: close with this code once the queue is empty."""
        self._items: deque[str | bytes] = deque()
        self._frames = 0
        self._wake = asyncio.Event()

    def __len__(self) -> int:
        return len(self._items)

    def event(self, text: str) -> None:
        """Queue an event."""
        if len(self._items) - self._frames >= MAX_EVENTS:
            self.overrun = True
            self._items.clear()
            self._frames = 0
        if not self.overrun:
            self._items.append(text)
        self._wake.set()

    def frame(self, packet: bytes) -> int:
        """Queue a frame; returns how many were dropped to make room, the new one included."""
        if self.overrun:
            return 1
        dropped = 0
        if self._frames == MAX_FRAMES:
            self._items.remove(next(item for item in self._items if isinstance(item, bytes)))
            self._frames -= 1
            self.dropped += (dropped := 1)
        self._items.append(packet)
        self._frames += 1
        self._wake.set()
        return dropped

    def finish(self, close_code: int) -> None:
        """The stream is over: close once everything has been sent."""
        self.close_code = close_code
        self._wake.set()

    async def next(self) -> str | bytes | None:
        """The next item, as soon as there is one; None when the socket should be closed instead."""
        while not self._items:
            if self.overrun or self.close_code is not None:
                return None
            self._wake.clear()
            await self._wake.wait()
        item = self._items.popleft()
        self._frames -= isinstance(item, bytes)
        return item
