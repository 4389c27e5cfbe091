"""Pictures and clips to upload, sound and hostile."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
from PIL import Image


def picture(size: tuple[int, int] = (64, 32), colour: tuple[int, ...] = (200, 10, 30), format: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(out, format)
    return out.getvalue()


def animation(colours: list[tuple[int, int, int]], duration: int) -> bytes:
    out = io.BytesIO()
    first, *rest = [Image.new("RGB", (32, 32), colour) for colour in colours]
    first.save(out, "GIF", save_all=True, append_images=rest, duration=duration)
    return out.getvalue()


def clip(frames: int, fps: int, size: tuple[int, int] = (64, 48), format: str = "mp4") -> bytes:
    """A grey clip that brightens from frame to frame."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream("mpeg4" if format == "mp4" else "libvpx", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            level = np.full((size[1], size[0], 3), 20 + 200 * index // max(1, frames - 1), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(level, format="rgb24")))
        container.mux(stream.encode())
    return out.getvalue()


def clip_with_sound() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        sound, stream = container.add_stream("aac", rate=48000, layout="stereo"), container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        frame.sample_rate = 48000
        container.mux(sound.encode(frame))
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux([*stream.encode(), *sound.encode()])
    return out.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def gif_of_nothing(frames: int, width: int = 1, height: int = 1) -> bytes:
    """A GIF with so many frames, 15 bytes each."""
    head = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x4c\x01\x00"
    return head + frame * frames + b"\x3b"


def webp_bomb(frames: int) -> bytes:
    """An animation whose canvas is 16383 pixels a side."""
    out = io.BytesIO()
    images = [Image.new("RGB", (16, 16), (n * 200 % 256, 0, 0)) for n in range(frames)]
    images[0].save(out, "WEBP", save_all=True, append_images=images[1:], duration=50)
    data = bytearray(out.getvalue())
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (16382).to_bytes(3, "little") * 2
    return bytes(data)


def mp4_that_lies(field: bytes, offset: int, value: bytes) -> bytes:
    """A clip with an absurd value in one of its boxes."""
    data = bytearray(clip(4, 8))
    at = data.index(field) + offset
    data[at : at + len(value)] = value
    return bytes(data)


def jpeg_2000_in_mp4() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("jpeg2000", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def saved(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    image.save(out := io.BytesIO(), format, **options)
    return out.getvalue()


def still_clip(
    pixels: np.ndarray,
    codec: str = "libx264",
    format: str = "mp4",
    pix_fmt: str = "yuv420p",
    aspect: Fraction | None = None,
    turn: tuple[int, bool] | None = None,
    code_points: tuple[int, int] | None = None,
) -> bytes:
    """A clip of one picture, height x width x 3 or 4 bytes; `turn` is degrees counterclockwise, then a mirroring."""
    out = io.BytesIO()
    with av.open(out, "w", format=format) as container:
        stream = container.add_stream(codec, rate=8)
        stream.height, stream.width = pixels.shape[:2]
        stream.pix_fmt = pix_fmt
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if turn is not None:
            stream.set_display_rotation(turn[0], hflip=turn[1])
        if code_points is not None:
            stream.codec_context.color_primaries, stream.codec_context.color_trc = code_points
        for _ in range(2):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24" if pixels.shape[2] == 3 else "rgba")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


def apng(depth: int, levels: list[int], delay: tuple[int, int], *more: bytes) -> bytes:
    """A grey animation of 16 x 16 pixels, each frame shown for a fraction of a second."""
    rows = [zlib.compress((b"\0" + level.to_bytes(depth // 8, "big") * 16) * 16) for level in levels]
    header = struct.pack("!IIBBBBB", 16, 16, depth, 0, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"acTL", struct.pack("!II", len(rows), 0))
    data += b"".join(more)
    for index, row in enumerate(rows):
        data += chunk(b"fcTL", struct.pack("!5I2H2B", max(0, 2 * index - 1), 16, 16, 0, 0, *delay, 0, 0))
        data += chunk(b"fdAT", struct.pack("!I", 2 * index) + row) if index else chunk(b"IDAT", row)
    return data + chunk(b"IEND", b"")


def grey_png(depth: int, row: bytes, *more: bytes) -> bytes:
    """A grey picture of 16 x 16 pixels, all of its rows the same."""
    header = chunk(b"IHDR", struct.pack("!IIBBBBB", 16, 16, depth, 0, 0, 0, 0))
    pixels = zlib.compress((b"\0" + row) * 16)
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def plain_png(colour: tuple[int, int, int], *more: bytes) -> bytes:
    return png(16, 16, *more, pixels=(b"\0" + bytes(colour) * 16) * 16)


def xyz(x: float, y: float, z: float) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *[round(value * 65536) for value in (x, y, z)])


def icc(space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 4 (ICC.1:2010)."""
    table, body, start = struct.pack(">I", len(tags)), b"", 132 + 12 * len(tags)
    for name, tag in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(tag))
        body += tag + bytes(-len(tag) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = struct.pack(">I4xI4s4s4s12x4s28x", start + len(body), 0x04200000, kind, space, connection, b"acsp")
    return (header + xyz(0.9642, 1.0, 0.8249)[8:]).ljust(128, b"\0") + table + body


SRGB_CURVE = struct.pack(
    ">4s4xHxx5i", b"para", 3, *[round(v * 65536) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)]
)
DISPLAY_P3 = icc(
    b"RGB ",
    b"XYZ ",
    {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.51512, 0.2412, -0.00105),
        b"gXYZ": xyz(0.29198, 0.69225, 0.04189),
        b"bXYZ": xyz(0.1571, 0.06657, 0.78407),
        **dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), SRGB_CURVE),
    },
)
LINEAR_GREY = icc(b"GRAY", b"XYZ ", {b"wtpt": xyz(0.9642, 1.0, 0.8249), b"kTRC": struct.pack(">4s4xI", b"curv", 0)})
_RAMP = bytes(range(256))
_CORNERS = b"".join(bytes((0 if n & 1 else 255 - 80 * (n >> 3 & 1), 128, 128)) for n in range(16))
LIGHTNESS_CMYK = icc(
    b"CMYK",
    b"Lab ",
    {
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"A2B0": struct.pack(">4s4xBBBx9i", b"mft1", 4, 3, 2, *[65536 * (n % 4 == 0) for n in range(9)])
        + (_RAMP * 4 + _CORNERS + _RAMP * 3),
    },
)
"""Black ink takes away L* in proportion, and cyan some of it; the other inks do nothing."""


def box(name: bytes, *bodies: bytes) -> bytes:
    """A box of ISO/IEC 14496-12."""
    return struct.pack(">I4s", 8 + sum(map(len, bodies)), name) + b"".join(bodies)


def heif_of_tiles(brand: bytes = b"heic") -> bytes:
    """A HEIF picture of 128 x 128 pixels: a grid of four tiles, red, green, blue and white (ISO/IEC 23008-12)."""
    tiles, configuration = [], b""
    for colour in ((250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 250)):
        data = still_clip(np.full((64, 64, 3), colour, np.uint8), codec="libsvtav1")
        with av.open(io.BytesIO(data)) as container:
            configuration = container.streams.video[0].codec_context.extradata
            tiles.append(bytes(next(container.demux(video=0))))
    kinds = [b"av01"] * 4 + [b"grid"]
    infos = [box(b"infe", struct.pack(">IHH4sx", 2 << 24, n, 0, kind)) for n, kind in enumerate(kinds, 1)]
    sizes = [box(b"ispe", struct.pack(">III", 0, side, side)) for side in (64, 128)]
    linked = b"".join(struct.pack(">HBBB", n, 2, 0x81, 2) for n in range(1, 5)) + struct.pack(">HBB", 5, 1, 3)
    grid = struct.pack(">BBBBHH", 0, 0, 1, 1, 128, 128)

    def meta(start: int) -> bytes:
        places = b""
        for number, tile in enumerate(tiles, 1):
            places += struct.pack(">HHHHII", number, 0, 0, 1, start, len(tile))
            start += len(tile)
        places += struct.pack(">HHHHII", 5, 1, 0, 1, 0, len(grid))
        return box(
            b"meta",
            bytes(4),
            box(b"hdlr", bytes(8), b"pict", bytes(13)),
            box(b"pitm", struct.pack(">IH", 0, 5)),
            box(b"iloc", struct.pack(">IBBH", 1 << 24, 0x44, 0, 5), places),
            box(b"iinf", struct.pack(">IH", 0, 5), *infos),
            box(b"iref", bytes(4), box(b"dimg", struct.pack(">HH4H", 5, 4, 1, 2, 3, 4))),
            box(
                b"iprp",
                box(b"ipco", box(b"av1C", configuration), *sizes),
                box(b"ipma", struct.pack(">II", 0, 5), linked),
            ),
            box(b"idat", grid),
        )

    head = box(b"ftyp", brand, bytes(4), b"mif1avif")
    return head + meta(len(head) + len(meta(0)) + 8) + box(b"mdat", *tiles)


def photograph(format: str) -> bytes:
    """A picture rotated by its EXIF tag, with more pictures inside."""
    exif = Image.Exif()
    exif[0x0112] = 6
    first, *rest = [Image.new("RGB", (32, 48), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    first.save(out := io.BytesIO(), format, save_all=True, append_images=rest, exif=exif)
    return out.getvalue()
