"""The live streams: does what session, admission and pacing decide, between the engine and the viewers.

Everything here runs on the event loop and never blocks it. A stream owns one task, which plays it; the collection
owns one more, which looks after idle streams and old records.
"""

import asyncio
import contextlib
import contextvars
import dataclasses
import itertools
import logging
import math
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Container, Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import msgspec

from engine import wire
from server.aio import wait_until
from server.auth.keys import Key
from server.backends.base import Backend, EngineEvent, Lost
from server.config import Config
from server.errors import (
    ApiError,
    busy,
    engine_unavailable,
    shutting_down,
    stream_ended,
    stream_not_found,
    too_many_viewers,
)
from server.library.clip_maker import Clips
from server.library.recorder import Recorder, Recording
from server.library.recording_writer import FilmFormat, Tape
from server.library.store import Store
from server.media.broadcast import Broadcast
from server.media.encoder import Codec
from server.media.frames import DISCONTINUITY, Encoder, Format, Frame, Picture
from server.media.matte import Matte
from server.media.viewer import Viewer
from server.metrics import Metrics
from server.streams import admission
from server.streams import playback as pacing
from server.streams.quality import Quality
from server.streams.session import Event, Session, State
from server.tracing import Chunks, Tracing

logger = logging.getLogger("livereel.streams")

RECORD_SECONDS = 600.0
"""How long a stream can still be asked about after its end."""
MAX_RECORDS = 256
MAX_LAST_FRAMES = 16
"""Streams that are over and still show their last frame: the newest."""
MAX_VIEWERS = 256
"""Per stream."""
STEER_SECONDS = 15.0
"""How long the engine may take to say when a prompt change takes effect."""
LORA_SECONDS = 60.0
"""How long the engine may take to read LoRAs and to apply them."""
HOUSEKEEPING_SECONDS = 0.5
SHUTTING_DOWN = "shutting_down"
"""Why a stream ends with the gateway."""


@dataclass(slots=True)
class _Steer:
    """A prompt change on its way: sent, then promised for a chunk, then on screen."""

    prompt: str
    transition: wire.Transition
    asked_at: float
    chunk: asyncio.Future[int]


@dataclass(slots=True, eq=False)
class Stream:
    """One stream with everything that belongs to it. `session` is what clients see."""

    session: Session
    created: float
    """When it was asked for, on the monotonic clock."""
    unwatched_since: float
    context: contextvars.Context = field(default_factory=contextvars.copy_context)
    """Of the request that opened it: what is logged and traced of the stream belongs to that."""
    admitted_at: float = 0.0
    started_at: float = 0.0
    first_chunk_at: float = 0.0
    """When it had got so far, on the monotonic clock."""
    playback: pacing.Playback | None = None
    quality: Quality | None = None
    """None as long as `playback` is."""
    max_frames: int | None = None
    opened: bool = False
    """The current engine process knows the stream."""
    interrupted: bool = False
    """The engine process that knew it has died, and no other has taken over yet."""
    last: Frame | None = None
    """The frame on screen."""
    clock: int = 0
    """When it was shown, in 1/90000 s of the playback clock: media time and the time spent in stalls and pauses."""
    hold: bool = False
    """A client wants it paused."""
    rests: bool = False
    """Paused because nobody watches."""
    buffer: deque[Frame] = field(default_factory=deque)
    viewers: set[Viewer] = field(default_factory=set)
    matte: Matte | None = None
    """What is transparent for viewers who take mattes; None is nothing."""
    broadcasts: dict[tuple[Codec, bool], Broadcast] = field(default_factory=dict)
    """What the viewers of each codec are served from, those who take mattes apart."""
    tapes: set[Tape] = field(default_factory=set)
    """Of the recordings that run."""
    steers: dict[int, _Steer] = field(default_factory=dict)
    """By event number: those that are not on screen yet."""
    next_event: int = 1
    marks: dict[int, tuple[int, _Steer]] = field(default_factory=dict)
    """Index of the first frame under a new prompt -> its chunk and the steer, to be announced with that frame."""
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    kept: int = 0
    """Outputs and recordings, which need it whether it is watched or not."""
    player: asyncio.Task[None] | None = None
    chunks: Chunks = field(kw_only=True)
    """For who traces them."""
    picture: bytes = b""
    """What the stream starts from, until its first chunk is there."""
    owner: str | None = None
    """Whose it is; None where there are no keys."""
    key: int | None = None
    """Serial of the API key that it was opened with."""

    def picture_for(self, frame: Frame, alpha: bool) -> Picture:
        """What viewers get of a frame, or those who take mattes."""
        return frame.above(self.matte) if alpha else frame

    @property
    def watching(self) -> int:
        """Viewers that get frames. Who only listens to events has yet to connect for them, or has elsewhere."""
        return sum(viewer.format != "events" for viewer in self.viewers)

    @property
    def needed(self) -> bool:
        """Somebody takes its frames: viewers, recordings, outputs, also while they try to connect again."""
        return bool(self.watching or self.tapes or self.kept)

    def snapshot(self) -> dict[str, Any]:
        """The stream object of the API, but for `ws_url`, which depends on who asks."""
        session, playback, quality = self.session, self.playback, self.quality
        return {
            "id": session.id,
            "object": "stream",
            "state": session.state.value,
            "model": session.model,
            "prompt": session.prompt,
            "seed": session.seed,
            "width": session.width,
            "height": session.height,
            "fps": session.fps,
            "duration_s": session.duration_s,
            "pause_reason": session.pause_reason,
            "matte": asdict(self.matte) if self.matte else None,
            "created_at": session.created_at,
            "queue_position": session.queue.position if session.queue else None,
            "queue_wait_s": session.queue.wait if session.queue else None,
            "frames_generated": session.frames_generated,
            "frames_shown": playback.shown if playback else 0,
            "chunk_index": playback.chunk_on_screen if playback else 0,
            "real_time_factor": session.real_time_factor,
            "time_to_first_frame_s": session.time_to_first_frame_s,
            "quality": {"level": quality.level, "levels": quality.levels, "steps": quality.applied}
            if quality
            else None,
            "stalls": playback.stalls if playback else 0,
            "stalled_s": playback.stalled_seconds(time.monotonic()) if playback else 0.0,
            "buffer_s": playback.buffered_seconds if playback else 0.0,
            "viewers": self.watching,
            "error": session.error,
            "ended_reason": session.ended_reason,
        }


class Streams:
    """All streams of one gateway. Start it once, stop it once."""

    def __init__(self, config: Config, backend: Backend, metrics: Metrics, tracing: Tracing) -> None:
        self._config = config
        self._tracing = tracing
        self._backend = backend
        self._metrics = metrics
        self._store = Store(config.data, round(config.data_limit_gb * 1e9), config.keep_hours * 3600)
        self.clips = Clips(backend, self._store, metrics)
        self.recorder = Recorder(self._store, metrics)
        self._streams: dict[str, Stream] = {}
        self._admission = admission.Admission(config.queue_limit)
        self._models: dict[str, wire.ModelInfo] = {}
        self._strengths: dict[str, float] = {}
        self._lora_answers: dict[int, asyncio.Future[wire.Loras]] = {}
        self._lora_events = itertools.count(1)
        self._lora_changes: set[int] = set()
        self._executor = ThreadPoolExecutor(2, thread_name_prefix="encoder")
        self._encoder = Encoder(self._executor, metrics)
        self._housekeeper: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.decoding = asyncio.Semaphore(1)
        """Of uploaded pictures: one at a time, so that live streams keep their share of the processor."""
        self._draining = False
        self._failure = ""
        self._folder_lost = False
        self._settled = asyncio.Event()

    def open_data(self) -> None:
        """Take hold of the folder of clips and recordings. Raises OSError when that cannot be."""
        self._store.open()

    async def start(self) -> None:
        """Bring the backend up, without waiting for it. Raises OSError as `open_data` does."""
        self.open_data()
        self.clips.load()
        self.recorder.load()
        await self._backend.start(self._on_engine)
        self._housekeeper = asyncio.create_task(self._keep_house(), name="housekeeper")

    async def stop(self) -> None:
        """End every stream, then the backend. Safe to call again."""
        self.drain(0)
        self.end()
        if self._housekeeper is None:
            return
        self._housekeeper.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._housekeeper
        self._housekeeper = None
        await self._backend.stop()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.clips.stop()
        await self.recorder.stop()
        self._store.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def engine_came_up(self) -> bool:
        """Waits until the engine is up for the first time; False when it was given up before that."""
        await self._settled.wait()
        return not self._failure

    def drain(self, seconds: float) -> None:
        """Take no new stream, end those that wait, and tell the others' viewers how long they may still play."""
        self._draining = True
        self.clips.drain()
        for stream in list(self._streams.values()):
            if stream.session.state is State.QUEUED:
                self._end(stream, SHUTTING_DOWN)
            elif not stream.session.state.over and seconds:
                self._publish(stream, [stream.session.event("draining", time.time(), seconds=seconds)])

    @property
    def playing(self) -> bool:
        """Whether a stream is not over yet, or a clip is being made."""
        return self.clips.recording or any(not stream.session.state.over for stream in self._streams.values())

    def end(self) -> None:
        """End what `drain` let play: viewers hear it before their sockets close."""
        self._forget_loras()
        self.clips.end()
        for stream in list(self._streams.values()):
            if not stream.session.state.over:
                self._end(stream, SHUTTING_DOWN)

    # what clients ask for

    @property
    def models(self) -> list[wire.ModelInfo]:
        """The models that can be asked for; none before the engine is up."""
        return list(self._models.values())

    @property
    def default_model(self) -> str:
        """The model of a request that names none."""
        return self._config.model

    def readiness(self) -> tuple[bool, str]:
        """Whether a stream could start now, and why not."""
        if self._draining:
            return False, "the server is shutting down"
        health = self._backend.health()
        return health.ready, health.reason

    def info(self, model: str | None, param: str = "image") -> wire.ModelInfo:
        """What the engine says of a model, which it must be up for; `param` is the field that asks."""
        name = self._named(model)
        if name not in self._models:
            message = f"The engine is still starting, and only then is known what size `{param}` gets: try again soon."
            raise ApiError(503, "engine_starting", message, param=param, headers={"Retry-After": "5"})
        return self._models[name]

    def check_open(self) -> None:
        """Raises `ApiError` unless something new can be begun, now or when the engine is up."""
        if self._draining:
            raise shutting_down()
        if self._failure:
            message = f"No stream can start: {self._failure}."
            raise ApiError(503, "engine_failed", message, headers={"Retry-After": "60"})

    def _named(self, model: str | None) -> str:
        model = self._config.model if model is None else model
        known = list(self._models) or [self._config.model]
        if model not in known:
            message = f"There is no model of this name: `model` must be one of {', '.join(known)}."
            raise ApiError(404, "model_not_found", message, param="model")
        return model

    def open(
        self,
        prompt: str,
        model: str | None,
        seed: int | None,
        duration_s: float | None,
        picture: bytes = b"",
        *,
        key: Key | None = None,
    ) -> Stream:
        """Create a stream: it starts when the engine has a place for it. `picture` is `wire.Open`'s.

        Owners share the engine fairly, and each key says how many streams its owner may have at once.
        """
        self.check_open()
        model = self._named(model)
        now = time.monotonic()
        session = Session(
            id=f"st_{secrets.token_hex(12)}",
            model=model,
            prompt=prompt,
            seed=secrets.randbits(32) if seed is None else seed,
            duration_s=duration_s,
            created_at=time.time(),
        )
        chunks = Chunks(self._tracing, session.id)
        stream = Stream(session, created=now, unwatched_since=now, chunks=chunks, picture=picture)
        owner, limit, priority = None, None, 1
        if key is not None:
            owner, limit, priority = key.owner, key.streams, key.priority
            stream.owner, stream.key = owner, key.serial
        if refusal := self._admission.request(session.id, model, now, owner=owner, limit=limit, priority=priority):
            if isinstance(refusal, admission.OverLimit):
                self._metrics.refused.labels("stream_limit").inc()
                message = f"This key may have {refusal.limit} streams at once: end one first."
                headers = {"Retry-After": str(refusal.retry_after)}
                raise ApiError(429, "stream_limit", message, headers=headers)
            self._metrics.refused.labels("queue_full").inc()
            raise busy(refusal.retry_after)
        self._streams[session.id] = stream
        if info := self._models.get(model):
            self._shape(stream, info)
        self._admit()
        return stream

    def get(self, id: str) -> Stream:
        """The stream of this id, also for a while after its end."""
        stream = self._streams.get(id)
        if stream is None:
            raise stream_not_found()
        if stream.session.state is State.QUEUED:
            # Whoever waits in the queue may do so by asking now and then, without a socket.
            stream.unwatched_since = time.monotonic()
        return stream

    def owner(self, id: str) -> str | None:
        """Whose the stream, clip or recording is; None also when there is none."""
        stream = self._streams.get(id)
        return stream.owner if stream else self.clips.owner(id) or self.recorder.owner(id)

    def keep_keys(self, serials: Container[int]) -> None:
        """End the streams of all other keys: these were taken away."""
        for stream in list(self._streams.values()):
            if stream.key is not None and stream.key not in serials and not stream.session.state.over:
                self._end(stream, "revoked")
        self.clips.keep_keys(serials)

    def all(self) -> list[Stream]:
        """Every stream that is kept, the oldest first."""
        return list(self._streams.values())

    async def change(
        self, stream: Stream, prompt: str | None, transition: wire.Transition | None, paused: bool | None
    ) -> int:
        """Change a stream; returns the index of the chunk where it takes effect."""
        if stream.session.state.over:
            raise stream_ended(stream.session.ended_reason)
        chunk = stream.playback.chunk_on_screen if stream.playback else 0
        if prompt is not None:
            chunk = await self._steer(stream, prompt, transition or "recache")
        if paused is not None and not stream.session.state.over:
            # Whoever asks a stream to go on wants it to do so for a while, watched or not.
            stream.unwatched_since = time.monotonic()
            self._pause(stream, hold=paused, rests=False)
        return chunk

    async def loras(self, strengths: dict[str, float] | None = None) -> wire.Loras:
        """What LoRAs there are and which are applied; with `strengths`, once these are and no others."""
        if not self._backend.health().ready:
            raise engine_unavailable()
        event = next(self._lora_events)
        answer: asyncio.Future[wire.Loras] = asyncio.get_running_loop().create_future()
        self._lora_answers[event] = answer
        self._set_loras(event, strengths)
        try:
            async with asyncio.timeout(LORA_SECONDS):
                return await answer
        except TimeoutError:
            message = "The engine has not said yet whether the LoRAs are applied; it may still do so."
            raise ApiError(504, "engine_timeout", message) from None
        finally:
            self._lora_answers.pop(event, None)

    def close(self, stream: Stream) -> None:
        """End a stream because a client asked for it; one that is over stays as it is."""
        if not stream.session.state.over:
            self._end(stream, "deleted")

    # viewers

    async def attach(self, stream: Stream, viewer: Viewer, ws_url: str | None = None) -> None:
        """Add a viewer: the frame on screen first, or the next keyframe, then everything as it happens.

        Who came by `ws_url` is told what the stream looks like before that. Raises `ApiError` when there are too many.
        """
        if len(stream.viewers) >= MAX_VIEWERS:
            raise too_many_viewers()
        last, format = stream.last, viewer.picture
        packet = None
        if last is not None and format is not None:
            packet = await self._encoder.packet(stream.picture_for(last, viewer.alpha), format)
        # From here on nothing is awaited, so that the viewer misses no event and gets none twice.
        session = stream.session
        fields = {"type": "stream.started", "seq": session.seq, "ts": time.time(), "stream_id": session.id}
        viewer.event(_json({**fields, "stream": {**stream.snapshot(), "ws_url": ws_url}}))
        if packet is not None:
            viewer.frame(packet)
        if session.state.over:
            viewer.event(_json({**fields, "type": "ended", "reason": session.ended_reason}))
            viewer.finish(_close_code(session))
        else:
            stream.viewers.add(viewer)
            self._metrics.viewers.labels(viewer.format).inc()
            self._tune_in(stream, viewer)
            self._wake(stream)

    def detach(self, stream: Stream, viewer: Viewer) -> None:
        """The viewer is gone. Safe to call again."""
        if viewer not in stream.viewers:
            return
        stream.viewers.remove(viewer)
        self._metrics.viewers.labels(viewer.format).dec()
        stream.unwatched_since = time.monotonic()
        if viewer.codec and (broadcast := stream.broadcasts.get((viewer.codec, viewer.alpha))):
            broadcast.leave(viewer)
            self._close_unused(stream, (viewer.codec, viewer.alpha))

    def _close_unused(self, stream: Stream, which: tuple[Codec, bool]) -> None:
        if not len(stream.broadcasts[which]):
            stream.broadcasts.pop(which).close()

    def record(self, stream: Stream, format: FilmFormat, *, alpha: bool = False) -> Recording:
        """Record the stream from now on, or from its first frame. With `alpha`, which WebM alone can have, the film is
        transparent where the matte says so. Raises `ApiError`."""
        session = stream.session
        if session.state.over:
            raise stream_ended(session.ended_reason)
        if session.fps is None:
            raise engine_unavailable()
        recording, tape = self.recorder.begin(session.id, stream.owner, format, session.fps, alpha=alpha)
        stream.tapes.add(tape)
        tape.on_end = partial(self._unload, stream, tape)
        self._load(stream, tape)
        self._wake(stream)
        return recording

    def _load(self, stream: Stream, tape: Tape) -> None:
        """Have the tape get what is encoded anyway; `_show` comes back to it with the first frame."""
        if tape.format == "mp4" and (broadcast := self._broadcast(stream, "h264", alpha=False)) is not None:
            broadcast.record(tape)

    def _unload(self, stream: Stream, tape: Tape) -> None:
        """The recording is over, or the stream. Safe to call again."""
        stream.tapes.discard(tape)
        stream.unwatched_since = time.monotonic()
        if (broadcast := stream.broadcasts.get(("h264", False))) is not None:
            broadcast.stop_recording(tape)
            self._close_unused(stream, ("h264", False))

    def request_key(self, stream: Stream, viewer: Viewer) -> None:
        """The viewer can show nothing before the next keyframe."""
        if viewer.codec and (broadcast := stream.broadcasts.get((viewer.codec, viewer.alpha))):
            broadcast.request_key()

    def set_matte(self, stream: Stream, matte: Matte | None) -> None:
        """Say what is transparent from now on, of the picture on screen as well."""
        if stream.session.state.over:
            raise stream_ended(stream.session.ended_reason)
        stream.matte = matte
        for (_, alpha), broadcast in stream.broadcasts.items():
            if alpha and stream.last is not None and stream.playback is not None and stream.playback.paused:
                broadcast.show(stream.picture_for(stream.last, alpha), stream.clock)

    def _tune_in(self, stream: Stream, viewer: Viewer) -> None:
        """Serve the viewer from its codec's encoder; `_show` comes back to it with the first frame."""
        if viewer.codec and (broadcast := self._broadcast(stream, viewer.codec, alpha=viewer.alpha)) is not None:
            broadcast.join(viewer)

    def _broadcast(self, stream: Stream, codec: Codec, *, alpha: bool) -> Broadcast | None:
        """The stream's encoder of this codec, from the first frame on."""
        last, fps = stream.last, stream.session.fps
        if last is None or fps is None:
            return None
        if (which := (codec, alpha)) not in stream.broadcasts:
            kbps, picture = self._config.bitrate_kbps, stream.picture_for(last, alpha)
            stream.broadcasts[which] = Broadcast(codec, fps, kbps, picture, stream.clock, self._metrics)
        return stream.broadcasts[which]

    def keep(self, stream: Stream, by: int = 1) -> None:
        """Something needs the stream, watched or not; -1 takes that back."""
        stream.kept += by
        stream.unwatched_since = time.monotonic()
        self._wake(stream)

    def _wake(self, stream: Stream) -> None:
        """Somebody has come, who may be the first: a stream that rests goes on, one that waits for a viewer begins."""
        if stream.rests and stream.needed:
            self._pause(stream, hold=stream.hold, rests=False)
        stream.wake.set()

    def forgotten(self, stream: Stream) -> bool:
        """Whether the stream's record is gone."""
        return stream.session.id not in self._streams

    def tell(self, stream: Stream, type: str, **fields: Any) -> None:
        """An event for all who listen to the stream."""
        self._publish(stream, [stream.session.event(type, time.time(), **fields)])

    def viewer_too_slow(self) -> None:
        """Count a viewer that had to be disconnected."""
        self._metrics.viewers_dropped.inc()

    # the engine

    def _on_engine(self, event: EngineEvent, pixels: bytes) -> None:
        match event:
            case wire.Ready():
                self._on_ready(event)
            case Lost():
                self._on_lost(event)
            case wire.Heartbeat():
                self._metrics.engine_resident_bytes.set(event.resident_bytes)
                self._metrics.engine_step_age_seconds.set(event.step_age)
                self._metrics.ring_slots.labels("used").set(event.slots_used)
                self._metrics.ring_slots.labels("free").set(event.slots - event.slots_used)
            case wire.Loras():
                if event.event in self._lora_changes:
                    self._lora_changes.remove(event.event)
                    self._strengths = event.applied
                if (answer := self._lora_answers.get(event.event)) and not answer.done():
                    answer.set_result(event)
            case wire.Fault(stream=None, event=int(number)):
                self._on_lora_fault(number, event)
            case wire.Fault(stream=None):
                logger.error("engine fault %s: %s", event.code, event.message)
            case _:
                stream = self._streams.get(event.stream or "")
                if stream is None and event.stream:
                    self.clips.on_message(event.stream, event, pixels)
                if stream is None or stream.session.state.over or not stream.opened:
                    return  # sent before the engine heard that the stream is over
                # In a copy: the context itself may be the one that runs, and cannot be entered twice.
                stream.context.copy().run(self._on_stream, stream, event, pixels)

    def _on_stream(self, stream: Stream, event: EngineEvent, pixels: bytes) -> None:
        match event:
            case wire.Started():
                stream.started_at = time.monotonic()
            case wire.Frames():
                self._on_frames(stream, event, pixels)
            case wire.Steered():
                self._on_steered(stream, event)
            case wire.Ended():
                self._on_ended(stream, event)
            case wire.Fault():
                self._on_fault(stream, event)

    def _set_loras(self, event: int, strengths: dict[str, float] | None) -> None:
        if strengths is not None:
            self._lora_changes.add(event)
        self._backend.send(wire.SetLoras(event, strengths))

    def _forget_loras(self) -> None:
        """The engine will not answer any more."""
        self._lora_changes.clear()
        for answer in self._lora_answers.values():
            if not answer.done():
                answer.set_exception(engine_unavailable())

    def _on_lora_fault(self, number: int, fault: wire.Fault) -> None:
        logger.error("the engine refused LoRAs: %s: %s", fault.code, fault.message)
        self._lora_changes.discard(number)
        if fault.code == "lora_failed":
            self._strengths = {}
        if (answer := self._lora_answers.get(number)) and not answer.done():
            status = {"lora_not_found": 404, "lora_failed": 503}.get(fault.code, 409)
            text = fault.message[:1].upper() + fault.message[1:] + "."
            answer.set_exception(ApiError(status, fault.code, text, param="loras"))

    def _on_ready(self, ready: wire.Ready) -> None:
        self._failure = ""
        self._models = {info.name: info for info in ready.models}
        self._admission.set_costs(
            {info.name: admission.cost(info.chunk_seconds, info.chunk_frames, info.fps) for info in ready.models},
            min((info.promised for info in ready.models), default=admission.PROMISED),
        )
        if self._strengths:  # of an engine process that died
            self._set_loras(next(self._lora_events), self._strengths)
        generation = self._backend.health().generation
        for stream in list(self._streams.values()):
            session = stream.session
            if session.state.over:
                continue
            info = self._models.get(session.model)
            if info is None:
                self._fail(stream, "model_not_found", "The engine no longer has this model.", retryable=False)
                continue
            if not self._shape(stream, info):
                message = "The engine came back with another picture size or frame rate."
                self._fail(stream, "engine_changed", message)
                continue
            if session.state is not State.QUEUED and not (stream.playback and stream.playback.complete):
                if stream.interrupted:
                    stream.interrupted = False
                    self._publish(stream, [session.event("engine.restarted", time.time(), generation=generation)])
                self._open(stream)
        self._admit()
        self.clips.on_ready(ready.models)
        self._settled.set()

    def _on_lost(self, lost: Lost) -> None:
        self._forget_loras()
        if lost.retrying:
            self._metrics.engine_restarts.inc()
        else:
            self._failure = lost.reason
            self._admission.set_costs({})
        for stream in list(self._streams.values()):
            if stream.session.state.over or (stream.playback and stream.playback.complete):
                continue
            if not lost.retrying:
                self._fail(stream, "engine_failed", f"The stream cannot go on: {lost.reason}.")
            elif stream.opened:
                stream.opened, stream.interrupted = False, True
                message = "The engine failed and is being restarted; the stream goes on when it is back."
                event = stream.session.event(
                    "error", time.time(), code="engine_restarted", message=message, retryable=True
                )
                self._publish(stream, [event])
        self.clips.on_lost(lost)
        if not lost.retrying:
            self._settled.set()

    def _on_frames(self, stream: Stream, chunk: wire.Frames, pixels: bytes) -> None:
        session, playback = stream.session, stream.playback
        assert playback is not None
        assert session.fps is not None
        if chunk.chunk != playback.next_chunk or (chunk.width, chunk.height) != (session.width, session.height):
            logger.warning("dropped chunk %d of stream %s: not the one expected", chunk.chunk, session.id)
            self._metrics.frames_dropped.labels("unexpected_chunk").inc(chunk.frames)
            return
        now, ts = time.monotonic(), time.time()
        first, count = playback.received, chunk.frames
        if stream.max_frames is not None:
            count = min(count, stream.max_frames - first)
        size = chunk.width * chunk.height * 3
        view = memoryview(pixels)
        frames = []
        for k in range(count):
            flags = DISCONTINUITY if chunk.discontinuity and k == 0 else 0
            pts = chunk.pts + k * wire.CLOCK_RATE // session.fps
            rgb = view[k * size : (k + 1) * size]
            frames.append(Frame(first + k, pts, chunk.width, chunk.height, flags, rgb))
        stream.buffer += frames
        stream.chunks.arrived(chunk.chunk, frames, (now - chunk.gen_seconds, now))
        stream.first_chunk_at = stream.first_chunk_at or now
        arrival = playback.arrive(count, chunk.gen_seconds, now)
        if arrival.slack is not None and not playback.paused:
            self._metrics.slack_seconds.observe(arrival.slack)
        stream.picture = b""
        self._encode_ahead(stream)
        if chunk.applied is not None:
            self._mark(stream, chunk.applied, chunk.chunk, first)
        self._metrics.chunk_seconds.observe(chunk.gen_seconds)
        self._metrics.real_time_factor.observe(chunk.gen_seconds * session.fps / count)
        events = session.chunk(
            index=chunk.chunk,
            pts=chunk.pts,
            frames=count,
            gen_seconds=chunk.gen_seconds,
            shown=playback.shown,
            paused=playback.paused,
            ts=ts,
        )
        self._publish(stream, events)
        self._judge(stream, chunk, arrival)
        if stream.max_frames is not None and playback.received >= stream.max_frames:
            self._complete(stream)
        self._grant(stream)
        stream.wake.set()

    def _judge(self, stream: Stream, chunk: wire.Frames, arrival: pacing.Arrival) -> None:
        """Say when a chunk is made with another number of steps than the one before, and ask for another if need be."""
        session, quality = stream.session, stream.quality
        assert quality is not None
        steps = self._models[session.model].steps if chunk.steps is None else chunk.steps
        before = quality.applied
        if quality.arrive(arrival, steps) and stream.opened:
            self._backend.send(wire.SetSteps(session.id, quality.steps))
        if steps != before:
            self._metrics.quality_changes.labels("up" if steps > before else "down").inc()
            level, better = quality.level, steps > before
            events = session.quality(
                steps=steps, level=level, better=better, chunk=chunk.chunk, pts=chunk.pts, ts=time.time()
            )
            self._publish(stream, events)

    def _on_steered(self, stream: Stream, steered: wire.Steered) -> None:
        if steer := stream.steers.get(steered.event):
            stream.session.prompt = steer.prompt
            _resolve(steer, steered.chunk)

    def _on_ended(self, stream: Stream, ended: wire.Ended) -> None:
        stream.opened = False
        if ended.reason == "finished":
            self._complete(stream)
            stream.wake.set()
        else:
            self._fail(stream, "engine_closed", "The engine closed the stream unasked.")

    def _on_fault(self, stream: Stream, fault: wire.Fault) -> None:
        if fault.event is None:
            logger.error("stream %s failed in the engine: %s: %s", stream.session.id, fault.code, fault.message)
            stream.opened = False
            self._fail(stream, fault.code, fault.message)
        elif steer := stream.steers.pop(fault.event, None):
            _reject(steer, ApiError(409, fault.code, f"The engine refused the change: {fault.message}"))

    # steps in a stream's life

    def _shape(self, stream: Stream, info: wire.ModelInfo) -> bool:
        """Give the stream the model's size and rate; false when it has others already."""
        session = stream.session
        if stream.playback is None:
            session.width, session.height, session.fps = info.width, info.height, info.fps
            if session.duration_s is not None:
                stream.max_frames = max(1, math.ceil(session.duration_s * info.fps))
            stream.playback = pacing.Playback(
                fps=info.fps, chunk_frames=info.chunk_frames, first_chunk_frames=info.first_chunk_frames
            )
            stream.quality = Quality(info.steps)
            if stream.hold:
                stream.playback.pause(time.monotonic())
        return (session.width, session.height, session.fps) == (info.width, info.height, info.fps)

    def _admit(self) -> None:
        for id in self._admission.admit():
            stream = self._streams[id]
            stream.admitted_at = time.monotonic()
            period = stream.created, stream.admitted_at
            stream.context.copy().run(self._tracing.span, "admit", period, {"livereel.stream": id})
            stream.unwatched_since = max(stream.unwatched_since, stream.admitted_at)
            self._publish(stream, stream.session.admit(time.time()))
            stream.player = self._spawn(self._play(stream), f"player {id}", stream.context)
            self._open(stream)
        self._tell_places()

    def _tell_places(self) -> None:
        for id, place in self._admission.places(time.monotonic()).items():
            stream = self._streams[id]
            self._publish(stream, stream.session.wait(place, time.time()))

    def _open(self, stream: Stream) -> None:
        """Hand the stream to the engine: from the start, or from where an engine that died had come to."""
        session, playback = stream.session, stream.playback
        if playback is None or session.state.over or not self._backend.health().ready:
            return  # `_on_ready` comes back to it
        if stream.steers:
            newest = stream.steers[max(stream.steers)]
            session.prompt = newest.prompt
            self._mark(stream, max(stream.steers), playback.next_chunk, playback.received)
        stream.opened = True
        self._backend.send(
            wire.Open(
                stream=session.id,
                model=session.model,
                prompt=session.prompt,
                seed=session.seed,
                max_frames=stream.max_frames,
                start_chunk=playback.next_chunk,
                start_frame=playback.received,
                picture=stream.picture,
            )
        )
        if stream.quality is not None and stream.quality.steps != self._models[session.model].steps:
            self._backend.send(wire.SetSteps(session.id, stream.quality.steps))  # of an engine process that died
        playback.forget_grant()
        self._grant(stream)
        self._expect_end(stream)

    def _grant(self, stream: Stream) -> None:
        if stream.opened and stream.playback and (grant := stream.playback.grant(time.monotonic())):
            self._backend.send(wire.Credit(stream.session.id, grant.limit, grant.due_in))

    async def _steer(self, stream: Stream, prompt: str, transition: wire.Transition) -> int:
        session, playback = stream.session, stream.playback
        if playback is not None and playback.complete:
            raise ApiError(409, "stream_ended", "Every frame of the stream is generated already: open a new one.")
        if session.state is State.QUEUED:
            session.prompt = prompt
            return 0
        event, stream.next_event = stream.next_event, stream.next_event + 1
        chunk: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        stream.steers[event] = _Steer(prompt, transition, time.monotonic(), chunk)
        if stream.opened:
            self._backend.send(wire.Steer(session.id, event, prompt, transition))
        # Without an engine the change waits in `steers` until `_open` hands the stream to the next one.
        try:
            async with asyncio.timeout(STEER_SECONDS):
                return await chunk
        except TimeoutError:
            message = "The engine has not said yet when the change takes effect; it may still do so."
            raise ApiError(504, "engine_timeout", message) from None

    def _mark(self, stream: Stream, event: int, chunk: int, first_frame: int) -> None:
        """Prompt change `event`, and every older one, takes effect with this frame."""
        for number in sorted(number for number in stream.steers if number <= event):
            steer = stream.steers.pop(number)
            _resolve(steer, chunk)
            stream.marks[first_frame] = (chunk, steer)

    def _pause(self, stream: Stream, *, hold: bool, rests: bool) -> None:
        """Hold playback while a client wants it held or it rests; let it go on otherwise."""
        session, playback, now = stream.session, stream.playback, time.monotonic()
        stream.hold, stream.rests = hold, rests
        paused = hold or rests
        if playback is not None and playback.paused != paused:
            if paused:
                if ended := playback.pause(now):
                    self._stall_ended(stream, ended.seconds)
            else:
                playback.resume(now)
                self._grant(stream)
            stream.wake.set()
        self._publish(stream, session.pause("asked" if hold else "unwatched" if rests else None, time.time()))
        self._expect_end(stream)

    def _complete(self, stream: Stream) -> None:
        """The engine has generated everything; what is left is to play it."""
        if stream.playback is not None:
            stream.playback.finish()
        self._engine_close(stream)
        for steer in stream.steers.values():
            _reject(steer, stream_ended("finished"))
        stream.steers.clear()

    def _end(self, stream: Stream, reason: str) -> None:
        self._leave(stream, stream.session.end(reason, time.time()))

    def _fail(self, stream: Stream, code: str, message: str, *, retryable: bool = True) -> None:
        self._leave(stream, stream.session.fail(code, message, time.time(), retryable=retryable))

    def _leave(self, stream: Stream, events: list[Event]) -> None:
        session = stream.session
        self._engine_close(stream)
        self._publish(stream, events)
        for viewer in list(stream.viewers):
            viewer.finish(_close_code(session))
            self.detach(stream, viewer)
        if stream.tapes and (broadcast := stream.broadcasts.pop(("h264", False), None)) is not None:
            broadcast.finish()  # what is shown is encoded yet, and then its recordings end
        for tape in list(stream.tapes):
            if tape.format == "webm" or stream.last is None:
                tape.finish("stream_ended")
        for steer in stream.steers.values():
            _reject(steer, stream_ended(session.ended_reason))
        stream.steers.clear()
        stream.marks.clear()
        stream.context.copy().run(stream.chunks.over)
        stream.picture = b""
        if last := stream.last:
            # Who comes now is shown where it ended. The record stays for minutes: the rest of the chunk must not.
            stream.last = dataclasses.replace(last, rgb=memoryview(bytes(last.rgb)))
        stream.buffer.clear()
        if stream.player is not None and stream.player is not asyncio.current_task():
            stream.player.cancel()
        stream.player = None
        self._admission.release(session.id)
        if not self._draining:
            self._admit()

    def _engine_close(self, stream: Stream) -> None:
        if stream.opened:
            stream.opened = False
            self._backend.send(wire.Close(stream.session.id))

    # playback

    async def _play(self, stream: Stream) -> None:
        try:
            while not stream.session.state.over:
                stream.wake.clear()
                playback = stream.playback
                action = playback.tick(time.monotonic(), watched=stream.needed) if playback else pacing.Wait(None)
                match action:
                    case pacing.Show():
                        await self._show(stream, action)
                    case pacing.StallBegan():
                        self._metrics.stalls.inc()
                        self._publish(stream, [stream.session.event("stall", time.time(), phase="began")])
                    case pacing.StallEnded():
                        self._stall_ended(stream, action.seconds)
                    case pacing.Finished():
                        self._end(stream, "finished")
                    case pacing.Wait():
                        self._encode_ahead(stream)
                        self._grant(stream)
                        await wait_until(stream.wake, action.until)
        except Exception:
            logger.exception("stream %s failed in the gateway", stream.session.id)
            if not stream.session.state.over:
                self._fail(stream, "internal_error", "The server failed to play the stream.")

    async def _show(self, stream: Stream, action: pacing.Show) -> None:
        begun, frame, playback = time.monotonic(), stream.buffer.popleft(), stream.playback
        assert playback is not None
        first, stream.last = stream.last is None, frame
        stream.clock = frame.pts + round(playback.held_seconds * wire.CLOCK_RATE)
        if first:
            for viewer in stream.viewers:
                self._tune_in(stream, viewer)
            for tape in stream.tapes:
                self._load(stream, tape)
        for (_, alpha), broadcast in stream.broadcasts.items():
            broadcast.show(stream.picture_for(frame, alpha), stream.clock)
        for tape in list(stream.tapes):
            if tape.format == "webm":
                tape.take(frame, matte=stream.matte)
        # A viewer that comes while this is being encoded gets the frame from `attach`.
        audience = list(stream.viewers)
        packets = {which: await packet for which, packet in self._packets(stream, frame).items()}
        if stream.session.state.over:
            return
        if mark := stream.marks.pop(frame.index, None):
            self._announce(stream, frame, *mark)
        for viewer in audience:
            format = viewer.picture
            if format and viewer in stream.viewers and (dropped := viewer.frame(packets[format, viewer.alpha])):
                self._metrics.frames_dropped.labels("slow_viewer").inc(dropped)
        stream.chunks.sent(frame, (begun, time.monotonic()))
        self._metrics.frames_shown.inc()
        self._metrics.played_seconds.inc(1 / playback.fps)
        self._metrics.frame_late_seconds.observe(action.late)
        if frame.index == 0:
            self._expect_end(stream)

    def _announce(self, stream: Stream, frame: Frame, chunk: int, steer: _Steer) -> None:
        seconds = time.monotonic() - steer.asked_at
        self._metrics.steer_seconds.observe(seconds)
        event = stream.session.event(
            "prompt.applied",
            time.time(),
            chunk_index=chunk,
            pts=frame.pts,
            prompt=steer.prompt,
            transition=steer.transition,
            latency_s=round(seconds, 3),
        )
        self._publish(stream, [event])

    def _encode_ahead(self, stream: Stream) -> None:
        """Have the next frame's packets ready before it is due."""
        if not stream.buffer:
            return
        frame, session = stream.buffer[0], stream.session
        packets = list(self._packets(stream, frame).values())
        if session.time_to_first_frame_s is None:
            packets = packets or [self._encoder.packet(frame, "mjpeg")]
            packets[0].add_done_callback(lambda _: self._first_frame_ready(stream))

    def _packets(self, stream: Stream, frame: Frame) -> dict[tuple[Format, bool], asyncio.Future[bytes]]:
        """The frame in every format that somebody watches, without and with its matte."""
        wanted = {(format, viewer.alpha) for viewer in stream.viewers if (format := viewer.picture)}
        return {
            (format, alpha): self._encoder.packet(stream.picture_for(frame, alpha), format) for format, alpha in wanted
        }

    def _first_frame_ready(self, stream: Stream) -> None:
        if stream.session.time_to_first_frame_s is None:
            now = time.monotonic()
            stream.session.time_to_first_frame_s = now - stream.created
            self._metrics.first_frame_seconds.observe(now - stream.created)
            times = stream.created, stream.admitted_at, stream.started_at, stream.first_chunk_at, now
            phases = zip(("queue", "start", "generate", "encode"), itertools.pairwise(times), strict=True)
            for phase, (start, end) in phases:
                self._metrics.first_frame_phase_seconds.labels(phase).observe(end - start)

    def _stall_ended(self, stream: Stream, seconds: float) -> None:
        self._metrics.stalled_seconds.inc(seconds)
        self._publish(stream, [stream.session.event("stall", time.time(), phase="ended", seconds=round(seconds, 3))])
        self._grant(stream)

    def _expect_end(self, stream: Stream) -> None:
        """Tell those who wait when this stream's place comes free."""
        playback = stream.playback
        if playback is not None and stream.max_frames is not None and not playback.paused:
            ends_at = time.monotonic() + (stream.max_frames - playback.shown) / playback.fps
            self._admission.expect_end(stream.session.id, ends_at)
        else:
            self._admission.expect_end(stream.session.id, None)

    def _publish(self, stream: Stream, events: list[Event]) -> None:
        for event in events:
            text = _json(event)
            for viewer in stream.viewers:
                viewer.event(text)

    # upkeep

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
            now, ts = time.monotonic(), time.time()
            for stream in list(self._streams.values()):
                self._look_after(stream, now)
            ended = [stream for stream in self._streams.values() if stream.session.state.over]
            for stream in ended[: max(0, len(ended) - MAX_RECORDS)]:
                del self._streams[stream.session.id]
            for stream in ended[-MAX_RECORDS:]:
                if ts - (stream.session.ended_at or ts) > RECORD_SECONDS:
                    del self._streams[stream.session.id]
            for stream in ended[:-MAX_LAST_FRAMES]:
                stream.last = None
            self._tell_places()
            try:
                self.clips.expire(ts)
                self.recorder.keep_house(ts)
                await asyncio.to_thread(self._store.measure)
            except OSError as error:
                # Streams must be looked after whatever becomes of the folder.
                if not self._folder_lost:
                    logger.error("the data folder cannot be read: %s", error)
                self._folder_lost = True
            else:
                self._folder_lost = False

    def _look_after(self, stream: Stream, now: float) -> None:
        """Rest or end a stream that nobody watches or needs."""
        config, session, unwatched = self._config, stream.session, now - stream.unwatched_since
        if session.state.over or stream.needed:
            return
        if not stream.viewers and 0 < config.idle_timeout_s < unwatched:
            self._end(stream, "idle")
        elif (
            0 < config.unwatched_pause_s < unwatched
            and session.state is State.LIVE
            and not (stream.playback and stream.playback.complete)
        ):
            self._metrics.unwatched_pauses.inc()
            self._pause(stream, hold=False, rests=True)

    def count(self) -> None:
        """Bring the gauges up to date."""
        self._metrics.engine_ready.set(self.readiness()[0])
        self._metrics.engine_load.set(self._admission.load)
        self._metrics.tasks.set(len(asyncio.all_tasks()))
        self._metrics.threads.set(threading.active_count())
        live = [stream for stream in self._streams.values() if not stream.session.state.over and stream.quality]
        self._metrics.quality_level.set(sum(stream.quality.level for stream in live if stream.quality))
        self._metrics.stored_bytes.set(self._store.used_bytes)
        self._metrics.count_streams(Counter(stream.session.state for stream in self._streams.values()))

    def _spawn(self, work: Coroutine[Any, Any, None], name: str, context: contextvars.Context) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name, context=context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _close_code(session: Session) -> int:
    return 1011 if session.state is State.FAILED else 1000


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _resolve(steer: _Steer, chunk: int) -> None:
    if not steer.chunk.done():
        steer.chunk.set_result(chunk)


def _reject(steer: _Steer, error: Exception) -> None:
    if not steer.chunk.done():
        steer.chunk.set_exception(error)
