"""Chunks of several streams in one batch: what each stream keeps for itself, side by side.

Projections and feed-forward are then one product for all streams, while attention stays each stream's own: their rings
stand at different places, and each has its own past.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.models.dit import Attend
from engine.stream.kv_cache import KVCache


class JoinedCaches:
    """Used as the cache of a batch; row i of every tensor is the chunk of the stream whose cache is the i-th."""

    def __init__(self, caches: Sequence[KVCache]) -> None:
        """`caches` have one row each."""
        self._caches = list(caches)
        self.device = self._caches[0].device

    @property
    def written(self) -> int:
        """Chunks that each has kept, at least."""
        return min(cache.written for cache in self._caches)

    def at(self, layer: int) -> Attend:
        """See `SelfAttend`."""
        attends = [cache.at(layer) for cache in self._caches]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = zip(attends, q.split(1), k.split(1), v.split(1), strict=True)
            return torch.cat([own(*row) for own, *row in rows])

        return attend

    def write(self, layer: int, qkv: Tensor, *how: Any) -> list[Any]:
        """See `FusedCache.write`."""
        return [
            cache.write(layer, row, *how)  # type: ignore[attr-defined]
            for cache, row in zip(self._caches, qkv.split(1), strict=True)
        ]

    def attend(self, layer: int, asked: list[Any], out_scale: Tensor | None = None) -> Tensor:
        """See `FusedCache.look`."""
        rows = zip(self._caches, asked, strict=True)
        return torch.cat([cache.attend(layer, own, out_scale) for cache, own in rows])  # type: ignore[attr-defined]

    def advance(self) -> None:
        for cache in self._caches:
            cache.advance()
