"""The life of one clip: a stream of known length that is recorded instead of watched.

Pure: no clock is read and nothing is sent here. `Clip` is what is kept and shown, `Take` one attempt of an
engine at it.
"""

from enum import StrEnum

import msgspec

from engine import wire


class Status(StrEnum):
    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        return self in (Status.COMPLETED, Status.FAILED)


class Change(msgspec.Struct, frozen=True):
    """From the chunk that begins nearest to `at_s` seconds on, the picture follows this prompt."""

    at_s: float
    prompt: str
    transition: wire.Transition = "recache"


class Failure(msgspec.Struct, frozen=True):
    """Why a clip failed. `retryable`: the same request may well succeed."""

    code: str
    message: str
    retryable: bool


class Clip(msgspec.Struct, kw_only=True):
    """One clip. Times are unix times."""

    id: str
    model: str
    prompt: str
    """What the request for it said."""
    prompts: list[Change]
    """What to show, in order; the first from the start."""
    seed: int
    seconds: str
    """As it was asked for."""
    frames: int
    width: int
    height: int
    fps: int
    created_at: float
    owner: str | None = None
    remixed_from: str | None = None
    picture: bool = False
    """It goes on from a picture, which is kept beside it."""
    status: Status = Status.QUEUED
    recorded: int = 0
    """Frames that are in the file."""
    completed_at: float | None = None
    expires_at: float | None = None
    failure: Failure | None = None

    @property
    def progress(self) -> int:
        """Per cent; 100 says that it is complete."""
        return 100 if self.status is Status.COMPLETED else min(99, 100 * self.recorded // self.frames)

    def finish(self, now: float, keep_seconds: float, failure: Failure | None = None) -> None:
        """It is over, and kept for a while."""
        self.status = Status.FAILED if failure else Status.COMPLETED
        self.failure, self.expires_at = failure, now + keep_seconds
        self.completed_at = None if failure else now


def remix(prompts: list[Change], change: Change) -> list[Change]:
    """The same until `change.at_s`, and from there on the new prompt."""
    return [*(each for each in prompts if each.at_s < change.at_s), change]


class UnexpectedError(Exception):
    """A chunk that is not what was asked for."""


class Take:
    """From the first frame on. Chunks are asked for one at a time, so that a prompt changes where it should, and
    nothing piles up before a recorder that is slower than the engine."""

    def __init__(self, clip: Clip, model: wire.ModelInfo) -> None:
        self._clip, self._model = clip, model
        self._changes = [(round(each.at_s * clip.fps), each) for each in clip.prompts]
        self._followed = 1
        self._chunks = 0
        self.received = 0
        """Frames of this take that have come, in whole chunks."""

    def open(self, picture: bytes) -> wire.Open:
        """How it starts."""
        clip, first = self._clip, self._clip.prompts[0].prompt
        return wire.Open(clip.id, clip.model, first, clip.seed, clip.frames, picture=picture, background=True)

    def next(self) -> list[wire.Steer | wire.Credit]:
        """What makes the engine go on by one chunk; nothing when it has done all."""
        if self.received >= self._clip.frames:
            return []
        messages: list[wire.Steer | wire.Credit] = []
        length = self._model.chunk_frames if self._chunks else self._model.first_chunk_frames
        last = self.received + length >= self._clip.frames
        due = sum(last or 2 * (frame - self.received) < length for frame, _ in self._changes)
        if due > self._followed:
            # Of several, the newest: the others would be seen for no frame.
            change = self._changes[due - 1][1]
            messages.append(wire.Steer(self._clip.id, due, change.prompt, change.transition))
            self._followed = due
        return [*messages, wire.Credit(self._clip.id, self._chunks + 1, 0.0)]

    def accept(self, chunk: wire.Frames) -> range:
        """Which of its frames are to be recorded: those that no earlier take has. Raises `UnexpectedError`."""
        clip, first = self._clip, self.received
        if chunk.chunk != self._chunks:
            raise UnexpectedError(f"chunk {chunk.chunk} came instead of {self._chunks}")
        if (chunk.width, chunk.height) != (clip.width, clip.height):
            raise UnexpectedError(f"frames of {chunk.width}x{chunk.height} came, not of {clip.width}x{clip.height}")
        count = min(chunk.frames, clip.frames - first)
        self._chunks += 1
        self.received += count
        return range(min(max(clip.recorded - first, 0), count), count)
