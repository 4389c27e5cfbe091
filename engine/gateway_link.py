"""The engine's side of what it shares with the gateway: a socket for messages, and a ring of slots for pixels."""

import itertools
import os
import queue
import threading
import time

import msgspec
import zmq

from engine import wire
from engine.lora_loader import LoadedLoras

HEARTBEAT_SECONDS = 0.5


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not report it."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


class GatewayLink(threading.Thread):
    """A thread that owns the socket, so that messages arrive and heartbeats leave while a chunk is being generated."""

    def __init__(self, address: str, parent: int | None) -> None:
        """`address` is the ZeroMQ address of the gateway; the process exits when `parent` is no longer its parent."""
        super().__init__(name="gateway-link", daemon=True)
        self.inbox: queue.SimpleQueue[wire.ToEngine | LoadedLoras] = queue.SimpleQueue()
        self.last_progress = time.monotonic()
        self.streams = 0
        self.slots_used, self.slots = 0, 0
        self._address, self._parent = address, parent
        self._context = zmq.Context()
        self._outbox = self._context.socket(zmq.PAIR)
        self._outbox.bind("inproc://out")

    def send(self, message: wire.Message) -> None:
        """Queue a message to the gateway. For one thread only: that of the worker."""
        self._outbox.send(wire.encode(message))

    def progressed(self) -> None:
        """Note that the worker made progress; heartbeats report the time since then."""
        self.last_progress = time.monotonic()

    def finish(self) -> None:
        """Flush what was sent, then end the thread."""
        self._outbox.send(b"")
        self.join(timeout=5)
        self._outbox.close(linger=0)
        if not self.is_alive():
            self._context.term()  # the garbage collector might do it before the sockets are closed, and hang

    def run(self) -> None:
        socket = self._context.socket(zmq.PAIR)
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(self._address)
        out = self._context.socket(zmq.PAIR)
        out.connect("inproc://out")
        poller = zmq.Poller()
        poller.register(socket, zmq.POLLIN)
        poller.register(out, zmq.POLLIN)
        next_beat = time.monotonic()
        while True:
            ready = dict(poller.poll(max(0, round((next_beat - time.monotonic()) * 1000))))
            if out in ready:
                data = out.recv()
                if not data:
                    break
                socket.send(data)
            if socket in ready:
                self._receive(socket.recv())
            if time.monotonic() >= next_beat:
                next_beat = time.monotonic() + HEARTBEAT_SECONDS
                socket.send(wire.encode(self._heartbeat()))
                if self._parent is not None and os.getppid() != self._parent:
                    os._exit(1)  # the gateway is gone, and the worker may hang
        out.close()
        socket.close()

    def _heartbeat(self) -> wire.Heartbeat:
        age = time.monotonic() - self.last_progress
        return wire.Heartbeat(age, self.streams, resident_bytes(), self.slots_used, self.slots)

    def _receive(self, data: bytes) -> None:
        try:
            self.inbox.put(wire.decode_to_engine(data))
        except msgspec.MsgspecError as error:
            print(f"engine: a message was refused: {error}", flush=True)


class FrameSlots:
    """The writing side of `wire.Ring`: which slots are free, and the generation of what the others hold."""

    def __init__(self, descriptor: int) -> None:
        """`descriptor` is the shared memory's. There are no slots before `lay_out`."""
        self._descriptor = descriptor
        self._ring: wire.Ring | None = None
        self._free: list[int] = []
        self._taken: dict[int, int] = {}
        self._generations = itertools.count(1)

    @property
    def free(self) -> int:
        """How many chunks can be written now."""
        return len(self._free)

    @property
    def used(self) -> int:
        """How many hold a chunk that the gateway has not released."""
        return len(self._taken)

    @property
    def total(self) -> int:
        return len(self._taken) + len(self._free)

    def lay_out(self, layout: wire.Layout) -> None:
        """Map the memory, which the gateway has given this shape."""
        self._ring = wire.Ring(self._descriptor, layout.slots, layout.slot_bytes)
        self._free = list(range(layout.slots))

    def write(self, pixels: memoryview) -> tuple[int, int]:
        """Copy a chunk into a free slot; returns the slot and its generation, for `wire.Frames`."""
        assert self._ring is not None
        slot, generation = self._free.pop(), next(self._generations)
        self._taken[slot] = generation
        self._ring.write(slot, generation, pixels)
        return slot, generation

    def release(self, slot: int, generation: int) -> None:
        """Free a slot that the gateway has read. One that it does not hold, or released before, is left alone."""
        if self._taken.get(slot) == generation:
            del self._taken[slot]
            self._free.append(slot)

    def close(self) -> None:
        """Unmap the memory."""
        if self._ring is not None:
            self._ring.close()
