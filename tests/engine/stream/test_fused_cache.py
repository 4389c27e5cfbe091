"""The fused model's cache: in 8 bits, and with a part of the past left out."""

import pytest
import torch
from torch import Tensor

from engine.config import CacheConfig
from engine.models.config import DiTConfig
from engine.models.dit import CausalWan
from engine.stream.fused_cache import FusedCache
from engine.stream.kv_cache import KVCache
from engine.transforms.fused import FusedWan

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


def test_low_bit_cache() -> None:
    expected = roll(wan(), exact_cache())
    found = roll(FusedWan(wan()), FusedCache(CONFIG, DIT, low_bit=True))
    errors = [error(f, e) for f, e in zip(found, expected, strict=True)]
    assert errors[0] < 1e-5, "the first chunk sees itself alone, exactly"
    assert 1e-4 < max(errors) < 0.05


@pytest.mark.parametrize("low_bit", [False, True])
def test_sparse_sees_all_where_all_is_kept(low_bit: bool) -> None:
    expected = roll(FusedWan(wan()), FusedCache(CONFIG, DIT, low_bit=low_bit))
    full = FusedCache(CONFIG, DIT, low_bit=low_bit, keep=0.999)
    found = roll(FusedWan(wan()), full)
    assert max(error(f, e) for f, e in zip(found, expected, strict=True)) < 1e-5


def test_sparse_differs_little_and_costs_the_past_only() -> None:
    expected = roll(wan(), exact_cache())
    found = roll(FusedWan(wan()), FusedCache(CONFIG, DIT, keep=0.3))
    errors = [error(f, e) for f, e in zip(found, expected, strict=True)]
    assert errors[0] < 1e-5
    assert 1e-4 < max(errors) < 0.2


def test_keep_is_a_share() -> None:
    with pytest.raises(ValueError, match="keep"):
        FusedCache(CONFIG, DIT, keep=0)


def test_snapshot_and_reset() -> None:
    fused = FusedWan(wan())
    cache = FusedCache(CONFIG, DIT, low_bit=True, keep=0.5)
    roll(fused, cache, 3)
    saved = cache.snapshot()
    first = roll(fused, cache, 2)
    cache.restore(saved)
    assert all(torch.equal(a, b) for a, b in zip(first, roll(fused, cache, 2), strict=True))
    cache.reset(0)
    fresh = roll(fused, FusedCache(CONFIG, DIT, low_bit=True, keep=0.5), 4)
    assert all(torch.equal(a, b) for a, b in zip(roll(fused, cache, 4), fresh, strict=True))
