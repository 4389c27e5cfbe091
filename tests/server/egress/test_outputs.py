"""Outputs over the API: what is refused and retried, and when an output ends."""

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from server.auth import keys
from server.egress.outputs import LAST_RETRY_SECONDS, RetryPolicy
from tests.server.egress.harness import SECRET, free_port, get, listen, post, reached, states

pytestmark = pytest.mark.anyio


def test_when_to_try_again() -> None:
    policy = RetryPolicy()
    waits = [policy.next_delay(0.0, 0.5) for _ in range(5000)]
    assert waits[:6] == [1.0, 2.0, 4.0, 8.0, 16.0, LAST_RETRY_SECONDS]
    assert set(waits[5:]) == {LAST_RETRY_SECONDS}
    policy = RetryPolicy()
    policy.next_delay(0.0, 0.5)
    assert policy.next_delay(3.0, 0.5) == 2.0  # not live for long enough to reset the count
    assert policy.next_delay(31.0, 0.5) == 1.0
    assert (policy.next_delay(0.0, 0.0), RetryPolicy().next_delay(0.0, 1.0)) == (1.5, 1.25)


async def test_a_server_that_is_not_there_is_tried_as_long_as_the_stream_lasts(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.egress.outputs.FIRST_RETRY_SECONDS", 0.01)
    monkeypatch.setattr("server.egress.outputs.POLL_SECONDS", 0.01)
    monkeypatch.setattr("server.egress.outputs.LAST_RETRY_SECONDS", 0.05)
    caplog.set_level(logging.DEBUG)
    async with run_gateway(outputs=("127.0.0.1:9",)) as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        heard = asyncio.create_task(gateway.watch(stream, "?format=events", until=lambda seen: "ended" in states(seen)))
        await gateway.until(lambda: len(live.audience.viewers) == 1)
        made = await post(gateway, stream, url=f"rtmp://127.0.0.1:9/live/{SECRET}")
        assert made.status_code == 201
        output = made.json()
        assert made.headers["location"] == f"/v1/streams/{stream['id']}/outputs/{output['id']}"
        assert (output["url"], output["kind"]) == ("rtmp://127.0.0.1:9/***", "rtmp")

        async def tried_often() -> bool:
            return (await get(gateway, output))["attempts"] > 12

        await gateway.until(tried_often, 20)
        output = await reached(gateway, output, "waiting")
        assert output["error"]["code"] == "not_connected"
        listed = await gateway.http.get(f"/v1/streams/{stream['id']}/outputs")
        assert [each["id"] for each in listed.json()["data"]] == [output["id"]]
        assert (await gateway.http.delete(made.headers["location"])).status_code == 204
        assert (await gateway.http.get(made.headers["location"])).status_code == 404
        for _ in range(4):
            assert (await post(gateway, stream, url="rtmp://127.0.0.1:9/a/k")).status_code == 201
        assert (await post(gateway, stream, url="rtmp://127.0.0.1:9/a/k")).status_code == 409
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        seen = [event["state"] for event in (await heard).of("output.state") if event["output"] == output["id"]]
        assert seen == ["connecting", "waiting"] * (len(seen) // 2) + ["ended"]
        assert SECRET not in listed.text + json.dumps((await heard).events)
    assert SECRET not in caplog.text


@pytest.mark.parametrize(
    ("scheme", "code"), [("rtmp", "stalled"), ("rtmps", "not_connected"), ("https", "not_connected")]
)
async def test_a_server_that_says_nothing_is_let_go(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, scheme: str, code: str
) -> None:
    for module in ("destination", "rtmp", "whip"):
        monkeypatch.setattr(f"server.egress.{module}.CONNECT_SECONDS", 1.0)
    silent = asyncio.Event()

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await silent.wait()
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        async with run_gateway(outputs=(f"127.0.0.1:{port}",)) as gateway:
            output = (await post(gateway, await gateway.open(), url=f"{scheme}://127.0.0.1:{port}/a/{SECRET}")).json()
            tried = await reached(gateway, output, "connecting")
            while tried["error"] is None:
                await asyncio.sleep(0.05)
                tried = await get(gateway, output)
            assert tried["error"]["code"] == code
        silent.set()


async def test_an_output_ends_with_its_stream(run_gateway: Any) -> None:
    port = free_port()
    async with run_gateway(outputs=(f"127.0.0.1:{port}",)) as gateway:
        stream = await gateway.open()
        listener = await listen(port, 100_000)
        output = (await post(gateway, stream, url=f"rtmp://127.0.0.1:{port}/live/{SECRET}")).json()
        await reached(gateway, output, "live")
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        ended = await reached(gateway, output, "ended")
        assert ended["error"] is None
        # Everything shown has arrived.
        printed = (await asyncio.wait_for(listener.communicate(), 30))[0]
        assert len(json.loads(printed.splitlines()[-1])["frames"]) > 0


async def test_an_output_goes_with_its_key(run_gateway: Any, tmp_path: Path) -> None:
    path, port = tmp_path / "keys.toml", free_port()
    owner, helper = (keys.add_key(path, name, "studio", ["control"], 2, 1000) for name in ("owner", "helper"))
    async with run_gateway(keys=path, outputs=(f"127.0.0.1:{port}",)) as gateway:
        gateway.http.headers["authorization"] = f"Bearer {owner}"
        stream = await gateway.open()
        gateway.http.headers["authorization"] = f"Bearer {helper}"
        output = (await post(gateway, stream, url=f"rtmp://127.0.0.1:{port}/a/{SECRET}")).json()
        gateway.http.headers["authorization"] = f"Bearer {owner}"
        assert (await get(gateway, output))["state"] != "ended"
        keys.remove_key(path, "helper")
        await reached(gateway, output, "ended")
        assert (await gateway.get(stream))["state"] in ("starting", "live")
