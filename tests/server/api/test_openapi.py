"""The OpenAPI document lists every operation and its errors."""

import json
import re
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_openapi_lists_the_contract(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        api = (await gateway.http.get("/openapi.json")).json()
        operations = {(method, path) for path, methods in api["paths"].items() for method in methods}
        assert operations == {
            ("post", "/v1/streams"),
            ("get", "/v1/streams"),
            ("get", "/v1/streams/{id}"),
            ("patch", "/v1/streams/{id}"),
            ("delete", "/v1/streams/{id}"),
            ("post", "/v1/streams/{id}/whep"),
            ("get", "/v1/streams/{id}/whep"),
            ("patch", "/v1/streams/{id}/whep/{session}"),
            ("delete", "/v1/streams/{id}/whep/{session}"),
            ("get", "/v1/streams/{id}/mjpeg"),
            ("post", "/v1/streams/{id}/tokens"),
            ("put", "/v1/streams/{id}/matte"),
            ("delete", "/v1/streams/{id}/matte"),
            ("post", "/v1/streams/{id}/outputs"),
            ("get", "/v1/streams/{id}/outputs"),
            ("get", "/v1/streams/{id}/outputs/{output}"),
            ("delete", "/v1/streams/{id}/outputs/{output}"),
            ("post", "/v1/streams/{id}/recordings"),
            ("get", "/v1/streams/{id}/recordings"),
            ("get", "/v1/recordings"),
            ("get", "/v1/recordings/{id}"),
            ("post", "/v1/recordings/{id}/stop"),
            ("delete", "/v1/recordings/{id}"),
            ("get", "/v1/recordings/{id}/content"),
            ("post", "/v1/videos"),
            ("get", "/v1/videos"),
            ("get", "/v1/videos/{id}"),
            ("delete", "/v1/videos/{id}"),
            ("post", "/v1/videos/{id}/remix"),
            ("get", "/v1/videos/{id}/content"),
            ("get", "/v1/models"),
            ("get", "/v1/models/{model}"),
            ("get", "/v1/loras"),
            ("put", "/v1/loras"),
            ("get", "/livez"),
            ("get", "/readyz"),
            ("get", "/metrics"),
        }
        assert "HTTPValidationError" not in api["components"]["schemas"]
        for name in re.findall(r'"\$ref": "([^"]*)"', json.dumps(api)):
            assert name.removeprefix("#/components/schemas/") in api["components"]["schemas"]
        create = api["paths"]["/v1/streams"]["post"]
        errors = {"400", "404", "409", "413", "415", "422", "429", "503", "default"}
        assert set(create["responses"]) == {"201", *errors}
        assert create["responses"]["400"]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody")
