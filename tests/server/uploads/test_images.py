"""Streams that start from an uploaded picture or clip, and everything that such an upload can be."""

import ast
import asyncio
import base64
import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from engine import wire
from server.backends.fake import FakeBackend
from server.errors import ApiError
from server.uploads import decode_worker as decoder
from server.uploads import images as pictures

pytestmark = pytest.mark.anyio


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


def decoded(data: bytes, width: int = 16, height: int = 16, fps: int = 16) -> np.ndarray:
    return np.frombuffer(decoder.frames(data, width, height, fps), dtype=np.uint8).reshape(-1, height, width, 3)


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
    assert len(long) == decoder.KEPT_FRAMES
    assert long[-1].mean() > 200
    assert long[0].mean() > 140


def test_of_a_photograph_with_more_pictures_inside_the_first_counts() -> None:
    out = io.BytesIO()
    first, second = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    first.save(out, "MPO", save_all=True, append_images=[second])
    assert decoded(out.getvalue()).shape[0] == 1


def chunk(kind: bytes, body: bytes) -> bytes:
    """Of a PNG."""
    return struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body))


def png(width: int, height: int, *more: bytes, pixels: bytes = b"") -> bytes:
    header = chunk(b"IHDR", struct.pack("!IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", zlib.compress(pixels)) + chunk(b"IEND", b"")


def gif_of_nothing(frames: int, width: int = 1, height: int = 1) -> bytes:
    """A GIF of so many frames of one pixel, 15 bytes each."""
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
    """A clip with something absurd in one of its boxes."""
    data = bytearray(clip(4, 8))
    at = data.index(field) + offset
    data[at : at + len(value)] = value
    return bytes(data)


JPEG_2000 = b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100)
POLYGLOT = b"\xff\xd8\xff\xe0ftyp" + picture(format="JPEG")[8:]
"""A JPEG whose first segment's length is the name of MP4's first box."""


def jpeg_2000_in_mp4() -> bytes:
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("jpeg2000", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        frame = av.VideoFrame.from_ndarray(np.zeros((32, 32, 3), np.uint8), format="rgb24")
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return out.getvalue()


APNG_FRAMES = chunk(b"acTL", struct.pack("!II", 1_000_000, 0))
APNG_PIXELS = chunk(b"acTL", struct.pack("!II", 200, 0))


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", "invalid_image", "PNG"),
        (b"GIF89a", "invalid_image", "PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image", "PNG"),
        (b"<?xml version='1.0'?><svg/>", "invalid_image", "PNG"),
        (picture(format="BMP"), "invalid_image", "PNG"),
        (picture(format="TIFF"), "invalid_image", "PNG"),
        (JPEG_2000, "invalid_image", "PNG"),
        (picture(format="JPEG2000"), "invalid_image", "PNG"),
        (jpeg_2000_in_mp4(), "invalid_image", "H.264"),
        (POLYGLOT, "invalid_image", "two kinds"),
        (b"%PDF-1.7\n" + picture(), "invalid_image", "PNG"),
        (picture()[:60], "invalid_image", "PNG"),
        (clip(4, 8)[:300], "invalid_image", "MP4"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(100), "invalid_image", "MP4"),
        (png(50_000, 50_000), "image_too_large", "pixels"),
        (png(4096, 4096, pixels=b"\0" * 1000), "invalid_image", "PNG"),
        (png(16, 16, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(20 << 20)))), "invalid_image", "PNG"),
        (png(16, 16, APNG_FRAMES), "too_many_frames", "300"),
        (png(4000, 4000, APNG_PIXELS), "image_too_large", "all frames together"),
        (gif_of_nothing(390_000), "too_many_frames", "300"),
        (webp_bomb(2), "image_too_large", "pixels"),
        (animation([(i % 256, 0, i // 2) for i in range(301)], 20), "too_many_frames", "300"),
        (clip(302, 60, (32, 32)), "too_many_frames", "300"),
        (gif_of_nothing(40, 4000, 3500), "image_too_large", "all frames together"),
        (mp4_that_lies(b"tkhd", 80, b"\xff\xff\xff\xff"), None, ""),
        (mp4_that_lies(b"mvhd", 20, b"\xff\xff\xff\xff"), None, ""),
        (mp4_that_lies(b"mp4v", 28, b"\xff\xff\xff\xff"), None, ""),
        (mp4_that_lies(b"stsz", 12, b"\xff\xff\xff\xff"), "invalid_image", "MP4"),
        (mp4_that_lies(b"moov", -4, b"\xff\xff\xff\xff"), None, ""),
        (bytes(pictures.MAX_BYTES + 1), "image_too_large", str(pictures.MAX_BYTES)),
    ],
)
async def test_what_is_no_picture_is_refused_by_name(data: bytes, code: str | None, says: str) -> None:
    """What merely lies about itself may also give frames (`code` None); either way it is soon over."""
    async with asyncio.timeout(20):
        if code is None:
            with contextlib.suppress(ApiError):
                assert len(await pictures.frames(data, 16, 16, 16)) % (16 * 16 * 3) == 0
            return
        with pytest.raises(ApiError) as caught:
            await pictures.frames(data, 16, 16, 16)
    error = caught.value.body["error"]
    assert (error["code"], error["param"]) == (code, "image")
    assert says in error["message"]


# the process that decodes


def photograph(format: str) -> bytes:
    """With more pictures inside, and turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    images = [Image.new("RGB", (32, 48), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    images[0].save(out := io.BytesIO(), format, save_all=True, append_images=images[1:], exif=exif)
    return out.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        *[picture(format=format) for format in ("PNG", "JPEG", "WEBP", "GIF")],
        *[photograph(format) for format in ("PNG", "MPO", "WEBP")],
        clip(8, 8),
        clip(8, 8, format="webm"),
        clip_with_sound(),
    ],
    ids=["png", "jpeg", "webp", "gif", "turned apng", "turned mpo", "turned webp", "mp4", "webm", "mp4 with sound"],
)
async def test_every_kind_is_decoded_within_the_limits(data: bytes) -> None:
    """Nothing is loaded late, when there are no files any more."""
    assert await pictures.frames(data, 16, 16, 16) == decoder.frames(data, 16, 16, 16)


async def test_the_largest_picture_fits_into_its_memory() -> None:
    data = picture((4096, 4096), (1, 2, 3, 255))
    assert len(await pictures.frames(data, 832, 480, 16)) == 832 * 480 * 3


HOSTILE = {
    "files": "open('/etc/hostname')",
    "sockets": "import socket; socket.socket()",
    "writing": "import os; os.pipe()",
    "memory": "bytes(2 << 30)",
}
PRELUDE = """
import os, sys, socket, resource
sys.path.insert(0, {folder!r})
import decode_worker as decoder
decoder.CPU_SECONDS = 1
decoder.confine()
try:
    {act}
except (OSError, MemoryError, ValueError):
    os._exit(99)
os._exit(0)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_who_takes_it_over_finds_nothing(name: str) -> None:
    script = PRELUDE.format(folder=str(Path(decoder.__file__).parent), act=HOSTILE[name])
    assert subprocess.run([sys.executable, "-I", "-c", script], check=False, timeout=30).returncode == 99


def test_processor_time_is_bounded() -> None:
    script = PRELUDE.format(folder=str(Path(decoder.__file__).parent), act="exec('while True: pass')")
    assert subprocess.run([sys.executable, "-I", "-c", script], check=False, timeout=30).returncode < 0


@pytest.mark.parametrize(
    "act",
    [
        "time.sleep(60)",
        "os.abort()",
        "os.kill(os.getpid(), 9)",
        "sys.stdout.write('Traceback: a heap address 0x7f'); sys.exit(1)",
        "sys.stdout.buffer.write(bytes(1 << 26))",
        "sys.stdout.buffer.write(bytes(100))",
        "sys.exit(0)",
    ],
    ids=["hangs", "aborts", "is killed", "talks", "floods", "is cut short", "says nothing"],
)
async def test_whatever_becomes_of_it_the_answer_is_the_same(
    act: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake = tmp_path / "decode_worker.py"
    fake.write_text(f"import os, sys, time\n{act}\n")
    monkeypatch.setattr(decoder, "__file__", str(fake))
    monkeypatch.setattr(pictures, "DECODE_SECONDS", 1.0)
    with pytest.raises(ApiError) as caught:
        await pictures.frames(bytes(1 << 20), 16, 16, 16)
    assert caught.value.body["error"]["message"] == f"`image` must be {pictures.WANTED}; {pictures.UNREADABLE[1]}."


async def test_it_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, seen = tmp_path / "decode_worker.py", tmp_path / "seen"
    fake.write_text(
        f"import os\nopen({str(seen)!r}, 'w').write(repr((dict(os.environ), os.listdir('/proc/self/fd'))))\n"
    )
    monkeypatch.setattr(decoder, "__file__", str(fake))
    monkeypatch.setenv("LIVEREEL_TURN_SECRET", "hush")
    with pytest.raises(ApiError):
        await pictures.frames(b"", 16, 16, 16)
    environment, descriptors = ast.literal_eval(seen.read_text())
    assert environment.keys() <= {"LD_LIBRARY_PATH", "LC_CTYPE"}
    assert len(descriptors) <= 5  # the three, the folder and the file


async def test_no_process_is_left_behind_when_nobody_waits() -> None:
    task = asyncio.create_task(pictures.frames(picture((4096, 4096)), 16, 16, 16))
    await asyncio.sleep(0.1)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    children = subprocess.run(["ps", "-o", "args=", "--ppid", str(os.getpid())], check=False, capture_output=True)
    assert b"decode_worker.py" not in children.stdout


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


async def test_a_data_url_and_a_form_give_the_engine_the_same_picture(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        data = picture()
        one = await gateway.open(image=data_url(data), seed=3)
        form = await gateway.http.post(
            "/v1/streams", data={"prompt": "a red ball", "seed": "3", "duration_s": "0.5"}, files={"image": data}
        )
        assert form.status_code == 201, form.text
        assert (form.json()["seed"], form.json()["duration_s"], form.json()["prompt"]) == (3, 0.5, "a red ball")
        await gateway.open()
        opened = {m.stream: m.picture for m in gateway.backend.sent if isinstance(m, wire.Open)}
        assert opened[one["id"]] == opened[form.json()["id"]]
        assert len(opened[one["id"]]) == 64 * 48 * 3
        assert sorted(map(len, opened.values()))[0] == 0
        # when the first chunk is there, the picture is not kept
        await gateway.watch(one, until=lambda seen: len(seen.frames) > 1)
        assert gateway.streams.get(one["id"])._picture == b""
        waiting = await gateway.open(image=data_url(data))  # for a place: what it would start from goes with it
        await gateway.http.delete(f"/v1/streams/{waiting['id']}")
        assert gateway.streams.get(waiting["id"])._picture == b""


BAD = [
    ({"image": "http://example.com/a.png"}, "invalid_image"),
    ({"image": "data:image/png;base64,????"}, "invalid_image"),
    ({"image": data_url(b"nothing")}, "invalid_image"),
    ({"image": 5}, "invalid_value"),
]


async def test_bad_pictures_are_refused_before_a_stream_exists(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for fields, code in BAD:
            response = await gateway.http.post("/v1/streams", json={"prompt": "a", **fields})
            assert (response.status_code, response.json()["error"]["code"]) == (400, code)
            assert response.json()["error"]["param"] == "image"
        post = gateway.http.post
        forms: list[tuple[dict[str, Any], str, str | None]] = [
            ({"files": {"image": picture()}}, "missing_field", "prompt"),
            ({"data": {"prompt": "a"}, "files": {"other": picture()}}, "unknown_field", "other"),
            ({"data": {"prompt": "a", "seed": "x"}, "files": {"image": picture()}}, "invalid_value", "seed"),
            ({"data": {"prompt": "a", "seed": "\uff14"}, "files": {"image": picture()}}, "invalid_value", "seed"),
            ({"data": {"prompt": "a", "seed[x]": "1"}, "files": {"image": picture()}}, "invalid_value", "seed"),
            ({"data": {"prompt": ["a", "b"]}, "files": {"image": picture()}}, "invalid_form", "prompt"),
            ({"data": {"prompt": "a"}, "files": [("image", picture()), ("image", picture())]}, "invalid_form", None),
        ]
        for body, code, param in forms:
            response = await post("/v1/streams", **body)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["param"]) == (400, code, param), body
        response = await post(
            "/v1/streams", content=b"--x\r\nnonsense", headers={"content-type": "multipart/form-data; boundary=x"}
        )
        assert response.status_code == 400
        assert (await gateway.http.get("/v1/streams")).json()["data"] == []


async def test_a_picture_waits_for_an_engine_that_knows_its_size(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(ready_after=30), ready=False) as gateway:
        response = await gateway.http.post("/v1/streams", json={"prompt": "a", "image": data_url(picture())})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_starting")
        assert response.headers["retry-after"] == "5"
