"""The engine dies, hangs or misbehaves: viewers see it, streams go on or fail, and never silently."""

import asyncio
import os
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

from engine import wire
from server.backends.fake import FakeBackend
from server.backends.local import LocalBackend

pytestmark = pytest.mark.anyio


async def test_a_crash_is_seen_and_the_stream_goes_on(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02, restart_after=2.0)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open(duration_s=4)
        live = gateway.streams.get(stream["id"])
        watching = asyncio.create_task(gateway.watch(stream))
        await gateway.until(lambda: live.playback is not None and live.playback.shown > 10)
        backend.crash()
        assert (await gateway.http.get("/readyz")).status_code == 503
        assert (await gateway.get(stream))["interrupted"] is True
        before = live.playback.received
        await gateway.until(lambda: backend.health().ready)
        assert (await gateway.get(stream))["interrupted"] is False
        seen = await watching
        assert seen.close_code == 1000
        error = seen.of("error")[0]
        assert (error["code"], error["retryable"]) == ("engine_restarted", True)
        assert seen.of("engine.restarted")[0]["generation"] == 2
        # The last frame is held, which is a stall, and then every frame comes, once.
        assert [event["phase"] for event in seen.of("stall")] == ["began", "ended"]
        assert seen.pts == [5625 * frame for frame in range(64)]
        chunks = [event["index"] for event in seen.of("chunk")]
        assert chunks == list(range(chunks[0], 6))  # the first may have come before the viewer
        again = [message for message in backend.sent if isinstance(message, wire.Open)][-1]
        assert (again.prompt, again.start_frame, again.max_frames) == ("a red ball", before, 64)
        # The break is marked in the picture stream as well.
        flags = [struct.unpack("!BBHHHQ", packet[:16])[4] for _, packet in seen.frames]
        assert [index for index, flag in enumerate(flags) if flag] == [before]
        assert "livereel_engine_restarts_total 1.0" in (await gateway.http.get("/metrics")).text
        assert (await gateway.http.get("/readyz")).status_code == 200


@pytest.mark.parametrize("fate", [signal.SIGKILL, signal.SIGSTOP, "hangs later"])
async def test_a_process_that_dies_stops_or_hangs_is_replaced_in_sight(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, fate: signal.Signals | str
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    command = (sys.executable, str(Path(__file__).parents[1] / "stub_engine.py"))
    behaviour = "good" if isinstance(fate, signal.Signals) else fate
    backend = LocalBackend(
        behaviour, command=command, silent_seconds=1.0, hung_seconds=0.5, backoff_seconds=(0.02, 0.05)
    )
    async with run_gateway(backend, model="mini") as gateway:
        stream = await gateway.open(duration_s=5)
        watching = asyncio.create_task(gateway.watch(stream, "?format=rgb24"))
        live = gateway.streams.get(stream["id"])
        await gateway.until(lambda: live.playback is not None and live.playback.shown > 4)
        pid = backend.pid
        if isinstance(fate, signal.Signals):
            os.kill(pid, fate)
        seen = await watching
        assert backend.pid != pid
    assert seen.close_code == 1000
    assert [event["code"] for event in seen.of("error")] == ["engine_restarted"]
    assert seen.of("engine.restarted")[0]["generation"] == 2
    # Every frame comes, once and whole: of none is a part of another's pixels.
    assert seen.pts == [5625 * frame for frame in range(80)]
    for index, (_, packet) in enumerate(seen.frames):
        assert packet[16:] == bytes((index + k) % 256 for k in range(96))


async def test_a_prompt_change_survives_a_crash(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02, restart_after=0.3)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream, until=lambda seen: bool(seen.of("prompt.applied"))))
        await gateway.until(lambda: gateway.streams.get(stream["id"]).session.frames_generated > 10)
        backend.crash()
        response = await gateway.patch(stream, prompt="a blue cube")
        assert response.status_code == 200
        seen = await watching
        assert seen.of("prompt.applied")[0]["chunk_index"] == response.json()["chunk_index"]
        again = [message for message in backend.sent if isinstance(message, wire.Open)][-1]
        assert (again.prompt, again.start_chunk) == ("a blue cube", response.json()["chunk_index"])


async def test_what_waits_in_the_queue_does_not_notice(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.5)
    async with run_gateway(backend) as gateway:
        first, second = await gateway.open(), await gateway.open()
        watching = asyncio.create_task(gateway.watch(second, until=lambda seen: len(seen.frames) > 3))
        await asyncio.sleep(0.1)
        backend.crash()
        await gateway.until(lambda: backend.health().ready)
        assert (await gateway.get(second))["state"] == "queued"
        await gateway.http.delete(f"/v1/streams/{first['id']}")
        seen = await watching
        assert not seen.of("error")
        assert not seen.of("engine.restarted")


async def test_an_engine_that_stays_dead_fails_every_stream(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.5, restarts_left=1, restart_after=0.1)
    async with run_gateway(backend) as gateway:
        first, second = await gateway.open(), await gateway.open()
        watching = [asyncio.create_task(gateway.watch(stream)) for stream in (first, second)]
        await gateway.until(
            lambda: all(gateway.streams.get(stream["id"]).audience.viewers for stream in (first, second))
        )
        backend.crash()
        await gateway.until(lambda: backend.health().ready)
        backend.crash()
        for stream, task in zip((first, second), watching, strict=True):
            seen = await task
            assert seen.close_code == 1011
            assert seen.of("error")[-1]["code"] == "engine_failed"
            assert seen.order[-2:] == ["state", "ended"]
            assert seen.of("ended")[0]["reason"] == "failed"
            record = await gateway.get(stream)
            assert (record["state"], record["ended_reason"]) == ("failed", "failed")
            assert record["error"]["code"] == "engine_failed"
        ready = await gateway.http.get("/readyz")
        assert (ready.status_code, ready.json()["reason"]) == (503, "the engine failed")
        refused = await gateway.http.post("/v1/streams", json={"prompt": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_failed")
        assert "the engine crashed" in refused.json()["error"]["message"]
        assert int(refused.headers["retry-after"]) > 0
        assert (await gateway.patch(first, prompt="a")).status_code == 409
        # After a quiet time it is tried again, and serves if it comes up.
        await backend.start(gateway.streams.engine._on_event)
        await gateway.until(lambda: backend.health().ready)
        assert (await gateway.http.get("/readyz")).status_code == 200
        third = await gateway.open(duration_s=1)
        assert (await gateway.watch(third)).close_code == 1000


async def test_one_stream_that_fails_leaves_the_others_alone(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        first, second = await gateway.open(duration_s=1.5), await gateway.open(duration_s=1.5)
        watching = [asyncio.create_task(gateway.watch(stream)) for stream in (first, second)]
        lives = [gateway.streams.get(stream["id"]) for stream in (first, second)]
        await gateway.until(lambda: all(live.audience.viewers and live.session.frames_generated for live in lives))
        gateway.backend.break_stream(first["id"])
        broken, fine = [await task for task in watching]
        assert broken.close_code == 1011
        assert broken.of("error")[0]["code"] == "numeric"
        assert fine.close_code == 1000
        assert fine.pts == [5625 * frame for frame in range(24)]


async def test_a_change_that_the_engine_never_answers(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.stream.STEER_SECONDS", 0.2)
    async with run_gateway() as gateway:
        stream = await gateway.open()
        monkeypatch.setattr(FakeBackend, "_steer", lambda self, message: None)
        response = await gateway.patch(stream, prompt="a cube")
        assert (response.status_code, response.json()["error"]["code"]) == (504, "engine_timeout")


async def test_messages_that_make_no_sense_are_dropped(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=1)
        watching = asyncio.create_task(gateway.watch(stream))
        await gateway.until(lambda: gateway.streams.get(stream["id"]).session.frames_generated > 0)
        frames = {"stream": stream["id"], "pts": 0, "frames": 1, "gen_seconds": 0.1}
        deliver = gateway.backend._deliver
        deliver(wire.Frames(chunk=0, width=64, height=48, **frames), bytes(64 * 48 * 3))  # seen already
        deliver(wire.Frames(chunk=99, width=64, height=48, **frames), bytes(64 * 48 * 3))
        deliver(wire.Frames(chunk=2, width=2, height=2, **frames), bytes(12))
        deliver(wire.Steered(stream["id"], 77, 1), b"")
        deliver(wire.Fault("x", "y", stream["id"], 77), b"")
        deliver(wire.Ended("st_unknown", "finished"), b"")
        seen = await watching
        assert seen.pts == [5625 * frame for frame in range(16)]
        assert seen.close_code == 1000
