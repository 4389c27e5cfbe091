"""Supervision of a child process that plays the engine, well and badly, and of its standby."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engine import wire
from server.backends import local, process
from server.backends.base import EngineLost
from server.backends.local import LocalBackend
from server.backends.restart import MAX_FAILURES
from server.bench.gateway import children
from tests.server.backends.harness import COMMAND, ROOT, Delivered, gone, running, shared_memory, standby_of

pytestmark = pytest.mark.anyio


async def test_a_stream_there_and_back() -> None:
    async with running("good", threads=3) as (backend, delivered):
        assert not backend.health().ready
        await delivered.until(wire.Ready)
        ready = delivered.events[0]
        assert isinstance(ready, wire.Ready)
        assert ready.models[0].description == "3 threads"
        assert backend.health().ready
        assert backend.health().generation == 1
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await delivered.until(wire.Ready, wire.Started, wire.Frames)
        assert delivered.pixels == b"".join(bytes((frame + k) % 256 for k in range(96)) for frame in range(9))
        backend.send(wire.Close("a"))
        await delivered.until(wire.Ready, wire.Started, wire.Frames, wire.Ended)
        pid = backend.pid
        assert pid is not None
    assert gone(pid)


async def test_a_killed_engine_is_replaced() -> None:
    async with running("good") as (backend, delivered):
        await delivered.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await delivered.until(wire.Ready, EngineLost, wire.Ready)
        lost = delivered.events[1]
        assert isinstance(lost, EngineLost)
        assert lost.retrying
        assert "killed by signal 9" in lost.reason
        assert backend.pid != pid
        assert backend.health().generation == 2


async def test_a_stopped_engine_falls_silent_and_is_replaced() -> None:
    async with running("good", silent_seconds=1.0) as (backend, delivered):
        await delivered.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await delivered.until(wire.Ready, EngineLost, wire.Ready)
        lost = delivered.events[1]
        assert isinstance(lost, EngineLost)
        assert "silent" in lost.reason
        assert gone(pid)


async def test_an_engine_that_hangs_with_work_to_do_is_replaced() -> None:
    async with running("hangs") as (backend, delivered):
        await delivered.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await delivered.until(wire.Ready, wire.Started, EngineLost, wire.Ready)
        lost = delivered.events[2]
        assert isinstance(lost, EngineLost)
        assert "not moved" in lost.reason


async def test_a_still_engine_without_work_is_left_alone() -> None:
    async with running("hangs") as (backend, delivered):
        await delivered.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 0, 0.5))  # the stub reports no step, but no chunk is allowed
        await asyncio.sleep(1.0)
        await delivered.until(wire.Ready, wire.Started)


async def test_an_engine_that_never_gets_ready_is_replaced() -> None:
    async with running("loads", start_seconds=0.5) as (_, delivered):
        await delivered.until(EngineLost)
        lost = delivered.events[0]
        assert isinstance(lost, EngineLost)
        assert lost.retrying
        assert "not ready" in lost.reason


async def test_loading_may_take_longer_than_a_chunk() -> None:
    async with running("loads", start_seconds=60.0) as (backend, delivered):  # it reports no step for a long time
        await asyncio.sleep(1.5)
        assert delivered.events == []
        assert backend.pid is not None


async def test_a_model_without_frames_is_refused() -> None:
    async with running("empty") as (_, delivered):
        await delivered.until(EngineLost, EngineLost, EngineLost)
        assert isinstance(delivered.events[0], EngineLost)
        assert "no room" in delivered.events[0].reason


async def test_a_crash_loop_is_given_up() -> None:
    async with running("dies") as (backend, delivered):
        await delivered.until(*[EngineLost] * MAX_FAILURES)
        lost = [event for event in delivered.events if isinstance(event, EngineLost)]
        assert [event.retrying for event in lost] == [True] * (MAX_FAILURES - 1) + [False]
        assert [event.pause for event in lost] == pytest.approx([0.02, 0.04, 0.08, 0.16, 0.32, 5.0])
        health = backend.health()
        assert not health.ready
        assert "status 7" in health.reason and "next try is in" in health.reason
        assert 0 < health.restart_in <= 5 and health.down_seconds > 0.6
        backend.send(wire.Open("a", "mini", "a ball", 1))  # dropped
        assert backend.pid is None


async def test_a_crash_loop_is_tried_again_for_ever() -> None:
    backend = LocalBackend("x", command=("/nonexistent",), backoff_seconds=(0.01, 0.02))
    await backend.start(delivered := Delivered())
    await delivered.until(*[EngineLost] * (MAX_FAILURES + 4))
    retrying = [event.retrying for event in delivered.events if isinstance(event, EngineLost)]
    assert retrying == [True] * (MAX_FAILURES - 1) + [False] * 5
    await backend.stop()


async def test_a_crash_on_every_stream_is_a_crash_loop_too() -> None:
    async with running("crashes") as (backend, delivered):
        for times in range(1, MAX_FAILURES + 1):
            await delivered.until(*(wire.Ready, wire.Started, EngineLost) * (times - 1), wire.Ready)
            backend.send(wire.Open("a", "mini", "a ball", 1))
            await delivered.until(*(wire.Ready, wire.Started, EngineLost) * times)
        assert not backend.health().ready


@pytest.mark.parametrize(
    ("behaviour", "reason"), [("no-weights", "dit.safetensors is truncated"), ("usage", "command line")]
)
async def test_nobody_waits_for_what_cannot_start_and_it_is_tried_again(behaviour: str, reason: str) -> None:
    async with running(behaviour) as (backend, delivered):
        async with asyncio.timeout(15):
            while sum(isinstance(event, EngineLost) for event in delivered.events) < 2:
                await asyncio.sleep(0.02)
        assert reason in backend.health().reason
        lost = [event for event in delivered.events if isinstance(event, EngineLost)]
        assert all(reason in event.reason and not event.retrying for event in lost)


async def test_weights_that_are_put_back_are_found(tmp_path: Path) -> None:
    """An engine that was up, died, and cannot start: without a restart of the gateway it is up again soon."""
    engine = tmp_path / "start.py"
    damaged = tmp_path / "damaged"
    stub = str(COMMAND[1])
    engine.write_text(
        "import os, runpy, sys\n"
        f"sys.argv[:2] = [{stub!r}, 'no-weights' if os.path.exists({str(damaged)!r}) else 'good']\n"
        f"runpy.run_path({stub!r}, run_name='__main__')\n"
    )
    backend = LocalBackend("x", command=(sys.executable, str(engine)), backoff_seconds=(0.02, 0.2))
    await backend.start(delivered := Delivered())
    try:
        await delivered.until(wire.Ready)
        damaged.touch()
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGKILL)
        async with asyncio.timeout(15):
            while "truncated" not in backend.health().reason:
                await asyncio.sleep(0.02)
        lost = [event for event in delivered.events if isinstance(event, EngineLost)]
        assert lost[0].retrying and backend.health().down_seconds > 0
        damaged.unlink()
        async with asyncio.timeout(15):
            while not backend.health().ready:
                await asyncio.sleep(0.02)
        assert backend.health().down_seconds == 0
    finally:
        await backend.stop()


async def test_another_protocol_is_refused() -> None:
    async with running("old") as (_, delivered):
        await delivered.until(EngineLost, EngineLost, EngineLost)
        assert isinstance(delivered.events[0], EngineLost)
        assert "protocol" in delivered.events[0].reason


async def test_a_program_that_does_not_exist() -> None:
    backend, delivered = LocalBackend("x", command=("/nonexistent",), backoff_seconds=(0.01, 0.01)), Delivered()
    await backend.start(delivered)
    await delivered.until(*[EngineLost] * 6)
    await backend.stop()


# the standby

WITH_STANDBY = {
    "standby": True,
    "standby_seconds": (0.01, 0.05),
    "silent_seconds": 30.0,
    "backoff_seconds": (60.0, 60.0),
}
"""Pauses so long that a test which waits for a restart, or for the silence limit, fails."""


async def test_a_standby_takes_over_at_once() -> None:
    async with running("good", **WITH_STANDBY) as (backend, delivered):
        await delivered.until(wire.Ready)
        first = backend.pid
        standby = await standby_of(backend)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await delivered.until(wire.Ready, EngineLost, wire.Ready)
        assert backend.pid == standby
        assert backend.health().ready
        assert backend.health().generation == 2
        lost, ready = delivered.events[1:]
        assert isinstance(lost, EngineLost) and lost.retrying
        # What the standby measured itself, at low priority beside another engine, would be five seconds.
        assert isinstance(ready, wire.Ready) and ready.models[0].chunk_seconds == 0.1
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await delivered.until(wire.Ready, EngineLost, wire.Ready, wire.Started, wire.Frames)
        assert len(delivered.pixels) == 9 * 96
        assert gone(first)
        following = await standby_of(backend)
        assert children(os.getpid()) == [standby, following]


async def test_a_stopped_engine_is_given_up_sooner_where_a_standby_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SILENT_WITH_STANDBY_SECONDS", 0.5)
    async with running("good", **WITH_STANDBY) as (backend, delivered):
        await delivered.until(wire.Ready)
        standby = await standby_of(backend)
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGSTOP)
        await delivered.until(wire.Ready, EngineLost, wire.Ready)
        assert backend.pid == standby


async def test_what_must_load_first_is_no_reason_for_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SILENT_WITH_STANDBY_SECONDS", 0.3)
    async with running("good+is cold", **WITH_STANDBY) as (backend, delivered):
        await delivered.until(wire.Ready)
        standby, pid = await standby_of(backend), backend.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.3)
        await delivered.until(wire.Ready)
        os.kill(pid, signal.SIGKILL)
        await delivered.until(wire.Ready, EngineLost, wire.Ready)
        assert backend.pid == standby


@pytest.mark.parametrize("behaviour", ["dies", "is weak", "dies waiting"])
async def test_a_standby_that_dies_is_replaced_quietly(behaviour: str, caplog: pytest.LogCaptureFixture) -> None:
    async with running(f"good+{behaviour}", **{**WITH_STANDBY, "standby_seconds": (0.01, 10.0)}) as (
        backend,
        delivered,
    ):
        await delivered.until(wire.Ready)
        pid, pauses = backend.pid, list[float]()
        async with asyncio.timeout(15):
            while len(pauses) < 4:
                await asyncio.sleep(0.02)
                pauses = [log.args[1] for log in caplog.records if "standby is lost" in log.msg]  # type: ignore[index,misc]
        assert pauses[:4] == [0.02, 0.04, 0.08, 0.16]
        assert (backend.pid, backend.health().generation) == (pid, 1)
        assert backend.health().ready
        await delivered.until(wire.Ready)  # nothing was delivered about it


async def test_a_standby_that_dies_with_the_engine_costs_no_second_death() -> None:
    async with running("good", **{**WITH_STANDBY, "backoff_seconds": (0.02, 0.05)}) as (backend, delivered):
        await delivered.until(wire.Ready)
        pids = backend.pid, await standby_of(backend)
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        await delivered.until(wire.Ready, EngineLost, wire.Ready)
        assert backend.pid not in pids
        assert backend.health().generation == 2
        assert await standby_of(backend) not in pids


@pytest.mark.parametrize("why", ["stopped", "not ready"])
async def test_a_standby_that_cannot_take_over_is_not_relied_on(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "STANDBY_FRESH_SECONDS", 0.5)
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    behaviour = "good+loads" if why == "not ready" else "good"
    async with running(behaviour, **{**WITH_STANDBY, "backoff_seconds": (0.02, 0.05)}) as (backend, delivered):
        await delivered.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
        if why == "stopped":
            standby = await standby_of(backend)
            os.kill(standby, signal.SIGSTOP)
            async with asyncio.timeout(15):
                while backend.standby_pid:
                    await asyncio.sleep(0.02)
        else:
            async with asyncio.timeout(15):
                while len(children(os.getpid())) < 2:
                    await asyncio.sleep(0.02)
            [_, standby] = children(os.getpid())
        os.kill(pid, signal.SIGKILL)
        await delivered.until(wire.Ready, EngineLost, wire.Ready)
        assert backend.pid not in (pid, standby)
        assert gone(standby)


async def test_a_crash_loop_with_standbys_is_given_up_too() -> None:
    async with running("crashes", **{**WITH_STANDBY, "backoff_seconds": (0.02, 5.0)}) as (backend, delivered):
        for times in range(1, MAX_FAILURES + 1):
            await delivered.until(*(wire.Ready, wire.Started, EngineLost) * (times - 1), wire.Ready)
            await standby_of(backend)
            backend.send(wire.Open("a", "mini", "a ball", 1))
            await delivered.until(*(wire.Ready, wire.Started, EngineLost) * times)
        lost = [event for event in delivered.events if isinstance(event, EngineLost)]
        assert [event.retrying for event in lost] == [True] * (MAX_FAILURES - 1) + [False]
        assert [event.pause for event in lost] == pytest.approx([0, 0, 0.02, 0.04, 0.08, 5.0])
        assert not backend.health().ready
        async with asyncio.timeout(15):
            while children(os.getpid()):  # none may be left after giving up
                await asyncio.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("behaviour", ["good", "good+loads"])
async def test_stopping_leaves_nothing_of_a_standby(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    async with running(behaviour, **WITH_STANDBY) as (backend, delivered):
        await delivered.until(wire.Ready)
        async with asyncio.timeout(15):
            while len(children(os.getpid())) < 2:
                await asyncio.sleep(0.01)
        if behaviour == "good":
            await standby_of(backend)
            assert len(list(tmp_path.iterdir())) == 0  # no other process may connect
    assert list(tmp_path.iterdir()) == []
    assert shared_memory() == []
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it prepares whenever it can")
async def test_a_standby_prepares_while_the_engine_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "STANDBY_TURN_SECONDS", (0.1, 0.6))

    async def stopped(standby: int, seconds: float) -> list[bool]:
        """Whether the process was stopped, sampled a hundred times a second."""
        seen = []
        for _ in range(round(100 * seconds)):
            seen.append(Path(f"/proc/{standby}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            await asyncio.sleep(0.01)
        return seen

    async with running("hangs+loads", **{**WITH_STANDBY, "hung_seconds": 30.0}) as (backend, delivered):
        await delivered.until(wire.Ready)
        async with asyncio.timeout(10):
            while len(children(os.getpid())) < 2:
                await asyncio.sleep(0.01)
        [_, standby] = children(os.getpid())
        assert not any(await stopped(standby, 0.5))
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await asyncio.sleep(0.2)
        seen = await stopped(standby, 3)
        assert sum(seen) > 0.7 * len(seen)
        assert seen.count(False) >= 3  # it still makes progress
        backend.send(wire.Close("a"))
        await asyncio.sleep(0.1)
        assert not any(await stopped(standby, 0.5))
        backend.send(wire.Open("b", "mini", "a ball", 1))
        backend.send(wire.Credit("b", 1, 0.5))
        await asyncio.sleep(0.2)
    assert gone(standby)  # even if it is stopped at the end


async def test_there_is_no_standby_unless_asked_for() -> None:
    async with running("good", standby_seconds=(0.0, 0.0)) as (backend, delivered):
        await delivered.until(wire.Ready)
        await asyncio.sleep(0.3)
        assert children(os.getpid()) == [backend.pid]


@pytest.mark.parametrize("stopped", [False, True])
async def test_engine_and_standby_go_when_the_gateway_is_killed(stopped: bool) -> None:
    code = (
        "import asyncio, sys; from server.backends.local import LocalBackend\n"
        "async def main():\n"
        f"    backend = LocalBackend('good', command={COMMAND!r}, standby=True, standby_seconds=(0.01, 0.05))\n"
        "    await backend.start(lambda event, pixels: None)\n"
        "    while not backend.standby_pid:\n"
        "        await asyncio.sleep(0.01)\n"
        "    print(backend.pid, backend.standby_pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in (await asyncio.to_thread(parent.stdout.readline)).split()]
        assert len(pids) == 2 and not any(map(gone, pids))
        if stopped:  # then they cannot notice it themselves
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.communicate()
    async with asyncio.timeout(5):
        while not all(map(gone, pids)):
            await asyncio.sleep(0.02)


async def test_the_engine_gets_its_arguments(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / "engine.py"
    script.write_text("import sys; print(sys.argv[1:], file=sys.stderr); sys.exit(2)")
    backend = LocalBackend("mini", command=(sys.executable, str(script)), threads=2, arguments=("--weights", "/w"))
    lost: list[object] = []
    await backend.start(lambda event, pixels: lost.append(event))
    async with asyncio.timeout(15):
        while not lost:
            await asyncio.sleep(0.02)
    await backend.stop()
    words = capfd.readouterr().err.splitlines()[0]
    assert "'mini', '--socket'" in words
    assert words.endswith("'--threads', '2', '--weights', '/w']")
    assert not backend.health().ready
