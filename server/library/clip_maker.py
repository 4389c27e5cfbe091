"""All clips: made one after the other, of what the live streams leave of the engine, and kept in the store for a while.

Everything here runs on the event loop; encoding and writing are in a thread. A clip that is being made owns a task.
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
from server.auth.keys import Key
from server.backends.base import EngineEvent, Lost
from server.errors import ApiError, busy, not_found, shutting_down
from server.library.clip import Clip, Failure, Status, Take, UnexpectedError
from server.library.mp4 import ClipFile, Growth, webp
from server.library.store import Store, no_room
from server.metrics import Metrics
from server.streams import admission
from server.streams.engine_link import EngineLink
from server.streams.vocabulary import ignored_words

logger = logging.getLogger("livereel.clips")
T = TypeVar("T")

PREFIX = "video_"
FILM, STILL, START = ".mp4", ".webp", ".start"
MAX_QUEUED = 64
"""Clips that may wait, besides one for each owner."""
MAX_CLIPS = 4096
"""That are kept, whatever their size."""
TAKES = 2
"""An engine that dies over a clip is replaced, and the clip tried once more."""

RESTARTED = Failure("server_restarted", "The server stopped before the clip was done: create it again.", True)
SHUTTING_DOWN = Failure("shutting_down", "The server was shut down before the clip was done: create it again.", True)
REVOKED = Failure("revoked", "The key that the clip was made with was taken away.", False)
FULL = Failure("storage_full", "The server has no room left for clips: delete some, and create it again.", True)
LOST = Failure("engine_failed", f"The engine failed {TAKES} times over this clip: create it again.", True)
INTERNAL = Failure("internal_error", "The server failed to record the clip.", True)


class _FailedError(Exception):
    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.code)
        self.failure = failure


class _LostError(Exception):
    """The engine died meanwhile."""


@dataclass(slots=True, eq=False)
class _Work:
    """What belongs to a clip that is being made."""

    growth: Growth
    task: asyncio.Task[None] | None = None
    inbox: asyncio.Queue[tuple[EngineEvent, bytes]] = field(default_factory=asyncio.Queue)
    """Of the engine: a chunk at most, and a few words. It gets no further credit before the chunk is taken out."""


class Clips:
    """All clips of one gateway; `Registry` owns it, and passes on what the engine says."""

    def __init__(self, engine: EngineLink, store: Store, metrics: Metrics) -> None:
        self._engine = engine
        self._store = store
        self._metrics = metrics
        self._clips: dict[str, Clip] = {}
        self._work: dict[str, _Work] = {}
        self._keys: dict[str, int] = {}
        """Serials of the keys of those that are not over."""
        self._admission = admission.Admission(MAX_QUEUED)
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="clip")
        self._engine_up = asyncio.Event()
        self._closing: set[asyncio.Task[None]] = set()
        self._open = True

    def load(self) -> None:
        """Take over what the store has from an earlier server. Raises OSError."""
        for id, clip in self._store.records(PREFIX, Clip):
            self._clips[id] = clip
            if not clip.status.over:
                clip.finish(time.time(), self._store.keep_seconds, RESTARTED)
                self._store.update_record(id, clip)

    async def stop(self) -> None:
        """After `end`: wait until the last file is closed."""
        await asyncio.gather(*self._closing, return_exceptions=True)
        self._executor.shutdown()

    def drain(self) -> None:
        """Take no new clip, and begin none."""
        self._open = False

    @property
    def recording(self) -> bool:
        """Whether a clip is being made."""
        return bool(self._work)

    def end(self) -> None:
        """Whatever is not done by now fails."""
        self._open = False
        for clip in self._unfinished():
            self._finish(clip, SHUTTING_DOWN)

    # what clients ask for

    async def create(self, clip: Clip, picture: bytes = b"", *, key: Key | None = None) -> None:
        """Take a clip up: it is made when those before it are. Raises `ApiError` when it cannot be kept or made."""
        self._store.check_room()
        if len(self._clips) >= MAX_CLIPS:
            raise ApiError(507, "storage_full", f"The server keeps at most {MAX_CLIPS} clips: delete some.")
        owner, priority = (key.owner, key.priority) if key else (None, 1)
        clip.owner = owner
        try:
            if picture:
                await asyncio.to_thread(self._store.save, clip.id, START, picture)
            self._store.save_record(clip.id, clip)
        except OSError as error:
            self._store.remove(clip.id)
            raise no_room(error) from None
        refused = None if self._open else shutting_down()
        if refused is None and (
            refusal := self._admission.request(clip.id, clip.model, time.monotonic(), owner=owner, priority=priority)
        ):
            refused = busy(refusal.retry_after)
        if refused is not None:
            self._store.remove(clip.id)
            raise refused
        self._clips[clip.id] = clip
        if key is not None:
            self._keys[clip.id] = key.serial
        self._admit()

    def get(self, id: str) -> Clip:
        """The clip of this id. Raises `ApiError`."""
        if (clip := self._clips.get(id)) is None:
            raise not_found("video")
        return clip

    def owner(self, id: str) -> str | None:
        """Whose the clip is; None also when there is none."""
        clip = self._clips.get(id)
        return clip.owner if clip else None

    def all(self) -> list[Clip]:
        """Every clip that is kept, in the order in which they were asked for."""
        return sorted(self._clips.values(), key=lambda clip: clip.created_at)

    def position(self, clip: Clip) -> int | None:
        """Its place in the queue, where 1 is next; None when it does not wait."""
        place = self._admission.places(time.monotonic()).get(clip.id)
        return place.position if place else None

    def growth(self, clip: Clip) -> Growth | None:
        """The file of a clip that is being made; None when it is not, or not any more."""
        work = self._work.get(clip.id)
        return work.growth if work else None

    def file(self, clip: Clip, suffix: str) -> Path:
        """Where the film or the still of a clip is."""
        return self._store.path(clip.id, suffix)

    def picture(self, clip: Clip) -> bytes:
        """What the clip goes on from. Raises OSError."""
        return self._store.path(clip.id, START).read_bytes() if clip.picture else b""

    async def delete(self, clip: Clip) -> None:
        """Forget the clip and delete its files, done or not."""
        self._clips.pop(clip.id, None)
        work = self._work.get(clip.id)
        self._leave(clip)
        if work is not None and work.task is not None:
            await asyncio.wait([work.task])  # it may be writing
        self._store.remove(clip.id)

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], None]]]:
        """The clips that are not finished; see `KeyHolder`."""
        for clip in self._unfinished():
            yield self._keys.get(clip.id), partial(self._finish, clip, REVOKED)

    def expire(self, now: float) -> None:
        """Delete what was kept for long enough."""
        for clip in list(self._clips.values()):
            if clip.expires_at is not None and clip.expires_at <= now:
                del self._clips[clip.id]
                self._store.remove(clip.id)

    # the engine

    def on_ready(self, ready: wire.Ready) -> None:
        """An engine process is up."""
        # One clip at a time, so each takes all that there is for clips.
        self._admission.set_costs({info.name: 1.0 for info in ready.models})
        for clip in self._unfinished():
            if clip.model not in self._engine.models:
                message = "The engine no longer has this model."
                self._finish(clip, Failure("model_not_found", message, False))
        self._engine_up.set()
        self._admit()

    def on_lost(self, lost: Lost) -> None:
        """It is gone."""
        self._engine_up.clear()
        if not lost.retrying:
            self._admission.set_costs({})
            for clip in self._unfinished():
                self._finish(clip, Failure("engine_failed", f"The clip cannot be made: {lost.reason}.", True))

    # making a clip

    def _admit(self) -> None:
        if not self._open:
            return
        for id in self._admission.admit():
            clip = self._clips[id]
            clip.status = Status.IN_PROGRESS
            work = self._work[id] = _Work(Growth(self._store.path(id, FILM)))
            work.task = asyncio.create_task(self._make(clip, work), name=f"clip {id}")
            self._closing.add(work.task)
            work.task.add_done_callback(self._closing.discard)

    async def _make(self, clip: Clip, work: _Work) -> None:
        film: ClipFile | None = None
        failure: Failure | None = None
        began = time.monotonic()
        try:
            film = await self._in_thread(
                lambda: ClipFile(self._store.create(clip.id, FILM), clip.width, clip.height, clip.fps)
            )
            await self._record(clip, work, film)
            await self._in_thread(film.finish)
        except _FailedError as error:
            failure = error.failure
        except OSError as error:
            logger.error("clip %s could not be written: %s", clip.id, error)
            failure = FULL
        except Exception:
            logger.exception("clip %s failed in the gateway", clip.id)
            failure = INTERNAL
        finally:
            self._engine.close(clip.id)
            if film is not None:
                await self._in_thread(film.close)
        if failure is None:
            self._metrics.clip_seconds.observe(time.monotonic() - began)
            work.growth.size = film.size if film else 0
        self._finish(clip, failure)

    async def _record(self, clip: Clip, work: _Work, film: ClipFile) -> None:
        picture = await asyncio.to_thread(self.picture, clip)
        for take in range(TAKES):
            await self._engine_up.wait()
            try:
                await self._take(clip, work, film, picture)
                return
            except _LostError:
                logger.warning("clip %s lost its engine, in take %d of %d", clip.id, take + 1, TAKES)
        raise _FailedError(LOST)

    async def _take(self, clip: Clip, work: _Work, film: ClipFile, picture: bytes) -> None:
        """From the start. Frames that are in the file already are made again and left out: they come out the same."""
        take, size = Take(clip, self._engine.models[clip.model]), clip.width * clip.height * 3
        self._engine.open(take.open(picture), lambda message, pixels: work.inbox.put_nowait((message, pixels)))
        self._request(take)
        while clip.recorded < clip.frames:
            message, pixels = await work.inbox.get()
            match message:
                case wire.Frames():
                    try:
                        wanted = take.accept(message)
                    except UnexpectedError as error:
                        logger.error("clip %s: %s", clip.id, error)
                        what = "The engine came back with another picture size, or left out a chunk."
                        raise _FailedError(Failure("engine_changed", what, True)) from None
                    if self._store.full:
                        raise _FailedError(FULL)
                    self._request(take)  # the engine goes on while this chunk is encoded
                    view = memoryview(pixels)
                    await self._keep(clip, work, film, [view[k * size : (k + 1) * size] for k in wanted])
                    self._metrics.chunk_seconds.observe(message.gen_seconds)
                case wire.Fault():
                    logger.error("clip %s failed in the engine: %s: %s", clip.id, message.code, message.message)
                    raise _FailedError(Failure(message.code, message.message, False))
                case wire.Ended():
                    raise _FailedError(Failure("engine_closed", "The engine ended the clip too early.", True))
                case Lost():
                    raise _LostError

    async def _keep(self, clip: Clip, work: _Work, film: ClipFile, frames: list[memoryview]) -> None:
        if frames and not clip.recorded:
            still = await self._in_thread(lambda: webp(frames[0], clip.width, clip.height))
            self._store.save(clip.id, STILL, still)
        await self._in_thread(lambda: film.add_rgb(frames))
        clip.recorded += len(frames)
        work.growth.grow(film.size)

    def _request(self, take: Take) -> None:
        for message in take.next():
            self._engine.send(message)

    def _finish(self, clip: Clip, failure: Failure | None) -> None:
        clip.finish(time.time(), self._store.keep_seconds, failure)
        self._metrics.clips.labels(clip.status).inc()
        self._leave(clip)
        self._store.update_record(clip.id, clip)
        if failure:
            # What is there of it is no whole film, and nobody can ask for it.
            self._store.path(clip.id, FILM).unlink(missing_ok=True)

    def _leave(self, clip: Clip) -> None:
        """It is over, or not wanted any more: the next one's turn."""
        if work := self._work.pop(clip.id, None):
            work.growth.end(complete=clip.status is Status.COMPLETED)
            if work.task is not None and work.task is not asyncio.current_task():
                work.task.cancel()
        self._keys.pop(clip.id, None)
        self._admission.release(clip.id)
        self._admit()

    def _unfinished(self) -> list[Clip]:
        return [clip for clip in self._clips.values() if not clip.status.over]

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)


def new_id() -> str:
    """Nobody can guess it."""
    return PREFIX + secrets.token_hex(16)


def new_seed() -> int:
    return secrets.randbits(32)


def shown(clip: Clip, position: int | None, model: wire.ModelInfo | None) -> dict[str, Any]:
    """The video object of the API: OpenAI's, and all else in `extra`. `model` is None before the engine has started."""
    failure = clip.failure
    return {
        "id": clip.id,
        "object": "video",
        "model": clip.model,
        "status": clip.status.value,
        "progress": clip.progress,
        "created_at": int(clip.created_at),
        "completed_at": _whole(clip.completed_at),
        "expires_at": _whole(clip.expires_at),
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
