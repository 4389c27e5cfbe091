"""Streams over the API, on real sockets: from POST to the end, changes, stalls and the queue."""

import asyncio
import struct
from typing import Any

import pytest

from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio


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


async def test_the_same_seed_and_prompt_give_the_same_frames(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        shown = [
            await gateway.watch(await gateway.open(seed=seed, duration_s=0.3), "?format=rgb24") for seed in (1, 1, 2)
        ]
        frames = [[packet for _, packet in seen.frames] for seen in shown]
        assert frames[0] == frames[1] != frames[2]


def small(**settings: Any) -> FakeBackend:
    return FakeBackend(**{"width": 64, "height": 48, "chunk_seconds": 0.02, **settings})


async def test_a_prompt_change_is_announced_with_its_first_frame(run_gateway: Any) -> None:
    async with run_gateway(small(fps=48)) as gateway:
        stream = await gateway.open(seed=1, duration_s=4)
        watching = asyncio.create_task(gateway.watch(stream, "?format=rgb24", until=lambda seen: len(seen.frames) > 45))
        await gateway.until(lambda: gateway.stream_of(stream).session.frames_generated > 12)
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
        await gateway.until(lambda: gateway.stream_of(stream).session.frames_generated > 12)
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
        await gateway.until(lambda: gateway.stream_of(stream).session.frames_generated > 0)
        answers = await asyncio.gather(*(gateway.patch(stream, prompt=prompt) for prompt in ("one", "two", "three")))
        assert [answer.status_code for answer in answers] == [200] * 3
        newest = (await gateway.get(stream))["prompt"]
        assert (await watching).of("prompt.applied")[0]["prompt"] == newest


async def test_a_cut_to_the_same_prompt_starts_a_new_scene(run_gateway: Any) -> None:
    async with run_gateway(small(fps=48)) as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: bool(seen.of("prompt.applied"))))
        await gateway.until(lambda: gateway.stream_of(stream).session.frames_generated > 12)
        answer = (await gateway.patch(stream, prompt=stream["prompt"], transition="cut")).json()
        [applied] = (await watching).of("prompt.applied")
        assert (applied["prompt"], applied["transition"]) == (stream["prompt"], "cut")
        assert applied["chunk_index"] == answer["chunk_index"] >= 2


async def test_pause_and_resume(run_gateway: Any) -> None:
    async with run_gateway(small(fps=48)) as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(
            gateway.watch(stream, until=lambda seen: len(seen.of("state")) >= 3 and len(seen.frames) > 20)
        )
        await gateway.until(lambda: gateway.stream_of(stream).playback.shown > 1)
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
        await gateway.until(lambda: len(gateway.stream_of(stream).audience.viewers) == 1)
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


async def test_playback_starts_without_a_viewer_in_the_end(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.playback.START_UNWATCHED_SECONDS", 0.2)
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=0.5)
        await gateway.until(lambda: gateway.stream_of(stream).session.state == "ended")
        assert (await gateway.get(stream))["frames_shown"] == 8


async def test_an_underrun_is_a_stall_that_everybody_sees(run_gateway: Any) -> None:
    async with run_gateway(small()) as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: len(seen.of("stall")) >= 2))
        await gateway.until(lambda: gateway.stream_of(stream).playback.shown > 2)
        gateway.backend.extra_seconds = 2.0
        seen = await watching
        began, ended = seen.of("stall")[:2]
        assert (began["phase"], ended["phase"]) == ("began", "ended")
        assert ended["seconds"] > 0
        record = await gateway.get(stream)
        assert record["stalls"] >= 1
        assert record["stalled_s"] >= ended["seconds"] - 0.001


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
        await gateway.until(lambda: len(gateway.stream_of(third).audience.viewers) == 1)
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
        assert (ready.status_code, ready.json()) == (
            200,
            {"ready": True, "reason": "ready", "retry_in_s": 0.0},
        )


SCHEDULE = [
    {"at_s": 0.5, "prompt": "a cube", "transition": "cut"},
    {"at_s": 2.0, "prompt": "a cone", "transition": "recache"},
]


async def test_scheduled_prompts_take_effect_at_their_chunks(run_gateway: Any) -> None:
    """As the prompts of a clip: at the chunk that begins nearest. Twice, and the frames are the same."""
    async with run_gateway() as gateway:
        films = []
        for _ in range(2):
            stream = await gateway.open(seed=3, duration_s=3, prompts=SCHEDULE)
            assert stream["prompts"] == SCHEDULE
            seen = await gateway.watch(stream, "?format=rgb24")
            changes = [
                (event["chunk_index"], event["prompt"], event["transition"]) for event in seen.of("prompt.applied")
            ]
            # After the cut a scene begins anew, with a first chunk of 9 frames: 0, 9, 18, 30 are the chunks' first.
            assert changes == [(1, "a cube", "cut"), (3, "a cone", "recache")]
            assert seen.of("stall") == []
            films.append([bytes(data) for _, data in seen.frames])
            assert (await gateway.get(stream))["prompts"] == []
        assert films[0] == films[1]


async def test_the_schedule_can_be_replaced_ahead_of_playback(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.live(prompts=[{"at_s": 600, "prompt": "never"}])
        later = [{"at_s": 3.0, "prompt": "a cube", "transition": "soft"}]
        assert (await gateway.patch(stream, prompts=later)).json()["prompts"] == later
        passed = (await gateway.patch(stream, prompts=[{"at_s": 0.1, "prompt": "a cone"}])).json()["error"]
        assert (passed["code"], passed["param"]) == ("at_s_passed", "prompts[0].at_s")
        assert (await gateway.get(stream))["prompts"] == later
        assert (await gateway.patch(stream, prompts=[])).json()["prompts"] == []
        falling = await gateway.patch(stream, prompts=[{"at_s": 9, "prompt": "a"}, {"at_s": 8, "prompt": "b"}])
        assert (falling.status_code, falling.json()["error"]["param"]) == (400, "prompts")
        missing = await gateway.patch(stream, prompts=[{"at_s": 9}])
        assert (missing.status_code, missing.json()["error"]["param"]) == (400, "prompts")


async def test_a_schedule_outlives_an_engine(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.live(duration_s=3, prompts=[{"at_s": 2.0, "prompt": "a cone"}])
        gateway.backend.crash()
        seen = await gateway.watch(stream)
        assert [event["prompt"] for event in seen.of("prompt.applied")] == ["a cone"]
        assert seen.of("ended")[0]["reason"] == "finished"
