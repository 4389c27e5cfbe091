"""Forwards and decoding as CUDA graphs: one launch for some five hundred kernels, which the host cannot launch as fast
as a GPU runs them.

A graph is bound to addresses. So each cache has buffers that inputs are copied to, and a graph for every state that its
ring can be in, recorded when first needed or ahead by `prepare`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from engine.models.dit import TextContext
from engine.stream.batch import FusedRollingCache
from engine.stream.decoding import Decoder
from engine.stream.fused_cache import FusedCache
from engine.transforms.fused import ForwardState, FusedWan

T = TypeVar("T")


def record(function: Callable[[], T], pool: Any) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of `function`, and its result, whose tensors a replay overwrites.

    `function` runs twice before it is captured, so that kernels are compiled and algorithms chosen.
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
class RecordedForward:
    """A forward in two graphs. A context pass replays only the first."""

    begin: torch.cuda.CUDAGraph
    finish: torch.cuda.CUDAGraph
    out: Tensor
    """The flow, which `finish` overwrites."""


@dataclass
class GraphInputs:
    """The buffers that the graphs of one cache read their inputs from, and these graphs."""

    x: Tensor
    t: Tensor
    text: TextContext
    copied: TextContext | None = None
    """The context whose values `text` holds."""
    graphs: dict[tuple[int, int, bool], RecordedForward] = field(default_factory=dict)
    """By slot and filled tokens of the cache, and whether the chunk is the scene's first."""


class GraphedWan(nn.Module):
    """A `FusedWan` whose forwards are replayed from CUDA graphs. The flow it returns is overwritten by its next call.

    Batches run kernel by kernel, since a graph is bound to one cache.
    """

    def __init__(self, model: FusedWan) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self._pool = torch.cuda.graph_pool_handle()
        self._inputs: WeakKeyDictionary[FusedCache, GraphInputs] = WeakKeyDictionary()

    @property
    def patch_embedding(self) -> nn.Conv3d:
        return self.model.patch_embedding

    def encode_text(self, text: Tensor) -> TextContext:
        return self.model.encode_text(text)

    def refresh(self) -> None:
        self.model.refresh()

    def forward(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedRollingCache) -> Tensor:
        return self.finish(self.begin(x, t, text, cache), text, cache)

    def commit(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedRollingCache) -> None:
        self.begin(x, t, text, cache)

    def begin(
        self, x: Tensor, t: Tensor, text: TextContext, cache: FusedRollingCache
    ) -> RecordedForward | ForwardState:
        if not isinstance(cache, FusedCache):
            return self.model.begin(x, t, text, cache)
        recorded = self._recorded(x, t, text, cache)
        recorded.begin.replay()
        return recorded

    def finish(self, begun: RecordedForward | ForwardState, text: TextContext, cache: FusedRollingCache) -> Tensor:
        if isinstance(begun, ForwardState):
            return self.model.finish(begun, text, cache)
        begun.finish.replay()
        return begun.out

    @torch.inference_mode()
    def prepare(self, cache: FusedCache) -> bool:
        """Record the graphs of every state that the cache's ring goes through; see `Transformer`.

        Raises:
            RuntimeError: no forward has run yet, so that the shapes of inputs are unknown.
        """
        like = next(iter(self._inputs.values()), None)
        if like is None:
            raise RuntimeError("graphs can be recorded ahead once a forward has run on another cache")
        cache.reset(0)
        for _ in cache.shapes():
            self._recorded(like.x, like.t, like.text, cache)
            cache.advance()
        cache.reset(0)
        return True

    def _recorded(self, x: Tensor, t: Tensor, text: TextContext, cache: FusedCache) -> RecordedForward:
        """The graphs for the state of the cache's ring, recorded now if need be, with their inputs in place."""
        inputs = self._inputs.get(cache)
        if inputs is None:
            inputs = GraphInputs(torch.empty_like(x), torch.empty_like(t), text.map(torch.empty_like))
            self._inputs[cache] = inputs
        inputs.x.copy_(x)
        inputs.t.copy_(t)
        if inputs.copied is not text:
            for (k, v), (new_k, new_v) in zip(inputs.text.layers, text.layers, strict=True):
                k.copy_(new_k)
                v.copy_(new_v)
            inputs.text.pooled.copy_(text.pooled)
            inputs.text.lengths.copy_(text.lengths)
            inputs.copied = text
        key = cache.slot, cache.filled, cache.written == 0
        if key not in inputs.graphs:
            x, t, text = inputs.x, inputs.t, inputs.text
            begin, begun = record(lambda: self.model.begin(x, t, text, cache), self._pool)
            # `record` runs it more than once, and `finish` changes what it is given
            finish, out = record(lambda: self.model.finish(replace(begun), text, cache), self._pool)
            # `begun` is not kept: later graphs may reuse its memory, since none is replayed between these two.
            inputs.graphs[key] = RecordedForward(begin, finish, out)
        return inputs.graphs[key]


class GraphedDecoder:
    """A `Decoder` replayed from CUDA graphs. Memories are copied in and out, so that all streams share the graphs."""

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
