"""The fake engine as a process of its own, so that benchmarks have an engine process to kill.

It implements the whole wire contract, the ring included, and generates what `FakeBackend` does.
"""

import argparse
import asyncio
import os
import sys
from collections import deque
from pathlib import Path

import zmq
import zmq.asyncio

from engine import wire
from server.backends.base import EngineEvent, EngineLost
from server.backends.fake import FakeBackend

COMMAND = (sys.executable, "-m", "server.bench.engine")
HEARTBEAT_SECONDS = 0.5


class Bridge:
    """Connects the socket to the fake engine. Pixels go through the ring, as soon as it has a free slot."""

    def __init__(self, socket: zmq.asyncio.Socket, frames: int, engine: FakeBackend) -> None:
        """`frames` is the file descriptor of the ring."""
        self._socket, self._frames, self._engine = socket, frames, engine
        self._ring: wire.Ring | None = None
        self._free: list[int] = []
        self._generation = 0
        self._waiting: deque[tuple[wire.Frames, bytes]] = deque()

    def emit(self, event: EngineEvent, pixels: bytes) -> None:
        """Send an engine's event to the gateway."""
        assert not isinstance(event, EngineLost)
        if isinstance(event, wire.Frames):
            self._waiting.append((event, pixels))
            self._send_waiting()
        else:
            self._socket.send(wire.encode(event))

    def handle(self, message: wire.ToEngine) -> None:
        """Handle a message of the gateway: for the ring, or for the engine."""
        match message:
            case wire.Layout(slots=slots, slot_bytes=slot_bytes):
                self._ring, self._free = wire.Ring(self._frames, slots, slot_bytes), list(range(slots))
            case wire.Release(slot=slot):
                self._free.append(slot)
                self._send_waiting()
            case _:
                self._engine.send(message)

    def beat(self) -> None:
        """Send a heartbeat."""
        slots = self._ring.slots if self._ring else 0
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        self._socket.send(wire.encode(wire.Heartbeat(0.0, 0, resident, slots - len(self._free), slots)))

    def _send_waiting(self) -> None:
        while self._waiting and self._free and self._ring:
            event, pixels = self._waiting.popleft()
            slot, self._generation = self._free.pop(), self._generation + 1
            self._ring.write(slot, self._generation, memoryview(pixels))
            fields = {name: getattr(event, name) for name in event.__struct_fields__}
            self._socket.send(wire.encode(wire.Frames(**{**fields, "slot": slot, "generation": self._generation})))


async def run(options: argparse.Namespace) -> None:
    """Serve until `Shutdown`, or until the gateway has died."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.PAIR)
    socket.set(zmq.LINGER, 0)
    socket.connect(options.socket)
    engine = FakeBackend(model=options.model, chunk_seconds=options.chunk_seconds)
    bridge = Bridge(socket, options.frames_fd, engine)

    async def beat() -> None:
        while os.getppid() == options.parent_pid:
            bridge.beat()
            await asyncio.sleep(HEARTBEAT_SECONDS)
        os._exit(1)

    beating = asyncio.create_task(beat())
    if options.spare:
        socket.send(wire.encode(wire.Waiting(warm=True)))
        while not isinstance(wire.decode_to_engine(await socket.recv()), wire.Serve):
            pass
    await engine.start(bridge.emit)
    while not isinstance(message := wire.decode_to_engine(await socket.recv()), wire.Shutdown):
        bridge.handle(message)
    beating.cancel()
    await engine.stop()
    context.destroy(linger=0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("model")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--frames-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--spare", action="store_true")
    parser.add_argument("--chunk-seconds", type=float, default=0.1)
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
