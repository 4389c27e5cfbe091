"""Outputs: a stream pushed to another server, with retries, until the stream ends.

`server.egress.destination` decides where to; `rtmp` and `whip` do the pushing. An output counts as a viewer of the
stream. The part of its URL after the host and its token may be secrets: neither is shown or logged.
"""

import asyncio
import logging
import random
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

from server.config import Config
from server.egress.destination import Destination, UnreachableError, parse_destination, resolve
from server.egress.rtmp import push_rtmp
from server.egress.whip import push_whip
from server.errors import ApiError, stream_ended
from server.media.viewer import Viewer
from server.media.webrtc import ice_servers
from server.metrics import Metrics
from server.streams.registry import Registry
from server.streams.stream import Stream

logger = logging.getLogger("livereel.outputs")

MAX_OUTPUTS = 4
"""Per stream, including those that have ended."""
FIRST_RETRY_SECONDS, LAST_RETRY_SECONDS = 1.0, 30.0
STABLE_SECONDS = 30.0
"""An attempt that was live for this long resets the count of failures."""
POLL_SECONDS = 0.25

State = Literal["waiting", "connecting", "live", "ended"]
Audio = Literal["silent", "none"]


@dataclass(slots=True)
class RetryPolicy:
    """When to retry: exponential backoff with jitter. Pure."""

    failures: int = 0
    """In a row, counted up to 32: by then the delay has long been the longest, and more would overflow it."""

    def next_delay(self, live_seconds: float, jitter: float) -> float:
        """Seconds to wait after a failed attempt that was live for `live_seconds`.

        `jitter` is a random number from 0 to 1, which spreads the retries of many outputs.
        """
        self.failures = 1 if live_seconds >= STABLE_SECONDS else min(self.failures + 1, 32)
        return min(LAST_RETRY_SECONDS, FIRST_RETRY_SECONDS * 2.0 ** (self.failures - 1)) * (0.75 + jitter / 2)


@dataclass(slots=True, eq=False)
class Output:
    """One destination of one stream."""

    id: str
    stream: Stream
    target: Destination
    token: str = field(repr=False)
    created_at: float
    audio: Audio = "silent"
    """For RTMP: the audio track that is sent."""
    key: int | None = None
    """Serial of the API key that created it."""
    state: State = "waiting"
    attempts: int = 0
    live_since: float | None = None
    retry_at: float | None = None
    error: dict[str, str] | None = None
    """Why the last attempt failed."""
    task: asyncio.Task[None] | None = None

    @property
    def over(self) -> bool:
        return self.state == "ended"

    def snapshot(self) -> dict[str, Any]:
        """The API's output object."""
        return {
            "id": self.id,
            "object": "output",
            "stream_id": self.stream.session.id,
            "url": self.target.masked,
            "kind": self.target.kind,
            "state": self.state,
            "attempts": self.attempts,
            "created_at": self.created_at,
            "live_since": self.live_since,
            "retry_at": self.retry_at,
            "error": self.error,
        }


class _AttemptFeed:
    """The `Feed` of one attempt. Counts how long it was live."""

    def __init__(self, outputs: "Outputs", output: Output) -> None:
        self._outputs, self._output = outputs, output
        self._viewer: Viewer | None = None
        self._live_at: float | None = None

    @property
    def h264_level(self) -> int:
        level = self._output.stream.h264_level(alpha=False)
        assert level is not None, "there is a frame, so its size is known"
        return level

    @property
    def live_seconds(self) -> float:
        return time.monotonic() - self._live_at if self._live_at is not None else 0.0

    async def attach(self, viewer: Viewer) -> None:
        self._viewer = viewer
        await self._output.stream.attach(viewer)

    def detach(self) -> None:
        if self._viewer is not None:
            self._output.stream.audience.remove(self._viewer)

    def request_key(self, viewer: Viewer) -> None:
        self._output.stream.audience.request_key(viewer)

    def on_live(self) -> None:
        self._live_at = time.monotonic()
        self._outputs.set_state(self._output, "live")


class Outputs:
    """The outputs of one gateway."""

    def __init__(self, config: Config, streams: Registry, metrics: Metrics) -> None:
        self.streams = streams
        self._config = config
        self._metrics = metrics
        self._outputs: dict[str, Output] = {}

    def open(self, stream: Stream, url: str, token: str, key: int | None = None, *, audio: Audio = "silent") -> Output:
        """Start pushing the stream to `url`, by RTMP with this audio track.

        `key` is the serial of the API key that asks for it. Raises `ApiError` if the URL is not allowed, the stream has
        ended, or it has too many outputs.
        """
        target = parse_destination(url, self._config.outputs)
        if stream.session.state.over:
            raise stream_ended(stream.session.ended_reason)
        if len(self.all(stream)) >= MAX_OUTPUTS:
            message = f"A stream has at most {MAX_OUTPUTS} outputs: remove one first."
            raise ApiError(409, "too_many_outputs", message)
        output = Output(f"out_{secrets.token_hex(8)}", stream, target, token, time.time(), audio, key)
        self._outputs[output.id] = output
        self._metrics.outputs.labels(output.state).inc()
        output.task = asyncio.create_task(self._run(output), name=f"output {output.id}")
        return output

    def all(self, stream: Stream) -> list[Output]:
        """A stream's outputs, oldest first."""
        for output in list(self._outputs.values()):
            if output.over and not self.streams.has(output.stream):
                self._forget(output)
        return [output for output in self._outputs.values() if output.stream is stream]

    def get(self, stream: Stream, id: str) -> Output:
        """The stream's output with this id. Raises `ApiError`."""
        output = self._outputs.get(id)
        if output is None or output.stream is not stream:
            raise ApiError(404, "output_not_found", "The stream has no output of this id.")
        return output

    async def remove(self, output: Output) -> None:
        """Stop the output, wait until it has stopped, and forget it."""
        await self._stop(output)
        self._forget(output)

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], object]]]:
        """The outputs; see `KeyHolder`."""
        for output in self._outputs.values():
            if output.task is not None:
                yield output.key, output.task.cancel

    async def stop(self) -> None:
        """End every output."""
        await asyncio.gather(*(self._stop(output) for output in self._outputs.values()))

    async def _stop(self, output: Output) -> None:
        if output.task is not None:
            output.task.cancel()
            await asyncio.gather(output.task, return_exceptions=True)
        if not output.over:  # its task was cancelled before it started
            self.set_state(output, "ended")

    def _forget(self, output: Output) -> None:
        if self._outputs.pop(output.id, None):
            self._metrics.outputs.labels(output.state).dec()

    def set_state(self, output: Output, state: State, retry_in: float | None = None) -> None:
        """Change the state, update the metrics, and send the stream's viewers an `output.state` event."""
        self._metrics.outputs.labels(output.state).dec()
        self._metrics.outputs.labels(state).inc()
        output.state = state
        output.live_since = time.time() if state == "live" else None
        output.retry_at = None if retry_in is None else time.time() + retry_in
        if state == "live":
            output.error = None
        fields = {"output": output.id, "url": output.target.masked, "state": state, "error": output.error}
        output.stream.publish("output.state", **fields, retry_in_s=retry_in and round(retry_in, 3))

    async def _run(self, output: Output) -> None:
        stream, session, retries = output.stream, output.stream.session, RetryPolicy()

        def over() -> bool:
            return session.state.over

        stream.audience.hold()
        try:
            while not over():
                if stream.audience.on_screen is None:  # no frame to send yet
                    await asyncio.sleep(POLL_SECONDS)
                    continue
                output.attempts += 1
                self.set_state(output, "connecting")
                live_seconds = await self._attempt(output)
                if over():
                    break
                assert output.error is not None
                logger.info("output %s: %s", output.id, output.error["message"])
                delay = retries.next_delay(live_seconds, random.random())
                self.set_state(output, "waiting", delay)
                until = time.monotonic() + delay
                while time.monotonic() < until and not over():
                    await asyncio.sleep(POLL_SECONDS)
            output.error = None
        finally:
            self.set_state(output, "ended")
            stream.audience.release()

    async def _attempt(self, output: Output) -> float:
        """Connect and push until the stream or the connection ends; returns for how many seconds it was live."""
        target, config, feed = output.target, self._config, _AttemptFeed(self, output)
        try:
            address = await resolve(target)
            if target.kind == "rtmp":
                await push_rtmp(target, address, feed, silent_audio=output.audio == "silent")
            else:
                servers = ice_servers(config.ice_servers, config.turn_secret, "gateway", time.time())
                await push_whip(target, address, output.token, servers, feed)
            output.error = {"code": "connection_lost", "message": f"{target.authority} ended the connection"}
        except UnreachableError as error:
            output.error = {"code": error.code, "message": str(error)}
        except ApiError as error:
            output.error = {"code": error.code, "message": error.detail}
        except Exception as error:
            # Log neither the text nor the traceback: either may contain the URL.
            logger.error("output %s failed in the gateway: %s", output.id, type(error).__name__)
            output.error = {"code": "internal_error", "message": "the server failed to push the stream out"}
        finally:
            feed.detach()
        return feed.live_seconds
