"""The rolling KV cache of the fused transformer: operands go straight from the projection into their slot.

Same ring, same sink, same positions as `KVCache`, which it must agree with. What differs: the joint projection of a
chunk is normalised, rotated and stored by one pass; with `low_bit` keys (int8) and values (float8) are rounded once,
when they are written, and a scene's first chunk says around what; and a chunk may look at a part of the past only.

Sparse: keys are grouped in blocks of 128 tokens. For every head and block of queries, the blocks of the past whose mean
key scores best against the mean query are seen, together with all of the sink and of the current chunk. Pruned heads,
which a policy names (`heads.py`), see these alone and nothing of the past.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from engine.config import CacheConfig
from engine.models.config import DiTConfig
from engine.ops import dispatch
from engine.ops.attention import BLOCK, AttentionOperands, BlockLists, attention
from engine.ops.fused import QKVProjection
from engine.ops.quant import KVScales
from engine.stream import pruned_heads as policy
from engine.stream.batch import BatchedFusedCache, RollingCache
from engine.stream.kv_cache import KVCache, Rows
from engine.stream.pruned_heads import Heads


@dataclass(frozen=True)
class Lists:
    """Lists of blocks at one state of the ring, int32, for layers that have pruned heads."""

    pruned: Tensor
    """[blocks]: those that every head sees, from the highest number down, and then the others."""
    always: Tensor
    """[B, heads, query blocks, those that every head sees]: for layers whose heads are all pruned."""
    every: Tensor
    """[B, heads, query blocks, blocks]: all, from the highest number down."""


@dataclass(frozen=True)
class Queries:
    """The queries of a chunk, [B, S, heads, head_dim], in int8 with a scale each, [B, S, heads]; and where the cache
    is not to be read, the exact keys and values to look at."""

    q: Tensor
    q_scale: Tensor | None = None
    exact: tuple[Tensor, Tensor] | None = None


class FusedCache(KVCache):
    """See above. `keep` is the share of the past's blocks that is seen; 1 is all, without choosing."""

    def __init__(
        self,
        config: CacheConfig,
        dit: DiTConfig,
        *,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        low_bit: bool = False,
        keep: float = 1.0,
        pruned: Heads = frozenset(),
    ) -> None:
        """Raises ValueError where `keep` is not within (0, 1], or `pruned` names a head that is not there."""
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
        policy.check(pruned, dit)
        heads, head_dim, layers = dit.num_heads, dit.head_dim, dit.num_layers
        super().__init__(
            config,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            batch=batch,
            device=device,
            dtype=dtype,
            stored=torch.int8 if low_bit else dtype,
        )
        self.keep, self.dtype = keep, dtype
        self.scales: list[KVScales] | None = None
        self._scales: KVScales | None = None
        """Of all layers, [layers, ...]."""
        if low_bit:
            mean, gain = (torch.ones(layers, batch, heads, head_dim, device=device) for _ in range(2))
            self._scales = KVScales(mean, gain, torch.ones(layers, batch, heads, device=device))
            self.scales = [KVScales(*layer) for layer in zip(*vars(self._scales).values(), strict=True)]
            # the 8-bit kernels read values transposed: what `values` would hold is in `packed` instead
            tokens = -(-self.keys.data.shape[2] // 16) * 16
            self.packed = torch.zeros(layers, batch, heads, head_dim, tokens, device=device, dtype=torch.float8_e4m3fn)
            self.values = Rows((layers, batch, 0, heads, head_dim), dtype, self.device, "exact")
        blocks = -(-self.keys.data.shape[2] // BLOCK) if keep < 1 else 0
        self.pooled = torch.zeros(layers, batch, blocks, heads, head_dim, device=device)
        self._seen_always: dict[tuple[int, int], Tensor] = {}
        self._pruned_in = Counter(layer for layer, _ in pruned)
        self._marks = [[(layer, head) in pruned for head in range(heads)] for layer in range(layers)]
        self._pruned = torch.tensor(self._marks, device=self.device)[:, None, :, None, None]
        self._lists: dict[tuple[int, int], Lists] = {}

    @classmethod
    def join(cls, caches: Sequence[Self]) -> RollingCache:
        """Caches of one row each as the cache of a batch."""
        return BatchedFusedCache(caches)

    def _always(self) -> Tensor:
        """Which blocks every query sees, bool [blocks]: those that touch the sink or the current chunk."""
        key = self.slot, self.filled
        if key not in self._seen_always:
            token = torch.arange(self.filled, device=self.device)
            current = token // self.chunk_tokens == self.slot
            seen = current | (token < self.sink_slots * self.chunk_tokens)
            blocks = torch.zeros(-(-self.filled // BLOCK), dtype=torch.bool, device=self.device)
            blocks[token[seen] // BLOCK] = True
            self._seen_always[key] = blocks
        return self._seen_always[key]

    def _past_blocks(self) -> int:
        """How many blocks there are to choose from."""
        spans = [(0, min(self.sink_slots, self.filled // self.chunk_tokens)), (self.slot, self.slot + 1)]
        always: set[int] = set()
        for first, last in spans:
            if first < last:
                always |= set(range(first * self.chunk_tokens // BLOCK, -(-last * self.chunk_tokens // BLOCK)))
        return -(-self.filled // BLOCK) - len(always)

    def write(
        self, layer: int, qkv: Tensor, bias: Tensor | None, norm_q: Tensor, norm_k: Tensor, eps: float
    ) -> Queries:
        """Keys and values of the current chunk, from its joint projection [B, S, 3 D], into the cache."""
        span = self._span(self.slot)
        raw = self.raw_sink[layer, :, span] if span.stop <= self.raw_sink.shape[2] else None
        keys = self.keys.data[layer]
        projection = QKVProjection(qkv, bias, norm_q, norm_k, eps, self._angles)
        if self.scales is None:
            return Queries(
                dispatch.qk_norm_rope(projection, keys[:, span], self.values.data[layer][:, span], raw_keys=raw)
            )

        scales, packed = self.scales[layer], self.packed[layer]
        width, shape = qkv.shape[-1] // 3, keys.shape[2:]
        if self.written:
            queries = Queries(*dispatch.qk_norm_rope_int8(projection, keys[:, span], scales, raw_keys=raw))
            values = qkv[..., 2 * width :].unflatten(-1, shape)
            own_bias = None if bias is None else bias[2 * width :]
            dispatch.pack_values(values, packed, span.start, scales.value, own_bias)
            return queries
        # a scene's first chunk: its own keys and values say how all of the scene's are rounded. It sees them exactly.
        exact_keys, exact_values = (
            torch.empty((*qkv.shape[:2], *shape), dtype=qkv.dtype, device=self.device) for _ in range(2)
        )
        q = dispatch.qk_norm_rope(projection, exact_keys, exact_values, raw_keys=raw)
        scales.calibrate(exact_keys, exact_values)
        scales.quantise_keys(exact_keys, keys[:, span])
        dispatch.pack_values(exact_values, packed, span.start, scales.value)
        return Queries(q, exact=(exact_keys, exact_values))

    def attend(self, layer: int, queries: Queries, out_scale: Tensor | None = None) -> Tensor:
        """Self-attention of the current chunk: [B, S, heads, head_dim].

        With `out_scale` float32 [1] the result may come in float8, to be multiplied by it.
        """
        if queries.exact is not None:
            return attention(queries.q, *queries.exact)
        keys = self.keys.data[layer, :, : self.filled]
        if self.scales is None:
            values = self.values.data[layer, :, : self.filled]
            return self._attention(layer, AttentionOperands(queries.q, keys, values))
        operands = AttentionOperands(
            queries.q,
            keys,
            self.packed[layer],
            q_scale=queries.q_scale,
            v_scale=self.scales[layer].value,
            packed=True,
            out_dtype=self.dtype,
            out_scale=out_scale,
        )
        return self._attention(layer, operands)

    def _attention(self, layer: int, operands: AttentionOperands) -> Tensor:
        """Attention over the keys, or over the blocks of them that are chosen."""
        past = self._past_blocks()
        kept = round(self.keep * past)
        if kept < past or (past and self._pruned_in[layer]):
            operands = replace(operands, blocks=self._listed(layer, operands.q, past, kept))
        return dispatch.attend(operands)

    def _listed(self, layer: int, q: Tensor, past: int, kept: int) -> BlockLists:
        """The `kept` best of the `past` blocks, and none of them for pruned heads."""
        heads, blocks = self._pruned_in[layer], -(-self.filled // BLOCK)
        if heads == q.shape[2]:
            return BlockLists(self._listed_pruned(past).always)
        if kept < past:
            # in 8 bits the mean key that was taken off changes all scores of a query alike, and so do, nearly, the
            # scales of queries
            index = dispatch.choose_blocks(
                dispatch.pool_blocks(q, BLOCK), self.pooled[layer, :, :blocks], self._always(), kept, blocks - past
            )
            if not heads:
                return BlockLists(index)
        else:
            index = self._listed_pruned(past).every
        lists = self._listed_pruned(past)
        visits = [lists.always.shape[-1] if pruned else index.shape[-1] for pruned in self._marks[layer]]
        return BlockLists(torch.where(self._pruned[layer], lists.pruned[: index.shape[-1]], index), visits)

    def _listed_pruned(self, past: int) -> Lists:
        """Made once for every state of the ring, as `_always` is: before a graph of it is recorded."""
        key = self.slot, self.filled
        if key not in self._lists:
            _, batch, _, heads = self.keys.data.shape[:4]
            always = self._always().flip(0)
            down = torch.arange(len(always), dtype=torch.int32, device=self.device).flip(0)
            pruned = torch.cat([down[always], down[~always]])
            dense, shape = len(always) - past, (batch, heads, -(-self.chunk_tokens // BLOCK))
            self._lists[key] = Lists(
                pruned,
                pruned[:dense].expand(*shape, dense).contiguous(),
                down.expand(*shape, len(down)).contiguous(),
            )
        return self._lists[key]

    def advance(self) -> None:
        if self.keep < 1:
            span = self._span(self.slot)
            first, last = span.start // BLOCK, -(-span.stop // BLOCK)
            tokens = self.keys.data[:, :, first * BLOCK : last * BLOCK].flatten(0, 1)
            self.pooled[:, :, first:last] = dispatch.pool_blocks(tokens, BLOCK).unflatten(0, self.keys.data.shape[:2])
        super().advance()

    def _turn_sink(self, angles: Tensor) -> None:
        raw = self.raw_sink.flatten(0, 1)
        keys = self.keys.data[:, :, : raw.shape[1]].flatten(0, 1)
        scales = None if self._scales is None else KVScales(*(x.flatten(0, 1) for x in vars(self._scales).values()))
        dispatch.store_rotated(raw, angles, keys, scales)

    def _tensors(self) -> tuple[Tensor, ...]:
        eight = () if self._scales is None else (*vars(self._scales).values(), self.packed)
        return (*super()._tensors(), self.pooled, *eight)
