"""Forwards and decoding as CUDA graphs: one launch for some five hundred kernels, which the host could not issue as
fast as a GPU runs them.

A graph is bound to addresses, so each cache has a place of its own: buffers that inputs are copied to, and one graph
for every state that its ring can be in. They are recorded when first met; warming a place up records all of them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from engine.models.dit import TextContext
from engine.stream.decoding import Decoder
from engine.stream.fused_cache import FusedCache
from engine.transforms.fused import FusedWan

T = TypeVar("T")


def record(function: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """`function` as a graph, and its result, whose tensors a replay fills.

    It is called twice before: kernels are compiled and algorithms chosen then.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        out = function()
    return graph, out


@dataclass(frozen=True)
class Recorded:
    """A forward in two parts. A context pass needs the first alone."""

    begin: torch.cuda.CUDAGraph
    finish: torch.cuda.CUDAGraph
    out: Tensor


@dataclass
class Place:
    """Where the graphs of one cache find their inputs."""

    x: Tensor
    t: Tensor
    text: TextContext
    shown: TextContext | None = None
    """The context that was copied to `text`."""
    graphs: dict[tuple[int, int, bool], Recorded] = field(default_factory=dict)


class GraphedWan(nn.Module):
    """Called as the `FusedWan` it runs. The flow it returns is overwritten by its next call."""

    def __init__(self, model: FusedWan) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._pool = torch.cuda.graph_pool_handle()
        self._places: WeakKeyDictionary[FusedCache, Place] = WeakKeyDictionary()

    @property
    def patch_embedding(self) -> nn.Conv3d:
        return self.model.patch_embedding

    def encode_text(self, text: Tensor) -> TextContext:
        return self.model.encode_text(text)

    def refresh(self) -> None:
        self.model.refresh()

    def forward(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedCache) -> Tensor:
        graphs = self._at(x, t, text, cache)
        graphs.begin.replay()
        graphs.finish.replay()
        return graphs.out

    def commit(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedCache) -> None:
        self._at(x, t, text, cache).begin.replay()

    def _at(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedCache) -> Recorded:
        """The graphs for where the cache's ring stands, their inputs in place."""
        place = self._places.get(cache)
        if place is None:
            place = Place(torch.empty_like(x), torch.empty_like(t), text.map(torch.empty_like))
            self._places[cache] = place
        place.x.copy_(x)
        place.t.copy_(t)
        if place.shown is not text:
            for (k, v), (new_k, new_v) in zip(place.text.layers, text.layers, strict=True):
                k.copy_(new_k)
                v.copy_(new_v)
            place.text.pooled.copy_(text.pooled)
            place.text.lengths.copy_(text.lengths)
            place.shown = text
        key = cache.slot, cache.filled, cache.written == 0
        if key not in place.graphs:
            inputs = place
            begin, begun = record(lambda: self.model.begin(inputs.x, inputs.t, inputs.text, cache), self._pool)
            # `record` runs it more than once, and it changes what it is given
            finish, out = record(lambda: self.model.finish(replace(begun), inputs.text, cache), self._pool)
            # What `begin` leaves is not kept: later graphs may use its memory, since none runs between these two.
            place.graphs[key] = Recorded(begin, finish, out)
        return place.graphs[key]


class GraphedDecoder:
    """Called as the `Decoder` it runs. Memories are copied in and out, so that streams may share the graphs."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[bool, tuple[tuple[torch.cuda.CUDAGraph, Tensor], Tensor, list[Tensor], list[Tensor]]] = {}

    @property
    def network(self) -> nn.Module:
        return self.decoder.network

    def __call__(self, latents: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        first = memories is None
        if first not in self._graphs:
            at, before = latents.clone(), [x.clone() for x in memories or []]
            after: list[Tensor] = []

            def run() -> Tensor:
                frames, left = self.decoder(at, None if first else before)
                after[:] = left
                return frames

            self._graphs[first] = record(run, self._pool), at, before, after
        (graph, frames), at, before, after = self._graphs[first]
        at.copy_(latents)
        for x, new in zip(before, memories or [], strict=True):
            x.copy_(new)
        graph.replay()
        return frames, [x.clone() for x in after]
