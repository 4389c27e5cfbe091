"""The prompt changes of one stream: those that were asked for and have no frame yet, and those that are scheduled.

A scheduled change takes effect at the chunk that begins nearest to its time, as in a clip, so that the same seed and
schedule give the same frames. The engine applies a change to the next chunk that it begins, so as long as a change is
scheduled every chunk has to arrive before the next one is allowed: see `exclusive`.
"""

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine import wire
from server.errors import ApiError
from server.library.clip import Change
from server.streams.player import PromptChange


@dataclass(frozen=True, slots=True)
class _Steer:
    """A prompt change that has no frame yet."""

    prompt: str
    transition: wire.Transition
    asked_at: float
    chunk: asyncio.Future[int] | None
    """Becomes the index of the first chunk under the new prompt; None if nobody waits for it."""

    def accept(self, chunk: int) -> None:
        """The change takes effect with this chunk. Safe to call again."""
        if self.chunk is not None and not self.chunk.done():
            self.chunk.set_result(chunk)

    def reject(self, error: ApiError) -> None:
        """The change will never take effect, unless it was accepted before."""
        if self.chunk is not None and not self.chunk.done():
            self.chunk.set_exception(error)


class Steering:
    """Sends prompt changes to the engine and keeps each until its first frame is there. Times are monotonic seconds."""

    def __init__(self, stream: str, send: Callable[[wire.Steer], None]) -> None:
        """`send` gives a message to the engine; while no engine holds the stream it drops it."""
        self._stream = stream
        self._send = send
        self._steers: dict[int, _Steer] = {}
        self._numbers = itertools.count(1)
        self.scheduled: list[Change] = []
        """Changes that have not been sent yet, `at_s` rising."""

    @property
    def exclusive(self) -> bool:
        """Whether the engine may be given one chunk at a time only, because a change has to fall between two chunks."""
        return bool(self.scheduled)

    def schedule(self, changes: Sequence[Change]) -> None:
        """Replace the changes that are still to come."""
        self.scheduled = list(changes)

    def ask(self, prompt: str, transition: wire.Transition, now: float) -> asyncio.Future[int]:
        """Change the prompt at the next chunk that the engine begins; the future becomes the chunk's index."""
        chunk: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._ask(_Steer(prompt, transition, now, chunk))
        return chunk

    def ask_due(self, frame: int, length: int, fps: int, now: float) -> None:
        """Send the scheduled change that belongs to the next chunk, which begins at `frame` and has `length` frames.

        Of several, only the newest is sent: the others would show for no frame.
        """
        due = sum(2 * (round(each.at_s * fps) - frame) < length for each in self.scheduled)
        if due:
            newest = self.scheduled[due - 1]
            del self.scheduled[:due]
            self._ask(_Steer(newest.prompt, newest.transition, now, None))

    def _ask(self, steer: _Steer) -> None:
        number = next(self._numbers)
        self._steers[number] = steer
        self._send(wire.Steer(self._stream, number, steer.prompt, steer.transition))

    def accept(self, number: int, chunk: int) -> str | None:
        """The engine will apply change `number` with this chunk; returns its prompt, None if it is not known."""
        if (steer := self._steers.get(number)) is None:
            return None
        steer.accept(chunk)
        return steer.prompt

    def reject(self, number: int, error: ApiError) -> None:
        """The engine refuses change `number`."""
        if steer := self._steers.pop(number, None):
            steer.reject(error)

    def reject_all(self, error: ApiError) -> None:
        """No change will take effect any more."""
        self.scheduled.clear()
        for steer in self._steers.values():
            steer.reject(error)
        self._steers.clear()

    def newest(self) -> tuple[int, str] | None:
        """Number and prompt of the newest change that has no frame yet."""
        if not self._steers:
            return None
        number = max(self._steers)
        return number, self._steers[number].prompt

    def apply(self, newest: int, chunk: int) -> list[PromptChange]:
        """Change `newest` and every older one have taken effect with this chunk: returns them, the oldest first."""
        changes = []
        for number in sorted(number for number in self._steers if number <= newest):
            steer = self._steers.pop(number)
            steer.accept(chunk)
            changes.append(PromptChange(steer.prompt, steer.transition, steer.asked_at, chunk))
        return changes
