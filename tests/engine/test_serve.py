"""The engine process as a standby: it prepares, waits, and serves on request."""

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import zmq

from engine import assemble, options, serve, wire
from engine.checkpoints.store import StoreError
from engine.transforms.apply import Speed

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

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


@pytest.mark.parametrize(
    ("name", "says"), [("bogus", "use cpu, cuda"), ("cuda:x", "use cpu, cuda"), ("cuda:99", "torch finds")]
)
def test_a_device_that_is_not_there_is_one_sentence(name: str, says: str) -> None:
    with pytest.raises(ValueError, match=f"^--device {name} .*{says}"):
        serve.device_of(name)


def test_devices_have_torchs_names() -> None:
    assert serve.device_of("cpu").type == "cpu"
    assert serve.device_of(None).type in ("cpu", "cuda")


def test_weights_that_cannot_be_read_are_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "/locked/manifest.json")

    monkeypatch.setattr(assemble, "assemble", fail)
    given = options.parse(["mini", "--socket", "x", "--frames-fd", "3"])
    with pytest.raises(StoreError, match=r"^/locked/manifest.json cannot be read: Permission denied$"):
        serve._load(given, serve.device_of("cpu"), Speed())
