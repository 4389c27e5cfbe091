"""A stream that would run dry gets fewer denoising steps, and its own number again when there is time."""

import asyncio
from typing import Any

import pytest

from engine import wire
from server.backends.fake import FakeBackend
from server.streams.playback import Arrival
from server.streams.quality import MAX_UP_CHUNKS, Quality

pytestmark = pytest.mark.anyio


def feed(quality: Quality, chunks: int, speed: float, slack: float = 1.0) -> list[int]:
    """Chunks that play 1 s each, at this speed, all made as asked; returns at which of them `steps` changed."""
    return [index for index in range(chunks) if quality.arrive(Arrival(1.0, 1.0 / speed, slack), quality.steps)]


@pytest.mark.parametrize(
    ("steps", "speed", "slack", "chunks", "expected"),
    [
        (2, 1.0, 0.4, 2, 2),  # three chunks must say so
        (2, 1.0, 0.4, 3, 1),
        (2, 1.04, 0.4, 3, 1),
        (2, 1.06, 0.4, 30, 2),  # fast enough
        (2, 0.9, 0.6, 30, 2),  # nothing is lost yet
        (2, 0.5, -3.0, 30, 1),  # one step is the least
        (4, 0.5, -3.0, 3, 3),  # one level at a time
        (4, 0.5, -3.0, 6, 2),
        (4, 0.5, -3.0, 30, 2),  # half the steps are the least
        (3, 0.5, -3.0, 30, 2),
        (1, 0.5, -3.0, 30, 1),
    ],
)
def test_quality_goes_down_when_a_stream_runs_dry(
    steps: int, speed: float, slack: float, chunks: int, expected: int
) -> None:
    quality = Quality(steps)
    feed(quality, chunks, speed, slack)
    assert quality.steps == expected


@pytest.mark.parametrize(("speed", "chunks", "expected"), [(1.35, 9, 1), (1.35, 10, 2), (1.25, 100, 1), (9.0, 100, 2)])
def test_quality_comes_back_when_there_is_time_to_spare(speed: float, chunks: int, expected: int) -> None:
    quality = Quality(2)
    feed(quality, 3, 0.9, 0.1)
    feed(quality, chunks, speed)
    assert quality.steps == expected


def test_chunks_from_before_a_change_say_nothing_about_it() -> None:
    quality = Quality(4)
    feed(quality, 3, 0.9, 0.1)
    assert (quality.steps, quality.applied, quality.level) == (3, 4, 0)
    for _ in range(5):  # begun before
        assert not quality.arrive(Arrival(1.0, 2.0, -1.0), 4)
    assert (quality.steps, quality.level) == (3, 0)
    assert feed(quality, 3, 0.9, 0.1) == [2]
    assert (quality.steps, quality.level, quality.levels) == (2, 1, 3)


def test_what_says_nothing_about_speed_counts_for_nothing() -> None:
    quality = Quality(2)
    for _ in range(20):
        assert not quality.arrive(Arrival(1.0, None, -1.0), 2)
        assert not quality.arrive(Arrival(1.0, None, None), 2)
    assert not quality.arrive(Arrival(1.0, 2.0, None), 2)


def test_who_cannot_keep_the_better_quality_tries_less_and_less_often() -> None:
    quality, waits = Quality(2), []
    for _ in range(7):
        assert feed(quality, 3, 0.9, 0.1) == [2]
        wait = 1
        while not feed(quality, 1, 2.0):
            wait += 1
        waits.append(wait)
    assert waits == [10, 20, 40, 80, 160, 160, 160]
    assert waits[-1] == MAX_UP_CHUNKS


async def test_quality_gives_way_before_playback_does_and_comes_back(run_gateway: Any) -> None:
    # A chunk plays 250 ms. At 350 ms it is too slow, with three of four steps (280 ms) as well, with two it is not.
    backend = FakeBackend(width=64, height=48, fps=48, chunk_seconds=0.05, steps=4)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        assert (await gateway.get(stream))["quality"] == {"level": 0, "levels": 3, "steps": 4}
        live = gateway.streams.get(stream["id"])
        enough = asyncio.Event()
        watching = asyncio.create_task(gateway.watch(stream, until=lambda _: enough.is_set()))
        await gateway.until(lambda: live.session.frames_generated > 20)
        backend.extra_seconds = 0.3
        await gateway.until(lambda: live.quality.level == 2, 15)
        assert (await gateway.get(stream))["quality"] == {"level": 2, "levels": 3, "steps": 2}
        metrics = (await gateway.http.get("/metrics")).text
        assert 'livereel_quality_changes_total{direction="down"} 2.0' in metrics
        assert "livereel_quality_level 2.0" in metrics
        stalls = live.playback.stalls
        at = live.session.frames_generated
        await gateway.until(lambda: live.session.frames_generated > at + 60)
        assert live.playback.stalls <= stalls + 1
        backend.extra_seconds = 0.0
        await gateway.until(lambda: live.quality.level == 0, 15)
        assert "livereel_quality_level 0.0" in (await gateway.http.get("/metrics")).text
        enough.set()
        seen = await watching
    changes = seen.of("quality.changed")
    fields = [(change["level"], change["steps"], change["reason"]) for change in changes]
    assert fields == [
        (1, 3, "running_dry"),
        (2, 2, "running_dry"),
        (1, 3, "time_to_spare"),
        (0, 4, "time_to_spare"),
    ]
    # Each is told with the chunk that it begins with.
    chunks = {event["index"]: event for event in seen.of("chunk")}
    for change in changes:
        assert chunks[change["chunk_index"]]["pts"] == change["pts"]
    assert chunks[changes[1]["chunk_index"]]["gen_ms"] < chunks[changes[0]["chunk_index"]]["gen_ms"]
    asked = [message.steps for message in backend.sent if isinstance(message, wire.SetSteps)]
    assert asked == [3, 2, 3, 4]


async def test_a_new_engine_is_told_of_the_quality(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, fps=48, chunk_seconds=0.05, steps=2)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        live = gateway.streams.get(stream["id"])
        watching = asyncio.create_task(gateway.watch(stream))
        backend.extra_seconds = 0.3
        await gateway.until(lambda: live.quality.level == 1, 15)
        backend.crash()
        await gateway.until(lambda: backend.health().ready)
        told = [message for message in backend.sent if isinstance(message, wire.Open | wire.SetSteps)][-2:]
        assert isinstance(told[0], wire.Open)
        assert told[1] == wire.SetSteps(stream["id"], 1)
        at = live.session.frames_generated
        await gateway.until(lambda: live.session.frames_generated > at)
        assert live.quality.level == 1
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        assert len((await watching).of("quality.changed")) == 1


async def test_a_model_of_one_step_stays_as_it_is(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, fps=48, chunk_seconds=0.35, steps=1)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open(duration_s=2)
        seen = await gateway.watch(stream)
        assert len(seen.of("stall")) > 0 and not seen.of("quality.changed")
        assert (await gateway.get(stream))["quality"] == {"level": 0, "levels": 1, "steps": 1}
