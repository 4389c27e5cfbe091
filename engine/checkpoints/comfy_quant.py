"""ComfyUI's mixed formats: which are read, and which would be misread by the values alone.

A quantised layer has a format, the JSON object {"format": "float8_e4m3fn", ...}, as uint8 in `LAYER.comfy_quant`, or in
the file's metadata, as {"layers": {LAYER: {...}}} under `_quantization_metadata`. The rest of a layer is `weight` and
`weight_scale`, and in some formats more (ComfyUI's `comfy/quant_ops.py`). This module does not load torch.
"""

import json
from collections.abc import Iterator

from engine.checkpoints import headers, wan
from engine.checkpoints.headers import Entry, Weights

MARK = ".comfy_quant"
METADATA = "_quantization_metadata"
FORMATS = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2", "int8_tensorwise": "I8"}
"""Formats that are read, weight = stored * scale, and the type of the stored weight."""
MAX_MARK = 4096
"""Bytes of a mark; real ones have less than 100."""


def faults(weights: Weights) -> list[str]:
    """What is wrong with the marks of these weights: a sentence for each format that is not read, or damage."""
    marks = list(_marks(weights))
    if not marks:
        return []
    types = {wan.unwrapped(name): entry.dtype for name, entry in weights.entries.items()}
    by_reason: dict[str, list[str]] = {}
    for name, mark in marks:
        if reason := _reason(name, mark, types):
            by_reason.setdefault(reason, []).append(name)
    file = weights.files[0]
    return [
        f"{file}: {names[0]}{f' and {len(names) - 1} more layers' if len(names) > 1 else ''}: {reason}"
        for reason, names in by_reason.items()
    ]


def _reason(name: str, mark: object, types: dict[str, str]) -> str | None:
    """Why a layer is not read; None if it is."""
    form = mark.get("format") if isinstance(mark, dict) else None
    if not isinstance(mark, dict) or not isinstance(form, str):
        return "its comfy_quant names no format: download the file again"
    better = "get the weights in bfloat16, or in float8_e4m3fn"
    if form not in FORMATS:
        return f"ComfyUI's format {form[:40]!r} is not read: {better}"
    if mark.get("convrot"):
        return f"ComfyUI's format {form!r} with rotated weights (convrot) is not read: {better}"
    layer = wan.unwrapped(name)
    if (found := types.get(f"{layer}.weight", "missing")) != FORMATS[form]:
        return f"it is said to be {form}, but its weight is {found}: download the file again"
    if not any(f"{layer}.{scale}" in types for scale in wan.SCALES):
        return f"it is said to be {form}, but has no weight_scale: download the file again"
    return None


def _marks(weights: Weights) -> Iterator[tuple[str, object]]:
    """(layer, its mark) of tensors and metadata; None for a mark that cannot be read."""
    for name, entry in weights.entries.items():
        if name.endswith(MARK):
            yield name.removesuffix(MARK), _mark(entry)
    # files whose headers are damaged have no entries
    for file in dict.fromkeys(entry.file for entry in weights.entries.values()):
        if file.suffix == ".safetensors" and (text := headers.read_metadata(file).get(METADATA)) is not None:
            listed = _json(text)
            layers = listed.get("layers") if isinstance(listed, dict) else None
            yield from layers.items() if isinstance(layers, dict) else [(METADATA, None)]


def _mark(entry: Entry) -> object:
    if entry.dtype != "U8" or entry.bytes > MAX_MARK:
        return None
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        return _json(file.read(entry.bytes))


def _json(text: str | bytes) -> object:
    try:
        found: object = json.loads(text)
        return found
    except (ValueError, RecursionError):
        return None
