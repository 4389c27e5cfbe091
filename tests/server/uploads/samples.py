"""Pictures and clips to upload, sound and hostile."""

import io
import struct
import zlib

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


def photograph(format: str) -> bytes:
    """A picture rotated by its EXIF tag, with more pictures inside."""
    exif = Image.Exif()
    exif[0x0112] = 6
    first, *rest = [Image.new("RGB", (32, 48), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    first.save(out := io.BytesIO(), format, save_all=True, append_images=rest, exif=exif)
    return out.getvalue()
