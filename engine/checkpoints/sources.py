"""Finds the networks in a file or folder, by the names of the tensors, never by a file's name alone.

Supported are the native store, a diffusers folder (with `transformer/`, `text_encoder/`, `vae/`), an original Wan
folder, and single files. Only headers are read.
"""

import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from engine.checkpoints import comfy_quant, gguf, headers, wan
from engine.checkpoints.headers import StoreError, Weights
from engine.checkpoints.manifest import MANIFEST, read_manifest

TOKENIZER = "tokenizer.json"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
READERS = {".safetensors": headers.read_header, gguf.SUFFIX: gguf.read_header}
SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(?P<suffix>\.\w+)")
SUBFOLDERS = ("transformer", "text_encoder", "vae")
MARKS = {
    "dit": ("patch_embedding.weight", "time_embedding.0.weight", "condition_embedder.time_proj.weight"),
    "text_encoder": (
        "shared.weight", "encoder.embed_tokens.weight", "token_embedding.weight", "enc.output_norm.weight"
    ),
    "vae": ("decoder.conv1.weight", "decoder.conv_in.weight", "conv2.weight", "post_quant_conv.weight"),
    "light_vae": ("decoder.1.weight",),
}  # fmt: skip
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

    def set_tokenizer(self, path: Path) -> None:
        """Take this file, or its fault."""
        try:
            headers.open_regular(path, path.parent).close()
            self.tokenizer = path
        except StoreError as error:
            self.faults.append(str(error))

    def lacking(self) -> list[str]:
        """What serving needs and is not here, by name."""
        lacking = [part for part in ("dit", "text_encoder") if part not in self.parts]
        if not self.parts.keys() & {"vae", "light_vae"}:
            lacking.append("vae or light_vae")
        # conversion adds it
        if "statistics" not in self.parts and any(weights.native for weights in self.parts.values()):
            lacking.append("statistics")
        if self.tokenizer is None:
            lacking.append(TOKENIZER)
        return lacking


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
        tokenizers = [path / TOKENIZER, path / "tokenizer" / TOKENIZER, *path.glob(f"google/*/{TOKENIZER}")]
        if file := next((file for file in tokenizers if file.is_file()), None):
            sources.set_tokenizer(file)
    elif path.suffix in READERS or path.name.endswith(headers.INDEX_SUFFIX):
        weights = _read_file(path) if path.suffix in READERS else headers.read_index(path)
        _take(weights, path, sources)
        if sources.unused:
            names = ", ".join(list(weights.entries)[:3])
            raise StoreError(f"{path} holds no network that is known here, but {names or 'nothing'}")
    elif path.name == TOKENIZER and path.exists():
        sources.set_tokenizer(path)
    elif _is_pickle(path) and path.exists():
        sources.pickles.append(path)
    elif path.exists():
        raise StoreError(f"{path} is neither a folder nor a {', '.join((*READERS, *PICKLES))} file")
    else:
        raise StoreError(f"{path} is missing")
    if not (sources.parts or sources.pickles or sources.faults or sources.tokenizer):
        unused = f" that are known here, only {sources.unused[0]}" if sources.unused else ": no .safetensors file"
        raise StoreError(f"{path} holds no weights{unused}, no manifest, no `transformer` folder")
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


def pickle_fault(path: Path) -> str | None:
    """What is wrong with a pickle, or with the shards of an index, as far as is seen without reading them: a zip file
    ends with its directory."""
    try:
        if path.name.endswith(headers.INDEX):
            shards = sorted(set(headers.read_weight_map(path).values()))
            return next(filter(None, (pickle_fault(path.parent / shard) for shard in shards)), None)
        with headers.open_regular(path, path.parent) as file:
            truncated = file.read(2) == b"PK" and not zipfile.is_zipfile(file)
            return f"{path} is truncated: download it again" if truncated else None
    except StoreError as error:
        return str(error)


def _look_into(folder: Path, sources: Sources) -> None:
    indices = sorted(folder.glob(f"*{headers.INDEX_SUFFIX}"))
    in_index: set[Path] = set()
    for index in indices:
        weights = headers.read_index(index)
        in_index |= set(weights.files)
        _take(weights, index, sources)
    found = []
    for file in (file for suffix in READERS for file in sorted(folder.glob(f"*{suffix}"))):
        if file not in in_index:
            weights = _read_file(file)
            in_index |= set(weights.files)
            found.append((file, weights))
    # of one network in several types of GGUF, only that which can be read is meant
    for file, weights in sorted(found, key=lambda item: (item[0].suffix == gguf.SUFFIX, bool(item[1].faults))):
        if file.suffix == gguf.SUFFIX and weights.faults and kind(weights.entries) in sources.parts:
            sources.unused.append(file)
        else:
            _take(weights, file, sources)
    pickles = sorted(file for file in folder.iterdir() if _is_pickle(file))
    for index in [file for file in pickles if file.name.endswith(headers.INDEX)]:
        try:
            in_index |= {folder / shard for shard in headers.read_weight_map(index).values()}
        except StoreError as error:
            sources.faults.append(str(error))
            pickles.remove(index)
    for file in pickles:
        if file in in_index:
            continue
        if SHARD.fullmatch(file.name):
            sources.faults.append(
                f"{file} is one shard of several, and their index {_index_name(file)} is missing: download it too"
            )
        else:
            sources.pickles.append(file)


def raw_latents_fault(path: Path) -> str | None:
    """LightX2V's `lighttae...` has the names and shapes of TAEHV's decoder, but takes latents that are not normalised:
    only the file's name tells them apart."""
    if not path.name.lower().startswith("lighttae"):
        return None
    return f"{path} is LightX2V's light decoder for raw latents, which is not served: get TAEHV's taew2_1 instead"


def _is_pickle(path: Path) -> bool:
    return Path(path.name.removesuffix(headers.INDEX)).suffix in PICKLES


def _index_name(shard: Path) -> str:
    match = SHARD.fullmatch(shard.name)
    return f"{match['stem']}{match['suffix']}{headers.INDEX}" if match else ""


def _read_file(path: Path) -> Weights:
    """The headers of a file; if it is a shard, of all shards of its network, whether or not their index is there."""
    match = SHARD.fullmatch(path.name)
    read = READERS[path.suffix]
    if match is None:
        return headers.read_weights([path], path.parent, read)
    index = path.with_name(_index_name(path))
    if index.exists():
        return headers.read_index(index)
    there = {
        int(other["index"]): file
        for file in sorted(path.parent.glob(f"*{path.suffix}"))
        if (other := SHARD.fullmatch(file.name)) and (other["stem"], other["count"]) == (match["stem"], match["count"])
    }
    weights = headers.read_weights(there.values(), path.parent, read)
    if lacking := int(match["count"]) - len(there.keys() & set(range(1, int(match["count"]) + 1))):
        weights.faults.append(f"{path} is one shard of {int(match['count'])}, and {lacking} are missing: download them")
    return weights


def _take(weights: Weights, path: Path, sources: Sources) -> None:
    part = kind(weights.entries)
    weights.faults += comfy_quant.faults(weights)
    if part == "light_vae" and (fault := raw_latents_fault(path)):
        sources.faults.append(fault)
    elif part is not None:
        sources.add(part, weights)
    elif weights.faults:
        sources.faults += weights.faults
    else:
        sources.unused.append(path)


def _native(folder: Path) -> Sources:
    """A native store: checks its files against its manifest, except hashes, which loading checks."""
    sources = Sources()
    for name, file in read_manifest(folder)[1].items():
        if file.fault:
            sources.faults.append(file.fault)
        elif file.entries and (zeros := headers.zero_tensors(file.path, file.entries.values())):
            sources.faults.append(
                f"{file.path} holds zeros instead of weights, {zeros[0]} for one: convert the weights again"
            )
        if name == TOKENIZER and not file.fault:
            sources.tokenizer = file.path
        for full, entry in file.entries.items():
            part, _, tensor = full.partition(".")
            mine = sources.parts.setdefault(part, Weights(native=True))
            mine.entries[tensor] = entry
            if file.path not in mine.files:
                mine.files.append(file.path)
    return sources
