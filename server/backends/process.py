"""One engine process, with its private socket folder and the shared memory that its frames arrive in.

The folder (mode 0700) and its socket are new for each process, so a late message from an old process cannot reach the
streams of a new one. The socket carries `engine.wire` messages, never pickles; a message that does not decode is logged
and dropped.

Pixels arrive in anonymous shared memory, whose file descriptor the child inherits. It has no name that could outlive
the process: the kernel frees it when both ends are gone, however they ended.
"""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from engine import wire
from server import temporary

logger = logging.getLogger("livereel.engine")

TEMPORARY = "livereel-engine-"
"""What the names of the sockets' folders begin with."""
STOP_SECONDS = 3.0
"""From `wire.Shutdown` to SIGTERM, and from SIGTERM to SIGKILL."""
STDERR = 2
MAX_MESSAGE_BYTES = 1 << 20
MAX_QUEUED_MESSAGES = 1000
"""Messages queued for an engine that does not read. Beyond this the engine counts as stuck."""
SLOTS = 4
"""Chunks in transit at once. Each is copied on arrival, so more slots would only hide an overloaded gateway."""


class EngineProcess:
    """A running engine process, from `start` to `end`, which removes everything that belonged to it."""

    def __init__(self) -> None:
        """Called by `start` only. Raises OSError."""
        self.started_at = self.last_message_at = time.monotonic()
        """Monotonic time at which it was started (or told to serve), and at which its last message arrived."""
        self.ready = False
        """An engine is ready when it serves; a standby, when it waits to take over."""
        self.warm = False
        """It is or was a standby with everything loaded, which serves as soon as it is told to."""
        self.paused = False
        self._process: asyncio.subprocess.Process | None = None
        self._send_failed = asyncio.Event()
        self._ring: wire.Ring | None = None
        self._directory, self._lock = temporary.make(TEMPORARY)
        self._context = zmq.asyncio.Context()
        self._memory = -1

    @classmethod
    async def start(cls, command: Sequence[str], options: Sequence[str]) -> Self:
        """Run `command --socket ADDRESS --frames-fd FD --parent-pid PID`, followed by `options`. Raises OSError."""
        engine = cls()
        try:
            await engine._start(command, options)
        except BaseException as error:
            await engine.end()
            if isinstance(error, zmq.ZMQError):  # out of file descriptors
                raise OSError(error.errno, str(error)) from None
            raise
        return engine

    async def _start(self, command: Sequence[str], options: Sequence[str]) -> None:
        self._socket = socket = self._context.socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, MAX_QUEUED_MESSAGES)
        socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        address = f"ipc://{self._directory / 'engine.sock'}"
        socket.bind(address)
        self._memory = _create_shared_memory()
        self._process = await asyncio.create_subprocess_exec(
            *command,
            "--socket",
            address,
            "--frames-fd",
            str(self._memory),
            "--parent-pid",
            str(os.getpid()),
            *options,
            stdin=asyncio.subprocess.DEVNULL,
            # The gateway's standard output carries the address to open and nothing else.
            stdout=STDERR,
            # Ctrl-C in the terminal reaches the gateway alone, which then shuts the engine down in order.
            start_new_session=True,
            pass_fds=(self._memory,),
        )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether no exit has been noticed yet."""
        return self._process is not None and self._process.returncode is None

    def serve(self) -> None:
        """Tell a standby to take over."""
        self.started_at, self.ready = time.monotonic(), False
        self.send(wire.Serve())

    def send(self, message: wire.ToEngine) -> None:
        """Queue a message. If the queue is full, `send_failed` returns."""
        try:
            future = self._socket.send(wire.encode(message), flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            self._send_failed.set()
            return
        if isinstance(future, asyncio.Future):
            future.add_done_callback(self._on_sent)

    def _on_sent(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._send_failed.set()

    async def receive(self) -> wire.ToGateway | wire.Waiting:
        """Wait for the next message that decodes."""
        while True:
            parts = await self._socket.recv_multipart()
            try:
                message: wire.ToGateway | wire.Waiting = wire.decode_to_gateway(_single_part(parts))
            except (msgspec.DecodeError, ValueError) as error:
                logger.warning("dropped a malformed message of the engine: %s", error)
                continue
            self.last_message_at = time.monotonic()
            return message

    def unlink_socket(self) -> None:
        """Remove the socket's folder once the engine has connected: nobody else can connect, and a gateway that is
        killed leaves no folder behind. One that is killed before leaves it to the next server."""
        self._remove_directory()

    def _remove_directory(self) -> None:
        shutil.rmtree(self._directory, ignore_errors=True)
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def allocate_ring(self, models: Sequence[wire.ModelInfo]) -> wire.Layout:
        """Size the shared memory for these models. Raises OSError, ValueError, OverflowError."""
        chunks = [max(info.chunk_frames, info.first_chunk_frames) * info.height * info.width * 3 for info in models]
        slot_bytes = max(chunks, default=0)
        os.ftruncate(self._memory, wire.Ring.bytes_for(SLOTS, slot_bytes))
        if sys.platform == "linux":
            # If one side shrank it, the other would die of SIGBUS on its next access.
            fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._ring = wire.Ring(self._memory, SLOTS, slot_bytes)
        return wire.Layout(SLOTS, slot_bytes)

    def pixels(self, message: wire.Frames) -> bytes:
        """Copy a chunk out of its slot and release the slot to the engine. Raises `wire.DamagedError`."""
        if self._ring is None:
            raise wire.DamagedError("it came before the engine was ready")
        try:
            return self._ring.read(message.slot, message.generation, message.size)
        finally:
            self.send(wire.Release(message.slot, message.generation))

    async def send_failed(self) -> str:
        """Return once a message could not be sent because the engine reads none."""
        await self._send_failed.wait()
        return "the engine does not read its messages"

    async def exited(self) -> int:
        """Wait for the exit status; a negative one is the number of the signal that killed the process."""
        assert self._process is not None
        return await self._process.wait()

    async def shut_down(self) -> None:
        """Ask the engine to exit, and wait up to `STOP_SECONDS` for it."""
        self.send(wire.Shutdown())
        assert self._process is not None
        await _exits_within(self._process, STOP_SECONDS)

    def pause(self) -> None:
        """Stop the process with SIGSTOP, until `resume` or `end`."""
        self.paused = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Continue a paused process."""
        self.paused = False
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self._signal(signal.SIGKILL)

    async def end(self) -> None:
        """End the process (SIGTERM, then SIGKILL) and free its socket, memory and folder."""
        try:
            process = self._process
            if process is not None and process.returncode is None:
                self._signal(signal.SIGTERM)
                self.resume()
                if not await _exits_within(process, STOP_SECONDS):
                    self.kill()
                    await process.wait()
        except asyncio.CancelledError:
            self.kill()
            raise
        finally:
            self._context.destroy(linger=0)
            if self._ring is not None:
                self._ring.close()
                self._ring = None
            if self._memory >= 0:
                os.close(self._memory)
                self._memory = -1
            self._remove_directory()


def _single_part(parts: list[bytes]) -> bytes:
    """The body of a one-part ZeroMQ message. Raises ValueError for any other."""
    if len(parts) != 1:
        raise ValueError(f"a message of {len(parts)} parts")
    return parts[0]


def _create_shared_memory() -> int:
    """A descriptor of unnamed shared memory of size 0; `allocate_ring` gives it its size."""
    if sys.platform == "linux":
        descriptor = os.memfd_create("livereel-frames", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    else:
        descriptor, path = tempfile.mkstemp(prefix="livereel-")
        os.unlink(path)
    return descriptor


async def _exits_within(process: asyncio.subprocess.Process, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.wait()
    return process.returncode is not None
