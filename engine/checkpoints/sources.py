"""Finds the networks in a file or folder, by the names of the tensors, never by a file's name alone.

Supported are the native store, a diffusers folder (with `transformer/`, `text_encoder/`, `vae/`), an original Wan
folder, and single files. Only headers are read.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoints import headers, wan
from engine.checkpoints.headers import StoreError, Weights

MANIFEST = "manifest.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
SUBFOLDERS = ("transformer", "text_encoder", "vae")
MARKS = {
    "dit": ("patch_embedding.weight", "time_embedding.0.weight", "condition_embedder.time_proj.weight"),
    "text_encoder": ("shared.weight", "encoder.embed_tokens.weight", "token_embedding.weight"),
    "vae": ("decoder.conv1.weight", "decoder.conv_in.weight", "conv2.weight", "post_quant_conv.weight"),
    "light_vae": ("decoder.1.weight",),
}
"""Tensors that identify a network; one of them suffices."""


@dataclass
class Sources:
    """The networks that were found."""

    parts: dict[str, Weights] = field(default_factory=dict)
    """By network: `dit`, `text_encoder`, `vae`, `light_vae`, and any other in a native store."""
    pickles: list[Path] = field(default_factory=list)
    unused: list[Path] = field(default_factory=list)
    """Files without a known network, such as a LoRA."""
    tokenizer: Path | None = None
    faults: list[str] = field(default_factory=list)

    def add(self, part: str, weights: Weights) -> None:
        if part in self.parts:
            files = [w.files[0] for w in (self.parts[part], weights)]
            self.faults.append(f"{files[0]} and {files[1]} both hold a {part}: give the one to use by its path")
        else:
            self.parts[part] = weights


def kind(names: Iterable[str]) -> str | None:
    """The network that tensors with these names belong to; None if it is unknown."""
    bare = {wan.unwrapped(name) for name in names}
    if any(name.startswith("blocks.") and (".cross_attn." in name or ".attn2." in name) for name in bare):
        return "dit"
    return next((part for part, marks in MARKS.items() if not bare.isdisjoint(marks)), None)


def find(path: Path) -> Sources:
    """The networks in a file or folder.

    Raises:
        StoreError: nothing was found, or a manifest cannot be read.
    """
    sources = Sources()
    if path.is_dir():
        if (path / MANIFEST).exists():
            return _native(path)
        for folder in (path, *(path / name for name in SUBFOLDERS)):
            if folder.is_dir():
                _look_into(folder, sources)
        tokenizers = [path / "tokenizer.json", path / "tokenizer/tokenizer.json", *path.glob("google/*/tokenizer.json")]
        sources.tokenizer = next((file for file in tokenizers if file.is_file()), None)
    elif path.name.endswith(headers.INDEX_SUFFIX):
        _take(headers.read_index(path), path, sources)
    elif path.suffix == ".safetensors":
        _take(headers.read_weights([path], path.parent), path, sources)
    elif path.suffix in PICKLES and path.exists():
        sources.pickles.append(path)
    elif path.exists():
        raise StoreError(f"{path} is neither a folder nor a .safetensors, {', '.join(PICKLES)} file")
    else:
        raise StoreError(f"{path} is missing")
    if not sources.parts and not sources.pickles and not sources.faults:
        raise StoreError(f"{path} holds no weights: no .safetensors file, no manifest, no `transformer` folder")
    return sources


def find_all(paths: Sequence[Path]) -> Sources:
    """The networks of several places; a network in more than one comes from the first of them."""
    merged, *others = [find(path) for path in paths]
    for other in others:
        merged.parts = other.parts | merged.parts
        merged.pickles += other.pickles
        merged.unused += other.unused
        merged.faults += other.faults
        merged.tokenizer = merged.tokenizer or other.tokenizer
    return merged


def _look_into(folder: Path, sources: Sources) -> None:
    indices = sorted(folder.glob(f"*{headers.INDEX_SUFFIX}"))
    in_index: set[Path] = set()
    for index in indices:
        weights = headers.read_index(index)
        in_index |= set(weights.files)
        _take(weights, index, sources)
    for file in sorted(folder.glob("*.safetensors")):
        if file not in in_index:
            _take(headers.read_weights([file], folder), file, sources)
    sources.pickles += sorted(file for file in folder.iterdir() if file.suffix in PICKLES)


def _take(weights: Weights, path: Path, sources: Sources) -> None:
    part = kind(weights.entries)
    if part is not None:
        sources.add(part, weights)
    elif weights.faults:
        sources.faults += weights.faults
    else:
        sources.unused.append(path)


def _native(folder: Path) -> Sources:
    """A native store: checks names and lengths of files against its manifest; loading checks hashes."""
    path = folder / MANIFEST
    try:
        with headers.open_regular(path, folder) as file:
            files = json.load(file)["files"]
        lengths = {str(name): int(entry["bytes"]) for name, entry in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise StoreError(f"{path} is not a manifest of this project: convert the weights again") from None
    sources = Sources()
    for name, length in lengths.items():
        file_path = folder / name
        if Path(name).name != name:
            sources.faults.append(f"{path}: {name} must be a plain file name")
            continue
        if name == "tokenizer.json" and file_path.is_file():
            sources.tokenizer = file_path
        if not name.endswith(".safetensors"):
            if not file_path.is_file():
                sources.faults.append(f"{file_path} is missing")
            continue
        weights = headers.read_weights([file_path], folder)
        if not weights.faults and file_path.stat().st_size != length:
            weights.faults.append(f"{file_path} is altered: {file_path.stat().st_size} bytes, expected {length}")
        sources.faults += weights.faults
        for full, entry in weights.entries.items():
            part, _, tensor = full.partition(".")
            mine = sources.parts.setdefault(part, Weights(native=True))
            mine.entries[tensor] = entry
            if file_path not in mine.files:
                mine.files.append(file_path)
    return sources
