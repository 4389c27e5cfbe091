"""The engine as a child process of the gateway, spoken to over a private unix socket, watched, and restarted.

Each engine process gets a fresh directory (mode 0700) with a fresh socket in it, so nothing that an old process sent
late can reach a new one's streams. The bytes on the socket are `engine.wire` messages and never pickles; what does
not decode is logged and dropped. A process that exits, falls silent, or has work but does not step is killed by its
process id and replaced, at growing intervals, until it has died `BREAKER_DEATHS` times within `BREAKER_SECONDS`. Then
it is given up for as long, and tried again.

Pixels come in shared memory of the process's own: a file descriptor that the process inherits, under no name that
could outlive it. The kernel frees it when both ends are gone, however they went.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from engine import wire
from server.backends.base import Deliver, Health, Lost

logger = logging.getLogger("livereel.engine")

BREAKER_DEATHS = 3
BREAKER_SECONDS = 60.0
"""Deaths within this time count as a loop. A loop is given up for as long."""
BACKOFF_SECONDS = (0.5, 10.0)
"""First and longest pause before a restart; it doubles with every death that the breaker still remembers."""
START_SECONDS = 900.0
"""Loading and warming up may take this long: big weights, cold compilation."""
SILENT_SECONDS = 10.0
"""A heartbeat comes every second; this long without one means that the process is stuck."""
HUNG_SECONDS = 20.0
"""A step loop with work to do that has not moved for this long hangs."""
STOP_SECONDS = 3.0
"""From `wire.Shutdown` to SIGTERM, and from there to SIGKILL."""
LAST_WORDS_SECONDS = 0.2
STDERR = 2
USAGE_ERROR = 2
"""The exit status by which a program says that its command line makes no sense."""
MAX_MESSAGE_BYTES = 1 << 20
MAX_OUTBOX = 1000
"""Messages that wait for an engine that does not read; past it the engine is taken for stuck."""
SLOTS = 4
"""Chunks that may be on their way at once. Each is copied as it arrives, so more would only hide a gateway too busy."""


class LocalBackend:
    """Runs `command MODEL --socket ADDRESS --frames-fd FD --parent-pid PID`, by default `python -m engine`."""

    def __init__(
        self,
        model: str,
        *,
        command: Sequence[str] = (sys.executable, "-m", "engine"),
        threads: int | None = None,
        loras: Path | None = None,
        arguments: Sequence[str] = (),
        start_seconds: float = START_SECONDS,
        silent_seconds: float = SILENT_SECONDS,
        hung_seconds: float = HUNG_SECONDS,
        backoff_seconds: tuple[float, float] = BACKOFF_SECONDS,
        breaker_seconds: float = BREAKER_SECONDS,
    ) -> None:
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
        self._deliver: Deliver | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._socket: zmq.asyncio.Socket | None = None
        self._memory = -1
        self._ring: wire.Ring | None = None
        self._generation = 0
        self._ready = False
        self._heard_at = 0.0
        self._failure = ""
        self._hopeless = ""
        self._stopping = False
        self._stuck = asyncio.Event()
        # Chunks allowed and chunks received per stream: whether the engine has work to do.
        self._owed: dict[str, tuple[int, int]] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the running engine."""
        return self._process.pid if self._process is not None else None

    async def start(self, deliver: Deliver) -> None:
        self._deliver = deliver
        self._supervisor = asyncio.create_task(self._supervise(), name="engine supervisor")

    def send(self, message: wire.ToEngine) -> None:
        if not self._ready or self._socket is None:
            return
        match message:
            case wire.Open(stream=stream, start_chunk=chunk):
                self._owed[stream] = (chunk, chunk)
            case wire.Credit(stream=stream, limit=limit) if stream in self._owed:
                self._owed[stream] = (max(limit, self._owed[stream][0]), self._owed[stream][1])
            case wire.Close(stream=stream):
                self._owed.pop(stream, None)
        try:
            future = self._socket.send(wire.encode(message), flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            self._stuck.set()
            return
        if isinstance(future, asyncio.Future):
            future.add_done_callback(self._sent)

    def health(self) -> Health:
        if self._failure:
            return Health(False, self._failure, self._generation)
        if not self._ready:
            return Health(False, "the engine is starting", self._generation)
        silent = time.monotonic() - self._heard_at
        if silent > self._silent_seconds / 2:
            return Health(False, f"the engine has been silent for {silent:.0f} s", self._generation)
        return Health(True, "ready", self._generation)

    async def stop(self) -> None:
        self._deliver = None
        self._stopping = True
        self.send(wire.Shutdown())
        if self._process is not None:
            # An engine that is still loading hears nothing: go straight to SIGTERM.
            await _wait(self._process, STOP_SECONDS if self._ready else 0.0)
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._ready = False

    # supervision

    async def _supervise(self) -> None:
        deaths: deque[float] = deque(maxlen=BREAKER_DEATHS)
        while True:
            try:
                reason = await self._run()
            except OSError as error:
                reason = f"the engine could not be started: {error}"
            self._ready = False
            self._owed.clear()
            if self._stopping:
                return
            now = time.monotonic()
            deaths.append(now)
            recent = sum(now - death < self._breaker_seconds for death in deaths)
            if self._hopeless or recent >= BREAKER_DEATHS:
                self._failure = self._hopeless or f"{reason}; given up after {recent} failures"
                logger.critical("%s", self._failure)
                self._emit(Lost(self._failure, retrying=False))
                if self._hopeless:
                    return
                await asyncio.sleep(self._breaker_seconds)
                self._failure = ""
                deaths.clear()
                continue
            first, longest = self._backoff_seconds
            pause = min(longest, first * 2 ** (recent - 1))
            logger.error("%s; restarting in %.1f s", reason, pause)
            self._emit(Lost(reason, retrying=True))
            await asyncio.sleep(pause)

    async def _run(self) -> str:
        """Run one engine process to its end and say how it ended. However this is left, the process is gone."""
        directory = Path(tempfile.mkdtemp(prefix="livereel-"))  # mode 0700
        context = zmq.asyncio.Context()
        try:
            self._socket = socket = context.socket(zmq.PAIR)
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.SNDHWM, MAX_OUTBOX)
            socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
            address = f"ipc://{directory / 'engine.sock'}"
            socket.bind(address)
            self._stuck.clear()
            self._generation += 1
            self._memory = _anonymous_memory()
            self._process = process = await asyncio.create_subprocess_exec(
                *self._command,
                "--socket",
                address,
                "--frames-fd",
                str(self._memory),
                "--parent-pid",
                str(os.getpid()),
                *self._options,
                stdin=asyncio.subprocess.DEVNULL,
                # Standard output is the gateway's: it prints the address to open there and nothing else.
                stdout=STDERR,
                # Ctrl-C in the terminal is for the gateway, which then ends the engine in order.
                start_new_session=True,
                pass_fds=(self._memory,),
            )
            try:
                reports = (
                    self._receive(socket, directory),
                    self._watch(),
                    self._stuck_report(),
                    self._exit_report(process),
                )
                reason = await _first(*reports)
                with contextlib.suppress(ProcessLookupError):
                    process.kill()  # it is dead or beyond a request, and viewers wait for the next one
                return reason
            finally:
                await _end(process)
                self._process = None
        finally:
            self._socket = None
            context.destroy(linger=0)
            if self._ring is not None:
                self._ring.close()
                self._ring = None
            if self._memory >= 0:
                os.close(self._memory)
                self._memory = -1
            shutil.rmtree(directory, ignore_errors=True)

    async def _receive(self, socket: zmq.asyncio.Socket, directory: Path) -> str:
        while True:
            parts = await socket.recv_multipart()
            try:
                message = wire.decode_to_gateway(_only(parts))
            except (msgspec.DecodeError, ValueError) as error:
                logger.warning("dropped a malformed message of the engine: %s", error)
                continue
            self._heard_at = time.monotonic()
            pixels = b""
            if isinstance(message, wire.Frames):
                try:
                    pixels = self._pixels(message)
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
                        layout = self._lay_out(message.models)
                    except (OSError, ValueError, OverflowError) as error:
                        return f"there is no room for the engine's frames: {error}"
                    self._ready = True
                    self.send(layout)
                    # Who may connect has: nobody else finds the socket, and a killed gateway leaves none behind.
                    shutil.rmtree(directory, ignore_errors=True)
                case wire.Fault(stream=None) if not self._ready:
                    # It will be so next time too: a weight file that is missing or damaged, for one.
                    self._hopeless = f"the engine cannot start: {message.message}"
                case wire.Heartbeat() if message.step_age > self._hung_seconds and self._has_work():
                    return f"the engine has not moved for {message.step_age:.0f} s"
                case wire.Frames(stream=stream, chunk=chunk) if stream in self._owed:
                    self._owed[stream] = (self._owed[stream][0], chunk + 1)
                case wire.Ended(stream=stream) | wire.Fault(stream=str(stream), event=None):
                    self._owed.pop(stream, None)
            self._emit(message, pixels)

    def _lay_out(self, models: Sequence[wire.ModelInfo]) -> wire.Layout:
        """Give the shared memory the size that these models need. Raises OSError, ValueError, OverflowError."""
        chunks = [max(info.chunk_frames, info.first_chunk_frames) * info.height * info.width * 3 for info in models]
        slot_bytes = max(chunks, default=0)
        os.ftruncate(self._memory, wire.Ring.bytes_for(SLOTS, slot_bytes))
        if sys.platform == "linux":
            # Cut short by one side, it would kill the other as soon as that touches it.
            fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._ring = wire.Ring(self._memory, SLOTS, slot_bytes)
        return wire.Layout(SLOTS, slot_bytes)

    def _pixels(self, message: wire.Frames) -> bytes:
        """Copied out of their slot, which is the engine's again. Raises `wire.DamagedError`."""
        if self._ring is None:
            raise wire.DamagedError("it came before the engine was ready")
        try:
            return self._ring.read(message.slot, message.generation, message.size)
        finally:
            self.send(wire.Release(message.slot, message.generation))

    async def _watch(self) -> str:
        started = time.monotonic()
        while True:
            before = time.monotonic()
            await asyncio.sleep(0.5)
            now = time.monotonic()
            if now - before > 2.0:
                continue  # this process was the one that stood still; let the waiting messages in first
            if not self._ready and now - started > self._start_seconds:
                return f"the engine was not ready after {self._start_seconds:.0f} s"
            if self._ready and now - self._heard_at > self._silent_seconds:
                return f"the engine has been silent for {now - self._heard_at:.0f} s"

    async def _stuck_report(self) -> str:
        await self._stuck.wait()
        return "the engine does not read its messages"

    async def _exit_report(self, process: asyncio.subprocess.Process) -> str:
        status = await process.wait()
        await asyncio.sleep(LAST_WORDS_SECONDS)  # its last words may still be on the socket
        how = f"was killed by signal {-status}" if status < 0 else f"exited with status {status}"
        if status == USAGE_ERROR and not self._ready:
            self._hopeless = "the engine refuses its command line"
        return f"the engine (process {process.pid}) {how}"

    def _has_work(self) -> bool:
        return any(done < limit for limit, done in self._owed.values())

    def _sent(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._stuck.set()

    def _emit(self, event: wire.ToGateway | Lost, pixels: bytes = b"") -> None:
        if self._deliver is not None:
            self._deliver(event, pixels)


def _only(parts: list[bytes]) -> bytes:
    """A message has one part."""
    if len(parts) != 1:
        raise ValueError(f"a message of {len(parts)} parts")
    return parts[0]


def _anonymous_memory() -> int:
    """A descriptor of shared memory that has no name and, until it is laid out, no size."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("livereel-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        descriptor, path = tempfile.mkstemp(prefix="livereel-")
        os.unlink(path)
    return descriptor


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


async def _end(process: asyncio.subprocess.Process) -> None:
    """Make sure that the process is gone."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        if not await _wait(process, STOP_SECONDS):
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()


async def _wait(process: asyncio.subprocess.Process, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), seconds)
    return process.returncode is not None
