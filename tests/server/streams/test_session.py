"""States and events of one stream, with invented clocks."""

import itertools

import pytest

from server.streams.admission import QueuePosition
from server.streams.session import TRANSITIONS, Event, Session, State


def session() -> Session:
    made = Session(id="st_1", model="mini", prompt="a ball", seed=1, duration_s=None, created_at=100.0)
    made.width, made.height, made.fps = 64, 48, 16
    return made


def chunk(made: Session, index: int = 0, *, gen_seconds: float = 0.3, paused: bool = False) -> list[Event]:
    return made.chunk(index=index, pts=0, frames=12, gen_seconds=gen_seconds, shown=5, paused=paused, ts=101.0)


def types(events: list[Event]) -> list[str]:
    return [event["type"] for event in events]


def test_a_whole_life() -> None:
    made = session()
    events = made.wait(QueuePosition(2, 5.0), 100.0)
    events += made.admit(100.5)
    events += chunk(made)
    events += made.pause("asked", 102.0)
    events += made.pause(None, 103.0)
    events += made.end("finished", 104.0)
    assert types(events) == ["queue.position", "state", "chunk", "state", "state", "state", "state", "ended"]
    states = [event["state"] for event in events if event["type"] == "state"]
    assert states == ["starting", "live", "paused", "live", "ended"]
    assert [event["seq"] for event in events] == list(range(1, 9))
    assert all({"type", "seq", "ts", "stream_id"} <= event.keys() for event in events)
    assert (made.state, made.ended_reason, made.ended_at) == (State.ENDED, "finished", 104.0)


def test_a_failure_says_why_and_then_ends() -> None:
    made = session()
    made.admit(100.0)
    events = made.fail("numeric", "the latents became NaN", 101.0)
    assert types(events) == ["error", "state", "ended"]
    assert made.error == {"code": "numeric", "message": "the latents became NaN"}
    assert made.ended_reason == "failed"


@pytest.mark.parametrize(("start", "target"), list(itertools.product(State, State)))
def test_only_the_transitions_of_the_table(start: State, target: State) -> None:
    made = session()
    made.state = start
    if target in TRANSITIONS[start]:
        assert types(made._enter(target, 0.0)) == ["state"]
    else:
        with pytest.raises(RuntimeError, match="cannot go"):
            made._enter(target, 0.0)


def test_nothing_leaves_the_end() -> None:
    assert [state for state in State if not TRANSITIONS[state]] == [State.ENDED, State.FAILED]
    assert [state for state in State if state.over] == [State.ENDED, State.FAILED]


def test_a_place_is_told_once() -> None:
    made = session()
    assert types(made.wait(QueuePosition(3, None), 0.0)) == ["queue.position"]
    assert made.wait(QueuePosition(3, 7.0), 0.0) == []
    assert made.queue == QueuePosition(3, 7.0)
    assert types(made.wait(QueuePosition(2, 7.0), 0.0)) == ["queue.position"]
    made.admit(0.0)
    assert made.queue is None


def test_paused_before_the_first_chunk() -> None:
    made = session()
    assert made.pause("asked", 0.0) == []
    made.admit(0.0)
    assert made.pause("asked", 0.0) == []
    events = chunk(made, paused=True)
    assert events[-1]["state"] == "paused"


def test_pausing_twice_is_no_news() -> None:
    made = session()
    made.admit(0.0)
    chunk(made)
    assert len(made.pause("asked", 0.0)) == 1
    assert made.pause("asked", 0.0) == []
    assert len(made.pause(None, 0.0)) == 1
    assert made.pause(None, 0.0) == []


def test_the_real_time_factor_is_that_of_the_recent_chunks() -> None:
    made = session()
    assert made.real_time_factor is None
    made.admit(0.0)
    chunk(made, gen_seconds=75.0)
    for index in range(1, 9):
        chunk(made, index, gen_seconds=0.375)
    assert made.real_time_factor == pytest.approx(0.5)
    assert made.frames_generated == 108


def test_a_pause_says_why() -> None:
    made = session()
    made.admit(0.0)
    chunk(made)
    [event] = made.pause("unwatched", 1.0)
    assert (event["state"], event["reason"], made.pause_reason) == ("paused", "unwatched", "unwatched")
    # A client asks for what it has already: the stream stays as it is, for another reason.
    assert made.pause("asked", 2.0) == []
    assert made.pause_reason == "asked"
    [event] = made.pause(None, 3.0)
    assert event["state"] == "live" and "reason" not in event and made.pause_reason is None
