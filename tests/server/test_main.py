"""The command line, and the process as an operator sees it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from websockets.sync.client import connect

from server.__main__ import listen

ROOT = Path(__file__).parents[2]


@contextmanager
def gateway(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process once it is ready, and its address."""
    command = [sys.executable, "-m", "server", "--backend", "fake", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        ready = re.fullmatch(r"Livereel is ready: open (http://127\.0\.0\.1:\d+/)\n", line)
        assert ready, line
        yield process, ready[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_ready_line_and_orderly_end(sig: signal.Signals) -> None:
    with gateway("--drain-timeout", "0") as (process, address):
        assert httpx.get(address + "readyz").status_code == 200
        assert "Livereel" in httpx.get(address).text
        stream = httpx.post(address + "v1/streams", json={"prompt": "a very private ball"}).json()
        with connect(stream["ws_url"]) as viewer:
            viewer.recv()
            process.send_signal(sig)
            items = list(viewer)
        assert '"reason":"shutting_down"' in items[-1]
        output, log = process.communicate(timeout=10)
        assert process.returncode == 0
        assert output == ""  # nothing but the one line
        assert "private" not in log
        assert "Traceback" not in log


def of(items: list[str | bytes], type: str) -> list[dict[str, Any]]:
    """The events of this type among what a viewer got."""
    return [event for item in items if isinstance(item, str) and (event := json.loads(item))["type"] == type]


def test_sigterm_lets_streams_finish() -> None:
    with gateway("--drain-timeout", "60") as (process, address):
        stream = httpx.post(address + "v1/streams", json={"prompt": "a ball", "duration_s": 2}).json()
        with connect(stream["ws_url"], compression=None) as viewer:
            viewer.recv()
            process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(address + "readyz").status_code == 503)
            refused = httpx.post(address + "v1/streams", json={"prompt": "a ball"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["retry-after"]) > 0
            items = list(viewer)
        assert of(items, "draining")[0]["seconds"] == 60
        assert of(items, "ended")[0]["reason"] == "finished"
        assert sum(isinstance(item, bytes) for item in items) == 32
        process.communicate(timeout=30)
        assert process.returncode == 0


@pytest.mark.parametrize("insists", [None, signal.SIGTERM, signal.SIGINT])
def test_draining_has_an_end(insists: signal.Signals | None) -> None:
    with gateway("--drain-timeout", "1000" if insists else "0.5") as (process, address):
        stream = httpx.post(address + "v1/streams", json={"prompt": "an endless ball"}).json()
        queued = httpx.post(address + "v1/streams", json={"prompt": "another"}).json()
        while httpx.get(address + f"v1/streams/{queued['id']}").json()["state"] != "queued":
            queued = httpx.post(address + "v1/streams", json={"prompt": "another"}).json()
        with connect(stream["ws_url"]) as viewer, connect(queued["ws_url"]) as waiting:
            for socket_ in (viewer, waiting):
                socket_.recv()
            process.send_signal(signal.SIGTERM)
            assert of(list(waiting), "ended")[0]["reason"] == "shutting_down"  # it would wait for nothing
            if insists:
                process.send_signal(insists)
            assert of(list(viewer), "ended")[0]["reason"] == "shutting_down"
        process.communicate(timeout=30)
        assert process.returncode == 0


def until(condition: Callable[[], bool]) -> None:
    """Wait for something to become true."""
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


def test_a_connection_that_is_open_does_not_keep_it() -> None:
    with gateway() as (process, address):
        host, port = re.findall(r"//(.*):(\d+)", address)[0]
        with socket.create_connection((host, int(port))) as idle:
            idle.sendall(b"GET / HTTP/1.1\r\n")
            started = time.monotonic()
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=10)
            assert process.returncode == 0
            assert time.monotonic() - started < 8


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "server", "--backend", "fake", "--port", str(taken.getsockname()[1])]
        result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=30)
    assert result.returncode == 1
    assert result.stderr.startswith("cannot listen on 127.0.0.1:")


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
def test_a_host_that_no_name_can_be_is_one_sentence(host: str) -> None:
    with pytest.raises(OSError, match="this is no host name"):
        listen(host, 0)


def test_an_engine_that_never_comes_up_ends_the_gateway(tmp_path: Path) -> None:
    # An `engine` package that shadows the real one: it refuses its command line.
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "__init__.py").write_text(f"__path__.append({str(ROOT / 'engine')!r})")
    (tmp_path / "engine" / "__main__.py").write_text("raise SystemExit(2)")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    command = [sys.executable, "-m", "server", "--port", "0"]
    result = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=30
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert "refuses its command line" in result.stderr


def test_an_unknown_model_is_told_which_there_are() -> None:
    """The engine checks the name, but its command line is not the operator's."""
    command = [sys.executable, "-m", "server", "--port", "0", "--model", "nope"]
    result = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert (result.returncode, result.stdout) == (1, "")
    assert "there is no model 'nope': choose from causal-forcing-1.3b" in result.stderr and "mini" in result.stderr
    for word in ("usage", "--socket", "--frames-fd", "Traceback", "argument"):
        assert word not in result.stderr
