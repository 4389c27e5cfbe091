"""The package: what it needs, what importing it loads, its types as a user's program sees them."""

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
SDK = ROOT / "clients" / "python"
PROJECT: dict[str, Any] = tomllib.loads((SDK / "pyproject.toml").read_text())["project"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(SDK), "MYPYPATH": str(SDK)}


def needed(requirement: str, found: set[str]) -> None:
    """Add a requirement and what it needs in turn, without extras."""
    name = re.match(r"[\w.-]+", requirement)
    assert name
    if name[0].lower() in found:
        return
    try:
        distribution = importlib.metadata.distribution(name[0])
    except importlib.metadata.PackageNotFoundError:
        return  # for another Python or system
    found.add(name[0].lower())
    for each in distribution.requires or []:
        if "extra ==" not in each:
            needed(each, found)


def test_an_installation_is_small() -> None:
    found: set[str] = set()
    for each in PROJECT["dependencies"]:
        needed(each, found)
    assert {"httpx", "websockets", "typer", "rich"} <= found
    assert not found & {"torch", "fastapi", "starlette", "uvicorn", "numpy", "pillow", "av", "aiortc"}
    assert len(found) < 25, found


def test_importing_loads_only_the_package_and_the_standard_library() -> None:
    """Import takes 0.1 s so; httpx alone would take 0.2 s more."""
    code = "import sys; before = set(sys.modules); import livereel; print(*sorted(set(sys.modules) - before))"
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    loaded = {name.split(".")[0] for name in done.stdout.split()} - set(sys.stdlib_module_names)
    assert loaded == {"livereel"}


def test_versions_agree() -> None:
    import livereel

    server = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert livereel.__version__ == PROJECT["version"] == server["version"]
    assert PROJECT["license"] == server["license"] and (SDK / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


PROGRAM = """
import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import assert_type

from livereel import AsyncClient, AsyncStream, Client, Event, Frame, Matte, Recording, Stream, StreamInfo, Video, events


def synchronous() -> None:
    with Client("http://localhost:8000", api_key="key") as client, client.stream("a ball", seed=1) as stream:
        assert_type(stream, Stream)
        assert_type(stream.frames("rgb24"), Iterator[Frame])
        assert_type(stream.events(), Iterator[Event])
        assert_type(stream.watch(), Iterator[Event | Frame])
        assert_type(stream.steer("a cube", transition="cut"), StreamInfo)
        assert_type(stream.set_matte(Matte("luma")), StreamInfo)
        assert_type(stream.record(format="webm", alpha=True), Recording)
        assert_type(client.videos.generate("a ball", Path("a.mp4"), seconds=2), Video)
        for event in stream.events():
            match event:
                case events.PromptApplied():
                    assert_type(event.chunk_index, int)
        pixels = next(stream.frames()).numpy()
        print(pixels.shape, pixels.mean())


async def asynchronous() -> None:
    async with AsyncClient() as client, client.stream("a ball") as stream:
        assert_type(stream, AsyncStream)
        assert_type(stream.frames(), AsyncIterator[Frame])
        assert_type(await stream.steer("a cube"), StreamInfo)
        assert_type(await client.attach("id"), AsyncStream)
        async for frame in stream.frames():
            assert_type(frame, Frame)
            break


asyncio.run(asynchronous())
"""

MISTAKES = {
    'client.stream("a ball", sed=1)': "call-arg",
    "stream.steer(1)": "arg-type",
    'stream.steer("a", transition="fade")': "arg-type",
    'stream.frames("png")': "arg-type",
    "stream.info.promt": "attr-defined",
}


def test_types_of_a_users_program(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    lines = "\n".join(f"    {mistake}" for mistake in MISTAKES)
    mistakes = f"from livereel import Client, Stream\n\n\ndef f(client: Client, stream: Stream) -> None:\n{lines}\n"
    (tmp_path / "mistakes.py").write_text(mistakes)
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(tmp_path / "cache"), "--no-error-summary"]
    done = subprocess.run(
        [*command, "program.py", "mistakes.py"],
        cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    errors = [line for line in done.stdout.splitlines() if ": error:" in line]
    assert [re.sub(r"^mistakes\.py:(\d+):.*\[(.+)\]$", r"\1 \2", line) for line in errors] == [
        f"{number} {kind}" for number, kind in enumerate(MISTAKES.values(), 5)
    ], done.stdout + done.stderr
