"""Supervision of a real child process that plays the engine, well and badly."""

import asyncio
import contextlib
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from engine import wire
from server.backends import local, process
from server.backends.base import EngineEvent, Lost
from server.backends.local import LocalBackend
from server.bench.gateway import children

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[3]
COMMAND = (sys.executable, str(Path(__file__).parents[1] / "stub_engine.py"))


@pytest.fixture(autouse=True)
def import_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


class Heard:
    """What the backend delivered."""

    def __init__(self) -> None:
        self.events: list[EngineEvent] = []
        self.pixels = b""
        self._news = asyncio.Event()

    def __call__(self, event: EngineEvent, pixels: bytes) -> None:
        if not isinstance(event, wire.Heartbeat):
            self.events.append(event)
        self.pixels = pixels or self.pixels
        self._news.set()

    async def until(self, *types: type) -> None:
        """Wait for exactly these events, in this order."""
        async with asyncio.timeout(15):
            while len(self.events) < len(types):
                self._news.clear()
                await self._news.wait()
        assert [type(event) for event in self.events] == list(types)


@asynccontextmanager
async def engine(behaviour: str, **options: object) -> AsyncIterator[tuple[LocalBackend, Heard]]:
    settings = {"silent_seconds": 5.0, "hung_seconds": 0.5, "backoff_seconds": (0.02, 0.05), **options}
    backend, heard = LocalBackend(behaviour, command=COMMAND, **settings), Heard()
    await backend.start(heard)
    try:
        yield backend, heard
    finally:
        await backend.stop()
        assert backend.pid is None
        assert children(os.getpid()) == []


async def spare_of(backend: LocalBackend) -> int:
    """The process id of the spare, once it waits."""
    async with asyncio.timeout(15):
        while (pid := backend.spare_pid) is None:
            await asyncio.sleep(0.01)
    return pid


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


async def test_a_stream_there_and_back() -> None:
    async with engine("good", threads=3) as (backend, heard):
        assert not backend.health().ready
        await heard.until(wire.Ready)
        ready = heard.events[0]
        assert isinstance(ready, wire.Ready)
        assert ready.models[0].description == "3 threads"
        assert backend.health().ready
        assert backend.health().generation == 1
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await heard.until(wire.Ready, wire.Started, wire.Frames)
        assert heard.pixels == b"".join(bytes((frame + k) % 256 for k in range(96)) for frame in range(9))
        backend.send(wire.Close("a"))
        await heard.until(wire.Ready, wire.Started, wire.Frames, wire.Ended)
        pid = backend.pid
        assert pid is not None
    assert gone(pid)


async def test_the_socket_is_private_and_tidied_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    async with engine("loads"):
        async with asyncio.timeout(10):
            while not list(tmp_path.glob("*/*")):
                await asyncio.sleep(0.01)
        (directory,) = tmp_path.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert [path.name for path in directory.iterdir()] == ["engine.sock"]
    assert list(tmp_path.iterdir()) == []
    async with engine("good") as (_, heard):
        await heard.until(wire.Ready)
        assert list(tmp_path.iterdir()) == []  # nobody else is to connect


async def test_garbage_is_dropped_and_the_rest_still_counts(caplog: pytest.LogCaptureFixture) -> None:
    async with engine("garbage") as (backend, heard):
        await heard.until(wire.Ready)
        assert caplog.text.count("malformed") == 7
        assert backend.health().ready


async def test_a_killed_engine_is_replaced() -> None:
    async with engine("good") as (backend, heard):
        await heard.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await heard.until(wire.Ready, Lost, wire.Ready)
        lost = heard.events[1]
        assert isinstance(lost, Lost)
        assert lost.retrying
        assert "killed by signal 9" in lost.reason
        assert backend.pid != pid
        assert backend.health().generation == 2


async def test_a_stopped_engine_falls_silent_and_is_replaced() -> None:
    async with engine("good", silent_seconds=1.0) as (backend, heard):
        await heard.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await heard.until(wire.Ready, Lost, wire.Ready)
        lost = heard.events[1]
        assert isinstance(lost, Lost)
        assert "silent" in lost.reason
        assert gone(pid)


async def test_an_engine_that_hangs_with_work_to_do_is_replaced() -> None:
    async with engine("hangs") as (backend, heard):
        await heard.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await heard.until(wire.Ready, wire.Started, Lost, wire.Ready)
        lost = heard.events[2]
        assert isinstance(lost, Lost)
        assert "not moved" in lost.reason


async def test_a_still_engine_without_work_is_left_alone() -> None:
    async with engine("hangs") as (backend, heard):
        await heard.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 0, 0.5))  # the clock of the stub stands still, but nothing is allowed
        await asyncio.sleep(1.0)
        await heard.until(wire.Ready, wire.Started)


async def test_an_engine_that_never_gets_ready_is_replaced() -> None:
    async with engine("loads", start_seconds=0.5) as (_, heard):
        await heard.until(Lost)
        lost = heard.events[0]
        assert isinstance(lost, Lost)
        assert lost.retrying
        assert "not ready" in lost.reason


async def test_loading_may_take_longer_than_a_chunk() -> None:
    async with engine("loads", start_seconds=60.0) as (backend, heard):  # it says that it has not moved for long
        await asyncio.sleep(1.5)
        assert heard.events == []
        assert backend.pid is not None


@pytest.mark.parametrize("behaviour", ["stale", "overwrites", "no-slot"])
async def test_a_slot_that_does_not_hold_what_was_announced_is_never_shown(behaviour: str) -> None:
    async with engine(behaviour) as (backend, heard):
        await heard.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await heard.until(wire.Ready, wire.Started, wire.Fault, wire.Ended)
        assert heard.events[2] == wire.Fault("chunk_damaged", "a chunk was damaged on its way", "a")
        assert heard.pixels == b""
        assert backend.health().ready


async def test_slots_are_given_back() -> None:
    chunks = 5 * process.SLOTS
    async with engine("good") as (backend, heard):
        await heard.until(wire.Ready)
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", chunks, 0.5))
        await heard.until(wire.Ready, wire.Started, *[wire.Frames] * chunks)
        frames = [event for event in heard.events if isinstance(event, wire.Frames)]
        assert [frame.chunk for frame in frames] == list(range(chunks))
        assert {frame.slot for frame in frames} <= set(range(process.SLOTS))
        assert [frame.generation for frame in frames] == list(range(1, chunks + 1))


async def test_a_model_without_frames_is_refused() -> None:
    async with engine("empty") as (_, heard):
        await heard.until(Lost, Lost, Lost)
        assert isinstance(heard.events[0], Lost)
        assert "no room" in heard.events[0].reason


def shared() -> list[str]:
    """Every trace of shared memory: files by name, and what this process has open or mapped."""
    names = [path.name for path in Path("/dev/shm").iterdir() if "livereel" in path.name]
    seen = Path("/proc/self/maps").read_text().splitlines()
    for path in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the one that lists them
            seen.append(os.readlink(path))
    return names + [line for line in seen if "livereel-frames" in line]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
async def test_no_memory_is_left_behind_by_engines_that_are_killed() -> None:
    async with engine("good", breaker_seconds=0.001) as (backend, heard):
        for times in range(1, 6):
            await heard.until(*(wire.Ready, wire.Started, wire.Frames, Lost) * (times - 1), wire.Ready)
            backend.send(wire.Open("a", "mini", "a ball", 1))
            backend.send(wire.Credit("a", 1, 0.5))
            await heard.until(
                *(wire.Ready, wire.Started, wire.Frames, Lost) * (times - 1), wire.Ready, wire.Started, wire.Frames
            )
            assert len(shared()) == 3  # this process's descriptor, the mapping's own, and the mapping
            assert backend.pid is not None
            os.kill(backend.pid, signal.SIGKILL)
    assert shared() == []


async def test_a_crash_loop_is_given_up() -> None:
    async with engine("dies") as (backend, heard):
        await heard.until(Lost, Lost, Lost)
        assert [event.retrying for event in heard.events if isinstance(event, Lost)] == [True, True, False]
        assert not backend.health().ready
        assert "status 7" in backend.health().reason
        backend.send(wire.Open("a", "mini", "a ball", 1))  # goes nowhere, and does no harm
        assert backend.pid is None


async def test_a_crash_loop_is_tried_again_after_a_quiet_time() -> None:
    backend = LocalBackend("x", command=("/nonexistent",), backoff_seconds=(0.01, 0.01), breaker_seconds=0.5)
    await backend.start(heard := Heard())
    await heard.until(Lost, Lost, Lost)
    assert "given up" in backend.health().reason
    await heard.until(*[Lost] * 6)
    assert [event.retrying for event in heard.events if isinstance(event, Lost)] == [True, True, False] * 2
    await backend.stop()


async def test_a_crash_on_every_stream_is_a_crash_loop_too() -> None:
    async with engine("crashes") as (backend, heard):
        for times in range(1, 4):
            await heard.until(*(wire.Ready, wire.Started, Lost) * (times - 1), wire.Ready)
            backend.send(wire.Open("a", "mini", "a ball", 1))
            await heard.until(*(wire.Ready, wire.Started, Lost) * times)
        assert not backend.health().ready


@pytest.mark.parametrize(
    ("behaviour", "reason"), [("no-weights", "dit.safetensors is truncated"), ("usage", "command line")]
)
async def test_what_cannot_get_better_is_not_tried_again(behaviour: str, reason: str) -> None:
    async with engine(behaviour) as (backend, heard):
        async with asyncio.timeout(15):
            while not any(isinstance(event, Lost) for event in heard.events):
                await asyncio.sleep(0.02)
        lost = heard.events[-1]
        assert isinstance(lost, Lost)
        assert not lost.retrying
        assert reason in backend.health().reason


async def test_another_protocol_is_refused() -> None:
    async with engine("old") as (_, heard):
        await heard.until(Lost, Lost, Lost)
        assert isinstance(heard.events[0], Lost)
        assert "protocol" in heard.events[0].reason


async def test_a_program_that_does_not_exist() -> None:
    backend, heard = LocalBackend("x", command=("/nonexistent",), backoff_seconds=(0.01, 0.01)), Heard()
    await backend.start(heard)
    await heard.until(Lost, Lost, Lost)
    await backend.stop()


async def test_stopping_does_not_wait_for_a_stubborn_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    async with engine("stubborn") as (backend, heard):
        await heard.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
    assert gone(pid)


# the spare

SPARED = {"spare": True, "spare_seconds": (0.01, 0.05), "silent_seconds": 30.0, "backoff_seconds": (60.0, 60.0)}
"""Whoever waits for a restart, or for ten seconds of silence, fails."""


async def test_a_spare_takes_over_at_once() -> None:
    async with engine("good", **SPARED) as (backend, heard):
        await heard.until(wire.Ready)
        first = backend.pid
        spare = await spare_of(backend)
        assert first is not None
        os.kill(first, signal.SIGKILL)
        await heard.until(wire.Ready, Lost, wire.Ready)
        assert backend.pid == spare
        assert backend.health().ready
        assert backend.health().generation == 2
        lost, ready = heard.events[1:]
        assert isinstance(lost, Lost) and lost.retrying
        # What it measured itself, at low priority and beside another engine, would be five seconds.
        assert isinstance(ready, wire.Ready) and ready.models[0].chunk_seconds == 0.1
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await heard.until(wire.Ready, Lost, wire.Ready, wire.Started, wire.Frames)
        assert len(heard.pixels) == 9 * 96
        assert gone(first)
        following = await spare_of(backend)
        assert children(os.getpid()) == [spare, following]


async def test_a_stopped_engine_is_given_up_sooner_where_a_spare_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SPARED_SILENT_SECONDS", 0.5)
    async with engine("good", **SPARED) as (backend, heard):
        await heard.until(wire.Ready)
        spare = await spare_of(backend)
        assert backend.pid is not None
        os.kill(backend.pid, signal.SIGSTOP)
        await heard.until(wire.Ready, Lost, wire.Ready)
        assert backend.pid == spare


async def test_what_must_load_first_is_no_reason_for_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "SPARED_SILENT_SECONDS", 0.3)
    async with engine("good+is cold", **SPARED) as (backend, heard):
        await heard.until(wire.Ready)
        spare, pid = await spare_of(backend), backend.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(1.2)
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.3)
        await heard.until(wire.Ready)
        os.kill(pid, signal.SIGKILL)
        await heard.until(wire.Ready, Lost, wire.Ready)
        assert backend.pid == spare


@pytest.mark.parametrize("behaviour", ["dies", "is weak", "dies waiting"])
async def test_a_spare_that_dies_is_replaced_quietly(behaviour: str, caplog: pytest.LogCaptureFixture) -> None:
    async with engine(f"good+{behaviour}", **{**SPARED, "spare_seconds": (0.01, 10.0)}) as (backend, heard):
        await heard.until(wire.Ready)
        pid, pauses = backend.pid, list[float]()
        async with asyncio.timeout(15):
            while len(pauses) < 4:
                await asyncio.sleep(0.02)
                pauses = [log.args[1] for log in caplog.records if "spare is lost" in log.msg]  # type: ignore[index,misc]
        assert pauses[:4] == [0.02, 0.04, 0.08, 0.16]
        assert (backend.pid, backend.health().generation) == (pid, 1)
        assert backend.health().ready
        await heard.until(wire.Ready)  # nobody else has heard of it


async def test_a_spare_that_dies_with_the_engine_costs_no_second_death() -> None:
    async with engine("good", **{**SPARED, "backoff_seconds": (0.02, 0.05)}) as (backend, heard):
        await heard.until(wire.Ready)
        pids = backend.pid, await spare_of(backend)
        for pid in pids:
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
        await heard.until(wire.Ready, Lost, wire.Ready)
        assert backend.pid not in pids
        assert backend.health().generation == 2
        assert await spare_of(backend) not in pids


@pytest.mark.parametrize("why", ["stopped", "not ready"])
async def test_a_spare_that_cannot_take_over_is_not_relied_on(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "FRESH_SECONDS", 0.5)
    monkeypatch.setattr(process, "STOP_SECONDS", 0.2)
    behaviour = "good+loads" if why == "not ready" else "good"
    async with engine(behaviour, **{**SPARED, "backoff_seconds": (0.02, 0.05)}) as (backend, heard):
        await heard.until(wire.Ready)
        pid = backend.pid
        assert pid is not None
        if why == "stopped":
            spare = await spare_of(backend)
            os.kill(spare, signal.SIGSTOP)
            async with asyncio.timeout(15):
                while backend.spare_pid:
                    await asyncio.sleep(0.02)
        else:
            async with asyncio.timeout(15):
                while len(children(os.getpid())) < 2:
                    await asyncio.sleep(0.02)
            [_, spare] = children(os.getpid())
        os.kill(pid, signal.SIGKILL)
        await heard.until(wire.Ready, Lost, wire.Ready)
        assert backend.pid not in (pid, spare)
        assert gone(spare)


async def test_with_spares_a_crash_loop_is_one_all_the_same() -> None:
    async with engine("crashes", **SPARED) as (backend, heard):
        for times in range(1, 4):
            await heard.until(*(wire.Ready, wire.Started, Lost) * (times - 1), wire.Ready)
            await spare_of(backend)
            backend.send(wire.Open("a", "mini", "a ball", 1))
            await heard.until(*(wire.Ready, wire.Started, Lost) * times)
        assert [event.retrying for event in heard.events if isinstance(event, Lost)] == [True, True, False]
        assert not backend.health().ready
        async with asyncio.timeout(15):
            while children(os.getpid()):  # what is given up leaves none
                await asyncio.sleep(0.02)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("behaviour", ["good", "good+loads"])
async def test_stopping_leaves_nothing_of_a_spare(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process.tempfile, "tempdir", str(tmp_path))
    before = len(os.listdir("/proc/self/fd"))
    async with engine(behaviour, **SPARED) as (backend, heard):
        await heard.until(wire.Ready)
        async with asyncio.timeout(15):
            while len(children(os.getpid())) < 2:
                await asyncio.sleep(0.01)
        if behaviour == "good":
            await spare_of(backend)
            assert len(list(tmp_path.iterdir())) == 0  # nobody else is to connect to it
    assert list(tmp_path.iterdir()) == []
    assert shared() == []
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it prepares whenever it can")
async def test_a_spare_prepares_while_the_engine_has_nothing_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ASIDE_SECONDS", (0.1, 0.6))

    async def still(spare: int, seconds: float) -> list[bool]:
        """Whether it stood still, a hundred times a second."""
        seen = []
        for _ in range(round(100 * seconds)):
            seen.append(Path(f"/proc/{spare}/stat").read_text().rpartition(")")[2].split()[0] == "T")
            await asyncio.sleep(0.01)
        return seen

    async with engine("hangs+loads", **{**SPARED, "hung_seconds": 30.0}) as (backend, heard):
        await heard.until(wire.Ready)
        async with asyncio.timeout(10):
            while len(children(os.getpid())) < 2:
                await asyncio.sleep(0.01)
        [_, spare] = children(os.getpid())
        assert not any(await still(spare, 0.5))
        backend.send(wire.Open("a", "mini", "a ball", 1))
        backend.send(wire.Credit("a", 1, 0.5))
        await asyncio.sleep(0.2)
        seen = await still(spare, 3)
        assert sum(seen) > 0.7 * len(seen)
        assert seen.count(False) >= 3  # it gets on all the same
        backend.send(wire.Close("a"))
        await asyncio.sleep(0.1)
        assert not any(await still(spare, 0.5))
        backend.send(wire.Open("b", "mini", "a ball", 1))
        backend.send(wire.Credit("b", 1, 0.5))
        await asyncio.sleep(0.2)
    assert gone(spare)  # even when it stands still at the end


async def test_there_is_no_spare_unless_asked_for() -> None:
    async with engine("good", spare_seconds=(0.0, 0.0)) as (backend, heard):
        await heard.until(wire.Ready)
        await asyncio.sleep(0.3)
        assert children(os.getpid()) == [backend.pid]


@pytest.mark.parametrize("stopped", [False, True])
async def test_engine_and_spare_go_when_the_gateway_is_killed(stopped: bool) -> None:
    code = (
        "import asyncio, sys; from server.backends.local import LocalBackend\n"
        "async def main():\n"
        f"    backend = LocalBackend('good', command={COMMAND!r}, spare=True, spare_seconds=(0.01, 0.05))\n"
        "    await backend.start(lambda event, pixels: None)\n"
        "    while not backend.spare_pid:\n"
        "        await asyncio.sleep(0.01)\n"
        "    print(backend.pid, backend.spare_pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert parent.stdout is not None
        pids = [int(pid) for pid in (await asyncio.to_thread(parent.stdout.readline)).split()]
        assert len(pids) == 2 and not any(map(gone, pids))
        if stopped:  # they cannot see to it themselves
            for pid in pids:
                os.kill(pid, signal.SIGSTOP)
    finally:
        parent.kill()
        parent.communicate()
    async with asyncio.timeout(5):
        while not all(map(gone, pids)):
            await asyncio.sleep(0.02)
