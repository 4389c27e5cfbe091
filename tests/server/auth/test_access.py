"""Keys, tokens and scopes: who may do what, and what ends when a key is revoked."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import websockets
from fastapi import FastAPI

from server.app import create_app
from server.auth import keys
from server.auth.access import required_scope
from server.backends.fake import FakeBackend
from server.config import Config

pytestmark = pytest.mark.anyio

OPEN = {"prompt": "a red ball"}


@dataclass
class Keyed:
    """A gateway with keys, and the keys by name."""

    gateway: Any
    path: Path
    keys: dict[str, str]

    async def call(self, who: str | None, method: str, path: str, **options: Any) -> httpx.Response:
        headers = dict(options.pop("headers", {}))
        if who is not None:
            headers["authorization"] = f"Bearer {self.keys.get(who, who)}"
        return await self.gateway.http.request(method, path, headers=headers, **options)

    async def until_state(self, stream: dict[str, Any], state: str) -> None:
        await self.gateway.until(lambda: self.gateway.streams.get(stream["id"]).session.state == state)

    async def open(self, who: str = "studio") -> dict[str, Any]:
        response = await self.call(who, "POST", "/v1/streams", json=OPEN)
        assert response.status_code == 201, response.text
        return dict(response.json())


Start = Callable[..., contextlib.AbstractAsyncContextManager[Any]]


@pytest.fixture
async def keyed(run_gateway: Start, tmp_path: Path) -> AsyncIterator[Keyed]:
    path = tmp_path / "keys.toml"
    made = {
        "studio": keys.add_key(path, "studio", "studio", ["control"], 2, 1000),
        "guest": keys.add_key(path, "guest", "studio", ["view"], 1, 1000),
        "other": keys.add_key(path, "other", "other", ["control"], 1, 1000),
        "root": keys.add_key(path, "root", "root", ["admin"], 1, 1000),
        "probe": keys.add_key(path, "probe", "probe", ["metrics"], 1, 1000),
        "slow": keys.add_key(path, "slow", "slow", ["view"], 1, 3),
    }
    async with run_gateway(keys=path) as gateway:
        yield Keyed(gateway, path, made)


def code(response: httpx.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return response.status_code, error["code"]


@pytest.mark.parametrize("path", ["/v1/streams", "/v1/models", "/metrics", "/openapi.json", "/v1/loras", "/nowhere"])
async def test_nothing_but_the_public_paths_is_open(keyed: Keyed, path: str) -> None:
    response = await keyed.call(None, "GET", path)
    assert code(response) == (401, "unauthenticated")
    assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "path", ["/livez", "/readyz", "/", "/docs", "/overlay/st_x", "/assets/overlay/overlay.js", "/assets/js/index.js"]
)
async def test_public_paths(keyed: Keyed, path: str) -> None:
    assert (await keyed.call(None, "GET", path)).status_code == 200
    assert (await keyed.call(None, "POST", path)).status_code == 401


async def test_a_route_that_is_added_later_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    key = keys.add_key(path, "studio", "studio", ["control"], 1, 100)
    app = create_app(Config(keys=path), FakeBackend())
    assert isinstance(app, FastAPI)
    app.get("/late")(lambda: {"secret": 1})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        assert (await client.get("/late")).status_code == 401
        assert (await client.get("/late", headers={"authorization": f"Bearer {key}"})).json() == {"secret": 1}


@pytest.mark.parametrize(
    "header", ["Bearer nonsense", "Bearer", "Basic c3R1ZGlv", "Bearer lr_" + "x" * 43, "Bearer " + "y" * 5000, "lr_x"]
)
async def test_wrong_credentials(keyed: Keyed, header: str) -> None:
    response = await keyed.call(None, "GET", "/v1/streams", headers={"authorization": header})
    assert code(response) == (401, "unauthenticated")


async def test_a_key_in_an_address_is_not_taken(keyed: Keyed) -> None:
    response = await keyed.call(None, "GET", f"/v1/streams?token={keyed.keys['studio']}")
    assert code(response) == (401, "unauthenticated")


async def test_scopes(keyed: Keyed) -> None:
    stream = await keyed.open()
    path = f"/v1/streams/{stream['id']}"
    assert (await keyed.call("guest", "GET", path)).status_code == 200
    for method, body in (("PATCH", {"prompt": "a blue ball"}), ("DELETE", None)):
        assert code(await keyed.call("guest", method, path, json=body)) == (403, "scope_missing")
    assert code(await keyed.call("guest", "POST", "/v1/streams", json=OPEN)) == (403, "scope_missing")
    assert code(await keyed.call("studio", "GET", "/metrics")) == (403, "scope_missing")
    assert (await keyed.call("probe", "GET", "/metrics")).status_code == 200
    assert code(await keyed.call("probe", "GET", "/v1/streams")) == (403, "scope_missing")
    assert code(await keyed.call("studio", "PUT", "/v1/loras", json={"loras": {}})) == (403, "scope_missing")
    assert (await keyed.call("studio", "PATCH", path, json={"prompt": "a blue ball"})).status_code == 200
    for method, body in (("POST", {"url": "rtmp://127.0.0.1/a/k"}), ("GET", None)):
        assert code(await keyed.call("guest", method, f"{path}/outputs", json=body)) == (403, "scope_missing")
        assert code(await keyed.call("other", method, f"{path}/outputs", json=body)) == (404, "stream_not_found")
    assert (await keyed.call("studio", "GET", f"{path}/outputs")).json()["data"] == []


async def test_streams_of_others_do_not_exist(keyed: Keyed) -> None:
    stream = await keyed.open()
    path = f"/v1/streams/{stream['id']}"
    for method in ("GET", "DELETE"):
        there = await keyed.call("other", method, path)
        nowhere = await keyed.call("other", method, "/v1/streams/stream_00000000000000000000")
        assert code(there) == code(nowhere) == (404, "stream_not_found")
    assert (await keyed.call("other", "GET", "/v1/streams")).json()["data"] == []
    assert (await keyed.call("root", "GET", path)).status_code == 200
    assert len((await keyed.call("guest", "GET", "/v1/streams")).json()["data"]) == 1, "the same owner's"


async def test_a_token_is_for_one_stream_and_what_it_says(keyed: Keyed) -> None:
    first, second = await keyed.open(), await keyed.open()
    answer = await keyed.call("studio", "POST", f"/v1/streams/{first['id']}/tokens", json={"scope": "view"})
    token = answer.json()["token"]
    assert (await keyed.call(token, "GET", f"/v1/streams/{first['id']}")).status_code == 200
    assert (await keyed.call(None, "GET", f"/v1/streams/{first['id']}?token={token}")).status_code == 200
    assert code(await keyed.call(token, "GET", f"/v1/streams/{second['id']}")) == (404, "stream_not_found")
    assert code(await keyed.call(token, "DELETE", f"/v1/streams/{first['id']}")) == (403, "scope_missing")
    assert code(await keyed.call(token, "GET", "/v1/streams")) == (403, "token_scope")
    for altered in (token[:-1] + ("A" if token[-1] != "A" else "B"), token + "A", token.upper(), "lrt_.", "lrt_a.b"):
        assert code(await keyed.call(altered, "GET", f"/v1/streams/{first['id']}")) == (401, "unauthenticated")


async def test_a_viewer_may_not_make_tokens_that_control(keyed: Keyed) -> None:
    stream = await keyed.open()
    path = f"/v1/streams/{stream['id']}/tokens"
    assert (await keyed.call("guest", "POST", path, json={"scope": "control"})).status_code == 403


async def everything(socket: websockets.ClientConnection) -> list[str | bytes]:
    """What comes until the socket is closed."""
    got: list[str | bytes] = []
    with contextlib.suppress(websockets.ConnectionClosed):
        async with asyncio.timeout(10):
            while True:
                got.append(await socket.recv())
    return got


async def test_the_sockets_address_carries_what_it_needs(keyed: Keyed) -> None:
    stream = await keyed.open()
    seen = await keyed.gateway.watch(stream, until=lambda watched: len(watched.frames) > 2)
    assert len(seen.frames) > 2
    bare = stream["ws_url"].split("?")[0]
    for address in (bare, bare + "?token=lrt_x.y"):
        async with websockets.connect(address) as socket:
            got = await everything(socket)
        assert socket.close_code == 4401
        assert not any(isinstance(item, bytes) for item in got)


REVOKED_WITHIN = 2.0
"""Seconds; the file is looked at every half."""


async def test_a_key_that_is_taken_away_ends_what_it_opened_and_watches(keyed: Keyed, rtc_viewer: Any) -> None:
    """Also what gets nothing sent and would not notice, and what others of the owner's keys could still see."""
    mine, theirs = await keyed.open("studio"), await keyed.open("other")
    shared = (await keyed.call("root", "POST", "/v1/streams", json=OPEN)).json()
    for stream in (mine, theirs, shared):
        await keyed.until_state(stream, "live")
    path = f"/v1/streams/{theirs['id']}"
    tokens = {
        who: (await keyed.call(who, "POST", path + "/tokens", json={"scope": "view"})).json()["token"]
        for who in ("root", "other")
    }
    address = theirs["ws_url"].split("?")[0]
    async with (
        websockets.connect(f"{address}?token={tokens['root']}&format=events") as by_root,
        websockets.connect(f"{address}?token={tokens['other']}&format=events") as by_other,
        httpx.AsyncClient(base_url=keyed.gateway.http.base_url, timeout=10) as client,
        client.stream("GET", f"{path}/mjpeg?token={tokens['root']}") as pictures,
    ):
        keyed.gateway.http.headers["authorization"] = f"Bearer {keyed.keys['root']}"
        async with rtc_viewer(keyed.gateway, theirs, "VP8") as viewer:
            await viewer.frames(1)
            del keyed.gateway.http.headers["authorization"]
            await by_root.recv()
            await keyed.call("other", "PATCH", path, json={"paused": True})  # its viewers hear nothing any more
            keys.remove_key(keyed.path, "root")
            async with asyncio.timeout(REVOKED_WITHIN):
                await everything(by_root)
                with pytest.raises(httpx.TransportError):  # it does not look complete
                    async for _ in pictures.aiter_raw():
                        pass
                await keyed.gateway.until(lambda: viewer.peer.connectionState == "closed")
            assert by_root.close_code == 4401
        assert (await keyed.call(tokens["root"], "GET", path)).status_code == 401
        assert (await keyed.call("other", "GET", f"/v1/streams/{shared['id']}")).status_code == 404
        assert keyed.gateway.streams.get(shared["id"]).session.ended_reason == "revoked"
        # what others opened and watch goes on
        await keyed.call("other", "PATCH", path, json={"paused": False})
        while "live" not in await by_other.recv():
            pass
    assert keyed.gateway.streams.get(mine["id"]).session.state == "live"
    assert keyed.gateway.streams.get(theirs["id"]).session.state == "live"


async def test_a_key_that_is_replaced_is_another_one(keyed: Keyed) -> None:
    stream = await keyed.open()
    path = f"/v1/streams/{stream['id']}"
    token = (await keyed.call("studio", "POST", path + "/tokens", json={})).json()["token"]
    was = keyed.path.read_text()
    keys.remove_key(keyed.path, "studio")
    fresh = keys.add_key(keyed.path, "studio", "studio", ["control"], 2, 1000)
    await keyed.gateway.until(lambda: keyed.gateway.streams.get(stream["id"]).session.state == "ended", REVOKED_WITHIN)
    assert code(await keyed.call("studio", "GET", path)) == (401, "unauthenticated")
    assert (await keyed.call(fresh, "GET", path)).json()["ended_reason"] == "revoked"
    # Put back by hand, the old one is a key again; what was made with it before stays refused.
    keyed.path.write_text(was)

    async def back() -> bool:
        return (await keyed.call("studio", "GET", path)).status_code == 200

    await keyed.gateway.until(back, REVOKED_WITHIN)
    assert code(await keyed.call(token, "GET", path)) == (401, "unauthenticated")


@pytest.mark.parametrize(("old", "new"), [('["control"]', '["view"]'), ('owner = "studio"', 'owner = "guest"')])
async def test_a_key_that_may_less_or_is_anothers_is_another_one(keyed: Keyed, old: str, new: str) -> None:
    stream = await keyed.open()
    keyed.path.write_text(keyed.path.read_text().replace(old, new, 1))
    await keyed.gateway.until(lambda: keyed.gateway.streams.get(stream["id"]).session.state == "ended", REVOKED_WITHIN)


async def test_other_changes_to_a_key_end_nothing(keyed: Keyed) -> None:
    stream = await keyed.open()
    text = keyed.path.read_text().replace('["control"]', '["control", "metrics"]').replace("streams = 2", "streams = 9")
    keyed.path.write_text(text.replace('name = "studio"', 'name = "Studio"'))

    async def read() -> bool:
        return (await keyed.call("studio", "GET", "/metrics")).status_code == 200

    await keyed.gateway.until(read, REVOKED_WITHIN)
    seen = await keyed.gateway.watch(stream, until=lambda watched: len(watched.frames) > 1)
    assert len(seen.frames) > 1


async def test_a_request_that_waits_is_answered_when_its_key_goes(
    keyed: Keyed, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = await keyed.open("other")
    await keyed.until_state(stream, "live")
    monkeypatch.setattr(FakeBackend, "_steer", lambda self, message: None)  # it will never say when
    change = asyncio.create_task(
        keyed.call("root", "PATCH", f"/v1/streams/{stream['id']}", json={"prompt": "a blue ball"})
    )
    await keyed.gateway.until(lambda: keyed.gateway.streams.get(stream["id"])._steering.newest() is not None)
    keys.remove_key(keyed.path, "root")
    assert code(await asyncio.wait_for(change, REVOKED_WITHIN)) == (401, "unauthenticated")


async def test_a_key_file_that_is_broken_leaves_the_keys(keyed: Keyed, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        keyed.path.write_text("this is [ no TOML")
        await keyed.gateway.until(lambda: "keys stay as they were" in caplog.text, 10)
    assert (await keyed.call("studio", "GET", "/v1/streams")).status_code == 200


async def test_limits_of_a_key(keyed: Keyed) -> None:
    await keyed.open("other")
    refused = await keyed.call("other", "POST", "/v1/streams", json=OPEN)
    assert refused.status_code == 429
    await keyed.open("studio")
    answers = [await keyed.call("slow", "GET", "/v1/streams") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert int(answers[-1].headers["retry-after"]) >= 1
    left = [[answer.headers[f"x-ratelimit-{what}-requests"] for what in ("limit", "remaining")] for answer in answers]
    assert left == [["3", "2"], ["3", "1"], ["3", "0"], ["3", "0"]]
    assert 19 < float(answers[0].headers["x-ratelimit-reset-requests"].removesuffix("s")) <= 20
    # errors say it too, wherever they come from
    nowhere, forbidden = await keyed.call("root", "GET", "/nowhere"), await keyed.call("guest", "PUT", "/v1/loras")
    large = await keyed.call("root", "PUT", "/v1/loras", content=b" " * 70_000)
    assert (nowhere.status_code, forbidden.status_code, large.status_code) == (404, 403, 413)
    assert all("x-ratelimit-remaining-requests" in each.headers for each in (nowhere, forbidden, large))


def test_a_network_address_needs_keys() -> None:
    with pytest.raises(ValueError, match="keys add"):
        Config(host="0.0.0.0")


def test_scopes_that_requests_need() -> None:
    assert required_scope("GET", "/v1/streams/x") == "view"
    assert required_scope("POST", "/v1/streams") == required_scope("PATCH", "/v1/streams/x") == "control"
    assert required_scope("POST", "/v1/streams/x/whep") == required_scope("DELETE", "/v1/streams/x/whep/y") == "view"
    assert required_scope("PUT", "/v1/loras") == "admin"
    # Where a stream is pushed to is nothing for who may only watch it.
    assert (
        required_scope("GET", "/v1/streams/x/outputs") == required_scope("GET", "/v1/streams/x/outputs/y") == "control"
    )
