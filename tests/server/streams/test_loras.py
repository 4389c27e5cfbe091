"""LoRAs over the API: what there is, what applies, and every way to ask for the impossible."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from engine import wire
from server.backends.fake import FakeBackend
from server.config import Config

pytestmark = pytest.mark.anyio

JSON = {"content-type": "application/json"}


def backend(**settings: Any) -> FakeBackend:
    return FakeBackend(width=64, height=48, chunk_seconds=0.02, loras=("ink", "watercolour v2"), **settings)


async def strengths(gateway: Any) -> dict[str, float | None]:
    response = await gateway.http.get("/v1/loras")
    assert response.status_code == 200, response.text
    assert response.json()["object"] == "list"
    assert all(entry["object"] == "lora" for entry in response.json()["data"])
    return {entry["id"]: entry["strength"] for entry in response.json()["data"]}


async def test_apply_change_and_remove(run_gateway: Any) -> None:
    async with run_gateway(backend()) as gateway:
        assert await strengths(gateway) == {"ink": None, "watercolour v2": None}
        for wanted in ({"ink": 0.8}, {"ink": -4, "watercolour v2": 4}, {"watercolour v2": 0}, {}):
            response = await gateway.http.put("/v1/loras", json={"loras": wanted})
            assert response.status_code == 200, response.text
            applied = {entry["id"]: entry["strength"] for entry in response.json()["data"]}
            assert applied == {"ink": None, "watercolour v2": None} | wanted
            assert await strengths(gateway) == applied


BAD = [
    ("{}", "loras", "missing_field"),
    ('{"loras": null}', "loras", "invalid_value"),
    ('{"loras": []}', "loras", "invalid_value"),
    ('{"loras": "ink"}', "loras", "invalid_value"),
    ('{"loras": {"ink": "1"}}', "loras", "invalid_value"),
    ('{"loras": {"ink": true}}', "loras", "invalid_value"),
    ('{"loras": {"ink": null}}', "loras", "invalid_value"),
    ('{"loras": {"ink": NaN}}', "loras", "lora_strength"),
    ('{"loras": {"ink": Infinity}}', "loras", "lora_strength"),
    ('{"loras": {"ink": 4.01}}', "loras", "lora_strength"),
    ('{"loras": {"ink": -4.01}}', "loras", "lora_strength"),
    (json.dumps({"loras": {"ink": 10**400}}), "loras", None),
    ('{"loras": {"": 1}}', "loras", "lora_name"),
    ('{"loras": {"../ink": 1}}', "loras", "lora_name"),
    ('{"loras": {"a/b": 1}}', "loras", "lora_name"),
    ('{"loras": {"a\\\\b": 1}}', "loras", "lora_name"),
    ('{"loras": {".ink": 1}}', "loras", "lora_name"),
    ('{"loras": {"ink\\n": 1}}', "loras", "lora_name"),
    ('{"loras": {"in\\u0000k": 1}}', "loras", "lora_name"),
    ('{"loras": {"\\ud800": 1}}', None, None),
    (json.dumps({"loras": {"x" * 129: 1}}), "loras", "lora_name"),
    (json.dumps({"loras": {f"l{k}": 1 for k in range(17)}}), "loras", "lora_count"),
    ('{"loras": {}, "stream": "a"}', "stream", "unknown_field"),
    ("[]", None, "invalid_body"),
    ("{", None, "invalid_json"),
]


async def test_bad_requests(run_gateway: Any) -> None:
    async with run_gateway(backend()) as gateway:
        for content, param, code in BAD:
            response = await gateway.http.put("/v1/loras", content=content, headers=JSON)
            assert response.status_code == 400, content
            error = response.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert error["type"] == "invalid_request_error"
            if param is not None:
                assert error["param"] == param, content
                assert f"`{param}`" in error["message"]
            assert code is None or error["code"] == code, (content, error)
        assert not [message for message in gateway.backend.sent if isinstance(message, wire.SetLoras)]
        # a type that a form could send is refused, as everywhere
        response = await gateway.http.put("/v1/loras", content='{"loras": {}}')
        assert response.status_code == 415


async def test_unknown_loras(run_gateway: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with run_gateway(backend()) as gateway:
        await gateway.http.put("/v1/loras", json={"loras": {"ink": 1}})
        response = await gateway.http.put("/v1/loras", json={"loras": {"ink": 0.5, "oil": 1}})
        assert response.status_code == 404
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("lora_not_found", "loras")
        assert "oil" in error["message"]
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING], "the client's fault"
        assert await strengths(gateway) == {"ink": 1.0, "watercolour v2": None}


async def test_without_an_engine(run_gateway: Any) -> None:
    async with run_gateway(backend(ready_after=60), ready=False) as gateway:
        for response in (await gateway.http.get("/v1/loras"), await gateway.http.put("/v1/loras", json={"loras": {}})):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "engine_unavailable"


async def test_an_engine_that_dies_meanwhile(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_gateway(backend()) as gateway:
        monkeypatch.setattr(FakeBackend, "_set_loras", lambda *_: None)
        asking = asyncio.create_task(gateway.http.put("/v1/loras", json={"loras": {"ink": 1}}))
        await gateway.until(lambda: any(isinstance(message, wire.SetLoras) for message in gateway.backend.sent))
        gateway.backend.crash()
        assert (await asking).status_code == 503
        monkeypatch.setattr("server.streams.engine_link.LORA_SECONDS", 0.05)
        await gateway.until(lambda: gateway.backend.health().ready)
        response = await gateway.http.get("/v1/loras")
        assert (response.status_code, response.json()["error"]["code"]) == (504, "engine_timeout")


async def test_a_new_engine_process_gets_what_was_applied(run_gateway: Any) -> None:
    async with run_gateway(backend()) as gateway:
        await gateway.http.put("/v1/loras", json={"loras": {"ink": 0.8}})
        for _ in range(2):
            gateway.backend.crash()
            await gateway.until(lambda: gateway.backend.health().ready)
            assert await strengths(gateway) == {"ink": 0.8, "watercolour v2": None}


async def test_the_folder_is_a_setting(tmp_path: Path) -> None:
    assert Config.from_arguments(["--loras", str(tmp_path)], {}).loras == tmp_path
    assert Config.from_arguments([], {"LIVEREEL_LORAS": str(tmp_path)}).loras == tmp_path
    with pytest.raises(ValueError, match="no-such"):
        Config(loras=tmp_path / "no-such")
