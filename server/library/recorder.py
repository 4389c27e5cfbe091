"""All recordings of live streams: begun and stopped by clients, kept in the store for a while after their end.

Everything here runs on the event loop. A recording that runs owns a task; `Registry` gives its tape what is shown.
"""

import asyncio
import secrets
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.wire import CLOCK_RATE
from server.errors import ApiError, not_found
from server.library.mp4 import Growth
from server.library.recording_writer import FilmFormat, Reason, Tape
from server.library.store import Store, no_room
from server.metrics import Metrics

PREFIX = "rec_"
MAX_RUNNING = 32
MAX_RECORDINGS = 4096
"""That are kept, whatever their size."""
SAVE_SECONDS = 5.0
"""How old the figures of a recording may be that a server left behind that was killed."""

STOP_SECONDS = 3.0
"""How long an encoder may take over the last frames when the server ends."""

Status = Literal["recording", "completed", "failed"]


class Recording(msgspec.Struct, kw_only=True):
    """What is kept and shown of a recording. Times are unix times."""

    id: str
    stream: str
    format: FilmFormat
    alpha: bool = False
    created_at: float
    owner: str | None = None
    status: Status = "recording"
    frames: int = 0
    lost: int = 0
    seconds: float = 0.0
    size: int = 0
    """Bytes of the file that can be read."""
    ended_at: float | None = None
    expires_at: float | None = None
    reason: Reason | Literal["server_restarted"] | None = None

    @property
    def suffix(self) -> str:
        return f".{self.format}"

    def finish(self, reason: Reason | Literal["server_restarted"], now: float, keep_seconds: float) -> None:
        """It is over, and kept for a while. Without a frame it is no film."""
        self.status = "completed" if self.size and reason != "failed" else "failed"
        self.reason, self.ended_at, self.expires_at = reason, now, now + keep_seconds


class Recorder:
    """All recordings of one gateway."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._recordings: dict[str, Recording] = {}
        self._tapes: dict[str, Tape] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._saved_at = 0.0

    def load(self) -> None:
        """Take over what the store has from an earlier server. Raises OSError."""
        for id, recording in self._store.records(PREFIX, Recording):
            self._recordings[id] = recording
            if recording.status == "recording":
                path = self._store.path(id, recording.suffix)
                recording.size = path.stat().st_size if path.exists() else 0
                recording.finish("server_restarted", time.time(), self._store.keep_seconds)
                self._store.update_record(id, recording)

    async def stop(self) -> None:
        """After the streams have ended: wait until the last file is closed."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=STOP_SECONDS)
        for tape in list(self._tapes.values()):
            tape.finish("stream_ended")
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def begin(
        self, stream: str, owner: str | None, format: FilmFormat, fps: int, *, alpha: bool = False
    ) -> tuple[Recording, Tape]:
        """A new recording, and the tape to give the frames to. Raises `ApiError`."""
        self._store.check_room()
        if len(self._recordings) >= MAX_RECORDINGS:
            raise ApiError(507, "storage_full", f"The server keeps at most {MAX_RECORDINGS} recordings: delete some.")
        if len(self._tapes) >= MAX_RUNNING:
            message = f"{MAX_RUNNING} recordings run at once, and no more: stop one first."
            raise ApiError(429, "too_many_recordings", message, headers={"Retry-After": "10"})
        id = PREFIX + secrets.token_hex(16)
        now = time.time()
        recording = Recording(id=id, stream=stream, format=format, alpha=alpha, created_at=now, owner=owner)
        try:
            path = self._store.create(id, recording.suffix)
            self._store.save_record(id, recording)
        except OSError as error:
            self._store.remove(id)
            raise no_room(error) from None
        tape = self._tapes[id] = Tape(format, fps, Growth(path), lambda: self._store.full, alpha=alpha)
        self._recordings[id] = recording
        self._metrics.recordings.inc()
        self._tasks[id] = asyncio.create_task(self._run(recording, tape), name=f"recording {id}")
        return recording, tape

    async def _run(self, recording: Recording, tape: Tape) -> None:
        reason = await tape.run()
        del self._tapes[recording.id], self._tasks[recording.id]
        self._metrics.recordings.dec()
        self._metrics.frames_dropped.labels("slow_recorder").inc(tape.lost)
        read(recording, tape)
        recording.finish(reason, time.time(), self._store.keep_seconds)
        tape.growth.end(complete=recording.status == "completed")
        if recording.id in self._recordings:
            self._store.update_record(recording.id, recording)

    def get(self, id: str) -> Recording:
        """The recording of this id, its figures as of now. Raises `ApiError`."""
        if (recording := self._recordings.get(id)) is None:
            raise not_found("recording")
        if tape := self._tapes.get(id):
            read(recording, tape)
        return recording

    def tape(self, recording: Recording) -> Tape | None:
        """Of one that runs; None when it does not, or not any more."""
        return self._tapes.get(recording.id)

    def path(self, recording: Recording) -> Path:
        """Where its film is."""
        return self._store.path(recording.id, recording.suffix)

    def owner(self, id: str) -> str | None:
        """Whose the recording is; None also when there is none."""
        recording = self._recordings.get(id)
        return recording.owner if recording else None

    def all(self) -> list[Recording]:
        """Every recording that is kept, the newest first."""
        return sorted(map(self.get, self._recordings), key=lambda recording: -recording.created_at)

    async def end(self, recording: Recording) -> None:
        """Stop it, and wait until it is a whole film. One that is over stays as it is."""
        if tape := self._tapes.get(recording.id):
            tape.finish("stopped")
            await asyncio.wait([self._tasks[recording.id]])

    async def delete(self, recording: Recording) -> None:
        """Stop it, forget it, and delete its file."""
        self._recordings.pop(recording.id, None)
        await self.end(recording)
        self._store.remove(recording.id)

    def keep_house(self, now: float) -> None:
        """Delete what was kept for long enough, and write down how far the others are."""
        due = now - self._saved_at >= SAVE_SECONDS
        self._saved_at = now if due else self._saved_at
        for recording in list(self._recordings.values()):
            if recording.expires_at is not None and recording.expires_at <= now:
                del self._recordings[recording.id]
                self._store.remove(recording.id)
            elif due and recording.id in self._tapes:
                self._store.update_record(recording.id, self.get(recording.id))


def read(recording: Recording, tape: Tape) -> None:
    """Bring the figures up to date."""
    recording.frames, recording.lost, recording.size = tape.frames, tape.lost, tape.growth.size
    recording.seconds = (tape.ended_at - tape.began_at) / CLOCK_RATE


def shown(recording: Recording) -> dict[str, Any]:
    """The recording object of the API."""
    return {
        "id": recording.id,
        "object": "recording",
        "stream_id": recording.stream,
        "status": recording.status,
        "format": recording.format,
        "alpha": recording.alpha,
        "created_at": recording.created_at,
        "ended_at": recording.ended_at,
        "expires_at": recording.expires_at,
        "ended_reason": recording.reason,
        "frames": recording.frames,
        "frames_lost": recording.lost,
        "duration_s": recording.seconds,
        "bytes": recording.size,
    }
