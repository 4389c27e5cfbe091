"""Rolling caches, and several of them as the cache of a batch.

In a batch, projections and feed-forward are one product for all streams. Attention stays separate per stream: their
rings are at different slots, and each has its own past.
"""

from collections.abc import Sequence
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from engine.models.dit import Attend


class RollingCache(Protocol):
    """What the rollout needs of a KV cache, whichever transformer it belongs to."""

    @property
    def device(self) -> torch.device: ...

    @property
    def written(self) -> int:
        """Chunks committed since the scene began."""

    def advance(self) -> None:
        """Keep the current chunk and move on to the next one."""


class AttendingCache(RollingCache, Protocol):
    """The cache of a `CausalWan`."""

    def at(self, layer: int) -> Attend:
        """See `SelfAttend`."""


class FusedRollingCache(RollingCache, Protocol):
    """The cache of a `FusedWan`."""

    def write(self, layer: int, qkv: Tensor, *norms: Any) -> Any:
        """See `FusedCache.write`."""

    def attend(self, layer: int, queries: Any, out_scale: Tensor | None = None) -> Tensor:
        """See `FusedCache.attend`."""


C = TypeVar("C", bound=RollingCache)


class _Batch(Generic[C]):
    """Row i of every tensor belongs to the i-th of `caches`, which have one row each."""

    def __init__(self, caches: Sequence[C]) -> None:
        self._caches = list(caches)
        self.device = self._caches[0].device

    @property
    def written(self) -> int:
        """Chunks that every cache has committed, at least."""
        return min(cache.written for cache in self._caches)

    def advance(self) -> None:
        for cache in self._caches:
            cache.advance()


class BatchedCache(_Batch[AttendingCache]):
    """The caches of a batch for `CausalWan`."""

    def at(self, layer: int) -> Attend:
        """See `SelfAttend`."""
        attends = [cache.at(layer) for cache in self._caches]

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            rows = zip(attends, q.split(1), k.split(1), v.split(1), strict=True)
            return torch.cat([one(*row) for one, *row in rows])

        return attend


class BatchedFusedCache(_Batch[FusedRollingCache]):
    """The caches of a batch for `FusedWan`."""

    def write(self, layer: int, qkv: Tensor, *norms: Any) -> list[Any]:
        """See `FusedCache.write`; the queries are a list, one entry per row."""
        return [cache.write(layer, row, *norms) for cache, row in zip(self._caches, qkv.split(1), strict=True)]

    def attend(self, layer: int, queries: list[Any], out_scale: Tensor | None = None) -> Tensor:
        """See `FusedCache.attend`."""
        rows = zip(self._caches, queries, strict=True)
        return torch.cat([cache.attend(layer, own, out_scale) for cache, own in rows])
