"""The folder of what the server keeps for its clients: clips and recordings, each a record and some files.

It is closed to every other user, and bounded in bytes and age: what is full takes nothing more, what is old goes, and
nothing goes before it said it would. A record is written when something is begun and when it is over, so that a server
that starts again knows what it has. Names of files are ids of our own making.
"""

import contextlib
import fcntl
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from server.errors import ApiError

logger = logging.getLogger("livereel.store")
R = TypeVar("R", bound=msgspec.Struct)

RECORD = ".json"
LOCK = "lock"
TEMPORARY = "livereel-data-"
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


def check_folder(folder: Path) -> None:
    """Raises `ValueError` with what the operator should do unless the folder is fit, or yet to be made."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ValueError(f"data {folder} is not a folder")
    status = folder.stat()
    if status.st_uid != os.getuid():
        raise ValueError(f"data {folder} belongs to another user: name a folder of the server's own")
    if status.st_mode & 0o077:
        raise ValueError(f"data {folder} is open to other users: chmod 700 {folder}")


def remove_abandoned() -> None:
    """Remove temporary folders of servers that were killed: nobody holds their locks any more."""
    for folder in Path(tempfile.gettempdir()).glob(TEMPORARY + "*"):
        with contextlib.suppress(OSError):
            lock = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                if os.fstat(lock).st_uid == folder.stat().st_uid == os.getuid():
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(lock)


def no_room(error: OSError) -> ApiError:
    logger.error("the data folder cannot be written to: %s", error)
    return ApiError(507, "storage_full", "The server cannot write to its data folder: tell its operator.")


class Store:
    """Open it once, close it once. Without a folder it makes one, which is gone with the server."""

    def __init__(self, folder: Path | None, limit_bytes: int, keep_seconds: float) -> None:
        self._folder = folder
        self._temporary = folder is None
        self._limit = limit_bytes
        self.keep_seconds = keep_seconds
        """How long what is finished is kept."""
        self.used_bytes = 0
        """As of the last `measure`."""
        self._lock = -1

    def open(self) -> None:
        """Take hold of the folder. Raises `OSError` when it cannot be written to or another server has it. Safe to call
        again."""
        if self._lock >= 0:
            return
        if self._folder is None:
            remove_abandoned()
            self._folder = Path(tempfile.mkdtemp(prefix=TEMPORARY))  # mode 0700
        self._folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        self._lock = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            self._lock = -1
            raise OSError(f"data {self._folder} is in use by another server") from None
        self.measure()

    def close(self) -> None:
        """Let go of the folder. Safe to call again."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
            if self._temporary:
                shutil.rmtree(self._at, ignore_errors=True)
                self._folder = None

    @property
    def _at(self) -> Path:
        assert self._folder is not None
        return self._folder

    # room

    def measure(self) -> None:
        """Bring `used_bytes` up to date. Runs in any thread."""
        used = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self._at) as entries:  # without it, writing will fail
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    used += entry.stat(follow_symlinks=False).st_size
        self.used_bytes = used

    @property
    def full(self) -> bool:
        """Whether nothing more should be written."""
        return self.used_bytes >= self._limit

    def check_room(self) -> None:
        """Raises `ApiError` when there is none."""
        if self.full:
            message = f"The server keeps at most {self._limit / 1e9:g} GB and has them: delete clips or recordings."
            raise ApiError(507, "storage_full", message)

    # files

    def path(self, id: str, suffix: str) -> Path:
        """Where a file of this id is, or would be."""
        return self._at / (id + suffix)

    def create(self, id: str, suffix: str) -> Path:
        """A new and empty file."""
        path = self.path(id, suffix)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
        return path

    def save(self, id: str, suffix: str, data: bytes) -> None:
        """Write a whole file: whatever happens, it then holds this, or what it held before."""
        fresh = self.path(id, suffix + ".new")
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_FILE)
        with open(descriptor, "wb") as file:
            file.write(data)
        fresh.replace(self.path(id, suffix))

    def remove(self, id: str) -> None:
        """Delete the files of this id. Safe to call again."""
        for path in self._at.glob(f"{id}.*"):
            path.unlink(missing_ok=True)

    # records

    def save_record(self, id: str, record: msgspec.Struct) -> None:
        """Write it down. Raises OSError."""
        self.save(id, RECORD, msgspec.json.encode(record))

    def update_record(self, id: str, record: msgspec.Struct) -> None:
        """Write it down, if there is room; an older one stays otherwise."""
        try:
            self.save_record(id, record)
        except OSError as error:
            logger.error("the record of %s could not be written: %s", id, error)

    def records(self, prefix: str, kind: type[R]) -> Iterator[tuple[str, R]]:
        """Id and record of everything whose id starts so. Files without a record are of no use, and deleted; what is
        damaged stays for the operator to see. Raises OSError."""
        ids = {path.name.partition(".")[0] for path in self._at.glob(f"{prefix}*")}
        for id in sorted(ids):
            record = self.path(id, RECORD)
            if not record.is_file():
                self.remove(id)
                continue
            try:
                yield id, msgspec.json.decode(record.read_bytes(), type=kind)
            except msgspec.MsgspecError as error:
                logger.error("%s is left out, for its record is damaged: %s", id, error)
