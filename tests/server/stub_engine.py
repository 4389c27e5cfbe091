"""A process that speaks the engine's side of the wire, well or badly; started as `stub_engine.py BEHAVIOUR ...`.

`good+dies` is good at serving, and dies as a spare.
"""

import argparse
import itertools
import os
import sys
import time

import zmq

from engine import wire
from engine.serve import die_with_parent

WIDTH, HEIGHT, FPS = 8, 4, 16
CHUNK_FRAMES, FIRST_CHUNK_FRAMES = 12, 9
FRAME_BYTES = WIDTH * HEIGHT * 3


def picture(frame: int) -> bytes:
    """Frame `frame` of every stream."""
    return bytes((frame + k) % 256 for k in range(FRAME_BYTES))


def third_chunk(stream: tuple[wire.Open, int, int] | None) -> bool:
    """Whether chunk 2 of a stream is next that no earlier process has begun."""
    return stream is not None and stream[0].start_chunk == 0 and stream[1] == 2


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("behaviour")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--frames-fd", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--spare", action="store_true")
    options = parser.parse_args()
    behaviour, _, as_spare = options.behaviour.partition("+")
    die_with_parent(options.parent_pid)
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(options.socket)

    def send(message: wire.Message, *rest: bytes) -> None:
        socket.send_multipart([wire.encode(message), *rest])

    def weak() -> int:
        send(wire.Fault("weights", "dit.safetensors is truncated"))
        time.sleep(0.1)
        return 3

    if options.spare:
        if as_spare == "dies":
            return 7
        if as_spare == "is weak":
            return weak()
        while as_spare == "loads":
            send(wire.Heartbeat(1000.0, 0, 0))
            time.sleep(0.1)
        send(wire.Waiting(as_spare != "is cold"))
        if as_spare == "dies waiting":
            time.sleep(0.1)
            return 7
        while not (socket.poll(100) and isinstance(wire.decode_to_engine(socket.recv()), wire.Serve)):
            send(wire.Heartbeat(1000.0, 0, 0))
    if behaviour == "dies":
        return 7
    if behaviour == "no-weights":
        return weak()
    if behaviour == "usage":
        return 2
    if behaviour == "old":
        send(wire.Ready(0, os.getpid(), []))
    if behaviour == "garbage":
        for parts in (
            [b""],
            [b"\x80\x04\x95\x10."],  # the start of a pickle
            [b"\xff" * 100],
            [wire.encode(wire.Shutdown())],  # not for this side
            [wire.encode(wire.Heartbeat(0.0, 0, 0)), b"too much"],
            [wire.encode(wire.Frames("a", 0, 0, 1, WIDTH, HEIGHT, 0.1)), b"pixels of the former protocol"],
            [b"", b""],
        ):
            socket.send_multipart(parts)
    while behaviour == "loads":
        send(wire.Heartbeat(1000.0, 0, 0))
        time.sleep(0.1)
    models = [
        wire.ModelInfo(
            *("mini", WIDTH, HEIGHT, FPS, CHUNK_FRAMES, FIRST_CHUNK_FRAMES, 2),
            *(5.0 if options.spare else 0.1, 1, f"{options.threads} threads"),
        )
    ]
    send(wire.Ready(wire.PROTOCOL, os.getpid(), [] if behaviour == "empty" else models))
    beat, hung_since = 0.0, 0.0
    ring: wire.Ring | None = None
    free: list[int] = []
    generations = itertools.count(1)
    streams: dict[str, tuple[wire.Open, int, int]] = {}
    limits: dict[str, int] = {}

    def chunk(name: str) -> None:
        """Send the next one, in a free slot."""
        assert ring is not None
        opened, index, first = streams[name]
        count = CHUNK_FRAMES if index else FIRST_CHUNK_FRAMES
        if opened.max_frames is not None:
            count = min(count, opened.max_frames - first)
        slot, generation = free.pop(), next(generations)
        ring.write(slot, generation, memoryview(b"".join(picture(first + k) for k in range(count))))
        stamp = generation
        if behaviour == "stale":
            stamp -= 1
        elif behaviour == "overwrites":
            ring.write(slot, next(generations), memoryview(bytes(FRAME_BYTES)))
        elif behaviour == "no-slot":
            slot = 99
        pts = first * wire.CLOCK_RATE // FPS
        send(wire.Frames(name, index, pts, count, WIDTH, HEIGHT, 0.01, slot=slot, generation=stamp))
        streams[name] = opened, index + 1, first + count
        if first + count == opened.max_frames:
            del streams[name]
            send(wire.Ended(name, "finished"))

    while os.getppid() == options.parent_pid:
        if time.monotonic() > beat and behaviour != "silent":
            beat = time.monotonic() + 0.1
            age = time.monotonic() - hung_since if hung_since else 0.0
            slots = ring.slots if ring is not None else 0
            send(wire.Heartbeat(age, len(streams), 12345, slots - len(free), slots))
        if not socket.poll(20):
            continue
        match wire.decode_to_engine(socket.recv()):
            case wire.Layout(slots=slots, slot_bytes=slot_bytes):
                ring, free = wire.Ring(options.frames_fd, slots, slot_bytes), list(range(slots))
            case wire.Release(slot=slot):
                if 0 <= slot < 99:
                    free.append(slot)
            case wire.Open(stream=stream) as opened:
                streams[stream] = opened, opened.start_chunk, opened.start_frame
                send(wire.Started(stream))
                if behaviour == "crashes":
                    socket.close(linger=5000)
                    context.term()  # what was said is heard
                    os._exit(9)
            case wire.Credit(stream=stream) if behaviour == "hangs":
                hung_since = hung_since or time.monotonic()
            case wire.Credit(stream=stream) if behaviour == "hangs later" and third_chunk(streams.get(stream)):
                hung_since = hung_since or time.monotonic()
            case wire.Credit(stream=stream, limit=limit):
                limits[stream] = limit
            case wire.Close(stream=stream):
                streams.pop(stream, None)
                send(wire.Ended(stream, "closed"))
            case wire.Shutdown():
                if behaviour == "stubborn":
                    time.sleep(60)
                return 0
        for name in list(streams):
            while name in streams and streams[name][1] < limits.get(name, 0) and free:
                chunk(name)
    return 0


if __name__ == "__main__":
    sys.exit(main())
