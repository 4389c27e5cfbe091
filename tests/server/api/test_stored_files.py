"""Complete files: ranges and preconditions by RFC 9110, sections 13 and 14."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from server.api.responses import StoredFiles
from server.errors import ApiError

pytestmark = pytest.mark.anyio
SIZE = 10


@pytest.fixture
async def fetch(tmp_path: Path) -> Any:
    """Requests a file of ten digits with these headers."""
    (tmp_path / "film").write_bytes(b"0123456789")
    files = StoredFiles(directory=tmp_path)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        try:
            await files(scope, receive, send)
        except ApiError as error:
            await error.response(scope, receive, send)

    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:

        async def request(method: str = "GET", **headers: str) -> httpx.Response:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            return await client.request(method, "/film", headers=sent)

        yield request


@pytest.mark.parametrize(
    "ignored", ["seconds=1-2", "bytes", "bytes=", "bytes=a-b", "bytes=5-2", "bytes=-", "bytes=" + "0-1," * 100 + "0-1"]
)
async def test_a_range_of_an_unknown_unit_or_form_is_ignored(fetch: Callable[..., Any], ignored: str) -> None:
    answer = await fetch(range=ignored)
    assert (answer.status_code, answer.content) == (200, b"0123456789")


@pytest.mark.parametrize(
    ("given", "content"),
    [
        ("bytes=2-4", b"234"),
        ("BYTES=8-", b"89"),
        ("bytes=-3", b"789"),
        ("bytes=-99", b"0123456789"),
        ("bytes=8-99", b"89"),
        ("bytes=99-, 2-4", b"234"),  # what lies past the end is left out
    ],
)
async def test_ranges(fetch: Callable[..., Any], given: str, content: bytes) -> None:
    answer = await fetch(range=given)
    assert (answer.status_code, answer.content) == (206, content)
    assert answer.headers["content-range"].endswith(f"/{SIZE}")


@pytest.mark.parametrize("given", ["bytes=10-", "bytes=99-100", "bytes=-0", "bytes=" + "9" * 30 + "-"])
async def test_a_range_past_the_end_is_an_error_object(fetch: Callable[..., Any], given: str) -> None:
    answer = await fetch(range=given)
    assert (answer.status_code, answer.json()["error"]["code"]) == (416, "range_not_satisfiable")
    assert answer.headers["content-range"] == f"bytes */{SIZE}"
    whole = await fetch(range=given, if_range='"another"')
    assert (whole.status_code, len(whole.content)) == (200, SIZE)
    assert (await fetch("HEAD", range=given)).status_code == 200  # ranges are defined for GET alone


async def test_a_file_that_the_client_has_is_not_sent_again(fetch: Callable[..., Any]) -> None:
    first = await fetch()
    tag, modified = first.headers["etag"], first.headers["last-modified"]
    for headers in (
        {"if_none_match": tag},
        {"if_none_match": f'"other", W/{tag}'},
        {"if_none_match": "*"},
        {"if_modified_since": modified},
    ):
        for method in ("GET", "HEAD"):
            answer = await fetch(method, **headers)
            assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", tag)
    for headers in (
        {"if_none_match": '"other"', "if_modified_since": modified},
        {"if_modified_since": "Sat, 01 Jan 2000 00:00:00 GMT"},
        {"if_modified_since": "yesterday"},
        {"if_match": tag},
        {"if_range": tag},
    ):
        assert (await fetch(**headers)).status_code == 200


async def test_a_file_that_has_changed_fails_the_precondition(fetch: Callable[..., Any]) -> None:
    for headers in ({"if_match": '"other"'}, {"if_unmodified_since": "Sat, 01 Jan 2000 00:00:00 GMT"}):
        answer = await fetch(**headers)
        assert (answer.status_code, answer.json()["error"]["code"]) == (412, "precondition_failed")


async def test_films_and_pages_are_served_so(run_gateway: Any, error_of: Any) -> None:
    async with run_gateway() as gateway:
        id = (await gateway.http.post("/v1/videos", json={"prompt": "a", "seconds": 1})).json()["id"]
        async with asyncio.timeout(10):
            while (await gateway.http.get(f"/v1/videos/{id}")).json()["status"] != "completed":
                await asyncio.sleep(0.02)
        for path in (f"/v1/videos/{id}/content", f"/v1/videos/{id}/content?variant=thumbnail", "/", "/assets/app.js"):
            whole = await gateway.http.get(path)
            size, tag = len(whole.content), whole.headers["etag"]
            error = error_of(await gateway.http.get(path, headers={"range": "bytes=99999999-"}), 416)
            assert (error["code"], str(size) in error["message"]) == ("range_not_satisfiable", True)
            assert (await gateway.http.get(path, headers={"range": "lines=1-2"})).content == whole.content
            assert (await gateway.http.get(path, headers={"if-none-match": tag})).status_code == 304
