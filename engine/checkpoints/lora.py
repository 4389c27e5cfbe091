"""Reads LoRA files with any common spelling of tensor names into a `Lora` under our module names.

Supported are PEFT (`base_model.model.NAME.lora_A.weight`, an adapter's name after `lora_A` or not; LongLive's
`generator_lora` is such a dict), diffusers (`transformer.NAME.lora_A.weight`, with diffusers' module names), the
original names (`diffusion_model.NAME.lora_down.weight`, `.alpha`, and the plain differences `.diff`, `.diff_b`,
`.diff_m` that distillation LoRAs of Wan add for norms, biases and modulations), and kohya's
(`lora_unet_NAME_WITH_UNDERSCORES.lora_down.weight`). Prefixes and endings may be combined in any way.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoints import headers, wan
from engine.checkpoints.store import StoreError
from engine.wire import LORA_NAME

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of every parameter of a model, by name."""


@dataclass(frozen=True, eq=False)
class LoraLayer:
    """The change of one weight [out, in] at strength 1: scale * up @ down."""

    down: Tensor
    """[r, in]"""
    up: Tensor
    """[out, r]"""
    scale: float
    """alpha / r; 1 if the file has no alpha."""

    def delta(self, device: torch.device | None = None) -> Tensor:
        """float32 [out, in]."""
        up, down = (x.to(device=device, dtype=torch.float32) for x in (self.up, self.down))
        return self.scale * (up @ down)


@dataclass(frozen=True, eq=False)
class Lora:
    """One LoRA, in host memory, in the dtype of its file."""

    name: str
    layers: dict[str, LoraLayer]
    """By module name; each changes the module's `weight`."""
    differences: dict[str, Tensor]
    """By parameter name; each is added to the parameter."""

    def touched(self) -> set[str]:
        """Names of the parameters that this LoRA changes."""
        return {f"{layer}.weight" for layer in self.layers} | self.differences.keys()


def shapes_of(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter of a model, for `parse` and `read`."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


# files


def names(folder: Path) -> list[str]:
    """The LoRAs in a folder: files NAME.safetensors, and folders NAME as PEFT writes them."""
    found = {path.stem for path in folder.glob("*.safetensors")}
    found |= {path.parent.name for path in folder.glob(f"*/{PEFT_FILE}")}
    return sorted(name for name in found if _find(folder, name) is not None)


PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"


def _find(folder: Path, name: str) -> Path | None:
    """The file of a LoRA in the folder; None if there is none or the name is not a valid one."""
    if not re.fullmatch(LORA_NAME, name):
        return None
    for path in (folder / f"{name}.safetensors", folder / name / PEFT_FILE):
        # a name must not lead out of the folder, not even through a link
        if path.is_file() and path.resolve().is_relative_to(folder.resolve()):
            return path
    return None


class LoraNotFoundError(StoreError):
    """No LoRA in the folder has this name."""


def read(folder: Path, name: str, shapes: Shapes) -> Lora:
    """Load a LoRA of the folder for a model with these parameters.

    Raises:
        LoraNotFoundError: there is no such LoRA.
        StoreError: the file is damaged, of an unsupported kind, or for another model; the message names the tensor.
    """
    path = _find(folder, name)
    if path is None:
        raise LoraNotFoundError(f"there is no LoRA {name!r} in the folder: put {name}.safetensors there, without links")
    try:
        with path.open("rb") as start:
            if what := headers.stand_in(start.read(headers.LOOK)):
                raise StoreError(f"LoRA {name} {what}")
        with safe_open(path, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            # copied, since the file may change later: what safe_open returns is mapped from it
            tensors = {key: file.get_tensor(key).clone() for key in list(file.keys())}
        config = path.with_name(PEFT_CONFIG)
        if path.name == PEFT_FILE and config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
        else:
            # diffusers stores the PEFT settings in the file's header, by component
            stored = json.loads(metadata.get("lora_adapter_metadata", "{}"))
            settings = {key.removeprefix("transformer."): value for key, value in stored.items()}
        if not isinstance(settings, dict):
            raise ValueError(f"{PEFT_CONFIG} is no JSON object")
    except (SafetensorError, OSError, ValueError, AttributeError) as error:
        # clients see this message, so it must not contain the path, as the system's messages do
        raise StoreError(f"LoRA {name} cannot be read: {getattr(error, 'strerror', None) or error}") from None
    return parse(name, tensors, shapes, settings)


# names

_PREFIX = re.compile(
    r"(base_model\.model|diffusion_model|transformer|generator_lora|generator|model|module|net"
    r"|_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.|lora_(?:unet|transformer)_+"
)
_WRAPPER = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_ENDING = re.compile(
    r"(?:\.(?:(?P<down>lora_A|lora_down|lora\.down|lora_linear_layer\.down)"
    r"|(?P<up>lora_B|lora_up|lora\.up|lora_linear_layer\.up))|_lora\.(?:(?P<down_>down)|(?P<up_>up)))"
    r"(?:(?:\.[^.]+)??\.(?P<what>weight|bias))?$|\.(?P<other>alpha|diff|diff_b|diff_m)$"
)
_UNSUPPORTED = {
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lora_mid": "LoCon with a Tucker core",
    "lora_embedding_": "an embedding's LoRA",
    "oft_": "OFT",
    "boft_": "BOFT",
    "ia3_": "IA3",
    "vera_": "VeRA",
    "w_norm": "LyCORIS norms",
    "b_norm": "LyCORIS norms",
}


def _spellings(shapes: Shapes) -> dict[str, str]:
    """Every spelling of every module with parameters -> our name of it."""
    modules = {parameter.rpartition(".")[0] for parameter in shapes} - {""}
    found: dict[str, str] = {}
    for module in sorted(modules):
        found[wan.to_diffusers(module)] = module
    found |= {module: module for module in modules}  # our own name takes precedence
    return {spelling.replace(".", "_"): module for spelling, module in found.items()} | found


@dataclass
class _Parts:
    down: Tensor | None = None
    up: Tensor | None = None
    alpha: float | None = None
    bias: Tensor | None = None
    key: str = ""
    """The name of one of the tensors, for error messages."""


def parse(name: str, tensors: Mapping[str, Any], shapes: Shapes, settings: Mapping[str, Any] | None = None) -> Lora:
    """A `Lora` from the tensors of a file.

    Args:
        name: of the LoRA.
        tensors: by their names in the file, or a dict of them under `generator_lora`.
        shapes: the parameters of the model.
        settings: PEFT's, if any; `lora_alpha`, `use_rslora`, `use_dora` and `alpha_pattern` are read.

    Raises:
        StoreError: a tensor is not supported or does not fit the model; the message names it.
    """
    if isinstance(inner := tensors.get("generator_lora"), Mapping):
        tensors = inner
    settings = settings or {}
    if settings.get("use_dora"):
        raise StoreError(f"LoRA {name} is a DoRA, which is not supported: merge it into a plain LoRA first")
    if settings.get("alpha_pattern"):
        raise StoreError(f"LoRA {name} has an alpha_pattern, which is not supported: train it with one alpha")
    spellings = _spellings(shapes)
    parts: dict[str, _Parts] = {}
    differences: dict[str, Tensor] = {}

    def place(parameter: str, value: Tensor, key: str) -> None:
        if parameter not in shapes:
            raise StoreError(f"LoRA {name}: {key} has no place in this model, which has no {parameter}")
        if parameter in differences:
            raise StoreError(f"LoRA {name}: {key} is there twice: keep one adapter in the file")
        if value.numel() != _count(shapes[parameter]):
            fault = f"{key} has the shape {list(value.shape)}, {parameter} has {list(shapes[parameter])}"
            raise StoreError(f"LoRA {name}: {fault}: it was made for a model of another size")
        differences[parameter] = value.reshape(shapes[parameter])

    for key, value in tensors.items():
        if kind := next((kind for mark, kind in _UNSUPPORTED.items() if f".{mark}" in key), None):
            raise StoreError(f"LoRA {name}: {key} belongs to {kind}, which is not supported: merge it into a LoRA")
        ending = _ENDING.search(key)
        if ending is None or not isinstance(value, Tensor):
            raise StoreError(f"LoRA {name}: {key} is not a tensor of a LoRA")
        if not torch.isfinite(value.float()).all():
            raise StoreError(f"LoRA {name}: {key} has values that are not finite: the file is damaged")
        stem, other = key[: ending.start()], ending["other"]
        if other == "diff" and stem.endswith(".modulation"):
            stem, other = stem.removesuffix(".modulation"), "diff_m"
        down = ending["down"] or ending["down_"]
        module = _module(stem, spellings)
        if module is None:
            raise StoreError(f"LoRA {name}: {key} names a layer that this model lacks: it is for another model")
        what = ending["what"]
        if other in ("diff", "diff_b", "diff_m"):
            parameter = {"diff": "weight", "diff_b": "bias", "diff_m": "modulation"}[other]
            place(f"{module}.{parameter}", value, key)
            continue
        part = parts.setdefault(module, _Parts())
        field = "alpha" if other else "bias" if what == "bias" else "down" if down else "up"
        if getattr(part, field) is not None or (field == "bias" and down):
            raise StoreError(f"LoRA {name}: {key} is there twice: keep one adapter in the file")
        if field == "alpha" and value.numel() != 1:
            raise StoreError(f"LoRA {name}: {key} must be one number, not {list(value.shape)}")
        setattr(part, field, value.item() if field == "alpha" else value)
        part.key = key

    layers = {}
    for module, part in parts.items():
        layer = layers[module] = _layer(name, module, part, shapes, settings)
        if part.bias is not None:
            place(f"{module}.bias", layer.scale * part.bias.float(), part.key)
    if not layers and not differences:
        raise StoreError(f"LoRA {name} is empty")
    return Lora(name, layers, differences)


def _module(prefixed: str, spellings: Mapping[str, str]) -> str | None:
    rest = _WRAPPER.sub("", prefixed)
    while rest not in spellings:
        match = _PREFIX.match(rest)
        if match is None:
            # kohya's underscores up to a block's number, then dots
            return spellings.get(rest.replace(".", "_"))
        rest = rest[match.end() :]
    return spellings[rest]


def _layer(name: str, module: str, part: _Parts, shapes: Shapes, settings: Mapping[str, Any]) -> LoraLayer:
    down, up = part.down, part.up
    if down is None or up is None:
        missing = "down (lora_A)" if down is None else "up (lora_B)"
        raise StoreError(f"LoRA {name}: {part.key} lacks its other half, the {missing} matrix: the file is incomplete")
    shape = shapes.get(f"{module}.weight", ())
    if len(shape) != 2:
        raise StoreError(f"LoRA {name}: {part.key} is for {module}, which is no linear layer: only those are supported")
    if (
        not down.ndim == up.ndim == 2
        or down.shape[0] < 1
        or down.shape[0] != up.shape[1]
        or (up.shape[0], down.shape[1]) != shape
    ):
        fault = f"up {list(up.shape)} times down {list(down.shape)} is no change to {module}.weight {list(shape)}"
        raise StoreError(f"LoRA {name}: {part.key}: {fault}: it was made for a model of another size")
    rank = down.shape[0]
    alpha = part.alpha if part.alpha is not None else settings.get("lora_alpha")
    if alpha is not None and not (type(alpha) in (int, float) and math.isfinite(alpha)):
        raise StoreError(f"LoRA {name}: lora_alpha must be a number, not {alpha!r}")
    if alpha is None:
        return LoraLayer(down, up, 1.0)
    return LoraLayer(down, up, float(alpha) / (rank**0.5 if settings.get("use_rslora") else rank))


def _count(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
