"""The tensors that a preset's store must contain: names and shapes by network, without building any module."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from engine.checkpoints import umt5, wan, wan_vae
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


def trim(part: str, found: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, Shape]:
    """The shapes after loading: a file's first TGrow layer of a light decoder may have the rows of several frames, of
    which only the last are used (`engine.models.light_vae`)."""
    trimmed = dict(found)
    for name, shape in wanted.items() if part == "light_vae" else ():
        there = found.get(name, ())
        if len(there) == len(shape) == 4 and there[1:] == shape[1:] and there[0] > shape[0] and name.endswith("weight"):
            trimmed[name] = shape
    return trimmed


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
