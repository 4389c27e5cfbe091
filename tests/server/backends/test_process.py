"""One engine process: its socket, its messages, its shared memory, and what is left when it ends."""

import asyncio
import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from engine import wire
from server.backends import process
from server.backends.base import EngineLost
from tests.server.backends.harness import gone, running, shared_memory

pytestmark = pytest.mark.anyio


async def test_the_socket_is_private_and_tidied_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    async with running("loads"):
        async with asyncio.timeout(10):
            while not list(tmp_path.glob("*/engine.sock")):
                await asyncio.sleep(0.01)
        (directory,) = tmp_path.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert {path.name for path in directory.iterdir()} == {"engine.sock", "lock"}
    assert list(tmp_path.iterdir()) == []
    async with running("good") as (_, delivered):
        await delivered.until(wire.Ready)
        assert list(tmp_path.iterdir()) == []  # no other process may connect


async def test_garbage_is_dropped_and_the_rest_still_counts(caplog: pytest.LogCaptureFixture) -> None:
    async with running("garbage") as (backend, delivered):
        await delivered.until(wire.Ready)
        assert caplog.text.count("malformed") == 7
        assert backend.health().ready


@pytest.mark.parametrize("behaviour", ["stale", "overwrites", "no-slot"])
async def test_a_slot_that_does_not_hold_what_was_announced_is_never_shown(behaviour: str) -> None:
    async with running(behaviour) as (backend, delivered):
        await delivered.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await delivered.until(wire.Ready, wire.Started, wire.Fault, wire.Ended)
        assert delivered.events[2] == wire.Fault("chunk_damaged", "a chunk was damaged on its way", "a")
        assert delivered.pixels == b""
        assert backend.health().ready


async def test_slots_are_given_back() -> None:
    chunks = 5 * process.SLOTS
    async with running("good") as (backend, delivered):
        await delivered.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", chunks, 0.5))
        await delivered.until(wire.Ready, wire.Started, *[wire.Frames] * chunks)
        frames = [event for event in delivered.events if isinstance(event, wire.Frames)]
        assert [frame.chunk for frame in frames] == list(range(chunks))
        assert {frame.slot for frame in frames} <= set(range(process.SLOTS))
        assert [frame.generation for frame in frames] == list(range(1, chunks + 1))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_no_memory_is_left_behind_by_engines_that_are_killed() -> None:
    async with running("good", quiet_seconds=0.0) as (backend, delivered):
        for times in range(1, 6):
            before = (wire.Ready, wire.Started, wire.Frames, EngineLost) * (times - 1)
            await delivered.until(*before, wire.Ready)
            backend.send(wire.Open("a", "mini", "a ball", 1))
            backend.send(wire.Credit("a", 1, 0.5))
            await delivered.until(*before, wire.Ready, wire.Started, wire.Frames)
            assert len(shared_memory()) == 3  # this process's descriptor, the mapping's own, and the mapping
            assert backend.pid is not None
            os.kill(backend.pid, signal.SIGKILL)
    assert shared_memory() == []


async def test_stopping_does_not_wait_for_a_stubborn_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    async with running("stubborn") as (backend, delivered):
        await delivered.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
    assert gone(pid)
