"""Starts and stops the recordings of live streams, and keeps them for a while after their end.

Everything here runs on the event loop. A running recording owns a task; the stream's `Audience` gives its writer the
frames.
"""

import asyncio
import logging
import secrets
import time
from pathlib import Path
from typing import Any, Literal

import msgspec

from engine.wire import CLOCK_RATE
from server.errors import ApiError, not_found
from server.library.films import Film, FilmFormat, repair
from server.library.mp4 import GrowingFile
from server.library.recording_writer import Reason, RecordingWriter
from server.library.store import Store, no_room
from server.metrics import Metrics

logger = logging.getLogger("livereel.store")

PREFIX = "rec_"
MAX_RUNNING = 32
MAX_RECORDINGS = 4096
"""Recordings that are kept, whatever their size."""
SAVE_SECONDS = 5.0
"""How often the figures of running recordings are saved: they are all that is left of them if the server is killed."""

STOP_SECONDS = 3.0
"""How long recordings may take to finish by themselves when the server ends."""

Status = Literal["recording", "completed", "failed"]


class Recording(msgspec.Struct, kw_only=True):
    """The record of one recording, saved beside its file. Times are unix times, `expires_at` by the store's clock."""

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
    """Bytes of the file that can be read now."""
    ended_at: float | None = None
    expires_at: float | None = None
    reason: Reason | Literal["server_restarted"] | None = None

    @property
    def suffix(self) -> str:
        """The suffix of its file."""
        return f".{self.format}"

    def finish(self, reason: Reason | Literal["server_restarted"], now: float, keep_seconds: float) -> None:
        """End the recording, which is kept for `keep_seconds`. It has failed if its file has no frames."""
        self.status = "completed" if self.frames else "failed"
        self.reason, self.ended_at, self.expires_at = reason, now, now + keep_seconds


class Recorder:
    """The recordings of one gateway."""

    def __init__(self, store: Store, metrics: Metrics) -> None:
        self._store = store
        self._metrics = metrics
        self._recordings: dict[str, Recording] = {}
        self._writers: dict[str, RecordingWriter] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._saved_at = 0.0

    def load(self) -> None:
        """Read the recordings that an earlier server left in the store; those that were running end. Raises OSError."""
        for id, recording in self._store.records(PREFIX, Recording):
            self._recordings[id] = recording
            if recording.expires_at is not None:
                recording.expires_at = self._store.latest_expiry(recording.expires_at)
            if recording.status == "recording":
                film = self._repair(recording)
                recording.frames, recording.seconds, recording.size = film.frames, film.seconds, film.size
                self._finish(recording, "server_restarted")

    async def stop(self) -> None:
        """Wait until the last file is closed. The streams have ended before."""
        if self._tasks:
            await asyncio.wait(self._tasks.values(), timeout=STOP_SECONDS)
        for writer in list(self._writers.values()):
            writer.finish("stream_ended")
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def begin(
        self, stream: str, owner: str | None, format: FilmFormat, fps: int, *, alpha: bool = False
    ) -> tuple[Recording, RecordingWriter]:
        """Start a recording of the stream with this id; returns it and the writer that takes its frames.

        Raises `ApiError` if there is no room, or too many recordings are kept or running.
        """
        self._store.check_room()
        if len(self._recordings) >= MAX_RECORDINGS:
            raise ApiError(507, "storage_full", f"The server keeps at most {MAX_RECORDINGS} recordings: delete some.")
        if len(self._writers) >= MAX_RUNNING:
            message = f"{MAX_RUNNING} recordings run at once, and no more: stop one first."
            raise ApiError(429, "too_many_recordings", message, headers={"Retry-After": "10"})
        id = PREFIX + secrets.token_hex(16)
        now = time.time()
        recording = Recording(id=id, stream=stream, format=format, alpha=alpha, created_at=now, owner=owner)
        try:
            path = self._store.create(id, recording.suffix)
            self._store.save_record(id, recording)
        except OSError as error:
            self._store.discard(id)
            raise no_room(error) from None
        writer = self._writers[id] = RecordingWriter(
            format, fps, GrowingFile(path), lambda: self._store.full, alpha=alpha
        )
        self._recordings[id] = recording
        self._metrics.recordings.inc()
        self._tasks[id] = asyncio.create_task(self._run(recording, writer), name=f"recording {id}")
        return recording, writer

    def _repair(self, recording: Recording) -> Film:
        try:
            return repair(self.path(recording), recording.format)
        except OSError as error:
            logger.error("the film of %s cannot be read: %s", recording.id, error)
            return Film()

    async def _run(self, recording: Recording, writer: RecordingWriter) -> None:
        reason = await writer.run()
        del self._writers[recording.id], self._tasks[recording.id]
        self._metrics.recordings.dec()
        self._metrics.frames_dropped.labels("slow_recorder").inc(writer.lost)
        _update_figures(recording, writer)
        self._finish(recording, reason)
        writer.growth.end(complete=recording.status == "completed")

    def _finish(self, recording: Recording, reason: Reason | Literal["server_restarted"]) -> None:
        recording.finish(reason, time.time(), self._store.keep_seconds)
        recording.expires_at = self._store.expiry()
        if recording.id in self._recordings:
            self._store.update_record(recording.id, recording)

    def _check_file(self, recording: Recording, *, listed: bool = False) -> None:
        """Note if the file has been removed by hand; see `Store.lacks` for `listed`."""
        if recording.status == "failed" or not self._store.lacks(recording.id, recording.suffix, listed=listed):
            return
        if writer := self._writers.get(recording.id):
            writer.finish("file_removed")
            return
        recording.status, recording.reason = "failed", "file_removed"
        recording.frames, recording.seconds, recording.size = 0, 0.0, 0
        self._store.update_record(recording.id, recording)

    def get(self, id: str) -> Recording:
        """The recording of this id, with figures as of now. Raises `ApiError`."""
        if (recording := self._recordings.get(id)) is None:
            raise not_found("recording")
        self._check_file(recording)
        return self._updated(recording)

    def _updated(self, recording: Recording) -> Recording:
        if writer := self._writers.get(recording.id):
            _update_figures(recording, writer)
        return recording

    def growth(self, recording: Recording) -> GrowingFile | None:
        """The growing file of a running recording; None for any other."""
        writer = self._writers.get(recording.id)
        return writer.growth if writer else None

    def path(self, recording: Recording) -> Path:
        """Where its file is."""
        return self._store.path(recording.id, recording.suffix)

    def owner(self, id: str) -> str | None:
        """The owner of the recording; None also if there is no recording of this id."""
        recording = self._recordings.get(id)
        return recording.owner if recording else None

    def all(self) -> list[Recording]:
        """Every recording that is kept, the newest first."""
        return sorted(map(self._updated, self._recordings.values()), key=lambda recording: -recording.created_at)

    async def end(self, recording: Recording) -> None:
        """Stop the recording and wait until its file is complete. One that is over stays as it is."""
        if writer := self._writers.get(recording.id):
            writer.finish("stopped")
            await asyncio.wait([self._tasks[recording.id]])

    async def delete(self, recording: Recording) -> None:
        """Stop the recording, forget it, and delete its file. Raises `ApiError` if it cannot be deleted; it stays."""
        self._recordings.pop(recording.id, None)
        await self.end(recording)
        try:
            self._store.remove(recording.id)
        except OSError as error:
            self._recordings[recording.id] = recording
            raise no_room(error) from None

    def expire(self) -> None:
        """Delete the recordings that were kept for long enough, note removed files, and now and then save the figures
        of running recordings."""
        now = self._store.clock.now()
        due = now - self._saved_at >= SAVE_SECONDS
        self._saved_at = now if due else self._saved_at
        for recording in list(self._recordings.values()):
            if recording.expires_at is not None and recording.expires_at <= now:
                if self._store.discard(recording.id):
                    del self._recordings[recording.id]
                continue
            self._check_file(recording, listed=True)
            if due and recording.id in self._writers:
                self._store.update_record(recording.id, self._updated(recording))

    def describe(self, recording: Recording) -> dict[str, Any]:
        """The recording object of the API."""
        expires_at = None if recording.expires_at is None else self._store.clock.shown(recording.expires_at)
        return recording_object(recording, expires_at)


def recording_object(recording: Recording, expires_at: float | None) -> dict[str, Any]:
    """The recording object of the API. `expires_at` is by the machine's clock."""
    return {
        "id": recording.id,
        "object": "recording",
        "stream_id": recording.stream,
        "status": recording.status,
        "format": recording.format,
        "alpha": recording.alpha,
        "created_at": recording.created_at,
        "ended_at": recording.ended_at,
        "expires_at": expires_at,
        "ended_reason": recording.reason,
        "frames": recording.frames,
        "frames_lost": recording.lost,
        "duration_s": recording.seconds,
        "bytes": recording.size,
    }


def _update_figures(recording: Recording, writer: RecordingWriter) -> None:
    """What is recorded so far; after the end, what the file holds."""
    recording.frames, recording.lost, recording.size = writer.frames, writer.lost, writer.growth.size
    recording.seconds = (writer.ended_at - writer.began_at) / CLOCK_RATE
    if writer.film and writer.film.frames != writer.frames:
        recording.frames, recording.seconds = writer.film.frames, writer.film.seconds
