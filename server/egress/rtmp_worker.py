"""The sandboxed process that pushes one stream over RTMP, started by `server.egress.rtmp`.

It is a process because libav holds the interpreter's lock while it waits for the network. It connects to the gateway's
relay on this machine and nowhere else. Standard input carries msgpack messages, each prefixed with its length in
4 bytes: one `Opening`, then one `AccessUnit` per frame. Standard output gets `live` once, then `frame` for each frame
sent.

It is run by its path and imports nothing from this project.
"""

import io
import struct
import sys
from fractions import Fraction
from typing import BinaryIO

import av
import msgspec

LENGTH = struct.Struct("!I")


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first message. The URL is sent here because other users can read a command line."""

    url: str
    fps: int


class AccessUnit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One H.264 frame in Annex B; keyframes include their parameter sets. The first frame is a keyframe."""

    time: int
    """In 1/90000 s."""
    key: bool
    data: bytes


def pack(message: Opening | AccessUnit) -> bytes:
    """The message as it crosses the pipe: length, then msgpack."""
    body = msgspec.msgpack.encode(message)
    return LENGTH.pack(len(body)) + body


def read(pipe: BinaryIO) -> bytes:
    """The next message's body; empty at the end of the pipe."""
    head = pipe.read(LENGTH.size)
    return pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def push(pipe: BinaryIO) -> None:
    """Push frames until the pipe ends. Raises what libav raises when the connection breaks."""
    opening = msgspec.msgpack.decode(read(pipe), type=Opening)
    start: int | None = None
    decode = msgspec.msgpack.Decoder(AccessUnit).decode
    out, stream = None, None
    while body := read(pipe):
        unit = decode(body)
        if out is None or stream is None:
            # The demuxer extracts size and parameter sets, which RTMP sends before the frames.
            with av.open(io.BytesIO(unit.data), format="h264") as template:
                out = av.open(opening.url, "w", format="flv", container_options={"flvflags": "no_duration_filesize"})
                stream = out.add_stream_from_template(template.streams.video[0], time_base=Fraction(1, 1000))
                out.start_encoding()
            print("live", flush=True)
            start = unit.time
        packet = av.Packet(unit.data)
        packet.stream, packet.time_base = stream, Fraction(1, 90_000)
        packet.pts = packet.dts = unit.time - (start or 0)
        packet.is_keyframe = unit.key
        out.mux(packet)
        print("frame", flush=True)
    if out is not None:
        out.close()


if __name__ == "__main__":
    av.logging.set_level(None)  # libav's messages contain the URL
    try:
        push(sys.stdin.buffer)
    except Exception as error:  # of any kind; its text may contain the URL
        print(f"error {type(error).__name__}", flush=True)
        sys.exit(1)
