"""Pickled checkpoints of Self-Forcing and its descendants. Only `convert` reads them, never serving."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints import headers
from engine.checkpoints.headers import StoreError

GENERATORS = ("generator_ema", "generator")
"""Keys of the generator in such a file: its moving average, and its last state."""
CONTAINERS = ("state_dict", "model_state_dict", "model", "module")
"""Keys that trainers put a network under."""
MAX_DEPTH = 4


def read_pickle(path: Path, generator: str = GENERATORS[0]) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of a pickled checkpoint, memory-mapped, and the key that they were under ("" if none).

    Torch's restricted unpickler runs no code: it builds tensors and plain containers, and refuses everything else.

    Args:
        generator: the preferred key of `GENERATORS`; if it is missing, the other is used.

    Raises:
        StoreError: the file contains more than tensors, is damaged, or has no generator.
    """
    if path.name.endswith(headers.INDEX):
        return _shards(path, generator)
    with headers.open_regular(path, path.parent) as file:
        # torch before 1.6 wrote no zip file, and only a zip file can be mapped
        zipped = file.read(2) == b"PK"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # a damaged file can raise anything
        raise StoreError(
            f"{path} is refused: it is damaged or holds more than tensors, and a pickle may run any code when it is "
            f"read. Get the weights as safetensors, or from their publisher again ({_reason(error)})"
        ) from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds a {type(content).__name__} instead of tensors by name")
    return _chosen(content, generator, path)


def _shards(index: Path, generator: str) -> tuple[dict[str, Tensor], str]:
    found: dict[str, Tensor] = {}
    weight_map = headers.read_weight_map(index)
    for shard in sorted(set(weight_map.values())):
        for name, value in read_pickle(index.parent / shard, generator)[0].items():
            if weight_map.get(name) != shard:
                raise StoreError(f"{index}: {name} is in {shard}, but the index says {weight_map.get(name)}")
            found[name] = value
    if missing := weight_map.keys() - found.keys():
        name = min(missing)
        raise StoreError(f"{index}: {name} is not in {weight_map[name]}, where the index has it: download both again")
    return found, ""


def _chosen(content: Mapping[object, object], generator: str, path: Path) -> tuple[dict[str, Tensor], str]:
    """The tensors of the innermost network, and the keys that lead to it. An empty one is not taken."""
    keys: list[str] = []
    while not (content and all(isinstance(value, Tensor) for value in content.values())):
        for key in (generator, *GENERATORS, *CONTAINERS):
            inner = content.get(key)
            if isinstance(inner, dict) and inner and inner is not content and len(keys) < MAX_DEPTH:
                content = inner
                keys.append(key)
                break
        else:
            if keys:
                return _tensors(content, path), ".".join(keys)  # names what is no tensor
            known = ", ".join((*CONTAINERS, *GENERATORS))
            raise StoreError(
                f"{path} has no network under any of {known} among its keys: {', '.join(map(repr, list(content)[:10]))}"
            )
    return _tensors(content, path), ".".join(keys)


def _reason(error: Exception) -> str:
    """What torch found, in our words: its own advise to load the file without restrictions."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"it asks for {found[1]}"
    if "central directory" in str(error) or isinstance(error, EOFError):
        return "it is truncated"
    return type(error).__name__


def _tensors(content: Mapping[object, object], path: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise StoreError(f"{path}: {name!r} is a {type(value).__name__} instead of a tensor")
        headers.printable(name, path)
        found[name] = value
    return found
