"""Arithmetic of device memory, against measurements and the modules themselves."""

from dataclasses import replace

import pytest
import torch

from engine import memory
from engine.config import PRESETS
from engine.models.text_encoder import TextEncoder
from engine.stream.fused_cache import FusedCache
from engine.transforms.weight_only import quantise_weights


def test_memory_of_the_public_models() -> None:
    """Against counts from the models' published sizes, and a measurement on an H200."""
    small, large = PRESETS["self-forcing-1.3b"], PRESETS["krea-14b"]
    parts = memory.parts(small, memory.default(small))
    assert parts["KV cache"] == pytest.approx(6.0e9, rel=0.01)
    measured = parts["DiT weights"] + parts["KV cache"] + parts["text keys and values"]
    assert measured / 2**30 == pytest.approx(8.6, rel=0.05)  # measured on an H200, the DiT alone
    assert parts["VAE caches"] == 2 * 944_286_720
    assert parts["DiT weights"] == 2 * 1_418_996_800
    assert parts["text encoder"] == 2 * 5_680_910_336
    setting = memory.Setting(832, 480, 12)
    assert memory.parts(large, setting)["KV cache"] == pytest.approx(15.3e9, rel=0.01)
    large = PRESETS["ti2v-5b"]
    assert memory.parts(large, memory.default(large))["VAE caches"] == 2 * 1_607_936_000


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("name", ["longlive-1.3b", "longlive-1.3b-infinity", "causal-forcing-1.3b-2step"])
def test_memory_of_the_cache_is_the_caches_own(name: str, exact: bool) -> None:
    preset = PRESETS[name]
    cache = FusedCache(preset.cache(), preset.dit, device="meta", dtype=torch.bfloat16, low_bit=not exact)
    setting = replace(memory.default(preset), exact_cache=exact)
    assert memory.parts(preset, setting)["KV cache"] == pytest.approx(cache.bytes(), rel=1e-3)  # but for the scales


def test_memory_of_text_weights_in_8_bits_is_the_modules_own() -> None:
    preset = PRESETS["self-forcing-1.3b"]
    small = replace(preset.text, vocab_size=64, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=2)
    encoder = TextEncoder(small).to(torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in encoder.named_parameters()}
    quantise_weights(encoder, "int8")
    setting = replace(memory.default(preset), exact_text=False)
    assert memory.text_encoder(shapes, setting) == sum(p.nbytes for p in encoder.parameters())


def test_remedies() -> None:
    preset = PRESETS["self-forcing-1.3b"]
    setting = memory.default(preset)
    needed = memory.total(preset, setting)
    text, cache, light = ["--text-encoder cpu"], ["--low-bit-attention"], ["--decoder light"]
    window, resolution = ["shorter window of 18"], ["smaller resolution of 720x416"]
    weights = ["--text-encoder-weights int8"]
    assert memory.remedies(preset, setting, needed - (300 << 20)) == [text, weights, cache, light, window, resolution]
    assert memory.remedies(preset, setting, 16 << 30) == [text, ["smaller resolution of 416x240"]]
    assert memory.remedies(preset, setting, 8 << 30) == [text + cache + light + window]
    assert memory.remedies(preset, setting, 6 << 30) == [text + cache + light + ["shorter window of 6"] + resolution]
    assert memory.remedies(preset, setting, 1 << 30) == []
