"""The API as clients see it, over real sockets: a stream from POST to its end."""

import asyncio
import io
import json
import re
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import websockets
from PIL import Image

from server.auth import keys
from server.backends.fake import FakeBackend
from server.media import frames as packets

pytestmark = pytest.mark.anyio


def small(**settings: Any) -> FakeBackend:
    return FakeBackend(**{"width": 64, "height": 48, "chunk_seconds": 0.02, **settings})


async def test_create(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        response = await gateway.http.post("/v1/streams", json={"prompt": "  a ball ", "seed": 7, "duration_s": 5})
        assert response.status_code == 201
        stream = response.json()
        assert response.headers["location"] == f"/v1/streams/{stream['id']}"
        assert stream["ws_url"] == f"ws://{gateway.address}/v1/streams/{stream['id']}/ws"
        expected = {
            "object": "stream",
            "state": "starting",
            "model": "mini",
            "prompt": "a ball",
            "seed": 7,
            "width": 64,
            "height": 48,
            "fps": 16,
            "duration_s": 5.0,
            "queue_position": None,
            "frames_generated": 0,
            "real_time_factor": None,
            "time_to_first_frame_s": None,
            "stalls": 0,
            "error": None,
            "ended_reason": None,
        }
        assert {key: stream[key] for key in expected} == expected


async def test_a_stream_plays_at_one_to_one_and_ends(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=1.5)
        seen = await gateway.watch(stream)
        assert seen.order[0] == "stream.started"
        started = seen.events[0]["stream"]
        assert started["id"] == stream["id"]
        assert started["ws_url"] == stream["ws_url"]
        assert [event["seq"] for event in seen.events[1:]] == list(
            range(seen.events[0]["seq"] + 1, seen.events[-1]["seq"] + 1)
        )
        assert [event["index"] for event in seen.of("chunk")] == [0, 1, 2]
        assert [event["frames"] for event in seen.of("chunk")] == [9, 12, 3]
        assert [event["pts"] for event in seen.of("chunk")] == [0, 9 * 5625, 21 * 5625]
        assert seen.pts == [5625 * frame for frame in range(24)]
        assert seen.of("ended")[0]["reason"] == "finished"
        assert seen.close_code == 1000
        # 23 periods lie between the first and the last frame.
        took = seen.frames[-1][0] - seen.frames[0][0]
        assert took == pytest.approx(23 / 16, abs=0.15)
        record = await gateway.get(stream)
        assert record["state"] == "ended"
        assert record["ended_reason"] == "finished"
        assert (record["frames_generated"], record["frames_shown"], record["stalls"]) == (24, 24, 0)
        assert 0 < record["time_to_first_frame_s"] < 1
        assert record["real_time_factor"] == pytest.approx(0.04, abs=0.01)


@pytest.mark.parametrize("format", ["mjpeg", "rgb24"])
async def test_binary_frames(run_gateway: Any, format: str) -> None:
    async with run_gateway() as gateway:
        seen = await gateway.watch(await gateway.open(duration_s=0.2), f"?format={format}")
        packet = seen.frames[0][1]
        assert struct.unpack("!BBHHHQ", packet[:16]) == (1, 1 if format == "mjpeg" else 2, 64, 48, 0, 0)
        if format == "mjpeg":
            assert Image.open(io.BytesIO(packet[16:])).size == (64, 48)
        else:
            assert len(packet) == 16 + 64 * 48 * 3


async def test_the_same_seed_and_prompt_give_the_same_frames(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        shown = [
            await gateway.watch(await gateway.open(seed=seed, duration_s=0.3), "?format=rgb24") for seed in (1, 1, 2)
        ]
        frames = [[packet for _, packet in seen.frames] for seen in shown]
        assert frames[0] == frames[1] != frames[2]


async def test_a_prompt_change_is_announced_with_its_first_frame(run_gateway: Any) -> None:
    async with run_gateway(small(fps=48)) as gateway:
        stream = await gateway.open(seed=1, duration_s=4)
        watching = asyncio.create_task(gateway.watch(stream, "?format=rgb24", until=lambda seen: len(seen.frames) > 45))
        await gateway.until(lambda: stream_of(gateway, stream).session.frames_generated > 12)
        response = await gateway.patch(stream, prompt="a blue cube")
        assert response.status_code == 200
        chunk = response.json()["chunk_index"]
        assert response.json()["prompt"] == "a blue cube"
        assert chunk >= 2
        seen = await watching
        applied = seen.of("prompt.applied")[0]
        assert applied["chunk_index"] == chunk
        assert applied["transition"] == "recache"
        assert applied["pts"] == (9 + 12 * (chunk - 1)) * 1875
        # In step: the next thing the viewer gets is the first frame that looks different.
        index = next(position for position, what in enumerate(seen.order) if what == "prompt.applied")
        shown_before = seen.order[:index].count("frame")
        assert seen.order[index + 1] == "frame"
        assert seen.pts[shown_before] == applied["pts"]
        corner = [packet[16:19] for _, packet in seen.frames]
        assert corner[shown_before - 1] == corner[0] != corner[shown_before]


async def test_a_cut_is_a_discontinuity(run_gateway: Any) -> None:
    async with run_gateway(small(fps=48)) as gateway:
        stream = await gateway.open(duration_s=4)
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: len(seen.frames) > 45))
        await gateway.until(lambda: stream_of(gateway, stream).session.frames_generated > 12)
        await gateway.patch(stream, prompt="a blue cube", transition="cut")
        seen = await watching
        flags = {
            struct.unpack("!BBHHHQ", packet[:16])[5]: struct.unpack("!BBHHHQ", packet[:16])[4]
            for _, packet in seen.frames
        }
        assert [pts for pts, flag in flags.items() if flag] == [seen.of("prompt.applied")[0]["pts"]]


async def test_of_two_quick_changes_the_newest_counts(run_gateway: Any) -> None:
    async with run_gateway(small(chunk_seconds=0.3)) as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: bool(seen.of("prompt.applied"))))
        await gateway.until(lambda: stream_of(gateway, stream).session.frames_generated > 0)
        answers = await asyncio.gather(*(gateway.patch(stream, prompt=prompt) for prompt in ("one", "two", "three")))
        assert [answer.status_code for answer in answers] == [200] * 3
        newest = (await gateway.get(stream))["prompt"]
        assert (await watching).of("prompt.applied")[0]["prompt"] == newest


async def test_pause_and_resume(run_gateway: Any) -> None:
    async with run_gateway(small(fps=48)) as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(
            gateway.watch(stream, until=lambda seen: len(seen.of("state")) >= 3 and len(seen.frames) > 20)
        )
        await gateway.until(lambda: stream_of(gateway, stream).playback.shown > 1)
        paused = (await gateway.patch(stream, paused=True)).json()
        assert paused["state"] == "paused"
        assert paused["chunk_index"] == 0
        shown = (await gateway.get(stream))["frames_shown"]
        await asyncio.sleep(0.2)
        held = await gateway.get(stream)
        assert held["frames_shown"] == shown
        generated = held["frames_generated"]
        assert generated <= 9 + 2 * 12
        assert (await gateway.patch(stream, paused=False)).json()["state"] == "live"
        seen = await watching
        assert [event["state"] for event in seen.of("state")] == ["live", "paused", "live"]
        assert seen.pts == [1875 * frame for frame in range(len(seen.frames))]
        assert (await gateway.get(stream))["stalls"] == 0


async def test_delete(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream))
        await gateway.until(lambda: len(stream_of(gateway, stream).audience.viewers) == 1)
        for _ in range(2):
            response = await gateway.http.delete(f"/v1/streams/{stream['id']}")
            assert (response.status_code, response.content) == (204, b"")
        seen = await watching
        assert seen.of("ended")[0]["reason"] == "deleted"
        assert seen.close_code == 1000
        assert (await gateway.get(stream))["ended_reason"] == "deleted"
        assert type(gateway.backend.sent[-1]).__name__ == "Close"


async def test_an_ended_stream_cannot_change(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        for change in ({"prompt": "a cube"}, {"paused": True}):
            response = await gateway.patch(stream, **change)
            assert response.status_code == 409
            error = response.json()["error"]
            assert (error["code"], error["param"]) == ("stream_ended", None)


async def test_a_late_joiner_gets_a_snapshot_and_the_frame_on_screen(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        await gateway.watch(stream, until=lambda seen: len(seen.frames) > 5)
        await gateway.patch(stream, paused=True)
        seen = await gateway.watch(stream, until=lambda seen: len(seen.order) == 2)
        assert seen.order == ["stream.started", "frame"]
        assert seen.events[0]["stream"]["state"] == "paused"
        assert seen.pts[0] == 5625 * ((await gateway.get(stream))["frames_shown"] - 1)


async def test_viewers_share_one_encoding_and_one_clock(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded, real = [], packets.encode
    monkeypatch.setattr(packets, "encode", lambda frame, format: encoded.append(frame.index) or real(frame, format))
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=1)
        all_seen = await asyncio.gather(*(gateway.watch(stream) for _ in range(5)))
        packets_seen = [[packet for _, packet in seen.frames] for seen in all_seen]
        assert all(len(frames) >= 15 and frames == packets_seen[0][-len(frames) :] for frames in packets_seen)
        assert sorted(encoded) == list(range(16))


async def test_watching_after_the_end(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=0.2)
        await gateway.watch(stream)
        seen = await gateway.watch(stream)
        assert seen.order == ["stream.started", "frame", "ended"]
        assert seen.close_code == 1000


@pytest.mark.parametrize(
    ("path", "close_code", "param"), [("{id}/ws?format=gif", 1008, "format"), ("st_unknown/ws", 4404, None)]
)
async def test_a_socket_that_cannot_be_served(run_gateway: Any, path: str, close_code: int, param: str | None) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        seen = await gateway.watch({"ws_url": f"ws://{gateway.address}/v1/streams/{path.format(id=stream['id'])}"})
        assert seen.order == ["error"]
        assert seen.events[0]["param"] == param
        assert {"seq", "ts", "code", "message"} <= seen.events[0].keys()
        assert seen.close_code == close_code


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1", "http://127.0.0.1.evil:80"])
async def test_a_socket_from_another_site_is_refused(run_gateway: Any, origin: str) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        with pytest.raises(websockets.InvalidStatus) as refused:
            async with gateway.connect(stream, origin=origin):
                pass
        assert refused.value.response.status_code == 403
        async with gateway.connect(stream, origin=f"http://{gateway.address}"):
            pass


async def test_playback_starts_without_a_viewer_in_the_end(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.playback.START_UNWATCHED_SECONDS", 0.2)
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=0.5)
        await gateway.until(lambda: stream_of(gateway, stream).session.state == "ended")
        assert (await gateway.get(stream))["frames_shown"] == 8


async def test_an_underrun_is_a_stall_that_everybody_sees(run_gateway: Any) -> None:
    async with run_gateway(small()) as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: len(seen.of("stall")) >= 2))
        await gateway.until(lambda: stream_of(gateway, stream).playback.shown > 2)
        gateway.backend.extra_seconds = 2.0
        seen = await watching
        began, ended = seen.of("stall")[:2]
        assert (began["phase"], ended["phase"]) == ("began", "ended")
        assert ended["seconds"] > 0
        record = await gateway.get(stream)
        assert record["stalls"] >= 1
        assert record["stalled_s"] >= ended["seconds"] - 0.001


# the queue


async def test_queue_places_and_what_happens_past_them(run_gateway: Any) -> None:
    async with run_gateway(small(chunk_seconds=0.5), queue_limit=2) as gateway:
        first = await gateway.open(duration_s=600)
        second, third = await gateway.open(), await gateway.open()
        assert [stream["state"] for stream in (first, second, third)] == ["starting", "queued", "queued"]
        assert [stream["queue_position"] for stream in (first, second, third)] == [None, 1, 2]
        assert 590 < second["queue_wait_s"] <= 600
        refused = await gateway.http.post("/v1/streams", json={"prompt": "one too many"})
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        watching = asyncio.create_task(gateway.watch(third, until=lambda seen: len(seen.of("queue.position")) == 1))
        await gateway.until(lambda: len(stream_of(gateway, third).audience.viewers) == 1)
        # A change while it waits counts from the first chunk.
        changed = (await gateway.patch(third, prompt="a cone")).json()
        assert (changed["prompt"], changed["chunk_index"], changed["state"]) == ("a cone", 0, "queued")
        await gateway.http.delete(f"/v1/streams/{second['id']}")
        assert (await watching).of("queue.position")[0]["position"] == 1
        await gateway.http.delete(f"/v1/streams/{first['id']}")
        seen = await gateway.watch(third, until=lambda seen: len(seen.frames) > 2)
        assert seen.events[0]["stream"]["state"] in ("starting", "live")
        assert gateway.backend.sent[-1].prompt == "a cone"


async def test_as_many_at_once_as_play_at_one_to_one(run_gateway: Any) -> None:
    async with run_gateway(small(chunk_seconds=0.2)) as gateway:
        models = (await gateway.http.get("/v1/models")).json()["data"]
        assert models[0]["capacity"] == 3
        assert models[0]["real_time_factor"] == pytest.approx(0.2667, abs=0.001)
        streams = [await gateway.open(duration_s=1.6) for _ in range(4)]
        assert [stream["state"] for stream in streams] == ["starting"] * 3 + ["queued"]
        all_seen = await asyncio.gather(*(gateway.watch(stream) for stream in streams))
        assert [seen.of("ended")[0]["reason"] for seen in all_seen] == ["finished"] * 4
        assert [(await gateway.get(stream))["stalls"] for stream in streams] == [0] * 4


async def test_a_stream_asked_for_before_the_engine_is_up(run_gateway: Any) -> None:
    async with run_gateway(small(ready_after=0.4), ready=False) as gateway:
        assert (await gateway.http.get("/livez")).status_code == 200
        ready = await gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["ready"]) == (503, False)
        assert "starting" in ready.json()["reason"]
        assert (await gateway.http.get("/v1/models")).json()["data"] == []
        stream = await gateway.open(duration_s=0.3)
        assert (stream["state"], stream["width"]) == ("queued", None)
        seen = await gateway.watch(stream)
        assert [event["state"] for event in seen.of("state")] == ["starting", "live", "ended"]
        assert (await gateway.get(stream))["width"] == 64
        ready = await gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"ready": True, "reason": "ready"})


# leaving


async def test_a_stream_goes_on_without_its_viewer_until_it_is_idle(run_gateway: Any) -> None:
    async with run_gateway(idle_timeout_s=0.6) as gateway:
        stream = await gateway.open()
        await gateway.watch(stream, until=lambda seen: len(seen.frames) > 2)
        await asyncio.sleep(0.2)
        assert (await gateway.get(stream))["state"] == "live"
        await gateway.until(lambda: stream_of(gateway, stream).session.state == "ended")
        assert (await gateway.get(stream))["ended_reason"] == "idle"


async def test_a_place_in_the_queue_that_nobody_asks_about_is_free_for_the_next(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.7)  # one plays at a time
    async with run_gateway(backend, idle_timeout_s=0.6, queue_limit=2) as gateway:
        playing, waiting, abandoned = [await gateway.open() for _ in range(3)]
        full = await gateway.http.post("/v1/streams", json={"prompt": "a"})
        assert full.json()["error"]["code"] == "queue_full"
        given = stream_of(gateway, abandoned).session
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
        session = stream_of(gateway, stream).session
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


def states(seen: Any) -> list[str]:
    return [event["state"] for event in seen.of("state")]


async def test_what_a_client_asked_for_outlasts_a_rest(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    async with run_gateway(unwatched_pause_s=0.4) as gateway:
        stream = await gateway.open()
        session = stream_of(gateway, stream).session
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


async def test_shutting_down_ends_the_streams_first(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream))
        await gateway.until(lambda: len(stream_of(gateway, stream).audience.viewers) == 1)
    seen = await watching
    assert seen.of("ended")[0]["reason"] == "shutting_down"
    assert seen.close_code == 1000


# the server


async def test_metrics(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        await gateway.watch(await gateway.open(duration_s=0.5))
        stream = await gateway.open()
        response = await gateway.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain")
        lines = response.text.splitlines()
        for line in (
            'livereel_streams{state="ended"} 1.0',
            "livereel_frames_shown_total 8.0",
            "livereel_stalls_total 0.0",
            "livereel_stalled_seconds_total 0.0",
            'livereel_frames_dropped_total{reason="slow_viewer"} 0.0',
            'livereel_viewers{format="mjpeg"} 0.0',
            "livereel_engine_restarts_total 0.0",
            "livereel_time_to_first_frame_seconds_count 1.0",
        ):
            assert line in lines
        assert stream["id"] not in response.text


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


async def test_the_page_and_the_reference_come_from_here_alone(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for path in ("/", "/docs"):
            response = await gateway.http.get(path)
            assert response.status_code == 200
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "script-src 'self';" in policy
            assert "https://" not in response.text
            assert "<script>" not in response.text
        for asset in ("app.js", "style.css", "docs.js", "docs.css", "js/index.js", "js/whep.js"):
            response = await gateway.http.get(f"/assets/{asset}")
            assert response.status_code == 200
            assert "innerHTML" not in response.text
        assert (await gateway.http.get("/assets/../app.py")).status_code == 404
        assert (await gateway.http.get("/assets/%2e%2e/%2e%2e/server/app.py")).status_code == 404


async def test_request_ids(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for path in ("/", "/livez", "/v1/streams", "/v1/nothing"):
            assert (await gateway.http.get(path)).headers["x-request-id"].startswith("req_")
        mine = await gateway.http.get("/livez", headers={"x-request-id": "abc-123"})
        assert mine.headers["x-request-id"] == "abc-123"
        strange = await gateway.http.get("/livez", headers={"x-request-id": "a b<script>"})
        assert strange.headers["x-request-id"].startswith("req_")


def test_the_gateway_never_loads_torch() -> None:
    code = "import server.app, server.__main__, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)


def stream_of(gateway: Any, stream: dict[str, Any]) -> Any:
    return gateway.streams.get(stream["id"])
