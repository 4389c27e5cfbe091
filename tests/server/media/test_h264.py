"""Levels of H.264: the encoder, `avcC`, session descriptions and files state one and the same."""

from pathlib import Path

import pytest

from server.library.mp4 import ClipWriter
from server.media import fmp4
from server.media.encoder import VideoEncoder
from server.media.h264 import answered_profile, codec_string, level_idc


def parameter_sets(width: int, height: int, fps: int, kbps: int | None) -> dict[int, bytes]:
    encoder = VideoEncoder("h264", width, height, fps, kbps)
    encoded = encoder.encode(memoryview(bytes(width * height * 3)), 0, key=True)
    assert encoded is not None
    return {unit[0] & 31: unit for unit in fmp4.nal_units(bytes(encoded.packet))}


@pytest.mark.parametrize(
    ("size", "fps", "kbps", "level"),
    [
        ((176, 144), 15, 64, 10),  # exactly level 1
        ((176, 144), 16, 64, 11),
        ((256, 256), 16, 384, 12),
        ((256, 256), 16, 500, 13),
        ((256, 256), 16, 2500, 21),  # mini, by default
        ((256, 512), 16, 2500, 21),
        ((832, 480), 16, 2500, 30),
        ((832, 480), 16, 10_001, 31),
        ((256, 256), 16, 20_000, 32),  # the issue's: the bit rate alone asks for it
        ((1280, 704), 24, 2500, 31),
        ((1280, 1408), 24, 2500, 40),  # stacked on its matte
        ((1920, 1080), 30, 2500, 40),
        ((1920, 1080), 60, 2500, 42),
        ((1920, 1080), 30, 50_001, 50),
        ((2048, 16), 16, 64, 31),  # so wide that its width decides (A.3.1, item f)
    ],
)
def test_the_level_is_that_of_table_a_1(size: tuple[int, int], fps: int, kbps: int, level: int) -> None:
    assert level_idc(*size, fps, kbps) == level


def test_no_level_suffices() -> None:
    with pytest.raises(ValueError, match="no level"):
        level_idc(16384, 16384, 16, 2500)


@pytest.mark.parametrize(
    ("size", "fps", "kbps"),
    [
        ((256, 256), 16, 2500),
        ((256, 256), 16, 20_000),
        ((256, 256), 16, 50),
        ((1280, 1408), 24, 2500),
        ((64, 48), 1, 50),
    ],
)
def test_the_stream_and_its_init_segment_state_the_level(size: tuple[int, int], fps: int, kbps: int) -> None:
    units = parameter_sets(*size, fps, kbps)
    sps = units[fmp4.SPS]
    assert sps[1:4] == bytes([0x42, 0xC0, level_idc(*size, fps, kbps)])
    init = fmp4.init_segment(sps, units[fmp4.PPS], *size)
    avcc = init[init.index(b"avcC") + 4 :]
    assert codec_string(sps) == f"avc1.{avcc[1:4].hex()}" == f"avc1.42c0{level_idc(*size, fps, kbps):02x}"


def test_a_clip_keeps_its_level(tmp_path: Path) -> None:
    """Its ceiling of two bits per pixel decides, where there was none before."""
    (path := tmp_path / "clip.mp4").touch()
    writer = ClipWriter(path, 256, 256, 16)
    writer.add_rgb([memoryview(bytes(256 * 256 * 3))] * 2)
    writer.finish()
    data = path.read_bytes()
    assert data[data.index(b"avcC") + 5 :][:3] == bytes([0x4D, 0x40, level_idc(256, 256, 16, 2098)])


@pytest.mark.parametrize(
    ("offered", "asymmetric", "level", "answered"),
    [
        ("42e01f", "0", 31, "42e01f"),
        ("42e01f", "0", 21, "42e015"),  # a lower level is what the offer can take
        ("42e00d", "0", 21, None),
        ("42e00d", None, 21, None),  # 0 is the default
        ("42e00d", "0", 13, "42e00d"),
        ("42e00d", "1", 21, "42e015"),
        ("42C01F", "1", 40, "42c028"),
        ("42001f", "1", 31, "42001f"),  # Baseline: its decoders play Constrained Baseline
        ("42f00b", "0", 11, None),  # level 1b
        ("42f00b", "0", 10, "42e00a"),
        ("4d801f", "0", 31, "4d801f"),  # Main with constraint_set0 is Constrained Baseline
        ("4d001f", "1", 31, None),
        ("64001f", "1", 31, None),
        ("nonsense", "1", 31, None),
        ("42e0", "1", 31, None),
        ("42e01f", "1", None, None),
    ],
)
def test_what_is_answered_to_an_offer_of_h264(
    offered: str, asymmetric: str | None, level: int | None, answered: str | None
) -> None:
    """RFC 6184, sections 8.1 and 8.2.2."""
    parameters = {"profile-level-id": offered, "level-asymmetry-allowed": asymmetric}
    given = {name: value for name, value in parameters.items() if value is not None}
    assert answered_profile(given, level) == answered


def test_an_offer_without_a_level_is_taken_as_browsers_take_it() -> None:
    assert answered_profile({}, 30) == "42e01e"
    assert answered_profile({}, 32) is None
