"""Streams that start from an uploaded picture or clip, and everything that such an upload can be."""

import base64
import io
import struct
import zlib
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from engine import wire
from server import pictures
from server.backends.fake import FakeBackend
from server.errors import ApiError

pytestmark = pytest.mark.anyio


def picture(size: tuple[int, int] = (64, 32), colour: tuple[int, ...] = (200, 10, 30), format: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGBA" if len(colour) == 4 else "RGB", size, colour).save(out, format)
    return out.getvalue()


def animation(
    colours: list[tuple[int, int, int]], duration: int, format: str = "GIF", size: tuple[int, int] = (32, 32)
) -> bytes:
    out = io.BytesIO()
    first, *rest = [Image.new("P" if size[0] > 32 else "RGB", size, colour) for colour in colours]
    first.save(out, format, save_all=True, append_images=rest, duration=duration)
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


def decoded(data: bytes, width: int = 16, height: int = 16, fps: int = 16) -> np.ndarray:
    return np.frombuffer(pictures.frames(data, width, height, fps), dtype=np.uint8).reshape(-1, height, width, 3)


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
    assert len(long) == pictures.KEPT_FRAMES
    assert long[-1].mean() > 200
    assert long[0].mean() > 140


def bomb() -> bytes:
    """A PNG whose header says 60000 x 60000, without any pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack("!I", len(body)) + kind + body + struct.pack("!I", zlib.crc32(kind + body))

    header = struct.pack("!IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "code", "says"),
    [
        (b"", "invalid_image", "PNG"),
        (b"GIF89a", "invalid_image", "PNG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "invalid_image", "PNG"),
        (picture(format="BMP"), "invalid_image", "PNG"),
        (picture()[:60], "invalid_image", "PNG"),
        (clip(4, 8)[:300], "invalid_image", "MP4"),
        (b"\x00\x00\x00\x18ftypmp42" + bytes(100), "invalid_image", "MP4"),
        (bomb(), "image_too_large", "pixels"),
        (animation([(i % 256, 0, i // 2) for i in range(301)], 20), "too_many_frames", "300"),
        (clip(302, 60, (32, 32)), "too_many_frames", "300"),
        (animation([(i, 0, 0) for i in range(40)], 20, size=(4000, 3500)), "image_too_large", "all frames together"),
        (bytes(pictures.MAX_BYTES + 1), "image_too_large", str(pictures.MAX_BYTES)),
    ],
    ids=[
        "empty",
        "cut gif",
        "svg",
        "bmp",
        "cut png",
        "cut mp4",
        "no mp4",
        "bomb",
        "long gif",
        "long mp4",
        "heavy gif",
        "large",
    ],
)
def test_what_is_no_picture_is_refused_by_name(data: bytes, code: str, says: str) -> None:
    with pytest.raises(ApiError) as caught:
        pictures.frames(data, 16, 16, 16)
    error = caught.value.body["error"]
    assert (error["code"], error["param"]) == (code, "image")
    assert says in error["message"]


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
        assert gateway.streams.get(one["id"]).picture == b""
        waiting = await gateway.open(image=data_url(data))  # for a place: what it would start from goes with it
        await gateway.http.delete(f"/v1/streams/{waiting['id']}")
        assert gateway.streams.get(waiting["id"]).picture == b""


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
