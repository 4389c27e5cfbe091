"""Reads the manifest of a native store and looks at its files, without torch and without hashing them."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.checkpoints import headers
from engine.checkpoints.headers import Entry, StoreError

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class StoredFile:
    """A file of a store, as the manifest has it."""

    path: Path
    bytes: int
    sha256: str
    entries: dict[str, Entry]
    """The tensors in its header, in the order of their bytes; of no meaning where there is a fault."""
    fault: str | None
    """What is wrong with the file, apart from its hash."""


def read_manifest(folder: Path) -> tuple[dict[str, Any], dict[str, StoredFile]]:
    """The manifest of a store, and its files by name.

    Raises:
        StoreError: there is no manifest, or it cannot be read.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise StoreError(f"{path} is missing: this folder holds no Livereel weights")
    try:
        with headers.open_regular(path, folder) as file:
            manifest: dict[str, Any] = json.load(file)
        listed = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(f"{path} is not a manifest of this project: restore it or convert the weights again") from None
    return manifest, {name: _look_at(folder, name, *expected) for name, expected in listed.items()}


def _look_at(folder: Path, name: str, size: int, sha256: str) -> StoredFile:
    path = folder / name
    entries: dict[str, Entry] = {}
    try:
        if Path(name).name != name or path.is_symlink():
            raise StoreError(f"{name!r} must be a plain file in {folder}")
        with headers.open_regular(path, folder) as file:
            found = os.fstat(file.fileno()).st_size
        if path.suffix == ".safetensors":
            try:
                entries = headers.read_header(path)
            except headers.ContentError as error:
                entries = error.entries
        if found != size:
            raise StoreError(
                f"{path} is truncated or altered: {found} bytes, expected {size}: convert the weights again"
            )
    except StoreError as error:
        return StoredFile(path, size, sha256, entries, str(error))
    return StoredFile(path, size, sha256, entries, None)
