"""A pipeline of toy size with random weights: every engine test but those of the shipped model runs on it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, processors

from engine.config import MINI, Preset
from engine.models.config import DiTConfig, LatentStatistics, LightVAEConfig, TextConfig, VAEConfig
from engine.models.dit import CausalWan
from engine.models.light_vae import LightDecoder
from engine.models.text_encoder import TextEncoder
from engine.models.tokenizer import Tokenizer
from engine.models.vae import CausalVAE
from engine.pipeline import Pipeline
from engine.stream.decoding import FullDecoding, LightDecoding, PictureEncoding
from engine.transforms.apply import Speed, accelerate

TOY = replace(
    MINI,
    name="toy",
    width=64,
    height=64,
    dit=DiTConfig(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, patch=(1, 4, 4), pooled_text=True),
    text=TextConfig(vocab_size=64, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=1, length=16),
    light_vae=LightVAEConfig(widths=(16, 16, 8)),
    vae=VAEConfig(encoder_widths=(8, 8, 8), decoder_widths=(8, 8, 8), decoder_inputs=(8, 8)),
)


SPECIAL = ["<pad>", "</s>", "<unk>"]
PIECES = ["▁a", "▁red", "▁ball", "▁", "a", "b", "e", "d", "l", "r", "&", '"', "é"]


def build(preset: Preset, seed: int = 0, *, full: bool = False, speed: Speed | None = None) -> Pipeline:
    torch.manual_seed(seed)
    text, dit, light = TextEncoder(preset.text), CausalWan(preset.dit), LightDecoder(preset.light_vae)
    vae = CausalVAE(preset.vae)
    for module in (text, dit, light, vae):
        module.requires_grad_(False).eval()
    channels = preset.vae.latent_channels
    statistics = LatentStatistics((0.5,) * channels, (2.0,) * channels)
    decoder = FullDecoding(vae, statistics) if full else LightDecoding(light, statistics)
    tokenizer = Tokenizer(("a", "ball", "blue", "cube", "red"))
    served = accelerate(dit, decoder, preset, speed or Speed())
    return Pipeline(preset, tokenizer, text, served, PictureEncoding(vae, statistics))


@pytest.fixture(autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture
def toy() -> Preset:
    return TOY


@pytest.fixture
def encoder() -> TextEncoder:
    """A text encoder of three layers, for prompts of twelve tokens."""
    torch.manual_seed(0)
    sizes = TextConfig(vocab_size=50, dim=24, ffn_dim=40, num_heads=3, head_dim=8, num_layers=3, length=12)
    return TextEncoder(sizes).requires_grad_(False).eval()


@pytest.fixture(name="build")
def build_fixture() -> Callable[..., Pipeline]:
    """`build` for tests in other folders."""
    return build


@pytest.fixture
def pipeline() -> Pipeline:
    return build(TOY)


@pytest.fixture
def full_pipeline() -> Pipeline:
    """The same, decoded by the VAE itself."""
    return build(TOY, full=True)


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """A tokenizer.json as google/umt5-xxl's is built: Unigram, Metaspace, `</s>` from the post-processor."""
    vocabulary = [(piece, 0.0) for piece in SPECIAL] + [(piece, -1.0 - i / 10) for i, piece in enumerate(PIECES)]
    made = tokenizers.Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(SPECIAL)
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path
