"""The fake engine as a process: it serves, is killed, and its standby takes over."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from server.backends.fake import FakeBackend
from server.backends.local import LocalBackend
from server.bench.clients import Client, Outcomes
from server.bench.engine import COMMAND
from server.bench.gateway import children

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))


async def test_the_pretended_engine_as_a_process(run_gateway: Any) -> None:
    backend = LocalBackend("mini", command=COMMAND, backoff_seconds=(60, 60), standby=True, standby_seconds=(0.01, 1))
    async with run_gateway(backend, ready=False) as gateway:
        await gateway.until(lambda: backend.standby_pid is not None, 30)
        stream = await gateway.open("a red ball", seed=1, duration_s=4)
        same = FakeBackend()
        outcomes = Outcomes()
        watching = gateway.watch(stream, "?format=rgb24", until=lambda seen: len(seen.frames) >= 30)
        seen = await watching
        assert seen.pts[:30] == [5625 * frame for frame in range(30)]
        assert len(seen.frames[0][1]) == 16 + 3 * same.width * same.height
        [pid, standby] = children(os.getpid())
        client = Client(gateway.http, outcomes)
        os.kill(pid, signal.SIGKILL)
        assert await client.watch(stream, "mjpeg", 20) > 30
        assert not outcomes.faults
        assert [len(outcomes.losses), len(outcomes.resumed)] == [1, 1]
        assert outcomes.resumed[0][0] > outcomes.losses[0][0]
        assert backend.pid == standby
    assert children(os.getpid()) == []
