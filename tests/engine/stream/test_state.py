"""What a stream carries from chunk to chunk."""

from engine.pipeline import Pipeline


def test_state_does_not_grow(pipeline: Pipeline) -> None:
    state = pipeline.open("a red ball", seed=3)
    for _ in range(4):
        pipeline.next_chunk(state)
        pipeline.commit(state)
    size = state.cache.bytes()
    for _ in range(4):
        pipeline.next_chunk(state)
        pipeline.commit(state)
    assert state.cache.bytes() == size
    assert len(state.recent) == 2
    assert state.memories is not None and len(state.memories) == 4
