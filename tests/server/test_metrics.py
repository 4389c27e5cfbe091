"""The figures that matter, as `/metrics` has them after something has happened."""

import asyncio
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from server.backends.fake import FakeBackend
from server.backends.local import LocalBackend

pytestmark = pytest.mark.anyio


async def figures(gateway: Any) -> dict[str, float]:
    """Every sample, by name and labels."""
    text = (await gateway.http.get("/metrics")).text
    return {name: float(value) for name, value in re.findall(r"(?m)^([^#\s]\S*(?: [^\s{}]+\})?) (\S+)$", text)}


async def test_the_first_frame_by_phase(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.5)
    async with run_gateway(backend) as gateway:
        assert (await figures(gateway))["livereel_engine_ready"] == 1
        first = await gateway.open()
        second = await gateway.open()  # waits for the first one's place
        await gateway.until(lambda: gateway.streams.get(first["id"]).session.time_to_first_frame_s is not None)
        assert (await figures(gateway))["livereel_engine_load_ratio"] == pytest.approx(2 / 3)
        await gateway.http.delete(f"/v1/streams/{first['id']}")
        session = gateway.streams.get(second["id"]).session
        await gateway.until(lambda: session.time_to_first_frame_s is not None)
        after = await figures(gateway)
    name = "livereel_time_to_first_frame_phase_seconds"
    phases = {phase: after[f'{name}_sum{{phase="{phase}"}}'] for phase in ("queue", "start", "generate", "encode")}
    assert sum(phases.values()) == pytest.approx(after["livereel_time_to_first_frame_seconds_sum"])
    assert phases["generate"] >= 0.98
    assert after[f'{name}_count{{phase="encode"}}'] == 2


async def test_slack_and_repeated_frames(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream, "?format=fmp4"))
        live = gateway.streams.get(stream["id"])
        await gateway.until(lambda: live.playback is not None and live.playback.next_chunk >= 4)
        during = await figures(gateway)
        assert during['livereel_viewers{format="fmp4"}'] == 1
        assert during['livereel_viewers{format="mjpeg"}'] == 0
        assert during["livereel_playout_slack_seconds_count"] >= 3
        # The engine is fast: nothing comes late, and never more ahead than is granted.
        assert during['livereel_playout_slack_seconds_bucket{le="0.0"}'] == 0
        ahead = during['livereel_playout_slack_seconds_bucket{le="2.0"}']
        assert ahead == during["livereel_playout_slack_seconds_count"]
        await gateway.patch(stream, paused=True)
        await asyncio.sleep(1.2)
        after = await figures(gateway)
        assert after['livereel_frames_repeated_total{reason="held"}'] >= 1
        shown = after["livereel_frames_shown_total"]
        assert after["livereel_played_seconds_total"] == pytest.approx(shown / 16)
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_late_chunks_have_negative_slack(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        watching = asyncio.create_task(gateway.watch(stream))
        await gateway.until(lambda: live.playback is not None and live.playback.shown > 0)
        backend.extra_seconds = 2.5
        await gateway.until(lambda: live.playback.stalls > 0)
        backend.extra_seconds = 0.0
        await gateway.until(lambda: live.playback.buffered_seconds > 0, 10)
        assert (await figures(gateway))['livereel_playout_slack_seconds_bucket{le="-0.1"}'] >= 1
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)


async def test_the_process_and_its_event_loop(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        await asyncio.sleep(0.3)
        before = await figures(gateway)
        assert before["livereel_event_loop_lag_seconds_count"] >= 2
        assert before["livereel_tasks"] >= 3
        assert before["livereel_threads"] >= 1
        assert before["process_open_fds"] > 0
        assert before["process_resident_memory_bytes"] > 1e6
        time.sleep(0.3)  # what no code of the gateway may do
        await asyncio.sleep(0.1)
        after = await figures(gateway)
        name = "livereel_event_loop_lag_seconds"
        late = [each[f"{name}_count"] - each[f'{name}_bucket{{le="0.1"}}'] for each in (before, after)]
        assert late[1] > late[0]


async def test_what_the_engine_says_of_itself(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    command = (sys.executable, str(Path(__file__).with_name("stub_engine.py")))
    async with run_gateway(LocalBackend("good", command=command), model="mini") as gateway:
        await gateway.open()

        async def heard() -> bool:
            now = await figures(gateway)
            free = now.get('livereel_ring_slots{state="free"}', 0)
            used = now.get('livereel_ring_slots{state="used"}', 0)
            return now["livereel_engine_resident_bytes"] == 12345 and free + used == 4

        await gateway.until(heard)


async def test_refusals_by_reason(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(chunk_seconds=0.7), queue_limit=0) as gateway:
        await gateway.open()
        assert (await gateway.http.post("/v1/streams", json={"prompt": "a"})).status_code == 429
        after = await figures(gateway)
        assert after['livereel_streams_refused_total{reason="queue_full"}'] == 1
        assert after['livereel_streams_refused_total{reason="stream_limit"}'] == 0
