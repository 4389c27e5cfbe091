"""Converts foreign checkpoints to the native store, with one tensor in memory at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from engine.checkpoints import headers, layouts, sources, store, wan
from engine.checkpoints.headers import Entry, StoreError, Weights, open_regular
from engine.checkpoints.self_forcing import read_pickle
from engine.checkpoints.store import StoredTensor
from engine.config import Preset
from engine.models.config import DiTConfig
from engine.ops.quant import QuantTensor

SHARD_BYTES = 4 << 30
DTYPES = {name: dtype for dtype, name in store.DTYPES.items()} | {
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U8": torch.uint8,
    "Q8_0": torch.float32,  # as which it is read
}
LOW_BIT = {torch.float8_e4m3fn, torch.float8_e5m2, torch.int8}

BLOCK = 128
"""Side of the square blocks that share a scale."""

Found = Mapping[str, StoredTensor]
"""A checkpoint's tensors under its own names."""
Adapt = Callable[[str, Tensor], Tensor]
"""(our name, float32 weight) -> the weight to store; merges LoRAs."""


def open_tensors(weights: Weights) -> dict[str, StoredTensor]:
    """The tensors of files whose headers were read. Raises StoreError for faulty files."""
    found = {}
    for name, entry in weights.sound().entries.items():
        if entry.dtype not in DTYPES:
            raise StoreError(f"{entry.file}: {name} is of type {entry.dtype}, which is no weight's")
        found[name] = StoredTensor(DTYPES[entry.dtype], entry.shape, partial(_read, entry))
    return found


def _read(entry: Entry) -> Tensor:
    """A tensor of a file; Q8_0 as float32."""
    data = torch.empty(entry.bytes, dtype=torch.uint8)
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        if file.readinto(data.numpy().data) != entry.bytes:
            raise StoreError(f"{entry.file} changed while it was read: try again")
    if entry.dtype == "Q8_0":
        blocks = data.reshape(-1, 34)
        scales, values = blocks[:, :2].clone().view(torch.float16), blocks[:, 2:].view(torch.int8)
        return (values.float() * scales.float()).reshape(entry.shape)
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


def _blocks(shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(-(-size // BLOCK) for size in shape)


def dequantise(stored: Tensor, scale: Tensor) -> Tensor:
    """stored * scale in float32: scale has one element, one for each row of stored [rows, ...], or one for each block
    of `BLOCK` x `BLOCK`."""
    if scale.ndim == 2 and stored.ndim == 2 and scale.shape == _blocks(stored.shape) and scale.numel() > 1:
        spread = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
        return stored.float() * spread[: stored.shape[0], : stored.shape[1]]
    return QuantTensor(stored, scale.float().reshape(-1, *[1] * (stored.ndim - 1))).dequantise()


def network(
    part: str, found: Found, wanted: Mapping[str, wan.Shape], model: str, adapt: Adapt | None = None
) -> tuple[str, Found]:
    """(recognised layout, our tensors) of one network of a checkpoint.

    Of the transformer, the text encoder and whatever has scales, matrices become bfloat16 and everything else float32;
    the VAEs keep their types.

    Args:
        wanted: names and shapes of our tensors.
        model: the preset, for messages.

    Raises:
        StoreError: a tensor is missing, unexpected, misshaped, or in low-bit without a scale; each is named.
    """
    match = layouts.match(part, {name: tensor.shape for name, tensor in found.items()}, wanted)
    if match.differences:
        raise StoreError(f"the {part} is not {model}'s: " + "; ".join(wan.sentences(match.differences)))
    scales = {ours: _scale(ours, match, found) for ours in wanted}
    return match.layout or "renamed", {
        ours: _shaped(found[match.native[ours]], shape)
        if part in ("vae", "light_vae") and scales[ours] is None
        else _served(ours, _shaped(found[match.native[ours]], shape), scales[ours], adapt)
        for ours, shape in wanted.items()
    }


def _shaped(tensor: StoredTensor, shape: wan.Shape) -> StoredTensor:
    """A tensor that fits `shape` by `layouts.match`, in that shape: its last rows, or all of it."""
    if tensor.shape == shape:
        return tensor
    return StoredTensor(tensor.dtype, shape, lambda: tensor.read().reshape(-1, *shape[1:])[-shape[0] :])


def _scale(ours: str, names: layouts.Match, found: Found) -> StoredTensor | None:
    weight = found[names.native[ours]]
    if ours in names.scales:
        scale = found[names.scales[ours]]
        elements = torch.Size(scale.shape).numel()
        fits = elements == 1 or scale.shape in ((weight.shape[0],), (weight.shape[0], 1), _blocks(weight.shape))
        if weight.dtype not in LOW_BIT or not fits:
            raise StoreError(
                f"{names.scales[ours]} has {elements} elements for a weight {weight.dtype} {list(weight.shape)}: only "
                f"one scale, or one for each row or block of {BLOCK} x {BLOCK}, of a float8 or int8 weight is known"
            )
        return scale
    # float8 without any scale in the whole checkpoint is a plain cast; one missing scale is a damaged checkpoint
    if weight.dtype in (torch.int8, torch.uint8) or (weight.dtype in LOW_BIT and names.scales):
        raise StoreError(f"{names.native[ours]} is {weight.dtype} and has no scale beside it ({', '.join(wan.SCALES)})")
    return None


def _served(ours: str, stored: StoredTensor, scale: StoredTensor | None, adapt: Adapt | None) -> StoredTensor:
    dtype = torch.bfloat16 if len(stored.shape) >= 2 and ours.endswith("weight") else torch.float32

    def read() -> Tensor:
        value = stored.read()
        if scale is not None:
            value = dequantise(value, scale.read())
        if adapt is not None:
            value = adapt(ours, value.float())
        return value.to(dtype)

    return StoredTensor(dtype, stored.shape, read)


def load_dit(paths: Sequence[Path], config: DiTConfig) -> dict[str, Tensor]:
    """The transformer's tensors from safetensors in any known layout, for `CausalWan.load_state_dict`.

    Raises:
        StoreError: there are none, they do not fit the model, or there is only a pickle, which serving never reads.
    """
    found = sources.find_all(paths)
    if found.faults:
        raise StoreError("; ".join(found.faults))
    if "dit" not in found.parts:
        pickles = f"; {found.pickles[0]} is a pickle: run `python -m engine convert` first" if found.pickles else ""
        raise StoreError(f"no transformer in {', '.join(map(str, paths))}{pickles}")
    _, tensors = network("dit", open_tensors(found.parts["dit"]), wan.tensors(config), "this model")
    return {name: tensor.read() for name, tensor in tensors.items()}


def _parts(found: sources.Sources, preset: Preset, say: Callable[[str], None]) -> Iterator[tuple[str, str, Found]]:
    """(network, origin, tensors) of every network that was found, in pickles too; each network once."""
    seen = set(found.parts)
    for part, weights in found.parts.items():
        yield part, str(weights.files[0]), open_tensors(weights)
    for path in found.pickles:
        try:
            tensors, key = read_pickle(path, preset.generator)
        except StoreError as error:
            say(f"not used: {error}")
            continue
        kind = sources.kind(tensors)
        if kind is None or kind in seen:
            say(f"not used: {path} ({f'there is another {kind}' if kind else 'no network that is known here'})")
            continue
        if kind == "light_vae" and (fault := sources.raw_latents_fault(path)):
            say(f"not used: {fault}")
            continue
        if zeros := _zeros(tensors):
            say(f"not used: {path} holds zeros instead of weights, {zeros} for one: download it again")
            continue
        seen.add(kind)
        yield (
            kind,
            f"{path}{f', key {key}' if key else ''}",
            {name: StoredTensor.of(value) for name, value in tensors.items()},
        )


def _zeros(tensors: Mapping[str, Tensor]) -> str | None:
    """As `headers.zero_tensors`, for a pickle: the first of its matrices if all that are looked at hold only zeros."""
    matrices = [name for name, value in tensors.items() if value.ndim >= 2 and value.numel()]
    sampled = matrices[:: max(1, len(matrices) // headers.SAMPLED)]
    zero = [name for name in sampled if not tensors[name].flatten()[:: tensors[name].numel() // 64 + 1].any()]
    return zero[0] if zero and len(zero) == len(sampled) else None


def _text(path: Path) -> str:
    with open_regular(path, path.parent) as file:
        try:
            return file.read().decode()
        except UnicodeDecodeError:
            raise StoreError(f"{path} is not UTF-8: download it again") from None


def convert(
    preset: Preset, paths: Sequence[Path], to: Path, *, adapt: Adapt | None = None, say: Callable[[str], None] = print
) -> None:
    """Write the native store of a preset.

    Args:
        paths: files or folders with its networks, in any known layout; each network comes from the first that has it.
        to: a folder that does not exist or is empty.
        adapt: changes the transformer's weights before they are stored.

    Raises:
        StoreError: a source is faulty or does not fit, no source has a transformer, `to` is in use, or the disk is
            full. Then nothing is left of what was written.
    """
    unfinished = (to / store.UNFINISHED).exists()
    if to.exists() and not unfinished and (not to.is_dir() or any(to.iterdir())):
        raise StoreError(f"{to} is in use: give a folder that does not exist or is empty")
    found = sources.find_all(paths)
    if found.faults:
        raise StoreError("; ".join(found.faults))
    if native := [weights.files[0].parent for weights in found.parts.values() if weights.native]:
        raise StoreError(f"{native[0]} is a native store already: it can be served as it is")
    refusals: list[str] = []
    components: dict[str, Found] = {}
    expected = layouts.expected(preset)
    for part, origin, tensors in _parts(found, preset, refusals.append):
        merged = adapt if part == "dit" else None
        layout, components[part] = network(part, tensors, expected[part], preset.name, merged)
        say(f"{part}: {origin}, {layout}, {len(components[part])} tensors")
        found.parts.setdefault(part, Weights())
    for refusal in refusals:
        say(refusal)
    if "dit" not in components:
        raise StoreError("; ".join([f"no transformer in {', '.join(map(str, paths))}", *refusals]))
    if lacking := found.lacking():
        say(f"missing, and needed to serve: {', '.join(lacking)}")
    if preset.statistics is not None:
        statistics = {"mean": torch.tensor(preset.statistics.mean), "std": torch.tensor(preset.statistics.std)}
        components["statistics"] = {name: StoredTensor.of(value) for name, value in statistics.items()}
    tokenizer = None if found.tokenizer is None else _text(found.tokenizer)
    with store.Writer(to) as writer:
        writer.reserve(sum(tensor.bytes for ours in components.values() for tensor in ours.values()))
        for part, ours in components.items():
            writer.add(part, ours, SHARD_BYTES)
        if tokenizer is not None:
            writer.add_text(sources.TOKENIZER, tokenizer)
        writer.close(preset=preset.name)
