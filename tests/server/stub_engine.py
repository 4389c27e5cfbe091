"""A process that speaks the engine's side of the wire, well or badly; started as `stub_engine.py BEHAVIOUR ...`."""

import argparse
import os
import sys
import time

import zmq

from engine import wire

WIDTH, HEIGHT = 8, 4


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("behaviour")
    parser.add_argument("--socket", required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    behaviour = options.behaviour
    context = zmq.Context()
    socket = context.socket(zmq.PAIR)
    socket.connect(options.socket)

    def send(message: wire.Message, *rest: bytes) -> None:
        socket.send_multipart([wire.encode(message), *rest])

    if behaviour == "dies":
        return 7
    if behaviour == "no-weights":
        send(wire.Fault("weights", "dit.safetensors is truncated"))
        time.sleep(0.1)
        return 3
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
            [wire.encode(wire.Frames("a", 0, 0, 1, WIDTH, HEIGHT, 0.1)), b"too short"],
            [wire.encode(wire.Frames("a", 0, 0, 1, WIDTH, HEIGHT, 0.1))],
            [wire.encode(wire.Frames("a", 0, 0, -1, WIDTH, HEIGHT, 0.1)), b""],
        ):
            socket.send_multipart(parts)
    info = wire.ModelInfo("mini", WIDTH, HEIGHT, 16, 12, 9, 2, 0.1, 1, f"{options.threads} threads")
    send(wire.Ready(wire.PROTOCOL, os.getpid(), [info]))
    beat, hung_since = 0.0, 0.0
    while os.getppid() == options.parent_pid:
        if time.monotonic() > beat and behaviour != "silent":
            beat = time.monotonic() + 0.1
            send(wire.Heartbeat(time.monotonic() - hung_since if hung_since else 0.0, 0, 0))
        if not socket.poll(20):
            continue
        match wire.decode_to_engine(socket.recv()):
            case wire.Open(stream=stream):
                send(wire.Started(stream))
                if behaviour == "crashes":
                    socket.close(linger=5000)
                    context.term()  # what was said is heard
                    os._exit(9)
            case wire.Credit(stream=stream) if behaviour == "hangs":
                hung_since = hung_since or time.monotonic()
            case wire.Credit(stream=stream):
                pixels = bytes(range(WIDTH * HEIGHT * 3))
                send(wire.Frames(stream, 0, 0, 1, WIDTH, HEIGHT, 0.1), pixels)
            case wire.Close(stream=stream):
                send(wire.Ended(stream, "closed"))
            case wire.Shutdown():
                if behaviour == "stubborn":
                    time.sleep(60)
                return 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
