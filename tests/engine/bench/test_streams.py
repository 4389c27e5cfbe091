"""The playback simulation on an invented clock."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from engine.assemble import best_dtype
from engine.bench import streams
from engine.config import Preset
from engine.pipeline import Pipeline
from engine.transforms.apply import Speed


class Engine:
    """A pipeline whose chunks of a second of pictures take `cost` seconds of its own clock."""

    def __init__(self, cost: float) -> None:
        self.cost, self.now = cost, 100.0
        self.preset = SimpleNamespace(chunk_frames=10, fps=10)
        self.closed = 0
        self.saves, self.batches = 1.0, list[int]()

    def open(self, prompt: str, seed: int) -> SimpleNamespace:
        return SimpleNamespace(chunk=0)

    def kind(self, state: SimpleNamespace) -> int:
        return 0

    def next_chunks(self, states: list[SimpleNamespace]) -> list[SimpleNamespace]:
        self.now += self.cost * len(states) * (1 if len(states) == 1 else self.saves)
        self.batches.append(len(states))
        for state in states:
            state.chunk += 1
        return [SimpleNamespace(frames=range(10)) for _ in states]

    def commit(self, *states: SimpleNamespace) -> None:
        pass

    def close(self, state: SimpleNamespace) -> None:
        self.closed += 1

    def rest(self, seconds: float) -> None:
        assert seconds > 0
        self.now += seconds + 1e-9


def played(cost: float, count: int, batch: int = 1, saves: float = 1.0) -> list[streams.Played]:
    engine = Engine(cost)
    engine.saves = saves
    out = streams.play(cast(Pipeline, engine), count, 60, lambda: engine.now, engine.rest, batch)
    assert max(engine.batches) == min(batch, count)
    assert engine.closed == count
    return out


@pytest.mark.parametrize(("cost", "count"), [(0.5, 1), (0.24, 4), (0.9, 1)])
def test_no_chunk_is_late_where_there_is_time(cost: float, count: int) -> None:
    for shown in played(cost, count):
        assert len(shown.arrivals) > 55
        assert min(slack for _, slack in shown.arrivals) >= 0
        assert max(slack for _, slack in shown.arrivals) <= 1.0 + 1e-6, "nobody is more than a chunk ahead"


@pytest.mark.parametrize(("cost", "count"), [(1.1, 1), (0.3, 4)])
def test_chunks_are_late_where_there_is_not(cost: float, count: int) -> None:
    for shown in played(cost, count):
        assert sum(slack < 0 for _, slack in shown.arrivals) > 40


@pytest.mark.parametrize("batch", [2, 3])
def test_batches_that_save_time_keep_more_streams(batch: int) -> None:
    """Four streams of 0.27 s a chunk are too many for an engine that makes each alone."""
    assert sum(slack < 0 for shown in played(0.27, 4) for _, slack in shown.arrivals) > 40
    for shown in played(0.27, 4, batch, 0.8):
        # the second chunks may be late: all streams open in the same instant
        assert all(slack >= 0 for _, slack in shown.arrivals[3:])


@pytest.mark.parametrize("batch", [1, 2])
def test_runs_a_real_pipeline(toy: Preset, monkeypatch: pytest.MonkeyPatch, batch: int) -> None:
    device = torch.device("cpu")
    pipeline = streams.build(toy, Speed(fused=True), device, best_dtype(device))
    chunks: list[set[int]] = []
    ahead: Callable[[Any], Any] = pipeline.next_chunks
    monkeypatch.setattr(
        pipeline, "next_chunks", lambda states: chunks.append({state.seed for state in states}) or ahead(states)
    )
    ticks = iter(range(10**6))
    streams.play(pipeline, 2, 40, lambda: next(ticks) / 10, lambda _: None, batch)
    assert {0} in chunks and {1} in chunks and ({0, 1} in chunks) == (batch == 2)
