"""The network: where the server is, servers that are none, proxies that refuse, and what is sent along."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import livereel
import pytest
from livereel import AsyncClient, Client
from livereel.transport import Server


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host", "http://", "http://host?x=1", "https://host/#x"])
def test_urls_that_are_none(url: str) -> None:
    with pytest.raises(livereel.LivereelError, match="URL"):
        Client(url)


def test_url_and_key_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Client().url == "http://127.0.0.1:8000"
    monkeypatch.setenv("LIVEREEL_URL", "https://video.example/live/")
    monkeypatch.setenv("LIVEREEL_API_KEY", "lr_key")
    server = Server(None, None, 1)
    assert server.url == "https://video.example/live"
    options = server.socket_options("/v1/streams/a/ws?format=mjpeg")
    assert options["uri"] == "wss://video.example/live/v1/streams/a/ws?format=mjpeg"
    assert options["additional_headers"] == server.headers == {"authorization": "Bearer lr_key"}
    assert Server("http://a", "other", 1).headers == {"authorization": "Bearer other"}
    with pytest.raises(livereel.LivereelError, match="LIVEREEL_API_KEY"):
        Client("http://a", api_key="lr_\n")


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def test_nobody_listens() -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    with Client(url, max_retries=0) as client, pytest.raises(livereel.ConnectionFailed, match=url):
        client.streams()


@pytest.mark.anyio
async def test_nobody_listens_to_the_asynchronous_client() -> None:
    async with AsyncClient(f"http://127.0.0.1:{closed_port()}", max_retries=0) as client:
        with pytest.raises(livereel.ConnectionFailed, match="is it running"):
            await client.streams()


@pytest.fixture
def strange(request: Any) -> Iterator[str]:
    """Something that answers every request with the bytes of the parameter."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                connection.sendall(request.param)

    thread = threading.Thread(target=answer)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


def http(status: str, body: bytes) -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


@pytest.mark.parametrize("strange", [http("200 OK", b"<html>"), http("200 OK", b"[1]")], indirect=True)
def test_another_server(strange: str) -> None:
    with Client(strange, max_retries=0) as client:
        for call in (client.streams, client.readiness, lambda: client.stream("a red ball")):
            with pytest.raises(livereel.LivereelError, match="is this a Livereel server"):
                call()


@pytest.mark.parametrize("strange", [b"SSH-2.0-OpenSSH\r\n", b"", http("502 Bad Gateway", b"<html>")], indirect=True)
def test_no_server_or_a_proxy_without_one(strange: str, known_stream: Any) -> None:
    with Client(strange, max_retries=0) as client, pytest.raises(livereel.LivereelError):
        client.streams()
    with pytest.raises(livereel.ConnectionFailed):
        next(known_stream(Client(strange)).frames(reconnect_s=0))


@pytest.mark.parametrize("strange", [http("403 Forbidden", b"")], indirect=True)
def test_a_proxy_that_refuses_websockets(strange: str, known_stream: Any) -> None:
    stream = known_stream(Client(strange))
    with pytest.raises(livereel.PermissionDenied):
        next(stream.frames())


ENDINGS = {
    "a client that is closed": "frames = client.stream('a ball').frames(); next(frames); client.close()",
    "a client that is not": "frames = client.stream('a ball').frames(); next(frames)",
    "a loop within a block": """
with client.stream('a ball') as stream:
    frames = stream.frames()
    for frame in frames:
        break
""",
}


@pytest.mark.parametrize("ending", ENDINGS.values(), ids=ENDINGS)
def test_a_program_ends_with_its_last_line(ending: str, running: Any) -> None:
    """Also with a connection that is open: the threads of websockets do not hold it up."""
    program = f"from livereel import Client\nclient = Client({running.url!r})\n{ending}"
    environment = {**os.environ, "PYTHONPATH": str(Path(livereel.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)


def test_a_client_that_is_closed(running: Any) -> None:
    with Client(running.url) as client:
        stream = client.stream("a red ball")
        frames = stream.frames()
        next(frames)
    for call in (lambda: next(frames), client.streams, lambda: next(stream.frames())):
        with pytest.raises(livereel.LivereelError, match="closed"):
            call()
