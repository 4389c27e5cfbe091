"""The native store: a folder of safetensors files behind a manifest that names and hashes every one of them.

Weights are verified before any of them is loaded. Matrices may be stored as int8 with one scale per output row
(`NAME` and `NAME_scale`), which is how the embedded model fits into the repository.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

MANIFEST = "manifest.json"
SHARD_BYTES = 15 << 20


class StoreError(Exception):
    """A store cannot be used; the message names the file and what is wrong with it."""


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(folder: Path) -> dict[str, Any]:
    """The manifest of a store whose files are all there and unaltered.

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
    """Every tensor of a verified store, int8 matrices restored to float32."""
    manifest = verify(folder)
    stored: dict[str, Tensor] = {}
    for name in manifest["files"]:
        if name.endswith(".safetensors"):
            try:
                stored |= load_file(folder / name)
            except SafetensorError as error:
                raise StoreError(f"{folder / name} is not a readable safetensors file: {error}") from None
    return {
        name: value.float() * stored[f"{name}_scale"] if f"{name}_scale" in stored else value
        for name, value in stored.items()
        if not name.endswith("weight_scale")
    }


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """int8 [out, ...] and scale float32 [out, 1, ...] of a weight [out, ...]: symmetric, one scale per output row."""
    flat = weight.detach().float().flatten(1)
    scale = flat.abs().amax(dim=1).clamp(min=1e-12) / 127
    rounded = (flat / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    return rounded.reshape(weight.shape), scale.reshape(-1, *[1] * (weight.ndim - 1))


def save(
    folder: Path, components: Mapping[str, Mapping[str, Tensor]], *, low_bit: set[str], extra: Mapping[str, str]
) -> None:
    """Write a store, replacing what is there.

    Args:
        components: tensors by component; a tensor's stored name is `component.name`.
        low_bit: components whose weights of two dimensions or more are stored as int8; the rest is bfloat16, and
            vectors are float32.
        extra: further text files by name, such as the tokenizer.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*.safetensors"), *folder.glob("*.json")]:
        old.unlink()
    for component, tensors in components.items():
        shards: list[dict[str, Tensor]] = [{}]
        room = SHARD_BYTES
        for name, value in tensors.items():
            entry: dict[str, Tensor] = {}
            if value.is_floating_point() and value.ndim >= 2:
                if component in low_bit and name.endswith("weight"):
                    entry[f"{component}.{name}"], entry[f"{component}.{name}_scale"] = quantise(value.cpu())
                else:
                    entry[f"{component}.{name}"] = value.detach().cpu().bfloat16()
            else:
                entry[f"{component}.{name}"] = value.detach().cpu()
            size = sum(x.numel() * x.element_size() for x in entry.values())
            if size > room and shards[-1]:
                shards.append({})
                room = SHARD_BYTES
            shards[-1] |= {key: tensor.contiguous().clone() for key, tensor in entry.items()}
            room -= size
        for index, shard in enumerate(shards):
            suffix = f"-{index}" if len(shards) > 1 else ""
            save_file(shard, folder / f"{component}{suffix}.safetensors")
    for name, text in extra.items():
        (folder / name).write_text(text)
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": _digest(path)}
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    (folder / MANIFEST).write_text(json.dumps({"format": 1, "files": files}, indent=1) + "\n")
