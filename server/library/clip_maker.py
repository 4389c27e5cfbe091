"""Makes clips, one after the other, with what the live streams leave of the engine, and keeps them for a while.

Everything here runs on the event loop; encoding and writing run in a thread. A clip that is being made owns a task.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from engine import wire
from server.aio import open_in_thread
from server.auth.keys import Key
from server.backends.base import EngineEvent, EngineLost
from server.errors import ApiError, busy, not_found, shutting_down
from server.library.clip import Attempt, Clip, Failure, Status, UnexpectedError
from server.library.mp4 import ClipWriter, GrowingFile, webp
from server.library.store import Store, no_room, out_of_space
from server.metrics import Metrics
from server.streams import admission
from server.streams.engine_link import EngineLink
from server.streams.vocabulary import ignored_words

logger = logging.getLogger("livereel.clips")
T = TypeVar("T")

PREFIX = "video_"
FILM, STILL, START = ".mp4", ".webp", ".start"
"""Suffixes of a clip's files: the film, its first frame, and the picture that it starts from."""
MAX_QUEUED = 64
"""Clips in the queue, besides one for each owner."""
MAX_CLIPS = 4096
"""Clips that are kept, whatever their size."""
ATTEMPTS = 2
"""How often a clip is tried if the engine dies while it is made."""

RESTARTED = Failure("server_restarted", "The server stopped before the clip was done: create it again.", True)
SHUTTING_DOWN = Failure("shutting_down", "The server was shut down before the clip was done: create it again.", True)
REVOKED = Failure("revoked", "The key that the clip was made with was taken away.", False)
FULL = Failure("storage_full", "The server has no room left for clips: delete some, and create it again.", True)
LOST = Failure("engine_failed", f"The engine failed {ATTEMPTS} times over this clip: create it again.", True)
REMOVED = Failure("file_removed", "The video's file was removed from the server's data folder by hand.", True)
INTERNAL = Failure("internal_error", "The server failed to record the clip.", True)


class _FailedError(Exception):
    """The clip cannot be made, for a reason that its client is told."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.code)
        self.failure = failure


class _LostError(Exception):
    """The engine died during an attempt."""


@dataclass(slots=True, eq=False)
class _Job:
    """A clip that is being made."""

    growth: GrowingFile
    task: asyncio.Task[None] | None = None
    inbox: asyncio.Queue[tuple[EngineEvent, bytes]] = field(default_factory=asyncio.Queue)
    """Messages of the engine and their pixels. It holds one chunk at most: credit for the next is sent when one is
    taken out."""


class ClipMaker:
    """The clips of one gateway."""

    def __init__(self, engine: EngineLink, store: Store, metrics: Metrics) -> None:
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._clips: dict[str, Clip] = {}
        self._jobs: dict[str, _Job] = {}
        self._keys: dict[str, int] = {}
        """Serials of the API keys of the clips that are not over."""
        self._admission = admission.Admission(MAX_QUEUED)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="clip")
        self._engine_up = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._accepting = True
        engine.listen(self)

    def load(self) -> None:
        """Read the clips that an earlier server left in the store; unfinished ones have failed. Raises OSError."""
        for id, clip in self._store.records(PREFIX, Clip):
            self._clips[id] = clip
            if clip.expires_at is not None:
                clip.expires_at = self._store.latest_expiry(clip.expires_at)
            if not clip.status.over:
                self._settle(clip, RESTARTED)

    async def stop(self) -> None:
        """Wait until the last file is closed. Follows `end`."""
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._executor.shutdown()

    def drain(self) -> None:
        """Accept no new clips, and start none that are queued."""
        self._accepting = False

    @property
    def busy(self) -> bool:
        """Whether a clip is being made."""
        return bool(self._jobs)

    def end(self) -> None:
        """Fail every clip that is not done."""
        self._accepting = False
        for clip in self._unfinished():
            self._finish(clip, SHUTTING_DOWN)

    # what clients ask for

    async def create(self, clip: Clip, picture: bytes = b"", *, key: Key | None = None) -> None:
        """Queue a clip. Raises `ApiError` if it cannot be stored, or is refused.

        `picture` is what the clip starts from, as in `wire.Open`.
        """
        self._store.check_room()
        if len(self._clips) >= MAX_CLIPS:
            raise ApiError(507, "storage_full", f"The server keeps at most {MAX_CLIPS} clips: delete some.")
        owner, priority = (key.owner, key.priority) if key else (None, 1)
        clip.owner = owner
        try:
            if picture:
                await self._save_picture(clip.id, picture)
            self._store.save_record(clip.id, clip)
        except OSError as error:
            self._store.discard(clip.id)
            raise no_room(error) from None
        refused = None if self._accepting else shutting_down()
        if refused is None and (
            refusal := self._admission.request(clip.id, clip.model, time.monotonic(), owner=owner, priority=priority)
        ):
            refused = busy(refusal.retry_after)
        if refused is not None:
            self._store.discard(clip.id)
            raise refused
        self._clips[clip.id] = clip
        if key is not None:
            self._keys[clip.id] = key.serial
        self._admit()

    async def _save_picture(self, id: str, picture: bytes) -> None:
        """Save the picture that a clip starts from; nothing of it stays if this is cancelled. Raises OSError."""
        saving = asyncio.create_task(asyncio.to_thread(self._store.save, id, START, picture))
        try:
            await asyncio.shield(saving)
        except asyncio.CancelledError:
            await asyncio.wait([saving])
            self._store.discard(id)
            raise

    def get(self, id: str) -> Clip:
        """The clip of this id. Raises `ApiError`."""
        if (clip := self._clips.get(id)) is None:
            raise not_found("video")
        self._check_file(clip)
        return clip

    def _check_file(self, clip: Clip, *, listed: bool = False) -> None:
        """Note if the film has been removed by hand; see `Store.lacks` for `listed`."""
        if clip.status is Status.COMPLETED and self._store.lacks(clip.id, FILM, listed=listed):
            clip.status, clip.failure = Status.FAILED, REMOVED
            self._store.update_record(clip.id, clip)

    def owner(self, id: str) -> str | None:
        """The owner of the clip; None also if there is no clip of this id."""
        clip = self._clips.get(id)
        return clip.owner if clip else None

    def all(self) -> list[Clip]:
        """Every clip that is kept, the oldest first."""
        return sorted(self._clips.values(), key=lambda clip: clip.created_at)

    def position(self, clip: Clip) -> int | None:
        """The clip's position in the queue, from 1; None if it is not queued."""
        queued = self._admission.positions(time.monotonic()).get(clip.id)
        return queued.position if queued else None

    def describe(self, clip: Clip) -> dict[str, Any]:
        """The video object of the API."""
        expires_at = None if clip.expires_at is None else self._store.clock.shown(clip.expires_at)
        return video_object(clip, self.position(clip), self._engine.models.get(clip.model), expires_at)

    def growth(self, clip: Clip) -> GrowingFile | None:
        """The growing file of a clip that is being made; None for any other clip."""
        job = self._jobs.get(clip.id)
        return job.growth if job else None

    def file(self, clip: Clip, suffix: str) -> Path:
        """The path of the clip's `FILM` or `STILL`."""
        return self._store.path(clip.id, suffix)

    def picture(self, clip: Clip) -> bytes:
        """The picture that the clip starts from; empty without one. Raises OSError, as when it was removed by hand."""
        return self._store.path(clip.id, START).read_bytes() if clip.picture else b""

    async def delete(self, clip: Clip) -> None:
        """Forget the clip and delete its files, whether it is done or not. Raises `ApiError` if they cannot be deleted;
        the clip stays."""
        self._clips.pop(clip.id, None)
        job = self._jobs.get(clip.id)
        self._leave(clip)
        if job is not None and job.task is not None:
            await asyncio.wait([job.task])  # it may be writing
        try:
            self._store.remove(clip.id)
        except OSError as error:
            self._clips[clip.id] = clip
            if not clip.status.over:
                self._settle(clip, INTERNAL)
            raise no_room(error) from None

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], None]]]:
        """The clips that are not finished; see `KeyHolder`."""
        for clip in self._unfinished():
            yield self._keys.get(clip.id), partial(self._finish, clip, REVOKED)

    def expire(self) -> None:
        """Delete the clips that were kept for long enough, and note the films that were removed by hand."""
        now = self._store.clock.now()
        for clip in list(self._clips.values()):
            if clip.expires_at is None or clip.expires_at > now:
                self._check_file(clip, listed=True)
            elif self._store.discard(clip.id):
                del self._clips[clip.id]

    # the engine

    def on_ready(self, ready: wire.Ready) -> None:
        """Make the clips that are queued, but for those whose model is gone."""
        # One clip at a time: each costs all that there is for clips.
        self._admission.set_costs({info.name: 1.0 for info in ready.models})
        for clip in self._unfinished():
            if clip.model not in self._engine.models:
                message = "The engine no longer has this model."
                self._finish(clip, Failure("model_not_found", message, False))
        self._engine_up.set()
        self._admit()

    def on_lost(self, lost: EngineLost) -> None:
        """Fail every clip, unless a new engine process is on its way."""
        self._engine_up.clear()
        if not lost.retrying:
            self._admission.set_costs({})
            for clip in self._unfinished():
                self._finish(clip, Failure("engine_failed", f"The clip cannot be made: {lost.reason}.", True))

    # making a clip

    def _admit(self) -> None:
        """Start to make the next clip, if none is being made."""
        if not self._accepting:
            return
        for id in self._admission.admit():
            clip = self._clips[id]
            clip.status = Status.IN_PROGRESS
            job = self._jobs[id] = _Job(GrowingFile(self._store.path(id, FILM)))
            job.task = asyncio.create_task(self._make(clip, job), name=f"clip {id}")
            self._tasks.add(job.task)
            job.task.add_done_callback(self._tasks.discard)

    async def _make(self, clip: Clip, job: _Job) -> None:
        """Make the clip, and finish it however that ends."""
        film: ClipWriter | None = None
        failure: Failure | None = None
        began = time.monotonic()
        try:
            path = self._store.create(clip.id, FILM)
            film = await open_in_thread(
                lambda: ClipWriter(path, clip.width, clip.height, clip.fps), ClipWriter.close, self._executor
            )
            await self._record(clip, job, film)
            await self._in_thread(film.finish)
        except _FailedError as error:
            failure = error.failure
        except OSError as error:
            logger.error("clip %s could not be written: %s", clip.id, error)
            failure = FULL if out_of_space(error) else INTERNAL
        except Exception:
            logger.exception("clip %s failed in the gateway", clip.id)
            failure = INTERNAL
        finally:
            self._engine.close(clip.id)
            if film is not None:
                await self._close(clip, film)
        if failure is None:
            self._metrics.clip_seconds.observe(time.monotonic() - began)
            job.growth.size = film.size if film else 0
        self._finish(clip, failure)

    async def _close(self, clip: Clip, film: ClipWriter) -> None:
        """Close the film's file, if that has not been done. If that fails, it is closed all the same."""
        try:
            await self._in_thread(film.close)
        except (OSError, RuntimeError) as error:
            logger.error("the film of clip %s could not be closed: %s", clip.id, error)

    async def _record(self, clip: Clip, job: _Job, film: ClipWriter) -> None:
        """Write every frame of the clip, in as many attempts as that takes."""
        picture = await asyncio.to_thread(self.picture, clip)
        for number in range(ATTEMPTS):
            await self._engine_up.wait()
            try:
                await self._attempt(clip, job, film, picture)
                return
            except _LostError:
                logger.warning("clip %s lost its engine, in attempt %d of %d", clip.id, number + 1, ATTEMPTS)
        raise _FailedError(LOST)

    async def _attempt(self, clip: Clip, job: _Job, film: ClipWriter, picture: bytes) -> None:
        """Generate the clip from its start. Frames that are in the file already come out the same and are skipped."""
        attempt, size = Attempt(clip, self._engine.models[clip.model]), clip.width * clip.height * 3
        self._engine.open(attempt.open(picture), lambda message, pixels: job.inbox.put_nowait((message, pixels)))
        self._request_chunk(attempt)
        while clip.recorded < clip.frames:
            message, pixels = await job.inbox.get()
            match message:
                case wire.Frames():
                    try:
                        wanted = attempt.accept(message)
                    except UnexpectedError as error:
                        logger.error("clip %s: %s", clip.id, error)
                        what = "The engine came back with another picture size, or left out a chunk."
                        raise _FailedError(Failure("engine_changed", what, True)) from None
                    if self._store.full:
                        raise _FailedError(FULL)
                    self._request_chunk(attempt)  # the engine continues while this chunk is encoded
                    view = memoryview(pixels)
                    await self._write(clip, job, film, [view[k * size : (k + 1) * size] for k in wanted])
                    self._metrics.chunk_seconds.observe(message.gen_seconds)
                case wire.Fault():
                    logger.error("clip %s failed in the engine: %s: %s", clip.id, message.code, message.message)
                    raise _FailedError(Failure(message.code, message.message, False))
                case wire.Ended():
                    raise _FailedError(Failure("engine_closed", "The engine ended the clip too early.", True))
                case EngineLost():
                    raise _LostError

    def _request_chunk(self, attempt: Attempt) -> None:
        for message in attempt.next():
            self._engine.send(message)

    async def _write(self, clip: Clip, job: _Job, film: ClipWriter, frames: list[memoryview]) -> None:
        """Add frames of height x width x 3 bytes to the film; the first of the clip becomes its still as well."""
        if frames and not clip.recorded:
            still = await self._in_thread(lambda: webp(frames[0], clip.width, clip.height))
            self._store.save(clip.id, STILL, still)
        await self._in_thread(lambda: film.add_rgb(frames))
        clip.recorded += len(frames)
        job.growth.grow(film.size)

    def _finish(self, clip: Clip, failure: Failure | None) -> None:
        """Complete the clip, or fail it."""
        self._settle(clip, failure)
        self._metrics.clips.labels(clip.status).inc()
        self._leave(clip)

    def _settle(self, clip: Clip, failure: Failure | None) -> None:
        """Bring the clip's record to its end, and delete an incomplete film, which cannot be asked for."""
        clip.finish(time.time(), self._store.keep_seconds, failure)
        clip.expires_at = self._store.expiry()
        self._store.update_record(clip.id, clip)
        if failure:
            self._store.discard(clip.id, FILM)

    def _leave(self, clip: Clip) -> None:
        """Take the clip out of the queue, or stop making it; the next one may start."""
        if job := self._jobs.pop(clip.id, None):
            job.growth.end(complete=clip.status is Status.COMPLETED)
            if job.task is not None and job.task is not asyncio.current_task():
                job.task.cancel()
        self._keys.pop(clip.id, None)
        self._admission.release(clip.id)
        self._admit()

    def _unfinished(self) -> list[Clip]:
        return [clip for clip in self._clips.values() if not clip.status.over]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def new_id() -> str:
    """A new clip's id, which nobody can guess."""
    return PREFIX + secrets.token_hex(16)


def new_seed() -> int:
    """A random seed for a clip whose request names none."""
    return secrets.randbits(32)


def video_object(
    clip: Clip, position: int | None, model: wire.ModelInfo | None, expires_at: float | None
) -> dict[str, Any]:
    """The video object of the API: OpenAI's fields, and all others in `extra`.

    `position` is that in the queue; `model` is None before the engine has started; `expires_at` is by the machine's
    clock.
    """
    failure = clip.failure
    return {
        "id": clip.id,
        "object": "video",
        "model": clip.model,
        "status": clip.status.value,
        "progress": clip.progress,
        "created_at": int(clip.created_at),
        "completed_at": _whole(clip.completed_at),
        "expires_at": _whole(expires_at),
        "prompt": clip.prompt,
        "size": f"{clip.width}x{clip.height}",
        "seconds": clip.seconds,
        "remixed_from_video_id": clip.remixed_from,
        "error": {"code": failure.code, "message": failure.message} if failure else None,
        "extra": {
            "seed": clip.seed,
            "fps": clip.fps,
            "frames": clip.frames,
            "frames_recorded": clip.recorded,
            "queue_position": position,
            "prompts": [msgspec.structs.asdict(each) for each in clip.prompts],
            "ignored_words": ignored_words(model, *(each.prompt for each in clip.prompts)),
            "retryable": failure.retryable if failure else None,
        },
    }


def _whole(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds)
