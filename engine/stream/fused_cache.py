"""The rolling KV cache of the fused transformer: operands go straight from the projection into their slot.

Same ring, same sink, same positions as `KVCache`, which it must agree with. What differs: the joint projection of a
chunk is normalised, rotated and stored by one pass; with `float8` keys and values are rounded once, when they are
written, with scales that the first chunk of a scene sets; and a chunk may look at a part of the past only.

Sparse: keys are grouped in blocks of 128 tokens. For every head and block of queries, the blocks of the past whose mean
key scores best against the mean query are seen, together with all of the sink and of the current chunk.
"""

from typing import Any

import torch
from torch import Tensor

from engine.models.sizes import DiTConfig
from engine.ops import fused
from engine.ops.attention import BLOCK, attention
from engine.ops.fused import Scales
from engine.stream.kv_cache import CacheConfig, KVCache, Rows


def kernels(device: torch.device) -> Any:
    """Where `dense`, `block_sparse` and what they need are for this device."""
    if device.type == "cuda":
        from engine.ops.triton import attention as module
    else:
        from engine.ops import attention as module  # type: ignore[no-redef]
    return module


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
        self._key_scales: Tensor | None = None
        if float8:
            self._key_means = torch.zeros(layers, batch, heads, head_dim, device=device)
            self._key_scales, values = (torch.ones(layers, batch, heads, device=device) for _ in range(2))
            self.scales = [Scales(*layer) for layer in zip(self._key_means, self._key_scales, values, strict=True)]
            # the 8-bit kernels read values transposed: what `values` would hold is in `packed` instead
            tokens = -(-self.keys.data.shape[2] // 16) * 16
            self.packed = torch.zeros(layers, batch, heads, head_dim, tokens, device=device, dtype=torch.float8_e4m3fn)
            self.values = Rows((layers, batch, 0, heads, head_dim), dtype, self.device, "exact")
        self._kernels = kernels(self.device)
        # there our kernel takes three quarters of the time of PyTorch's best (`docs/benchmarks.md`)
        self._own_dense = self.device.type == "cuda" and torch.cuda.get_device_capability(self.device) == (9, 0)
        blocks = -(-self.keys.data.shape[2] // BLOCK) if keep < 1 else 0
        self.pooled = torch.zeros(layers, batch, blocks, heads, head_dim, device=device)
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
        self,
        layer: int,
        qkv: Tensor,
        bias: Tensor | None,
        norm_q: Tensor,
        norm_k: Tensor,
        eps: float,
        out_scale: Tensor | None = None,
    ) -> Tensor:
        """Self-attention of the current chunk from its joint projection [B, S, 3 D]: [B, S, heads, head_dim].

        With `out_scale` float32 [1] the result may come in float8, to be multiplied by it.
        """
        span = self._span(self.slot)
        raw = self.raw_sink[layer, :, span] if self.slot < self.sink_slots else None
        keys = self.keys.data[layer]
        if self.scales is None:
            values = self.values.data[layer]
            q, _ = fused.heads(
                qkv, bias, norm_q, norm_k, eps, self._angles, keys[:, span], values[:, span], raw_keys=raw
            )
            return self._look(layer, q, keys[:, : self.filled], values[:, : self.filled])

        scales, packed = self.scales[layer], self.packed[layer]
        new_values = torch.empty_like(keys[:, span])
        if self.written:
            q, q_scale = fused.heads(
                qkv, bias, norm_q, norm_k, eps, self._angles, keys[:, span], new_values, raw_keys=raw, scales=scales
            )
            self._kernels.pack_values(new_values, packed, span.start)
            given: dict[str, Any] = {"q_scale": q_scale, "k_scale": scales.key, "v_scale": scales.value, "packed": True}
            given |= {"out_dtype": qkv.dtype, "out_scale": out_scale}
            return self._look(layer, q, keys[:, : self.filled], packed, **given)
        # a scene's first chunk: its own keys and values say how all of the scene's are rounded. It sees them exactly.
        exact_keys, exact_values = (
            torch.empty(new_values.shape, dtype=qkv.dtype, device=self.device) for _ in range(2)
        )
        q, _ = fused.heads(qkv, bias, norm_q, norm_k, eps, self._angles, exact_keys, exact_values, raw_keys=raw)
        scales.calibrate(exact_keys, exact_values)
        fused.store(exact_keys, keys[:, span], scales.key, scales.key_mean)
        fused.store(exact_values, new_values, scales.value)
        self._kernels.pack_values(new_values, packed, span.start)
        return attention(q, exact_keys, exact_values)

    def _look(self, layer: int, q: Tensor, keys: Tensor, values: Tensor, **given: Any) -> Tensor:
        """Attention over the keys, or over the blocks of them that are chosen."""
        past = self._past_blocks()
        kept = round(self.keep * past)
        if kept < past:
            blocks = -(-self.filled // BLOCK)
            # in float8 the mean key that was taken off and the scales change all scores of a head alike, or nearly
            index = self._kernels.choose_blocks(
                self._kernels.pool(q, BLOCK), self.pooled[layer, :, :blocks], self._always(), kept, blocks - past
            )
            out: Tensor = self._kernels.block_sparse(q, keys, values, index, **given)
            return out
        if not given and not self._own_dense:
            return attention(q, keys, values)
        out = self._kernels.dense(q, keys, values, **given)
        return out

    def advance(self) -> None:
        if self.keep < 1:
            span = self._span(self.slot)
            first, last = span.start // BLOCK, -(-span.stop // BLOCK)
            tokens = self.keys.data[:, :, first * BLOCK : last * BLOCK].flatten(0, 1)
            self.pooled[:, :, first:last] = self._kernels.pool(tokens, BLOCK).unflatten(0, self.keys.data.shape[:2])
        super().advance()

    def _turn_sink(self, angles: Tensor) -> None:
        raw = self.raw_sink.flatten(0, 1)
        keys = self.keys.data[:, :, : raw.shape[1]].flatten(0, 1)
        how = () if self._key_scales is None else (self._key_scales.flatten(0, 1), self._key_means.flatten(0, 1))
        fused.store_turned(raw, angles, keys, *how)

    def _tensors(self) -> tuple[Tensor, ...]:
        scales = [x for layer in self.scales or () for x in (layer.key_mean, layer.key, layer.value)]
        return (*super()._tensors(), self.pooled, *scales, *((self.packed,) if self.scales else ()))
