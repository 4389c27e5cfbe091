"""Streams that nobody watches or asks about: paused, ended, and forgotten."""

import asyncio
import json
import time
from pathlib import Path
from typing import Any

import pytest

from server.auth import keys
from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio


async def test_a_stream_goes_on_without_its_viewer_until_it_is_idle(run_gateway: Any) -> None:
    async with run_gateway(idle_timeout_s=0.6) as gateway:
        stream = await gateway.open()
        await gateway.watch(stream, until=lambda seen: len(seen.frames) > 2)
        await asyncio.sleep(0.2)
        assert (await gateway.get(stream))["state"] == "live"
        await gateway.until(lambda: gateway.stream_of(stream).session.state == "ended")
        assert (await gateway.get(stream))["ended_reason"] == "idle"


async def test_a_place_in_the_queue_that_nobody_asks_about_is_free_for_the_next(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.7)  # one plays at a time
    async with run_gateway(backend, idle_timeout_s=0.6, queue_limit=2) as gateway:
        playing, waiting, abandoned = [await gateway.open() for _ in range(3)]
        full = await gateway.http.post("/v1/streams", json={"prompt": "a"})
        assert full.json()["error"]["code"] == "queue_full"
        given = gateway.stream_of(abandoned).session
        async with gateway.connect(playing, "?format=events"):

            async def given_up() -> bool:
                # whoever asks, waits on
                assert (await gateway.get(waiting))["queue_position"] == 1
                return given.ended_reason == "idle"

            await gateway.until(given_up)
            assert (await gateway.open())["queue_position"] == 2


async def test_a_clock_that_is_set_changes_nothing(
    run_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.toml"
    key = keys.add_key(path, "studio", "studio", ["control"], 4, 20)
    now = time.time
    async with run_gateway(keys=path, idle_timeout_s=30) as gateway:
        gateway.http.headers["authorization"] = f"Bearer {key}"
        stream = await gateway.open()
        async with gateway.connect(stream) as socket:
            for years in (10, -10):
                monkeypatch.setattr(time, "time", lambda years=years: now() + years * 365 * 86400)
                frames = 0
                async with asyncio.timeout(5):
                    while frames < 12:
                        frames += isinstance(await socket.recv(), bytes)
                # neither the token nor the stream has got older, and the limit on requests is where it was
                async with gateway.connect(stream, "&format=events") as other:
                    assert "stream.started" in await other.recv()
        answer = await gateway.http.get(f"/v1/streams/{stream['id']}")
        assert answer.json()["stalls"] == 0
        assert int(answer.headers["x-ratelimit-remaining-requests"]) >= 17


async def test_a_watched_stream_is_not_idle(run_gateway: Any) -> None:
    async with run_gateway(idle_timeout_s=0.3) as gateway:
        seen = await gateway.watch(await gateway.open(), until=lambda seen: len(seen.frames) > 20)
        assert not seen.of("ended")


def states(seen: Any) -> list[str]:
    return [event["state"] for event in seen.of("state")]


async def test_an_unwatched_stream_rests_until_somebody_comes(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    async with run_gateway(unwatched_pause_s=0.3) as gateway:
        stream = await gateway.open()
        before = await gateway.watch(stream, until=lambda seen: len(seen.frames) > 2)
        # Who takes no frames does not watch.
        listening = asyncio.create_task(
            gateway.watch(stream, "?format=events", until=lambda seen: "live" in states(seen))
        )
        session = gateway.stream_of(stream).session
        await gateway.until(lambda: session.state == "paused")
        record = await gateway.get(stream)
        assert (record["pause_reason"], record["viewers"]) == ("unwatched", 0)
        generated = session.frames_generated
        await asyncio.sleep(0.3)
        assert session.frames_generated <= generated + 12  # what was under way, and nothing more
        assert "livereel_unwatched_pauses_total 1.0" in (await gateway.http.get("/metrics")).text
        after = await gateway.watch(stream, until=lambda seen: len(seen.frames) > 20)
        # The picture that was left is there at once, and the next one follows it.
        assert after.pts[0] >= before.pts[-1]
        assert after.pts == [after.pts[0] + 5625 * k for k in range(len(after.pts))]
        heard = await listening
        assert [(e["state"], e.get("reason")) for e in heard.of("state")][-2:] == [
            ("paused", "unwatched"),
            ("live", None),
        ]
        assert not heard.of("stall")


async def test_what_a_client_asked_for_outlasts_a_rest(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    async with run_gateway(unwatched_pause_s=0.4) as gateway:
        stream = await gateway.open()
        session = gateway.stream_of(stream).session
        await gateway.watch(stream, until=lambda seen: len(seen.frames) > 2)
        await gateway.until(lambda: session.state == "paused")
        # It goes on unwatched when that is asked for, for as long as it would have.
        assert (await gateway.patch(stream, paused=False)).json()["state"] == "live"
        await asyncio.sleep(0.2)
        assert session.state == "live"
        await gateway.until(lambda: session.state == "paused")
        assert (await gateway.patch(stream, paused=True)).json()["pause_reason"] == "asked"
        seen = await gateway.watch(stream, until=lambda seen: len(seen.frames) > 0)
        assert seen.events[0]["stream"]["state"] == "paused" and session.state == "paused"
        assert (await gateway.patch(stream, paused=False)).json()["pause_reason"] is None


async def test_a_stream_rests_only_where_that_is_wanted(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    async with run_gateway(unwatched_pause_s=0) as gateway:
        stream = await gateway.open()
        await gateway.watch(stream, until=lambda seen: len(seen.frames) > 2)
        await asyncio.sleep(0.5)
        assert (await gateway.get(stream))["state"] == "live"


async def test_records_are_forgotten(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.registry.MAX_RECORDS", 2)
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    async with run_gateway() as gateway:
        streams = [await gateway.open() for _ in range(4)]
        for stream in streams[:3]:
            await gateway.http.delete(f"/v1/streams/{stream['id']}")
        await gateway.until(lambda: len(gateway.streams.all()) == 3)
        listed = (await gateway.http.get("/v1/streams")).json()
        assert listed["object"] == "list"
        assert [(stream["id"], stream["state"]) for stream in listed["data"]][:2] == [
            (streams[1]["id"], "ended"),
            (streams[2]["id"], "ended"),
        ]
        monkeypatch.setattr("server.streams.registry.RECORD_SECONDS", 0.0)
        await gateway.until(lambda: len(gateway.streams.all()) == 1)
        assert (await gateway.http.get(f"/v1/streams/{streams[1]['id']}")).status_code == 404


async def test_a_fault_in_one_round_of_housekeeping_is_not_the_last(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)

    def broken() -> None:
        raise RuntimeError("broken")

    async with run_gateway(idle_timeout_s=0.3) as gateway:
        with monkeypatch.context() as patch:
            patch.setattr(gateway.streams.clips, "expire", broken)
            await gateway.until(lambda: "housekeeping failed" in caplog.text)
        stream = await gateway.open()
        await gateway.until(lambda: gateway.stream_of(stream).session.ended_reason == "idle")


async def test_films_are_finished_even_if_the_engine_cannot_be_stopped(
    run_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "data"
    async with run_gateway(data=data) as gateway:
        stream = await gateway.open()
        made = (await gateway.http.post(f"/v1/streams/{stream['id']}/recordings", json={})).json()
        await gateway.until(lambda: gateway.streams.recorder.get(made["id"]).frames > 8)
        stop = gateway.streams.engine.stop

        async def broken() -> None:
            await stop()
            raise RuntimeError("broken")

        monkeypatch.setattr(gateway.streams.engine, "stop", broken)
    record = json.loads((data / f"{made['id']}.json").read_text())
    assert (record["status"], record["reason"]) == ("completed", "stream_ended")
