"""A standby prepares without slowing others down, waits, and serves on request."""

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
from engine.standby import OOM_SCORE, run_at_idle_priority

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_work_at_idle_priority_returns_and_raises() -> None:
    assert run_at_idle_priority(lambda: 7) == 7
    with pytest.raises(SystemExit, match="3"):
        run_at_idle_priority(lambda: sys.exit(3))


@linux
def test_idle_priority_covers_the_threads_that_work_starts() -> None:
    def work() -> list[int]:
        found = [os.sched_getscheduler(0)]
        helper = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        helper.start()
        helper.join()
        return found

    before = os.sched_getscheduler(0)
    assert run_at_idle_priority(work) == [os.SCHED_IDLE, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == before


@linux
def test_low_priority_of_the_process_ends_with_the_context() -> None:
    # In a process and session of its own, as an engine is.
    code = (
        "from pathlib import Path; from engine.standby import low_priority_process\n"
        "files = [Path('/proc/self', name) for name in ('oom_score_adj', 'autogroup')]\n"
        "def show(): print(*(file.read_text().strip() for file in files if file.exists()))\n"
        "show()\n"
        "with low_priority_process(): show()\n"
        "show()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True
    )
    before, meanwhile, after = (line.split() for line in run.stdout.splitlines())
    assert after == before
    assert int(meanwhile[0]) == min(1000, int(before[0]) + OOM_SCORE)
    if len(before) > 1:  # the kernel groups processes by session: "/autogroup-7 nice 0"
        assert (before[-1], meanwhile[-1]) == ("0", "19")


AT_ITS_OWN_PRIORITY = """
import sys
from engine import __main__, standby
standby._set_idle_priority = lambda: None
sys.exit(__main__.main())
"""
"""The program without the idle priority, at which it takes minutes on a busy machine. Only a session's leader changes
the session's priority, and it is none."""


@contextmanager
def standby(folder: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], "zmq.Socket[bytes]", int]]:
    """The real program as a standby, our end of its socket, and the memory for its frames."""
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
def test_a_standby_on_a_cpu_is_warm_before_it_serves(tmp_path: Path) -> None:
    with standby(tmp_path) as (process, socket, memory):
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
def test_a_standby_on_a_gpu_puts_nothing_there(tmp_path: Path) -> None:
    # `meta` stands for a GPU. The weights are not even looked for while it waits.
    with standby(tmp_path, "--device", "meta", "--weights", "/nowhere") as (process, socket, _):
        assert next_of(socket) == wire.Waiting(warm=False)
        socket.send(wire.encode(wire.Shutdown()))
        assert process.wait(20) == 0


@linux
def test_missing_weights_are_reported_when_it_is_to_serve(tmp_path: Path) -> None:
    with standby(tmp_path, "--device", "meta", "--weights", "/nowhere") as (process, socket, _):
        assert next_of(socket) == wire.Waiting(warm=False)
        socket.send(wire.encode(wire.Serve()))
        fault = next_of(socket)
        assert isinstance(fault, wire.Fault) and fault.code == "weights"
        assert process.wait(20) == 3
