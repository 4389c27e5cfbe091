"""Encodes one stream as H.264 or VP8 in real time: no frame waits for a later one, and keyframes come on request.

The bitrate is a ceiling. A keyframe may use three frames' share of it, so that it neither floods a viewer's connection
nor exceeds the window of packets that can be retransmitted.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import av
from av.packet import Packet
from av.video.codeccontext import VideoCodecContext
from av.video.frame import PictureType
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter
from av.video.stream import VideoStream

from engine.wire import CLOCK_RATE
from server.media.h264 import level_idc

Codec = Literal["h264", "vp8"]

TIME_BASE = Fraction(1, CLOCK_RATE)
MAX_KEY_INTERVAL_SECONDS = 10
"""The longest interval between keyframes when nobody requests one."""
KEY_SHARE = 3
"""How many frames' share of the bitrate a keyframe may use."""
FILE_BITS_PER_PIXEL = 2
"""A file's ceiling, which only noise meets at this quality: without one, no level of H.264 could be promised."""
BT601 = 6
"""SMPTE 170M by its code in H.273: VP8 always uses it, and players assume it for an unlabelled picture."""
LIMITED_RANGE = 1


@dataclass(frozen=True, slots=True, eq=False)
class EncodedFrame:
    """One encoded frame: an H.264 access unit in Annex B (keyframes include parameter sets), or a VP8 frame."""

    packet: "Packet[VideoStream]"
    """Its `pts` is on the playback clock, in 1/90000 s, which runs on during a stall."""
    key: bool


class VideoEncoder:
    """Encodes RGB24 frames. For one thread at a time."""

    def __init__(self, codec: Codec, width: int, height: int, fps: int, kbps: int | None) -> None:
        """`kbps` is the ceiling in kbit/s. None (H.264 only) is for a file, which no connection limits.

        H.264's level is that of `h264.level_idc` for this size, rate and ceiling.
        """
        if codec == "vp8":
            assert kbps is not None
            self._context = _vp8(fps, kbps)
        else:
            bits = FILE_BITS_PER_PIXEL * width * height * fps
            self._context = (
                _h264_file(width, height, fps, -(-bits // 1000)) if kbps is None else _h264(width, height, fps, kbps)
            )
        self._context.width, self._context.height = width, height
        self._converter = Yuv420Converter()

    def encode(self, rgb: memoryview, clock: int, *, key: bool) -> EncodedFrame | None:
        """Encode the next frame, RGB24 of height x width x 3 bytes; None if the encoder skips it.

        `clock` is its time in 1/90000 s and must increase from frame to frame.
        """
        frame = self._converter.convert(rgb, self._context.width, self._context.height)
        frame.pts, frame.time_base = clock, TIME_BASE
        frame.pict_type = PictureType.I if key else PictureType.NONE
        packets = self._context.encode(frame)
        return EncodedFrame(packets[0], packets[0].is_keyframe) if packets else None


class Yuv420Converter:
    """Converts RGB24 frames to YUV 4:2:0 (BT.601, limited range). For one thread at a time.

    It keeps a scaler of one thread. A scaler made for each frame would by default start a thread per core for each,
    which takes longer than the conversion, and fails where the number of processes is limited.
    """

    def __init__(self) -> None:
        self._scaler = VideoReformatter()

    def convert(self, rgb: memoryview, width: int, height: int) -> av.VideoFrame:
        """Convert RGB24, height x width x 3 bytes."""
        frame = av.VideoFrame(width, height, "rgb24")
        plane = frame.planes[0]
        if padding := plane.line_size - 3 * width:
            rows = (rgb[3 * width * y : 3 * width * (y + 1)] for y in range(height))
            plane.update(b"".join(bytes(row) + bytes(padding) for row in rows))
        else:
            plane.update(bytes(rgb))
        return self._scaler.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU601, dst_color_range=ColorRange.MPEG, threads=1
        )


def add_alpha(frame: av.VideoFrame, opacity: bytes) -> av.VideoFrame:
    """Combine a YUV 4:2:0 frame and its opacity, height x width bytes, to a YUVA 4:2:0 frame."""
    result = av.VideoFrame(frame.width, frame.height, "yuva420p")
    for target, plane in zip(result.planes, frame.planes, strict=False):
        target.update(_padded(bytes(plane), plane.line_size, target.line_size))
    result.planes[3].update(_padded(opacity, frame.width, result.planes[3].line_size))
    return result


def _padded(rows: bytes, size: int, line_size: int) -> bytes:
    """Rows of `size` bytes, each truncated or zero-padded to `line_size`."""
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
    context.gop_size = MAX_KEY_INTERVAL_SECONDS * fps
    context.thread_count = 1  # a second thread would take another stream's core, or delay a frame
    context.options = options
    return context


def _h264(width: int, height: int, fps: int, kbps: int) -> VideoCodecContext:
    context = _context(
        "libx264",
        fps,
        {
            "preset": "superfast",
            "tune": "zerolatency",
            "crf": "20",
            "maxrate": f"{kbps}k",
            "bufsize": f"{min(kbps, KEY_SHARE * kbps // fps)}k",
            "forced-idr": "1",
            "x264-params": f"scenecut=0:level={level_idc(width, height, fps, kbps)}",
        },
    )
    # Every browser decodes the Baseline profile and offers it in WebRTC: no B-frames, no CABAC.
    context.profile = "Baseline"
    return _set_colors(context)


def _h264_file(width: int, height: int, fps: int, kbps: int) -> VideoCodecContext:
    # Zero latency here too: each frame is in the file at once, for clients that read it while it grows.
    options = {
        "preset": "veryfast",
        "tune": "zerolatency",
        "crf": "17",
        "maxrate": f"{kbps}k",
        "bufsize": f"{kbps}k",
        "forced-idr": "1",
        "x264-params": f"level={level_idc(width, height, fps, kbps)}",
    }
    context = _context("libx264", fps, options)
    context.profile = "Main"
    return _set_colors(context)


def _set_colors(context: VideoCodecContext) -> VideoCodecContext:
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
    context.qmin, context.qmax = 6, 63  # below 6, more bits make no visible difference
    return context
