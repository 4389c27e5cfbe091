"""Warming up a pipeline of toy size."""

from collections.abc import Callable, Sequence

import pytest

from engine import warmup
from engine.config import Preset
from engine.pipeline import Chunk, NotFiniteError, Pipeline
from engine.stream.state import StreamState
from engine.transforms.apply import Speed
from engine.warmup import warm

Build = Callable[..., Pipeline]


def test_warming_up_leaves_its_cache_to_the_first_stream(build: Build, toy: Preset) -> None:
    pipeline = build(toy, speed=Speed(fused=True))
    assert warm(pipeline).chunk_seconds > 0
    cache = pipeline.open("a blue cube", seed=3).cache
    assert cache.written == 0
    assert pipeline.open("a blue cube", seed=3).cache is not cache


def test_weights_that_give_no_numbers_are_found_while_warming_up(build: Build, toy: Preset) -> None:
    pipeline = build(toy)
    pipeline.served.wan.head.head.bias.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="chunk 0 has values that are not finite"):
        warm(pipeline)


@pytest.mark.parametrize(("saves", "batch"), [(0.8, 3), (0.98, 1), (1.2, 1)])
def test_batches_are_made_where_they_are_faster(
    build: Build,
    toy: Preset,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    saves: float,
    batch: int,
) -> None:
    pipeline, now = build(toy), [0.0]
    ahead = pipeline.next_chunks

    def next_chunks(states: Sequence[StreamState]) -> list[Chunk | NotFiniteError]:
        now[0] += 0.1 * len(states) * (saves if len(states) > 1 else 1)
        return ahead(states)

    monkeypatch.setattr(pipeline, "next_chunks", next_chunks)
    monkeypatch.setattr(warmup.time, "perf_counter", lambda: now[0])
    found = warm(pipeline, batch=3)
    assert found.batch == batch and found.chunk_seconds == pytest.approx(0.1 * saves if batch > 1 else 0.1)
    said = capfd.readouterr().out
    assert f"100 ms alone and {100 * saves:.0f} in a batch of 3" in said and ("not made" in said) == (batch == 1)
    assert len({id(pipeline.open("a red ball", 1).cache) for _ in range(3)}) == 3, "three caches serve what comes"
