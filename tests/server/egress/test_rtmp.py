"""A stream pushed to a real RTMP listener, plain and behind TLS."""

import asyncio
import contextlib
import itertools
import json
import os
import ssl
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from server.bench.gateway import children
from server.egress.destination import parse_destination
from server.egress.rtmp import tc_url
from tests.server.egress.harness import SECRET, asked_for, free_port, listen, post, reached

pytestmark = pytest.mark.anyio


async def test_rtmp(run_gateway: Any, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """A listener gets the stream, disconnects, comes back and gets it again, without any viewer in between."""
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
        # Services want an audio track: silent AAC by default, as long as the video and without a gap.
        assert got["tracks"] == ["h264", "aac"]
        starts, lengths, peaks = zip(*got["sound"], strict=True)
        assert max(peaks) < 1e-4 and abs(starts[0] - times[0]) < 0.05 and abs(starts[-1] - times[-1]) < 0.15
        drifts = [start - starts[0] - sum(lengths[:index]) for index, start in enumerate(starts)]
        assert max(map(abs, drifts)) < 0.003
        # The picture is the one that the engine drew.
        picture = gateway.backend._picture(gateway.backend._streams[stream["id"]], 10)
        wanted = Image.frombytes("RGB", (64, 48), picture).resize((1, 1)).getpixel((0, 0))
        assert max(abs(a - b) for a, b in zip(got["frames"][10][1:], wanted, strict=True)) < 12
        # The listener is gone: the stream continues without a viewer, and reaches the next listener.
        await reached(gateway, output, "waiting")
        listener = await listen(port, 10)
        again = await reached(gateway, output, "live")
        assert again["attempts"] >= 2
        await asyncio.wait_for(listener.communicate(), 30)
        assert (await gateway.get(stream))["state"] == "live"
        # Without the output, nobody watches the stream.
        assert (await gateway.http.delete(f"/v1/streams/{stream['id']}/outputs/{output['id']}")).status_code == 204
        await gateway.until(lambda: gateway.streams.get(stream["id"]).session.state == "ended")
    assert SECRET not in "".join(capfd.readouterr())


async def test_the_audio_track_can_be_left_out(run_gateway: Any) -> None:
    port = free_port()
    async with run_gateway(outputs=(f"127.0.0.1:{port}",)) as gateway:
        stream = await gateway.open()
        listener = await listen(port, 10)
        output = (await post(gateway, stream, url=f"rtmp://127.0.0.1:{port}/live/{SECRET}", audio="none")).json()
        await reached(gateway, output, "live")
        got = json.loads((await asyncio.wait_for(listener.communicate(), 30))[0].splitlines()[-1])
        assert got["tracks"] == ["h264"] and len(got["frames"]) >= 10


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("rtmp://live.example/app/key", "rtmp://live.example:1935/app"),
        ("rtmps://live.example/app/key?a=b", "rtmps://live.example:443/app"),
        ("rtmp://live.example:1936/app/instance/key", "rtmp://live.example:1936/app/instance"),
        ("rtmp://[2001:db8::1]/app/mp4:key/more", "rtmp://[2001:db8::1]:1935/app"),
        ("rtmp://live.example/app", "rtmp://live.example:1935/app"),
    ],
)
def test_tc_url_names_scheme_host_port_and_application(url: str, expected: str) -> None:
    host = url.split("/")[2]
    assert tc_url(parse_destination(url, (host,))) == expected


@pytest.mark.parametrize(
    ("path", "application"), [("live/KEY", "live"), ("a'[b]=c:d/x,y/KEY?k=1:2;3'[4]", "a'[b]=c:d/x,y")]
)
async def test_the_server_is_told_the_url_that_was_asked_for(run_gateway: Any, path: str, application: str) -> None:
    """RTMP 1.0, section 7.2.1.1: `tcUrl` of `connect`, here between its AMF 0 name and the next property."""
    port = free_port()
    server, command = await asked_for(port)
    async with server, run_gateway(outputs=(f"localhost:{port}",)) as gateway:
        await post(gateway, await gateway.open(), url=f"rtmp://localhost:{port}/{path}")
        connect = await asyncio.wait_for(command, 20)
    expected = f"rtmp://localhost:{port}/{application}".encode()
    assert b"\0\5tcUrl\2" + len(expected).to_bytes(2) + expected + b"\0" in connect
    assert b"\0\3app\2" + len(application).to_bytes(2) + application.encode() + b"\0" in connect


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
    # Besides the standard three: the connection to the relay.
    assert [name.split(":")[0] for each, name in opened.items() if each > 2] == ["socket"], opened


async def test_rtmps(run_gateway: Any, certificate: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A listener behind a proxy that terminates TLS, as RTMP services have it."""
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
