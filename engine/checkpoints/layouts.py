"""The tensors that a preset's store must contain, and a checkpoint's that are meant by them: names and shapes by
network, without building any module."""

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from engine.checkpoints import gguf, umt5, wan, wan_vae
from engine.checkpoints.headers import StoreError
from engine.checkpoints.wan import Shape
from engine.config import Preset
from engine.models.config import TextConfig

TENSORS = Path(__file__).with_name("vae_tensors.json")
"""Tensors of both VAEs by family. `python -m engine.checkpoints.layouts` regenerates it from the modules."""


def _vae(names: Collection[str]) -> dict[str, str]:
    return wan_vae.from_diffusers(names) if "decoder.conv_in.weight" in names else {name: name for name in names}


def _light_vae(names: Collection[str]) -> dict[str, str]:
    """The decoder's names; a file's encoder is not used."""
    return {name: name for name in names if name.startswith("decoder.")}


RENAME: dict[str, Callable[[Collection[str]], dict[str, str]]] = {
    "text_encoder": umt5.to_native,
    "vae": _vae,
    "light_vae": _light_vae,
}
"""By network except the transformer: all names of a checkpoint -> ours. The functions raise ValueError or StoreError
for an unknown name, and none of their modules loads torch."""


def text_encoder(sizes: TextConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of `TextEncoder(sizes)`."""
    dim, ffn, inner = sizes.dim, sizes.ffn_dim, sizes.num_heads * sizes.head_dim
    found: dict[str, Shape] = {"umt5.embed_tokens.weight": (sizes.vocab_size, dim)}
    for index in range(sizes.num_layers):
        block = f"umt5.block.{index}.layer"
        found |= {f"{block}.0.SelfAttention.{name}.weight": (inner, dim) for name in "qkv"}
        found[f"{block}.0.SelfAttention.o.weight"] = (dim, inner)
        found[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (32, sizes.num_heads)
        found |= {f"{block}.1.DenseReluDense.{name}.weight": (ffn, dim) for name in ("wi_0", "wi_1")}
        found[f"{block}.1.DenseReluDense.wo.weight"] = (dim, ffn)
        found |= {f"{block}.{layer}.layer_norm.weight": (dim,) for layer in (0, 1)}
    return found | {"umt5.final_layer_norm.weight": (dim,)}


def expected(preset: Preset) -> dict[str, dict[str, Shape]]:
    """Name and shape of every tensor of a preset, by network."""
    vaes = json.loads(TENSORS.read_text())[preset.family]
    return {
        "dit": wan.tensors(preset.dit),
        "text_encoder": text_encoder(preset.text),
        **{part: {name: tuple(shape) for name, shape in tensors.items()} for part, tensors in vaes.items()},
    }


@dataclass(frozen=True)
class Match:
    """A checkpoint's tensors, matched to those of a network."""

    layout: str
    native: dict[str, str]
    """Our name -> the checkpoint's. A name that is unknown maps to itself."""
    scales: dict[str, str]
    """Our name of a low-bit weight -> the checkpoint's name of its scale."""
    differences: wan.Differences


def match(part: str, shapes: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> Match:
    """Match a checkpoint's tensors, by their names in it, to those of a network.

    Raises:
        StoreError: a name belongs to no layout of this network, or two mean the same tensor.
    """
    if part == "dit":
        names = wan.to_native(shapes)
        layout, native, scales = f"{names.layout} layout", names.native, names.scales
    else:
        names = wan.plain(shapes)
        try:
            places = RENAME[part](names.native)
        except ValueError as error:
            raise StoreError(str(error)) from None
        layout, native = "", {}
        for bare, ours in places.items():
            native.setdefault(ours, names.native[bare])  # Hugging Face has an embedding under two names
        scales = {places[bare]: scale for bare, scale in names.scales.items() if bare in places}
    if scales:
        layout += f"{', ' if layout else ''}{len(scales)} low-bit weights with scales"
    fitted = {ours: _fit(part, ours, shapes[name], wanted.get(ours)) for ours, name in native.items()}
    return Match(layout, native, scales, wan.compare(wanted, fitted))


def _fit(part: str, name: str, found: Shape, wanted: Shape | None) -> Shape:
    """The shape after loading. A light decoder's first TGrow layer may have the rows of several frames, of which only
    the last are used (`engine.models.light_vae`), and GGUF files store some shapes as others."""
    if wanted is None or found == wanted:
        return found
    longer = len(found) == len(wanted) == 4 and found[1:] == wanted[1:] and found[0] > wanted[0]
    if part == "light_vae" and longer and name.endswith("weight"):
        return wanted
    return gguf.fit(found, wanted)


def vae_tensors() -> dict[str, dict[str, dict[str, Shape]]]:
    """What `TENSORS` should contain, from the modules themselves."""
    import torch

    from engine.config import PRESETS
    from engine.models.light_vae import LightDecoder
    from engine.models.vae import CausalVAE

    found: dict[str, dict[str, dict[str, Shape]]] = {}
    for preset in {preset.family: preset for preset in PRESETS.values()}.values():
        with torch.device("meta"):
            modules = {"vae": CausalVAE(preset.vae), "light_vae": LightDecoder(preset.light_vae)}
        found[preset.family] = {
            part: {name: tuple(value.shape) for name, value in module.state_dict().items()}
            for part, module in modules.items()
        }
    return found


def write(families: Mapping[str, Mapping[str, Mapping[str, Shape]]]) -> str:
    """The JSON text of `TENSORS`, one tensor a line."""
    text = json.dumps(families)
    return text.replace("], ", "],\n").replace('": {', '": {\n').replace("}, ", "},\n") + "\n"


if __name__ == "__main__":
    TENSORS.write_text(write(vae_tensors()))
