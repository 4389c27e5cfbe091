"""HEAD is answered wherever GET is, with GET's status and headers (RFC 9110, section 9.3.2)."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio

VARYING = {"date", "x-request-id", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"}
CHANGING = {*VARYING, "content-length"}
"""Of resources whose figures change between two requests."""


async def clip_of(gateway: Any) -> str:
    """The id of a clip that is complete."""
    id = (await gateway.http.post("/v1/videos", json={"prompt": "a", "seconds": 1})).json()["id"]

    async def completed() -> bool:
        return (await gateway.http.get(f"/v1/videos/{id}")).json()["status"] == "completed"

    await gateway.until(completed)
    return str(id)


async def test_head_has_the_status_and_headers_of_get(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        clip, stream = await clip_of(gateway), await gateway.live()
        at = f"/v1/streams/{stream['id']}"
        for path, ignored in {
            "/": VARYING,
            "/docs": VARYING,
            "/overlay/x": VARYING,
            "/assets/app.js": VARYING,
            "/assets/none.js": VARYING,
            "/openapi.json": VARYING,
            "/livez": VARYING,
            "/readyz": VARYING,
            "/metrics": CHANGING,
            "/nothing": VARYING,
            "/v1/models": VARYING,
            "/v1/models/mini": VARYING,
            "/v1/models/maxi": VARYING,
            "/v1/loras": VARYING,
            "/v1/streams": CHANGING,
            "/v1/streams/st_none": VARYING,
            at: CHANGING,
            f"{at}/recordings": VARYING,
            f"{at}/outputs": VARYING,
            f"{at}/outputs/none": VARYING,
            f"{at}/mjpeg?alpha=no": VARYING,
            "/v1/recordings": VARYING,
            "/v1/videos?limit=1": VARYING,
            "/v1/videos?limit=0": VARYING,
            f"/v1/videos/{clip}": VARYING,
            f"/v1/videos/{clip}/content": VARYING,
            f"/v1/videos/{clip}/content?variant=thumbnail": VARYING,
            f"{at}/tokens": VARYING,  # answers POST alone
        }.items():
            get, head = await gateway.http.get(path), await gateway.http.head(path)
            assert head.content == b"", path
            assert head.status_code == get.status_code, path
            assert {k: v for k, v in head.headers.items() if k not in ignored} == {
                k: v for k, v in get.headers.items() if k not in ignored
            }, path


async def test_head_of_a_stream_of_pictures_is_no_viewer(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.live()
        head = await gateway.http.head(f"/v1/streams/{stream['id']}/mjpeg")
        assert head.status_code == 200
        assert head.headers["content-type"].startswith("multipart/x-mixed-replace")
        assert not gateway.stream_of(stream).audience.viewers


async def test_head_of_a_film_that_grows_does_not_wait_for_its_end(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.2)) as gateway:
        stream = await gateway.live()
        recording = (await gateway.http.post(f"/v1/streams/{stream['id']}/recordings", json={})).json()
        async with asyncio.timeout(5):
            head = await gateway.http.head(f"/v1/recordings/{recording['id']}/content")
        assert (head.status_code, head.headers["content-type"]) == (200, "video/mp4")


async def test_head_needs_the_scope_of_get(run_gateway: Any, holders: Any, tmp_path: Path) -> None:
    made = holders(tmp_path / "keys.toml", ("viewer", "a", "view"), ("monitor", "a", "metrics"))
    async with run_gateway(keys=tmp_path / "keys.toml") as gateway:
        for name, status in (("viewer", 403), ("monitor", 200)):
            assert (await gateway.http.head("/metrics", headers=made[name])).status_code == status
        assert (await gateway.http.head("/v1/models", headers=made["viewer"])).status_code == 200
        assert (await gateway.http.head("/v1/models")).status_code == 401
        assert (await gateway.http.head("/livez")).status_code == 200


async def test_allow_names_head_beside_get(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for path, methods in {"/livez": {"GET", "HEAD"}, "/v1/videos": {"GET", "HEAD", "POST"}}.items():
            answer = await gateway.http.delete(path)
            assert (answer.status_code, set(answer.headers["allow"].split(", "))) == (405, methods)
