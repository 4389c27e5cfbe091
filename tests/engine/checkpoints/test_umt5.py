"""Both public layouts of the UMT5 encoder, at the real size and, small, in numbers."""

import pytest
import torch
from torch import Tensor
from transformers import UMT5Config, UMT5EncoderModel

from engine.checkpoints.store import StoreError
from engine.checkpoints.umt5 import to_native
from engine.models.config import UMT5_XXL, TextConfig
from engine.models.text_encoder import TextEncoder

SMALL = TextConfig(vocab_size=50, dim=24, ffn_dim=40, num_heads=3, head_dim=16, num_layers=2, length=12)


def original_shapes(config: TextConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes in models_t5_umt5-xxl-enc-bf16.pth, after Wan-Video/Wan2.1 wan/modules/t5.py."""
    inner = config.num_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (config.vocab_size, config.dim),
        "norm.weight": (config.dim,),
    }
    for block in range(config.num_layers):
        parts: dict[str, tuple[int, ...]] = {
            "norm1": (config.dim,),
            **{f"attn.{part}": (inner, config.dim) for part in "qkv"},
            "attn.o": (config.dim, inner),
            "norm2": (config.dim,),
            "ffn.gate.0": (config.ffn_dim, config.dim),
            "ffn.fc1": (config.ffn_dim, config.dim),
            "ffn.fc2": (config.dim, config.ffn_dim),
            "pos_embedding.embedding": (32, config.num_heads),
        }
        shapes |= {f"blocks.{block}.{part}.weight": shape for part, shape in parts.items()}
    return shapes


def theirs(config: TextConfig) -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.dim,
            d_kv=config.head_dim,
            d_ff=config.ffn_dim,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            feed_forward_proj="gated-gelu",
        )
    ).eval()


def shapes_of(module: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("layout", ["hugging face", "original"])
def test_every_tensor_of_the_real_size_has_a_place(layout: str) -> None:
    with torch.device("meta"):
        ours = shapes_of(TextEncoder(UMT5_XXL))
        foreign = shapes_of(theirs(UMT5_XXL)) if layout == "hugging face" else original_shapes(UMT5_XXL)
    names = to_native(foreign)
    assert names.keys() == foreign.keys()
    assert {names[name]: shape for name, shape in foreign.items()} == ours
    assert len(foreign) == len(ours) + (layout == "hugging face")  # the embedding has two names there


def native(foreign: dict[str, Tensor]) -> dict[str, Tensor]:
    return {to_native([name])[name]: value for name, value in foreign.items()}


def to_original(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under the original names, by shape and place, without the map under test."""
    out = {"token_embedding.weight": state["shared.weight"], "norm.weight": state["encoder.final_layer_norm.weight"]}
    for block in range(SMALL.num_layers):
        old, new = f"encoder.block.{block}.layer", f"blocks.{block}"
        for part in "qkvo":
            out[f"{new}.attn.{part}.weight"] = state[f"{old}.0.SelfAttention.{part}.weight"]
        out[f"{new}.pos_embedding.embedding.weight"] = state[f"{old}.0.SelfAttention.relative_attention_bias.weight"]
        out[f"{new}.norm1.weight"] = state[f"{old}.0.layer_norm.weight"]
        out[f"{new}.norm2.weight"] = state[f"{old}.1.layer_norm.weight"]
        for ours, named in (("ffn.gate.0", "wi_0"), ("ffn.fc1", "wi_1"), ("ffn.fc2", "wo")):
            out[f"{new}.{ours}.weight"] = state[f"{old}.1.DenseReluDense.{named}.weight"]
    return out


@pytest.mark.parametrize("layout", ["hugging face", "original"])
def test_the_output_is_transformers_and_padding_is_zero(layout: str) -> None:
    torch.manual_seed(0)
    reference, encoder = theirs(SMALL), TextEncoder(SMALL).eval()
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = dict(reference.state_dict())
    encoder.load_state_dict(native(state if layout == "hugging face" else to_original(state)))
    ids = torch.tensor([[5, 9, 30, 1] + [0] * 8, [7, 1] + [0] * 10])
    with torch.inference_mode():
        expected = reference(ids, attention_mask=(ids != 0).long()).last_hidden_state
        found = encoder(ids)
    for row, used in ((0, 4), (1, 2)):
        torch.testing.assert_close(found[row, :used], expected[row, :used], rtol=0, atol=1e-5)
        assert not found[row, used:].any() and expected[row, used:].any()


@pytest.mark.parametrize(
    "name",
    [
        "blocks.0.attn.w.weight",
        "blocks.0.self_attn.q.weight",
        "encoder.block.0.layer.0.EncDecAttention.q.weight",
        "decoder.embed_tokens.weight",
        "lm_head.weight",
    ],
)
def test_what_has_no_place_is_named(name: str) -> None:
    with pytest.raises(StoreError, match=name):
        to_native(["norm.weight", name])
