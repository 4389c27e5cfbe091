"""The gateway's one link to the engine: everything that is sent to the backend, and everything that comes back.

Whoever opens a stream in the engine passes a function that gets the stream's messages. Listeners hear when an engine
process is ready and when it is lost.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable
from typing import Protocol

from engine import wire
from server.backends.base import Backend, EngineEvent, EngineLost, Health
from server.errors import ApiError, engine_unavailable
from server.metrics import Metrics

logger = logging.getLogger("livereel.streams")

LORA_SECONDS = 60.0
"""How long the engine may take to read LoRAs and to apply them."""

Receive = Callable[[EngineEvent, bytes], None]
"""Called with every message about one stream, in order, and with `EngineLost` if the engine process that held the
stream is being replaced. The second argument holds the pixels of `wire.Frames`."""


class EngineListener(Protocol):
    """What happens to the engine as a whole."""

    def on_ready(self, ready: wire.Ready) -> None:
        """An engine process is up. It holds no streams yet."""

    def on_lost(self, lost: EngineLost) -> None:
        """The engine process is gone, and with it every stream that it held."""


class EngineLink:
    """Sends to the backend, passes on what comes back, and applies LoRAs."""

    def __init__(self, backend: Backend, metrics: Metrics) -> None:
        self._backend = backend
        self._metrics = metrics
        self._listeners: list[EngineListener] = []
        self._receivers: dict[str, Receive] = {}
        """By stream: those that the current engine process holds."""
        self.live: set[str] = set()
        """Of these, the streams that play, or will soon: all but clips."""
        self.opening: set[str] = set()
        """Of these, the streams that wait for their very first chunk."""
        self.models: dict[str, wire.ModelInfo] = {}
        """By name; empty before the engine is up for the first time."""
        self.failure = ""
        """Why the engine has been given up; empty while it has not."""
        self._settled = asyncio.Event()
        self._lora_requests = itertools.count(1)
        self._lora_answers: dict[int, asyncio.Future[wire.Loras]] = {}
        self._lora_changes: set[int] = set()
        """Requests that are to change the LoRAs, and are not answered yet."""
        self._strengths: dict[str, float] = {}
        """The LoRAs that are applied: a new engine process is told to apply them again."""

    def listen(self, listener: EngineListener) -> None:
        """Tell `listener` from now on when the engine is ready or lost, after those that came before it."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Start the backend, without waiting for the engine."""
        await self._backend.start(self._on_event)

    async def stop(self) -> None:
        """Stop the backend."""
        await self._backend.stop()

    def health(self) -> Health:
        """Whether the engine can take work now."""
        return self._backend.health()

    async def came_up(self) -> bool:
        """Wait until the engine is up for the first time; False if it was given up instead."""
        await self._settled.wait()
        return not self.failure

    # streams

    def open(self, message: wire.Open, receive: Receive) -> None:
        """Open a stream in the engine; `receive` gets its messages until it is closed there."""
        self._receivers[message.stream] = receive
        if not message.background:
            self.live.add(message.stream)
            if message.start_chunk == 0:
                self.opening.add(message.stream)
        self._backend.send(message)

    def is_open(self, stream: str) -> bool:
        """Whether the current engine process holds the stream."""
        return stream in self._receivers

    def send(self, message: wire.Steer | wire.Credit | wire.SetSteps) -> None:
        """Send a message about a stream; dropped if the engine does not hold it."""
        if message.stream in self._receivers:
            self._backend.send(message)

    def close(self, stream: str) -> None:
        """Close a stream in the engine, if the engine holds it. Nothing more is received of it."""
        if self._forget(stream):
            self._backend.send(wire.Close(stream))

    def _forget(self, stream: str) -> Receive | None:
        """Remove a stream that the engine no longer holds; returns its receiver."""
        self.live.discard(stream)
        self.opening.discard(stream)
        return self._receivers.pop(stream, None)

    # LoRAs

    async def loras(self, strengths: dict[str, float] | None = None) -> wire.Loras:
        """The LoRAs that there are, and those that are applied. With `strengths`, apply these first and no others.

        Raises `ApiError` if the engine is not up, refuses them, or does not answer in time.
        """
        if not self.health().ready:
            raise engine_unavailable()
        request = next(self._lora_requests)
        answer: asyncio.Future[wire.Loras] = asyncio.get_running_loop().create_future()
        self._lora_answers[request] = answer
        self._set_loras(request, strengths)
        try:
            async with asyncio.timeout(LORA_SECONDS):
                return await answer
        except TimeoutError:
            message = "The engine has not said yet whether the LoRAs are applied; it may still do so."
            raise ApiError(504, "engine_timeout", message) from None
        finally:
            self._lora_answers.pop(request, None)

    def abandon_loras(self) -> None:
        """Fail the requests for LoRAs that are not answered yet: they will not be."""
        self._lora_changes.clear()
        for answer in self._lora_answers.values():
            if not answer.done():
                answer.set_exception(engine_unavailable())

    def _set_loras(self, request: int, strengths: dict[str, float] | None) -> None:
        if strengths is not None:
            self._lora_changes.add(request)
        self._backend.send(wire.SetLoras(request, strengths))

    def _on_loras(self, loras: wire.Loras) -> None:
        if loras.event in self._lora_changes:
            self._lora_changes.remove(loras.event)
            self._strengths = loras.applied
        if (answer := self._lora_answers.get(loras.event)) and not answer.done():
            answer.set_result(loras)

    def _on_lora_fault(self, request: int, fault: wire.Fault) -> None:
        if fault.code != "lora_not_found" or request not in self._lora_answers:
            # A client that names an unknown LoRA is told so. One that was applied and is gone concerns the operator.
            logger.error("the engine refused LoRAs: %s: %s", fault.code, fault.message)
        self._lora_changes.discard(request)
        if fault.code == "lora_failed":
            self._strengths = {}
        if (answer := self._lora_answers.get(request)) and not answer.done():
            status = {"lora_not_found": 404, "lora_failed": 503}.get(fault.code, 409)
            text = fault.message[:1].upper() + fault.message[1:] + "."
            answer.set_exception(ApiError(status, fault.code, text, param="loras"))

    # what comes back

    def _on_event(self, event: EngineEvent, pixels: bytes) -> None:
        match event:
            case wire.Ready():
                self._on_ready(event)
            case EngineLost():
                self._on_lost(event)
            case wire.Heartbeat():
                self._metrics.engine_resident_bytes.set(event.resident_bytes)
                self._metrics.engine_step_age_seconds.set(event.step_age)
                self._metrics.ring_slots.labels("used").set(event.slots_used)
                self._metrics.ring_slots.labels("free").set(event.slots - event.slots_used)
            case wire.Loras():
                self._on_loras(event)
            case wire.Fault(stream=None, event=int(request)):
                self._on_lora_fault(request, event)
            case wire.Fault(stream=None):
                logger.error("engine fault %s: %s", event.code, event.message)
            case wire.Ended(stream=str(stream)) | wire.Fault(stream=str(stream), event=None):
                if receive := self._forget(stream):  # the engine has freed the stream
                    receive(event, pixels)
            case _:
                # A stream that was closed meanwhile has no receiver.
                if isinstance(event, wire.Frames):
                    self.opening.discard(event.stream)
                if event.stream and (receive := self._receivers.get(event.stream)):
                    receive(event, pixels)

    def _on_ready(self, ready: wire.Ready) -> None:
        self.failure = ""
        self.models = {info.name: info for info in ready.models}
        if self._strengths:  # applied in an engine process that died
            self._set_loras(next(self._lora_requests), self._strengths)
        for listener in self._listeners:
            listener.on_ready(ready)
        self._settled.set()

    def _on_lost(self, lost: EngineLost) -> None:
        self.abandon_loras()
        receivers, self._receivers = list(self._receivers.values()), {}
        self.live.clear()
        self.opening.clear()
        if lost.retrying:
            self._metrics.engine_restarts.inc()
        else:
            self.failure = lost.reason
        for listener in self._listeners:
            listener.on_lost(lost)
        if lost.retrying:
            for receive in receivers:
                receive(lost, b"")
        else:
            self._settled.set()
