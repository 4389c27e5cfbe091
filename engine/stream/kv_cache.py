"""The rolling KV cache: a ring of chunk-sized slots behind an optional sink that never leaves.

A slot holds the keys and values of one chunk, so that the cache is never copied when it rolls. Keys in the ring are
stored rotated at their absolute position: scores depend on differences of position only, so they stay right for
ever. The sink's keys are stored raw and rotated again each chunk to stand just before the oldest chunk of the ring,
so that their distance to the query stays one that the model was trained on; or, without `turn_sink`, they stay where
they were written. A scene's first chunk may be kept in the ring as a second sink (`cut`).

Past chunks may be kept in 8 bits; the chunk that is being denoised is always exact.

Shapes: B batch, S tokens of a chunk, N tokens of a frame.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor

from engine.config import CacheConfig, PlainPrecision
from engine.models.dit import Attend
from engine.ops.attention import attention
from engine.ops.quant import FORMAT_DTYPE, QuantTensor, quantise
from engine.ops.rope import rope_angles, rotate
from engine.stream.batch import BatchedCache, RollingCache


class Rows:
    """Keys or values of all layers, [layers, B, tokens, heads, head_dim].

    In 8 bits each vector of head_dim has a float32 scale that brings its largest magnitude to the format's.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, precision: PlainPrecision
    ) -> None:
        self.dtype, self.format = dtype, None if precision == "exact" else precision
        stored = dtype if self.format is None else FORMAT_DTYPE[self.format]
        self.data = torch.zeros(shape, device=device, dtype=stored)
        self.scale = torch.ones((*shape[:-1], 0 if self.format is None else 1), device=device)

    def write(self, layer: int, span: slice, x: Tensor) -> None:
        """Store x [B, tokens of the span, heads, head_dim]."""
        if self.format is None:
            self.data[layer, :, span] = x.to(self.data.dtype)
        else:
            quantised = quantise(x, self.format)
            self.data[layer, :, span], self.scale[layer, :, span] = quantised.data, quantised.scale

    def read(self, layer: int, count: int) -> Tensor:
        """The first `count` tokens, [B, count, heads, head_dim]: a view where they are exact."""
        data = self.data[layer, :, :count]
        if self.format is None:
            return data
        return QuantTensor(data, self.scale[layer, :, :count]).dequantise().to(self.dtype)

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.data, self.scale


class KVCache:
    """Self-attention over sink, past chunks and the current chunk; the `SelfAttend` of a live stream.

    Every forward between two calls of `advance` rewrites the slot of the current chunk; the last one before
    `advance`, the context pass over the clean latents, is what later chunks see.
    """

    def __init__(
        self,
        config: CacheConfig,
        *,
        layers: int,
        heads: int,
        head_dim: int,
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        precision: PlainPrecision = "exact",
        stored: torch.dtype | None = None,
    ) -> None:
        """`stored` is the type of exact keys and values where that is not `dtype`."""
        self.config = config
        self.exact = precision == "exact"
        self.head_dim = head_dim
        self.device = torch.device(device)
        self.sink_slots = config.sink // config.chunk
        self.ring_slots = config.window // config.chunk - self.sink_slots
        self.chunk_tokens = config.chunk * config.rows * config.columns
        shape = (layers, batch, (self.sink_slots + self.ring_slots) * self.chunk_tokens, heads, head_dim)
        self.keys, self.values = (Rows(shape, stored or dtype, self.device, precision) for _ in range(2))
        turned = self.sink_slots if config.turn_sink else 0
        sink = (layers, batch, turned * self.chunk_tokens, heads, head_dim)
        self.raw_sink = torch.zeros(sink, device=self.device, dtype=dtype)
        self.start_frame = 0
        self.written = 0
        self._past: list[int] = []
        """Slots of the ring's committed chunks, oldest first."""
        self._kept: int | None = None
        """The slot of the ring that is not evicted: it holds the first chunk after a cut."""
        self._keep_next = False
        self._angles = self._rotations(0, config.chunk)
        self._sink_base = 0

    @classmethod
    def join(cls, caches: Sequence[Self]) -> RollingCache:
        """Caches of one row each as the cache of a batch."""
        return BatchedCache(caches)

    def _rotations(self, frame: int, count: int) -> Tensor:
        frames = torch.arange(frame, frame + count, device=self.device)
        return rope_angles(frames, self.config.rows, self.config.columns, self.head_dim)

    def _stand(self) -> None:
        """Turn to where the current chunk stands; in place, since what was recorded (CUDA graphs) reads it there."""
        self._angles.copy_(self._rotations(self.start_frame, self.config.chunk))

    def _span(self, slot: int) -> slice:
        return slice(slot * self.chunk_tokens, (slot + 1) * self.chunk_tokens)

    @property
    def slot(self) -> int:
        """Where the current chunk stands: in a free slot, or in place of the oldest chunk that may leave."""
        if self.written < self.sink_slots:
            return self.written
        if len(self._past) < self.ring_slots:
            return self.sink_slots + len(self._past)
        return next(slot for slot in self._past if slot != self._kept)

    @property
    def filled(self) -> int:
        """Tokens that the current chunk sees, itself among them."""
        return min(self.written + 1, self.sink_slots + self.ring_slots) * self.chunk_tokens

    def shapes(self) -> list[tuple[int, int]]:
        """Every (slot, filled) that a stream goes through, in the order in which it first does."""
        slots = self.sink_slots + self.ring_slots
        grown = [(slot, (slot + 1) * self.chunk_tokens) for slot in range(slots)]
        return grown + [(slot, slots * self.chunk_tokens) for slot in range(self.sink_slots, slots - 1)]

    def at(self, layer: int) -> Attend:
        """See `SelfAttend`: writes the chunk's k and v and attends from its q."""
        return partial(self._attend, layer)

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        slot, filled = self.slot, self.filled
        span = self._span(slot)
        turned = rotate(k, self._angles)
        self.keys.write(layer, span, turned)
        self.values.write(layer, span, v)
        if span.stop <= self.raw_sink.shape[2]:
            self.raw_sink[layer, :, span] = k
        keys, values = self.keys.read(layer, filled), self.values.read(layer, filled)
        if not self.exact:
            keys[:, span], values[:, span] = turned, v
        return attention(rotate(q, self._angles), keys, values)

    def advance(self) -> None:
        """Keep the current chunk and move on to the next one."""
        slot = self.slot
        if slot >= self.sink_slots:
            self._past = [*(other for other in self._past if other != slot), slot]
        if self._keep_next:
            self._kept, self._keep_next = slot, False
        self.written += 1
        self.start_frame += self.config.chunk
        self._stand()
        self._replace_sink()

    def cut(self, offset: int) -> None:
        """Begin a scene that keeps all that is cached: positions jump by `offset` latent frames, and the scene's first
        chunk stays in the ring, in place of the one that an earlier cut kept there. Needs two slots besides the sink.
        """
        self.start_frame += offset
        self._keep_next = True
        self._stand()
        self._replace_sink()

    @property
    def past(self) -> int:
        """Chunks in the ring, besides the current one."""
        return len(self._past)

    def drop_past(self, start_frame: int) -> None:
        """Forget the past and keep the sink; the next chunk stands at `start_frame`."""
        self.written, self._past, self._kept = min(self.written, self.sink_slots), [], None
        self.start_frame = start_frame
        self._stand()
        self._replace_sink()

    def _replace_sink(self) -> None:
        """Rotate the sink to end where the ring's oldest chunk, once the current one is written, begins."""
        in_ring = min(self.written + 1 - self.sink_slots, self.ring_slots)
        if not self.raw_sink.shape[2] or in_ring < 1:
            return
        base = self.start_frame - (in_ring - 1) * self.config.chunk - self.config.sink
        if base == self._sink_base:
            return
        self._sink_base = base
        self._turn_sink(self._rotations(base, self.config.sink))

    def _turn_sink(self, angles: Tensor) -> None:
        for layer, raw in enumerate(self.raw_sink):
            self.keys.write(layer, slice(0, raw.shape[1]), rotate(raw, angles))

    def reset(self, start_frame: int | None = None) -> None:
        """Forget everything; the next chunk stands at `start_frame`, by default where it would have stood."""
        self.written, self._past, self._kept, self._keep_next = 0, [], None, False
        if start_frame is not None:
            self.start_frame = start_frame
        self._sink_base = self.start_frame
        self._stand()

    def _tensors(self) -> tuple[Tensor, ...]:
        return (*self.keys.tensors(), *self.values.tensors(), self.raw_sink)

    def snapshot(self) -> tuple[list[Tensor], tuple[Any, ...]]:
        """A copy of everything that `restore` needs."""
        at = self.start_frame, self.written, self._sink_base, self._past, self._kept, self._keep_next
        return [x.clone() for x in self._tensors()], at

    def restore(self, snapshot: tuple[list[Tensor], tuple[Any, ...]]) -> None:
        saved, at = snapshot
        self.start_frame, self.written, self._sink_base, self._past, self._kept, self._keep_next = at
        for x, copy in zip(self._tensors(), saved, strict=True):
            x.copy_(copy)
        self._stand()

    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self._tensors())


class BlockCausal:
    """The whole clip at once: a chunk sees itself, `past` chunks before it, and the first `sink` chunks.

    The reference that `KVCache` must agree with. It places the sink at its own absolute position, so with a sink the
    two agree until the ring rolls over.
    """

    def __init__(self, frames: int, config: CacheConfig, head_dim: int, device: torch.device | str = "cpu") -> None:
        positions = torch.arange(frames, device=device)
        self.angles = rope_angles(positions, config.rows, config.columns, head_dim)
        chunk = (positions // config.chunk).repeat_interleave(config.rows * config.columns)
        query, key = chunk[:, None], chunk[None, :]
        past = (config.window - config.sink) // config.chunk - 1
        self.mask = (key <= query) & ((query - key <= past) | (key < config.sink // config.chunk))

    def at(self, layer: int) -> Attend:
        return self._attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(rotate(q, self.angles), rotate(k, self.angles), v, self.mask)
