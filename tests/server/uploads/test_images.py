"""Uploads that are refused, decoded in the sandboxed process, and sent to the engine."""

import ast
import asyncio
import base64
import contextlib
import os
import struct
import subprocess
import zlib
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine import wire
from server.backends.fake import FakeBackend
from server.errors import ApiError
from server.uploads import decode_worker, images
from tests.server.uploads.samples import (
    DISPLAY_P3,
    LIGHTNESS_CMYK,
    LINEAR_GREY,
    animation,
    apng,
    chunk,
    clip,
    clip_with_sound,
    gif_of_nothing,
    heif_of_tiles,
    jpeg_2000_in_mp4,
    mp4_that_lies,
    photograph,
    picture,
    plain_png,
    png,
    saved,
    still_clip,
    webp_bomb,
)

pytestmark = pytest.mark.anyio


JPEG_2000 = b"\x00\x00\x00\x0cjP  \r\n\x87\n" + bytes(100)
POLYGLOT = b"\xff\xd8\xff\xe0ftyp" + picture(format="JPEG")[8:]
"""A JPEG whose first segment's length is the name of MP4's first box."""


PIXELS = np.full((64, 64, 4), 99, np.uint8)
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
        (heif_of_tiles(), "invalid_image", "HEIC"),
        (saved(Image.new("L", (16, 16)), "AVIF"), "invalid_image", "AVIF"),
        (png(8192, 4097), "image_too_large", "pixels"),
        (saved(Image.new("L", (8200, 8200)), "JPEG"), "image_too_large", "pixels"),
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
        (bytes(images.MAX_BYTES + 1), "image_too_large", str(images.MAX_BYTES)),
    ],
)
async def test_bad_uploads_are_refused_with_a_reason(data: bytes, code: str | None, says: str) -> None:
    """A file with false metadata may still decode (`code` None); either way the result comes soon."""
    async with asyncio.timeout(20):
        if code is None:
            with contextlib.suppress(ApiError):
                assert len(await images.frames(data, 16, 16, 16)) % (16 * 16 * 3) == 0
            return
        with pytest.raises(ApiError) as caught:
            await images.frames(data, 16, 16, 16)
    error = caught.value.body["error"]
    assert (error["code"], error["param"]) == (code, "image")
    assert says in error["message"]


@pytest.mark.parametrize(
    "data",
    [
        *[picture(format=format) for format in ("PNG", "JPEG", "WEBP", "GIF")],
        *[photograph(format) for format in ("PNG", "MPO", "WEBP")],
        *[saved(Image.new("RGB", (32, 32), 99), format, icc_profile=DISPLAY_P3) for format in ("PNG", "JPEG", "WEBP")],
        saved(Image.new("CMYK", (32, 32), 99), "JPEG", icc_profile=LIGHTNESS_CMYK),
        saved(Image.new("L", (32, 32), 99), "PNG", icc_profile=LINEAR_GREY),
        saved(Image.new("I;16", (32, 32), 99), "PNG", transparency=99),
        apng(16, [1, 2, 3], (1, 8)),
        plain_png((1, 2, 3), chunk(b"gAMA", struct.pack("!I", 100_000))),
        clip(8, 8),
        clip(8, 8, format="webm"),
        clip_with_sound(),
        still_clip(PIXELS[..., :3], aspect=Fraction(2), turn=(90, True)),
        still_clip(PIXELS[..., :3], code_points=(12, 13)),
        still_clip(PIXELS, "libvpx-vp9", "webm", "yuva420p"),
    ],
    ids=[
        *["png", "jpeg", "webp", "gif", "turned apng", "turned mpo", "turned webp"],
        *["p3 png", "p3 jpeg", "p3 webp", "cmyk", "linear grey", "16-bit grey", "16-bit apng", "gamma"],
        *["mp4", "webm", "mp4 with sound", "turned mp4", "p3 mp4", "webm with alpha"],
    ],
)
async def test_every_kind_is_decoded_within_the_limits(data: bytes) -> None:
    """No module is imported once the process can open no files."""
    assert await images.frames(data, 16, 16, 16) == decode_worker.decode(data, 16, 16, 16)


@pytest.mark.parametrize(
    ("size", "mode", "format", "options"),
    [
        ((8192, 8192), "RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ((8192, 8192), "CMYK", "JPEG", {"icc_profile": LIGHTNESS_CMYK}),
        ((8192, 4096), "RGBA", "PNG", {"icc_profile": DISPLAY_P3, "compress_level": 1}),
        ((8192, 4096), "I;16", "PNG", {"transparency": 1, "compress_level": 1}),
        ((8192, 4096), "RGBA", "WEBP", {"lossless": True, "method": 0, "quality": 0}),
        ((4096, 4096), "RGBA", "PNG", {}),
    ],
)
async def test_the_largest_picture_fits_into_its_memory(
    size: tuple[int, int], mode: str, format: str, options: dict[str, Any]
) -> None:
    data = saved(Image.new(mode, size), format, **options)
    assert len(await images.frames(data, 832, 480, 16)) == 832 * 480 * 3


async def test_a_photograph_of_24_megapixels_is_read() -> None:
    """In the sizes of telephones, upright by EXIF and in Display-P3."""
    image = Image.new("RGB", (6000, 4000), (0, 0, 0))
    image.paste((200, 60, 60), (2000, 0, 4000, 4000))  # upright: the middle third of its height
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(image, "JPEG", exif=exif, icc_profile=DISPLAY_P3, quality=90)
    rgb = await images.frames(data, 480, 720, 16)
    rows = [tuple(rgb[3 * (480 * y + 240) :][:3]) for y in (60, 360, 660)]
    assert rows[0] == rows[2] == (0, 0, 0)
    assert all(abs(one - other) <= 3 for one, other in zip(rows[1], (217, 42, 52), strict=True))


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
async def test_a_worker_that_fails_gives_one_error(act: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "decode_worker.py"
    fake.write_text(f"import os, sys, time\n{act}\n")
    monkeypatch.setattr(decode_worker, "__file__", str(fake))
    monkeypatch.setattr(images, "DECODE_SECONDS", 1.0)
    with pytest.raises(ApiError) as caught:
        await images.frames(bytes(1 << 20), 16, 16, 16)
    assert caught.value.body["error"]["message"] == f"`image` must be {images.WANTED}; {images.UNREADABLE[1]}."


async def test_it_is_told_no_secrets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake, seen = tmp_path / "decode_worker.py", tmp_path / "seen"
    fake.write_text(
        f"import os\nopen({str(seen)!r}, 'w').write(repr((dict(os.environ), os.listdir('/proc/self/fd'))))\n"
    )
    monkeypatch.setattr(decode_worker, "__file__", str(fake))
    monkeypatch.setenv("LIVEREEL_TURN_SECRET", "hush")
    with pytest.raises(ApiError):
        await images.frames(b"", 16, 16, 16)
    environment, descriptors = ast.literal_eval(seen.read_text())
    assert environment.keys() <= {"LD_LIBRARY_PATH", "LC_CTYPE"}
    assert len(descriptors) <= 5  # the standard three, the folder and the file


async def test_no_process_is_left_behind_when_nobody_waits() -> None:
    task = asyncio.create_task(images.frames(picture((4096, 4096)), 16, 16, 16))
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
        # once the first chunk has arrived, the picture is freed
        await gateway.watch(one, until=lambda seen: len(seen.frames) > 1)
        assert gateway.streams.get(one["id"])._picture == b""
        waiting = await gateway.open(image=data_url(data))  # in the queue: its picture is freed when it is closed
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
