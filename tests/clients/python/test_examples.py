"""Every program in `examples/`, against a real server with `mini`."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from tests.server.egress.harness import LISTENER, SECRET

EXAMPLES = Path(__file__).parents[3] / "examples"


@pytest.fixture
def run(real_server: dict[str, str], tmp_path: Path) -> Any:
    """Run an example in an empty folder; returns what it printed."""

    def run(name: str, *arguments: str, lines: str = "") -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-W", "ignore:The Sora API", str(EXAMPLES / f"{name}.py"), *arguments],
            cwd=tmp_path, env=real_server, input=lines, capture_output=True, text=True, timeout=90, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_chat_steers(run: Any) -> None:
    chat = "ann: a blue cube on snow\nbob: blood and gore\nno wish\n"
    out = run("chat_steers", "a red ball on grass", "--seconds", "3", "--pause", "0.1", lines=chat)
    assert "/overlay/" in out and re.findall(r".* gets: .*", out) == ["ann gets: a blue cube on snow"]


def test_real_time_factor(run: Any, tmp_path: Path) -> None:
    chunks = re.search(r"(\d+) chunks, mean factor (\d+\.\d+)", run("real_time_factor", "a red ball", "--seconds", "3"))
    assert chunks and int(chunks[1]) >= 3 and float(chunks[2]) > 0
    assert "<polyline" in (tmp_path / "factor.svg").read_text()


def test_motion(run: Any, tmp_path: Path) -> None:
    out = run("motion", "a red ball bouncing on grass", "--seconds", "1.5")
    assert out.count(" s ") >= 10 and "most changed" in out
    with Image.open(tmp_path / "liveliest.png") as picture:
        assert picture.size == (256, 256)


def test_restream_rtmp(run: Any, real_server: dict[str, str]) -> None:
    url = f"rtmp://127.0.0.1:{real_server['RTMP_PORT']}/live/{SECRET}"
    listener = subprocess.Popen([sys.executable, "-c", LISTENER, url, "16"], stdout=subprocess.PIPE, text=True)
    try:
        out = run("restream_rtmp", url, "a red ball on grass", "a blue cube on snow", "--every", "2")
        got = json.loads(listener.communicate(timeout=60)[0].splitlines()[-1])
    finally:
        listener.kill()
        listener.wait()
    assert "output live" in out and "now: a blue cube on snow" in out and SECRET not in out
    assert got["size"] == [256, 256] and len(got["frames"]) == 16


def test_batch_openai(run: Any, tmp_path: Path) -> None:
    out = run("batch_openai", "--seconds", "1", lines="a red ball on grass\n\na blue cube on snow\n")
    assert sorted(out.split()) == ["clips/001.mp4", "clips/002.mp4"]
    for path in (tmp_path / "clips").iterdir():
        with av.open(str(path)) as film:
            assert sum(1 for _ in film.decode(video=0)) == 16


def test_every_example_is_listed_and_run() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == set(re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text()))
    assert {f"test_{name.removesuffix('.py')}" for name in names} <= set(globals())
