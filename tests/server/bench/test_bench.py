"""What the benchmarks of serving count, and the engine that they kill."""

import asyncio
import io
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw

from server.backends.fake import FakeBackend, stamp
from server.backends.local import LocalBackend
from server.bench import churn, latency, soak
from server.bench.clients import Client, Noted
from server.bench.engine import COMMAND
from server.bench.gateway import Gateway, Sample, children, growth, quantile, report

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


def test_quantiles_are_of_what_came_in_between() -> None:
    before = {'lag_bucket{le="0.01"}': 90.0, 'lag_bucket{le="0.1"}': 100.0, 'lag_bucket{le="+Inf"}': 100.0}
    after = {'lag_bucket{le="0.01"}': 100.0, 'lag_bucket{le="0.1"}': 120.0, 'lag_bucket{le="+Inf"}': 121.0}
    assert quantile({}, before, "lag", 0.9) == 0.01
    assert quantile(before, after, "lag", 0.4) == 0.01
    assert quantile(before, after, "lag", 0.9) == 0.1
    assert quantile(before, after, "lag", 0.99) == float("inf")
    assert quantile(after, after, "lag", 0.99) == 0.0


def test_growth_is_that_of_the_second_half() -> None:
    memory = [0, 50, 100, 100, 102, 104]
    samples = [Sample(30.0 * k, value * 2**20, 0.0, 0, 0, 0) for k, value in enumerate(memory)]
    assert growth(samples, "resident") == pytest.approx(4.0)
    assert growth(samples, "engine") == 0.0


def test_a_report_fails_with_one_bad_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([("a", 1, True)]) == 0
    assert report([("a", 1, True), ("b", 2, False)]) == 1
    assert "NOT AS IT SHOULD BE" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fate", "at", "expected"),
    [
        (signal.SIGKILL, 99.0, False),
        (signal.SIGKILL, 100.5, True),
        (signal.SIGKILL, 106.0, True),  # it resumed at 104, and has the grace of three seconds
        (signal.SIGKILL, 108.0, False),
        (signal.SIGSTOP, 107.5, True),  # perhaps nobody has noticed before 105
        (signal.SIGSTOP, 109.0, False),
    ],
)
def test_what_a_kill_excuses(fate: signal.Signals, at: float, expected: bool) -> None:
    noted = Noted(resumed=[(50.0, "a"), (104.0, "a")])
    run = soak.Soak(Gateway("", 0), httpx.AsyncClient(), noted, kills=[soak.Kill(100.0, fate)])
    assert soak.disturbed(run, at) is expected


def test_how_soon_each_lasting_stream_went_on() -> None:
    kills = [soak.Kill(100.0, signal.SIGKILL), soak.Kill(200.0, signal.SIGKILL), soak.Kill(300.0, signal.SIGSTOP)]
    noted = Noted(resumed=[(101.0, "a"), (102.0, "b"), (103.0, "b"), (100.5, "brief"), (203.0, "b"), (304.0, "a")])
    run = soak.Soak(Gateway("", 0), httpx.AsyncClient(), noted, kills=kills, lasting={"a", "b"})
    assert sorted(soak.resumed(run, kills[0])) == [1.0, 2.0]
    assert sorted(soak.resumed(run, kills[1])) == [3.0, float("inf")]
    lines = list(soak.went_on(run, 5.0))
    assert [(name.split()[1], figures, good) for name, figures, good in lines] == [
        ("SIGKILL", [2.5, float("inf")], False),
        ("SIGSTOP", [float("inf")] * 2, False),
    ]


async def test_the_pretended_engine_as_a_process(run_gateway: Any) -> None:
    backend = LocalBackend("mini", command=COMMAND, backoff_seconds=(60, 60), standby=True, standby_seconds=(0.01, 1))
    async with run_gateway(backend, ready=False) as gateway:
        await gateway.until(lambda: backend.standby_pid is not None, 30)
        stream = await gateway.open("a red ball", seed=1, duration_s=4)
        same = FakeBackend()
        noted = Noted()
        watching = gateway.watch(stream, "?format=rgb24", until=lambda seen: len(seen.frames) >= 30)
        seen = await watching
        assert seen.pts[:30] == [5625 * frame for frame in range(30)]
        assert len(seen.frames[0][1]) == 16 + 3 * same.width * same.height
        [pid, standby] = children(os.getpid())
        client = Client(gateway.http, noted)
        os.kill(pid, signal.SIGKILL)
        assert await client.watch(stream, "mjpeg", 20) > 30
        assert not noted.faults
        assert [len(noted.losses), len(noted.resumed)] == [1, 1]
        assert noted.resumed[0][0] > noted.losses[0][0]
        assert backend.pid == standby
    assert children(os.getpid()) == []


async def test_clients_churn_without_a_fault(run_gateway: Any) -> None:
    random.seed(4)
    noted, streams = Noted(), list[dict[str, Any]]()
    async with run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.3), queue_limit=1) as gateway:
        ends_at = time.monotonic() + 6
        await asyncio.gather(*(churn.live(Client(gateway.http, noted), streams, ends_at) for _ in range(12)))
    assert not noted.faults
    assert noted.done["opened"] > 2
    assert noted.done["closed"] > 0
    assert noted.refused["queue_full"] > 0
    assert noted.done["frames"] > 20


async def test_a_fault_is_noted(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        client = Client(gateway.http, noted := Noted())
        assert await client.open(duration_s=-1) is None
        nothing = {"id": "st_none", "ws_url": f"ws://{gateway.address}/v1/streams/st_none/ws"}
        assert await client.watch(nothing, "mjpeg", 2) == 0
    assert list(noted.faults) == ["opened: 400 invalid_value"]
    assert list(noted.refused) == ["stream_not_found"]


@pytest.mark.parametrize("damage", [False, True])
def test_stamps_are_read_as_they_were_written(damage: bool) -> None:
    image = Image.new("RGB", (256, 256), (90, 90, 90))
    stamp(ImageDraw.Draw(image), 256, 65536 + 77, 2**32 + 123_456, 200)
    if damage:
        ImageDraw.Draw(image).rectangle((0, 0, 256, 8), (0, 0, 0))
    image.save(out := io.BytesIO(), "JPEG", quality=40)  # as codecs leave them
    rgb = Image.open(out).convert("RGB").tobytes()
    assert latency.read_stamp(rgb, 256) == (None if damage else (77, 123_456, 200))


def test_latency_is_from_a_frames_making_to_its_showing() -> None:
    end = latency.CYCLE_MS
    canvas: latency.Seen = [(1, 1000, 0, end + 1300.0), (2, end - 50, 0, 2 * end + 150.0), (3, 5, 0, 25.0)]
    raw: latency.Seen = [(1, 1000, 0, end + 1250.0), (3, 5, 0, 15.0)]
    found = latency.Watched(canvas, raw, 0)
    assert found.from_engine == [300.0, 200.0, 20.0]
    assert found.from_gateway == [50.0, 10.0]
    assert latency.spread([4.0, 1.0, 3.0, 2.0]) == "3 / 4"
    assert latency.spread([]) == "-"


async def test_stamped_pictures_say_when_they_were_made(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(stamped=True, chunk_seconds=0.1)) as gateway:
        stream = await gateway.open("a", seed=1)
        before = time.time() * 1000
        seen = await gateway.watch(stream, "?format=rgb24", until=lambda seen: len(seen.frames) >= 12)
        after = time.time() * 1000
    stamps = [latency.read_stamp(packet[16:], 256) for _, packet in seen.frames]
    assert [each[0] for each in stamps] == list(range(len(stamps)))
    assert all(-500 < latency.milliseconds(each[1], after) <= after - before + 500 for each in stamps)
