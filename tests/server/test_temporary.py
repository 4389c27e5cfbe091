"""Temporary folders: those of killed servers are removed, and no others."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from server import temporary

ROOT = Path(__file__).parents[2]
PREFIX = "livereel-test-"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


def test_what_is_in_use_stays_and_what_was_given_up_goes(tmp_path: Path) -> None:
    used, lock = temporary.make(PREFIX)
    assert used.stat().st_mode & 0o777 == 0o700
    given_up, other = temporary.make(PREFIX)
    (given_up / "engine.sock").touch()
    os.close(other)
    (tmp_path / f"{PREFIX}without-a-lock").mkdir()
    (tmp_path / "livereel-other").mkdir()
    temporary.remove_abandoned(PREFIX)
    assert {path.name for path in tmp_path.iterdir()} == {used.name, f"{PREFIX}without-a-lock", "livereel-other"}
    with pytest.raises(BlockingIOError):
        temporary.lock(used)
    os.close(lock)


def test_a_folder_has_its_name_only_once_it_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that starts at this moment removes nothing."""
    flock = temporary.fcntl.flock

    def start_another(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(temporary.fcntl, "flock", flock)
        temporary.remove_abandoned(PREFIX)
        flock(descriptor, operation)

    monkeypatch.setattr(temporary.fcntl, "flock", start_another)
    folder, lock = temporary.make(PREFIX)
    assert folder.parent == tmp_path and folder.name.startswith(PREFIX) and (folder / temporary.LOCK).exists()
    os.close(lock)


def test_a_killed_process_leaves_its_folder_to_the_next(tmp_path: Path) -> None:
    program = (
        f"import os, tempfile; tempfile.tempdir = {str(tmp_path)!r}\n"
        f"from server import temporary; temporary.make({PREFIX!r}); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == -9
    assert len(list(tmp_path.iterdir())) == 1
    temporary.remove_abandoned(PREFIX)
    assert not list(tmp_path.iterdir())
