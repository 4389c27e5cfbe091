"""Warming up: run every shape that will be served once, and measure how long a chunk takes."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

import torch

from engine.pipeline import NotFiniteError, Pipeline
from engine.stream.state import StreamState

MAX_STREAMS = 8
"""The most streams whose CUDA graphs are recorded ahead."""

FASTER = 0.97
"""Largest share of a single chunk's time that a chunk in a batch may take for batches to be used: they cost latency,
and frames that no longer repeat exactly."""


@dataclass(frozen=True)
class WarmupResult:
    """What warming up measured."""

    chunk_seconds: float
    """From one chunk at full window to the next, context pass included; in a batch, the batch's time per chunk."""
    batch: int = 1
    """How many streams' chunks to generate in one batch."""


def warm(pipeline: Pipeline, streams: int | None = None, batch: int = 1) -> WarmupResult:
    """Run every shape once, then time three chunks at full window, back to back, and take the median.

    On a GPU a chunk begins while the one before is still being decoded, as when serving a stream that is behind.

    Args:
        streams: how many streams' caches to prepare (record CUDA graphs for), so that opening a stream takes no longer
            than its first chunk; by default as many as the device can serve at playback speed.
        batch: try batches of so many streams, and use them if a chunk takes less time for it.

    Raises:
        NotFiniteError: the model produces NaN or infinity.
    """
    preset = pipeline.preset
    state = pipeline.open("warm-up", seed=0)
    shapes = len(state.cache.shapes())
    _generate(pipeline, [state], shapes)
    alone = _chunk_seconds(pipeline, [state])
    opened = [state]
    if pipeline.dit.prepare(state.cache):
        capacity = max(1, int(preset.chunk_frames / preset.fps / alone))
        streams = streams or min(MAX_STREAMS, capacity)
        while len(opened) < streams and torch.cuda.mem_get_info()[0] > 2 * state.cache.bytes():
            opened.append(pipeline.open("warm-up", seed=0))
            pipeline.dit.prepare(opened[-1].cache)
    result = WarmupResult(alone)
    if batch > 1:
        for state in opened:
            pipeline.close(state)
        opened = [pipeline.open("warm-up", seed=0) for _ in range(max(batch, len(opened)))]
        _generate(pipeline, opened[:batch], shapes)
        batched = _chunk_seconds(pipeline, opened[:batch]) / batch
        faster = batched < FASTER * alone
        took = f"{1e3 * alone:.0f} ms alone and {1e3 * batched:.0f} in a batch of {batch}"
        print(f"engine: a chunk takes {took}: batches are {'' if faster else 'not '}made", flush=True)
        if faster:
            result = WarmupResult(batched, batch)
    for state in opened:
        pipeline.close(state)
    return result


def _generate(pipeline: Pipeline, states: Sequence[StreamState], chunks: int) -> list[float]:
    """Generate the next chunks of all streams in one batch each time; returns when each was there, by the clock.

    Raises NotFiniteError, as serving would for every stream.
    """
    arrived = []
    for _ in range(chunks):
        for chunk in pipeline.next_chunks(states):
            if isinstance(chunk, NotFiniteError):
                raise chunk
        arrived.append(time.perf_counter())
        pipeline.commit(*states)
    return arrived


def _chunk_seconds(pipeline: Pipeline, states: Sequence[StreamState]) -> float:
    return median(after - before for before, after in pairwise(_generate(pipeline, states, 4)))
