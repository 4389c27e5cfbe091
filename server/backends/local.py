"""The engine as a child process of the gateway, spoken to over a private unix socket, watched, and replaced.

A process (`server.backends.process`) that exits, falls silent, or has work but does not step is killed by its process
id and replaced: at once by the spare, where one waits, and otherwise by a new one, at growing intervals, until engines
have died `BREAKER_DEATHS` times within `BREAKER_SECONDS`. Then it is given up for as long, and tried again.

The spare is one more process, started when the engine is ready. A spare that dies is no engine that dies: it is missed
by nobody and replaced, at growing intervals as well.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

from msgspec import structs

from engine import wire
from server.backends.base import Deliver, Health, Lost
from server.backends.process import EngineProcess

logger = logging.getLogger("livereel.engine")

BREAKER_DEATHS = 3
BREAKER_SECONDS = 60.0
"""Deaths within this time count as a loop. A loop is given up for as long."""
BACKOFF_SECONDS = (0.5, 10.0)
"""First and longest pause before a restart; it doubles with every death that the breaker still remembers."""
START_SECONDS = 900.0
"""Loading and warming up may take this long: big weights, cold compilation."""
SILENT_SECONDS = 10.0
"""A heartbeat comes twice a second; this long without one means that the process is stuck."""
SPARED_SILENT_SECONDS = 3.0
"""The same while a spare waits that can serve at once, so that an error costs little."""
SPARE_SECONDS = (5.0, 300.0)
"""From an engine that is ready to the start of its spare, so that streams come first; it doubles with every spare that
is lost, up to the second."""
ASIDE_SECONDS = (0.1, 2.0)
"""How long a spare prepares and then stands still, in turns, while the engine has work to do."""
LOOK_SECONDS = 0.02
FRESH_SECONDS = 2.0
"""A spare that has said nothing for longer is not relied on."""
HUNG_SECONDS = 20.0
"""A step loop with work to do that has not moved for this long hangs."""
LAST_WORDS_SECONDS = 0.2
USAGE_ERROR = 2
"""The exit status by which a program says that its command line makes no sense."""


class LocalBackend:
    """Runs `command MODEL --socket ADDRESS --frames-fd FD --parent-pid PID`, by default `python -m engine`."""

    def __init__(
        self,
        model: str,
        *,
        command: Sequence[str] = (sys.executable, "-m", "engine"),
        threads: int | None = None,
        loras: Path | None = None,
        spare: bool = False,
        arguments: Sequence[str] = (),
        start_seconds: float = START_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
        hung_seconds: float = HUNG_SECONDS,
        backoff_seconds: tuple[float, float] = BACKOFF_SECONDS,
        breaker_seconds: float = BREAKER_SECONDS,
        spare_seconds: tuple[float, float] = SPARE_SECONDS,
    ) -> None:
        """With `spare`, a second process with the option `--spare` waits to take over."""
        self._command = [*command, model]
        self._options = ["--threads", str(threads)] if threads is not None else []
        if loras is not None:
            self._options += ["--loras", str(loras.resolve())]
        self._options += arguments
        self._start_seconds = start_seconds
        self._silent_seconds = silent_seconds
        self._hung_seconds = hung_seconds
        self._backoff_seconds = backoff_seconds
        self._breaker_seconds = breaker_seconds
        self._with_spare = spare
        self._spare_seconds = spare_seconds
        self._deliver: Deliver | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._engine: EngineProcess | None = None
        self._spare: EngineProcess | None = None
        self._sparing: asyncio.Task[None] | None = None
        self._generation = 0
        self._failure = ""
        self._hopeless = ""
        self._stopping = False
        # Chunks allowed and chunks received per stream: whether the engine has work to do.
        self._owed: dict[str, tuple[int, int]] = {}
        # By model, what a chunk takes: measured by an engine that had the machine for itself.
        self._chunk_seconds: dict[str, float] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return self._engine.pid if self._engine is not None else None

    @property
    def spare_pid(self) -> int | None:
        """Process id of the spare that waits to take over."""
        return self._spare.pid if self._spare is not None and self._spare_waits() else None

    async def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    def send(self, message: wire.ToEngine) -> None:
        if self._engine is None or not self._engine.ready:
            return
        match message:
            case wire.Open(stream=stream, start_chunk=chunk):
                self._owed[stream] = (chunk, chunk)
            case wire.Credit(stream=stream, limit=limit) if stream in self._owed:
                self._owed[stream] = (max(limit, self._owed[stream][0]), self._owed[stream][1])
            case wire.Close(stream=stream):
                self._owed.pop(stream, None)
        self._engine.send(message)

    def health(self) -> Health:
        if self._failure:
            return Health(False, self._failure, self._generation)
        if self._engine is None or not self._engine.ready:
            return Health(False, "the engine is starting", self._generation)
        silent = time.monotonic() - self._engine.heard_at
        if silent > self._silent_seconds / 2:
            return Health(False, f"the engine has been silent for {silent:.0f} s", self._generation)
        return Health(True, "ready", self._generation)

    async def stop(self) -> None:
        self._deliver = None
        self._stopping = True
        if self._engine is not None and self._engine.ready:
            # One that is still loading hears nothing, and a spare has nothing to put in order: they get a SIGTERM.
            await self._engine.leave()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    # supervision

    async def _supervise(self) -> None:
        deaths: deque[float] = deque(maxlen=BREAKER_DEATHS)
        try:
            while await self._replace(deaths):
                pass
        finally:
            await self._end_spare()

    async def _replace(self, deaths: deque[float]) -> bool:
        """Run an engine to its end, and wait until it is time for the next; false when there is to be none."""
        try:
            reason = await self._run()
        except OSError as error:
            reason = f"the engine could not be started: {error}"
        self._owed.clear()
        if self._stopping:
            return False
        now = time.monotonic()
        deaths.append(now)
        recent = sum(now - death < self._breaker_seconds for death in deaths)
        if self._hopeless or recent >= BREAKER_DEATHS:
            self._failure = self._hopeless or f"{reason}; given up after {recent} failures"
            logger.critical("%s", self._failure)
            self._emit(Lost(self._failure, retrying=False))
            if self._hopeless:
                return False
            await self._end_spare()
            await asyncio.sleep(self._breaker_seconds)
            self._failure = ""
            deaths.clear()
        elif self._spare_waits():
            logger.error("%s; the spare takes over", reason)
            self._emit(Lost(reason, retrying=True))
        else:
            first, longest = self._backoff_seconds
            pause = min(longest, first * 2 ** (recent - 1))
            logger.error("%s; restarting in %.1f s", reason, pause)
            self._emit(Lost(reason, retrying=True))
            await self._end_spare()  # a new one, which need not give way to others, is ready sooner
            await asyncio.sleep(pause)
        return True

    async def _run(self) -> str:
        """Run one engine process to its end and say how it ended. However this is left, the process is gone."""
        self._generation += 1
        if spared := self._spare_waits():
            assert self._spare is not None
            self._engine, self._spare = self._spare, None
            self._engine.ready = False
        else:
            self._engine = await EngineProcess.start(self._command, self._options)
        engine = self._engine
        try:
            await self._end_spare()  # it is none any more: nobody else is to hear what it says
            if spared:
                engine.serve()
            reason = await _first(
                self._receive(engine), self._watch(engine), engine.unread(), self._exit_report(engine)
            )
            engine.kill()  # viewers wait for the next one
            return reason
        finally:
            await engine.end()
            self._engine = None

    async def _receive(self, engine: EngineProcess) -> str:
        while True:
            message = await engine.receive()
            if isinstance(message, wire.Waiting):
                continue  # it is no spare, or none any more
            pixels = b""
            if isinstance(message, wire.Frames):
                try:
                    pixels = engine.pixels(message)
                except wire.DamagedError as error:
                    # What is shown is what was generated, or nothing: the stream ends where its viewers can see it.
                    logger.error("a chunk of stream %s is damaged: %s", message.stream, error)
                    self.send(wire.Close(message.stream))
                    message = wire.Fault("chunk_damaged", "a chunk was damaged on its way", message.stream)
            match message:
                case wire.Ready() if message.protocol != wire.PROTOCOL:
                    return f"the engine speaks protocol {message.protocol}, the gateway {wire.PROTOCOL}"
                case wire.Ready():
                    try:
                        layout = engine.lay_out(message.models)
                    except (OSError, ValueError, OverflowError) as error:
                        return f"there is no room for the engine's frames: {error}"
                    engine.ready = True
                    self.send(layout)
                    engine.seclude()
                    message = self._measured(engine, message)
                    if self._with_spare and self._sparing is None:
                        self._sparing = asyncio.create_task(self._keep_spare(), name="engine spare")
                case wire.Fault(stream=None) if not engine.ready:
                    # It will be so next time too: a weight file that is missing or damaged, for one.
                    self._hopeless = f"the engine cannot start: {message.message}"
                case wire.Heartbeat() if message.step_age > self._hung_seconds and self._has_work():
                    return f"the engine has not moved for {message.step_age:.0f} s"
                case wire.Frames(stream=stream, chunk=chunk) if stream in self._owed:
                    self._owed[stream] = (self._owed[stream][0], chunk + 1)
                case wire.Ended(stream=stream) | wire.Fault(stream=str(stream), event=None):
                    self._owed.pop(stream, None)
            self._emit(message, pixels)

    def _measured(self, engine: EngineProcess, ready: wire.Ready) -> wire.Ready:
        """With what a chunk takes as it was measured before: a warm spare did so beside an engine at work."""
        known = self._chunk_seconds
        for info in ready.models:
            if not engine.warm or info.name not in known:
                known[info.name] = info.chunk_seconds
        models = [structs.replace(info, chunk_seconds=known[info.name]) for info in ready.models]
        return structs.replace(ready, models=models)

    async def _watch(self, engine: EngineProcess) -> str:
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.25)
            now = time.monotonic()
            if now - before > 1.0:
                continue  # this process was the one that stood still; let the waiting messages in first
            patience = self._silent_seconds
            if self._spare is not None and self._spare.warm and self._spare_waits():
                patience = min(patience, SPARED_SILENT_SECONDS)
            start = self._silent_seconds if engine.warm else self._start_seconds
            if not engine.ready and now - engine.began > start:
                return f"the engine was not ready after {start:.0f} s"
            if engine.ready and now - engine.heard_at > patience:
                return f"the engine has been silent for {now - engine.heard_at:.0f} s"

    async def _exit_report(self, engine: EngineProcess) -> str:
        status = await engine.exited()
        await asyncio.sleep(LAST_WORDS_SECONDS)  # its last words may still be on the socket
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        if status == USAGE_ERROR and not engine.ready and engine is self._engine:
            self._hopeless = "the engine refuses its command line"
        return f"the engine (process {engine.pid}) {how}"

    # the spare

    async def _keep_spare(self) -> None:
        """Have a spare until this is cancelled, which ends it unless it was taken by then."""
        first, longest = self._spare_seconds
        pause = first
        while True:
            await asyncio.sleep(pause)
            began = time.monotonic()
            try:
                spare = self._spare = await EngineProcess.start(self._command, ["--spare", *self._options])
            except OSError as error:
                reason = f"it could not be started: {error}"
            else:
                try:
                    reason = await _first(
                        self._prepare(spare),
                        self._step_aside(spare),
                        self._watch(spare),
                        spare.unread(),
                        self._exit_report(spare),
                    )
                finally:
                    if self._spare is spare:
                        self._spare = None
                        await spare.end()
            lasted = time.monotonic() - began > longest
            pause = first if lasted else min(longest, 2 * pause)
            logger.warning("the spare is lost: %s; the next one comes in %.1f s", reason, pause)

    async def _prepare(self, spare: EngineProcess) -> str:
        while True:
            match await spare.receive():
                case wire.Waiting(warm=warm):
                    spare.ready, spare.warm = True, warm
                    spare.seclude()
                    logger.info("a spare engine (process %d) is there to take over", spare.pid)
                case wire.Heartbeat():
                    pass
                case wire.Fault(message=message):
                    return message
                case message:
                    return f"it says {type(message).__name__} unasked"

    async def _step_aside(self, spare: EngineProcess) -> str:
        """Until it is ready, let the spare work only while the engine has nothing to do; and a little in any case.

        The lowest priority is not enough on few cores: a thread of the engine may still wait for the core that the
        spare has while the other one is free for a moment. Only Linux ends what stands still when its parent dies.
        """
        work, rest = ASIDE_SECONDS
        since = time.monotonic()
        while sys.platform == "linux":
            await asyncio.sleep(LOOK_SECONDS)
            if spare.ready:
                break
            now = time.monotonic()
            if spare.halted and (not self._has_work() or now - since >= rest):
                spare.go_on()
                since = now
            elif not spare.halted and self._has_work() and now - since >= work:
                spare.halt()
                since = now
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    def _spare_waits(self) -> bool:
        """Whether there is a spare that can take over."""
        spare = self._spare
        if spare is None or not (spare.ready and spare.alive):
            return False
        return time.monotonic() - spare.heard_at < FRESH_SECONDS

    async def _end_spare(self) -> None:
        if self._sparing is not None:
            self._sparing.cancel()
            await asyncio.wait([self._sparing])
            self._sparing = None

    def _has_work(self) -> bool:
        return any(done < limit for limit, done in self._owed.values())

    def _emit(self, event: wire.ToGateway | Lost, pixels: bytes = b"") -> None:
        if self._deliver is not None:
            self._deliver(event, pixels)


async def _first(*reports: Coroutine[Any, Any, str]) -> str:
    """What the first of these says; the others are cancelled."""
    tasks = [asyncio.create_task(report) for report in reports]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
