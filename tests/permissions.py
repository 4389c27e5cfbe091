"""Programs that obey the permissions of files, also where the tests run as root."""

import ctypes
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
DROP_FROM_BOUNDING_SET = 24
CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 1, 2


def obey_permissions() -> None:
    """Give up root's right to pass over permissions, from the next program that is run (capabilities(7))."""
    for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
        ctypes.CDLL(None).prctl(DROP_FROM_BOUNDING_SET, capability, 0, 0, 0)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments, without that right."""
    return subprocess.run(
        [sys.executable, *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=60,
        preexec_fn=obey_permissions,
    )


def unusable_folders(folder: Path) -> dict[Path, str]:
    """Paths below `folder` at which there is no folder to use, and what is said of each."""
    (folder / "file").touch()
    (folder / "locked").mkdir()
    (folder / "locked" / "inner").mkdir(mode=0o700)
    (folder / "locked").chmod(0)
    (folder / "unlisted").mkdir(mode=0o300)
    (folder / "loop").symlink_to(folder / "loop")
    return {
        folder / "file": "folder",
        folder / "file" / "inner": "",
        folder / "locked": "cannot be read",
        folder / "locked" / "inner": "Permission denied",
        folder / "unlisted": "cannot be read",
        folder / "loop": "",
        folder / ("n" * 300): "File name too long",
    }
