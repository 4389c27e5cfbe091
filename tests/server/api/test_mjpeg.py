"""MJPEG over HTTP: the parts of the multipart body, and when it ends."""

import io
import re
from typing import Any

import httpx
import pytest
from PIL import Image, ImageChops, ImageStat

from server.api import mjpeg
from server.backends.fake import FakeBackend
from tests.server.media.samples import original

pytestmark = pytest.mark.anyio


async def parts(response: httpx.Response, count: int) -> list[tuple[dict[str, str], bytes]]:
    """The next parts: headers, body. Strict about every byte between them."""
    data, found = b"", []
    async for piece in response.aiter_raw():
        data += piece
        while match := re.match(rb"--frame\r\n((?:[\w-]+: [^\r]+\r\n)+)\r\n", data):
            fields = dict(line.split(": ") for line in match[1].decode().split("\r\n") if line)
            end = match.end() + int(fields["Content-Length"])
            if len(data) < end + 2:
                break
            assert data[end : end + 2] == b"\r\n"
            found.append((fields, data[match.end() : end]))
            data = data[end + 2 :]
            if len(found) == count:
                return found
    assert data == b"--frame--\r\n"
    return found


async def test_pictures_that_replace_each_other(run_gateway: Any) -> None:
    backend = FakeBackend(width=128, height=96, chunk_seconds=0.02)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open(duration_s=1.5)
        async with gateway.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg") as response:
            assert response.status_code == 200
            assert response.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
            assert "content-length" not in response.headers
            expected = original(backend, stream, 0)
            found = await parts(response, 1000)
        assert [int(fields["X-Pts"]) for fields, _ in found] == list(range(0, 24 * 5625, 5625))
        assert {fields["Content-Type"] for fields, _ in found} == {"image/jpeg"}
        gap = ImageChops.difference(Image.open(io.BytesIO(found[0][1])), expected)
        assert sum(ImageStat.Stat(gap).mean) / 3 < 3


async def test_a_viewer_of_pictures_that_leaves(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        async with gateway.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg") as response:
            assert len(await parts(response, 3)) == 3
            assert len(live.audience.viewers) == 1
        await gateway.until(lambda: not live.audience.viewers)


async def test_pictures_that_are_refused(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        assert (await gateway.http.get("/v1/streams/st_none/mjpeg")).status_code == 404
        with monkeypatch.context() as patch:
            patch.setattr("server.streams.audience.MAX_VIEWERS", 0)
            crowded = await gateway.http.get(f"/v1/streams/{stream['id']}/mjpeg")
            assert (crowded.status_code, crowded.json()["error"]["code"]) == (503, "too_many_viewers")
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        over = await gateway.http.get(f"/v1/streams/{stream['id']}/mjpeg")
        assert (over.status_code, over.json()["error"]["code"]) == (409, "stream_ended")


async def test_a_paused_stream_repeats_its_picture(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mjpeg, "REPEAT_SECONDS", 0.1)
    async with run_gateway() as gateway:
        stream = await gateway.live()
        # the first frame waits some seconds for a viewer: this one
        async with gateway.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg"):
            await gateway.until(lambda: gateway.stream_of(stream).audience.on_screen is not None)
        await gateway.patch(stream, paused=True)
        async with gateway.http.stream("GET", f"/v1/streams/{stream['id']}/mjpeg") as response:
            found = await parts(response, 12)
        assert found[-1] == found[-2] == found[-3]
