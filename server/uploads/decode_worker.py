"""The sandboxed process that decodes one uploaded picture or clip, started by `server.uploads.images`.

It reads the upload from standard input and writes RGB24 frames to standard output, or exits with the status of a
`Refusal`; no decoder's message ever leaves it. Before decoding, it checks the sizes and frame counts in the headers and
accepts only the listed formats and codecs; while decoding, it stops at the limits whatever the headers said. Beyond
that the kernel limits memory and processor time, and allows no new file descriptor, so the process can open no file and
no connection. What a file says about its own display is applied: orientation, proportions of a pixel, colour space,
transparency.

It is run by its path and imports nothing from this project.
"""

import contextlib
import importlib
import io
import math
import os
import resource
import struct
import sys
from collections.abc import Callable, Iterator
from enum import IntEnum
from fractions import Fraction
from typing import Any

import av
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from PIL import Image, ImageCms, ImageMath

MAX_PIXELS = 1 << 24
"""Per frame of a clip or an animation."""
MAX_STILL_PIXELS = 1 << 25
"""Of a picture with one frame."""
MAX_JPEG_PIXELS = 1 << 26
"""Of a JPEG, which is scaled down while it is decoded."""
MAX_FRAMES = 300
"""Per clip, as stored."""
MAX_CLIP_PIXELS = 1 << 29
"""Over all frames of a clip: some seconds of work."""
KEPT_FRAMES = 33
"""How many of the last frames, at the model's frame rate, go to the engine: three chunks of the usual length."""
CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "mpeg4"})
"""Allowed codecs of clips, by decoder name: what browsers and cameras produce. JPEG 2000 is not among them."""

LAZY_MODULES = (
    *("av.audio.stream", "av.subtitles.stream", "av.video.stream", "av.video.reformatter"),
    *("PIL.MpoImagePlugin", "PIL.TiffImagePlugin", "PIL.WebPImagePlugin"),
)
"""Modules that PyAV and Pillow import on first use. `confine` imports them before it forbids opening files."""

CPU_SECONDS = 15
MEMORY_BYTES = 1536 << 20
"""Limit on address space. A clip of the largest frames with all its reference frames takes half of it."""


class Refusal(IntEnum):
    """Why an upload is refused, as the process's exit status."""

    DAMAGED = 80
    PIXELS = 81
    FRAMES = 82
    CLIP_PIXELS = 83
    NO_FRAME = 84
    CODEC = 85
    AMBIGUOUS = 86
    HEIF = 87


class Refused(Exception):
    """The upload is refused; `args[0]` is a `Refusal`."""


HEIF_BRANDS = frozenset(
    b"mif1 mif2 mif3 msf1 miaf heic heix heim heis hevc hevx hevm hevs avif avis avci avcs jpeg jpgs".split()
)
"""Major brands of still pictures in MP4's box structure (ISO/IEC 23008-12): HEIC, AVIF and their kin."""


def detect_format(data: bytes) -> str:
    """The format by the first bytes: Pillow's name for a picture, FFmpeg's for a container. Raises `Refused`."""
    signatures = {
        "PNG": data[:8] == b"\x89PNG\r\n\x1a\n",
        "JPEG": data[:3] == b"\xff\xd8\xff",
        "GIF": data[:6] in (b"GIF87a", b"GIF89a"),
        "WEBP": data[:4] == b"RIFF" and data[8:12] == b"WEBP",
        "mp4": data[4:8] == b"ftyp",
        "matroska": data[:4] == b"\x1aE\xdf\xa3",
    }
    kinds = [kind for kind, matches in signatures.items() if matches]
    if len(kinds) != 1:
        raise Refused(Refusal.AMBIGUOUS if kinds else Refusal.DAMAGED)
    if kinds == ["mp4"] and (data[8:12] in HEIF_BRANDS or has_items(data)):
        # FFmpeg would show one tile of a grid, and leave out cropping and rotation.
        raise Refused(Refusal.HEIF)
    return kinds[0]


def has_items(data: bytes) -> bool:
    """Whether an MP4 file has a `meta` box with a primary item at its top level, as HEIF pictures do."""
    at = 0
    while at + 8 <= len(data):
        size, name = struct.unpack_from(">I4s", data, at)
        if size == 1 and at + 16 <= len(data):
            size = struct.unpack_from(">Q", data, at + 8)[0]
        size = size or len(data) - at  # 0: up to the end of the file
        if name == b"meta" and b"pitm" in data[at : at + size]:
            return True
        if size < 8:
            break
        at += size
    return False


Shown = tuple[Image.Image, int]
"""A frame as it is displayed, RGB at the model's size, and its duration in ticks of 1/`fps` s."""


def decode(data: bytes, width: int, height: int, fps: int) -> bytes:
    """RGB24 frames in sRGB, concatenated, height x width x 3 bytes each: a clip's last ones, or a picture's only one.

    Each frame is turned upright and center-cropped to the model's proportions; transparent parts become black. Raises
    `Refused`, or whatever a decoder raises.
    """
    Image.MAX_IMAGE_PIXELS = MAX_JPEG_PIXELS
    kind = detect_format(data)
    read = clip_frames if kind in ("mp4", "matroska") else picture_frames
    kept: list[bytes] = []
    for picture, ticks in read(data, kind, (width, height), fps):
        kept = [*kept, *[picture.tobytes()] * ticks][-KEPT_FRAMES:]
    if not kept:
        raise Refused(Refusal.NO_FRAME)
    return b"".join(kept)


def check_size(width: int, height: int, limit: int = MAX_PIXELS) -> None:
    if width < 1 or height < 1 or width * height > limit:
        raise Refused(Refusal.PIXELS)


def check_clip(count: int, pixels: int) -> None:
    if count > MAX_FRAMES:
        raise Refused(Refusal.FRAMES)
    if count * pixels > MAX_CLIP_PIXELS:
        raise Refused(Refusal.CLIP_PIXELS)


def picture_frames(data: bytes, kind: str, size: tuple[int, int], fps: int) -> Iterator[Shown]:
    """The frames of a picture, still or animated."""
    with Image.open(io.BytesIO(data), formats=[kind]) as image:
        check_size(*image.size, limit=MAX_JPEG_PIXELS if kind == "JPEG" else MAX_STILL_PIXELS)
        # Further pictures in a JPEG are thumbnails and depth maps, not frames.
        count = 1 if kind == "JPEG" else frame_count(image)
        if count > 1:
            check_size(*image.size)
        check_clip(count, image.width * image.height)
        chunks = png_chunks(data) if kind == "PNG" else {}
        colours = Colours(picture_profile(image, chunks))
        turn = exif_turn(image)
        if kind == "JPEG":  # twice the size that is wanted leaves the resampling filter enough to work on
            width, height = stored_size(size, turn)
            image.draft(None, (2 * width, 2 * height))
        # The default image of an APNG need not belong to its animation.
        first = 1 if count > 1 and getattr(image, "default_image", False) else 0
        shown, some = Fraction(0), False
        for index in range(first, count):
            image.seek(index)
            image.load()  # only then does Pillow know how long a WebP's frame lasts
            shown += duration(image) * fps if count - first > 1 else 1
            picture = colours.as_srgb(fit(eight_bits(image, chunks), size, turn))
            if ticks := min(int(shown), KEPT_FRAMES):
                some = True
                yield picture, ticks
            shown %= 1
        if not some:  # an animation shorter than a tick
            yield picture, 1


def frame_count(image: Image.Image) -> int:
    """The number of frames, without decoding any."""
    count: int = getattr(image, "n_frames", 1)
    return count


def duration(image: Image.Image) -> Fraction:
    """How long the current frame of an animation is shown, in seconds."""
    # Pillow divides an APNG's two 16-bit numbers into a float: this is the fraction again.
    return Fraction(image.info.get("duration", 0) or 100).limit_denominator(1 << 16) / 1000


def png_chunks(data: bytes) -> dict[bytes, bytes]:
    """The bodies of a PNG's chunks that precede its pixels, the first one of each name."""
    chunks: dict[bytes, bytes] = {}
    at = 8
    while at + 8 <= len(data) and b"IDAT" not in chunks:
        length, name = struct.unpack_from(">I4s", data, at)
        chunks.setdefault(name, data[at + 8 : at + 8 + length])
        at += length + 12
    return chunks


def eight_bits(image: Image.Image, chunks: dict[bytes, bytes]) -> Image.Image:
    """The picture as L, LA, RGB, RGBA or CMYK, which can be resampled; `chunks` are a PNG's."""
    transparent = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion clips at 255
        grey = image.point(lambda value: value / 257 + 0.5).convert("L")
        if not isinstance(transparent, int):
            return grey
        wide = image.convert("I")
        opaque = ImageMath.lambda_eval(lambda of: (of["wide"] != transparent) * 255, wide=wide)
        return Image.merge("LA", (grey, opaque.convert("L")))
    if image.mode in ("1", "L", "RGB") and transparent is not None and b"tRNS" in chunks:
        # Pillow scales the samples to eight bits, but not the transparent one.
        depth = chunks[b"IHDR"][8]
        stored = struct.unpack_from(">3H" if image.mode == "RGB" else ">H", chunks[b"tRNS"])
        scale = 255 // min((1 << depth) - 1, 255)
        levels = tuple(level >> 8 if depth == 16 else (level & ((1 << depth) - 1)) * scale for level in stored)
        image.info["transparency"] = levels if image.mode == "RGB" else levels[0]
    mode = "L" if image.mode in ("1", "L", "LA") else "CMYK" if image.mode == "CMYK" else "RGB"
    if image.has_transparency_data:
        mode += "A"
    return image if image.mode == mode else image.convert(mode)


Turn = Image.Transpose | None
EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def stored_size(size: tuple[int, int], turn: Turn) -> tuple[int, int]:
    """Width and height before the turn."""
    return size[::-1] if turn in {EXIF_TURNS[orientation] for orientation in (5, 6, 7, 8)} else size


def exif_turn(image: Image.Image) -> Turn:
    """What turns a picture upright, by its EXIF or XMP orientation; damaged metadata says nothing."""
    try:
        return EXIF_TURNS.get(image.getexif().get(0x0112, 1))
    except Exception:
        return None


def fit(image: Image.Image, size: tuple[int, int], turn: Turn, aspect: Fraction = Fraction(1)) -> Image.Image:
    """Crop about the center to the proportions of `size` (width, height), resize, then turn upright.

    `aspect` is the width of a stored pixel over its height.
    """
    width, height = stored_size(size, turn)
    wanted = Fraction(width, height) / aspect
    crop_width = min(float(image.width), float(image.height * wanted))
    crop_height = min(float(image.height), float(image.width / wanted))
    left, top = (image.width - crop_width) / 2, (image.height - crop_height) / 2
    box = (left, top, min(left + crop_width, image.width), min(top + crop_height, image.height))
    fitted = image.resize((width, height), Image.Resampling.LANCZOS, box=box)
    return fitted if turn is None else fitted.transpose(turn)


def clip_frames(data: bytes, format: str, size: tuple[int, int], fps: int) -> Iterator[Shown]:
    """The frames of a clip."""
    with av.open(io.BytesIO(data), format=format) as container:
        assert isinstance(container, InputContainer)
        if not container.streams.video:
            raise Refused(Refusal.NO_FRAME)
        video = container.streams.video[0]
        if video.codec_context.codec.name not in CODECS:
            raise Refused(Refusal.CODEC)
        check_size(video.codec_context.width, video.codec_context.height)
        check_clip(video.frames, video.codec_context.width * video.codec_context.height)  # 0 if the header has no count
        video.thread_count = 1
        aspect = Fraction(video.sample_aspect_ratio or 1)
        ticks = 0
        last: VideoFrame | None = None
        colours: dict[tuple[int, int], Colours] = {}

        def shown(frame: VideoFrame) -> Image.Image:
            code_points = int(frame.color_primaries), int(frame.color_trc)
            if code_points not in colours:
                colours[code_points] = Colours(profile_of_code_points(*code_points))
            return colours[code_points].as_srgb(fit(as_image(frame), size, clip_turn(frame), aspect))

        for count, frame in enumerate(decoded_frames(container, video), start=1):
            check_size(frame.width, frame.height)
            check_clip(count, frame.width * frame.height)
            due = round(float(frame.time or 0.0) * fps)
            if last is not None and due > ticks:
                yield shown(last), min(due - ticks, KEPT_FRAMES)
                ticks = due
            last = frame
        if last is not None:
            yield shown(last), 1


def decoded_frames(container: InputContainer, video: VideoStream) -> Iterator[VideoFrame]:
    """The decoded frames, with their transparency where a WebM has one."""
    decoder = {"vp8": "libvpx", "vp9": "libvpx-vp9"}.get(video.codec_context.codec.canonical_name)
    if video.metadata.get("alpha_mode") != "1" or decoder is None:
        yield from container.decode(video)
        return
    # FFmpeg's own decoders leave the transparency out.
    context: VideoCodecContext = av.CodecContext.create(decoder, "r")  # type: ignore[assignment]
    context.thread_count = 1
    for packet in container.demux(video):
        yield from context.decode(packet)


def as_image(frame: VideoFrame) -> Image.Image:
    """The frame as RGB, or as RGBA if it has transparency."""
    # `confine` forbids the threads that a scaler starts by default.
    if not frame.format.name.startswith("yuva"):
        image: Image.Image = frame.to_image(threads=1)  # type: ignore[no-untyped-call]
        return image
    plane = frame.reformat(format="rgba", threads=1).planes[0]
    return Image.frombuffer("RGBA", (frame.width, frame.height), bytes(plane), "raw", "RGBA", plane.line_size, 1)


def clip_turn(frame: VideoFrame) -> Turn:
    """What turns a frame upright, by the display matrix (ISO/IEC 14496-12, `tkhd`), to the next quarter turn."""
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)  # type: ignore[call-overload]
    if matrix is None:
        return None
    a, b, _, c, d = struct.unpack_from("=5i", bytes(matrix))  # a point (x, y) is shown at (ax + cy, bx + dy)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return EXIF_TURNS.get({(True, False): 2, (True, True): 3, (False, True): 4}.get((a < 0, d < 0), 1))
    return EXIF_TURNS[{(False, False): 5, (False, True): 6, (True, True): 7, (True, False): 8}[b < 0, c < 0]]


SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
PRIMARIES = {
    9: (0.3127, 0.329, 0.708, 0.292, 0.17, 0.797, 0.131, 0.046),
    11: (0.314, 0.351, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
    12: (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06),
}
"""White, red, green and blue as x and y, by ITU-T H.273's code points: BT.2020, DCI-P3 and Display-P3."""
REFERENCE_WHITE = 203.0
"""Candelas per square metre that become white (ITU-R BT.2408); what is brighter is clipped."""


def decode_srgb(value: float) -> float:
    return value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4


def decode_pq(value: float) -> float:
    """SMPTE ST 2084, relative to `REFERENCE_WHITE`."""
    root = value ** (32 / 2523)
    light = (max(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root)) ** (8192 / 1305)
    return float(10_000 * light / REFERENCE_WHITE)


def decode_hlg(value: float) -> float:
    """ITU-R BT.2100's HLG on a display of 1000 cd/m2, its system gamma applied to each channel."""
    light = value * value / 3 if value <= 0.5 else (math.exp((value - 0.55991073) / 0.17883277) + 0.28466892) / 12
    return float(1000 * light**1.2 / REFERENCE_WHITE)


TRANSFERS: dict[int, Callable[[float], float]] = {
    4: lambda value: value**2.2,
    5: lambda value: value**2.8,
    8: lambda value: value,
    16: decode_pq,
    18: decode_hlg,
}
"""From a sample to light, by H.273's code points. Those of ordinary video are shown as sRGB, as browsers do."""


def profile_of_code_points(primaries: int, transfer: int) -> bytes | None:
    """The ICC profile of a colour space by H.273's code points; None for sRGB and what is taken for it."""
    if primaries not in PRIMARIES and transfer not in TRANSFERS:
        return None
    return matrix_profile(PRIMARIES.get(primaries, SRGB_PRIMARIES), TRANSFERS.get(transfer, decode_srgb))


def picture_profile(image: Image.Image, chunks: dict[bytes, bytes]) -> bytes | None:
    """The ICC profile of a picture, None for sRGB. The order is that of PNG's third edition, section 4.3."""
    if len(code_points := chunks.get(b"cICP", b"")) == 4:
        return profile_of_code_points(code_points[0], code_points[1])
    if profile := image.info.get("icc_profile"):
        return bytes(profile)
    gamma, primaries = image.info.get("gamma"), image.info.get("chromaticity", SRGB_PRIMARIES)
    if "srgb" in image.info or (gamma is None and primaries is SRGB_PRIMARIES):
        return None
    near = all(abs(one - other) < 0.001 for one, other in zip(primaries, SRGB_PRIMARIES, strict=True))
    if near and (gamma is None or abs(gamma - 0.45455) < 0.001):
        return None  # the values that stand for sRGB
    try:
        return matrix_profile(primaries, (lambda value: value ** (1 / gamma)) if gamma else decode_srgb)
    except (ArithmeticError, struct.error):
        return None  # no such colours


Matrix = list[list[float]]


def multiply(left: Matrix, right: Matrix) -> Matrix:
    return [
        [sum(a * b for a, b in zip(row, column, strict=True)) for column in zip(*right, strict=True)] for row in left
    ]


def inverse(matrix: Matrix) -> Matrix:
    """The inverse of a 3 x 3 matrix, by its cofactors."""
    (a, b, c), (d, e, f), (g, h, i) = matrix
    cofactors = [
        [e * i - f * h, c * h - b * i, b * f - c * e],
        [f * g - d * i, a * i - c * g, c * d - a * f],
        [d * h - e * g, b * g - a * h, a * e - b * d],
    ]
    determinant = a * cofactors[0][0] + b * cofactors[1][0] + c * cofactors[2][0]
    return [[value / determinant for value in row] for row in cofactors]


BRADFORD = [[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]]
D50 = (0.9642, 1.0, 0.8249)


def matrix_profile(chromaticities: tuple[float, ...], transfer: Callable[[float], float]) -> bytes:
    """An ICC profile (version 2.4, ICC.1:2001-04) of an RGB space.

    `chromaticities` are x and y of white, red, green and blue; `transfer` takes a sample to light, both from 0 to 1.
    Raises ArithmeticError or struct.error for impossible values.
    """
    white, *columns = [
        [x / y, 1.0, (1 - x - y) / y] for x, y in zip(chromaticities[::2], chromaticities[1::2], strict=True)
    ]
    unscaled = [list(row) for row in zip(*columns, strict=True)]
    light = multiply(inverse(unscaled), [[value] for value in white])
    to_xyz = [[value * light[n][0] for n, value in enumerate(row)] for row in unscaled]
    cones = zip(
        multiply(BRADFORD, [[value] for value in D50]), multiply(BRADFORD, [[value] for value in white]), strict=True
    )
    gains = [wanted[0] / given[0] for wanted, given in cones]
    adapted = [[gain * value for value in row] for gain, row in zip(gains, multiply(BRADFORD, to_xyz), strict=True)]
    colorants = list(zip(*multiply(inverse(BRADFORD), adapted), strict=True))

    samples = [min(max(transfer(n / 4095), 0.0), 1.0) for n in range(4096)]
    curve = struct.pack(">4s4xI4096H", b"curv", 4096, *[round(65535 * sample) for sample in samples])
    points = [
        struct.pack(">4s4x3i", b"XYZ ", *[round(65536 * value) for value in point]) for point in (D50, *colorants)
    ]
    body = b"".join(points) + curve
    start = 128 + 4 + 7 * 12  # the header, the number of tags, and their table
    table = struct.pack(">I", 7)
    for name, index in zip(
        ("wtpt", "rXYZ", "gXYZ", "bXYZ", "rTRC", "gTRC", "bTRC"), (0, 1, 2, 3, 4, 4, 4), strict=True
    ):
        table += struct.pack(">4sII", name.encode(), start + 20 * index, 20 if index < 4 else len(curve))
    header = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x02400000, b"mntr", b"RGB ", b"XYZ ", b"acsp")
    header += bytes(28) + struct.pack(">3i", *[round(65536 * value) for value in D50])
    return header.ljust(128, b"\0") + table + body


class Colours:
    """Converts pictures from a colour space to sRGB."""

    def __init__(self, profile: bytes | None) -> None:
        """`profile` is an ICC profile; None and a damaged one stand for sRGB."""
        self._profile: ImageCms.ImageCmsProfile | None = None
        self._transforms: dict[str, ImageCms.ImageCmsTransform] = {}
        if profile is not None:
            with contextlib.suppress(OSError):
                self._profile = ImageCms.ImageCmsProfile(io.BytesIO(profile))

    def as_srgb(self, image: Image.Image) -> Image.Image:
        """A picture of mode L, LA, RGB, RGBA or CMYK as RGB in sRGB, on a black background."""
        colours = image.convert(image.mode.removesuffix("A"))
        space = "" if self._profile is None else self._profile.profile.xcolor_space.strip()
        if space == "RGB" and colours.mode == "L":
            colours = colours.convert("RGB")
        if {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(space) == colours.mode:
            colours = self._convert(colours)
        rgb = colours.convert("RGB")
        if image.mode not in ("LA", "RGBA"):
            return rgb
        return Image.composite(rgb, Image.new("RGB", rgb.size), image.getchannel("A"))

    def _convert(self, image: Image.Image) -> Image.Image:
        assert self._profile is not None
        try:
            if image.mode not in self._transforms:
                intent = self._profile.profile.rendering_intent
                srgb = ImageCms.createProfile("sRGB")
                self._transforms[image.mode] = ImageCms.buildTransform(
                    self._profile, srgb, image.mode, "RGB", ImageCms.Intent(intent if intent in (0, 1, 2) else 1)
                )
            return ImageCms.applyTransform(image, self._transforms[image.mode]) or image
        except (ImageCms.PyCMSError, ValueError):
            self._profile = None
            return image


def confine() -> None:
    """Give up, for good, every resource that decoding does not need."""
    Image.preinit()
    for module in LAZY_MODULES:
        importlib.import_module(module)
    os.nice(10)  # live streams go first
    limits: list[tuple[int, int]] = [
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_NOFILE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 0),
    ]
    for limit, value in limits:
        resource.setrlimit(limit, (value, value))


def main(arguments: list[str]) -> int:
    width, height, fps = map(int, arguments)
    confine()
    data = sys.stdin.buffer.read()
    try:
        rgb: Any = decode(data, width, height, fps)
    except Refused as refused:
        return int(refused.args[0])
    except Image.DecompressionBombError:
        return Refusal.PIXELS
    except Exception:  # on damaged files, decoders raise nearly anything
        return Refusal.DAMAGED
    sys.stdout.buffer.write(rgb)
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    status = main(sys.argv[1:])
    os._exit(status)  # without running decoders' exit handlers
