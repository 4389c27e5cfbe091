"""Outputs over the API: what is accepted, shown and refused."""

from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def post(gateway: Any, stream: dict[str, Any], **fields: Any) -> Any:
    return await gateway.http.post(f"/v1/streams/{stream['id']}/outputs", json=fields)


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
