"""Names of the UMT5 encoder in public checkpoints -> names in `engine.models.text_encoder.TextEncoder`.

Three layouts are supported. Hugging Face's (the `text_encoder/` folder of a diffusers model) is the encoder that
`TextEncoder` wraps, with another prefix. The original one (`models_t5_umt5-xxl-enc-bf16.pth`) has names of its own,
which Wan-Video/Wan2.1 `wan/modules/t5.py` defines. GGUF files have llama.cpp's (`gguf-py/gguf/constants.py` there).
"""

import re
from collections.abc import Iterable

from engine.checkpoints.headers import StoreError

EMBEDDING, NORM = "umt5.embed_tokens.weight", "umt5.final_layer_norm.weight"

ORIGINAL = {"token_embedding.weight": EMBEDDING, "norm.weight": NORM}
ORIGINAL_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "attn.q": "layer.0.SelfAttention.q",
    "attn.k": "layer.0.SelfAttention.k",
    "attn.v": "layer.0.SelfAttention.v",
    "attn.o": "layer.0.SelfAttention.o",
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "norm2": "layer.1.layer_norm",
    # wi_0 goes through the GELU, wi_1 does not
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
LLAMA_CPP = {"token_embd.weight": EMBEDDING, "enc.output_norm.weight": NORM}
LLAMA_CPP_BLOCK = {
    "attn_norm": "layer.0.layer_norm",
    "attn_q": "layer.0.SelfAttention.q",
    "attn_k": "layer.0.SelfAttention.k",
    "attn_v": "layer.0.SelfAttention.v",
    "attn_o": "layer.0.SelfAttention.o",
    "attn_rel_b": "layer.0.SelfAttention.relative_attention_bias",
    "ffn_norm": "layer.1.layer_norm",
    "ffn_gate": "layer.1.DenseReluDense.wi_0",
    "ffn_up": "layer.1.DenseReluDense.wi_1",
    "ffn_down": "layer.1.DenseReluDense.wo",
}
HUGGING_FACE = {"shared.weight": EMBEDDING, "encoder.embed_tokens.weight": EMBEDDING}


def to_native(names: Iterable[str]) -> dict[str, str]:
    """Our name for every tensor name of a UMT5 encoder in any of the layouts.

    A Hugging Face folder may contain the embedding under two names; both map to our one.

    Raises:
        StoreError: a name belongs to none of them; the message names it.
    """
    return {name: _native(name) for name in names}


def _native(name: str) -> str:
    if native := ORIGINAL.get(name) or HUGGING_FACE.get(name) or LLAMA_CPP.get(name):
        return native
    for pattern, parts in (
        (r"blocks\.(\d+)\.(.+)\.weight", ORIGINAL_BLOCK),
        (r"enc\.blk\.(\d+)\.(.+)\.weight", LLAMA_CPP_BLOCK),
    ):
        if (match := re.fullmatch(pattern, name)) and (part := parts.get(match[2])):
            return f"umt5.block.{match[1]}.{part}.weight"
    if match := re.fullmatch(r"encoder\.(block\.\d+\.(.+)|final_layer_norm)\.weight", name):
        if match[2] is None:
            return NORM
        if match[2] in ORIGINAL_BLOCK.values():
            return f"umt5.{match[1]}.weight"
    raise StoreError(f"{name} is no tensor of a UMT5 encoder: give the `text_encoder` folder or the original .pth")
