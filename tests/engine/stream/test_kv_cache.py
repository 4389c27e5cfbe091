"""The rolling cache against a full forward under the block-causal mask."""

from dataclasses import replace

import pytest
import torch

from engine.config import CacheConfig, PlainPrecision
from engine.models.config import DiTConfig
from engine.models.dit import CausalWan
from engine.ops.rope import rope_angles, rotate
from engine.stream.kv_cache import BlockCausal, KVCache
from engine.stream.rollout import forward

DIT = DiTConfig(dim=96, ffn_dim=192, num_heads=2, num_layers=3, text_dim=32, in_channels=4, out_channels=4)


def model() -> CausalWan:
    torch.manual_seed(0)
    return CausalWan(DIT).requires_grad_(False).eval()


def new_cache(config: CacheConfig, batch: int = 1) -> KVCache:
    return KVCache(config, layers=DIT.num_layers, heads=DIT.num_heads, head_dim=DIT.head_dim, batch=batch)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("window", [6, 9, 12])
def test_rolling_cache_equals_full_forward(window: int) -> None:
    dit, config = model(), CacheConfig(chunk=3, window=window, sink=0, rows=4, columns=4)
    chunks = 8
    x = torch.randn(2, 4, 3 * chunks, 8, 8)
    text = dit.encode_text(torch.randn(2, 5, 32))
    t = torch.full((2, 3 * chunks), 400.0)
    full = dit(x, t, text, BlockCausal(3 * chunks, config, DIT.head_dim))
    cache, parts = new_cache(config, batch=2), []
    for chunk in range(chunks):
        part = x[:, :, 3 * chunk : 3 * chunk + 3]
        forward(dit, torch.randn_like(part), 0.9, text, cache)  # a denoising step: its K and V must be overwritten
        parts.append(forward(dit, part, 0.4, text, cache))
        cache.advance()
    assert relative(torch.cat(parts, dim=2), full) < 1e-4


def test_sink_equals_full_forward_until_the_ring_rolls() -> None:
    dit, config = model(), CacheConfig(chunk=3, window=12, sink=3, rows=4, columns=4)
    x = torch.randn(1, 4, 12, 8, 8)
    text = dit.encode_text(torch.randn(1, 5, 32))
    full = dit(x, torch.full((1, 12), 400.0), text, BlockCausal(12, config, DIT.head_dim))
    cache = new_cache(config)
    for chunk in range(4):
        part = forward(dit, x[:, :, 3 * chunk : 3 * chunk + 3], 0.4, text, cache)
        assert relative(part, full[:, :, 3 * chunk : 3 * chunk + 3]) < 1e-4
        cache.advance()


def test_sink_stays_and_stands_just_before_the_ring() -> None:
    """The raw sink never changes; its keys are rotated to the three frames before the oldest chunk of the ring."""
    dit, config = model(), CacheConfig(chunk=3, window=9, sink=3, rows=4, columns=4)
    text = dit.encode_text(torch.randn(1, 5, 32))
    latents = [torch.randn(1, 4, 3, 8, 8) for _ in range(9)]
    cache = new_cache(config)
    for part in latents[:-1]:
        forward(dit, part, 0.0, text, cache)
        cache.advance()
    keys = cache.raw_sink[0].clone()
    far = forward(dit, latents[-1], 0.5, text, cache)
    assert torch.equal(keys, cache.raw_sink[0])

    base = 3 * 7 - 3
    angles = rope_angles(torch.arange(base, base + 3), 4, 4, DIT.head_dim)
    for layer in range(DIT.num_layers):
        expected = rotate(cache.raw_sink[layer], angles)
        assert torch.allclose(cache.keys.read(layer, 48), expected, atol=1e-5)
    assert far.isfinite().all()


def test_positions_have_no_limit() -> None:
    """Shifting every position by a hundred million latent frames changes nothing but rounding."""
    dit, config = model(), CacheConfig(chunk=3, window=9, sink=3, rows=4, columns=4)
    text = dit.encode_text(torch.randn(1, 5, 32))
    latents = [torch.randn(1, 4, 3, 8, 8) for _ in range(5)]
    outs = []
    for start in (0, 100_000_000 // 3 * 3):
        cache = new_cache(config)
        cache.reset(start)
        for part in latents:
            out = forward(dit, part, 0.3, text, cache)
            cache.advance()
        outs.append(out)
    assert relative(outs[1], outs[0]) < 1e-4


def test_memory_is_constant_and_snapshot_restores() -> None:
    dit, config = model(), CacheConfig(chunk=3, window=9, sink=3, rows=4, columns=4)
    text = dit.encode_text(torch.randn(1, 5, 32))
    cache = new_cache(config)
    size = cache.bytes()
    latents = [torch.randn(1, 4, 3, 8, 8) for _ in range(6)]
    for part in latents[:4]:
        forward(dit, part, 0.0, text, cache)
        cache.advance()
    saved = cache.snapshot()
    first = forward(dit, latents[4], 0.5, text, cache)
    cache.advance()
    forward(dit, latents[5], 0.5, text, cache)
    cache.advance()
    cache.restore(saved)
    assert torch.equal(forward(dit, latents[4], 0.5, text, cache), first)
    assert cache.bytes() == size


@pytest.mark.parametrize(("precision", "bound"), [("int8", 0.01), ("fp8", 0.04)])
@pytest.mark.parametrize("sink", [0, 3])
def test_eight_bits_stay_near_and_save_memory(precision: PlainPrecision, bound: float, sink: int) -> None:
    """Past chunks in 8 bits: relative L2 error of the flow over a rolling window; a chunk without past is exact."""
    dit, config = model(), CacheConfig(chunk=3, window=9, sink=sink, rows=4, columns=4)
    text = dit.encode_text(torch.randn(1, 5, 32))
    sizes = {"layers": DIT.num_layers, "heads": DIT.num_heads, "head_dim": DIT.head_dim}
    exact, small = KVCache(config, **sizes), KVCache(config, **sizes, precision=precision)
    errors = []
    for _ in range(6):
        part = torch.randn(1, 4, 3, 8, 8)
        a, b = (forward(dit, part, 0.4, text, cache) for cache in (exact, small))
        errors.append(float((a - b).norm() / a.norm()))
        exact.advance()
        small.advance()
    assert errors[0] == 0
    assert 0 < max(errors) < bound
    assert small.bytes() < 0.5 * exact.bytes()
    saved = small.snapshot()
    again = forward(dit, part, 0.4, text, small)
    small.advance()
    small.restore(saved)
    assert torch.equal(forward(dit, part, 0.4, text, small), again)


def test_reset_forgets() -> None:
    dit, config = model(), CacheConfig(chunk=3, window=9, sink=0, rows=4, columns=4)
    text = dit.encode_text(torch.randn(1, 5, 32))
    x = torch.randn(1, 4, 3, 8, 8)
    cache = new_cache(config)
    fresh = forward(dit, x, 0.5, text, cache)
    for _ in range(3):
        forward(dit, torch.randn_like(x), 0.0, text, cache)
        cache.advance()
    cache.reset(0)
    assert torch.equal(forward(dit, x, 0.5, text, cache), fresh)


@pytest.mark.parametrize(("window", "sink", "named"), [(10, 0, "window"), (9, 2, "sink"), (3, 3, "window 3")])
def test_bad_geometry_is_named(window: int, sink: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        CacheConfig(chunk=3, window=window, sink=sink, rows=4, columns=4)


def slots(cache: KVCache, chunks: int) -> list[int]:
    out = []
    for _ in range(chunks):
        out.append(cache.slot)
        cache.advance()
    return out


def test_a_cut_keeps_the_scenes_first_chunk_until_the_next_cut() -> None:
    config = CacheConfig(chunk=3, window=12, sink=3, rows=2, columns=2, turn_sink=False)
    cache = new_cache(config)
    assert slots(cache, 6) == [0, 1, 2, 3, 1, 2]
    cache.cut(8)
    assert cache.start_frame == 26
    assert slots(cache, 5) == [3, 1, 2, 1, 2], "slot 3 holds the first chunk after the cut"
    cache.cut(8)
    assert slots(cache, 4) == [1, 3, 2, 3], "while the second scene's first chunk is made, the first one's still stays"
    saved = cache.snapshot()
    after = slots(cache, 3)
    cache.restore(saved)
    assert slots(cache, 3) == after
    cache.reset(0)
    assert slots(cache, 5) == [0, 1, 2, 3, 1]


def test_an_absolute_sink_is_stored_once_and_stays_where_it_was_written() -> None:
    dit, config = model(), CacheConfig(chunk=3, window=9, sink=3, rows=4, columns=4)
    text = dit.encode_text(torch.randn(1, 5, 32))
    turned, absolute = new_cache(config), new_cache(replace(config, turn_sink=False))
    assert absolute.bytes() < turned.bytes()
    for _ in range(6):
        part = torch.randn(1, 4, 3, 8, 8)
        for cache in (turned, absolute):
            forward(dit, part, 0.0, text, cache)
            cache.advance()
        if cache.written == 1:
            first = absolute.keys.data[:, :, : absolute.chunk_tokens].clone()
    assert torch.equal(absolute.keys.data[:, :, : absolute.chunk_tokens], first)
    assert not torch.equal(turned.keys.data[:, :, : absolute.chunk_tokens], first)


def test_dropping_the_past_keeps_the_sink() -> None:
    cache = new_cache(CacheConfig(chunk=3, window=12, sink=3, rows=2, columns=2))
    slots(cache, 7)
    assert (cache.past, cache.start_frame) == (3, 21)
    cache.drop_past(12)
    assert (cache.past, cache.start_frame, cache.written, cache.filled) == (0, 12, 1, 2 * cache.chunk_tokens)
    assert slots(cache, 4) == [1, 2, 3, 1]
