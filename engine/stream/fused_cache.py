"""The rolling KV cache of the fused transformer: operands go straight from the projection into their slot.

Same ring, same sink, same positions as `KVCache`, which it must agree with. What differs: the joint projection of a
chunk is normalised, rotated and stored by one pass; with `float8` keys and values are rounded once, when they are
written, with scales that the first chunk of a scene sets; and a chunk may look at a part of the past only.

Sparse: keys are grouped in blocks of 128 tokens. For every head and block of queries, the blocks of the past whose mean
key scores best against the mean query are seen, together with all of the sink and of the current chunk.
"""

import torch
from torch import Tensor

from engine.models.sizes import DiTConfig
from engine.ops import fused
from engine.ops.attention import attention, block_sparse, choose_blocks, dense, pool
from engine.ops.fused import Scales
from engine.stream.kv_cache import CacheConfig, KVCache

BLOCK = 128


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
        float8: bool = False,
        keep: float = 1.0,
    ) -> None:
        """Raises ValueError where `keep` is not within (0, 1]."""
        if not 0 < keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {keep}")
        heads, head_dim, layers = dit.num_heads, dit.head_dim, dit.num_layers
        super().__init__(
            config,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            batch=batch,
            device=device,
            dtype=dtype,
            stored=torch.float8_e4m3fn if float8 else dtype,
        )
        self.keep = keep
        self.scales: list[Scales] | None = None
        if float8:
            means = torch.zeros(layers, batch, heads, head_dim, device=device)
            keys, values = (torch.ones(layers, batch, heads, device=device) for _ in range(2))
            self.scales = [Scales(*layer) for layer in zip(means, keys, values, strict=True)]
        blocks = -(-self.keys.data.shape[2] // BLOCK) if keep < 1 else 0
        self.pooled = torch.zeros(layers, batch, blocks, heads, head_dim, device=device, dtype=dtype)
        self._seen_always: dict[tuple[int, int], Tensor] = {}

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

    def attend(
        self, layer: int, qkv: Tensor, bias: Tensor | None, norm_q: Tensor, norm_k: Tensor, eps: float
    ) -> Tensor:
        """Self-attention of the current chunk from its joint projection [B, S, 3 D]: [B, S, heads, head_dim]."""
        span = self._span(self.slot)
        scales = None if self.scales is None else self.scales[layer]
        raw = self.raw_sink[layer, :, span] if self.slot < self.sink_slots else None
        keys, values = self.keys.data[layer], self.values.data[layer]
        slot_keys, slot_values = keys[:, span], values[:, span]
        query_scale = None
        if scales is not None and not self.written:
            # a scene's first chunk: its own keys and values say how all of the scene's are to be rounded
            shape, dtype, device = slot_keys.shape, qkv.dtype, qkv.device
            exact_keys, exact_values = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
            q, _ = fused.heads(qkv, bias, norm_q, norm_k, eps, self._angles, exact_keys, exact_values, raw_keys=raw)
            scales.calibrate(exact_keys, exact_values)
            fused.store(exact_keys, slot_keys, scales.key, scales.key_mean)
            fused.store(exact_values, slot_values, scales.value)
            return attention(q, exact_keys, exact_values)
        q, query_scale = fused.heads(
            qkv, bias, norm_q, norm_k, eps, self._angles, slot_keys, slot_values, raw_keys=raw, scales=scales
        )
        keys, values = keys[:, : self.filled], values[:, : self.filled]
        key_scale, value_scale = (None, None) if scales is None else (scales.key, scales.value)
        past = self._past_blocks()
        kept = round(self.keep * past)
        if kept < past:
            # in float8 the mean key that was taken off and the scales change all scores of a head alike, or nearly
            pooled = self.pooled[layer, :, : -(-self.filled // BLOCK)]
            index = choose_blocks(pool(q, BLOCK), pooled, self._always(), kept)
            return block_sparse(
                q, keys, values, index, q_scale=query_scale, k_scale=key_scale, v_scale=value_scale, out_dtype=qkv.dtype
            )
        if scales is None:
            return attention(q, keys, values)
        return dense(q, keys, values, q_scale=query_scale, k_scale=key_scale, v_scale=value_scale, out_dtype=qkv.dtype)

    def advance(self) -> None:
        if self.keep < 1:
            span = self._span(self.slot)
            first, last = span.start // BLOCK, -(-span.stop // BLOCK)
            tokens = self.keys.data[:, :, first * BLOCK : last * BLOCK].flatten(0, 1)
            self.pooled[:, :, first:last] = pool(tokens, BLOCK).unflatten(0, self.keys.data.shape[:2])
        super().advance()

    def _write_sink(self, layer: int, keys: Tensor) -> None:
        scales = None if self.scales is None else self.scales[layer]
        span = self.keys.data[layer, :, : keys.shape[1]]
        fused.store(keys, span, None if scales is None else scales.key, None if scales is None else scales.key_mean)

    def _tensors(self) -> tuple[Tensor, ...]:
        scales = [x for layer in self.scales or () for x in (layer.key_mean, layer.key, layer.value)]
        return (*super()._tensors(), self.pooled, *scales)
