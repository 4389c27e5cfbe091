"""Responses that last: they end with their client, and an incomplete file never looks complete."""

import asyncio
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.responses import FileResponse

from server.api.responses import LongLivedResponse, film_response
from server.backends.fake import FakeBackend
from server.errors import ApiError
from server.library.mp4 import GrowingFile
from server.protocols import ABORT

pytestmark = pytest.mark.anyio


class Endless(LongLivedResponse):
    """A response that sends its headers and then waits for ever."""

    cancelled = False

    async def send_all(self, scope: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled = True


class Client:
    """The ASGI side of a client that reads everything and disconnects when told to, or when it is cut off."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.aborted = False
        self.body = b""
        self.complete = False
        self.scope = {"type": "http", "extensions": {ABORT: {"call": self._abort}}}

    def _abort(self) -> None:
        self.aborted = True
        self.gone.set()

    async def receive(self) -> dict[str, Any]:
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: dict[str, Any]) -> None:
        self.body += message.get("body", b"")
        self.complete |= message["type"] == "http.response.body" and not message.get("more_body", False)

    async def get(self, response: Any) -> None:
        async with asyncio.timeout(5):
            await response(self.scope, self.receive, self.send)


async def test_a_response_ends_when_its_client_disconnects() -> None:
    client, response = Client(), Endless()
    request = asyncio.create_task(client.get(response))
    await asyncio.sleep(0)
    client.gone.set()
    await request
    assert response.cancelled
    assert "content-length" not in response.headers


@pytest.fixture
def growing(tmp_path: Path) -> Callable[[bytes], GrowingFile]:
    """A file with this content that may still grow."""

    def make(content: bytes) -> GrowingFile:
        path = tmp_path / "film"
        path.write_bytes(content)
        growth = GrowingFile(path)
        growth.grow(len(content))
        return growth

    return make


def download(growth: GrowingFile) -> Any:
    return film_response("video", growth.path, growth, "video/mp4", "a.mp4")


@pytest.mark.parametrize("whole", [True, False])
async def test_a_growing_file_is_sent_to_its_end(growing: Callable[[bytes], GrowingFile], whole: bool) -> None:
    growth, client = growing(b"abc"), Client()
    request = asyncio.create_task(client.get(download(growth)))
    while client.body != b"abc":
        await asyncio.sleep(0.01)
    with growth.path.open("ab") as file:
        file.write(b"def")
    growth.grow(6)
    growth.end(complete=whole)
    await request
    assert client.body == b"abcdef"
    assert client.complete == whole, "only a whole file looks complete"
    assert client.aborted != whole


async def test_a_reader_who_leaves_while_the_file_is_opened(
    growing: Callable[[bytes], GrowingFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread that opens it cannot be cancelled, and its descriptor must not be lost."""
    may_open, opened, open_file = threading.Event(), list[int](), os.open

    def open_slowly(*arguments: Any) -> int:
        may_open.wait()
        opened.append(open_file(*arguments))
        return opened[-1]

    monkeypatch.setattr(os, "open", open_slowly)
    client = Client()
    request = asyncio.create_task(client.get(download(growing(b"abc"))))
    await asyncio.sleep(0.01)
    client.gone.set()
    await request
    may_open.set()
    async with asyncio.timeout(10):
        while not opened or Path(f"/proc/self/fd/{opened[0]}").exists():
            await asyncio.sleep(0.01)


async def test_a_file_that_was_never_begun_is_not_found(growing: Callable[[bytes], GrowingFile]) -> None:
    growth = growing(b"")
    growth.end(complete=False)
    with pytest.raises(ApiError) as caught:
        await Client().get(download(growth))
    assert (caught.value.status_code, caught.value.code) == (404, "video_not_found")


@pytest.mark.parametrize("grows", [True, False])
async def test_a_file_that_was_removed_is_gone(growing: Callable[[bytes], GrowingFile], grows: bool) -> None:
    growth = growing(b"abc")
    growth.path.unlink()
    response = film_response("video", growth.path, growth if grows else None, "video/mp4", "a.mp4")
    client = Client()
    client.scope |= {"headers": [], "method": "GET"}
    with pytest.raises(ApiError) as caught:
        await client.get(response)
    assert (caught.value.status_code, caught.value.code) == (410, "file_removed")


async def test_a_growing_file_that_was_cut_looks_incomplete(growing: Callable[[bytes], GrowingFile]) -> None:
    growth, client = growing(b"abcdef"), Client()
    os.truncate(growth.path, 3)
    await client.get(download(growth))
    assert (client.body, client.complete, client.aborted) == (b"abc", False, True)


def test_a_complete_file_supports_ranges(tmp_path: Path) -> None:
    response = film_response("video", tmp_path / "film", None, "video/mp4", "a.mp4")
    assert isinstance(response, FileResponse)
    assert response.headers["accept-ranges"] == "bytes"
    assert response.headers["content-disposition"] == 'attachment; filename="a.mp4"'


async def test_readers_of_a_growing_film_leave_the_reserved_descriptors(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.3)) as gateway:
        made = (await gateway.http.post("/v1/videos", json={"prompt": "a", "seconds": 20})).json()
        monkeypatch.setattr("server.api.responses.takes_reserve", lambda descriptor: True)
        answer = await gateway.http.get(f"/v1/videos/{made['id']}/content")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "exhausted")
