"""The fused transformer and its cache against the model as it is written, chunk by chunk."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from engine.config import CacheConfig, QuantScheme
from engine.models.config import DiTConfig
from engine.models.dit import CausalWan
from engine.stream.fused_cache import FusedCache
from engine.stream.kv_cache import KVCache
from engine.transforms.fused import FusedWan
from engine.transforms.low_bit import Policy

DIT = DiTConfig(dim=192, ffn_dim=320, num_heads=3, num_layers=2, text_dim=32, in_channels=4, out_channels=4)
CONFIG = CacheConfig(chunk=3, window=12, sink=3, rows=8, columns=12)


def wan(config: DiTConfig = DIT) -> CausalWan:
    torch.manual_seed(0)
    model = CausalWan(config)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model.requires_grad_(False)


def exact_cache(batch: int = 1) -> KVCache:
    return KVCache(CONFIG, layers=DIT.num_layers, heads=DIT.num_heads, head_dim=DIT.head_dim, batch=batch)


def roll(model: CausalWan | FusedWan, cache: KVCache, chunks: int = 7, batch: int = 1) -> list[Tensor]:
    """The flow of every forward: a noisy one and the context pass of each chunk."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randn(batch, 5, DIT.text_dim, generator=generator)
    context = model.encode_text(text)
    out = []
    for _ in range(chunks):
        x = torch.randn(batch, 4, 3, 16, 24, generator=generator)
        for t in (700.0, 0.0):
            out.append(model(x, torch.full((batch, 3), t), context, cache))
        cache.advance()
    return out


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("batch", [1, 2])
def test_same_flow_as_the_model(batch: int) -> None:
    """Past the point where the ring rolls over and the sink is rotated anew."""
    expected = roll(wan(), exact_cache(batch), batch=batch)
    found = roll(FusedWan(wan()), FusedCache(CONFIG, DIT, batch=batch), batch=batch)
    assert max(error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-5


def test_weights_are_held_once_and_follow_the_model() -> None:
    model = wan()
    fused = FusedWan(model)
    before = roll(fused, FusedCache(CONFIG, DIT), 1)[0]
    with torch.no_grad():
        model.blocks[1].self_attn.v.weight *= 3
    expected, found = roll(model, exact_cache(), 1)[0], roll(fused, FusedCache(CONFIG, DIT), 1)[0]
    assert error(found, expected) < 1e-5
    assert error(before, expected) > 1e-3


def test_changed_modulation_arrives_by_refresh() -> None:
    model = wan()
    fused = FusedWan(model)
    with torch.no_grad():
        model.blocks[0].modulation += 0.5
    fused.refresh()
    expected, found = roll(model, exact_cache(), 1)[0], roll(fused, FusedCache(CONFIG, DIT), 1)[0]
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize(
    ("form", "limit"),
    [
        ("fp8", 0.06),
        ("fp8-tensor", 0.06),
        ("int8", 0.03),
        ("mxfp8", 0.06),
        ("nvfp4", 0.2),
        ("fp8-weights", 0.04),
        ("int8-weights", 0.02),
    ],
)
def test_projections_in_fewer_bits(form: QuantScheme, limit: float) -> None:
    expected = roll(wan(), exact_cache())
    found = roll(FusedWan(wan(), Policy(form)), FusedCache(CONFIG, DIT))
    errors = [error(f, e) for f, e in zip(found, expected, strict=True)]
    assert 1e-4 < max(errors) < limit


def test_policy_leaves_exact_what_it_names() -> None:
    everything = frozenset(("qkv", "o", "cross_q", "cross_o", "up", "down"))
    expected = roll(wan(), exact_cache())
    for policy in (Policy("fp8", exact=everything), Policy("fp8", exact_blocks=frozenset({0, 1}))):
        found = roll(FusedWan(wan(), policy), FusedCache(CONFIG, DIT))
        assert max(error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-5


def test_a_changed_weight_reaches_8_bits_by_refresh() -> None:
    model = wan()
    fused = FusedWan(model, Policy("int8"), keep_on_host=True)
    with torch.no_grad():
        model.blocks[0].ffn[0].weight *= 2
    fused.refresh()
    other = wan()
    with torch.no_grad():
        other.blocks[0].ffn[0].weight *= 2
    expected = roll(FusedWan(other, Policy("int8")), FusedCache(CONFIG, DIT), 1)[0]
    assert torch.equal(roll(fused, FusedCache(CONFIG, DIT), 1)[0], expected)


def test_longer_prompts_and_other_patches() -> None:
    config = replace(DIT, patch=(1, 4, 4), pooled_text=True)
    small = CacheConfig(chunk=3, window=6, sink=0, rows=4, columns=6)
    torch.manual_seed(3)
    model = wan(config)
    caches = (
        KVCache(small, layers=2, heads=3, head_dim=config.head_dim),
        FusedCache(small, config),
    )
    outs = [roll(m, cache, 3) for m, cache in zip((model, FusedWan(model)), caches, strict=True)]
    assert max(error(f, e) for f, e in zip(outs[1], outs[0], strict=True)) < 1e-5
