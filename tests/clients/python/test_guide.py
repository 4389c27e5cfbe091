"""The client against a real server with `mini`: the command makes a film, and every block of the guide runs."""

import re
import subprocess
import sys
from pathlib import Path

import av
import pytest

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "python-sdk.md").read_text()
BLOCKS = re.findall(r"(?ms)^```python\n(.*?)^```", GUIDE)
COMMANDS = [line for block in re.findall(r"(?ms)^```console\n(.*?)^```", GUIDE) for line in block.splitlines()]


def run(command: list[str], real_server: dict[str, str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, env=real_server, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def frames(path: Path) -> int:
    with av.open(str(path)) as film:
        return sum(1 for _ in film.decode(video=0))


@pytest.mark.parametrize("block", BLOCKS, ids=[f"block {number}" for number in range(1, len(BLOCKS) + 1)])
def test_every_block_of_the_guide_runs(block: str, real_server: dict[str, str], tmp_path: Path) -> None:
    run([sys.executable, "-W", "error", "-c", block], real_server, tmp_path)
    for film in tmp_path.glob("*.mp4"):
        assert frames(film) >= 8


def test_every_command_of_the_guide_runs(real_server: dict[str, str], tmp_path: Path) -> None:
    assert len(COMMANDS) > 5
    for line in COMMANDS:
        command = re.fullmatch(r"\$ livereel (.*)", line)
        assert command, line
        arguments = re.findall(r'"[^"]*"|\S+', command[1])
        run([sys.executable, "-m", "livereel", *(each.strip('"') for each in arguments)], real_server, tmp_path)
    assert frames(tmp_path / "cube.mp4") == 32
    assert frames(tmp_path / "take.mp4") >= 8


def test_the_guide_has_its_blocks() -> None:
    assert len(BLOCKS) >= 6
