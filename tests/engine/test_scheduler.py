import pytest

from engine.scheduler import Demand, batch_with, pick


@pytest.mark.parametrize(
    ("demands", "expected"),
    [
        ({}, None),
        ({"a": Demand(0, 0, 1.0)}, None),
        ({"a": Demand(0, 2, 5.0), "b": Demand(7, 9, 4.0)}, "b"),
        ({"a": Demand(2, 2, 1.0), "b": Demand(0, 1, 9.0)}, "b"),
        ({"a": Demand(0, 1, -3.0), "b": Demand(0, 1, 0.0)}, "a"),
        ({"a": Demand(0, 1, 1.0), "b": Demand(0, 1, 1.0)}, "a"),
    ],
)
def test_pick(demands: dict[str, Demand], expected: str | None) -> None:
    assert pick(demands) == expected


def clip(chunk: int, limit: int) -> Demand:
    return Demand(chunk, limit, 0.0, background=True)


@pytest.mark.parametrize(
    ("demands", "expected"),
    [
        # Alone, at whatever speed there is; of two, the first.
        ({"clip": clip(0, 1)}, "clip"),
        ({"clip": clip(1, 1)}, None),
        ({"clip": clip(3, 4), "other": clip(0, 1)}, "clip"),
        # Behind every stream that may generate, however far off its deadline.
        ({"clip": clip(0, 1), "a": Demand(0, 1, 99.0)}, "a"),
        # A stream that has run ahead: its next chunk takes 2 s after the clip's 2 s, so it may not be due before 14.
        ({"clip": clip(0, 1), "a": Demand(2, 2, 14.0)}, "clip"),
        ({"clip": clip(0, 1), "a": Demand(2, 2, 13.9)}, None),
        # Of two such streams, the second waits for the first.
        ({"clip": clip(0, 1), "a": Demand(2, 2, 14.0), "b": Demand(2, 2, 16.0)}, "clip"),
        ({"clip": clip(0, 1), "a": Demand(2, 2, 14.0), "b": Demand(2, 2, 15.9)}, None),
        # Paused: nobody waits for it.
        ({"clip": clip(0, 1), "a": Demand(2, 2, 9.0)}, "clip"),
        ({"clip": clip(0, 1), "a": Demand(2, 2, 9.0), "b": Demand(2, 2, 13.0)}, None),
        # Clips are never due, and so never in each other's way.
        ({"clip": clip(4, 4), "other": clip(0, 1)}, "other"),
    ],
)
def test_a_clip_gets_what_the_streams_leave(demands: dict[str, Demand], expected: str | None) -> None:
    assert pick(demands, now=10.0, step_seconds=2.0) == expected


@pytest.mark.parametrize(("streams", "step"), [(1, 0.67), (1, 0.3), (2, 0.33), (3, 0.22), (8, 0.08)])
def test_no_stream_misses_a_deadline_for_a_clip(streams: int, step: float) -> None:
    """A simulated minute of streams that fill the engine as far as they are admitted, and a clip that always wants."""
    chunk, lead = 0.75, 0.75 + step  # of `server.streams.playback`: a chunk is allowed this long before it is due
    names = [f"s{k}" for k in range(streams)]
    demands = {"clip": clip(0, 10**6), **{name: Demand(1, 1, 0.75 + k * 0.1) for k, name in enumerate(names)}}
    now, late, clips = 0.0, 0.0, 0
    while now < 60:
        for name in names:
            demand = demands[name]
            if demand.chunk == demand.limit and now >= demand.due - lead:
                demands[name] = Demand(demand.chunk, demand.limit + 1, demand.due)
        picked = pick(demands, now, step)
        if picked is None:
            now += 0.001
            continue
        now += step
        if picked == "clip":
            clips += 1
        else:
            demand = demands[picked]
            late = max(late, now - demand.due)
            demands[picked] = Demand(demand.chunk + 1, demand.limit, demand.due + chunk)
    assert late <= 1e-9
    assert clips > 3, "and the clip gets on"


@pytest.mark.parametrize(
    ("demands", "expected"),
    [
        # Nobody plays: whoever has waited longest.
        ({"new": Demand(0, 1, 0.0, opened=9.5), "older": Demand(0, 1, 0.0, opened=9.0)}, "older"),
        # a's next chunk takes 2 s after two of the newcomer's, so it may not be due before 16.
        ({"new": Demand(0, 1, 0.0, opened=9.5), "a": Demand(3, 4, 16.0)}, "new"),
        ({"new": Demand(0, 1, 0.0, opened=9.5), "a": Demand(3, 4, 15.9)}, "a"),
        # Also of one that has run ahead; but then there is nothing else to do.
        ({"new": Demand(0, 1, 0.0, opened=9.5), "a": Demand(3, 3, 15.9)}, "new"),
        ({"new": Demand(0, 1, 0.0, opened=9.5), "a": Demand(3, 3, 15.9), "b": Demand(3, 4, 30.0)}, "b"),
        # One that is late already goes first; a newcomer waits for two seconds at most.
        ({"new": Demand(0, 1, 0.0, opened=8.1), "a": Demand(3, 4, 9.0)}, "a"),
        ({"new": Demand(0, 1, 0.0, opened=7.9), "a": Demand(3, 4, 9.0)}, "new"),
        # A newcomer goes before clips, and is in no clip's way once it may not generate.
        ({"new": Demand(0, 1, 0.0, opened=9.5), "clip": clip(0, 1)}, "new"),
        ({"new": Demand(0, 0, 0.0, opened=9.5), "clip": clip(0, 1)}, "clip"),
    ],
)
def test_a_new_stream_lets_those_that_play_go_on(demands: dict[str, Demand], expected: str) -> None:
    assert pick(demands, now=10.0, step_seconds=2.0) == expected


@pytest.mark.parametrize(("streams", "step"), [(5, 0.134), (8, 0.083)])
def test_streams_that_open_at_once_interrupt_nobody(streams: int, step: float) -> None:
    """As many as fill nine tenths of an engine: none is late from its first chunk on, and none waits for long."""
    length, first, now = 0.75, 0.5625, 0.0
    shown: list[tuple[int, float]] = [(0, 0.0)] * streams  # chunks made, and when they will have been played
    while now < 30:
        demands = {
            str(i): Demand(made, made + (dry - now <= length), dry, opened=None if made else 0.0)
            for i, (made, dry) in enumerate(shown)
        }
        if (name := pick(demands, now, step)) is None:
            now += 0.001
            continue
        now += step
        made, dry = shown[int(name)]
        assert (now <= dry) if made else (now < 2.5)
        shown[int(name)] = made + 1, max(dry, now) + (length if made else first)


@pytest.mark.parametrize(
    ("demands", "limit", "expected"),
    [
        ({"a": Demand(1, 2, 20.0), "b": Demand(1, 2, 22.0), "c": Demand(1, 2, 21.0)}, 1, []),
        # The most urgent ones, and no more than are asked for.
        ({"a": Demand(1, 2, 20.0), "b": Demand(1, 2, 22.0), "c": Demand(1, 2, 21.0)}, 2, ["c"]),
        ({"a": Demand(1, 2, 20.0), "b": Demand(1, 2, 22.0), "c": Demand(1, 2, 21.0)}, 9, ["c", "b"]),
        # Two steps of 2 s leave the first in time, three do not; late already, it goes alone.
        ({"a": Demand(1, 2, 14.0), "b": Demand(1, 2, 22.0), "c": Demand(1, 2, 21.0)}, 9, ["c"]),
        ({"a": Demand(1, 2, 13.9), "b": Demand(1, 2, 22.0), "c": Demand(1, 2, 21.0)}, 9, []),
        ({"a": Demand(1, 2, 9.0), "b": Demand(1, 2, 9.5)}, 9, []),
        # Who may not generate does not go along, nor who shows nothing yet, nor a clip.
        (
            {"a": Demand(1, 2, 20.0), "b": Demand(2, 2, 21.0), "c": Demand(0, 1, 21.0, opened=9.0), "d": clip(1, 2)},
            9,
            [],
        ),
        # Who shows nothing yet goes alone.
        ({"a": Demand(0, 1, 20.0, opened=9.0), "b": Demand(1, 2, 21.0)}, 9, []),
        # Clips go with clips, as many as the streams leave time for: a batch of two, then 2 s for the stream.
        ({"a": clip(1, 2), "b": clip(1, 2), "c": clip(1, 1), "d": clip(0, 2)}, 9, ["b", "d"]),
        ({"a": clip(1, 2), "b": clip(1, 2), "d": clip(0, 2), "live": Demand(2, 2, 16.0)}, 9, ["b"]),
        ({"a": clip(1, 2), "b": clip(1, 2), "live": Demand(2, 2, 15.9)}, 9, []),
        ({"a": clip(1, 2), "b": clip(1, 2), "d": clip(0, 2)}, 2, ["b"]),
    ],
)
def test_who_goes_along(demands: dict[str, Demand], limit: int, expected: list[str]) -> None:
    assert batch_with(demands, "a", list(demands), 10.0, 2.0, limit) == expected
    assert batch_with(demands, "a", ["a"], 10.0, 2.0, limit) == [], "only those that are alike"
