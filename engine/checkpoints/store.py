"""The native store: a folder of safetensors files and a manifest with the name and hash of each file.

Each file is read once, into memory of its own: what was hashed is what is used, so whatever is written over the file
later changes nothing. Matrices may be stored as int8 with one scale per output row (`NAME` and `NAME_scale`), so that
the embedded model fits into the repository.
"""

import contextlib
import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

from engine.checkpoints import headers
from engine.checkpoints.headers import Entry, StoreError
from engine.checkpoints.manifest import MANIFEST, StoredFile, read_manifest
from engine.ops.quant import QuantTensor, quantise

__all__ = ["MANIFEST", "Store", "StoreError", "StoredTensor", "Writer", "load", "open_store", "save", "verify"]

T = TypeVar("T")
SHARD_BYTES = 15 << 20
"""The largest file that the repository accepts."""
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


TYPES = {name: dtype for dtype, name in DTYPES.items()}
UNFINISHED = "unfinished.txt"
"""Names of the files that a Writer has begun, one a line, locked while it runs and deleted when it is done."""
BLOCK = 1 << 20
"""Bytes that are read and hashed at once: few enough to be hashed from the CPU's cache."""


class _Reader:
    """Hashes what it reads."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()

    def fill(self, buffer: memoryview) -> None:
        """Fill a buffer of bytes. Raises EOFError."""
        for start in range(0, len(buffer), BLOCK):
            block = buffer[start : start + BLOCK]
            if self._file.readinto(block) != len(block):  # type: ignore[attr-defined]
                raise EOFError
            self._digest.update(block)

    def take(self, count: int) -> bytes:
        buffer = bytearray(count)
        self.fill(memoryview(buffer))
        return bytes(buffer)

    def tensor(self, entry: Entry) -> Tensor:
        value = torch.empty(entry.shape, dtype=TYPES[entry.dtype])
        self.fill(value.reshape(-1).view(torch.uint8).numpy().data)
        return value

    def finish(self) -> str:
        """The SHA-256 of the file, after reading the rest of it."""
        while data := self._file.read(BLOCK):
            self._digest.update(data)
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Store:
    """A store whose files are complete and have sound headers; reading a file compares its hash."""

    folder: Path
    manifest: dict[str, Any]
    _files: dict[str, StoredFile]

    def shapes(self, component: str) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of a component, except the scales of int8 matrices; empty if it has none."""
        found = {name: entry.shape for file in self._files.values() for name, entry in file.entries.items()}
        return _within(component, {name: shape for name, shape in found.items() if not name.endswith("weight_scale")})

    def components(self) -> list[str]:
        return sorted({name.partition(".")[0] for file in self._files.values() for name in file.entries})

    def texts(self) -> list[str]:
        """Names of the files without tensors, such as the tokenizer's."""
        return [name for name in self._files if not name.endswith(".safetensors")]

    def read(self, component: str, device: torch.device | None = None) -> dict[str, Tensor]:
        """The tensors of a component by name, on `device` (default: the CPU); int8 matrices dequantised to float32.

        Each tensor moves to the device before the next is read: the host needs memory for the largest one.

        Raises:
            StoreError: names every file of the store that is altered.
        """
        stored: dict[str, Tensor] = {}
        for file in self._files.values():
            if any(name.startswith(f"{component}.") for name in file.entries):
                stored |= self._read(file, lambda reader, file=file: _tensors(reader, file, device))  # type: ignore[misc]
        scales = {name: stored.pop(name) for name in list(stored) if name.endswith("weight_scale")}
        for name in stored:
            if f"{name}_scale" in scales:
                stored[name] = QuantTensor(stored[name], scales[f"{name}_scale"]).dequantise()
        return _within(component, stored)

    def read_text(self, name: str) -> str:
        """A text file. Raises StoreError if it is altered or not in UTF-8."""
        file = self._files[name]
        try:
            return self._read(file, lambda reader: reader.take(file.bytes)).decode()
        except UnicodeDecodeError:
            raise StoreError(f"{file.path} is not UTF-8: convert the weights again") from None

    def _read(self, file: StoredFile, contents: Callable[[_Reader], T]) -> T:
        try:
            with headers.open_regular(file.path, self.folder) as opened:
                reader = _Reader(opened)
                found = contents(reader)
                if reader.finish() == file.sha256:
                    return found
        except (StoreError, EOFError):
            pass  # it is not what was opened
        verify(self.folder)  # names all altered files
        raise StoreError(f"{file.path} changed while it was read: try again")


def _tensors(reader: _Reader, file: StoredFile, device: torch.device | None) -> dict[str, Tensor]:
    # the header is parsed again: only this one is hashed
    header = reader.take(min(int.from_bytes(reader.take(8), "little"), file.bytes))
    entries = headers.parse_header(header, file.bytes, file.path)
    return {name: reader.tensor(entry).to(device or "cpu") for name, entry in entries.items()}


def _within(component: str, named: Mapping[str, T]) -> dict[str, T]:
    prefix = f"{component}."
    return {name.removeprefix(prefix): value for name, value in named.items() if name.startswith(prefix)}


def _refuse(folder: Path, faults: list[str]) -> None:
    if faults:
        raise StoreError(f"weights in {folder} cannot be used: " + "; ".join(faults))


def open_store(folder: Path) -> Store:
    """A store, from its manifest and its files' lengths and headers: milliseconds, however large it is.

    Raises:
        StoreError: names every file that is missing, truncated, a Git LFS pointer, or has a faulty header.
    """
    manifest, files = read_manifest(folder)
    faults = [file.fault for file in files.values() if file.fault]
    for entry in (entry for file in files.values() for entry in file.entries.values()):
        if entry.dtype not in TYPES:
            faults.append(f"{entry.file}: {entry.name} is of type {entry.dtype}, which no store has: convert again")
    _refuse(folder, faults)
    return Store(folder, manifest, files)


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a store, after hashing all its files.

    Raises:
        StoreError: names every file that is missing, truncated or altered.
    """
    manifest, files = read_manifest(folder)
    faults = []
    for file in files.values():
        if file.fault:
            faults.append(file.fault)
            continue
        with headers.open_regular(file.path, folder) as opened:
            if _Reader(opened).finish() != file.sha256:
                faults.append(f"{file.path} is altered: its SHA-256 differs from the manifest's")
    _refuse(folder, faults)
    return manifest


def load(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a store as `component.name`, in host memory; all its files are verified."""
    try:
        store = open_store(folder)
    except StoreError:
        verify(folder)  # names altered files too
        raise
    for name in store.texts():
        store.read_text(name)
    return {
        f"{component}.{name}": value
        for component in store.components()
        for name, value in store.read(component).items()
    }


def _int8(weight: Tensor) -> QuantTensor:
    """A weight [out, ...] as int8 with float32 scales [out, 1, ...], one for each output row."""
    rows = quantise(weight.detach().flatten(1), "int8")
    return QuantTensor(rows.data.reshape(weight.shape), rows.scale.reshape(-1, *[1] * (weight.ndim - 1)))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be written; `read` is called when it is written."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @classmethod
    def of(cls, value: Tensor) -> "StoredTensor":
        return cls(value.dtype, tuple(value.shape), lambda: value)

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


class Writer:
    """Writes a store one tensor at a time, so that a model larger than memory can be converted.

    The manifest is written last: until `close`, the folder is not a valid store. As a context manager, an error removes
    what was written; what a killed process left, the next Writer of the folder removes.

    Raises:
        StoreError: another process writes to the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        self._begun: list[Path] = []
        self._made = not folder.exists()
        self._needed = 0
        folder.mkdir(parents=True, exist_ok=True)
        self._unfinished = (folder / UNFINISHED).open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._unfinished, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StoreError(f"{folder} is in use: another conversion writes to it") from None
        self._unfinished.seek(0)
        for name in [MANIFEST, *self._unfinished.read().splitlines()]:
            (folder / Path(name).name).unlink(missing_ok=True)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None:
            for path in [*self._begun, self.folder / UNFINISHED]:
                path.unlink(missing_ok=True)
            if self._made and not any(self.folder.iterdir()):
                self.folder.rmdir()

    def reserve(self, needed: int) -> None:
        """Raises StoreError unless the disk has room for so many bytes."""
        self._needed = max(needed, self._needed)
        if needed > (free := shutil.disk_usage(self.folder).free):
            raise StoreError(
                f"{self.folder} has {free / 2**30:.1f} GiB free, and {needed / 2**30:.1f} GiB ({needed} bytes) are "
                f"needed: free some, or give another folder"
            )

    def add(self, component: str, tensors: Mapping[str, StoredTensor], shard_bytes: int = SHARD_BYTES) -> None:
        """Write one component; a tensor's stored name is `component.name`, and no tensor is split.

        Raises:
            StoreError: the disk does not have enough space.
        """
        self.reserve(sum(tensor.bytes for tensor in tensors.values()))
        shards: list[dict[str, StoredTensor]] = [{}]
        room = shard_bytes
        for name, tensor in tensors.items():
            if tensor.bytes > room and shards[-1]:
                shards.append({})
                room = shard_bytes
            shards[-1][f"{component}.{name}"] = tensor
            room -= tensor.bytes
        for index, shard in enumerate(shards):
            self._shard(f"{component}{f'-{index}' if len(shards) > 1 else ''}.safetensors", shard)

    def _shard(self, file_name: str, tensors: dict[str, StoredTensor]) -> None:
        # large elements first, so that each tensor starts at a multiple of its element's size
        ordered = sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize)
        header, position = {}, 0
        for name, tensor in ordered:
            end = position + tensor.bytes
            header[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [position, end],
            }
            position = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        digest = hashlib.sha256()
        with self._create(file_name) as file:

            def write(data: bytes | memoryview) -> None:
                file.write(data)
                digest.update(data)

            write(len(text).to_bytes(8, "little") + text)
            for name, tensor in ordered:
                value = tensor.read().detach().cpu().contiguous()
                if (value.dtype, tuple(value.shape)) != (tensor.dtype, tensor.shape):
                    raise ValueError(f"{name} came as {value.dtype} {list(value.shape)}, not as announced")
                write(value.reshape(-1).view(torch.uint8).numpy().data)
        self._files[file_name] = {"bytes": 8 + len(text) + position, "sha256": digest.hexdigest()}

    def add_text(self, name: str, text: str) -> None:
        data = text.encode()
        with self._create(name) as file:
            file.write(data)
        self._files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}

    def close(self, **facts: str) -> None:
        """Write the manifest, with facts about the store: the preset, the source."""
        content = {"format": 1, **facts, "files": dict(sorted(self._files.items()))}
        with self._create(MANIFEST) as file:
            file.write((json.dumps(content, indent=1) + "\n").encode())
        (self.folder / UNFINISHED).unlink()
        self._unfinished.close()

    @contextlib.contextmanager
    def _create(self, name: str) -> Iterator[BinaryIO]:
        path = self.folder / name
        self._begun.append(path)
        try:
            print(name, file=self._unfinished, flush=True)
            with path.open("wb") as file:
                yield file
        except OSError as error:
            needed = f": {self._needed} bytes are needed" if self._needed else ""
            raise StoreError(f"{path} cannot be written: {error.strerror or error}{needed}") from None


def save(
    folder: Path, components: Mapping[str, Mapping[str, Tensor]], *, low_bit: set[str], extra: Mapping[str, str]
) -> None:
    """Write a store, replacing the weights in the folder.

    Args:
        components: tensors by component; a tensor's stored name is `component.name`.
        low_bit: components whose weights with two or more dimensions are stored as int8; the rest is bfloat16, and
            vectors are float32.
        extra: further text files by name, such as the tokenizer.
    """
    writer = Writer(folder)
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.json")]:
        old.unlink()
    for component, tensors in components.items():
        entries: dict[str, StoredTensor] = {}
        for name, value in tensors.items():
            if value.is_floating_point() and value.ndim >= 2:
                if component in low_bit and name.endswith("weight"):
                    low = _int8(value.cpu())
                    entries[name], entries[f"{name}_scale"] = StoredTensor.of(low.data), StoredTensor.of(low.scale)
                else:
                    entries[name] = StoredTensor.of(value.bfloat16())
            else:
                entries[name] = StoredTensor.of(value)
        writer.add(component, entries)
    for name, text in extra.items():
        writer.add_text(name, text)
    writer.close()
