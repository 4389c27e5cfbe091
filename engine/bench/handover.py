"""What it takes to hand chunks from one process to another: `python -m engine.bench.handover`.

Twice: as a second part of a ZeroMQ message, as it once was, and through the shared `wire.Ring`. A time is from the
moment the pixels lie in the engine's memory to the moment the gateway has them as bytes of its own.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import zmq

from engine import wire

SLOTS = 4
PAUSE_SECONDS = 0.05
"""Between two chunks, so that none waits for another."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m engine.bench.handover", description=__doc__)
    parser.add_argument("--width", type=int, default=832)
    parser.add_argument("--height", type=int, default=480)
    parser.add_argument("--frames", type=int, default=12, help="in a chunk (%(default)s)")
    parser.add_argument("--chunks", type=int, default=60, help="to hand over each way (%(default)s)")
    options = parser.parse_args()
    size = options.frames * options.height * options.width * 3
    shape = f"{options.frames} frames of {options.width}x{options.height}"
    print(f"{options.chunks} chunks of {shape}, {size / 1e6:.1f} MB each")
    for name, copies in (("ZeroMQ", 4), ("ring", 2)):
        times, processor = measure(name == "ring", size, options.chunks)
        times.sort()
        median, p95 = times[len(times) // 2] * 1e3, times[len(times) * 95 // 100] * 1e3
        print(
            f"{name}: {median:.1f} ms median, {p95:.1f} ms p95; {processor * 1e3:.1f} ms of processor time, both "
            f"processes; {copies} copies, {copies * size / 1e6:.0f} MB"
        )
    return 0


def measure(ring: bool, size: int, chunks: int) -> tuple[list[float], float]:
    """Seconds for each chunk, and seconds of processor time per chunk in both processes together."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile(dir=folder) as file:
        memory = os.memfd_create("handover") if sys.platform == "linux" else os.dup(file.fileno())
        os.ftruncate(memory, wire.Ring.bytes_for(SLOTS, size))
        address = f"ipc://{Path(folder) / 'socket'}"
        child = os.fork()  # before there is a ZeroMQ context, which would not survive it
        if not child:
            try:
                produce(address, memory if ring else None, size, chunks)
            finally:
                os._exit(0)
        began = time.process_time()
        times = consume(address, memory if ring else None, size, chunks)
        own = time.process_time() - began
        _, _, usage = os.wait4(child, 0)
        os.close(memory)
    return times, (own + usage.ru_utime + usage.ru_stime) / chunks


def produce(address: str, memory: int | None, size: int, chunks: int) -> None:
    """The engine's part."""
    ring = None if memory is None else wire.Ring(memory, SLOTS, size)
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(address)
    pixels = memoryview(bytearray(os.urandom(4096) * (size // 4096 + 1)))[:size]
    for chunk in range(chunks):
        time.sleep(PAUSE_SECONDS)
        began = str(time.monotonic_ns()).encode()
        if ring is None:
            socket.send_multipart([began, pixels.tobytes()], copy=False)
        else:
            ring.write(chunk % SLOTS, chunk + 1, pixels)
            socket.send(began)
        socket.recv()
    socket.close()
    context.term()


def consume(address: str, memory: int | None, size: int, chunks: int) -> list[float]:
    """The gateway's part; returns the seconds that each chunk took."""
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.bind(address)
    ring = None if memory is None else wire.Ring(memory, SLOTS, size)
    times = []
    for chunk in range(chunks):
        if ring is None:
            began, _ = socket.recv_multipart()
        else:
            began = socket.recv()
            ring.read(chunk % SLOTS, chunk + 1, size)
        times.append((time.monotonic_ns() - int(began)) / 1e9)
        socket.send(b"")
    socket.close()
    context.term()
    if ring is not None:
        ring.close()
    return times


if __name__ == "__main__":
    sys.exit(main())
