"""The playback clock, with invented times. At 16 frames/s a period is 1/16 s, which binary floats hold exactly."""

from dataclasses import replace

import pytest

from engine.scheduler import Demand, pick
from server.streams.playback import (
    FIRST_FRAME_SECONDS,
    Action,
    Arrival,
    Finished,
    Playback,
    Show,
    StallBegan,
    StallEnded,
    Wait,
    start_delay,
)
from server.streams.quality import Quality

PERIOD = 1 / 16


def playback() -> Playback:
    return Playback(fps=16, chunk_frames=12, first_chunk_frames=9)


def started(frames: int = 9, now: float = 0.0) -> Playback:
    clock = playback()
    clock.arrive(frames, 0.25, now)
    assert clock.tick(now, watched=True) == Show(0, 0.0)
    return clock


def run(clock: Playback, now: float) -> list[Action]:
    """Everything the clock wants done at `now`; the `Wait` that ends it comes last."""
    actions: list[Action] = []
    while not actions or not isinstance(actions[-1], Wait | Finished):
        actions.append(clock.tick(now, watched=True))
    return actions


def test_nothing_is_due_before_the_first_chunk() -> None:
    assert playback().tick(100.0, watched=True) == Wait(None)


def test_the_first_frame_waits_for_a_viewer_but_not_forever() -> None:
    clock = playback()
    clock.arrive(9, 0.25, 10.0)
    assert clock.tick(10.0, watched=False) == Wait(15.0)
    assert clock.tick(14.9, watched=False) == Wait(15.0)
    assert clock.tick(15.0, watched=False) == Show(0, 0.0)


def test_a_viewer_starts_the_clock() -> None:
    clock = playback()
    clock.arrive(9, 0.25, 10.0)
    assert clock.tick(12.5, watched=True) == Show(0, 0.0)
    assert clock.tick(12.5, watched=True) == Wait(12.5 + PERIOD)


def test_one_frame_per_period_without_drift() -> None:
    clock = started()
    for frame in range(1, 9):
        assert clock.tick(frame * PERIOD - 0.001, watched=False) == Wait(frame * PERIOD)
        # A little late every time, which must not add up.
        assert clock.tick(frame * PERIOD + 0.002, watched=False) == Show(frame, pytest.approx(0.002))


def test_a_late_caller_gets_no_burst() -> None:
    clock = started(frames=24)
    assert run(clock, 10.0) == [Show(1, 10.0 - PERIOD), Wait(10.0 + PERIOD)]
    assert run(clock, 10.0 + PERIOD) == [Show(2, 0.0), Wait(10.0 + 2 * PERIOD)]


def test_underrun_holds_counts_and_goes_on_from_where_it_was() -> None:
    clock = started(frames=1)
    due = PERIOD
    assert clock.tick(due, watched=True) == Wait(due + PERIOD / 2)
    assert clock.tick(due + PERIOD / 2, watched=True) == StallBegan(1)
    assert clock.tick(due + 0.2, watched=True) == Wait(None)
    assert clock.stalls == 1
    assert clock.stalled_seconds(due + 0.2) == pytest.approx(0.2)
    clock.arrive(12, 0.25, due + 0.5)
    assert run(clock, due + 0.5) == [StallEnded(0.5), Show(1, 0.0), Wait(due + 0.5 + PERIOD)]
    assert clock.stalled_seconds(due + 9.0) == 0.5


def test_a_frame_within_the_grace_is_no_stall() -> None:
    clock = started(frames=1)
    assert clock.tick(PERIOD, watched=True) == Wait(1.5 * PERIOD)
    clock.arrive(12, 0.25, PERIOD + 0.01)
    assert run(clock, PERIOD + 0.01) == [Show(1, pytest.approx(0.01)), Wait(2 * PERIOD)]
    assert clock.stalls == 0


def test_pause_holds_and_resume_starts_a_new_count() -> None:
    clock = started()
    clock.pause(0.03)
    assert clock.tick(5.0, watched=True) == Wait(None)
    clock.resume(5.0)
    assert run(clock, 5.0) == [Show(1, 0.0), Wait(5.0 + PERIOD)]
    assert clock.stalls == 0


def test_pause_ends_a_stall() -> None:
    clock = started(frames=1)
    assert clock.tick(2 * PERIOD, watched=True) == StallBegan(1)
    assert clock.pause(3 * PERIOD) == StallEnded(2 * PERIOD)
    assert clock.stalled_seconds(100.0) == 2 * PERIOD


def test_the_last_frame_stays_for_its_period() -> None:
    clock = started(frames=2)
    clock.finish()
    assert run(clock, PERIOD) == [Show(1, 0.0), Wait(2 * PERIOD)]
    assert clock.tick(2 * PERIOD, watched=True) == Finished()


def test_an_end_during_a_stall_is_an_end() -> None:
    clock = started(frames=1)
    assert clock.tick(2 * PERIOD, watched=True) == StallBegan(1)
    clock.finish()
    assert clock.tick(1.0, watched=True) == StallEnded(1.0 - PERIOD)
    assert clock.tick(1.0 + PERIOD, watched=True) == Finished()


def test_a_stream_without_any_frame_can_end() -> None:
    clock = playback()
    clock.finish()
    assert clock.tick(0.0, watched=True) == Finished()


def test_the_chunk_on_screen_follows_the_frames() -> None:
    clock = playback()
    assert clock.chunk_on_screen == 0
    clock.arrive(9, 0.25, 0.0)
    clock.arrive(12, 0.25, 0.0)
    for frame in range(21):
        assert run(clock, frame * PERIOD)[0] == Show(frame, 0.0)
        assert clock.chunk_on_screen == (0 if frame < 9 else 1)
    assert clock.buffered_seconds == 0


# credits


def limit(clock: Playback, now: float = 0.0) -> int | None:
    grant = clock.grant(now)
    return grant.limit if grant else None


def test_two_chunks_are_granted_at_first_and_nothing_twice() -> None:
    clock = playback()
    assert limit(clock) == 2
    assert limit(clock) is None


@pytest.mark.parametrize(("gen_seconds", "lead_frames"), [(0.0, 12), (0.25, 16), (0.75, 24), (5.0, 24)])
def test_the_lead_is_a_chunk_and_the_time_to_make_one_and_never_over_two(gen_seconds: float, lead_frames: int) -> None:
    clock = playback()
    clock.arrive(9, gen_seconds, 0.0)
    first_frame, chunk, now = 9, 1, 0.0
    for _ in range(100):
        while (grant := clock.grant(now)) is not None and grant.limit > chunk:
            # The engine answers at once: the chunk starts where the last one ended.
            assert first_frame - clock.shown <= lead_frames
            clock.arrive(12, gen_seconds, now)
            first_frame, chunk = first_frame + 12, chunk + 1
        assert clock.received - clock.shown <= lead_frames + 12
        run(clock, now)
        now += PERIOD
    assert chunk >= 100 // 12  # it never starves either


def test_the_due_time_counts_from_the_clock() -> None:
    clock = playback()
    first = clock.grant(0.0)
    assert first is not None
    assert first.due_in == FIRST_FRAME_SECONDS
    clock.forget_grant()
    later = clock.grant(0.75)
    assert later is not None
    assert later.due_in == FIRST_FRAME_SECONDS - 0.75
    clock.arrive(9, 0.25, 1.0)
    waiting = clock.grant(1.0)
    assert waiting is not None
    assert waiting.due_in == 9 * PERIOD
    run(clock, 2.0)
    clock.arrive(12, 0.25, 2.0)
    playing = clock.grant(2.0 + PERIOD)
    assert playing is not None
    assert playing.due_in == pytest.approx(20 * PERIOD)


def test_the_due_time_is_negative_in_a_stall() -> None:
    clock = started(frames=1)
    clock.grant(0.0)
    run(clock, 2 * PERIOD)
    clock.forget_grant()
    grant = clock.grant(1.0)
    assert grant is not None
    assert grant.due_in == PERIOD - 1.0


def test_a_pause_grants_nothing_and_resuming_tells_the_new_due_time() -> None:
    clock = started()
    clock.grant(0.0)
    clock.pause(0.0)
    clock.arrive(12, 0.25, 0.1)
    assert clock.grant(0.1) is None
    clock.resume(7.0)
    grant = clock.grant(7.0)
    assert grant is not None
    assert grant.due_in == pytest.approx(20 * PERIOD)


def test_a_stream_that_is_paused_before_its_first_chunk_still_gets_one() -> None:
    clock = playback()
    clock.pause(0.0)
    assert limit(clock) == 2
    clock.arrive(9, 0.25, 0.0)
    assert limit(clock) is None


def test_a_new_engine_is_told_again() -> None:
    clock = started()
    assert limit(clock) == 2
    assert limit(clock) is None
    clock.forget_grant()
    assert limit(clock) == 2


def test_nothing_is_granted_when_everything_is_there() -> None:
    clock = started()
    clock.finish()
    assert clock.grant(0.0) is None


def test_memory_is_constant() -> None:
    clock = playback()
    for chunk in range(1000):
        clock.arrive(12, 0.25, 0.0)
        for frame in range(12 * chunk, 12 * chunk + 12):
            run(clock, frame * PERIOD)
    assert len(clock._chunks) <= 2


def test_what_stalls_and_pauses_took_is_known() -> None:
    """Frame k is shown at its media time and `held_seconds`, whatever happened on the way."""
    clock = started(frames=4)
    for frame in range(1, 4):
        assert clock.tick(frame * PERIOD + 0.01, watched=True) == Show(frame, pytest.approx(0.01))
    assert clock.held_seconds == 0.0
    now = 4 * PERIOD
    assert clock.tick(now + PERIOD, watched=True) == StallBegan(4)
    clock.arrive(12, 0.25, now + 3.0)
    assert run(clock, now + 3.0)[:2] == [StallEnded(3.0), Show(4, 0.0)]
    assert clock.held_seconds == 3.0
    clock.pause(now + 3.0)
    clock.resume(now + 5.0)
    assert clock.tick(now + 5.0, watched=True) == Show(5, 0.0)
    assert clock.held_seconds == 5.0 - PERIOD
    assert now + 5.0 == 5 * PERIOD + clock.held_seconds
    # A caller who is late moves the clock too, once and by as much.
    assert run(clock, now + 6.0)[0] == Show(6, pytest.approx(1.0 - PERIOD))
    assert clock.held_seconds == pytest.approx(now + 6.0 - 6 * PERIOD)


# quality


def test_what_a_chunk_took_and_how_long_before_its_time_it_came() -> None:
    clock = playback()
    assert (grant := clock.grant(0.0)) and grant.limit == 2
    # The first one says nothing about speed, and there is no clock yet.
    assert clock.arrive(9, 0.25, 0.25) == Arrival(9 * PERIOD, None, None)
    assert clock.tick(0.25, watched=True) == Show(0, 0.0)
    # The second could begin when the first was there.
    assert clock.arrive(12, 0.25, 0.5) == Arrival(12 * PERIOD, 0.25, 9 * PERIOD - 0.25)
    # The third only when it was granted.
    clock.shown = 9
    assert (grant := clock.grant(0.8125)) and grant.limit == 3
    arrival = clock.arrive(12, 0.25, 1.0625)
    assert (arrival.taken, arrival.slack) == (0.25, 0.25 + 21 * PERIOD - 1.0625)


def test_a_pause_and_a_new_engine_are_no_slow_chunks() -> None:
    clock = playback()
    clock.grant(0.0)
    clock.arrive(9, 0.25, 0.25)
    clock.pause(0.3)
    assert clock.arrive(12, 0.25, 60.0).taken is None
    clock.resume(61.0)
    clock.shown = 9
    clock.grant(61.0)
    assert clock.arrive(12, 0.25, 61.25).taken == 0.25
    clock.shown = 21
    clock.grant(62.0)
    clock.forget_grant()
    clock.grant(70.0)
    assert clock.arrive(12, 0.25, 70.25).taken is None


OPENED_TOGETHER = 5
CHUNK, COMMIT, PROMPT = 0.136, 0.027, 0.01
"""Seconds that a chunk of `longlive-1.3b` takes on an H200, of which the context pass runs after its frames are sent,
and that its prompt takes to encode."""


@pytest.mark.parametrize("extra", [0.0, 0.004])
def test_streams_opened_at_once_start_where_playback_can_be_kept(extra: float) -> None:
    """The scheduler and five playback clocks on one invented clock: none is late, and the fifth starts in time."""
    names = [str(index) for index in range(OPENED_TOGETHER)]
    clocks = {name: Playback(fps=16, chunk_frames=12, first_chunk_frames=9) for name in names}
    qualities = {name: Quality(4) for name in names}
    demands: dict[str, Demand] = {}
    started: dict[str, float] = {}
    ticked = dict.fromkeys(names, 0.0)
    steps: list[float] = []

    def grant(name: str, now: float) -> None:
        if granted := clocks[name].grant(now):
            known = demands.get(name, Demand(0, 0, 0.0, opened=int(name) / 1e4))
            demands[name] = replace(known, limit=granted.limit, due=now + granted.due_in)

    def play(name: str, until: float) -> None:
        now = ticked[name]
        while True:
            match clocks[name].tick(now, watched=True):
                case Show():
                    started.setdefault(name, now)
                case Wait(until=at) if at is None or at > until:
                    break
                case Wait(until=at):
                    assert at is not None
                    now = at
                    grant(name, now)
                case other:
                    pytest.fail(f"{name} at {now:.3f}: {other}")
        ticked[name] = until
        grant(name, until)

    for name in names:
        grant(name, 0.0)
    now = OPENED_TOGETHER * PROMPT
    while now < 30:
        for name in names:
            play(name, now)
        chosen = pick(demands, now, max(steps[-8:], default=0.0))
        if chosen is None:
            now += 0.001
            continue
        arrived = now + CHUNK - COMMIT + extra
        for name in names:
            play(name, arrived)
        clock, opening = clocks[chosen], any(not each.received for n, each in clocks.items() if n != chosen)
        frames = clock.next_length
        delay = start_delay(
            streams=OPENED_TOGETHER, opening=opening, chunk_seconds=CHUNK, played=12 / 16, first_played=frames / 16
        )
        arrival = clock.arrive(frames, CHUNK, arrived, start_delay=delay)
        assert arrival.slack is None or arrival.slack >= 0
        assert not qualities[chosen].arrive(arrival, 4)
        due = demands[chosen].due + frames / 16
        demands[chosen] = replace(demands[chosen], chunk=clock.next_chunk, due=due, opened=None)
        grant(chosen, arrived)
        play(chosen, arrived)
        now += CHUNK + extra
        steps.append(CHUNK + extra)
    assert max(started.values()) <= 0.9
    assert all(clock.stalls == 0 for clock in clocks.values())


@pytest.mark.parametrize(
    ("streams", "opening", "chunk_seconds", "delay"),
    [
        (1, False, 0.3, 0.0),  # alone there is time for the second chunk while the first one plays
        (5, False, 0.136, 5.25 * 0.136 - 0.5625),
        (5, True, 0.136, 6.45 * 0.136 - 0.5625),
        (1, False, 0.8, 0.0),  # slower than real time: nothing can be kept
    ],
)
def test_the_start_waits_as_the_load_demands(streams: int, opening: bool, chunk_seconds: float, delay: float) -> None:
    found = start_delay(streams=streams, opening=opening, chunk_seconds=chunk_seconds, played=0.75, first_played=0.5625)
    assert found == pytest.approx(delay)


def test_the_start_waits_for_its_delay_or_the_second_chunk() -> None:
    clock = Playback(fps=16, chunk_frames=12, first_chunk_frames=9)
    clock.grant(0.0)
    clock.arrive(9, 0.1, 1.0, start_delay=0.2)
    assert clock.tick(1.0, watched=True) == Wait(1.2)
    granted = clock.grant(1.0)
    assert granted is not None and granted.due_in == pytest.approx(0.2 + 9 / 16)
    clock.arrive(12, 0.1, 1.1)
    assert clock.tick(1.1, watched=True) == Show(0, 0.0)
    alone = Playback(fps=16, chunk_frames=12, first_chunk_frames=9)
    alone.arrive(9, 0.1, 1.0, start_delay=0.2)
    assert alone.tick(1.2, watched=True) == Show(0, 0.0)
