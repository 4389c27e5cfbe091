"""The data folder for clips and recordings. Each has a record (JSON) and some files, named by its id.

The folder is private to the server's user and limited in bytes and age. A full store accepts nothing new; items expire
at the time that their record states, by the folder's own clock, and not before. Records are written when an item begins
and when it ends, so that a restarted server finds what it has. Ids are made by the server, so no file name comes from a
client.
"""

import contextlib
import errno
import logging
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec

from server import temporary
from server.errors import ApiError
from server.library.film_clock import FilmClock

logger = logging.getLogger("livereel.store")
R = TypeVar("R", bound=msgspec.Struct)

RECORD = ".json"
TEMPORARY = "livereel-data-"
RECORD_SPARE = 512
"""Blanks after a record, whose room a later record takes when the disk is full."""
CLOCK_SECONDS = 60.0
"""How often the clock is saved: films may age by this less in each run of the machine."""
PRIVATE_FOLDER, PRIVATE_FILE = 0o700, 0o600


def check_folder(folder: Path) -> None:
    """Check that the folder is private to this user, or does not exist yet. Raises `ValueError` that tells the operator
    what to do."""
    try:
        status = folder.stat()
    except FileNotFoundError:
        return
    except OSError as error:
        raise ValueError(f"data {folder} cannot be used: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode):
        raise ValueError(f"data {folder} is not a folder")
    if status.st_uid != os.getuid():
        raise ValueError(f"data {folder} belongs to another user: name a folder of the server's own")
    if status.st_mode & 0o077:
        raise ValueError(f"data {folder} is open to other users: chmod 700 {folder}")
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise ValueError(f"data {folder} cannot be read and written: chmod 700 {folder}")


def out_of_space(error: BaseException) -> bool:
    """Whether this is the kernel's refusal to let a file grow: a full disk, a quota, or a limit of file sizes."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def no_room(error: OSError) -> ApiError:
    """Log that the folder cannot be written to; returns the error for the client."""
    logger.error("the data folder cannot be written to: %s", error)
    return ApiError(507, "storage_full", "The server cannot write to its data folder: tell its operator.")


class Store:
    """The data folder. With `folder` None, `open` makes a temporary one, which `close` deletes."""

    def __init__(self, folder: Path | None, limit_bytes: int, keep_seconds: float) -> None:
        self._folder = folder
        self._temporary = folder is None
        self._limit = limit_bytes
        self.keep_seconds = keep_seconds
        """How long finished items are kept."""
        self.used_bytes = 0
        """As of the last `measure`."""
        self.clock = FilmClock()
        """What the ages of items are measured by."""
        self._clock_saved_at = 0.0
        self._names: frozenset[str] | None = None
        """The files of the folder as of the last `measure`; None if they could not be listed."""
        self._stuck: set[str] = set()
        """Items whose files could not be deleted, which has been logged."""
        self._lock = -1

    def open(self) -> None:
        """Create and lock the folder. Raises `OSError` if it cannot be written to or another server uses it. Safe to
        call again."""
        if self._lock >= 0:
            return
        if self._folder is None:
            temporary.remove_abandoned(TEMPORARY)
            self._folder, self._lock = temporary.make(TEMPORARY)
        else:
            self._folder.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
            try:
                self._lock = temporary.lock(self._folder)
            except BlockingIOError:
                raise OSError(f"data {self._folder} is in use by another server") from None
        self.clock = FilmClock(os.pread(self._lock, 1000, 0))
        self.save_clock()
        self.measure()

    def close(self) -> None:
        """Unlock the folder, and delete it if it is temporary. Safe to call again."""
        if self._lock >= 0:
            self.save_clock()
            os.close(self._lock)
            self._lock = -1
            if self._temporary:
                shutil.rmtree(self._root, ignore_errors=True)
                self._folder = None

    @property
    def _root(self) -> Path:
        assert self._folder is not None
        return self._folder

    # age

    def expiry(self) -> float:
        """When an item that is finished now expires, by `clock`."""
        return self.clock.now() + self.keep_seconds

    def latest_expiry(self, expires_at: float) -> float:
        """When an item of an earlier server expires: as its record states, unless no clock goes on that could tell."""
        return min(expires_at, self.expiry()) if self.clock.new else expires_at

    def save_clock(self, *, every: float = 0.0) -> None:
        """Save the clock in the lock file, unless that was done within `every` seconds or the folder is closed."""
        if self._lock < 0 or self.clock.now() - self._clock_saved_at < every:
            return
        self._clock_saved_at = self.clock.now()
        try:
            os.pwrite(self._lock, self.clock.save().ljust(os.fstat(self._lock).st_size), 0)
        except OSError as error:
            logger.error("the clock of the data folder could not be saved: %s", error)

    # space

    def measure(self) -> None:
        """Update `used_bytes` and what `lacks` knows. Thread-safe. Raises OSError."""
        used, names = 0, set()
        self._names = None
        with (
            contextlib.suppress(FileNotFoundError),
            os.scandir(self._root) as entries,
        ):  # if the folder is missing, the next write reports it
            for entry in entries:
                names.add(entry.name)
                with contextlib.suppress(FileNotFoundError):
                    used += entry.stat(follow_symlinks=False).st_size
        self.used_bytes, self._names = used, frozenset(names)

    @property
    def full(self) -> bool:
        """Whether the limit of bytes is reached."""
        return self.used_bytes >= self._limit

    def check_room(self) -> None:
        """Raise `ApiError` if the store is full."""
        if self.full:
            message = f"The server keeps at most {self._limit / 1e9:g} GB and has them: delete clips or recordings."
            raise ApiError(507, "storage_full", message)

    # files

    def path(self, id: str, suffix: str) -> Path:
        """The path of an item's file, whether or not it exists."""
        return self._root / (id + suffix)

    def create(self, id: str, suffix: str) -> Path:
        """Create an empty file. Raises OSError if it exists."""
        path = self.path(id, suffix)
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE_FILE))
        return path

    def lacks(self, id: str, suffix: str, *, listed: bool = False) -> bool:
        """Whether the file has been removed. False if the whole folder is away, as after `umount`: it may come back.

        With `listed`, a file that the last `measure` has seen counts as there.
        """
        path = self.path(id, suffix)
        if listed and (self._names is None or path.name in self._names):
            return False
        try:
            return not path.exists() and (self._root / temporary.LOCK).exists()
        except OSError:
            return False

    def save(self, id: str, suffix: str, data: bytes) -> None:
        """Replace a file atomically: after a crash it holds either the new or the old content. Raises OSError."""
        fresh = self.path(id, suffix + ".new")
        try:
            descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, PRIVATE_FILE)
            with open(descriptor, "wb") as file:
                file.write(data)
            fresh.replace(self.path(id, suffix))
        except OSError:
            with contextlib.suppress(OSError):
                fresh.unlink(missing_ok=True)
            raise

    def remove(self, id: str) -> None:
        """Delete all files of an item, its record first: files without one are deleted by the next server. Safe to call
        again. Raises OSError."""
        self.path(id, RECORD).unlink(missing_ok=True)
        for path in self._root.glob(f"{id}.*"):
            path.unlink(missing_ok=True)

    def discard(self, id: str, suffix: str | None = None) -> bool:
        """Delete an item's files, or the one with this suffix; returns whether they are gone. The first failure is
        logged."""
        try:
            if suffix is None:
                self.remove(id)
            else:
                self.path(id, suffix).unlink(missing_ok=True)
        except OSError as error:
            if id not in self._stuck:
                logger.error("the files of %s could not be deleted: %s", id, error)
                self._stuck.add(id)
            return False
        self._stuck.discard(id)
        return True

    # records

    def save_record(self, id: str, record: msgspec.Struct) -> None:
        """Write an item's record. On a full disk it takes the room of the previous one. Raises OSError."""
        data = msgspec.json.encode(record)
        try:
            self.save(id, RECORD, data + b" " * RECORD_SPARE)
        except OSError as error:
            if not out_of_space(error) or not self._overwrite(self.path(id, RECORD), data):
                raise

    def _overwrite(self, path: Path, data: bytes) -> bool:
        """Write a file's content in place if it needs no more room than the file has; returns whether it is written."""
        with contextlib.suppress(FileNotFoundError), path.open("r+b", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            return len(data) <= size and file.write(data.ljust(size)) == size
        return False

    def update_record(self, id: str, record: msgspec.Struct) -> None:
        """Write an item's record. If that fails, log it; the previous record stays."""
        try:
            self.save_record(id, record)
        except OSError as error:
            logger.error("the record of %s could not be written: %s", id, error)

    def records(self, prefix: str, kind: type[R]) -> Iterator[tuple[str, R]]:
        """Id and record of every item whose id starts with `prefix`.

        Files without a record are useless and are deleted. An item with a damaged record is skipped and its files stay
        for the operator. Raises OSError.
        """
        ids = {path.name.partition(".")[0] for path in self._root.glob(f"{prefix}*")}
        for id in sorted(ids):
            record = self.path(id, RECORD)
            if not record.is_file():
                self.discard(id)
                continue
            try:
                found = msgspec.json.decode(record.read_bytes(), type=kind)
            except (OSError, msgspec.MsgspecError) as error:
                logger.error("%s is left out, for its record is damaged: %s", id, error)
            else:
                yield id, found
