"""API keys: who may use the server, read from a file that holds their hashes.

The file is TOML, a table a key, and may be edited by hand; the server notices.

    [[key]]
    name = "studio"                  # in logs
    owner = "studio"                 # whose streams it opens and sees; the name, unless it says otherwise
    sha256 = "..."                   # of the key
    scopes = ["control"]             # view, control, admin, metrics
    streams = 4                      # at once, of the owner
    requests_per_minute = 120
    priority = 1                     # turns in the queue for one of a key of priority 1

A key is 256 random bits, so one pass of SHA-256 is enough: there is no dictionary to try.
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
"""What each scope allows: `view` reads and watches the owner's streams, `control` opens, changes and ends them,
`admin` does so with everybody's and changes the server, `metrics` reads /metrics alone."""

PREFIX = "lr_"
"""Of every key, so that those who search repositories for secrets find it."""
NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
MAX_KEY_LENGTH = 256
MAX_FILE_BYTES = 1 << 20
STREAMS, REQUESTS_PER_MINUTE, PRIORITY = 4, 120, 1
LIMITS = {
    "streams": (STREAMS, 1_000_000),
    "requests_per_minute": (REQUESTS_PER_MINUTE, 1_000_000),
    "priority": (PRIORITY, 100),
}
"""Of a key: what it is where none is named, and what it may be at most."""


@dataclass(frozen=True, slots=True)
class Key:
    """One line of the file: never the key itself."""

    name: str
    owner: str
    sha256: str
    scopes: frozenset[Scope]
    streams: int
    requests_per_minute: int
    priority: int = PRIORITY
    serial: int = 0
    """What tells it from every other entry that the file has had since the server started."""


def digest(key: str) -> str:
    """What the file knows of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


def read_keys(path: Path) -> tuple[Key, ...]:
    """The keys of a file; raises `ValueError` with a message for the operator when it cannot be trusted or read."""
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            check_owner(path, about)
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ValueError(f"keys {path} cannot be read: {error.strerror}") from None
    return parse_keys(path, text)


def parse_keys(path: Path, text: bytes) -> tuple[Key, ...]:
    """The keys that a file's text holds; raises `ValueError`."""
    if len(text) > MAX_FILE_BYTES:
        raise ValueError(f"keys {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        tables = tomllib.loads(text.decode())
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        # The reason would quote the file.
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
    """Whoever can write the file can let himself in."""
    if about.st_uid not in (0, os.geteuid()):
        raise ValueError(f"keys {path} belongs to another user: chown it to the one that runs the server")
    if about.st_mode & (stat.S_IWGRP | stat.S_IRWXO):
        mode = stat.S_IMODE(about.st_mode)
        raise ValueError(f"keys {path} has mode {mode:04o}, open to others: chmod 600 {path}")


def read_key(path: Path, number: int, table: Any) -> Key:
    """One table of the file; raises `ValueError`."""

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
    """The keys of a file, read again whenever it changes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._serials = itertools.count(1)
        self._keys: tuple[Key, ...] = ()
        self._seen = self._look()
        self._keys = self._read()

    def reload(self, *, force: bool = False) -> bool:
        """Read the file again if it has changed, or with `force` in any case; returns whether it was read.

        Raises `ValueError` when it cannot be trusted or read; the keys stay as they were.
        """
        seen = self._look()
        if seen == self._seen and not force:
            return False
        self._seen = seen
        self._keys = self._read()
        return True

    def find(self, key: str) -> Key | None:
        """The entry of a key that somebody shows. Takes as long for a wrong one as for a right one."""
        if len(key) > MAX_KEY_LENGTH:
            return None
        shown, found = digest(key), None
        for entry in self._keys:
            if hmac.compare_digest(entry.sha256, shown):
                found = entry
        return found

    def current(self, serial: int) -> Key | None:
        """The entry as the file has it now; None when it was taken away."""
        return next((entry for entry in self._keys if entry.serial == serial), None)

    @property
    def serials(self) -> frozenset[int]:
        """Of every entry that there is."""
        return frozenset(key.serial for key in self._keys)

    def _read(self) -> tuple[Key, ...]:
        """The file's keys. An entry keeps its serial while it has its owner and all its scopes.

        So whatever was allowed under it ends when it may less, and does not come back with it.
        """
        before = {key.sha256: key for key in self._keys}
        keys = []
        for key in read_keys(self._path):
            was = before.get(key.sha256)
            same = was is not None and was.owner == key.owner and was.scopes <= key.scopes
            keys.append(replace(key, serial=was.serial if was and same else next(self._serials)))
        return tuple(keys)

    def _look(self) -> tuple[int, ...]:
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
    """Make a key, write its hash to the file, which need not be there yet, and return it. Raises `ValueError`."""
    with locked(path) as file:
        keys = read_keys(file) if file.exists() else ()
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
    """Take a key out of the file, whose other lines stay as they are. Raises `ValueError`."""
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
    """The file that an editor's link leads to, while no other such command changes it. Raises `ValueError`."""
    path = path.resolve()
    try:
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise ValueError(f"keys {path} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield path
    finally:
        os.close(folder)


def write(path: Path, text: str) -> None:
    """Replace the file in one step, for nobody else to read; raises `ValueError`."""
    fresh = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(path)
    except OSError as error:
        fresh.unlink(missing_ok=True)
        raise ValueError(f"keys {path} cannot be written: {error.strerror}") from None


def toml(value: str | int | list[str]) -> str:
    """A checked value as TOML writes it: none needs escapes."""
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return str(value) if isinstance(value, int) else f'"{value}"'


def table_of(keys: Sequence[Key]) -> str:
    """The keys for people, a line each. Not even their hashes are shown."""
    rows: list[tuple[str, ...]] = [("name", "owner", "scopes", "streams", "requests/min", "priority")]
    for key in keys:
        scopes = ",".join(scope for scope in SCOPES if scope in key.scopes)
        rows.append((key.name, key.owner, scopes, *map(str, (key.streams, key.requests_per_minute, key.priority))))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def main(arguments: Sequence[str], environment: Mapping[str, str]) -> int:
    """python -m server keys add, list or remove."""
    parser = argparse.ArgumentParser("python -m server keys", description="API keys.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("add", help="make a key and print it; the file keeps its hash alone", allow_abbrev=False)
    listing = commands.add_parser("list", help="say which keys there are, and what they may do", allow_abbrev=False)
    remove = commands.add_parser("remove", help="take a key away, and all that goes on under it", allow_abbrev=False)
    for command in (add, remove):
        command.add_argument("name", help="what the key is called in the file and in the log")
    for command in (add, listing, remove):
        command.add_argument(
            "--keys",
            type=Path,
            metavar="FILE",
            default=environment.get("LIVEREEL_KEYS"),
            required="LIVEREEL_KEYS" not in environment,
            help="the file; `add` makes it if it is not there (LIVEREEL_KEYS)",
        )
    add.add_argument("--owner", help="whose streams the key opens and sees (the name)")
    add.add_argument("--scope", action="append", choices=SCOPES, help="what it may do, once or more often (control)")
    add.add_argument("--streams", type=int, default=STREAMS, metavar="N", help="at once, of the owner (%(default)s)")
    add.add_argument("--requests-per-minute", type=int, default=REQUESTS_PER_MINUTE, metavar="N", help="(%(default)s)")
    add.add_argument(
        "--priority", type=int, default=PRIORITY, metavar="N", help="turns in the queue for one of others (%(default)s)"
    )
    options = parser.parse_args(arguments)
    path = Path(options.keys)
    try:
        if options.command == "list":
            print(table_of(read_keys(path)))
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
