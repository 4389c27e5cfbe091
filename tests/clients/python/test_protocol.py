"""Retries, reconnects and downloads that go on: the fake server breaks what the client must survive."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import livereel
import pytest
from livereel import Client, events
from livereel.protocol import BACKOFF, Request, retry_delay
from livereel.testing import FakeServer, FakeSocket, error_reply


@pytest.fixture
def client(fake: FakeServer) -> Client:
    return Client(transport=fake.transport)


# requests


def test_a_busy_server_is_asked_again_when_it_says(client: Client, fake: FakeServer) -> None:
    fake.fail(503, "exhausted", retry_after=5)
    fake.fail(429, "queue_full")
    stream = client.stream("a red ball")
    assert fake.slept == [5, BACKOFF[1]]
    keys = {request.headers["idempotency-key"] for request in fake.requests}
    assert len(fake.requests) == 3 and len(keys) == 1  # so the server makes one stream, however often it is asked
    client.stream("a red ball")
    assert fake.requests[-1].headers["idempotency-key"] not in keys
    assert len(client.streams()) == 2 and stream.state == "live"


def test_retries_end(client: Client, fake: FakeServer) -> None:
    for _ in range(3):
        fake.fail(503, "exhausted", "Out of memory.", retry_after=1)
    with pytest.raises(livereel.ServerFault, match="Out of memory") as caught:
        client.streams()
    assert (caught.value.status, caught.value.retry_after, caught.value.request_id) == (503, 1, "fake-request")
    assert len(fake.requests) == 3


def test_a_long_wait_is_left_to_the_program(client: Client, fake: FakeServer) -> None:
    fake.fail(429, "queue_full", retry_after=30)
    with pytest.raises(livereel.RateLimited) as caught:
        client.stream("a red ball")
    assert caught.value.retry_after == 30 and fake.slept == []


def test_what_may_have_happened_is_not_done_twice(client: Client, fake: FakeServer) -> None:
    stream = client.stream("a red ball")
    fake.lose_request()
    assert stream.refresh().state == "live"  # reading again does no harm
    fake.lose_request()
    with pytest.raises(livereel.ConnectionFailed):
        stream.steer("a blue ball")
    fake.fail(504, "engine_timeout")
    with pytest.raises(livereel.ServerFault):
        stream.steer("a blue ball")
    assert [request.method for request in fake.requests].count("PATCH") == 2


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 500, 507])
def test_other_errors_are_not_tried_again(status: int) -> None:
    assert retry_delay(Request("GET", "/v1/streams"), error_reply(status, "x", "x"), 0) is None


def test_retries_can_be_turned_off(fake: FakeServer) -> None:
    fake.fail(503, "exhausted")
    with pytest.raises(livereel.ServerFault):
        Client(transport=fake.transport, max_retries=0).streams()


# watching


def test_a_lost_connection_is_opened_again_without_repeating_frames(client: Client, fake: FakeServer) -> None:
    with client.stream("a red ball", duration_s=1) as stream:
        times, connections = [], 0
        for item in stream.watch():
            if isinstance(item, events.StreamStarted):
                connections += 1
            elif isinstance(item, livereel.Frame):
                times.append(item.pts)
                if len(times) in (3, 9):
                    fake.streams[stream.id].frame -= 1  # a new viewer gets the frame on screen first
                    fake.lose_sockets()
        assert times == [k * 90_000 // 16 for k in range(16)]
        assert connections == 3 and fake.slept == [BACKOFF[0]] * 2


def test_a_server_that_stays_away(client: Client, fake: FakeServer) -> None:
    stream = client.stream("a red ball")
    frames = stream.frames(reconnect_s=10)
    next(frames)
    fake.offline = True
    fake.lose_sockets()
    with pytest.raises(livereel.ConnectionFailed):
        next(frames)
    assert fake.slept == [0.5, 1, 2, 4, 8]
    fake.offline = False
    assert next(stream.frames()).pts > 0  # the stream itself has not suffered


def test_a_stream_that_fails(client: Client, fake: FakeServer) -> None:
    stream = client.stream("a red ball")
    items = stream.watch()
    next(items)
    fake.fail_stream(stream.id)
    with pytest.raises(livereel.StreamFailed, match="NaN") as caught:
        list(items)
    assert caught.value.code == "numeric"
    assert (stream.state, stream.info.error) == ("failed", livereel.Failure("numeric", "The latents became NaN."))
    with pytest.raises(livereel.StreamFailed):
        list(stream.events())


def test_a_stream_that_ended_before_it_was_watched(client: Client) -> None:
    stream = client.stream("a red ball")
    stream.end()
    assert list(stream.frames()) == []
    assert [event.type for event in stream.events()] == ["stream.started", "ended"]


@pytest.mark.parametrize("text", ["[]", "{", '"x"'])
def test_an_event_that_is_none(client: Client, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(FakeSocket, "receive", lambda self: text)
    with pytest.raises(livereel.LivereelError, match="Livereel server"):
        next(client.stream("a red ball").frames())


def test_leaving_a_loop_closes_the_connection(client: Client, fake: FakeServer) -> None:
    stream = client.stream("a red ball")
    for _ in stream.frames():
        assert len(fake.streams[stream.id].sockets) == 1
        break
    assert fake.streams[stream.id].sockets == []


# clips


def test_a_clip_that_fails(client: Client, fake: FakeServer, tmp_path: Path) -> None:
    fake.video_failure = livereel.Failure("engine_failed", "The engine crashed twice.")
    with pytest.raises(livereel.VideoFailed, match="crashed twice") as caught:
        client.videos.generate("a red ball", tmp_path / "out.mp4")
    assert (caught.value.code, caught.value.retryable) == ("engine_failed", False)
    assert list(tmp_path.iterdir()) == []


# downloads, from an HTTP server that breaks off

FILM = bytes(range(256)) * 400


class BrokenServer(http.server.ThreadingHTTPServer):
    """Sends a film in pieces of at most `piece` bytes and breaks each connection, but the last."""

    def __init__(self, piece: int, *, etag: str | None, ranges: bool) -> None:
        self.asked: list[tuple[str | None, str | None]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                asked, condition = handler.headers.get("range"), handler.headers.get("if-range")
                self.asked.append((asked, condition))
                start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and ranges and condition == etag else 0
                handler.send_response(206 if start else 200)
                if etag:
                    handler.send_header("etag", etag)
                handler.send_header("content-length", str(len(FILM) - start))
                handler.end_headers()
                whole = len(self.asked) > 3 and not ranges
                handler.wfile.write(FILM[start:] if whole else FILM[start : start + piece])
                handler.close_connection = True

            def log_message(handler, *arguments: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)


@contextlib.contextmanager
def broken_server(
    piece: int, *, etag: str | None = '"1"', ranges: bool = True
) -> Iterator[tuple[BrokenServer, Client]]:
    server = BrokenServer(piece, etag=etag, ranges=ranges)
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    try:
        with Client(f"http://127.0.0.1:{server.server_port}") as client:
            yield server, client
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("livereel.transport.time.sleep", lambda seconds: None)


@pytest.mark.usefixtures("no_waiting")
def test_a_download_goes_on_where_it_broke_off(tmp_path: Path) -> None:
    with broken_server(30_000) as (server, client):
        path = client.videos.download("video_1", tmp_path / "film.mp4")
        assert path.read_bytes() == FILM
        assert [asked for asked, _ in server.asked] == [None, "bytes=30000-", "bytes=60000-", "bytes=90000-"]
        assert {condition for _, condition in server.asked[1:]} == {'"1"'}


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("etag", ['"1"', None])
def test_a_download_that_cannot_go_on_starts_anew(tmp_path: Path, etag: str | None) -> None:
    """The server ignores ranges, or does not say that the film is still the same."""
    with broken_server(30_000, etag=etag, ranges=False) as (_, client):
        assert client.videos.download("video_1", tmp_path / "film.mp4").read_bytes() == FILM


@pytest.mark.usefixtures("no_waiting")
def test_a_download_that_makes_no_progress_fails_and_leaves_what_was_there(tmp_path: Path) -> None:
    (path := tmp_path / "film.mp4").write_bytes(b"old")
    with broken_server(0) as (server, client), pytest.raises(livereel.ConnectionFailed):
        client.recordings.download("rec_1", path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    assert len(server.asked) == 5


def test_delays_grow_to_a_bound() -> None:
    lost = livereel.ConnectionFailed("")
    assert [retry_delay(Request("GET", "/"), lost, attempt) for attempt in range(7)] == [*BACKOFF, 8.0, 8.0]
