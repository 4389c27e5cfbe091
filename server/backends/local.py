"""The engine as a child process of the gateway: started, supervised and replaced when it fails.

An engine process (`server.backends.process`) is killed when it exits, falls silent, or has work but makes no progress.
`server.backends.restart` decides when the next one starts, or the standby takes over where one is ready. However often
an engine fails, another one is tried.

The standby is a second engine process, started once the engine is ready. A standby that dies does not count as an
engine failure: it is replaced, also after growing pauses.
"""

import asyncio
import contextlib
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from msgspec import structs

from engine import wire
from server import temporary
from server.aio import first_of
from server.backends.base import Deliver, EngineLost, Health
from server.backends.process import TEMPORARY, EngineProcess
from server.backends.restart import RestartPolicy

logger = logging.getLogger("livereel.engine")

QUIET_SECONDS = 60.0
"""An engine that was up for this long is sound: what happened before it is not counted any more."""
BACKOFF_SECONDS = (0.5, 60.0)
"""First and longest pause before a restart."""
START_SECONDS = 900.0
"""Limit for loading and warming up: large weights and a cold compilation take minutes."""
SILENT_SECONDS = 10.0
"""A heartbeat comes twice a second. Without one for this long, the process counts as stuck."""
SILENT_WITH_STANDBY_SECONDS = 3.0
"""The same limit while a warm standby waits, because replacing a healthy engine by mistake then costs little."""
STANDBY_SECONDS = (5.0, 300.0)
"""Pause from the engine's `Ready` to the start of a standby, so that streams start first. It doubles with each standby
that is lost, up to the second value."""
STANDBY_TURN_SECONDS = (0.1, 2.0)
"""While the engine has work, a loading standby runs for the first and is paused for the second, in turns."""
STANDBY_POLL_SECONDS = 0.02
STANDBY_FRESH_SECONDS = 2.0
"""A standby whose last message is older is not trusted to take over."""
HUNG_SECONDS = 20.0
"""An engine that has work and reports no step for this long is hung."""
EXIT_DRAIN_SECONDS = 0.2
"""After an exit, how long to read what the process sent last."""
USAGE_ERROR = 2
"""Exit status of a program that rejects its command line (argparse's)."""


class LocalBackend:
    """Runs `command MODEL --socket ADDRESS --frames-fd FD --parent-pid PID`, by default `python -m engine`."""

    def __init__(
        self,
        model: str,
        *,
        command: Sequence[str] = (sys.executable, "-m", "engine"),
        threads: int | None = None,
        loras: Path | None = None,
        standby: bool = False,
        arguments: Sequence[str] = (),
        start_seconds: float = START_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
        hung_seconds: float = HUNG_SECONDS,
        backoff_seconds: tuple[float, float] = BACKOFF_SECONDS,
        quiet_seconds: float = QUIET_SECONDS,
        standby_seconds: tuple[float, float] = STANDBY_SECONDS,
    ) -> None:
        """With `standby`, a second process (started with `--spare`) waits to take over."""
        self._command = [*command, model]
        self._options = ["--threads", str(threads)] if threads is not None else []
        if loras is not None:
            self._options += ["--loras", str(loras.resolve())]
        self._options += arguments
        self._start_seconds = start_seconds
        self._silent_seconds = silent_seconds
        self._hung_seconds = hung_seconds
        self._restarts = RestartPolicy(*backoff_seconds, quiet_seconds)
        self._with_standby = standby
        self._standby_seconds = standby_seconds
        self._deliver: Deliver | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._engine: EngineProcess | None = None
        self._standby: EngineProcess | None = None
        self._standby_task: asyncio.Task[None] | None = None
        self._generation = 0
        self._failure = ""
        """Why the engine failed last; empty while it is up."""
        self._cannot_start = ""
        """Why the engine says that it cannot start."""
        self._restart_at = 0.0
        self._stopping = False
        # By stream: chunks allowed, chunks received. The engine has work while the first exceeds the second.
        self._progress: dict[str, tuple[int, int]] = {}
        # By model: seconds per chunk, as measured by an engine that had the machine to itself.
        self._chunk_seconds: dict[str, float] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return self._engine.pid if self._engine is not None else None

    @property
    def standby_pid(self) -> int | None:
        """Process id of the standby, once it can take over."""
        return self._standby.pid if self._standby is not None and self._standby_ready() else None

    async def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        temporary.remove_abandoned(TEMPORARY)
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    def send(self, message: wire.ToEngine) -> None:
        if self._engine is None or not self._engine.ready:
            return
        match message:
            case wire.Open(stream=stream, start_chunk=chunk):
                self._progress[stream] = (chunk, chunk)
            case wire.Credit(stream=stream, limit=limit) if stream in self._progress:
                self._progress[stream] = (max(limit, self._progress[stream][0]), self._progress[stream][1])
            case wire.Close(stream=stream):
                self._progress.pop(stream, None)
        self._engine.send(message)

    def health(self) -> Health:
        now = time.monotonic()
        if self._engine is None or not self._engine.ready:
            wait = max(0.0, self._restart_at - now) if self._engine is None else 0.0
            reason = "the engine is starting"
            if self._failure:
                reason = f"{self._failure}; " + (f"the next try is in {wait:.0f} s" if wait else "it is starting again")
            since = self._restarts.failing_since
            return Health(False, reason, self._generation, wait, 0.0 if since is None else now - since)
        silent = now - self._engine.last_message_at
        if silent > self._silent_seconds / 2:
            return Health(False, f"the engine has been silent for {silent:.0f} s", self._generation)
        return Health(True, "ready", self._generation)

    async def stop(self) -> None:
        self._deliver = None
        self._stopping = True
        if self._engine is not None and self._engine.ready:
            # A loading engine does not read messages, and a standby has no state to save: those get a SIGTERM.
            await self._engine.shut_down()
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor

    # supervision

    async def _supervise(self) -> None:
        try:
            while not self._stopping:
                await self._run_and_recover()
        finally:
            await self._end_standby()

    async def _run_and_recover(self) -> None:
        """Run one engine until it fails, and wait until the next may start."""
        self._cannot_start = ""
        try:
            reason = await self._run_engine()
        except OSError as error:
            reason = f"the engine could not be started: {error}"
        self._progress.clear()
        if self._stopping:
            return
        self._failure, now = self._cannot_start or reason, time.monotonic()
        standby = self._standby_ready()
        restart = self._restarts.fail(now, standby=standby, hopeless=bool(self._cannot_start))
        self._restart_at = now + restart.pause
        if restart.retrying:
            how = "the standby takes over" if standby else "restarting"
            logger.error("%s; %s in %.1f s", self._failure, how, restart.pause)
        else:
            text = "%s; its streams are over after %d failures, and it is tried again in %.1f s"
            logger.critical(text, self._failure, self._restarts.failures, restart.pause)
        self._emit(EngineLost(self._failure, restart.retrying, restart.pause))
        if not (standby and restart.retrying):
            await self._end_standby()  # a new engine at normal priority is ready sooner than a half-loaded standby
        await asyncio.sleep(restart.pause)

    async def _run_engine(self) -> str:
        """Run one engine process until it fails, and return the reason. The process is gone afterwards in any case."""
        self._generation += 1
        if takes_over := self._standby_ready():
            assert self._standby is not None
            self._engine, self._standby = self._standby, None
            self._engine.ready = False
        else:
            self._engine = await EngineProcess.start(self._command, self._options)
        engine = self._engine
        try:
            await self._end_standby()  # the standby's task must not read the messages of what is now the engine
            if takes_over:
                engine.serve()
            reason = await first_of(
                self._receive(engine), self._watch(engine), engine.send_failed(), self._exit_reason(engine)
            )
            engine.kill()  # at once: viewers are waiting for the next engine
            return reason
        finally:
            await engine.end()
            self._engine = None

    async def _receive(self, engine: EngineProcess) -> str:
        """Deliver the engine's messages. Returns only when one of them says that the engine is of no more use."""
        while True:
            message = await engine.receive()
            if isinstance(message, wire.Waiting):
                continue  # sent before this standby took over
            pixels = b""
            if isinstance(message, wire.Frames):
                try:
                    pixels = engine.pixels(message)
                except wire.DamagedError as error:
                    # Damaged pixels are never shown: the stream fails with an error that its viewers see.
                    logger.error("a chunk of stream %s is damaged: %s", message.stream, error)
                    self.send(wire.Close(message.stream))
                    message = wire.Fault("chunk_damaged", "a chunk was damaged on its way", message.stream)
            match message:
                case wire.Ready() if message.protocol != wire.PROTOCOL:
                    return f"the engine speaks protocol {message.protocol}, the gateway {wire.PROTOCOL}"
                case wire.Ready():
                    try:
                        layout = engine.allocate_ring(message.models)
                    except (OSError, ValueError, OverflowError) as error:
                        return f"there is no room for the engine's frames: {error}"
                    engine.ready, self._failure = True, ""
                    self._restarts.up(time.monotonic())
                    self.send(layout)
                    engine.unlink_socket()
                    message = self._with_known_chunk_seconds(engine, message)
                    if self._with_standby and self._standby_task is None:
                        self._standby_task = asyncio.create_task(self._keep_standby(), name="engine standby")
                case wire.Fault(stream=None) if not engine.ready:
                    # A restart fails the same way until a weight file, for example, is put back.
                    self._cannot_start = f"the engine cannot start: {message.message}"
                case wire.Heartbeat() if message.step_age > self._hung_seconds and self._has_work():
                    return f"the engine has not moved for {message.step_age:.0f} s"
                case wire.Frames(stream=stream, chunk=chunk) if stream in self._progress:
                    self._progress[stream] = (self._progress[stream][0], chunk + 1)
                case wire.Ended(stream=stream) | wire.Fault(stream=str(stream), event=None):
                    self._progress.pop(stream, None)
            self._emit(message, pixels)

    def _with_known_chunk_seconds(self, engine: EngineProcess, ready: wire.Ready) -> wire.Ready:
        """Replace what a warm standby measured, beside an engine at work, by what an earlier engine measured alone."""
        known = self._chunk_seconds
        for info in ready.models:
            if not engine.warm or info.name not in known:
                known[info.name] = info.chunk_seconds
        models = [structs.replace(info, chunk_seconds=known[info.name]) for info in ready.models]
        return structs.replace(ready, models=models)

    async def _watch(self, engine: EngineProcess) -> str:
        """Return when the process starts too slowly or has been silent for too long."""
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.25)
            now = time.monotonic()
            if now - before > 1.0:
                continue  # the gateway itself was suspended: process the messages that queued up first
            silent_limit = self._silent_seconds
            if self._standby is not None and self._standby.warm and self._standby_ready():
                silent_limit = min(silent_limit, SILENT_WITH_STANDBY_SECONDS)
            start_limit = self._silent_seconds if engine.warm else self._start_seconds
            if not engine.ready and now - engine.started_at > start_limit:
                return f"the engine was not ready after {start_limit:.0f} s"
            if engine.ready and now - engine.last_message_at > silent_limit:
                return f"the engine has been silent for {now - engine.last_message_at:.0f} s"

    async def _exit_reason(self, engine: EngineProcess) -> str:
        """Wait for the process to exit and say how it did."""
        status = await engine.exited()
        await asyncio.sleep(EXIT_DRAIN_SECONDS)  # its last message, with the actual reason, may still be queued
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        if status == USAGE_ERROR and not engine.ready and engine is self._engine:
            self._cannot_start = "the engine refuses its command line"
        return f"the engine (process {engine.pid}) {how}"

    # the standby

    async def _keep_standby(self) -> None:
        """Keep one standby running until cancelled. Cancelling ends it, unless it has taken over by then."""
        first, longest = self._standby_seconds
        pause = first
        while True:
            await asyncio.sleep(pause)
            started_at = time.monotonic()
            try:
                standby = self._standby = await EngineProcess.start(self._command, ["--spare", *self._options])
            except OSError as error:
                reason = f"it could not be started: {error}"
            else:
                try:
                    reason = await first_of(
                        self._receive_standby(standby),
                        self._throttle(standby),
                        self._watch(standby),
                        standby.send_failed(),
                        self._exit_reason(standby),
                    )
                finally:
                    if self._standby is standby:
                        self._standby = None
                        await standby.end()
            lasted = time.monotonic() - started_at > longest
            pause = first if lasted else min(longest, 2 * pause)
            logger.warning("the standby is lost: %s; the next one starts in %.1f s", reason, pause)

    async def _receive_standby(self, standby: EngineProcess) -> str:
        """Read a standby's messages. Returns the reason when one says that it cannot take over."""
        while True:
            match await standby.receive():
                case wire.Waiting(warm=warm):
                    standby.ready, standby.warm = True, warm
                    standby.unlink_socket()
                    logger.info("a standby engine (process %d) is ready to take over", standby.pid)
                case wire.Heartbeat():
                    pass
                case wire.Fault(message=message):
                    return message
                case message:
                    return f"it sent an unexpected {type(message).__name__}"

    async def _throttle(self, standby: EngineProcess) -> str:
        """Pause a loading standby while the engine has work, except for short turns so that it makes progress.

        The lowest scheduling priority is not enough on few cores: a thread of the engine can still wait for the core
        that the standby occupies while another core is briefly free. Linux only, because only there does a paused
        process end when its parent dies.
        """
        run_seconds, pause_seconds = STANDBY_TURN_SECONDS
        since = time.monotonic()
        while sys.platform == "linux":
            await asyncio.sleep(STANDBY_POLL_SECONDS)
            if standby.ready:
                break
            now = time.monotonic()
            if standby.paused and (not self._has_work() or now - since >= pause_seconds):
                standby.resume()
                since = now
            elif not standby.paused and self._has_work() and now - since >= run_seconds:
                standby.pause()
                since = now
        never: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        return await never

    def _standby_ready(self) -> bool:
        """Whether a standby can take over now."""
        standby = self._standby
        if standby is None or not (standby.ready and standby.alive):
            return False
        return time.monotonic() - standby.last_message_at < STANDBY_FRESH_SECONDS

    async def _end_standby(self) -> None:
        if self._standby_task is not None:
            self._standby_task.cancel()
            await asyncio.wait([self._standby_task])
            self._standby_task = None

    def _has_work(self) -> bool:
        return any(done < limit for limit, done in self._progress.values())

    def _emit(self, event: wire.ToGateway | EngineLost, pixels: bytes = b"") -> None:
        if self._deliver is not None:
            self._deliver(event, pixels)
