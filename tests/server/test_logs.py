"""Lines of the log: each belongs to a request, and none says what it should not."""

import asyncio
import io
import json
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import websockets

from server.api import streams
from server.auth.keys import add_key
from server.backends.fake import FakeBackend
from server.errors import request_id
from server.logs import FORMATTERS, JsonFormatter, TextFormatter

pytestmark = pytest.mark.anyio

SECRET = "lrt_abc.DEF-_9"


def record(message: str, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("livereel.x", logging.INFO, "", 1, message, arguments, None)
    vars(made).update(extra)
    return made


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What `--log json` writes, at the lowest level."""
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    handler.setFormatter(JsonFormatter())
    logger = logging.getLogger("livereel")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    yield out
    logger.removeHandler(handler)
    logger.setLevel(before)


def lines(out: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("style", FORMATTERS)
def test_keys_and_tokens_are_redacted(style: str) -> None:
    made = record("GET /ws?token=%s with %s", SECRET, "lr_secret", path="/x?token=lrt_more")
    try:
        raise ValueError("lr_hidden is no good")
    except ValueError:
        made.exc_info = sys.exc_info()
    text = FORMATTERS[style]().format(made)
    assert "token=lrt_[redacted] with lr_[redacted]" in text
    for secret in ("abc", "DEF", "secret", "hidden", "more"):
        assert secret not in text


def test_a_line_is_a_line() -> None:
    forged = record("no such model %s", "x\n2026-01-01 ERROR forged\r")
    assert len(TextFormatter().format(forged).splitlines()) == 1
    assert json.loads(JsonFormatter().format(forged))["message"].endswith("forged\r")


def test_fields_of_json() -> None:
    line = json.loads(JsonFormatter().format(record("took %d", 3, status=200)))
    assert (line["level"], line["logger"], line["message"], line["status"]) == ("info", "livereel.x", "took 3", 200)
    assert line["time"].endswith("+00:00")
    assert "request_id" not in line
    token = request_id.set("req_1")
    try:
        assert json.loads(JsonFormatter().format(record("x")))["request_id"] == "req_1"
        assert TextFormatter().format(record("x")).endswith("x [req_1]")
    finally:
        request_id.reset(token)


async def test_errors_name_their_request(run_gateway: Any, monkeypatch: pytest.MonkeyPatch, log: io.StringIO) -> None:
    async with run_gateway() as gateway:
        for path, status in (("/v1/streams/x", 404), ("/nothing", 404)):
            response = await gateway.http.get(path, headers={"x-request-id": "mine-1"})
            assert (response.status_code, response.json()["request_id"]) == (status, "mine-1")
        response = await gateway.http.post("/v1/streams", json={"prompt": 1})
        assert response.json()["request_id"] == response.headers["x-request-id"]
        forged = await gateway.http.get("/livez", headers={"x-request-id": SECRET})
        assert forged.headers["x-request-id"].startswith("req_")

        def fail(*arguments: object) -> None:
            raise RuntimeError("broken")

        monkeypatch.setattr(streams, "stream_object", fail)
        response = await gateway.http.post("/v1/streams", json={"prompt": "a"}, headers={"x-request-id": "mine-2"})
        assert (response.status_code, response.json()["request_id"]) == (500, "mine-2")
    [failed] = [line for line in lines(log) if line["level"] == "error"]
    assert failed["request_id"] == "mine-2"
    assert "broken" in failed["exception"]


async def test_what_befalls_a_stream_names_the_request_that_opened_it(run_gateway: Any, log: io.StringIO) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.5)  # one stream at a time
    async with run_gateway(backend) as gateway:
        first = await gateway.http.post("/v1/streams", json={"prompt": "a"}, headers={"x-request-id": "open-1"})
        second = await gateway.http.post("/v1/streams", json={"prompt": "b"}, headers={"x-request-id": "open-2"})
        # The second is admitted in the request that deletes the first.
        await gateway.http.delete(f"/v1/streams/{first.json()['id']}", headers={"x-request-id": "close-1"})
        await gateway.until(lambda: gateway.streams.get(second.json()["id"]).session.frames_generated > 0)
        gateway.backend.break_stream(second.json()["id"])
        player = gateway.streams.get(second.json()["id"]).context
        assert player.get(request_id) == "open-2"
    [failed] = [line for line in lines(log) if "failed in the engine" in line["message"]]
    assert failed["request_id"] == "open-2"


async def test_requests_are_logged_without_secrets_and_prompts(
    run_gateway: Any, tmp_path: Path, log: io.StringIO
) -> None:
    file = tmp_path / "keys.toml"
    key = add_key(file, "studio", "studio", ["control"], 4, 600)
    async with run_gateway(keys=file) as gateway:
        gateway.http.headers["authorization"] = f"Bearer {key}"
        made = await gateway.http.post(
            "/v1/streams", json={"prompt": "a very private ball"}, headers={"x-request-id": "open-1"}
        )
        stream = made.json()
        await gateway.http.patch(f"/v1/streams/{stream['id']}", json={"prompt": "a very private cube"})
        await gateway.http.post("/v1/streams", json={"prompt": "a very private\x00"})
        await gateway.http.get("/v1/streams/none?prompt=private&token=lrt_private")
        async with websockets.connect(stream["ws_url"], additional_headers={"x-request-id": "ws-1"}) as socket:
            assert socket.response.headers["x-request-id"] == "ws-1"
            await asyncio.wait_for(socket.recv(), 10)
        gateway.backend.break_stream(stream["id"])
        token = stream["ws_url"].partition("token=")[2]
    text = log.getvalue()
    for secret in ("private", key, token):
        assert secret not in text
    requests = {line["request_id"]: line for line in lines(log) if line["logger"] == "livereel.http"}
    opened = requests["open-1"]
    assert (opened["principal"], opened["method"], opened["path"]) == ("studio", "POST", "/v1/streams")
    assert (opened["status"], requests["ws-1"]["status"]) == (201, 101)
    assert 0 <= opened["seconds"] < 20
