"""The bitstreams of the encoder: one packet per frame, keyframes on request, bitrate as a ceiling."""

import random
import sys

import av
import pytest

from server.media.encoder import Codec, VideoEncoder
from server.media.frames import Frame
from tests.server.media.samples import frame
from tests.server.thread_limit import run_without_new_threads


def noise(index: int = 0, width: int = 128, height: int = 96) -> Frame:
    grain = bytes(96 + level // 4 for level in range(256))  # full-range noise is too much for any quantizer
    pixels = random.Random(index).randbytes(width * height * 3).translate(grain)
    return Frame(index, 5625 * index, width, height, 0, memoryview(pixels))


def is_key(codec: Codec, data: bytes) -> bool:
    """Whether the bitstream is a keyframe: by the first bit of a VP8 frame, or an IDR slice in H.264."""
    return not data[0] & 1 if codec == "vp8" else any(unit[0] & 31 == 5 for unit in data.split(b"\0\0\1")[1:])


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_frames_in_packets_out_one_for_one(codec: Codec) -> None:
    encoder = VideoEncoder(codec, 128, 96, 16, 2500)
    decoder = av.CodecContext.create("h264" if codec == "h264" else "libvpx", "r")
    shown = 0
    for index in range(40):
        encoded = encoder.encode(frame(index, 128, 96).rgb, 5625 * index, key=index in (0, 17))
        assert encoded is not None
        assert (encoded.packet.pts, encoded.packet.time_base.denominator) == (5625 * index, 90000)
        assert encoded.key == is_key(codec, bytes(encoded.packet)) == (index in (0, 17))
        if codec == "h264":  # a keyframe includes its parameter sets
            types = [unit[0] & 31 for unit in bytes(encoded.packet).split(b"\0\0\1")[1:]]
            assert ({7, 8} <= set(types)) == encoded.key
        shown += len(decoder.decode(av.Packet(bytes(encoded.packet))))
    assert shown >= 39  # the H.264 decoder may hold one back


@pytest.mark.parametrize("codec", ["h264", "vp8"])
def test_the_bitrate_is_a_ceiling(codec: Codec) -> None:
    """Noise takes all the bits that it is given."""
    sizes = []
    encoder = VideoEncoder(codec, 320, 192, 16, 500)
    for index in range(64):
        encoded = encoder.encode(noise(index, 320, 192).rgb, 5625 * index, key=index in (0, 32))
        assert encoded is not None
        sizes.append(len(bytes(encoded.packet)))
    mean = 500_000 / 8 / 16
    assert sum(sizes[16:]) / len(sizes[16:]) < 1.3 * mean
    assert sizes[32] < 6 * mean
    generous = VideoEncoder(codec, 320, 192, 16, 5000)
    more = [generous.encode(noise(index, 320, 192).rgb, 5625 * index, key=index == 0) for index in range(32)]
    assert sum(len(bytes(encoded.packet)) for encoded in more[16:] if encoded) > 3 * sum(sizes[16:32])


ENCODERS = {
    "h264": "encode = partial(VideoEncoder('h264', 256, 256, 16, 2500).encode, rgb, key=False)",
    "film": "encode = partial(VideoEncoder('h264', 256, 256, 16, None).encode, rgb, key=False)",
    "vp8": "encode = partial(VideoEncoder('vp8', 256, 256, 16, 2500).encode, rgb, key=False)",
    "webm": "encode = partial(WebmWriter(Path('/dev/null'), 256, 256, 16).add, rgb, matte=None)",
    "webm, alpha": "encode = partial(WebmWriter(Path('/dev/null'), 256, 256, 16, alpha=True).add, rgb, matte=matte)",
    "jpeg": "encode = lambda clock: encode_picture(Frame(0, clock, 256, 256, 0, rgb), 'mjpeg')",
    "stacked": "encode = lambda clock: encode_picture(Frame(0, clock, 256, 256, 0, rgb).stacked_on(matte), 'mjpeg')",
}
FIRST_FRAME = """
from functools import partial
from pathlib import Path
from server.library.recording_writer import WebmWriter
from server.media.encoder import VideoEncoder
from server.media.frames import Frame, encode_picture
from server.media.matte import Matte
rgb, matte = memoryview(bytes(range(256)) * 3 * 256), Matte("chroma", "#00b140", 0.1, 0.1)
{encoder}
encode({clock} 0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit on processes does not count threads")
@pytest.mark.parametrize("encoder", ENCODERS)
def test_no_frame_after_the_first_starts_a_thread(encoder: str) -> None:
    clock = {"webm": "pts=", "webm, alpha": "pts="}.get(encoder, "clock=")
    run_without_new_threads(
        FIRST_FRAME.format(encoder=ENCODERS[encoder], clock=clock),
        f"for index in range(1, 101): encode({clock} 5625 * index)",
    )
