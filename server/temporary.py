"""Temporary folders that a later server removes if this one is killed: each has a lock that dies with its process."""

import contextlib
import fcntl
import os
import shutil
import tempfile
from pathlib import Path

LOCK = "lock"


def make(prefix: str) -> tuple[Path, int]:
    """A new folder (mode 0700) and the descriptor of its lock, which the caller closes. Raises OSError."""
    # Under another name until it is locked: a server that is starting would take it for abandoned.
    hidden = Path(tempfile.mkdtemp(prefix=f".{prefix}"))
    try:
        descriptor = lock(hidden)
        return hidden.rename(hidden.with_name(hidden.name[1:])), descriptor
    except OSError:
        shutil.rmtree(hidden, ignore_errors=True)
        raise


def lock(folder: Path) -> int:
    """Lock a folder; returns the descriptor that holds the lock. Raises BlockingIOError if another process does."""
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def remove_abandoned(prefix: str) -> None:
    """Remove the folders of servers that were killed: those of this user whose lock nobody holds."""
    for folder in Path(tempfile.gettempdir()).glob(prefix + "*"):
        with contextlib.suppress(OSError):
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.fstat(descriptor).st_uid == folder.stat().st_uid == os.getuid():
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
