"""A spare prepares in nobody's way, waits, and serves when it is told to."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from engine import wire
from engine.standby import EXPENDABLE, aside

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_work_aside_returns_and_raises_as_it_would_here() -> None:
    assert aside(lambda: 7) == 7
    with pytest.raises(SystemExit, match="3"):
        aside(lambda: sys.exit(3))


@linux
def test_work_aside_has_the_lowest_priority_and_so_have_its_threads() -> None:
    def work() -> list[int]:
        found = [os.sched_getscheduler(0)]
        helper = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        helper.start()
        helper.join()
        return found

    before = os.sched_getscheduler(0)
    assert aside(work) == [os.SCHED_IDLE, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == before


@linux
def test_what_is_expendable_is_so_for_a_while() -> None:
    # In a process and session of its own, as an engine is.
    code = (
        "from pathlib import Path; from engine.standby import expendable\n"
        "files = [Path('/proc/self', name) for name in ('oom_score_adj', 'autogroup')]\n"
        "def show(): print(*(file.read_text().strip() for file in files if file.exists()))\n"
        "show()\n"
        "with expendable(): show()\n"
        "show()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True
    )
    before, meanwhile, after = (line.split() for line in run.stdout.splitlines())
    assert after == before
    assert int(meanwhile[0]) == min(1000, int(before[0]) + EXPENDABLE)
    if len(before) > 1:  # the kernel groups processes by session: "/autogroup-7 nice 0"
        assert (before[-1], meanwhile[-1]) == ("0", "19")


AT_ITS_OWN_PRIORITY = """
import sys
from engine import __main__, standby as spare
spare._give_way = lambda: None
sys.exit(__main__.main())
"""
"""The program, but that it gives no way, which takes minutes on a busy machine. Our session it leaves alone anyhow."""


@contextmanager
def spare(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], "zmq.Socket[bytes]", int]]:
    """The real program as a spare, our end of its socket, and the memory for its frames."""
    with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
        socket.setsockopt(zmq.LINGER, 0)
        address = f"ipc://{folder}/engine.sock"
        socket.bind(address)
        memory = os.memfd_create("test")
        command = [sys.executable, "-c", AT_ITS_OWN_PRIORITY, "mini", "--spare", "--threads", "1", "--socket", address]
        ours = ["--frames-fd", str(memory), "--parent-pid", str(os.getpid())]
        root = Path(__file__).parents[2]
        process = subprocess.Popen([*command, *ours, *options], pass_fds=(memory,), cwd=root, stderr=subprocess.PIPE)
        try:
            yield process, socket, memory
        finally:
            process.kill()
            process.communicate()
            os.close(memory)


def next_of(socket: "zmq.Socket[bytes]") -> wire.Message:
    """The next message that is no heartbeat."""
    while True:
        assert socket.poll(120_000), "nothing came"
        message = wire.decode_to_gateway(socket.recv())
        if not isinstance(message, wire.Heartbeat):
            return message


@linux
def test_a_spare_on_a_cpu_is_warm_when_it_is_wanted(tmp_path: Path) -> None:
    with spare(tmp_path) as (process, socket, memory):
        assert next_of(socket) == wire.Waiting(warm=True)
        score = Path(f"/proc/{process.pid}/oom_score_adj")
        assert int(score.read_text()) > int(Path("/proc/self/oom_score_adj").read_text())
        socket.send(wire.encode(wire.Open("early", "mini", "a ball", 1)))  # it is not the one to serve yet
        socket.send(wire.encode(wire.Serve()))
        ready = next_of(socket)
        assert isinstance(ready, wire.Ready) and ready.pid == process.pid
        assert score.read_text() == Path("/proc/self/oom_score_adj").read_text()
        [info] = ready.models
        slot_bytes = info.chunk_frames * info.height * info.width * 3
        os.ftruncate(memory, wire.Ring.bytes_for(2, slot_bytes))
        for message in (wire.Layout(2, slot_bytes), wire.Open("s", "mini", "a red ball", 1), wire.Credit("s", 1, 0.5)):
            socket.send(wire.encode(message))
        assert next_of(socket) == wire.Started("s")
        frames = next_of(socket)
        assert isinstance(frames, wire.Frames) and frames.frames == info.first_chunk_frames
        socket.send(wire.encode(wire.Shutdown()))
        assert process.wait(20) == 0


@linux
def test_a_spare_elsewhere_leaves_the_device_alone(tmp_path: Path) -> None:
    # `meta` stands for a GPU. The weights are not even looked for while it waits.
    with spare(tmp_path, "--device", "meta", "--weights", "/nowhere") as (process, socket, _):
        assert next_of(socket) == wire.Waiting(warm=False)
        socket.send(wire.encode(wire.Shutdown()))
        assert process.wait(20) == 0


@linux
def test_what_it_lacks_is_told_when_it_is_to_serve(tmp_path: Path) -> None:
    with spare(tmp_path, "--device", "meta", "--weights", "/nowhere") as (process, socket, _):
        assert next_of(socket) == wire.Waiting(warm=False)
        socket.send(wire.encode(wire.Serve()))
        fault = next_of(socket)
        assert isinstance(fault, wire.Fault) and fault.code == "weights"
        assert process.wait(20) == 3
