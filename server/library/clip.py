"""The life of one clip: a stream of known length that is written to a file instead of watched.

Pure: no clock is read and nothing is sent here. `Clip` is the record that is kept and shown, `Attempt` one run of the
engine over it.
"""

from enum import StrEnum

import msgspec

from engine import wire


class Status(StrEnum):
    """How far a clip is."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"

    @property
    def over(self) -> bool:
        """Whether nothing more happens to the clip."""
        return self in (Status.COMPLETED, Status.FAILED)


class Change(msgspec.Struct, frozen=True):
    """A new prompt, from the chunk that begins nearest to `at_s` seconds."""

    at_s: float
    prompt: str
    transition: wire.Transition = "recache"


class Failure(msgspec.Struct, frozen=True):
    """Why a clip failed. `retryable`: the same request may well succeed."""

    code: str
    message: str
    retryable: bool


class Clip(msgspec.Struct, kw_only=True):
    """The record of one clip. Times are unix times, `expires_at` by the store's clock."""

    id: str
    model: str
    prompt: str
    """The prompt of the request that made the clip."""
    prompts: list[Change]
    """Every prompt of the clip in order; the first from the start."""
    seed: int
    seconds: str
    """The length, as the request gave it."""
    frames: int
    width: int
    height: int
    fps: int
    created_at: float
    owner: str | None = None
    remixed_from: str | None = None
    """Id of the clip that this one is a remix of."""
    picture: bool = False
    """Whether the clip starts from a picture, which is kept in a file of its own."""
    status: Status = Status.QUEUED
    recorded: int = 0
    """Frames that are in the file."""
    completed_at: float | None = None
    expires_at: float | None = None
    failure: Failure | None = None

    @property
    def progress(self) -> int:
        """Per cent of the frames that are recorded; 100 only when the clip is complete."""
        return 100 if self.status is Status.COMPLETED else min(99, 100 * self.recorded // self.frames)

    def finish(self, now: float, keep_seconds: float, failure: Failure | None = None) -> None:
        """Complete the clip, or fail it; it is kept for `keep_seconds` from now on."""
        self.status = Status.FAILED if failure else Status.COMPLETED
        self.failure, self.expires_at = failure, now + keep_seconds
        self.completed_at = None if failure else now


def remix(prompts: list[Change], change: Change) -> list[Change]:
    """The same prompts until `change.at_s`, and from there on the new one."""
    return [*(each for each in prompts if each.at_s < change.at_s), change]


class UnexpectedError(Exception):
    """The engine sent a chunk that was not asked for."""


class Attempt:
    """One run of the engine over a clip, from the first frame on.

    Chunks are requested one at a time, so that prompts change where they should, and no chunks pile up if encoding is
    slower than the engine.
    """

    def __init__(self, clip: Clip, model: wire.ModelInfo) -> None:
        self._clip, self._model = clip, model
        self._changes = [(round(each.at_s * clip.fps), each) for each in clip.prompts]
        """The frame at which each prompt should begin."""
        self._applied = 1
        """Prompts that the engine has been given, or that were replaced before it was."""
        self._chunks = 0
        self.received = 0
        """Frames of this attempt that have arrived, in whole chunks."""

    def open(self, picture: bytes) -> wire.Open:
        """The message that opens the clip in the engine."""
        clip, first = self._clip, self._clip.prompts[0].prompt
        return wire.Open(clip.id, clip.model, first, clip.seed, clip.frames, picture=picture, background=True)

    def next(self) -> list[wire.Steer | wire.Credit]:
        """The messages that make the engine generate the next chunk; none after the last."""
        if self.received >= self._clip.frames:
            return []
        messages: list[wire.Steer | wire.Credit] = []
        length = self._model.chunk_frames if self._chunks else self._model.first_chunk_frames
        last = self.received + length >= self._clip.frames
        due = sum(last or 2 * (frame - self.received) < length for frame, _ in self._changes)
        if due > self._applied:
            # Of several, only the newest: the others would show for no frame.
            change = self._changes[due - 1][1]
            messages.append(wire.Steer(self._clip.id, due, change.prompt, change.transition))
            self._applied = due
        return [*messages, wire.Credit(self._clip.id, self._chunks + 1, 0.0)]

    def accept(self, chunk: wire.Frames) -> range:
        """The frames of a chunk to record: those that no earlier attempt has. Raises `UnexpectedError`."""
        clip, first = self._clip, self.received
        if chunk.chunk != self._chunks:
            raise UnexpectedError(f"chunk {chunk.chunk} came instead of {self._chunks}")
        if (chunk.width, chunk.height) != (clip.width, clip.height):
            raise UnexpectedError(f"frames of {chunk.width}x{chunk.height} came, not of {clip.width}x{clip.height}")
        count = min(chunk.frames, clip.frames - first)
        self._chunks += 1
        self.received += count
        return range(min(max(clip.recorded - first, 0), count), count)
