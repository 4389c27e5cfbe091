"""API keys: a file of their hashes and limits, and the command `python -m server keys`.

The file is TOML with one table per key. It may be edited by hand: the server reloads it when it changes.

    [[key]]
    name = "studio"                  # in logs
    owner = "studio"                 # whose streams it opens and sees; by default the name
    sha256 = "..."                   # hash of the key
    scopes = ["control"]             # view, control, admin, metrics
    streams = 4                      # the owner's streams at once
    requests_per_minute = 120
    priority = 1                     # turns in the queue per turn of a key of priority 1

A key has 256 random bits, so a single SHA-256 is enough: a dictionary attack is not possible.
"""

import argparse
import contextlib
import fcntl
import hashlib
import hmac
import itertools
import os
import re
import secrets
import stat
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

Scope = Literal["view", "control", "admin", "metrics"]
SCOPES: tuple[Scope, ...] = get_args(Scope)

IMPLIED: dict[Scope, frozenset[Scope]] = {
    "view": frozenset({"view"}),
    "control": frozenset({"view", "control"}),
    "admin": frozenset(SCOPES),
    "metrics": frozenset({"metrics"}),
}
"""The scopes that each scope includes. `view` reads and watches the owner's streams, `control` also opens, changes and
ends them, `admin` does so with everybody's streams and changes the server, `metrics` reads only /metrics."""

PREFIX = "lr_"
"""Prefix of every key, by which secret scanners recognise it."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_KEY_LENGTH = 256
MAX_FILE_BYTES = 1 << 20
STREAMS, REQUESTS_PER_MINUTE, PRIORITY = 4, 120, 1
LIMITS = {
    "streams": (STREAMS, 1_000_000),
    "requests_per_minute": (REQUESTS_PER_MINUTE, 1_000_000),
    "priority": (PRIORITY, 100),
}
"""Default and maximum of each numeric field of a key."""


@dataclass(frozen=True, slots=True)
class Key:
    """One entry of the key file. It holds the key's hash, never the key."""

    name: str
    owner: str
    sha256: str
    scopes: frozenset[Scope]
    streams: int
    requests_per_minute: int
    priority: int = PRIORITY
    serial: int = 0
    """Identifies this entry among all that the file has had since the server started."""


def digest(key: str) -> str:
    """The hash of a key that the file stores."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a key file. Raises `ValueError`, with a message for the operator, if it cannot be read or trusted."""
    try:
        with open(path, "rb", opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK)) as file:
            about = os.fstat(file.fileno())
            check_owner(path, about)
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"keys {path} cannot be read: {error.strerror}") from None
    return parse_keys(path, text)


def parse_keys(path: Path, text: bytes) -> tuple[Key, ...]:
    """Parse the text of a key file. Raises `ValueError`."""
    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"keys {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        tables = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        # The parser's message would quote the file.
        raise ValueError(f"keys {path} is not valid TOML") from None
    if tables.keys() - {"key"} or not isinstance(tables.get("key", []), list):
        raise ValueError(f"keys {path} may hold [[key]] tables and nothing else")
    keys = tuple(read_key(path, number, table) for number, table in enumerate(tables.get("key", []), start=1))
    for field in ("name", "sha256"):
        values = [getattr(key, field) for key in keys]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise ValueError(f"keys {path} has the {field} {twice} twice")
    return keys


def check_owner(path: Path, about: os.stat_result) -> None:
    """Raise `ValueError` if others can write the file, and so grant themselves access, or read it, or it is no file."""
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"keys {path} is not a file")
    if about.st_uid not in (0, os.geteuid()):
        raise ValueError(f"keys {path} belongs to another user: chown it to the one that runs the server")
    if about.st_mode & (stat.S_IWGRP | stat.S_IRWXO):
        mode = stat.S_IMODE(about.st_mode)
        raise ValueError(f"keys {path} has mode {mode:04o}, open to others: chmod 600 {path}")


def read_key(path: Path, number: int, table: Any) -> Key:
    """Validate one table of the file. Raises `ValueError`."""

    def wrong(field: str, wanted: str) -> ValueError:
        return ValueError(f"keys {path}: `{field}` of key {number} must be {wanted}")

    if not isinstance(table, dict):
        raise ValueError(f"keys {path}: key {number} must be a table")
    known = {"name", "owner", "sha256", "scopes", *LIMITS}
    if unknown := min(table.keys() - known, default=None):
        raise ValueError(f"keys {path}: key {number} has the unknown field `{unknown[:64]}`")
    name, sha256, scopes = table.get("name"), table.get("sha256"), table.get("scopes", ["control"])
    for field, value in (("name", name), ("owner", table.get("owner", name))):
        if not isinstance(value, str) or not NAME.fullmatch(value):
            raise wrong(field, "1 to 64 letters, digits, dots, underscores or hyphens")
    if not isinstance(sha256, str) or not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise wrong("sha256", "64 hexadecimal digits, as `python -m server keys add` writes them")
    if not isinstance(scopes, list) or not scopes or not all(scope in SCOPES for scope in scopes):
        raise wrong("scopes", f"a list of {', '.join(SCOPES)}")
    limits = {}
    for field, (usual, most) in LIMITS.items():
        limits[field] = value = table.get(field, usual)
        if type(value) is not int or not 1 <= value <= most:
            raise wrong(field, f"an integer from 1 to {most}")
    allowed = frozenset[Scope]().union(*(IMPLIED[scope] for scope in scopes))
    return Key(str(name), str(table.get("owner", name)), sha256, allowed, **limits)


class Keys:
    """The keys of a file, which can be reloaded while the server runs."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._serials = itertools.count(1)
        self._keys: tuple[Key, ...] = ()
        self._seen = self._stat()
        self._keys = self._read()

    def reload(self, *, force: bool = False) -> bool:
        """Reload the file if it has changed, or with `force` in any case; returns whether it was read.

        Raises `ValueError` if it cannot be read or trusted; the current keys then stay in force.
        """
        seen = self._stat()
        if seen == self._seen and not force:
            return False
        self._seen = seen
        self._keys = self._read()
        return True

    def find(self, key: str) -> Key | None:
        """The entry of a key; None if it is unknown. Takes equally long for known and unknown keys."""
        if len(key) > MAX_KEY_LENGTH:
            return None
        sha256, found = digest(key), None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, sha256):
                found = entry
        return found

    def current(self, serial: int) -> Key | None:
        """The entry with this serial as the file has it now; None if the key was revoked."""
        return next((entry for entry in self._keys if entry.serial == serial), None)

    @property
    def serials(self) -> frozenset[int]:
        """The serials of all current entries."""
        return frozenset(key.serial for key in self._keys)

    def _read(self) -> tuple[Key, ...]:
        """Read the file. An entry keeps its serial as long as it keeps its owner and loses no scope.

        An entry that loses a scope is therefore treated as revoked, and what it had started does not come back when
        the scope is restored.
        """
        known = {key.sha256: key for key in self._keys}
        keys = []
        for key in read_keys(self._path):
            was = known.get(key.sha256)
            same = was is not None and was.owner == key.owner and was.scopes <= key.scopes
            keys.append(replace(key, serial=was.serial if was and same else next(self._serials)))
        return tuple(keys)

    def _stat(self) -> tuple[int, ...]:
        try:
            about = self._path.stat()
        except OSError:
            return ()
        return about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_mode


# the command


def add_key(
    path: Path,
    name: str,
    owner: str,
    scopes: Sequence[str],
    streams: int,
    requests_per_minute: int,
    priority: int = PRIORITY,
) -> str:
    """Create a key, add its hash to the file, which need not exist yet, and return it. Raises `ValueError`."""
    with locked(path) as file:
        keys = read_keys(file) if os.path.lexists(file) else ()
        if name in {key.name for key in keys}:
            raise ValueError(f"keys {file} has a key named {name} already")
        key = PREFIX + secrets.token_urlsafe(32)
        fields: dict[str, Any] = {"name": name, "owner": owner, "sha256": digest(key), "scopes": list(scopes)}
        fields |= {"streams": streams, "requests_per_minute": requests_per_minute, "priority": priority}
        read_key(file, len(keys) + 1, fields)
        table = "\n".join(["[[key]]", *(f"{field} = {toml(value)}" for field, value in fields.items()), ""])
        before = file.read_text() if file.exists() else ""
        write(file, before.rstrip("\n") + "\n\n" + table if before.strip() else table)
    return key


def remove_key(path: Path, name: str) -> None:
    """Remove a key from the file and keep its other lines unchanged. Raises `ValueError`."""
    with locked(path) as file:
        keys = read_keys(file)
        left = tuple(key for key in keys if key.name != name)
        if left == keys:
            raise ValueError(f"keys {file} has no key named {name}: `keys list` says which there are")
        text = file.read_text()
        heads = [match.start() for match in re.finditer(r"(?m)^[ \t]*\[\[[ \t]*key[ \t]*\]\]", text)]
        number = [key.name for key in keys].index(name)
        if len(heads) == len(keys):
            text = text[: heads[number]] + text[[*heads, len(text)][number + 1] :]
        if parse_keys(file, text.encode()) != left:
            raise ValueError(f"keys {file} is written in a way of its own: take {name} out by hand")
        write(file, text)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[Path]:
    """Resolve symbolic links and lock the file's folder against other key commands. Raises `ValueError`."""
    try:
        resolved = Path(os.path.realpath(path))  # of a loop, a path that cannot be opened
        folder = os.open(resolved.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield resolved
        finally:
            os.close(folder)
    except OSError as error:
        raise ValueError(f"keys {path} cannot be written: {error.strerror}") from None


def write(path: Path, text: str) -> None:
    """Replace the file atomically, readable only by its owner. Raises `ValueError`."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)
        raise ValueError(f"keys {path} cannot be written: {error.strerror}") from None


def toml(value: str | int | list[str]) -> str:
    """A validated value in TOML. None of them needs escaping."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return str(value) if isinstance(value, int) else f'"{value}"'


def format_table(keys: Sequence[Key]) -> str:
    """The keys as a text table, without their hashes."""
    rows: list[tuple[str, ...]] = [("name", "owner", "scopes", "streams", "requests/min", "priority")]
    for key in keys:
        scopes = ",".join(scope for scope in SCOPES if scope in key.scopes)
        rows.append((key.name, key.owner, scopes, *map(str, (key.streams, key.requests_per_minute, key.priority))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """Run `python -m server keys add`, `list` or `remove`. Returns the exit status."""
    parser = argparse.ArgumentParser("python -m server keys", description="API keys.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser(
        "add", help="create a key and print it; the file stores only its hash", allow_abbrev=False
    )
    listing = commands.add_parser("list", help="list the keys and what they may do", allow_abbrev=False)
    remove = commands.add_parser(
        "remove", help="revoke a key and end everything that was started with it", allow_abbrev=False
    )
    for command in (add, remove):
        command.add_argument("name", help="name of the key in the file and in the log")
    for command in (add, listing, remove):
        command.add_argument(
            "--keys",
            type=Path,
            metavar="FILE",
            default=environment.get("LIVEREEL_KEYS"),
            required="LIVEREEL_KEYS" not in environment,
            help="key file; `add` creates it if needed (LIVEREEL_KEYS)",
        )
    add.add_argument("--owner", help="whose streams the key opens and sees (default: the name)")
    add.add_argument(
        "--scope", action="append", choices=SCOPES, help="what the key may do; may be repeated (default: control)"
    )
    add.add_argument(
        "--streams", type=int, default=STREAMS, metavar="N", help="the owner's streams at once (default: %(default)s)"
    )
    add.add_argument(
        "--requests-per-minute", type=int, default=REQUESTS_PER_MINUTE, metavar="N", help="(default: %(default)s)"
    )
    add.add_argument(
        "--priority",
        type=int,
        default=PRIORITY,
        metavar="N",
        help="turns in the queue per turn of a key of priority 1 (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    path = Path(options.keys)
    try:
        if options.command == "list":
            print(format_table(read_keys(path)))
        elif options.command == "remove":
            remove_key(path, options.name)
            print(f"{options.name} is gone; a server that uses {path} notices within a second.", file=sys.stderr)
        else:
            scopes, limits = options.scope or ["control"], (options.streams, options.requests_per_minute)
            print(add_key(path, options.name, options.owner or options.name, scopes, *limits, options.priority))
            print(f"This is shown once: {path} holds only its hash.", file=sys.stderr)
    except ValueError as error:
        parser.error(str(error))
    return 0
