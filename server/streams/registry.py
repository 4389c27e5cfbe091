"""All live streams of the gateway: opens them, queues them, keeps their records for a while, and ends them all.

Everything here runs on the event loop and never blocks it. What a stream does between its start and its end is in
`server.streams.stream`.
"""

import asyncio
import logging
import secrets
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from engine import wire
from server.auth.keys import Key
from server.backends.base import Backend, EngineLost
from server.config import Config
from server.errors import ApiError, busy, shutting_down, stream_not_found
from server.library.clip import Change
from server.library.clip_maker import ClipMaker
from server.library.recorder import Recorder
from server.library.store import CLOCK_SECONDS, Store
from server.media.frames import PictureEncoder
from server.metrics import Metrics
from server.streams import admission
from server.streams.engine_link import EngineLink
from server.streams.session import Session, State
from server.streams.stream import Services, Stream
from server.tracing import Tracing
from server.uploads.queue import UploadQueue

logger = logging.getLogger("livereel.streams")

RECORD_SECONDS = 600.0
"""How long a stream can be asked about after its end."""
MAX_RECORDS = 256
"""Ended streams that can be asked about, at most."""
MAX_LAST_FRAMES = 16
"""Ended streams that still show their last frame: the newest."""
HOUSEKEEPING_SECONDS = 0.5
RETRY_SECONDS = 60
"""When to ask again after the engine was given up: it is tried again that often at least."""
SHUTTING_DOWN = "shutting_down"
"""Why a stream ends with the gateway."""


class Registry:
    """The streams of one gateway, and the clips and recordings beside them. Start it once, stop it once."""

    def __init__(self, config: Config, backend: Backend, metrics: Metrics, tracing: Tracing) -> None:
        self._config = config
        self._metrics = metrics
        self._store = Store(config.data, round(config.data_limit_gb * 1e9), config.keep_hours * 3600)
        self.engine = EngineLink(backend, metrics)
        self.engine.listen(self)
        self.clips = ClipMaker(self.engine, self._store, metrics)
        self.recorder = Recorder(self._store, metrics)
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="encoder")
        self._services = Services(config, self.engine, PictureEncoder(self._executor, metrics), metrics, tracing)
        self._streams: dict[str, Stream] = {}
        self._admission = admission.Admission(config.queue_limit)
        self._housekeeper: asyncio.Task[None] | None = None
        self.uploads = UploadQueue()
        self._draining = False
        self._store_lost = False
        self._over_since: dict[str, float] = {}
        """When each stream that is over was first seen so, on the monotonic clock."""

    # the gateway's life

    def open_data(self) -> None:
        """Lock the folder of clips and recordings for this process. Raises OSError if that fails."""
        self._store.open()

    async def start(self) -> None:
        """Start the engine, without waiting for it. Raises OSError as `open_data` does."""
        self.open_data()
        self.clips.load()
        self.recorder.load()
        await self.engine.start()
        self._housekeeper = asyncio.create_task(self._keep_house(), name="housekeeper")

    async def stop(self) -> None:
        """End every stream, then the engine. Safe to call again."""
        self.drain(0)
        self.end()
        if self._housekeeper is None:
            return
        self._housekeeper.cancel()
        await asyncio.gather(self._housekeeper, return_exceptions=True)
        self._housekeeper = None
        try:
            await self.engine.stop()
        finally:  # films are finished whatever fails before
            await asyncio.gather(*(stream.stopped() for stream in self._streams.values()), return_exceptions=True)
            await self.clips.stop()
            await self.recorder.stop()
            self._store.close()
            self._executor.shutdown(wait=False, cancel_futures=True)

    def drain(self, seconds: float) -> None:
        """Take no new streams, end the queued ones, and tell the others' viewers how long they may still play."""
        self._draining = True
        self.clips.drain()
        for stream in self.all():
            if stream.session.state is State.QUEUED:
                stream.end(SHUTTING_DOWN)
            elif not stream.session.state.over and seconds:
                stream.publish("draining", seconds=seconds)

    @property
    def playing(self) -> bool:
        """Whether a stream is not over yet, or a clip is being made."""
        return self.clips.busy or any(not stream.session.state.over for stream in self._streams.values())

    def end(self) -> None:
        """End the streams that `drain` let play. Viewers are told before their sockets close."""
        self.engine.abandon_loras()
        self.clips.end()
        for stream in self.all():
            stream.end(SHUTTING_DOWN)

    def readiness(self) -> tuple[bool, str]:
        """Whether a stream could start now, and if not, why not."""
        if self._draining:
            return False, "the server is shutting down"
        health = self.engine.health()
        return health.ready, health.reason

    def update_gauges(self) -> None:
        """Bring the gauges of the metrics up to date."""
        streams, metrics = self._streams.values(), self._metrics
        metrics.engine_ready.set(self.readiness()[0])
        metrics.engine_load.set(self._admission.load)
        metrics.tasks.set(len(asyncio.all_tasks()))
        metrics.threads.set(threading.active_count())
        levels = (stream.quality.level for stream in streams if stream.quality and not stream.session.state.over)
        metrics.quality_level.set(sum(levels))
        metrics.stored_bytes.set(self._store.used_bytes)
        metrics.count_streams(Counter(stream.session.state for stream in streams))

    # opening and finding streams

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return self._config.model

    def model_info(self, model: str | None, param: str = "image") -> wire.ModelInfo:
        """What the engine says of a model. Raises `ApiError` if there is no such model or the engine is not up yet.

        `param` is the request's field that depends on the model.
        """
        name = self._model_name(model)
        if name not in self.engine.models:
            message = f"The engine is still starting, and only then is known what size `{param}` gets: try again soon."
            raise ApiError(503, "engine_starting", message, param=param, headers={"Retry-After": "5"})
        return self.engine.models[name]

    def check_open(self) -> None:
        """Raises `ApiError` if nothing new can start, neither now nor when the engine is up."""
        if self._draining:
            raise shutting_down()
        if self.engine.failure:
            message = f"No stream can start: {self.engine.failure}."
            raise ApiError(503, "engine_failed", message, headers={"Retry-After": str(RETRY_SECONDS)})

    def open(
        self,
        prompt: str,
        model: str | None,
        seed: int | None,
        duration_s: float | None,
        picture: bytes = b"",
        *,
        prompts: Sequence[Change] = (),
        key: Key | None = None,
    ) -> Stream:
        """Create a stream, which starts when the engine has room for it. `picture` is as in `wire.Open`.

        `prompts` are scheduled changes, `at_s` rising.

        Owners of keys share the engine fairly, and each key limits how many streams its owner may have at once. Raises
        `ApiError` if the owner has as many, or the queue is full.
        """
        self.check_open()
        session = Session(
            id=f"st_{secrets.token_hex(12)}",
            model=self._model_name(model),
            prompt=prompt,
            seed=secrets.randbits(32) if seed is None else seed,
            duration_s=duration_s,
            created_at=time.time(),
        )
        self._request_admission(session, key)
        stream = self._streams[session.id] = Stream(
            session,
            self._services,
            key=key,
            picture=picture,
            on_over=partial(self._on_over, session.id),
            on_end_expected=partial(self._admission.expect_end, session.id),
        )
        if info := self.engine.models.get(session.model):
            stream.configure(info)
        stream.schedule(prompts)
        self._admit()
        return stream

    def get(self, id: str) -> Stream:
        """The stream of this id, for a while after its end too. Raises `ApiError`."""
        stream = self._streams.get(id)
        if stream is None:
            raise stream_not_found()
        if stream.session.state is State.QUEUED:
            stream.audience.touch()  # a client may wait in the queue by asking now and then, without a socket
        return stream

    def all(self) -> list[Stream]:
        """Every stream whose record is kept, the oldest first."""
        return list(self._streams.values())

    def has(self, stream: Stream) -> bool:
        """Whether the stream's record is still kept."""
        return stream.session.id in self._streams

    def owner(self, id: str) -> str | None:
        """The owner of a stream, clip or recording; None also if there is none of this id."""
        stream = self._streams.get(id)
        return stream.owner if stream else self.clips.owner(id) or self.recorder.owner(id)

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], None]]]:
        """The streams and the unfinished clips; see `KeyHolder`."""
        for stream in self.all():
            yield stream.key, partial(stream.end, "revoked")
        yield from self.clips.started_with_keys()

    def _model_name(self, model: str | None) -> str:
        """The name, or the default for None. Raises `ApiError` if there is no such model."""
        model = self.default_model if model is None else model
        known = list(self.engine.models) or [self.default_model]
        if model not in known:
            message = f"There is no model of this name: `model` must be one of {', '.join(known)}."
            raise ApiError(404, "model_not_found", message, param="model")
        return model

    # admission and the queue

    def _request_admission(self, session: Session, key: Key | None) -> None:
        """Put a stream into the queue. Raises `ApiError` if it is refused."""
        owner, limit, priority = (key.owner, key.streams, key.priority) if key else (None, None, 1)
        refusal = self._admission.request(
            session.id, session.model, time.monotonic(), owner=owner, limit=limit, priority=priority
        )
        match refusal:
            case admission.OverLimit():
                self._metrics.refused.labels("stream_limit").inc()
                message = f"This key may have {refusal.limit} streams at once: end one first."
                raise ApiError(429, "stream_limit", message, headers={"Retry-After": str(refusal.retry_after)})
            case admission.Full():
                self._metrics.refused.labels("queue_full").inc()
                raise busy(refusal.retry_after)

    def _admit(self) -> None:
        """Start the streams that the engine has room for, and tell the others their positions."""
        for id in self._admission.admit():
            self._streams[id].admit()
        self._publish_queue_positions()

    def _publish_queue_positions(self) -> None:
        for id, position in self._admission.positions(time.monotonic()).items():
            self._streams[id].wait(position)

    def _on_over(self, id: str) -> None:
        """A stream has ended: its share of the engine is free for another."""
        self._admission.release(id)
        if not self._draining:
            self._admit()

    # the engine

    def on_ready(self, ready: wire.Ready) -> None:
        """Admit by what the engine's models cost, and continue the streams of an engine process that died."""
        self._admission.set_costs(
            {info.name: admission.cost(info.chunk_seconds, info.chunk_frames, info.fps) for info in ready.models},
            min((info.promised for info in ready.models), default=admission.PROMISED),
        )
        models, generation = self.engine.models, self.engine.health().generation
        for stream in self.all():
            # First of all streams: one that fails below may make room for any other.
            if info := models.get(stream.session.model):
                stream.configure(info)
        for stream in self.all():
            stream.on_engine_ready(models.get(stream.session.model), generation)
        self._admit()

    def on_lost(self, lost: EngineLost) -> None:
        """Fail every stream, unless a new engine process is on its way."""
        if lost.retrying:
            for stream in self.all():
                stream.on_engine_lost_again(lost.pause)
            return
        self._admission.set_costs({})
        for stream in self.all():
            stream.on_engine_failed(lost.reason)

    # housekeeping

    async def _keep_house(self) -> None:
        """Look after idle streams, old records and expired films, for as long as the gateway runs."""
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            try:
                for stream in self.all():
                    stream.check_demand(time.monotonic())
                self._expire_records(time.monotonic())
                self._publish_queue_positions()
                await self._tidy_library()
            except Exception:
                logger.exception("housekeeping failed, and is tried again")

    def _expire_records(self, now: float) -> None:
        """Forget streams that ended long ago, and the last frames of all but the newest. `now` is monotonic: the
        machine's clock may be set."""
        ended = [stream for stream in self._streams.values() if stream.session.state.over]
        self._over_since = {id: self._over_since.get(id, now) for id in (stream.session.id for stream in ended)}
        surplus = max(0, len(ended) - MAX_RECORDS)
        for index, stream in enumerate(ended):
            if index < surplus or now - self._over_since[stream.session.id] > RECORD_SECONDS:
                del self._streams[stream.session.id]
        for stream in ended[:-MAX_LAST_FRAMES]:
            stream.audience.on_screen = None

    async def _tidy_library(self) -> None:
        try:
            await asyncio.to_thread(self._store.measure)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread can be started
            # Streams must be looked after even if the folder is lost.
            if not self._store_lost:
                logger.error("the data folder cannot be read: %s", error)
            self._store_lost = True
        else:
            self._store_lost = False
        self.clips.expire()
        self.recorder.expire()
        self._store.save_clock(every=CLOCK_SECONDS)
