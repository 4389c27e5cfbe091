"""The process that pushes one stream out over RTMP, started by `server.egress.outgoing` and told nothing but that.

libav holds the interpreter's lock while it waits for the network, so this never runs in the gateway. It connects to a
relay of the gateway's on this machine and nowhere else. Standard input brings msgpack messages, each after its length
in 4 bytes: an `Opening`, then an `AccessUnit` a frame. Standard output says `live`, then `frame` for each one sent.

It is run by its path and imports nothing of ours.
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
    """The first message. The URL comes this way since others may read a command line."""

    url: str
    fps: int


class AccessUnit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One frame of H.264 in Annex B, keyframes with parameter sets; the first is a keyframe."""

    time: int
    """1/90000 s."""
    key: bool
    data: bytes


def message(item: Opening | AccessUnit) -> bytes:
    """As it crosses the pipe."""
    body = msgspec.msgpack.encode(item)
    return LENGTH.pack(len(body)) + body


def read(pipe: BinaryIO) -> bytes:
    """The next message's body; empty at the end."""
    head = pipe.read(LENGTH.size)
    return pipe.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""


def push(pipe: BinaryIO) -> None:
    """Until the pipe ends. Raises what libav raises when the connection breaks."""
    opening = msgspec.msgpack.decode(read(pipe), type=Opening)
    start: int | None = None
    decode = msgspec.msgpack.Decoder(AccessUnit).decode
    out, stream = None, None
    while body := read(pipe):
        unit = decode(body)
        if out is None or stream is None:
            # The demuxer finds size and parameter sets, which go ahead of the frames.
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
    av.logging.set_level(None)  # its messages hold the URL
    try:
        push(sys.stdin.buffer)
    except Exception as error:  # whatever it is, its text may hold the URL
        print(f"error {type(error).__name__}", flush=True)
        sys.exit(1)
