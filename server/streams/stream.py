"""One live stream: takes it through its life, between the engine, its player and its audience."""

import asyncio
import contextvars
import itertools
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import msgspec

from engine import wire
from server.auth.keys import Key
from server.backends.base import EngineEvent, EngineLost
from server.config import Config
from server.errors import ApiError, engine_unavailable, stream_ended
from server.library.clip import Change
from server.library.films import FilmFormat
from server.library.recorder import Recorder, Recording
from server.media.frames import PictureEncoder
from server.media.h264 import level_idc
from server.media.matte import Matte
from server.media.viewer import Viewer
from server.metrics import Metrics
from server.streams.admission import QueuePosition
from server.streams.audience import Audience
from server.streams.engine_link import EngineLink
from server.streams.playback import Arrival, Playback, start_delay
from server.streams.player import Player
from server.streams.quality import Quality
from server.streams.session import Event, PauseReason, Session, State
from server.streams.steering import Steering
from server.streams.vocabulary import ignored_words
from server.tracing import Chunks, Tracing

logger = logging.getLogger("livereel.streams")

STEER_SECONDS = 15.0
"""How long the engine may take to say when a prompt change takes effect."""


@dataclass(frozen=True, slots=True)
class Services:
    """What the streams of a gateway share."""

    config: Config
    engine: EngineLink
    encoder: PictureEncoder
    metrics: Metrics
    tracing: Tracing


class Stream:
    """One stream. `session` is what clients see of it, and `audience` who watches it."""

    def __init__(
        self,
        session: Session,
        services: Services,
        *,
        key: Key | None,
        picture: bytes,
        on_over: Callable[[], None],
        on_end_expected: Callable[[float | None], None],
    ) -> None:
        """Create a stream that is queued. What is logged and traced of it belongs to the current context.

        Args:
            session: The stream's state, as clients see it.
            services: What all streams share.
            key: The API key that the stream is opened with; None where the server has no keys.
            picture: What the stream starts from, as in `wire.Open`.
            on_over: Called once, when the stream has ended or failed.
            on_end_expected: Called with the time on the monotonic clock when playback will end, or None if it is not
                known, whenever that changes.
        """
        self.session = session
        self.owner = key.owner if key else None
        """Who may see the stream; None where the server has no keys."""
        self.key = key.serial if key else None
        """Serial of the API key that the stream was opened with."""
        self.context = contextvars.copy_context()
        self.quality: Quality | None = None
        self.player: Player | None = None
        """None, as `quality`, until the engine is up and the model's size and rate are known."""
        self._created_at = now = time.monotonic()
        self._admitted_at = self._started_at = self._first_chunk_at = 0.0
        self._services = services
        self.audience = Audience(
            services.encoder, services.config.bitrate_kbps, services.metrics, on_demand=self._on_demand, now=now
        )
        self._picture = picture
        """Kept until the first chunk is there."""
        self._on_over = on_over
        self._on_end_expected = on_end_expected
        self._max_frames: int | None = None
        self._interrupted = False
        """The engine process that held the stream has died, and no other holds it yet."""
        self._paused_by_client = False
        self._paused_unwatched = False
        self._steering = Steering(session.id, services.engine.send)
        self._chunks = Chunks(services.tracing, session.id)

    @property
    def playback(self) -> Playback | None:
        """The playback clock; None until the model's rate is known."""
        return self.player.playback if self.player else None

    @property
    def complete(self) -> bool:
        """Whether every frame has been generated."""
        return self.playback is not None and self.playback.complete

    def snapshot(self) -> dict[str, Any]:
        """The stream object of the API without `ws_url`, which depends on the client."""
        session, playback, quality, audience = self.session, self.playback, self.quality, self.audience
        return {
            "id": session.id,
            "object": "stream",
            "state": session.state.value,
            "model": session.model,
            "prompt": session.prompt,
            "prompts": msgspec.to_builtins(self._steering.scheduled),
            "ignored_words": ignored_words(self._services.engine.models.get(session.model), session.prompt),
            "seed": session.seed,
            "width": session.width,
            "height": session.height,
            "fps": session.fps,
            "duration_s": session.duration_s,
            "pause_reason": session.pause_reason,
            "interrupted": (interrupted := self._interrupted and not session.state.over),
            "retry_in_s": round(self._services.engine.health().restart_in, 1) if interrupted else None,
            "matte": asdict(audience.matte) if audience.matte else None,
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
            "viewers": audience.watching,
            "error": session.error,
            "ended_reason": session.ended_reason,
        }

    # what clients ask for

    async def change(
        self,
        prompt: str | None,
        transition: wire.Transition | None,
        paused: bool | None,
        prompts: Sequence[Change] | None = None,
    ) -> int:
        """Change the prompt, pause or resume; returns the index of the chunk where the change takes effect.

        `prompts` replaces the changes that are scheduled. Raises `ApiError` if the stream is over, or the engine
        refuses the prompt or does not answer in time.
        """
        if self.session.state.over:
            raise stream_ended(self.session.ended_reason)
        if prompts is not None:
            self.schedule(prompts)
        chunk = self.playback.chunk_on_screen if self.playback else 0
        if prompt is not None:
            chunk = await self._steer(prompt, transition or "recache")
        if paused is not None and not self.session.state.over:
            self.audience.touch()  # whoever resumes a stream wants it to play for a while, watched or not
            self._set_paused(by_client=paused, unwatched=False)
        return chunk

    def schedule(self, changes: Sequence[Change]) -> None:
        """Replace the prompt changes that are scheduled. Raises `ApiError` if one lies in what is generated."""
        playback = self.playback
        earliest = playback.granted_frames / playback.fps if playback else 0.0
        if changes and changes[0].at_s < earliest:
            message = f"`prompts[0].at_s` must be at least {earliest:.3f}: the video before it is being generated."
            raise ApiError(409, "at_s_passed", message, param="prompts[0].at_s")
        self._steering.schedule(changes)

    async def attach(self, viewer: Viewer, ws_url: str | None = None) -> None:
        """Add a viewer: it gets the frame on screen first, or the next keyframe, and then everything as it happens.

        `ws_url` is shown in the stream object of its first event. Raises `ApiError` if there are too many viewers.
        """
        packet = await self.audience.packet_on_screen(viewer)
        # From here on nothing is awaited, so that the viewer gets every event once.
        session = self.session
        fields = {"type": "stream.started", "seq": session.seq, "ts": time.time(), "stream_id": session.id}
        viewer.event(_json({**fields, "stream": {**self.snapshot(), "ws_url": ws_url}}))
        if packet is not None:
            viewer.frame(packet)
        if session.state.over:
            viewer.event(_json({**fields, "type": "ended", "reason": session.ended_reason}))
            viewer.finish(self._close_code)
        else:
            self.audience.add(viewer)

    def record(self, recorder: Recorder, format: FilmFormat, *, alpha: bool = False) -> Recording:
        """Record the stream from now on, or from its first frame.

        With `alpha`, for WebM only, the film is transparent where the matte says so. Raises `ApiError`.
        """
        session = self.session
        if session.state.over:
            raise stream_ended(session.ended_reason)
        if session.fps is None:
            raise engine_unavailable()
        recording, writer = recorder.begin(session.id, self.owner, format, session.fps, alpha=alpha)
        self.audience.record(writer)
        return recording

    def set_matte(self, matte: Matte | None) -> None:
        """Change what is transparent for viewers who take mattes, in the frame on screen too. Raises `ApiError`."""
        if self.session.state.over:
            raise stream_ended(self.session.ended_reason)
        self.audience.set_matte(matte, paused=self.playback is not None and self.playback.paused)

    def publish(self, type: str, **fields: Any) -> None:
        """Send an event to every viewer."""
        self.audience.publish([self.session.event(type, time.time(), **fields)])

    def h264_level(self, *, alpha: bool) -> int | None:
        """The level_idc of the stream's H.264, with `alpha` stacked on its matte; None until its size is known."""
        width, height, fps = self.session.width, self.session.height, self.session.fps
        if width is None or height is None or fps is None:
            return None
        return level_idc(width, 2 * height if alpha else height, fps, self._services.config.bitrate_kbps)

    # life, as the registry decides

    def configure(self, info: wire.ModelInfo) -> bool:
        """Take the model's size and frame rate; False if the stream has others already."""
        session = self.session
        if self.player is None:
            session.width, session.height, session.fps = info.width, info.height, info.fps
            if session.duration_s is not None:
                self._max_frames = max(1, math.ceil(session.duration_s * info.fps))
            playback = Playback(
                fps=info.fps, chunk_frames=info.chunk_frames, first_chunk_frames=info.first_chunk_frames
            )
            self.audience.fps = info.fps
            self.player = Player(session, playback, self.audience, self._chunks, self._services.metrics, self)
            self.quality = Quality(info.steps)
            if self._paused_by_client:
                playback.pause(time.monotonic())
        return (session.width, session.height, session.fps) == (info.width, info.height, info.fps)

    def wait(self, position: QueuePosition) -> None:
        """Note the stream's position in the queue."""
        self.audience.publish(self.session.wait(position, time.time()))

    def admit(self) -> None:
        """Leave the queue: start to play, and open the stream in the engine. Follows `configure`."""
        assert self.player is not None
        self._admitted_at = now = time.monotonic()
        span = self._services.tracing.span
        self.context.copy().run(span, "admit", (self._created_at, now), {"livereel.stream": self.session.id})
        self.audience.unwatched_since = max(self.audience.unwatched_since, now)
        self.audience.publish(self.session.admit(time.time()))
        self.player.start(self.context)
        self._open()

    def on_engine_ready(self, info: wire.ModelInfo | None, generation: int) -> None:
        """Continue in engine process number `generation`, whose model of this stream's name is `info`."""
        if self.session.state.over:
            return
        if info is None:
            self.fail("model_not_found", "The engine no longer has this model.", retryable=False)
        elif not self.configure(info):
            self.fail("engine_changed", "The engine came back with another picture size or frame rate.")
        elif self.session.state is not State.QUEUED and not self.complete:
            if self._interrupted:
                self._interrupted = False
                self.publish("engine.restarted", generation=generation)
            self._open()

    def on_engine_lost_again(self, pause: float) -> None:
        """Tell viewers that the next engine, too, has failed, and when it is tried again."""
        if self._interrupted and not self.session.state.over:
            self._publish_restart(pause)

    def _publish_restart(self, pause: float) -> None:
        when = f"in {pause:.1f} s" if pause else "now"
        text = f"The engine failed and is restarted {when}; the stream goes on when it is back."
        self.publish("error", code="engine_restarted", message=text, retryable=True, retry_in_s=round(pause, 1))

    def on_engine_failed(self, reason: str) -> None:
        """Fail, unless every frame is there already: no engine will come back for now."""
        if not self.session.state.over and not self.complete:
            self.fail("engine_failed", f"The stream cannot go on: {reason}.")

    def check_demand(self, now: float) -> None:
        """Pause the stream, or end it, if nobody has needed it for too long."""
        config, session, audience = self._services.config, self.session, self.audience
        if session.state.over or audience.needed:
            return
        unwatched = now - audience.unwatched_since
        if not audience.viewers and 0 < config.idle_timeout_s < unwatched:
            self.end("idle")
        elif 0 < config.unwatched_pause_s < unwatched and session.state is State.LIVE and not self.complete:
            self._services.metrics.unwatched_pauses.inc()
            self._set_paused(by_client=False, unwatched=True)

    def end(self, reason: str) -> None:
        """End the stream. One that is over stays as it is."""
        if not self.session.state.over:
            self._shut_down(self.session.end(reason, time.time()))

    def fail(self, code: str, message: str, *, retryable: bool = True) -> None:
        """End the stream because something broke. One that is over stays as it is."""
        if not self.session.state.over:
            self._shut_down(self.session.fail(code, message, time.time(), retryable=retryable))

    async def stopped(self) -> None:
        """Wait until the stream's task has ended. Follows `end` or `fail`."""
        if self.player is not None:
            await self.player.stopped()

    def _shut_down(self, events: list[Event]) -> None:
        self._services.engine.close(self.session.id)
        self.audience.publish(events)
        self.audience.close(self._close_code)
        self._steering.reject_all(stream_ended(self.session.ended_reason))
        self.context.copy().run(self._chunks.over)
        self._picture = b""
        if self.player is not None:
            self.player.stop()
        self._on_over()

    @property
    def _close_code(self) -> int:
        """The status with which sockets close."""
        return 1011 if self.session.state is State.FAILED else 1000

    # the engine

    def _open(self) -> None:
        """Open the stream in the engine: from the start, or from where a process that died had come to."""
        session, player, engine = self.session, self.player, self._services.engine
        assert player is not None and self.quality is not None
        playback = player.playback
        if session.state.over or engine.is_open(session.id) or not engine.health().ready:
            return  # `on_engine_ready` comes back to this
        if newest := self._steering.newest():
            number, session.prompt = newest
            self._apply_steers(number, playback.next_chunk, playback.received)
        message = wire.Open(
            stream=session.id,
            model=session.model,
            prompt=session.prompt,
            seed=session.seed,
            max_frames=self._max_frames,
            start_chunk=playback.next_chunk,
            start_frame=playback.received,
            picture=self._picture,
        )
        engine.open(message, self._receive)
        if self.quality.steps != engine.models[session.model].steps:  # as an engine process that died was told
            engine.send(wire.SetSteps(session.id, self.quality.steps))
        playback.forget_grant()
        self._grant()
        self._expect_end()

    def _receive(self, message: EngineEvent, pixels: bytes) -> None:
        if not self.session.state.over:
            # In a copy: the context itself may be running, and cannot be entered twice.
            self.context.copy().run(self._on_message, message, pixels)

    def _on_message(self, message: EngineEvent, pixels: bytes) -> None:
        match message:
            case wire.Started():
                self._started_at = time.monotonic()
            case wire.Frames():
                self._on_frames(message, pixels)
            case wire.Steered():
                if prompt := self._steering.accept(message.event, message.chunk):
                    self.session.prompt = prompt
            case wire.Ended(reason="finished"):
                self._complete()
                self._wake()
            case wire.Ended():
                self.fail("engine_closed", "The engine closed the stream unasked.")
            case wire.Fault(event=None):
                logger.error("stream %s failed in the engine: %s: %s", self.session.id, message.code, message.message)
                self.fail(message.code, message.message)
            case wire.Fault(event=int(number)):
                error = ApiError(409, message.code, f"The engine refused the change: {message.message}")
                self._steering.reject(number, error)
            case EngineLost():
                self._interrupted = True
                self._publish_restart(message.pause)

    def _on_frames(self, chunk: wire.Frames, pixels: bytes) -> None:
        session, player, metrics = self.session, self.player, self._services.metrics
        assert player is not None
        playback = player.playback
        if chunk.chunk != playback.next_chunk or (chunk.width, chunk.height) != (session.width, session.height):
            logger.warning("dropped chunk %d of stream %s: not the one expected", chunk.chunk, session.id)
            metrics.frames_dropped.labels("unexpected_chunk").inc(chunk.frames)
            return
        first, count, ts = playback.received, chunk.frames, time.time()
        if self._max_frames is not None:
            count = min(count, self._max_frames - first)
        self._first_chunk_at = self._first_chunk_at or time.monotonic()
        self._picture = b""
        arrival = player.add(chunk, count, pixels, start_delay=0.0 if first else self._start_delay(count))
        if chunk.applied is not None:
            self._apply_steers(chunk.applied, chunk.chunk, first)
        metrics.chunk_seconds.observe(chunk.gen_seconds)
        metrics.real_time_factor.observe(chunk.gen_seconds * playback.fps / count)
        events = session.chunk(
            index=chunk.chunk,
            pts=chunk.pts,
            frames=count,
            gen_seconds=chunk.gen_seconds,
            shown=playback.shown,
            paused=playback.paused,
            ts=ts,
        )
        self.audience.publish(events)
        self._adjust_quality(chunk, arrival)
        if self._max_frames is not None and playback.received >= self._max_frames:
            self._complete()
        self._grant()
        self._wake()

    def _start_delay(self, frames: int) -> float:
        """Seconds to wait with the first frame, as the engine's load demands; the first chunk has `frames` frames."""
        engine, fps = self._services.engine, self.playback.fps if self.playback else 1
        info = engine.models[self.session.model]
        return start_delay(
            streams=len(engine.live),
            opening=bool(engine.opening),
            chunk_seconds=info.chunk_seconds,
            played=info.chunk_frames / fps,
            first_played=frames / fps,
        )

    def _adjust_quality(self, chunk: wire.Frames, arrival: Arrival) -> None:
        """Say when the number of steps has changed with this chunk, and ask for another number if need be."""
        session, quality, engine = self.session, self.quality, self._services.engine
        assert quality is not None
        steps = engine.models[session.model].steps if chunk.steps is None else chunk.steps
        before = quality.applied
        if quality.arrive(arrival, steps):
            engine.send(wire.SetSteps(session.id, quality.steps))
        if steps != before:
            better = steps > before
            self._services.metrics.quality_changes.labels("up" if better else "down").inc()
            events = session.quality(
                steps=steps, level=quality.level, better=better, chunk=chunk.chunk, pts=chunk.pts, ts=time.time()
            )
            self.audience.publish(events)

    def _grant(self) -> None:
        """Tell the engine how many chunks it may generate, if that has changed."""
        engine, id, playback, now = self._services.engine, self.session.id, self.playback, time.monotonic()
        if playback is None or not engine.is_open(id):
            return
        if grant := playback.grant(now, one_chunk=self._steering.exclusive):
            if grant.limit == playback.next_chunk + 1:  # the engine has not begun this chunk
                self._steering.ask_due(playback.received, playback.next_length, playback.fps, now)
            engine.send(wire.Credit(id, grant.limit, grant.due_in))

    def _complete(self) -> None:
        """Every frame is generated: play what is left."""
        if self.playback is not None:
            self.playback.finish()
        self._services.engine.close(self.session.id)
        self._steering.reject_all(stream_ended("finished"))

    # prompt changes

    async def _steer(self, prompt: str, transition: wire.Transition) -> int:
        """Change the prompt; returns the index of the first chunk under it."""
        session = self.session
        if self.complete:
            raise ApiError(409, "stream_ended", "Every frame of the stream is generated already: open a new one.")
        if session.state is State.QUEUED:
            session.prompt = prompt
            return 0
        try:
            async with asyncio.timeout(STEER_SECONDS):
                # While no engine holds the stream, `_open` applies the change in the next one.
                return await self._steering.ask(prompt, transition, time.monotonic())
        except TimeoutError:
            message = "The engine has not said yet when the change takes effect; it may still do so."
            raise ApiError(504, "engine_timeout", message) from None

    def _apply_steers(self, newest: int, chunk: int, first_frame: int) -> None:
        """Prompt change `newest`, and every older one, takes effect with this chunk and frame."""
        assert self.player is not None
        for change in self._steering.apply(newest, chunk):
            self.player.announce(first_frame, change)

    # playback

    def _set_paused(self, *, by_client: bool, unwatched: bool) -> None:
        """Hold playback for either reason, or resume it without one."""
        self._paused_by_client, self._paused_unwatched = by_client, unwatched
        paused = by_client or unwatched
        if self.player is not None and self.player.playback.paused != paused:
            if paused:
                self.player.pause()
            else:
                self.player.resume()
        reason: PauseReason | None = "asked" if by_client else "unwatched" if unwatched else None
        self.audience.publish(self.session.pause(reason, time.time()))
        self._expect_end()

    def _on_demand(self) -> None:
        """Somebody has come: resume if the stream is paused because nobody watched, or start it."""
        if self._paused_unwatched and self.audience.needed:
            self._set_paused(by_client=self._paused_by_client, unwatched=False)
        self._wake()

    def _wake(self) -> None:
        if self.player is not None:
            self.player.wake()

    def _expect_end(self) -> None:
        """Say when playback will end, for the estimates that queued streams get."""
        playback = self.playback
        if playback is not None and self._max_frames is not None and not playback.paused:
            self._on_end_expected(time.monotonic() + (self._max_frames - playback.shown) / playback.fps)
        else:
            self._on_end_expected(None)

    # what the player says

    def on_first_packet(self) -> None:
        """Measure the time to the first frame."""
        if self.session.time_to_first_frame_s is not None:
            return
        metrics, now = self._services.metrics, time.monotonic()
        self.session.time_to_first_frame_s = now - self._created_at
        metrics.first_frame_seconds.observe(now - self._created_at)
        times = self._created_at, self._admitted_at, self._started_at, self._first_chunk_at, now
        phases = zip(("queue", "start", "generate", "encode"), itertools.pairwise(times), strict=True)
        for phase, (start, end) in phases:
            metrics.first_frame_phase_seconds.labels(phase).observe(end - start)

    def on_first_shown(self) -> None:
        """The playback clock runs: estimate the end anew."""
        self._expect_end()

    def on_idle(self) -> None:
        """Ask the engine for more chunks."""
        self._grant()

    def on_finished(self) -> None:
        """Every frame has been shown."""
        self.end("finished")

    def on_player_error(self) -> None:
        """Nothing plays any more."""
        self.fail("internal_error", "The server failed to play the stream.")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
