"""Tensor names of Wan transformers in public checkpoints -> those of `engine.models.dit.CausalWan`.

Ours are the original Wan's. Also supported are diffusers' names, the prefixes of training wrappers, and the scales of
float8 weights.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from engine.checkpoints.headers import StoreError
from engine.models.config import DiTConfig

Shape = tuple[int, ...]
Layout = Literal["original", "diffusers"]

WRAPPERS = {
    "transformer", "dit", "vae", "model", "module", "net", "diffusion_model",
    "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module",
}  # fmt: skip

FROM_DIFFUSERS = {
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "patch_embedding": "patch_embedding",
}
FROM_DIFFUSERS_BLOCK = {
    # the affine norm, before cross-attention, is the second of the block for diffusers and the third for Wan
    "norm2": "norm3",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    **{
        f"{theirs}.{part}": f"{ours}.{name}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for part, name in (
            ("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q", "norm_q"), ("norm_k", "norm_k")
        )
    },
}  # fmt: skip

IMAGE_PARTS = ("img_emb.", "image_embedder.", "k_img", "v_img", "norm_added_k", "add_k_proj", "add_v_proj")
"""Only image-to-video checkpoints have these."""

SCALES = ("weight_scale", "scale_weight", "weight_scale_inv")
"""Names of a float8 weight's scale, weight = stored * scale: of Hugging Face and vLLM, of ComfyUI, and of DeepSeek's
blocks of 128 x 128, which, despite the name, are multiplied too."""
UNUSED = ("input_scale", "scale_input", "scaled_fp8", "comfy_quant", "spiece_model")
"""Scales of activations, ComfyUI's markers (see `comfy_quant`) and its copy of the tokenizer: not needed for weights in
bfloat16."""


def tensors(config: DiTConfig) -> dict[str, Shape]:
    """Name and shape of every tensor of `CausalWan(config)`."""
    dim, ffn = config.dim, config.ffn_dim
    patch = config.patch[0] * config.patch[1] * config.patch[2]

    def linear(name: str, inputs: int, outputs: int) -> dict[str, Shape]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    found: dict[str, Shape] = {
        "patch_embedding.weight": (dim, config.in_channels, *config.patch),
        "patch_embedding.bias": (dim,),
        **linear("text_embedding.0", config.text_dim, dim),
        **linear("text_embedding.2", dim, dim),
        **linear("time_embedding.0", config.freq_dim, dim),
        **linear("time_embedding.2", dim, dim),
        **linear("time_projection.1", dim, 6 * dim),
        "head.modulation": (1, 2, dim),
        **linear("head.head", dim, patch * config.out_channels),
    }
    if config.pooled_text:
        found["text_pool.weight"] = (dim, config.text_dim)
    for index in range(config.num_layers):
        block = f"blocks.{index}"
        found[f"{block}.modulation"] = (1, 6, dim)
        found |= {f"{block}.norm3.weight": (dim,), f"{block}.norm3.bias": (dim,)}
        for attention in ("self_attn", "cross_attn"):
            for name in "qkvo":
                found |= linear(f"{block}.{attention}.{name}", dim, dim)
            found |= {f"{block}.{attention}.norm_{name}.weight": (dim,) for name in "qk"}
        found |= linear(f"{block}.ffn.0", dim, ffn) | linear(f"{block}.ffn.2", ffn, dim)
    return found


def unwrapped(name: str) -> str:
    """A name without the prefixes of wrappers, at any position: `model.blocks.0._orig_mod.x` becomes `blocks.0.x`."""
    kept: list[str] = []
    for part in name.split("."):
        # `net` in diffusers' ffn.net.0 is not a wrapper
        if part not in WRAPPERS or (part == "net" and kept[-1:] == ["ffn"]):
            kept.append(part)
    return ".".join(kept)


def layout_of(names: Iterable[str]) -> Layout:
    """The layout that these names, without wrappers, belong to."""
    marks = ("condition_embedder.", "proj_out.", "scale_shift_table")
    of_blocks = (".attn1.", ".attn2.", ".ffn.net.", ".scale_shift_table")
    foreign = any(name.startswith(marks) or any(mark in name for mark in of_blocks) for name in names)
    return "diffusers" if foreign else "original"


def _from_diffusers(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    start, table, rest = "", FROM_DIFFUSERS, name
    if name.startswith("blocks."):
        _, index, rest = name.split(".", 2) if name.count(".") >= 2 else ("", "", name)
        start, table = f"blocks.{index}.", FROM_DIFFUSERS_BLOCK
        if rest == "scale_shift_table":
            return f"{start}modulation"
    module, _, attribute = rest.rpartition(".")
    return f"{start}{table[module]}.{attribute}" if module in table else name


def to_diffusers(module: str) -> str:
    """Diffusers' name of one of our modules; where both names agree, the same name."""
    start, table, rest = "", FROM_DIFFUSERS, module
    if module.startswith("blocks."):
        _, index, rest = module.split(".", 2) if module.count(".") >= 2 else ("", "", module)
        start, table = f"blocks.{index}.", FROM_DIFFUSERS_BLOCK
    theirs = next((theirs for theirs, ours in table.items() if ours == rest), None)
    return module if theirs is None else start + theirs


@dataclass(frozen=True)
class Names:
    """A checkpoint's names, matched to ours."""

    layout: Layout
    native: dict[str, str]
    """Our name -> the checkpoint's. An unknown name maps to itself."""
    scales: dict[str, str]
    """Our name of a float8 weight -> the checkpoint's name of its scale."""


def to_native(names: Iterable[str]) -> Names:
    """Match every name of a checkpoint to ours.

    Raises:
        StoreError: the checkpoint is of an image-to-video model, or two of its names mean the same tensor.
    """
    stripped = {name: unwrapped(name) for name in names}
    if image := [name for name in stripped if any(part in name for part in IMAGE_PARTS)]:
        raise StoreError(
            f"{image[0]} belongs to an image-to-video model, which cannot make video from text: use the T2V or TI2V "
            f"weights"
        )
    layout = layout_of(stripped.values())
    return _matched(stripped, layout, _from_diffusers if layout == "diffusers" else str)


def plain(names: Iterable[str]) -> Names:
    """The names of another network without wrappers, its scales apart. Raises as `to_native` does."""
    return _matched({name: unwrapped(name) for name in names}, "original", str)


def _matched(stripped: Mapping[str, str], layout: Layout, rename: Callable[[str], str]) -> Names:
    native: dict[str, str] = {}
    scales: dict[str, str] = {}
    for name, bare in stripped.items():
        if bare.rpartition(".")[2] in UNUSED:
            continue
        ours = rename(bare)
        module, _, attribute = ours.rpartition(".")
        place, ours = (scales, f"{module}.weight") if attribute in SCALES else (native, ours)
        if ours in place:
            raise StoreError(f"{place[ours]} and {name} are both {ours}: keep one of the two")
        place[ours] = name
    for ours in scales.keys() - native.keys():
        lone = scales.pop(ours)
        native[lone] = lone  # a scale without its weight is an unexpected tensor
    return Names(layout, native, scales)


@dataclass(frozen=True)
class Differences:
    """How a set of tensors differs from the expected one, by name."""

    missing: list[str]
    unexpected: list[str]
    misshaped: list[str]

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshaped)


def compare(expected: Mapping[str, Shape], found: Mapping[str, Shape]) -> Differences:
    """The differences between the tensors of a model and those that were found."""
    return Differences(
        [name for name in expected if name not in found],
        [name for name in found if name not in expected],
        [
            f"{name} is {list(found[name])}, must be {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name] != shape
        ],
    )


def sentences(differences: Differences, limit: int = 20) -> list[str]:
    """One sentence per difference, up to a limit for each kind."""
    found = []
    for what, names in (
        ("missing", differences.missing),
        ("unexpected", differences.unexpected),
        ("wrong shape", differences.misshaped),
    ):
        found += [f"{what}: {name}" for name in names[:limit]]
        if len(names) > limit:
            found.append(f"{what}: {len(names) - limit} more")
    return found
