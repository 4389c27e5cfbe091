"""The native store: a folder of safetensors files and a manifest with the name and hash of each file.

All files are verified before any of them is loaded. Matrices may be stored as int8 with one scale per output row
(`NAME` and `NAME_scale`), so that the embedded model fits into the repository.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from engine.checkpoints.headers import StoreError
from engine.checkpoints.sources import MANIFEST
from engine.ops.quant import QuantTensor, quantise

__all__ = ["MANIFEST", "StoreError", "StoredTensor", "Writer", "load", "save", "verify"]

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


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a store, after checking that all its files are present and unaltered.

    Raises:
        StoreError: names every file that is missing, truncated or altered.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        files: dict[str, dict[str, Any]] = manifest["files"]
    except FileNotFoundError:
        raise StoreError(f"{path} is missing: this folder holds no Livereel weights") from None
    except (ValueError, KeyError, TypeError):
        raise StoreError(f"{path} is not a manifest of this project: restore it or convert the weights again") from None
    faults = []
    for name, entry in files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink():
            faults.append(f"{name}: must be a plain file in {folder}")
        elif not file.is_file():
            faults.append(f"{name} is missing")
        elif file.stat().st_size != entry["bytes"]:
            faults.append(f"{name} is truncated or altered: {file.stat().st_size} bytes, expected {entry['bytes']}")
        elif _digest(file) != entry["sha256"]:
            faults.append(f"{name} is altered: its SHA-256 differs from the manifest's")
    if faults:
        raise StoreError(f"weights in {folder} cannot be used: " + "; ".join(faults))
    return manifest


def load(folder: Path) -> dict[str, Tensor]:
    """Verify a store and load every tensor; int8 matrices are dequantised to float32."""
    manifest = verify(folder)
    stored: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                stored |= load_file(folder / name)
            except SafetensorError as error:
                raise StoreError(f"{folder / name} is not a readable safetensors file: {error}") from None
    return {
        name: QuantTensor(value, stored[f"{name}_scale"]).dequantise() if f"{name}_scale" in stored else value
        for name, value in stored.items()
        if not name.endswith("weight_scale")
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

    The manifest is written last: until `close`, the folder is not a valid store.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MANIFEST).unlink(missing_ok=True)

    def add(self, component: str, tensors: Mapping[str, StoredTensor], shard_bytes: int = SHARD_BYTES) -> None:
        """Write one component; a tensor's stored name is `component.name`, and no tensor is split.

        Raises:
            StoreError: the disk does not have enough space.
        """
        total = sum(tensor.bytes for tensor in tensors.values())
        if total > (free := shutil.disk_usage(self.folder).free):
            raise StoreError(f"{self.folder} has {free / 2**30:.1f} GiB free, {component} takes {total / 2**30:.1f}")
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
        with (self.folder / file_name).open("wb") as file:

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
        path = self.folder / name
        path.write_text(text, encoding="utf-8")
        self._files[name] = {"bytes": path.stat().st_size, "sha256": _digest(path)}

    def close(self, **facts: str) -> None:
        """Write the manifest, with facts about the store: the preset, the source."""
        content = {"format": 1, **facts, "files": dict(sorted(self._files.items()))}
        (self.folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n")


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
