"""The sandboxed process that pushes one stream over RTMP, started by `server.egress.rtmp`.

It is a process because libav holds the interpreter's lock while it waits for the network. It connects to the gateway's
relay on this machine and nowhere else. Standard input carries msgpack messages, each prefixed with its length in
4 bytes: one `Opening`, then one `AccessUnit` per frame. Standard output gets `live` once, then `frame` for each frame
sent.

It is run by its path and imports nothing from this project.
"""

import io
import re
import struct
import sys
from fractions import Fraction
from typing import BinaryIO

import av
import msgspec
from av.container import OutputContainer

LENGTH = struct.Struct("!I")

AUDIO_RATE = 44_100
"""Samples per second of the silent track. FLV's audio tags can state this rate and fractions of it only."""
AUDIO_SAMPLES = 1024
"""Samples per AAC frame."""


class Opening(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first message. The URLs are sent here because other users can read a command line."""

    url: str
    """Of the relay, with the path of the URL that was asked for."""
    tc_url: str
    """What the server is told to be connected to: scheme, host, port and application of the URL that was asked for."""
    silent_audio: bool
    """Send a silent AAC track."""


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


def tee_target(opening: Opening) -> str:
    """The name to open with libav's `tee` muxer, which writes FLV to one URL.

    PyAV gives a protocol no options; `tee` does. Its options are unescaped twice, the URL that follows them once.
    """
    options = {"f": "flv", "flvflags": "no_duration_filesize", "rtmp_tcurl": opening.tc_url}
    listed = ":".join(f"{name}={escape(escape(value))}" for name, value in options.items())
    return f"[{listed}]{escape(opening.url)}"


def escape(text: str) -> str:
    """Escape for libav's `av_get_token`."""
    return re.sub(r"[^A-Za-z0-9_]", r"\\\g<0>", text)


class Silence:
    """A silent AAC track, sent alongside the video."""

    def __init__(self, out: OutputContainer) -> None:
        self._out = out
        self._stream = out.add_stream("aac", rate=AUDIO_RATE, layout="stereo", bit_rate=32_000)
        self._clock = 0
        """Of the samples encoded, in 1/44100 s."""
        self._sent = -1
        """Time of the last packet sent, in 1/44100 s. The encoder is a frame behind."""

    def send_past(self, time: int) -> None:
        """Send audio until it is past `time`, in 1/90000 s.

        libav holds back a video frame until there is later audio, and `tee` holds back the last audio packet: so the
        last two are past.
        """
        while (self._sent - AUDIO_SAMPLES) * 90_000 <= time * AUDIO_RATE:
            self._clock += AUDIO_SAMPLES  # the encoder puts a frame of priming first, which then starts at 0
            frame = av.AudioFrame(format="fltp", layout="stereo", samples=AUDIO_SAMPLES)
            for plane in frame.planes:
                plane.update(bytes(plane.buffer_size))
            frame.pts, frame.sample_rate, frame.time_base = self._clock, AUDIO_RATE, Fraction(1, AUDIO_RATE)
            for packet in self._stream.encode(frame):
                self._sent = packet.pts or 0
                self._out.mux(packet)


def push(pipe: BinaryIO) -> None:
    """Push frames until the pipe ends. Raises what libav raises when the connection breaks."""
    opening = msgspec.msgpack.decode(read(pipe), type=Opening)
    start: int | None = None
    decode = msgspec.msgpack.Decoder(AccessUnit).decode
    out, stream, silence = None, None, None
    while body := read(pipe):
        unit = decode(body)
        if out is None or stream is None:
            # The demuxer extracts size and parameter sets, which RTMP sends before the frames.
            with av.open(io.BytesIO(unit.data), format="h264") as template:
                # Without the option, `tee` would hold back all audio that is later than the last video frame.
                options = {"max_interleave_delta": "1"}
                out = av.open(tee_target(opening), "w", format="tee", container_options=options)
                stream = out.add_stream_from_template(template.streams.video[0], time_base=Fraction(1, 1000))
                silence = Silence(out) if opening.silent_audio else None
                out.start_encoding()
            print("live", flush=True)
            start = unit.time
        packet = av.Packet(unit.data)
        packet.stream, packet.time_base = stream, Fraction(1, 90_000)
        packet.pts = packet.dts = unit.time - (start or 0)
        packet.is_keyframe = unit.key
        if silence is not None:
            silence.send_past(packet.pts)
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
