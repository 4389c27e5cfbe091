"""Pruned heads, against attention with an explicit mask for every head; and the policy's file."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.config import CacheConfig
from engine.models.config import DiTConfig
from engine.ops import attention as references
from engine.ops import dispatch
from engine.ops.attention import BLOCK, AttentionOperands, BlockLists, unpack_values
from engine.ops.triton import attention as kernels
from engine.stream import pruned_heads as heads
from engine.stream.fused_cache import FusedCache
from engine.stream.pruned_heads import Heads

DIT = DiTConfig(dim=96, ffn_dim=64, num_heads=3, num_layers=3, text_dim=32, in_channels=4, out_channels=4)
STRADDLING = CacheConfig(chunk=3, window=12, sink=3, rows=8, columns=12)
"""Chunks of 288 tokens: their ends lie within blocks, and the last block is not a whole one."""
ALIGNED = CacheConfig(chunk=3, window=12, sink=0, rows=8, columns=16)
"""Chunks of three blocks."""
MIXED: Heads = frozenset({(0, 1), (1, 0), (1, 1), (1, 2)})
"""One head of the first layer, all of the second, none of the third."""
ALL: Heads = heads.first(DIT, 1.0)


class Masked(FusedCache):
    """Attention written out, with a mask from which tokens each block of queries may see."""

    def __init__(self, *options: Any, pruned: Heads, **more: Any) -> None:
        super().__init__(*options, **more)
        self.leave_out = pruned

    def _attention(self, layer: int, operands: AttentionOperands) -> Tensor:
        q, keys, values, low_bit = operands.q, operands.k, operands.v, operands.packed
        filled, dtype = self.filled, operands.out_dtype or q.dtype
        if low_bit:
            values = unpack_values(values, filled)
        q, keys, values = q.float(), keys.float(), values.float()
        mask = self.mask(layer, q, keys)
        if low_bit:
            assert operands.q_scale is not None and operands.v_scale is not None
            q = q * operands.q_scale[..., None]
            values = values * operands.v_scale[:, None, :, None]
        scores = torch.einsum("bqhd,bkhd->bhqk", q, keys) * self.head_dim**-0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        # 8-bit attention rounds its probabilities
        weights = references.exp2_fp8(scores / math.log(2)).float() if low_bit else scores.softmax(-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return torch.einsum("bhqk,bkhd->bqhd", weights, values).to(dtype)

    def mask(self, layer: int, q: Tensor, keys: Tensor) -> Tensor:
        batch, queries, count = q.shape[:3]
        blocks = range(-(-self.filled // BLOCK))
        always = set()
        for token in range(self.filled):
            slot = token // self.chunk_tokens
            if slot == self.slot or slot < self.sink_slots:
                always.add(token // BLOCK)
        past = [block for block in blocks if block not in always]
        kept = round(self.keep * len(past))
        mask = torch.zeros(batch, count, queries, self.filled, dtype=torch.bool)
        for b, head, start in (
            (b, head, start) for b in range(batch) for head in range(count) for start in range(0, queries, BLOCK)
        ):
            mean = q[b, start : start + BLOCK, head].mean(0)
            scores = {block: float(mean @ self.block(keys[b, :, head], block).mean(0)) for block in past}
            best = sorted(past, key=lambda block: -scores[block])[:kept]
            for block in always | set(() if (layer, head) in self.leave_out else best):
                self.block(mask[b, head, start : start + BLOCK].T, block).fill_(True)
        return mask

    @staticmethod
    def block(x: Tensor, number: int) -> Tensor:
        return x[number * BLOCK : (number + 1) * BLOCK]


def roll(cache: FusedCache, chunks: int = 6, first: int = 0) -> list[Tensor]:
    """What every layer sees in every forward: a noisy one and the context pass of each chunk."""
    out = []
    batch, width = cache.keys.data.shape[1], cache.head_dim * DIT.num_heads
    sharp, flat = torch.full((width,), 2.0), torch.ones(width)
    for chunk in range(first, first + chunks):
        generator = torch.Generator().manual_seed(chunk)
        for _ in range(2):
            for layer in range(DIT.num_layers):
                qkv = torch.randn(batch, cache.chunk_tokens, 3 * width, generator=generator)
                out.append(cache.attend(layer, cache.write(layer, qkv, None, sharp, flat, 1e-6)))
        cache.advance()
    return out


def apart(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((f - e).norm() / e.norm()) for f, e in zip(found, expected, strict=True)]


@pytest.mark.parametrize("config", [STRADDLING, ALIGNED, replace(STRADDLING, sink=0)], ids=["sink", "aligned", "none"])
@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_heads_see_what_their_masks_show(config: CacheConfig, low_bit: bool, keep: float) -> None:
    """In every state of the ring: while it fills, when it is full, and after it has rolled over."""
    options: dict[str, Any] = {"low_bit": low_bit, "keep": keep, "pruned": MIXED}
    expected = roll(Masked(config, DIT, **options))
    found = roll(FusedCache(config, DIT, **options))
    # in 8 bits a score between two probabilities may fall to either side
    assert max(apart(found, expected)) < (1e-2 if low_bit else 1e-5)
    # and it is the heads of the policy that leave the past out
    options["pruned"] = frozenset({(0, 0), (1, 0), (1, 1), (1, 2)})
    assert max(apart(roll(FusedCache(config, DIT, **options)), expected)) > 0.1


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_heads_in_a_batch(keep: float) -> None:
    options: dict[str, Any] = {"keep": keep, "pruned": MIXED, "batch": 2}
    expected = roll(Masked(STRADDLING, DIT, **options))
    found = roll(FusedCache(STRADDLING, DIT, **options))
    assert max(apart(found, expected)) < 1e-5


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_layers_without_pruned_heads_are_as_they_were(low_bit: bool, keep: float) -> None:
    """Bit for bit, and so are the other heads of a layer, but for the order in which their keys are summed."""
    plain = roll(FusedCache(STRADDLING, DIT, low_bit=low_bit, keep=keep))
    pruned = roll(FusedCache(STRADDLING, DIT, low_bit=low_bit, keep=keep, pruned=frozenset({(1, 0)})))
    for layer in (0, 2):
        assert all(torch.equal(a, b) for a, b in zip(plain[layer::3], pruned[layer::3], strict=True))
    assert max(apart([x[:, :, 1:] for x in pruned[1::3]], [x[:, :, 1:] for x in plain[1::3]])) < 1e-5
    assert max(apart([x[:, :, :1] for x in pruned[1::3]], [x[:, :, :1] for x in plain[1::3]])) > 0.1


@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_pruning_all_heads_is_a_window_without_past(keep: float) -> None:
    expected = roll(FusedCache(replace(ALIGNED, window=3), DIT))
    found = roll(FusedCache(ALIGNED, DIT, keep=keep, pruned=ALL))
    assert max(apart(found, expected)) < 1e-5
    assert max(apart(roll(FusedCache(ALIGNED, DIT, keep=keep)), expected)) > 0.1


@pytest.mark.parametrize("pruned", [MIXED, ALL])
def test_lists_are_as_the_kernels_take_them(pruned: Heads, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous int32, different blocks, the unfinished one first wherever it is looked at, no longer than must be."""
    cache = FusedCache(STRADDLING, DIT, keep=0.5, pruned=pruned, batch=2)
    seen = []

    def watched(operands: AttentionOperands) -> Tensor:
        if operands.blocks is not None:
            seen.append((operands.blocks.index, operands.blocks.visits, operands.k.shape[1]))
        return references.attend(operands)

    monkeypatch.setattr(dispatch, "attend", watched)
    roll(cache, 7)
    assert seen
    for index, visits, keys in seen:
        blocks = -(-keys // BLOCK)
        assert index.dtype == torch.int32 and index.is_contiguous()
        assert index.shape[:3] == (2, 3, 3) and (visits is None or len(visits) == 3)
        assert index.min() >= 0 and index.max() < blocks
        ordered = index.sort(-1).values
        assert (ordered[..., 1:] > ordered[..., :-1]).all()
        visited = torch.tensor([index.shape[-1]] * 3 if visits is None else visits)[:, None].expand(index.shape[:3])
        assert visited.min() > 0 and visited.max() == index.shape[-1]
        unfinished = (index == blocks - 1) & (torch.arange(index.shape[-1]) < visited[..., None])
        assert keys % BLOCK == 0 or not unfinished[..., 1:].any()


def on_kernel(name: str) -> Callable[..., Tensor]:
    """A kernel for tensors in host memory: on a GPU, or in Triton's interpreter."""
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def moved(x: Any) -> Any:
        if isinstance(x, AttentionOperands | BlockLists):
            return type(x)(**{name: moved(part) for name, part in vars(x).items()})
        return x.to(device) if isinstance(x, Tensor) else x

    def call(*arguments: Any) -> Tensor:
        out: Tensor = getattr(kernels, name)(*map(moved, arguments))
        return out.cpu()

    return call


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_kernels_take_the_lists(low_bit: bool, keep: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a state of the ring in which the unfinished block is of the past."""
    seen = []
    for with_kernels in (False, True):
        cache = FusedCache(STRADDLING, replace(DIT, dim=192), low_bit=low_bit, keep=keep, pruned=MIXED)
        roll(cache, 5)
        with monkeypatch.context() as patch:
            for name in ("attend", "pool_blocks", "choose_blocks") if with_kernels else ():
                patch.setattr(dispatch, name, on_kernel(name))
            seen.append([x.float() for x in roll(cache, 1, 5)])
    # the kernels round 8-bit probabilities, the interpreter cuts them off, and a GPU rounds float32 products
    assert max(apart(*seen)) < (0.1 if low_bit else 1e-2)


def test_snapshot_and_reset() -> None:
    options: dict[str, Any] = {"low_bit": True, "keep": 0.5, "pruned": MIXED}
    cache = FusedCache(STRADDLING, DIT, **options)
    roll(cache, 3)
    saved = cache.snapshot()
    first = roll(cache, 3, 3)
    cache.restore(saved)
    assert all(torch.equal(a, b) for a, b in zip(first, roll(cache, 3, 3), strict=True))
    cache.reset(0)
    fresh = roll(FusedCache(STRADDLING, DIT, **options), 4)
    assert all(torch.equal(a, b) for a, b in zip(roll(cache, 4), fresh, strict=True))


@pytest.mark.parametrize(
    ("pruned", "message"),
    [
        ({(3, 0)}, "no layer 3: layers are 0 to 2"),
        ({(-1, 0)}, "no layer -1"),
        ({(2, 3)}, "layer 2 has no head 3: heads are 0 to 2"),
    ],
)
def test_heads_that_are_not_there(pruned: set[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FusedCache(ALIGNED, DIT, pruned=frozenset(pruned))


@pytest.mark.parametrize("policy", [MIXED, ALL, frozenset()])
def test_a_policys_file(policy: Heads, tmp_path: Path) -> None:
    heads.save(policy, tmp_path / "heads.json")
    assert heads.load(tmp_path / "heads.json", DIT) == policy


def test_a_file_by_hand(tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text('{"1": [], "2": [2, 0]}')
    assert heads.load(file, DIT) == {(2, 2), (2, 0)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1, 2]", "must hold an object from layers to lists of heads"),
        ('{"first": [0]}', "'first' is no layer: name layers by number"),
        ('{"-1": [0]}', "'-1' is no layer"),
        ('{"0": 1}', "layer 0 must have a list of numbers"),
        ('{"0": ["1"]}', "layer 0 must have a list of numbers"),
        ('{"0": [true]}', "layer 0 must have a list of numbers"),
        ('{"0": [1.0]}', "layer 0 must have a list of numbers"),
        ('{"7": [0]}', "no layer 7: layers are 0 to 2"),
        ('{"0": [0, 3]}', "layer 0 has no head 3: heads are 0 to 2"),
        ('{"0": [-1]}', "layer 0 has no head -1"),
    ],
)
def test_a_file_that_is_wrong_says_where(content: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message) as caught:
        heads.load(file, DIT)
    assert str(file) in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.json cannot be read"):
        heads.load(tmp_path / "none.json", DIT)


def test_shares_and_thresholds(tmp_path: Path) -> None:
    assert heads.first(DIT, 0) == frozenset()
    assert heads.first(DIT, 0.34) == {(0, 0), (1, 0), (2, 0)}
    assert len(heads.first(DIT, 1.0)) == 9
    with pytest.raises(ValueError, match="share of pruned heads"):
        heads.first(DIT, 1.1)
    assert heads.below([[0.1, 0.05], [0.0, 0.2]], 0.1) == {(0, 1), (1, 0)}
    heads.save(frozenset({(1, 10), (1, 9), (0, 2)}), tmp_path / "heads.json")
    assert json.loads((tmp_path / "heads.json").read_text()) == {"0": [2], "1": [9, 10]}
