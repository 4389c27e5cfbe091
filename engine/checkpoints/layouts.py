"""What a store must hold for a preset: every tensor by network, name and shape, known without building anything."""

from collections.abc import Callable, Collection, Mapping

from engine.checkpoints import wan
from engine.checkpoints.wan import Shape
from engine.config import Preset

RENAME: dict[str, Callable[[Collection[str]], dict[str, str]]] = {}
"""By network, the transformer apart: all of a checkpoint's names -> ours. Here the text encoder and the VAEs come in:
`check` and `convert` know a network once its entry is here. A function raises ValueError or StoreError for a name that
has no place, and its module must not load torch."""


def text_encoder(sizes: Mapping[str, int]) -> dict[str, Shape]:
    """Name and shape of every tensor of `TextEncoder(TextConfig(**sizes))`."""
    dim, ffn, inner = sizes["dim"], sizes["ffn_dim"], sizes["num_heads"] * sizes["head_dim"]
    found: dict[str, Shape] = {"umt5.embed_tokens.weight": (sizes["vocab_size"], dim)}
    for index in range(sizes["num_layers"]):
        block = f"umt5.block.{index}.layer"
        found |= {f"{block}.0.SelfAttention.{name}.weight": (inner, dim) for name in "qkv"}
        found[f"{block}.0.SelfAttention.o.weight"] = (dim, inner)
        found[f"{block}.0.SelfAttention.relative_attention_bias.weight"] = (32, sizes["num_heads"])
        found |= {f"{block}.1.DenseReluDense.{name}.weight": (ffn, dim) for name in ("wi_0", "wi_1")}
        found[f"{block}.1.DenseReluDense.wo.weight"] = (dim, ffn)
        found |= {f"{block}.{layer}.layer_norm.weight": (dim,) for layer in (0, 1)}
    return found | {"umt5.final_layer_norm.weight": (dim,)}


def expected(preset: Preset) -> dict[str, dict[str, Shape]]:
    """By network. The VAEs, whose tensors are not listed, come in here."""
    return {"dit": wan.tensors(preset.dit), "text_encoder": text_encoder(preset.text_sizes)}
