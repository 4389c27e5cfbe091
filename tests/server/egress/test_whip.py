"""A stream pushed to a WHIP server made with aiortc."""

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aioice.ice
import pytest
import uvicorn
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from server.egress.whip import MAX_REDIRECTS
from tests.server.egress.harness import SECRET, free_port, get, post, reached

pytestmark = pytest.mark.anyio


class Receiver:
    """A WHIP server over aiortc."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.requests: list[tuple[str, str, str]] = []
        self.pictures: list[Any] = []
        self.peers: list[RTCPeerConnection] = []
        self.redirects: list[str] = []
        """Where the first requests are sent on to."""
        self.location = "/session/1"
        self.tasks: list[asyncio.Task[None]] = []
        self.port = 0

    async def publish(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path, request.headers.get("authorization", "")))
        if self.redirects:
            return RedirectResponse(self.redirects.pop(0), 307)
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.peers.append(peer)
        peer.on("track", lambda track: self.tasks.append(asyncio.create_task(self.take(track))))
        offer = (await request.body()).decode()
        assert "a=sendonly" in offer
        assert set(re.findall("profile-level-id=42..(..)", offer)) == {"15"}  # 2.1, by the bit rate of 2500 kbit/s
        other = {"H264": "VP8", "VP8": "H264"}[self.codec]
        await peer.setRemoteDescription(RTCSessionDescription(without(offer, other), "offer"))
        await peer.setLocalDescription(await peer.createAnswer())
        answer = peer.localDescription.sdp
        return Response(answer, 201, {"Location": self.location}, media_type="application/sdp")

    async def hang_up(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path, request.headers.get("authorization", "")))
        return Response()

    async def take(self, track: Any) -> None:
        while True:
            self.pictures.append(await track.recv())

    async def close(self) -> None:
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*(peer.close() for peer in self.peers))


def without(sdp: str, codec: str) -> str:
    """The SDP without one codec."""
    payloads = {line.split(":")[1].split()[0] for line in sdp.splitlines() if f" {codec}/90000" in line}
    kept = []
    for line in sdp.splitlines():
        head = line.split(":")[1].split()[0] if line.startswith(("a=rtpmap:", "a=fmtp:", "a=rtcp-fb:")) else ""
        if line.startswith("m=video"):
            kept.append(" ".join(word for word in line.split(" ") if word not in payloads))
        elif head not in payloads:
            kept.append(line)
    return "\r\n".join(kept) + "\r\n"


@contextlib.asynccontextmanager
async def whip_receiver(certificate: tuple[Path, Path], codec: str = "H264") -> AsyncIterator[Receiver]:
    receiver = Receiver(codec)
    app = Starlette(
        routes=[
            Route("/{path:path}", receiver.publish, methods=["POST"]),
            Route("/{path:path}", receiver.hang_up, methods=["DELETE"]),
        ]
    )
    receiver.port = free_port()
    settings = uvicorn.Config(
        app,
        port=receiver.port,
        ssl_certfile=str(certificate[0]),
        ssl_keyfile=str(certificate[1]),
        log_config=None,
        lifespan="off",
    )
    server = uvicorn.Server(settings)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment, method-assign]
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    try:
        yield receiver
    finally:
        await receiver.close()
        server.should_exit = True
        await task


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aioice.ice, "get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.1"])


@pytest.mark.parametrize("codec", ["H264", "VP8"])
@pytest.mark.usefixtures("loopback")
async def test_whip(
    run_gateway: Any,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    codec: str,
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    caplog.set_level(logging.INFO)
    async with (
        whip_receiver(certificate, codec) as receiver,
        run_gateway(outputs=(f"127.0.0.1:{receiver.port}",)) as gateway,
    ):
        stream = await gateway.open()
        url = f"https://127.0.0.1:{receiver.port}/whip/{SECRET}"
        output = (await post(gateway, stream, url=url, token="tok_SECRET")).json()
        assert (output["kind"], output["url"]) == ("whip", f"https://127.0.0.1:{receiver.port}/***")
        await reached(gateway, output, "live")
        await gateway.until(lambda: len(receiver.pictures) > 20, 15)
        frame = receiver.pictures[-1]
        assert (frame.width, frame.height) == (64, 48)
        assert set(gateway.streams.get(stream["id"]).audience.broadcasts) == {(codec.lower(), False)}
        await gateway.http.delete(f"/v1/streams/{stream['id']}/outputs/{output['id']}")
        assert [each[:2] for each in receiver.requests] == [("POST", f"/whip/{SECRET}"), ("DELETE", "/session/1")]
        assert {each[2] for each in receiver.requests} == {"Bearer tok_SECRET"}
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("livereel")]
    assert "SECRET" not in "".join(ours)


@pytest.mark.usefixtures("loopback")
async def test_whip_connects_to_no_other_server_and_trusts_no_certificate(
    run_gateway: Any, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with whip_receiver(certificate) as receiver, run_gateway(outputs=(f"127.0.0.1:{receiver.port}",)) as gateway:
        stream = await gateway.open()
        url = f"https://127.0.0.1:{receiver.port}/whip/{SECRET}"
        output = await reached(gateway, (await post(gateway, stream, url=url)).json(), "waiting")
        while output["error"] is None:
            output = await get(gateway, output)
        assert output["error"]["code"] == "certificate_refused"
        assert receiver.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        receiver.redirects = [f"https://localhost:{receiver.port}/whip/elsewhere"] * 50
        output = (await post(gateway, stream, url=url)).json()

        async def failed() -> bool:
            return bool((await get(gateway, output))["error"])

        await gateway.until(failed, 20)
        error = (await get(gateway, output))["error"]
        assert error["code"] == "not_accepted" and "redirects" in error["message"]
        assert {each[1] for each in receiver.requests} == {f"/whip/{SECRET}"}
        assert SECRET not in error["message"]


@pytest.mark.parametrize(
    ("redirects", "location", "paths"),
    [
        ([], "../session/1", ["/whip/KEY", "/session/1"]),
        ([], "session", ["/whip/KEY", "/whip/session"]),
        ([], "?session=1", ["/whip/KEY", "/whip/KEY"]),
        ([], "//127.0.0.1:{port}/session/1", ["/whip/KEY", "/session/1"]),
        ([], "HTTPS://127.0.0.1:{port}/session/1", ["/whip/KEY", "/session/1"]),
        (["https://127.0.0.1:{port}/whip/b/c", "d"], "1", ["/whip/KEY", "/whip/b/c", "/whip/b/d", "/whip/b/1"]),
        ([], "https://localhost:{port}/session/1", ["/whip/KEY"]),
        ([], "//live.example/session/1", ["/whip/KEY"]),
    ],
)
@pytest.mark.usefixtures("loopback")
async def test_whip_locations_are_resolved_against_the_request(
    run_gateway: Any,
    certificate: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    redirects: list[str],
    location: str,
    paths: list[str],
) -> None:
    """RFC 9725: the endpoint may redirect with 307, and names the session by `Location`, which RFC 9110 (10.2.2) lets
    be relative. The session is ended by DELETE."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with whip_receiver(certificate) as receiver, run_gateway(outputs=(f"127.0.0.1:{receiver.port}",)) as gateway:
        receiver.redirects = [each.format(port=receiver.port) for each in redirects]
        receiver.location = location.format(port=receiver.port)
        stream = await gateway.open()
        made = await post(gateway, stream, url=f"https://127.0.0.1:{receiver.port}/whip/KEY", token="tok")
        await reached(gateway, made.json(), "live")
        await gateway.http.delete(made.headers["location"])
        methods = ["POST"] * (1 + len(redirects)) + ["DELETE"]
        assert [each[:2] for each in receiver.requests] == list(zip(methods, paths, strict=False))
        assert {each[2] for each in receiver.requests} == {"Bearer tok"}


@pytest.mark.usefixtures("loopback")
async def test_endless_redirects_are_not_followed(
    run_gateway: Any, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    async with whip_receiver(certificate) as receiver, run_gateway(outputs=(f"127.0.0.1:{receiver.port}",)) as gateway:
        receiver.redirects = [f"/whip/{SECRET}"] * 50
        stream = await gateway.open()
        url = f"https://127.0.0.1:{receiver.port}/whip/{SECRET}"
        output = (await post(gateway, stream, url=url)).json()
        while output["error"] is None:
            await asyncio.sleep(0.02)
            output = await get(gateway, output)
        assert output["error"]["code"] == "not_accepted"
        assert len(receiver.requests) == 1 + MAX_REDIRECTS
