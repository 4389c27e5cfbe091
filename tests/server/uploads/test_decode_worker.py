"""What the decoding process makes of pictures and clips, and what it can still do once confined."""

import io
import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.uploads import decode_worker
from tests.server.thread_limit import run_without_new_threads
from tests.server.uploads.samples import (
    DISPLAY_P3,
    LIGHTNESS_CMYK,
    LINEAR_GREY,
    animation,
    apng,
    chunk,
    clip,
    grey_png,
    heif_of_tiles,
    picture,
    plain_png,
    saved,
    still_clip,
)


def decoded(data: bytes, width: int = 16, height: int = 16, fps: int = 16) -> np.ndarray:
    return np.frombuffer(decode_worker.decode(data, width, height, fps), dtype=np.uint8).reshape(-1, height, width, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_becomes_one_frame_of_the_models_size(format: str) -> None:
    frames = decoded(picture(format=format))
    assert frames.shape == (1, 16, 16, 3)
    assert np.abs(frames.astype(int) - [200, 10, 30]).max() <= 6


def test_it_is_cut_about_its_middle_and_turned_upright() -> None:
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 0, 0), (32, 0, 64, 32))
    out = io.BytesIO()
    image.save(out, "PNG")
    assert np.abs(decoded(out.getvalue())[0].astype(int) - [255, 0, 0]).max() < 20

    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: wide becomes tall
    image.save(out := io.BytesIO(), "JPEG", exif=exif, quality=95)
    tall = decoded(out.getvalue(), 16, 48)[0]
    assert tall[24, :, 0].mean() > 200
    assert tall[2, :, 0].mean() < 60


def test_what_is_transparent_is_black() -> None:
    assert decoded(picture(colour=(255, 255, 255, 0))).max() == 0


def test_an_animation_is_played_at_the_models_rate() -> None:
    frames = decoded(animation([(0, 0, 0), (120, 120, 120), (240, 240, 240)], duration=250))
    assert frames[:, 0, 0, 0].tolist() == [0] * 4 + [120] * 4 + [240] * 4


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_a_clip_is_played_at_the_models_rate_and_its_newest_frames_are_kept(format: str) -> None:
    levels = decoded(clip(8, 8, format=format))[:, 8, 8, 0].astype(int)
    assert 14 <= len(levels) <= 16
    assert (np.diff(levels) >= -2).all()
    assert levels[0] < 40 and levels[-1] > 200
    long = decoded(clip(120, 16, format=format))
    assert len(long) == decode_worker.KEPT_FRAMES
    assert long[-1].mean() > 200
    assert long[0].mean() > 140


def test_of_a_photograph_with_more_pictures_inside_the_first_counts() -> None:
    out = io.BytesIO()
    first, second = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    first.save(out, "MPO", save_all=True, append_images=[second])
    assert decoded(out.getvalue()).shape[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit on processes does not count threads")
@pytest.mark.parametrize("kind", ["mp4", "webm", "webm with alpha"])
def test_a_clip_is_decoded_without_another_thread(kind: str) -> None:
    """`confine` forbids threads to whoever is not root."""
    if kind == "webm with alpha":
        data = still_clip(np.full((64, 64, 4), 99, np.uint8), "libvpx-vp9", "webm", "yuva420p")
    else:
        data = clip(8, 8, format=kind)
    setup = "import threading; from server.uploads import decode_worker; decode_worker.confine()"
    run_without_new_threads(setup, f"decode_worker.decode({data!r}, 16, 16, 16)")


def middle(data: bytes) -> list[int]:
    """The colour in the middle of the first frame."""
    red, green, blue = decoded(data)[0, 8, 8].tolist()
    return [red, green, blue]


def near(colour: list[int], wanted: tuple[int, int, int], within: int = 3) -> bool:
    return all(abs(one - other) <= within for one, other in zip(colour, wanted, strict=True))


def sixteen_bits(**options: object) -> bytes:
    ramp = Image.frombytes("I;16", (256, 16), struct.pack("<256H", *range(0, 65536, 257)) * 16)
    return saved(ramp, **options)


def test_16_bit_grey_keeps_its_levels() -> None:
    ramp = decoded(sixteen_bits(), 256, 16)
    assert ramp[0, 8, :, 0].tolist() == list(range(256))
    assert ramp.mean() == 127.5
    assert decoded(apng(16, [10 * 257, 200 * 257], (1, 16)))[:, 8, 8, 0].tolist() == [10, 200]


def test_one_transparent_level_is_found_at_every_depth_of_grey() -> None:
    """PNG (third edition), 11.3.1.1: tRNS holds a sample as stored, whatever its depth."""
    assert decoded(sixteen_bits(transparency=65535), 256, 16)[0, 8, 250:, 0].tolist() == [250, 251, 252, 253, 254, 0]
    for depth, row, transparent, levels in [
        (1, b"\xf0\x0f", 1, [0] * 16),
        (2, b"\xff\xff\x55\x55", 3, [0] * 8 + [85] * 8),
        (4, b"\xff" * 4 + b"\x77" * 4, 15, [0] * 8 + [119] * 8),
        (8, b"\xff" * 8 + b"\x77" * 8, 255, [0] * 8 + [119] * 8),
    ]:
        data = grey_png(depth, row, chunk(b"tRNS", struct.pack("!H", transparent)))
        assert decoded(data)[0, 8, :, 0].tolist() == levels, depth
    faint = chunk(b"tRNS", struct.pack("!H", 200))
    assert decoded(apng(8, [200, 100], (1, 16), faint))[:, 8, 8, 0].tolist() == [0, 100], "in every frame"


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF"])
def test_each_frame_of_an_animation_lasts_as_long_as_it_says(format: str) -> None:
    first, *rest = [Image.new("RGB", (32, 32), (level,) * 3) for level in (0, 100, 200)]
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(first, format, save_all=True, append_images=rest, duration=[250, 130, 500], **options)
    assert decoded(data)[:, 8, 8, 0].tolist() == [0] * 4 + [100] * 2 + [200] * 8


def test_the_frames_of_an_apng() -> None:
    assert decoded(apng(8, [0, 100, 200], (1, 3)), fps=3)[:, 8, 8, 0].tolist() == [0, 100, 200]
    assert decoded(apng(8, [0, 100, 200], (1, 100)))[:, 8, 8, 0].tolist() == [200], "shorter than one frame"
    first, *rest = [Image.new("RGB", (32, 32), (level,) * 3) for level in (0, 100, 200)]
    data = saved(first, save_all=True, append_images=rest, duration=125, default_image=True)
    assert decoded(data)[:, 8, 8, 0].tolist() == [100] * 2 + [200] * 2, "the default image is not shown"


@pytest.mark.parametrize(("format", "mode"), [("PNG", "RGB"), ("PNG", "RGBA"), ("JPEG", "RGB"), ("WEBP", "RGB")])
def test_an_icc_profile_is_converted_to_srgb(format: str, mode: str) -> None:
    image = Image.new(mode, (64, 32), (200, 60, 60, 255)[: len(mode)])
    assert near(middle(saved(image, format, icc_profile=DISPLAY_P3)), (217, 42, 52))


def test_profiles_of_grey_and_cmyk() -> None:
    """Light 128/255 is 188 in sRGB. CMYK's K 128/255 leaves L* 49.8 here, which is 118."""
    assert near(middle(saved(Image.new("L", (64, 32), 128), icc_profile=LINEAR_GREY)), (188, 188, 188), 1)
    translucent = saved(Image.new("LA", (64, 32), (128, 128)), icc_profile=LINEAR_GREY)
    assert near(middle(translucent), (94, 94, 94), 1)
    cmyk = Image.new("CMYK", (64, 32), (0, 0, 0, 128))
    assert near(middle(saved(cmyk, "JPEG", icc_profile=LIGHTNESS_CMYK)), (118, 118, 118), 2)
    assert near(middle(saved(cmyk, "JPEG")), (127, 127, 127), 2)


@pytest.mark.parametrize("profile", [b"x", DISPLAY_P3[:300], DISPLAY_P3[:128] + b"\xff" * 400, LIGHTNESS_CMYK])
def test_a_profile_that_is_damaged_or_of_another_kind_of_colour_is_ignored(profile: bytes) -> None:
    assert middle(saved(Image.new("RGB", (64, 32), (200, 60, 60)), icc_profile=profile)) == [200, 60, 60]


def gamma(value: int) -> bytes:
    return chunk(b"gAMA", struct.pack("!I", value))


def chromaticities(*values: int) -> bytes:
    return chunk(b"cHRM", struct.pack("!8I", *values))


P3_POINTS = chromaticities(31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
SRGB_POINTS = chromaticities(31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)


@pytest.mark.parametrize(
    ("chunks", "stored", "shown"),
    [
        ([gamma(100_000)], (128, 64, 10), (188, 137, 56)),
        ([gamma(45_455)], (128, 64, 10), (128, 64, 10)),
        ([gamma(45_455), SRGB_POINTS], (128, 64, 10), (128, 64, 10)),
        ([gamma(55_556)], (128, 128, 128), (146, 146, 146)),
        ([P3_POINTS], (200, 60, 60), (217, 42, 52)),
        ([gamma(100_000), chunk(b"sRGB", b"\0")], (128, 64, 10), (128, 64, 10)),
        ([chunk(b"cICP", bytes((12, 13, 0, 1)))], (200, 60, 60), (217, 42, 52)),
        ([chunk(b"cICP", bytes((1, 13, 0, 1))), gamma(100_000)], (128, 64, 10), (128, 64, 10)),
        ([chunk(b"cICP", bytes((9, 16, 0, 1)))], (148, 148, 148), (255, 255, 255)),
        ([chunk(b"cICP", bytes((1, 16, 0, 1)))], (128, 128, 128), (181, 181, 181)),
        ([chunk(b"cICP", bytes((1, 18, 0, 1)))], (128, 128, 128), (138, 138, 138)),
        ([chunk(b"cICP", bytes((9, 18, 0, 1)))], (191, 191, 191), (255, 255, 255)),
        ([gamma(0)], (128, 64, 10), (128, 64, 10)),
        ([chromaticities(*[0] * 8)], (128, 64, 10), (128, 64, 10)),
    ],
)
def test_the_colour_space_of_a_png(
    chunks: list[bytes], stored: tuple[int, int, int], shown: tuple[int, int, int]
) -> None:
    """PNG (third edition), 4.3: cICP goes before iCCP, that before sRGB, that before gAMA and cHRM.

    Samples 148 of PQ and 191 of HLG are reference white, 203 cd/m2 (ITU-R BT.2408, table 1); samples 128 are 94 and
    51 cd/m2.
    """
    assert near(middle(plain_png(stored, *chunks)), shown, 2)


def quadrants(data: bytes) -> str:
    """The colours of the four quarters, in the order of reading: red, green, blue or white."""
    frame = decoded(data, 32, 32)[0]
    names = {(True, False, False): "r", (False, True, False): "g", (False, False, True): "b", (True, True, True): "w"}
    return "".join(names[tuple((frame[y, x] > 128).tolist())] for y in (8, 24) for x in (8, 24))


QUARTERS = np.zeros((64, 64, 3), np.uint8)
QUARTERS[:32, :32] = 250, 0, 0
QUARTERS[:32, 32:] = 0, 250, 0
QUARTERS[32:, :32] = 0, 0, 250
QUARTERS[32:, 32:] = 250


UPRIGHT = {1: "rgbw", 2: "grwb", 3: "wbgr", 4: "bwrg", 5: "rbgw", 6: "brwg", 7: "wgbr", 8: "gwrb"}


@pytest.mark.parametrize(("orientation", "shown"), UPRIGHT.items())
@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_every_exif_orientation(orientation: int, shown: str, format: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert quadrants(saved(Image.fromarray(QUARTERS), format, exif=exif)) == shown


def test_damaged_exif_is_ignored() -> None:
    data = saved(Image.fromarray(QUARTERS), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")
    assert quadrants(data) == "rgbw"


@pytest.mark.parametrize(
    ("turn", "shown"),
    [
        *zip([(0, False), (90, False), (180, False), (-90, False)], ["rgbw", "gwrb", "wbgr", "brwg"], strict=True),
        *zip([(0, True), (90, True), (180, True), (-90, True)], ["grwb", "wgbr", "bwrg", "rbgw"], strict=True),
    ],
)
def test_a_clips_display_matrix(turn: tuple[int, bool], shown: str) -> None:
    """ISO/IEC 14496-12, 8.3.2; -90 is what a phone held upright writes."""
    assert quadrants(still_clip(QUARTERS, turn=turn)) == shown


def test_a_turned_clip_keeps_its_proportions() -> None:
    band = np.zeros((64, 192, 3), np.uint8)
    band[:, 64:128] = 250, 0, 0  # the middle square
    for turned in (still_clip(band, turn=(-90, False)), still_clip(band, "libvpx-vp9", "webm", turn=(90, False))):
        frame = decoded(turned, 16, 48)[0, :, 8, 0]
        assert frame[24] > 240 and frame[4] < 10 and frame[44] < 10


@pytest.mark.parametrize("container", ["mp4", "webm"])
def test_pixels_that_are_not_square(container: str) -> None:
    """With pixels twice as wide as high, 64 x 64 is a picture of 128 x 64, whose middle square is half its width."""
    band = np.zeros((64, 64, 3), np.uint8)
    band[:, 16:48] = 250, 0, 0
    if container == "mp4":
        data = still_clip(band, aspect=Fraction(2))
    else:
        data = still_clip(band, "libvpx-vp9", "webm")
        # The language (7 bytes) makes room for DisplayWidth = 128 and an empty element.
        data = data.replace(b"\x22\xb5\x9c\x83und", b"")
        size = b"\xb0\x81\x40\xba\x81\x40"
        data = data.replace(b"\xe0\x86" + size, b"\xe0\x8d" + size + b"\x54\xb0\x81\x80\xec\x81\0")
    frame = decoded(data, 32, 32)[0]
    assert frame[16, :, 0].min() > 240
    if container == "mp4":  # turned, the same square is tall
        assert decoded(still_clip(band, aspect=Fraction(2), turn=(90, False)), 32, 32)[0, :, 16, 0].min() > 240


def test_what_is_transparent_in_a_clip_is_black() -> None:
    pixels = np.full((64, 64, 4), 200, np.uint8)
    pixels[:, :32, 3], pixels[:, 32:, 3] = 0, 255
    frame = decoded(still_clip(pixels, "libvpx-vp9", "webm", "yuva420p"))[0, 8, :, 0].astype(int)
    assert frame[:7].max() < 3 and abs(frame[9:] - 200).max() < 4


def test_the_colour_space_of_a_clip() -> None:
    red = np.full((64, 64, 3), (200, 60, 60), np.uint8)
    assert near(middle(still_clip(red, code_points=(1, 1))), (200, 60, 60), 4)
    assert near(middle(still_clip(red, code_points=(12, 13))), (217, 42, 52), 5)
    grey = np.full((64, 64, 3), 191, np.uint8)
    assert near(middle(still_clip(grey, code_points=(9, 18))), (254, 254, 254), 4)


@pytest.mark.parametrize("brand", [b"heic", b"isom"])
def test_heif_is_refused_by_name(brand: bytes) -> None:
    """FFmpeg decodes the first tile of a grid, a quarter of this picture."""
    with pytest.raises(decode_worker.Refused) as caught:
        decode_worker.decode(heif_of_tiles(brand), 16, 16, 16)
    assert caught.value.args == (decode_worker.Refusal.HEIF,)


HOSTILE = {
    "files": "open('/etc/hostname')",
    "sockets": "import socket; socket.socket()",
    "writing": "import os; os.pipe()",
    "memory": "bytes(2 << 30)",
}
PRELUDE = """
import os, sys, socket, resource
sys.path.insert(0, {folder!r})
import decode_worker
decode_worker.CPU_SECONDS = 1
decode_worker.confine()
try:
    {act}
except (OSError, MemoryError, ValueError):
    os._exit(99)
os._exit(0)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_confined_process_can_open_nothing(name: str) -> None:
    script = PRELUDE.format(folder=str(Path(decode_worker.__file__).parent), act=HOSTILE[name])
    assert subprocess.run([sys.executable, "-I", "-c", script], check=False, timeout=30).returncode == 99


def test_processor_time_is_bounded() -> None:
    script = PRELUDE.format(folder=str(Path(decode_worker.__file__).parent), act="exec('while True: pass')")
    assert subprocess.run([sys.executable, "-I", "-c", script], check=False, timeout=30).returncode < 0
