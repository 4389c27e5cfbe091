"""One stream as H.264 or VP8, encoded for real time: no frame waits for a later one, and keyframes come when asked for.

The bitrate is a ceiling. A keyframe may take three frames' share of it, so that it neither floods a viewer's line nor
falls out of what can be sent again.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.stream import VideoStream

from engine.wire import CLOCK_RATE

Codec = Literal["h264", "vp8"]

TIME_BASE = Fraction(1, CLOCK_RATE)
KEY_FRAMES_SECONDS = 10
"""A keyframe comes this often at least, whoever asks."""
KEY_SHARE = 3
"""Frames' worth of bits that a keyframe may take."""
BT601 = 6
"""SMPTE 170M, in the numbers of H.273: what VP8 always means, and what a picture without a label is taken for."""
LIMITED_RANGE = 1


@dataclass(frozen=True, slots=True, eq=False)
class EncodedFrame:
    """One frame as the encoder gave it: an access unit in Annex B, keyframes with parameter sets, or a VP8 frame."""

    packet: "Packet[VideoStream]"
    """`pts` is on the playback clock, which stands still in no stall, in 1/90000 s."""
    key: bool


class VideoEncoder:
    """RGB24 in, packets out. To be used by one thread at a time."""

    def __init__(self, codec: Codec, width: int, height: int, fps: int, kbps: int | None) -> None:
        """`kbps` is in kbit/s; None, with H.264 only, is for a file: no line has to carry it while it is made."""
        if codec == "vp8":
            assert kbps is not None
            self._context = _vp8(fps, kbps)
        else:
            self._context = _h264_file(fps) if kbps is None else _h264(fps, kbps)
        self._context.width, self._context.height = width, height

    def encode(self, rgb: memoryview, clock: int, *, key: bool) -> EncodedFrame | None:
        """Encode the next frame, height x width x 3 bytes; None when the encoder chose to skip it.

        `clock` is its time in 1/90000 s, later than that of the frame before.
        """
        frame = picture(rgb, self._context.width, self._context.height)
        frame.pts, frame.time_base = clock, TIME_BASE
        frame.pict_type = PictureType.I if key else PictureType.NONE
        packets = self._context.encode(frame)
        return EncodedFrame(packets[0], packets[0].is_keyframe) if packets else None


def picture(rgb: memoryview, width: int, height: int) -> av.VideoFrame:
    """A frame as encoders want it, YUV 4:2:0 from height x width x 3 bytes."""
    frame = av.VideoFrame(width, height, "rgb24")
    plane = frame.planes[0]
    if padding := plane.line_size - 3 * width:
        rows = (rgb[3 * width * y : 3 * width * (y + 1)] for y in range(height))
        plane.update(b"".join(bytes(row) + bytes(padding) for row in rows))
    else:
        plane.update(bytes(rgb))
    return frame.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")


def with_alpha(frame: av.VideoFrame, opacity: bytes) -> av.VideoFrame:
    """A frame in YUV 4:2:0 and its opacity, height x width bytes, as one in YUVA."""
    made = av.VideoFrame(frame.width, frame.height, "yuva420p")
    for mine, plane in zip(made.planes, frame.planes, strict=False):
        mine.update(_padded(bytes(plane), plane.line_size, mine.line_size))
    made.planes[3].update(_padded(opacity, frame.width, made.planes[3].line_size))
    return made


def _padded(rows: bytes, size: int, line_size: int) -> bytes:
    """Rows of `size` bytes, cut or filled up to `line_size`."""
    if size == line_size:
        return rows
    cut = (rows[at : at + min(size, line_size)] for at in range(0, len(rows), size))
    return b"".join(row.ljust(line_size, b"\0") for row in cut)


def _context(name: str, fps: int, options: dict[str, str]) -> VideoCodecContext:
    context = av.CodecContext.create(name, "w")
    assert isinstance(context, VideoCodecContext)
    context.pix_fmt = "yuv420p"
    context.framerate = Fraction(fps)
    context.time_base = TIME_BASE
    context.gop_size = KEY_FRAMES_SECONDS * fps
    context.thread_count = 1  # a second thread would take another stream's core, or delay a frame
    context.options = options
    return context


def _h264(fps: int, kbps: int) -> VideoCodecContext:
    context = _context(
        "libx264",
        fps,
        {
            "preset": "superfast",
            "tune": "zerolatency",
            "crf": "20",
            "maxrate": f"{kbps}k",
            "bufsize": f"{KEY_SHARE * kbps // fps}k",
            "forced-idr": "1",
            "x264-params": "scenecut=0",
        },
    )
    # What every browser decodes and WebRTC offers: no B-frames, no CABAC.
    context.profile = "Baseline"
    return _labelled(context)


def _h264_file(fps: int) -> VideoCodecContext:
    # Zero latency still: a frame that is handed over is in the file, for who reads along.
    options = {"preset": "veryfast", "tune": "zerolatency", "crf": "17", "forced-idr": "1"}
    context = _context("libx264", fps, options)
    context.profile = "Main"
    return _labelled(context)


def _labelled(context: VideoCodecContext) -> VideoCodecContext:
    context.max_b_frames = 0
    context.colorspace = context.color_primaries = context.color_trc = BT601
    context.color_range = LIMITED_RANGE
    return context


def _vp8(fps: int, kbps: int) -> VideoCodecContext:
    context = _context(
        "libvpx",
        fps,
        {
            "deadline": "realtime",
            "cpu-used": "-6",
            "lag-in-frames": "0",
            "auto-alt-ref": "0",
            "minrate": f"{kbps}k",
            "maxrate": f"{kbps}k",
            "bufsize": f"{kbps}k",
            "undershoot-pct": "100",
            "overshoot-pct": "15",
            "static-thresh": "1",
            "max-intra-rate": str(100 * KEY_SHARE),
        },
    )
    context.bit_rate = 1000 * kbps
    context.qmin, context.qmax = 6, 63  # below 6 nobody sees the difference that the bits make
    return context
