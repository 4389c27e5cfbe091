"""`Steering`: what the engine is told between which chunks, and what becomes of changes that never get a frame."""

import asyncio

import pytest

from engine import wire
from server.errors import ApiError
from server.library.clip import Change
from server.streams.steering import Steering

pytestmark = pytest.mark.anyio
FPS = 16
CUT = Change(1.0, "a cube", "cut")


def steering(*changes: Change) -> tuple[Steering, list[wire.Steer]]:
    sent: list[wire.Steer] = []
    steering = Steering("st_1", sent.append)
    steering.schedule(changes)
    return steering, sent


@pytest.mark.parametrize(("at", "chunk"), [(0.0, 0), (0.28, 0), (0.29, 1), (0.9, 1), (0.95, 2), (1.3, 2), (1.7, 3)])
def test_a_change_belongs_to_the_chunk_that_begins_nearest(at: float, chunk: int) -> None:
    """Chunks begin at frames 0, 9, 21, 33: at 0, 0.5625, 1.3125 and 2.0625 s."""
    told, sent = steering(Change(at, "a cube"))
    for index, (frame, length) in enumerate([(0, 9), (9, 12), (21, 12), (33, 12)]):
        assert told.exclusive == (index <= chunk)
        told.ask_due(frame, length, FPS, 0.0)
        assert len(sent) == (index >= chunk)
    assert (sent[0].prompt, sent[0].transition) == ("a cube", "recache")


def test_of_changes_for_one_chunk_the_newest_is_sent() -> None:
    told, sent = steering(Change(0.5, "a"), Change(0.6, "b"), CUT)
    told.ask_due(9, 12, FPS, 0.0)
    assert [steer.prompt for steer in sent] == ["b"]
    assert told.scheduled == [CUT]
    told.schedule([])
    assert not told.exclusive


async def test_what_is_asked_for_is_kept_until_its_frame() -> None:
    told, sent = steering()
    first, second = told.ask("a", "soft", 1.0), told.ask("b", "cut", 2.0)
    assert [(steer.event, steer.prompt) for steer in sent] == [(1, "a"), (2, "b")]
    assert told.accept(1, 5) == "a" and await first == 5
    assert told.newest() == (2, "b")
    applied = told.apply(2, 6)
    assert [(change.prompt, change.transition, change.chunk) for change in applied] == [
        ("a", "soft", 6),
        ("b", "cut", 6),
    ]
    assert await second == 6
    assert told.newest() is None and told.accept(2, 7) is None


async def test_a_change_that_gets_no_frame_is_refused_once() -> None:
    told, sent = steering(Change(0.0, "nobody waits for it"), CUT)
    told.ask_due(0, 9, FPS, 0.0)
    first, second = told.ask("a", "soft", 1.0), told.ask("b", "soft", 1.0)
    told.reject(sent[1].event, ApiError(409, "refused", "No."))
    with pytest.raises(ApiError, match=r"No\."):
        await first
    told.reject_all(ApiError(409, "stream_ended", "Over."))
    with pytest.raises(ApiError, match=r"Over\."):
        await second
    assert not told.exclusive and told.newest() is None
    await asyncio.sleep(0)
