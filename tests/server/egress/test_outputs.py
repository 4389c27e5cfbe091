"""Streams pushed out: to a real RTMP listener, to a WHIP receiver made with aiortc, and to nowhere else."""

import asyncio
import contextlib
import datetime
import ipaddress
import itertools
import json
import logging
import os
import socket
import ssl
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aioice.ice
import pytest
import uvicorn
from aiortc import RTCConfiguration, RTCPeerConnection, RTCSessionDescription
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from server.auth import keys
from server.bench.gateway import children
from server.egress import destination as destinations
from server.egress.destination import Destination, UnreachableError, destination, public, resolve
from server.egress.outputs import LAST_RETRY_SECONDS, MAX_FAILURES, Retries
from server.errors import ApiError

pytestmark = pytest.mark.anyio

SECRET = "sk_7f3aSECRET"


# where to


ALLOWED = ("live.example", "10.0.0.5:1936", "[2001:db8::1]")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rtmp://live.example/app/key", ("rtmp", "live.example", 1935, "/app/key")),
        ("RTMPS://Live.Example/app/Key?a=B", ("rtmps", "live.example", 443, "/app/Key?a=B")),
        ("https://live.example", ("https", "live.example", 443, "/")),
        ("https://live.example:443/whip/KEY", ("https", "live.example", 443, "/whip/KEY")),
        ("rtmp://10.0.0.5:1936/a/k", ("rtmp", "10.0.0.5", 1936, "/a/k")),
        ("rtmp://[2001:db8::1]/a/k", ("rtmp", "[2001:db8::1]", 1935, "/a/k")),
    ],
)
def test_what_is_listed_may_be_opened(url: str, expected: tuple[str, str, int, str]) -> None:
    where = destination(url, ALLOWED)
    assert (where.scheme, where.host, where.port, where.path) == expected
    assert "key" not in (repr(where) + where.masked).lower()


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://live.example/whip", "invalid_url"),
        ("file:///etc/passwd", "invalid_url"),
        ("gopher://live.example/", "invalid_url"),
        ("data:text/plain,x", "invalid_url"),
        ("rtmp://live.example/", "invalid_url"),
        ("rtmp://live.example", "invalid_url"),
        ("rtmp:///app/key", "invalid_url"),
        ("https://user@live.example/", "invalid_url"),
        ("https://live.example\\@169.254.169.254/", "invalid_url"),
        ("https://live.example#@169.254.169.254/", "invalid_url"),
        ("https://live.example /", "invalid_url"),
        ("https://live.example/\r\nHost: x", "invalid_url"),
        ("https://live.example:0/", "invalid_url"),
        ("https://live.example:99999/", "invalid_url"),
        ("https://live.example:443:80/", "invalid_url"),
        ("https://live.exampl\u00e9/", "invalid_url"),
        ("https://live.example:8443/", "output_not_allowed"),
        ("https://live.example.evil.test/", "output_not_allowed"),
        ("https://evil.test/live.example", "output_not_allowed"),
        ("https://live.example./", "invalid_url"),
        ("https://2130706433/", "output_not_allowed"),
        ("https://0x7f000001/", "output_not_allowed"),
        ("https://0177.0.0.1/", "output_not_allowed"),
        ("https://127.1/", "output_not_allowed"),
        ("https://[::ffff:169.254.169.254]/", "output_not_allowed"),
        ("https://169.254.169.254/latest", "output_not_allowed"),
        ("rtmp://10.0.0.5/a/k", "output_not_allowed"),
        ("rtmp://localhost/a/k", "output_not_allowed"),
    ],
)
def test_nothing_else_may(url: str, code: str) -> None:
    with pytest.raises(ApiError) as refused:
        destination(url, ALLOWED)
    assert refused.value.code == code
    assert refused.value.status_code == (400 if code == "invalid_url" else 403)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1::1", True),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("100.64.0.1", False),
        ("169.254.169.254", False),
        ("224.0.0.1", False),
        ("0.0.0.0", False),
        ("::1", False),
        ("fe80::1", False),
        ("fd00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:a00:1::", False),
    ],
)
def test_addresses_of_the_internet(address: str, expected: bool) -> None:
    assert public(ipaddress.ip_address(address)) is expected


async def test_a_name_must_lead_outside_with_every_address(monkeypatch: pytest.MonkeyPatch) -> None:
    where = destination("rtmp://live.example/app/key", ALLOWED)
    found = ["93.184.216.34"]

    async def lookup(host: str, port: int, **options: Any) -> list[Any]:
        assert (host, port) == ("live.example", 1935)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", lookup, raising=False)
    assert await resolve(where) == "93.184.216.34"
    # Rebinding: the name leads inside now, if only in part.
    found.append("169.254.169.254")
    with pytest.raises(UnreachableError, match="not public"):
        await resolve(where)
    # The operator's own address needs no lookup, and may be inside.
    assert await resolve(destination("rtmp://10.0.0.5:1936/a/k", ALLOWED)) == "10.0.0.5"


def test_when_to_try_again() -> None:
    retries = Retries()
    waits = [retries.failed(0.0, 0.5) for _ in range(MAX_FAILURES)]
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, LAST_RETRY_SECONDS, LAST_RETRY_SECONDS, None]
    retries = Retries()
    retries.failed(0.0, 0.5)
    assert retries.failed(3.0, 0.5) == 2.0  # not live for long enough to count anew
    assert retries.failed(31.0, 0.5) == 1.0
    assert (retries.failed(0.0, 0.0), Retries().failed(0.0, 1.0)) == (1.5, 1.25)


# the API


async def post(gateway: Any, stream: dict[str, Any], **fields: Any) -> Any:
    return await gateway.http.post(f"/v1/streams/{stream['id']}/outputs", json=fields)


async def get(gateway: Any, output: dict[str, Any]) -> dict[str, Any]:
    return (await gateway.http.get(f"/v1/streams/{output['stream_id']}/outputs/{output['id']}")).json()


async def reached(gateway: Any, output: dict[str, Any], state: str, seconds: float = 20) -> dict[str, Any]:
    async def there() -> bool:
        return (await get(gateway, output))["state"] == state

    await gateway.until(there, seconds)
    return await get(gateway, output)


async def test_nothing_is_pushed_out_unless_the_operator_says_where(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        refused = await post(gateway, stream, url="rtmp://127.0.0.1/a/k")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "outputs_disabled")
    async with run_gateway(outputs=("127.0.0.1:9",)) as gateway:
        stream = await gateway.open()
        for fields, param in (
            ({}, "url"),
            ({"url": 5}, "url"),
            ({"url": "rtmp://127.0.0.1:9/"}, "url"),
            ({"url": "x" * 2000}, "url"),
            ({"url": "https://127.0.0.1:9/", "token": "a b"}, "token"),
            ({"url": "https://127.0.0.1:9/", "x": 1}, "x"),
        ):
            refused = await post(gateway, stream, **fields)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param)
        refused = await post(gateway, stream, url="rtmp://127.0.0.1:10/a/k")
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "output_not_allowed")
        missing = await gateway.http.get(f"/v1/streams/{stream['id']}/outputs/out_x")
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "output_not_found")
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        late = await post(gateway, stream, url="rtmp://127.0.0.1:9/a/k")
        assert (late.status_code, late.json()["error"]["code"]) == (409, "stream_ended")


async def test_a_server_that_is_not_there_is_tried_again_and_given_up(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.egress.outputs.FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr("server.egress.outputs.LOOK_SECONDS", 0.01)
    monkeypatch.setattr("server.egress.outputs.MAX_FAILURES", 3)
    caplog.set_level(logging.DEBUG)
    async with run_gateway(outputs=("127.0.0.1:9",)) as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        heard = asyncio.create_task(
            gateway.watch(stream, "?format=events", until=lambda seen: "failed" in states(seen))
        )
        await gateway.until(lambda: len(live.viewers) == 1)
        made = await post(gateway, stream, url=f"rtmp://127.0.0.1:9/live/{SECRET}")
        assert made.status_code == 201
        output = made.json()
        assert made.headers["location"] == f"/v1/streams/{stream['id']}/outputs/{output['id']}"
        assert (output["url"], output["kind"]) == ("rtmp://127.0.0.1:9/***", "rtmp")
        output = await reached(gateway, output, "failed")
        assert (output["attempts"], output["error"]["code"]) == (3, "not_connected")
        assert states(await heard) == ["connecting", "waiting"] * 2 + ["connecting", "failed"]
        assert 'livereel_outputs{state="failed"} 1.0' in (await gateway.http.get("/metrics")).text
        listed = await gateway.http.get(f"/v1/streams/{stream['id']}/outputs")
        assert [each["id"] for each in listed.json()["data"]] == [output["id"]]
        assert (await gateway.http.delete(made.headers["location"])).status_code == 204
        assert (await gateway.http.get(made.headers["location"])).status_code == 404
        for _ in range(4):
            assert (await post(gateway, stream, url="rtmp://127.0.0.1:9/a/k")).status_code == 201
        assert (await post(gateway, stream, url="rtmp://127.0.0.1:9/a/k")).status_code == 409
        assert SECRET not in listed.text + json.dumps((await heard).events)
    assert SECRET not in caplog.text


def states(seen: Any) -> list[str]:
    return [event["state"] for event in seen.of("output.state")]


# RTMP


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """For localhost: certificate and key."""
    folder = tmp_path_factory.mktemp("tls")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "x")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), 5, now, now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(True, None), True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    plain = serialization.NoEncryption()
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)
    (folder / "key.pem").write_bytes(pem)
    return folder / "cert.pem", folder / "key.pem"


LISTENER = """
import av, contextlib, json, sys
with av.open(sys.argv[1], options={"listen": "1"}) as source:
    video = source.streams.video[0]
    frames, keys = [], 0
    with contextlib.suppress(OSError):  # how libav's listener takes every end
        for packet in source.demux(video):
            keys += packet.is_keyframe
            for frame in packet.decode():
                frames.append([float(frame.pts * frame.time_base), *frame.to_image().resize((1, 1)).getpixel((0, 0))])
            if len(frames) >= int(sys.argv[2]):
                break
    print(json.dumps({"frames": frames, "keys": keys, "size": [video.width, video.height]}))
"""


async def listen(port: int, frames: int) -> asyncio.subprocess.Process:
    url = f"rtmp://127.0.0.1:{port}/live/{SECRET}"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LISTENER, url, str(frames)), stdout=asyncio.subprocess.PIPE
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


async def test_rtmp(run_gateway: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A listener gets the stream; it goes away and comes back, and gets it again. No viewer is needed meanwhile."""
    monkeypatch.setattr("server.egress.outputs.FIRST_RETRY_SECONDS", 0.3)
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    port = free_port()
    async with run_gateway(outputs=(f"127.0.0.1:{port}",), unwatched_pause_s=0.5, idle_timeout_s=0.5) as gateway:
        stream = await gateway.open()
        listener = await listen(port, 45)
        output = (await post(gateway, stream, url=f"rtmp://127.0.0.1:{port}/live/{SECRET}")).json()
        live = await reached(gateway, output, "live")
        assert live["live_since"] and live["error"] is None
        record = await gateway.get(stream)
        assert (record["state"], record["viewers"]) == ("live", 1)
        printed = (await asyncio.wait_for(listener.communicate(), 30))[0]
        got = json.loads(printed.splitlines()[-1])
        assert got["size"] == [64, 48] and got["keys"] >= 2
        times = [frame[0] for frame in got["frames"]]
        gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
        assert sum(abs(gap - 1 / 16) < 0.003 for gap in gaps) > 0.8 * len(gaps)
        # It is the picture that the engine drew.
        picture = gateway.backend._picture(gateway.backend._streams[stream["id"]], 10)
        wanted = Image.frombytes("RGB", (64, 48), picture).resize((1, 1)).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(got["frames"][10][1:], wanted, strict=True)) < 12
        # It is gone: the stream goes on without a viewer, and comes to the next one.
        await reached(gateway, output, "waiting")
        listener = await listen(port, 10)
        again = await reached(gateway, output, "live")
        assert again["attempts"] >= 2
        await asyncio.wait_for(listener.communicate(), 30)
        assert (await gateway.get(stream))["state"] == "live"
        # Without the output it is a stream that nobody watches.
        assert (await gateway.http.delete(f"/v1/streams/{stream['id']}/outputs/{output['id']}")).status_code == 204
        await gateway.until(lambda: gateway.streams.get(stream["id"]).session.state == "ended")
    assert SECRET not in "".join(capfd.readouterr())


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_the_process_that_pushes_is_told_no_secrets(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIVEREEL_TURN_SECRET", "hush")
    port = free_port()
    async with run_gateway(outputs=(f"127.0.0.1:{port}",)) as gateway:
        stream = await gateway.open()
        listener = await listen(port, 10)
        output = (await post(gateway, stream, url=f"rtmp://127.0.0.1:{port}/live/{SECRET}")).json()
        await reached(gateway, output, "live")
        [process] = [Path(f"/proc/{pid}") for pid in children(os.getpid()) if pid != listener.pid]
        command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
        opened = {int(each.name): os.readlink(each) for each in (process / "fd").iterdir()}
        folder = os.readlink(process / "cwd")
        await asyncio.wait_for(listener.communicate(), 30)
    assert b"rtmp_worker.py" in command and SECRET.encode() not in command
    assert {line.split(b"=")[0] for line in environment.split(b"\0") if line} <= {b"LD_LIBRARY_PATH"}
    assert folder == "/"
    # Beside the first three: the connection to the relay.
    assert [name.split(":")[0] for each, name in opened.items() if each > 2] == ["socket"], opened


@pytest.mark.parametrize(
    ("scheme", "code"), [("rtmp", "stalled"), ("rtmps", "not_connected"), ("https", "not_connected")]
)
async def test_a_server_that_says_nothing_is_let_go(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, scheme: str, code: str
) -> None:
    monkeypatch.setattr("server.egress.outgoing.CONNECT_SECONDS", 1.0)
    silent = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with run_gateway(outputs=(f"127.0.0.1:{port}",)) as gateway:
            output = (await post(gateway, await gateway.open(), url=f"{scheme}://127.0.0.1:{port}/a/{SECRET}")).json()
            tried = await reached(gateway, output, "connecting")
            while tried["error"] is None:
                await asyncio.sleep(0.05)
                tried = await get(gateway, output)
            assert tried["error"]["code"] == code
        silent.set()


async def test_an_output_ends_with_its_stream(run_gateway: Any) -> None:
    port = free_port()
    async with run_gateway(outputs=(f"127.0.0.1:{port}",)) as gateway:
        stream = await gateway.open()
        listener = await listen(port, 100_000)
        output = (await post(gateway, stream, url=f"rtmp://127.0.0.1:{port}/live/{SECRET}")).json()
        await reached(gateway, output, "live")
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        ended = await reached(gateway, output, "ended")
        assert ended["error"] is None
        # Whatever was shown has arrived.
        printed = (await asyncio.wait_for(listener.communicate(), 30))[0]
        assert len(json.loads(printed.splitlines()[-1])["frames"]) > 0


async def test_rtmps(run_gateway: Any, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener behind something that ends TLS, as services have it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    monkeypatch.setattr("server.egress.outputs.FIRST_RETRY_SECONDS", 0.3)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    inner = free_port()

    async def copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                sink.write(data)
        sink.close()

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", inner)
        except OSError:
            writer.close()
            return
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))

    server = await asyncio.start_server(on_client, "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with run_gateway(outputs=(f"127.0.0.1:{port}",)) as gateway:
            stream = await gateway.open()
            listener = await listen(inner, 10)
            output = (await post(gateway, stream, url=f"rtmps://127.0.0.1:{port}/live/{SECRET}")).json()
            await reached(gateway, output, "live")
            printed = (await asyncio.wait_for(listener.communicate(), 30))[0]
            assert len(json.loads(printed.splitlines()[-1])["frames"]) >= 10


# WHIP


class Receiver:
    """A WHIP server over aiortc."""

    def __init__(self, codec: str) -> None:
        self.codec = codec
        self.requests: list[tuple[str, str, str]] = []
        self.pictures: list[Any] = []
        self.peers: list[RTCPeerConnection] = []
        self.redirect = ""
        self.tasks: list[asyncio.Task[None]] = []
        self.port = 0

    async def publish(self, request: Request) -> Response:
        self.requests.append((request.method, request.url.path, request.headers.get("authorization", "")))
        if self.redirect:
            return RedirectResponse(self.redirect, 307)
        peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
        self.peers.append(peer)
        peer.on("track", lambda track: self.tasks.append(asyncio.create_task(self.take(track))))
        offer = (await request.body()).decode()
        assert "a=sendonly" in offer
        other = {"H264": "VP8", "VP8": "H264"}[self.codec]
        await peer.setRemoteDescription(RTCSessionDescription(without(offer, other), "offer"))
        await peer.setLocalDescription(await peer.createAnswer())
        answer = peer.localDescription.sdp
        return Response(answer, 201, {"Location": "/session/1"}, media_type="application/sdp")

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
    """The SDP as if one codec were unknown."""
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
            Route("/whip/{key}", receiver.publish, methods=["POST"]),
            Route("/session/1", receiver.hang_up, methods=["DELETE"]),
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
        assert set(gateway.streams.get(stream["id"]).broadcasts) == {(codec.lower(), False)}
        await gateway.http.delete(f"/v1/streams/{stream['id']}/outputs/{output['id']}")
        assert [each[:2] for each in receiver.requests] == [("POST", f"/whip/{SECRET}"), ("DELETE", "/session/1")]
        assert {each[2] for each in receiver.requests} == {"Bearer tok_SECRET"}
    ours = [record.getMessage() for record in caplog.records if record.name.startswith("livereel")]
    assert "SECRET" not in "".join(ours)


@pytest.mark.usefixtures("loopback")
async def test_whip_follows_no_redirect_and_trusts_no_certificate(
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
        receiver.redirect = f"https://127.0.0.1:{receiver.port}/whip/elsewhere"
        output = (await post(gateway, stream, url=url)).json()

        async def failed() -> bool:
            return bool((await get(gateway, output))["error"])

        await gateway.until(failed, 20)
        error = (await get(gateway, output))["error"]
        assert error["code"] == "not_accepted" and "redirects" in error["message"]
        assert {each[1] for each in receiver.requests} == {f"/whip/{SECRET}"}
        assert SECRET not in error["message"]


async def test_rtmps_checks_the_certificate(certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from server.egress.outgoing import connect

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    server = await asyncio.start_server(lambda r, w: w.close(), "127.0.0.1", 0, ssl=context)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(UnreachableError, match="certificate"):
            await connect(Destination("rtmps", "127.0.0.1", port, "/a/k"), "127.0.0.1")
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
        with pytest.raises(UnreachableError, match="certificate"):  # it is valid, but another host's
            await connect(Destination("rtmps", "live.example", port, "/a/k"), "127.0.0.1")
        _, writer = await connect(Destination("rtmps", "127.0.0.1", port, "/a/k"), "127.0.0.1")
        writer.close()
    assert destinations.PORTS["rtmps"] == 443


async def test_an_output_goes_with_its_key(run_gateway: Any, tmp_path: Path) -> None:
    path, port = tmp_path / "keys.toml", free_port()
    owner, helper = (keys.add_key(path, name, "studio", ["control"], 2, 1000) for name in ("owner", "helper"))
    async with run_gateway(keys=path, outputs=(f"127.0.0.1:{port}",)) as gateway:
        gateway.http.headers["authorization"] = f"Bearer {owner}"
        stream = await gateway.open()
        gateway.http.headers["authorization"] = f"Bearer {helper}"
        output = (await post(gateway, stream, url=f"rtmp://127.0.0.1:{port}/a/{SECRET}")).json()
        gateway.http.headers["authorization"] = f"Bearer {owner}"
        assert (await get(gateway, output))["state"] != "ended"
        keys.remove_key(path, "helper")
        await reached(gateway, output, "ended")
        assert (await gateway.get(stream))["state"] in ("starting", "live")
