"""The command `livereel`, as a process of its own, against the real gateway with a pretended engine."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import pytest
from livereel import Client, cli

from server.auth.keys import add_key

ROOT = Path(__file__).parents[3]
ENVIRONMENT = {
    **{name: value for name, value in os.environ.items() if not name.startswith("LIVEREEL_")},
    "PYTHONPATH": str(ROOT / "clients" / "python"),
    "COLUMNS": "200",
    "BROWSER": "true",
}
Run = Callable[..., subprocess.CompletedProcess[str]]


def start(*arguments: str, url: str = "", **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "livereel", *(["--url", url] if url else []), *arguments]
    options = {"env": ENVIRONMENT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(command, **options)


@pytest.fixture
def run(running: Any, tmp_path: Path) -> Run:
    """Run a command in an empty folder, and check its exit code."""

    def run(*arguments: str, code: int = 0, url: str = running.url) -> subprocess.CompletedProcess[str]:
        process = start(*arguments, url=url, cwd=tmp_path)
        out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        assert "Traceback" not in err
        return subprocess.CompletedProcess(arguments, code, out, err)

    return run


@pytest.fixture
def client(running: Any) -> Any:
    with Client(running.url) as client:
        yield client
        for stream in client.streams():
            client.attach(stream.id).end()


def test_generate(run: Run, tmp_path: Path) -> None:
    done = run("generate", "a red ball", "-o", "out.mp4", "--seconds", "0.5", "--seed", "3")
    assert done.stdout == "out.mp4\n" and "100%" in done.stderr
    with av.open(str(tmp_path / "out.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) == 8
    video = json.loads(run("generate", "a red ball", "-o", "b.mp4", "--seconds", "0.5", "--json").stdout)
    assert (video["status"], video["file"], video["extra"]["frames"]) == ("completed", "b.mp4", 8)
    assert (tmp_path / "b.mp4").stat().st_size > 0
    listed = json.loads(run("list", "videos", "--json").stdout)
    assert video["id"] in [each["id"] for each in listed]


def test_streams_are_listed_steered_and_stopped(run: Run, client: Client) -> None:
    first, second = client.stream("a red ball"), client.stream("a green ring")
    assert [each["id"] for each in json.loads(run("list", "--json").stdout) if each["state"] != "ended"] == [
        first.id,
        second.id,
    ]
    table = run("list").stdout
    assert "a red ball" in table and second.id in table
    watcher = second.frames()
    next(watcher)
    assert run("steer", "a blue cube", "--transition", "cut").stdout.startswith(f"{second.id}: from chunk ")
    assert client.attach(second.id).prompt == "a blue cube"  # the newest stream, as none was named
    assert json.loads(run("steer", "a cone", "--stream", first.id, "--json").stdout)["prompt"] == "a cone"
    assert run("stop", first.id).stdout == f"{first.id}\n"
    assert json.loads(run("stop", "--all", "--json").stdout) == [second.id]
    assert "Error: No stream is live" in run("stop", code=1).stderr


def test_watch_opens_the_page(run: Run, client: Client) -> None:
    [address] = run("watch", "a red ball").stdout.splitlines()
    [stream] = [each for each in client.streams() if not each.over]
    assert address == f"{client.url}/overlay/{stream.id}"
    assert run("watch", "--no-browser").stdout.strip() == address
    assert "either a prompt" in run("watch", "a red ball", "--stream", stream.id, code=2).stderr


def test_watch_prints_events_or_draws(client: Client, running: Any) -> None:
    process = start("watch", "a red ball", "--json", url=running.url)
    assert process.stdout is not None
    event = json.loads(process.stdout.readline())
    assert event["type"] == "stream.started"
    client.attach(event["stream_id"]).end()
    out, err = process.communicate(timeout=30)
    assert json.loads(out.splitlines()[-1])["type"] == "ended" and process.returncode == 0, err

    process = start("watch", "a red ball", "--terminal", url=running.url)
    assert process.stdout is not None
    while "a red ball" not in process.stdout.readline():
        pass
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "\x1b[?25h" in out and "Traceback" not in err
    assert all(stream.over for stream in client.streams())


def test_record(run: Run, client: Client, running: Any, tmp_path: Path) -> None:
    stream = client.stream("a red ball")
    assert run("record", "-o", "take.mp4", "--seconds", "0.5").stdout == "take.mp4\n"
    with av.open(str(tmp_path / "take.mp4")) as film:
        assert sum(1 for _ in film.decode(video=0)) >= 8
    process = start("record", "-o", str(tmp_path / "b.webm"), "--json", url=running.url)
    deadline = time.monotonic() + 30
    while not any(each.status == "recording" and each.frames for each in stream.recordings()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    recording = json.loads(out)
    assert (recording["status"], recording["format"]) == ("completed", "webm") and (tmp_path / "b.webm").stat().st_size
    assert recording["id"] in run("list", "recordings").stdout
    assert ".mp4 or .webm" in run("record", "-o", "take.avi", code=2).stderr


def test_push(run: Run, client: Client) -> None:
    client.stream("a red ball")
    done = run("push", "rtmp://127.0.0.1:9/app/SECRET", "--wait", "0.3", code=1)
    assert "out_" in done.stdout and "goes on trying" in done.stderr and "SECRET" not in done.stdout + done.stderr
    refused = run("push", "rtmp://other.example/app/SECRET", "--json", code=4)
    assert json.loads(refused.stderr)["error"]["param"] == "url"


def test_models_and_doctor(run: Run) -> None:
    assert json.loads(run("models", "--json").stdout)[0]["id"] == "mini"
    assert "64x48" in run("models").stdout
    assert "FAILED" not in run("doctor").stdout
    assert {check["name"] for check in json.loads(run("doctor", "--json").stdout)} >= {"server", "engine", "model mini"}


def test_errors_say_what_to_do(run: Run, tmp_path: Path) -> None:
    away = "http://127.0.0.1:9"
    assert "is it running" in run("models", code=3, url=away).stderr
    assert json.loads(run("models", "--json", code=3, url=away).stderr)["error"]["code"] == "unreachable"
    assert "FAILED server" in run("doctor", code=1, url=away).stdout
    assert "URL must be such as" in run("models", code=1, url="localhost").stderr
    refused = json.loads(run("generate", " ", "--json", code=1).stderr)["error"]
    assert refused["code"] == "prompt_empty" and refused["param"] == "prompt" and refused["request_id"]
    assert "no/out.mp4" not in run("generate", "a red ball", "-o", "no/out.mp4", code=1).stdout
    assert "is a folder" in run("generate", "a red ball", "-o", str(tmp_path), code=1).stderr
    assert run("generate", "a red ball", "--seconds", "0", code=2).stderr
    assert run("steer", code=2).stderr
    for command in ("serve", "download"):
        assert "The server is not here" in run(command, code=1).stderr


def test_keys(run_gateway_thread: Any, run: Run, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.toml", "studio", "studio", ["control"], 4, 1000)
    with run_gateway_thread(keys=tmp_path / "keys.toml") as running:
        assert "LIVEREEL_API_KEY" in run("models", code=4, url=running.url).stderr
        assert "mini" in run("--api-key", key, "models", url=running.url).stdout
        address = run("--api-key", key, "watch", "a red ball", "--no-browser", url=running.url).stdout.strip()
        assert "?token=" in address and key not in address


@pytest.mark.parametrize(("command", "option"), [("serve", "--queue-limit"), ("download", "--keep")])
def test_server_and_engine_run_with_their_own_options(command: str, option: str) -> None:
    process = start(command, "--help", cwd=ROOT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and option in out


def test_completion_and_help(run: Run) -> None:
    environment = {**ENVIRONMENT, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell in ("bash", "zsh", "fish"):
        out, err = start("--show-completion", shell, env=environment).communicate(timeout=30)
        assert "complet" in out and not err
    assert "Exit codes" in run("--help").stdout and run("--version").stdout == "0.1.0\n"


def test_every_command_has_json() -> None:
    for command in cli.app.registered_commands:
        assert command.callback is not None
        assert command.callback.__name__ in ("serve", "download") or "json" in command.callback.__annotations__
        assert command.callback.__doc__


@pytest.mark.parametrize(("status", "code"), [(400, 1), (401, 4), (403, 4), (404, 1), (429, 5), (500, 1), (503, 5)])
def test_exit_codes(status: int, code: int) -> None:
    assert cli.exit_code(cli.livereel.errors.api_error(status, None, {})) == code
