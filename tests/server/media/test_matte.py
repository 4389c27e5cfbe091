"""Transparency: what a key takes for the background, and frames above their mattes in every format."""

import asyncio
import io
from typing import Any

import av
import pytest
from PIL import Image

from server.backends.fake import FakeBackend
from server.media.encoder import VideoEncoder
from server.media.matte import Matte, stack

pytestmark = pytest.mark.anyio

GREEN = "#00b140"


def opacity(matte: Matte, color: tuple[int, int, int]) -> int:
    value = matte.opacity_image(Image.new("RGB", (2, 2), color)).getpixel((1, 1))
    assert isinstance(value, int)
    return value


@pytest.mark.parametrize(
    ("color", "expected"),
    [
        ((0, 177, 64), 0),
        ((0, 150, 54), 0),  # in the shade
        ((220, 40, 30), 255),
        ((255, 255, 255), 255),
        ((0, 0, 0), 255),
        ((30, 30, 200), 255),
    ],
)
def test_chroma(color: tuple[int, int, int], expected: int) -> None:
    assert opacity(Matte("chroma", GREEN, 0.1, 0.1), color) == expected


def test_the_edge_is_as_soft_as_asked() -> None:
    soft, hard = Matte("luma", GREEN, 0.2, 0.4), Matte("luma", GREEN, 0.2, 0.0)
    greys = [(value, value, value) for value in (0, 51, 102, 153, 255)]
    assert [opacity(soft, grey) for grey in greys] == [0, 0, pytest.approx(128, abs=1), 255, 255]
    assert [opacity(hard, grey) for grey in greys] == [0, 0, 255, 255, 255]
    # With a tolerance of 1, everything is transparent.
    assert opacity(Matte("chroma", GREEN, 1.0, 0.0), (220, 40, 30)) == 0


def test_the_matte_lies_below() -> None:
    picture = Image.new("RGB", (6, 4), (0, 177, 64))
    picture.paste((220, 40, 30), (3, 0, 6, 4))
    rgb = memoryview(picture.tobytes())
    stacked = Image.frombytes("RGB", (6, 8), bytes(stack(rgb, 6, 4, Matte("chroma", GREEN, 0.1, 0.1))))
    assert stacked.crop((0, 0, 6, 4)).tobytes() == picture.tobytes()
    assert [stacked.getpixel((x, 6)) for x in (1, 4)] == [(0, 0, 0), (255, 255, 255)]
    opaque = Image.frombytes("RGB", (6, 8), bytes(stack(rgb, 6, 4, None)))
    assert opaque.crop((0, 4, 6, 8)).getcolors() == [(24, (255, 255, 255))]


# in the API


class Ball(FakeBackend):
    """A fake engine that draws a red square on green."""

    def _picture(self, stream: Any, frame: int) -> bytes:
        image = Image.new("RGB", (self.width, self.height), (0, 177, 64))
        image.paste((220, 40, 30), (32, 16, 64, 48))
        return image.tobytes()


def ball() -> FakeBackend:
    return Ball(width=96, height=64, chunk_seconds=0.02)


def check(picture: Image.Image, *, transparent: bool = True) -> None:
    """Check the colour above and the matte below, as closely as codecs allow."""
    assert picture.size == (96, 128)
    for point, wanted in (
        ((48, 32), (220, 40, 30)),
        ((8, 8), (0, 177, 64)),
        ((48, 96), (255, 255, 255)),
        ((8, 72), (0, 0, 0) if transparent else (255, 255, 255)),
    ):
        got = picture.getpixel(point)
        assert isinstance(got, tuple)
        assert max(abs(a - b) for a, b in zip(got, wanted, strict=True)) < 12, (point, got)


async def keyed(gateway: Any) -> dict[str, Any]:
    stream = await gateway.open()
    response = await gateway.http.put(f"/v1/streams/{stream['id']}/matte", json={"color": GREEN})
    assert response.status_code == 200
    matte = response.json()["matte"]
    assert matte == {"mode": "chroma", "color": GREEN, "tolerance": 0.1, "softness": 0.1}
    return dict(stream)


async def test_pictures_and_fragments(run_gateway: Any) -> None:
    async with run_gateway(ball()) as gateway:
        stream = await keyed(gateway)
        plain = asyncio.create_task(gateway.watch(stream, "?format=mjpeg", until=lambda seen: len(seen.frames) > 8))
        jpegs = await gateway.watch(stream, "?format=mjpeg&alpha=stacked", until=lambda seen: len(seen.frames) > 3)
        check(Image.open(io.BytesIO(jpegs.frames[-1][1][16:])).convert("RGB"))
        raw = await gateway.watch(stream, "?format=rgb24&alpha=stacked", until=lambda seen: len(seen.frames) > 1)
        packet = raw.frames[-1][1]
        assert (int.from_bytes(packet[2:4], "big"), int.from_bytes(packet[4:6], "big")) == (96, 128)
        check(Image.frombytes("RGB", (96, 128), packet[16:]))
        pieces = await gateway.watch(stream, "?format=fmp4&alpha=stacked", until=lambda seen: len(seen.frames) > 6)
        with av.open(io.BytesIO(b"".join(packet[16:] for _, packet in pieces.frames))) as file:
            check(next(file.decode(video=0)).to_image())
        # A viewer that does not ask for it gets the plain picture.
        assert Image.open(io.BytesIO((await plain).frames[-1][1][16:])).size == (96, 64)


@pytest.mark.parametrize("codec", ["VP8", "H264"])
async def test_webrtc(run_gateway: Any, rtc_viewer: Any, codec: str) -> None:
    async with run_gateway(ball()) as gateway:
        stream = await keyed(gateway)
        stream["whep_url"] += "?alpha=stacked"
        async with rtc_viewer(gateway, stream, codec) as viewer:
            frames = await viewer.frames(6)
            check(frames[-1].to_image())
            assert viewer.session.startswith(f"/v1/streams/{stream['id']}/whep/")


async def test_encoded_once_for_all_who_take_mattes(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    init = VideoEncoder.__init__

    def counting(self: VideoEncoder, codec: Any, width: int, height: int, fps: int, kbps: int) -> None:
        made.append((codec, height))
        init(self, codec, width, height, fps, kbps)

    monkeypatch.setattr(VideoEncoder, "__init__", counting)
    async with run_gateway(ball()) as gateway:
        stream = await keyed(gateway)
        await gateway.until(lambda: gateway.streams.get(stream["id"]).session.state == "live")
        queries = ["?format=fmp4", "?format=fmp4&alpha=stacked", "?format=fmp4&alpha=stacked"]
        await asyncio.gather(
            *(gateway.watch(stream, query, until=lambda seen: len(seen.frames) > 8) for query in queries)
        )
        assert sorted(made) == [("h264", 64), ("h264", 128)]
        await gateway.until(lambda: not gateway.streams.get(stream["id"]).audience.broadcasts)


async def test_the_matte_changes_while_it_is_watched_and_in_a_pause(run_gateway: Any) -> None:
    async with run_gateway(ball()) as gateway:
        stream = await gateway.open()
        path = f"/v1/streams/{stream['id']}/matte"

        async def look() -> Image.Image:
            seen = await gateway.watch(stream, "?format=rgb24&alpha=stacked", until=lambda seen: len(seen.frames) > 0)
            return Image.frombytes("RGB", (96, 128), seen.frames[-1][1][16:])

        check(await look(), transparent=False)
        await gateway.patch(stream, paused=True)
        assert (await gateway.http.put(path, json={})).status_code == 200
        check(await look())
        assert (await gateway.http.delete(path)).json()["matte"] is None
        check(await look(), transparent=False)
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        assert (await gateway.http.put(path, json={})).status_code == 409


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"mode": "blue"}, "mode"),
        ({"color": "green"}, "color"),
        ({"color": "#00b14"}, "color"),
        ({"tolerance": 2}, "tolerance"),
        ({"softness": "0.1"}, "softness"),
        ({"tolerance": -0.1}, "tolerance"),
        ({"x": 1}, "x"),
    ],
)
async def test_bad_mattes(run_gateway: Any, body: dict[str, Any], param: str) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        refused = await gateway.http.put(f"/v1/streams/{stream['id']}/matte", json=body)
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)


async def test_other_words_for_alpha_are_refused(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        refused = await gateway.http.get(f"/v1/streams/{stream['id']}/mjpeg?alpha=yes")
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "alpha")
        seen = await gateway.watch(stream, "?alpha=yes")
        assert seen.of("error")[0]["param"] == "alpha"
