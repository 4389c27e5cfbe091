"""Reads the headers of safetensors files, without trusting them.

A safetensors file is the length of its header (8 bytes, little endian), the header (a JSON object from tensor name to
dtype, shape and byte range), and the bytes of the tensors without gap or overlap
(https://huggingface.co/docs/safetensors). This module does not load torch, so that checking weights is fast.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

MAX_HEADER = 100 << 20
DTYPES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes per element."""
INDEX = ".index.json"
INDEX_SUFFIX = f".safetensors{INDEX}"


class StoreError(Exception):
    """Weights cannot be used; the message names the file, the fault and a remedy."""


class ContentError(StoreError):
    """The header is sound, but not what it describes: the file's length is another, or a tensor is of no known type."""

    def __init__(self, message: str, entries: "dict[str, Entry]") -> None:
        super().__init__(message)
        self.entries = entries


@dataclass(frozen=True)
class Entry:
    """One tensor of a file, and its name in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Byte of the file that it begins at."""
    bytes: int


@dataclass
class Weights:
    """One network's tensors, by their names in its files, and all faults of those files."""

    files: list[Path] = field(default_factory=list)
    entries: dict[str, Entry] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    native: bool = False
    """They are in a native store, under our names."""

    @property
    def bytes(self) -> int:
        return sum(entry.bytes for entry in self.entries.values())

    def sound(self) -> "Weights":
        """These weights. Raises StoreError, naming every fault, if there are any."""
        if self.faults:
            raise StoreError("; ".join(self.faults))
        return self


def open_regular(path: Path, folder: Path) -> BinaryIO:
    """Open a regular file in `folder` for reading.

    Raises:
        StoreError: it is missing; a pipe, device or folder; a link that leads out of the folder; or a stand-in for the
            file that is meant.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError):  # RuntimeError until Python 3.13
        raise StoreError(f"{path} is a link in a circle") from None
    if not target.is_relative_to(folder.resolve()):
        raise StoreError(
            f"{path} is a link out of its folder, to {target}: copy the file itself (from a Hugging Face cache: "
            f"download again with --local-dir)"
        )
    try:
        # without O_NONBLOCK opening a pipe would block; it is refused before anything is read from it
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except FileNotFoundError:
        raise StoreError(f"{path} is missing") from None
    except OSError as error:
        raise StoreError(f"{path} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise StoreError(f"{path} is not a regular file")
    file = os.fdopen(descriptor, "rb")
    if what := stand_in(file.peek(LOOK)):
        file.close()
        raise StoreError(f"{path} {what}")
    return file


LOOK = 256


def stand_in(start: bytes) -> str | None:
    """What a file is that begins like this, if it is no weights but what a failed download leaves in their place.

    Git LFS pointers: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
    """
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull` in its repository"
    if start.lstrip()[:LOOK].lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        return "is a web page: the download was answered by one, often to log in: download the file again"
    if len(start) >= LOOK and not any(start[:LOOK]):
        return "begins with zeros, as after a download that was never finished: download it again"
    return None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name appears twice")
    return found


def _json_object(data: bytes, path: Path) -> dict[str, Any]:
    try:
        content = json.loads(data, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} has an unreadable header ({error}): download it again") from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} has a header that is no JSON object: download it again")
    return content


def printable(name: str, path: Path) -> None:
    """Raises StoreError for a name with unprintable characters, since names reach terminals and logs."""
    if not name.isprintable():
        raise StoreError(f"{path} has a tensor of the name {name!r}, which cannot be printed")


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def read_header(path: Path, folder: Path | None = None) -> dict[str, Entry]:
    """Every tensor of a safetensors file, in the order of its bytes.

    Raises:
        ContentError: the file's length differs from what the header says; the error has the entries.
        StoreError: the file is missing, is not a valid safetensors file, or is not in `folder` (default: its own).
    """
    with open_regular(path, folder or path.parent) as file:
        return parse_header(_header(file, path), os.fstat(file.fileno()).st_size, path)


def read_metadata(path: Path) -> dict[str, str]:
    """The texts that a safetensors file has about itself. Raises StoreError as `read_header` does."""
    with open_regular(path, path.parent) as file:
        found = _json_object(_header(file, path), path).get("__metadata__")
    return {name: text for name, text in found.items() if isinstance(text, str)} if isinstance(found, dict) else {}


def _header(file: BinaryIO, path: Path) -> bytes:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or not 2 <= length <= size - 8:
        raise StoreError(
            f"{path} is no safetensors file: it says that its header has {length} bytes, and has {size} in all"
        )
    if length > MAX_HEADER:
        raise StoreError(f"{path} has a header of {length} bytes, more than the {MAX_HEADER} that are read")
    return file.read(length)


def parse_header(header: bytes, size: int, path: Path) -> dict[str, Entry]:
    """The tensors that a header lists, for a file of `size` bytes. Raises as `read_header` does."""
    length, content = len(header), _json_object(header, path)
    entries, ranges = {}, []
    for name, value in content.items():
        if name == "__metadata__":
            continue
        printable(name, path)
        match value:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [start, end]} if (
                all(map(_is_size, shape)) and _is_size(start) and _is_size(end)
            ):
                pass
            case _:
                raise StoreError(f"{path}: the entry of {name} in its header is malformed: download it again")
        if dtype not in DTYPES:
            raise StoreError(f"{path}: {name} is of type {dtype!r}, which is not known here: {', '.join(DTYPES)} are")
        if end - start != (taken := prod(shape) * DTYPES[dtype]):
            raise StoreError(
                f"{path}: {name} has {end - start} bytes, but {dtype} {list(shape)} takes {taken}: download it again"
            )
        entries[name] = Entry(path, name, dtype, tuple(shape), 8 + length + start, end - start)
        ranges.append((start, end, name))
    ranges.sort(key=lambda part: part[:2])
    position = 0
    for start, end, name in ranges:
        if start != position:
            what = "overlaps the tensor before it" if start < position else "leaves a gap before it"
            raise StoreError(f"{path}: {name} at byte {start} {what}: download it again")
        position = end
    entries = {name: entries[name] for _, _, name in ranges}
    if size != 8 + length + position:
        what = "truncated" if size < 8 + length + position else "too long"
        raise ContentError(
            f"{path} is {what}: {size} bytes, its header says {8 + length + position}: download it again", entries
        )
    return entries


def read_weights(
    files: Iterable[Path], folder: Path, read: Callable[[Path, Path], dict[str, Entry]] = read_header
) -> Weights:
    """The headers of several files as one. Faulty files are listed; the others are read nevertheless."""
    weights = Weights()
    for path in files:
        weights.files.append(path)
        try:
            entries = read(path, folder)
        except ContentError as error:
            weights.faults.append(str(error))
            entries = error.entries
        except StoreError as error:
            weights.faults.append(str(error))
            continue
        for name in entries.keys() & weights.entries.keys():
            weights.faults.append(f"{path}: {name} is in {weights.entries[name].file.name} too: keep one of the two")
        weights.entries |= entries
        if zeros := zero_tensors(path, entries.values()):
            weights.faults.append(
                f"{path} holds zeros instead of weights, {zeros[0]} for one: its download was never finished: "
                f"download it again"
            )
    return weights


SAMPLED, PLACES, SAMPLE = 16, 4, 512


def zero_tensors(path: Path, entries: Iterable[Entry]) -> list[str]:
    """Matrices of a file that hold only zeros, as an unfinished download into reserved space has them.

    Reads `SAMPLE` bytes in `PLACES` places of each of `SAMPLED` matrices, in milliseconds. Empty if too few are zero to
    tell: one among many may be zero by design.
    """
    matrices = [entry for entry in entries if len(entry.shape) >= 2 and entry.bytes]
    sampled = matrices[:: max(1, len(matrices) // SAMPLED)]
    zeros = []
    with path.open("rb") as file:
        for entry in sampled:
            size = min(SAMPLE, entry.bytes)
            places = (entry.start + (entry.bytes - size) * place // (PLACES - 1) for place in range(PLACES))
            samples = [os.pread(file.fileno(), size, place) for place in places]
            if all(samples) and not any(map(any, samples)):  # nothing is read past the end of a truncated file
                zeros.append(entry.name)
    return zeros if len(zeros) == len(sampled) or len(zeros) >= max(2, len(sampled) / 8) else []


def read_weight_map(path: Path) -> dict[str, str]:
    """The file of every tensor, as an index (`*.safetensors.index.json`, `*.bin.index.json`) has it.

    Raises:
        StoreError: the index is damaged, or names a file that is not beside it or of another kind.
    """
    with open_regular(path, path.parent) as file:
        content = _json_object(file.read(MAX_HEADER), path)
    shards = content.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise StoreError(f"{path} has no weight_map from tensors to files: download it again")
    for tensor in shards:
        printable(tensor, path)
    suffix = Path(path.name.removesuffix(INDEX)).suffix
    for name in shards.values():
        if not name.isprintable() or name in {"", ".", ".."} or Path(name).name != name or not name.endswith(suffix):
            raise StoreError(f"{path} names {name!r} as a shard: must be a plain file name beside the index")
    return shards


def read_index(path: Path) -> Weights:
    """The headers of all shards that an index (`*.safetensors.index.json`) names, checked against it."""
    folder, weights = path.parent, Weights([path])
    try:
        shards = read_weight_map(path)
    except StoreError as error:
        weights.faults.append(str(error))
        return weights
    found = read_weights([folder / name for name in sorted(set(shards.values()))], folder)
    found.files.insert(0, path)
    for name, entry in found.entries.items():
        if shards.get(name) != entry.file.name:
            found.faults.append(f"{path}: {name} is in {entry.file.name}, but the index says {shards.get(name)}")
    readable = {entry.file.name for entry in found.entries.values()}
    for name, shard in shards.items():
        if name not in found.entries and shard in readable:
            found.faults.append(f"{path}: {name} is not in {shard}, where the index has it")
    return found
