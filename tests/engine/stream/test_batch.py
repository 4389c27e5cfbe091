"""Several caches as the cache of a batch; `test_pipeline.py` compares whole batches with single streams."""

import pytest
import torch

from engine.config import CacheConfig
from engine.models.config import DiTConfig
from engine.stream.batch import BatchedCache, BatchedFusedCache
from engine.stream.fused_cache import FusedCache
from engine.stream.kv_cache import KVCache

DIT = DiTConfig(dim=96, ffn_dim=64, num_heads=2, num_layers=1, text_dim=32, in_channels=4, out_channels=4)
CONFIG = CacheConfig(chunk=3, window=6, sink=0, rows=2, columns=2)


def plain() -> KVCache:
    return KVCache(CONFIG, layers=1, heads=2, head_dim=48)


def test_every_cache_joins_as_its_own_kind() -> None:
    assert isinstance(KVCache.join([plain(), plain()]), BatchedCache)
    assert isinstance(FusedCache.join([FusedCache(CONFIG, DIT), FusedCache(CONFIG, DIT)]), BatchedFusedCache)


def test_rows_go_to_their_own_caches() -> None:
    """As if each cache had been used alone, with its own past."""
    caches, alone = [plain(), plain()], [plain(), plain()]
    for cache in (caches[1], alone[1]):  # the second stream is a chunk ahead
        generator = torch.Generator().manual_seed(0)
        cache.at(0)(*torch.randn(3, 1, 12, 2, 48, generator=generator))
        cache.advance()
    batch = KVCache.join(caches)
    assert batch.written == 0 and batch.device == caches[0].device
    q, k, v = torch.randn(3, 2, 12, 2, 48)
    found = batch.at(0)(q, k, v)  # type: ignore[attr-defined]
    rows = [cache.at(0)(q[i : i + 1], k[i : i + 1], v[i : i + 1]) for i, cache in enumerate(alone)]
    assert torch.equal(found, torch.cat(rows))
    batch.advance()
    assert [cache.written for cache in caches] == [1, 2] and batch.written == 1


@pytest.mark.parametrize("low_bit", [False, True])
def test_fused_rows_go_to_their_own_caches(low_bit: bool) -> None:
    caches, alone = ([FusedCache(CONFIG, DIT, low_bit=low_bit) for _ in range(2)] for _ in range(2))
    batch = BatchedFusedCache(caches)
    qkv, norm = torch.randn(2, 12, 3 * 96), torch.ones(96)
    found = batch.attend(0, batch.write(0, qkv, None, norm, norm, 1e-6))
    rows = [cache.attend(0, cache.write(0, qkv[i : i + 1], None, norm, norm, 1e-6)) for i, cache in enumerate(alone)]
    assert torch.equal(found, torch.cat(rows))
