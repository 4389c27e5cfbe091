"""The API against its own description: schemathesis tries it, and what that found once is pinned without it."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from server.auth import keys
from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio
HERE = Path(__file__).parent


@pytest.mark.schema
@pytest.mark.timeout(400)
async def test_schemathesis_finds_nothing(run_gateway: Any, tmp_path: Path) -> None:
    """All its checks and phases, with a key that may everything; the seed of a failure is in the report."""
    path = tmp_path / "keys.toml"
    key = keys.add_key(path, "root", "root", ["admin"], 1000, 1_000_000)
    command = Path(sys.executable).with_name("st")
    assert command.exists(), "pip install -e .[schema]"
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.25, loras=("watercolour",))
    async with run_gateway(backend, keys=path, queue_limit=1000) as gateway:
        address = f"http://{gateway.address}/openapi.json"
        options = [
            "--config-file",
            str(HERE / "schemathesis.toml"),
            "run",
            address,
            "-H",
            f"Authorization: Bearer {key}",
        ]
        process = await asyncio.create_subprocess_exec(
            command, *options, cwd=HERE.parents[2], stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        report, _ = await process.communicate()
        assert process.returncode == 0, report.decode()
        print(report.decode())


def resolved(api: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The schema that a reference leads to."""
    name = schema.get("$ref", "").rpartition("/")[2]
    return dict(api["components"]["schemas"][name]) if name else schema


async def test_what_schemathesis_found_once(run_gateway: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = keys.add_key(path, "root", "root", ["admin"], 4, 1000)
    async with run_gateway(keys=path) as gateway:
        gateway.http.headers["authorization"] = f"Bearer {key}"
        api = (await gateway.http.get("/openapi.json")).json()
        paths = api["paths"]
        # every limit is in the schema
        create = paths["/v1/streams"]["post"]["requestBody"]["content"]
        form = create["multipart/form-data"]["schema"]["properties"]
        assert (form["seed"]["type"], form["seed"]["maximum"]) == ("integer", 2**63 - 1)
        assert not any("anyOf" in field or field.get("type") == "null" for field in form.values())
        prompt = create["application/json"]["schema"]["properties"]["prompt"]
        assert prompt["pattern"] and (prompt["minLength"], prompt["maxLength"]) == (1, 4096)
        body = paths["/v1/loras"]["put"]["requestBody"]["content"]["application/json"]["schema"]
        loras = resolved(api, body)["properties"]["loras"]
        assert loras["propertyNames"]["pattern"].startswith("^\\w")
        assert (loras["additionalProperties"]["minimum"], loras["maxProperties"]) == (-4, 16)
        body = paths["/v1/streams/{id}"]["patch"]["requestBody"]["content"]["application/json"]["schema"]
        assert [each["required"] for each in resolved(api, body)["anyOf"]] == [
            ["prompt"],
            ["paused"],
            ["prompts"],
        ]
        # who may what, and every status
        assert set(api["components"]["securitySchemes"]) == {"key", "token"}
        assert paths["/livez"]["get"]["security"] == []
        assert paths["/metrics"]["get"]["security"] == [{"key": []}]
        assert "default" in paths["/metrics"]["get"]["responses"]
        assert paths["/v1/streams/{id}"]["get"]["security"] == [{"key": []}, {"token": []}]
        # numbers are JSON's
        stream = (await gateway.http.post("/v1/streams", json={"prompt": "a", "seed": 7.0})).json()
        assert stream["seed"] == 7
        token = await gateway.http.post(f"/v1/streams/{stream['id']}/tokens", json={"expires_in_s": 60.0})
        assert token.status_code == 201
        sent = {"prompt": "a", "seed": "7e0", "duration_s": "1.5e-05"}
        assert (await gateway.http.post("/v1/streams", files={}, data=sent)).status_code == 415
        answer = await gateway.http.post("/v1/streams", files={name: (None, value) for name, value in sent.items()})
        assert (answer.status_code, answer.json()["seed"], answer.json()["duration_s"]) == (201, 7, 1.5e-05)
    async with run_gateway() as gateway:
        assert "securitySchemes" not in (await gateway.http.get("/openapi.json")).json()["components"]
