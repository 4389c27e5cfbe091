"""Uploads that wait for the decoder: how many, how large, and for whom."""

import asyncio
import base64
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.errors import ApiError
from server.uploads import images, queue
from server.uploads.queue import UploadQueue
from tests.server.uploads.samples import picture

ROOT = Path(__file__).parents[3]
SIZE = (16, 16, 16)


class Decoder:
    """Stands for `images.frames`, and decodes only when it is told to."""

    def __init__(self) -> None:
        self.decoded: list[bytes] = []
        self.cancelled: list[bytes] = []
        self.may_decode = asyncio.Event()

    async def frames(self, data: bytes, width: int, height: int, fps: int) -> bytes:
        try:
            await self.may_decode.wait()
        except asyncio.CancelledError:
            self.cancelled.append(data)
            raise
        self.decoded.append(data)
        return bytes(width * height * 3)


@pytest.fixture
async def decoder(monkeypatch: pytest.MonkeyPatch, anyio_backend: str) -> Decoder:
    decoder = Decoder()
    monkeypatch.setattr(images, "frames", decoder.frames)
    return decoder


def unavailable(error: ApiError) -> bool:
    return (error.status_code, error.code) == (503, "too_many_uploads") and int(
        (error.headers or {})["Retry-After"]
    ) > 0


@pytest.mark.anyio
async def test_waiting_uploads_are_bounded_in_number(decoder: Decoder) -> None:
    uploads = UploadQueue()
    tasks = [asyncio.create_task(uploads.frames(b"%d" % n, *SIZE)) for n in range(queue.MAX_UPLOADS)]
    await asyncio.sleep(0)
    assert uploads.waiting == queue.MAX_UPLOADS
    with pytest.raises(ApiError) as refused:
        await uploads.frames(b"one more", *SIZE)
    assert unavailable(refused.value)
    tasks[3].cancel()
    await asyncio.wait([tasks[3]])
    tasks.append(asyncio.create_task(uploads.frames(b"in its place", *SIZE)))
    decoder.may_decode.set()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert decoder.decoded == [b"%d" % n for n in range(queue.MAX_UPLOADS) if n != 3] + [b"in its place"]
    assert uploads.waiting == 0


@pytest.mark.anyio
async def test_their_bytes_are_bounded_too() -> None:
    uploads = UploadQueue()
    with uploads.hold() as arrive:
        arrive(queue.MAX_BYTES - 10)
        with uploads.hold(10) as arrive_too:
            arrive_too(9)
            for too_much in (lambda: arrive(queue.MAX_BYTES), lambda: uploads.hold(2).__enter__()):
                with pytest.raises(ApiError) as refused:
                    too_much()
                assert unavailable(refused.value)
        arrive(queue.MAX_BYTES)
    with uploads.hold(queue.MAX_BYTES):
        pass


@pytest.mark.anyio
async def test_requests_past_the_bounds_are_told_to_come_back(
    run_gateway: Any, decoder: Decoder, monkeypatch: pytest.MonkeyPatch, error_of: Any
) -> None:
    monkeypatch.setattr(queue, "MAX_UPLOADS", 2)
    monkeypatch.setattr(queue, "MAX_BYTES", 1_000_000)
    async with run_gateway() as gateway:

        def send(path: str, field: str, size: int = 0) -> asyncio.Task[httpx.Response]:
            files = {field: picture() + bytes(size)}
            return asyncio.create_task(gateway.http.post(path, data={"prompt": "a"}, files=files))

        waiting = [send("/v1/streams", "image", 600_000), send("/v1/videos", "input_reference")]
        await gateway.until(lambda: gateway.streams.uploads.waiting == 2)
        for path, field in (("/v1/streams", "image"), ("/v1/videos", "input_reference")):
            for size in (0, 600_000):
                refused = await send(path, field, size)
                error = error_of(refused, 503)
                assert (error["code"], error["type"]) == ("too_many_uploads", "server_error")
                assert int(refused.headers["retry-after"]) > 0
        opened = await gateway.http.post("/v1/streams", json={"prompt": "a"})
        assert opened.status_code == 201, "what brings no picture need not wait"
        decoder.may_decode.set()
        assert [(await each).status_code for each in waiting] == [201, 200]
        assert (await send("/v1/streams", "image", 600_000)).status_code == 201


@pytest.mark.anyio
async def test_nothing_is_done_for_clients_who_have_left(run_gateway: Any, decoder: Decoder) -> None:
    async with run_gateway() as gateway:
        body = {"prompt": "a", "image": "data:image/png;base64," + base64.b64encode(picture()).decode()}
        video = {"prompt": "a", "input_reference": body["image"], "seconds": "1"}
        sent = [("/v1/streams", json.dumps(body)), ("/v1/videos", json.dumps(video))] * 3
        writers = []
        for path, content in sent:
            _, writer = await asyncio.open_connection(*gateway.address.split(":"))
            head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            writer.write(f"{head}Content-Length: {len(content)}\r\n\r\n{content}".encode())
            writers.append(writer)
        await gateway.until(lambda: gateway.streams.uploads.waiting == len(sent))
        for writer in writers:
            writer.transport.abort()
        await gateway.until(lambda: gateway.streams.uploads.waiting == 0)
        decoder.may_decode.set()
        stayed = await gateway.http.post("/v1/videos", json=video)
        assert stayed.status_code == 200
        assert len(decoder.decoded) == 1 == len(decoder.cancelled), "one was being decoded, and it was stopped"
        videos = (await gateway.http.get("/v1/videos")).json()["data"]
        assert [video["id"] for video in videos] == [stayed.json()["id"]]
        assert (await gateway.http.get("/v1/streams")).json()["data"] == []


@pytest.mark.parametrize("missing", [0, 1000], ids=["complete", "broken off"])
def test_the_memory_of_aborted_posts_comes_back(missing: int) -> None:
    command = [sys.executable, "-m", "server", "--backend", "fake", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        try:
            assert process.stdout is not None
            port = re.findall(r":(\d+)/", process.stdout.readline())[0]

            def megabytes() -> int:
                status = Path(f"/proc/{process.pid}/status").read_text()
                return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) >> 10

            before = megabytes()
            url = "data:image/png;base64," + base64.b64encode(os.urandom(750_000)).decode()
            body = json.dumps({"prompt": "a", "input_reference": url}).encode()
            head = f"POST /v1/videos HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            head += "Content-Type: application/json\r\n\r\n"
            for _ in range(3):
                clients = [socket.create_connection(("127.0.0.1", int(port))) for _ in range(50)]
                for client in clients:
                    client.sendall(head.encode() + body[: len(body) - missing])
                for client in clients:
                    client.close()
            small = {"prompt": "a", "input_reference": "data:image/png;base64," + base64.b64encode(picture()).decode()}
            while (
                answer := httpx.post(f"http://127.0.0.1:{port}/v1/videos", json=small, timeout=30)
            ).status_code == 503:
                time.sleep(0.1)  # those who have left are not all noticed yet
            assert answer.status_code == 200
            deadline = time.monotonic() + 20
            while megabytes() > before + 40 and time.monotonic() < deadline:
                time.sleep(0.1)
            assert megabytes() <= before + 40
        finally:
            process.kill()
