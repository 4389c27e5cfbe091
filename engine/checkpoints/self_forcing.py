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


def read_pickle(path: Path, generator: str = GENERATORS[0]) -> tuple[Mapping[str, Tensor], str]:
    """The tensors of a pickled checkpoint, memory-mapped, and the key that they were under ("" if none).

    Torch's restricted unpickler runs no code: it builds tensors and plain containers, and refuses everything else.

    Args:
        generator: the preferred key of `GENERATORS`; if it is missing, the other is used.

    Raises:
        StoreError: the file contains more than tensors, is damaged, or has no generator.
    """
    headers.open_regular(path, path.parent).close()
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged file can raise anything
        raise StoreError(
            f"{path} is refused: it is damaged or holds more than tensors, and a pickle may run any code when it is "
            f"read. Get the weights as safetensors, or from their publisher again ({_reason(error)})"
        ) from None
    if not isinstance(content, dict):
        raise StoreError(f"{path} holds a {type(content).__name__} instead of tensors by name")
    for key in (generator, *GENERATORS):
        if isinstance(content.get(key), dict):
            return _tensors(content[key], path), key
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return _tensors(content, path), ""
    raise StoreError(
        f"{path} has none of {', '.join(GENERATORS)} among its keys: {', '.join(map(repr, list(content)[:10]))}"
    )


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
