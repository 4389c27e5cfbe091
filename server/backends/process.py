"""One engine process and what is its own: a private folder with a socket in it, and the memory that frames come in.

The folder is fresh (mode 0700) and so is the socket, so nothing that an old process sent late can reach a new one's
streams. The bytes on the socket are `engine.wire` messages and never pickles; what does not decode is logged and
dropped.

Pixels come in shared memory of the process's own: a file descriptor that the process inherits, under no name that
could outlive it. The kernel frees it when both ends are gone, however they went.
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
from pathlib import Path
from typing import Any, Self

import msgspec
import zmq
import zmq.asyncio

from engine import wire

logger = logging.getLogger("livereel.engine")

STOP_SECONDS = 3.0
"""From `wire.Shutdown` to SIGTERM, and from there to SIGKILL."""
STDERR = 2
MAX_MESSAGE_BYTES = 1 << 20
MAX_OUTBOX = 1000
"""Messages that wait for an engine that does not read; past it the engine is taken for stuck."""
SLOTS = 4
"""Chunks that may be on their way at once. Each is copied as it arrives, so more would only hide a gateway too busy."""


class EngineProcess:
    """One that runs, from `start` to `end`; after that nothing of it is left."""

    def __init__(self) -> None:
        """Only for `start`. Raises OSError."""
        self.began = self.heard_at = time.monotonic()
        """When it was started, or asked to serve; and when it last said something."""
        self.ready = False
        """Whether it has done what it was started for: to serve, or as a spare to wait."""
        self.warm = False
        """Whether it waits, or has waited, with everything loaded: a spare that serves at once."""
        self.halted = False
        self._process: asyncio.subprocess.Process | None = None
        self._unread = asyncio.Event()
        self._ring: wire.Ring | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="livereel-"))  # mode 0700
        self._context = zmq.asyncio.Context()
        self._memory = -1

    @classmethod
    async def start(cls, command: Sequence[str], options: Sequence[str]) -> Self:
        """Run `command --socket ADDRESS --frames-fd FD --parent-pid PID`, with `options` after it. Raises OSError."""
        engine = cls()
        try:
            await engine._start(command, options)
        except BaseException as error:
            await engine.end()
            if isinstance(error, zmq.ZMQError):  # descriptors are wanting
                raise OSError(error.errno, str(error)) from None
            raise
        return engine

    async def _start(self, command: Sequence[str], options: Sequence[str]) -> None:
        self._socket = socket = self._context.socket(zmq.PAIR)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.SNDHWM, MAX_OUTBOX)
        socket.set(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
        address = f"ipc://{self._directory / 'engine.sock'}"
        socket.bind(address)
        self._memory = _anonymous_memory()
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
            # Standard output is the gateway's: it prints the address to open there and nothing else.
            stdout=STDERR,
            # Ctrl-C in the terminal is for the gateway, which then ends the engine in order.
            start_new_session=True,
            pass_fds=(self._memory,),
        )

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it has not ended, as far as is known."""
        return self._process is not None and self._process.returncode is None

    def serve(self) -> None:
        """Have a spare serve."""
        self.began, self.ready = time.monotonic(), False
        self.send(wire.Serve())

    def send(self, message: wire.ToEngine) -> None:
        """Hand it a message, or find that it reads none."""
        try:
            future = self._socket.send(wire.encode(message), flags=zmq.NOBLOCK)
        except zmq.ZMQError:
            self._unread.set()
            return
        if isinstance(future, asyncio.Future):
            future.add_done_callback(self._sent)

    def _sent(self, future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is not None:
            self._unread.set()

    async def receive(self) -> wire.ToGateway | wire.Waiting:
        """The next message."""
        while True:
            parts = await self._socket.recv_multipart()
            try:
                message: wire.ToGateway | wire.Waiting = wire.decode_to_gateway(_only(parts))
            except (msgspec.DecodeError, ValueError) as error:
                logger.warning("dropped a malformed message of the engine: %s", error)
                continue
            self.heard_at = time.monotonic()
            return message

    def seclude(self) -> None:
        """It is connected, and nobody else is to be: the socket is not to be found any more."""
        # Nor does a gateway that is killed leave one behind.
        shutil.rmtree(self._directory, ignore_errors=True)

    def lay_out(self, models: Sequence[wire.ModelInfo]) -> wire.Layout:
        """Give the shared memory the size that these models need. Raises OSError, ValueError, OverflowError."""
        chunks = [max(info.chunk_frames, info.first_chunk_frames) * info.height * info.width * 3 for info in models]
        slot_bytes = max(chunks, default=0)
        os.ftruncate(self._memory, wire.Ring.bytes_for(SLOTS, slot_bytes))
        if sys.platform == "linux":
            # Cut short by one side, it would kill the other as soon as that touches it.
            fcntl.fcntl(self._memory, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        self._ring = wire.Ring(self._memory, SLOTS, slot_bytes)
        return wire.Layout(SLOTS, slot_bytes)

    def pixels(self, message: wire.Frames) -> bytes:
        """Copied out of their slot, which is the engine's again. Raises `wire.DamagedError`."""
        if self._ring is None:
            raise wire.DamagedError("it came before the engine was ready")
        try:
            return self._ring.read(message.slot, message.generation, message.size)
        finally:
            self.send(wire.Release(message.slot, message.generation))

    async def unread(self) -> str:
        """Returns once it is known not to read its messages."""
        await self._unread.wait()
        return "the engine does not read its messages"

    async def exited(self) -> int:
        """Its exit status, when it has one; below zero it is the signal that killed it."""
        assert self._process is not None
        return await self._process.wait()

    async def leave(self) -> None:
        """Ask it to, and give it time for that."""
        self.send(wire.Shutdown())
        assert self._process is not None
        await _exits(self._process, STOP_SECONDS)

    def halt(self) -> None:
        """Have it stand still, until `go_on` or its end."""
        self.halted = True
        self._signal(signal.SIGSTOP)

    def go_on(self) -> None:
        """After `halt`."""
        self.halted = False
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    def kill(self) -> None:
        """It is dead or beyond a request."""
        self._signal(signal.SIGKILL)

    async def end(self) -> None:
        """Make sure that it is gone, and what is its own as well."""
        try:
            process = self._process
            if process is not None and process.returncode is None:
                self._signal(signal.SIGTERM)
                self.go_on()
                if not await _exits(process, STOP_SECONDS):
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
            shutil.rmtree(self._directory, ignore_errors=True)


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


async def _exits(process: asyncio.subprocess.Process, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await process.wait()
    return process.returncode is not None
