"""What a clip asks of the engine, chunk by chunk, and what it keeps."""

import msgspec
import pytest

from engine import wire
from server.library.clip import Attempt, Change, Clip, Failure, Status, UnexpectedError, remix


def clip(*changes: Change, frames: int = 40) -> Clip:
    return Clip(
        id="video_a",
        model="mini",
        prompt="a",
        prompts=[Change(0.0, "a"), *changes],
        seed=7,
        seconds="2.5",
        frames=frames,
        width=8,
        height=4,
        fps=16,
        created_at=1000.0,
    )


MINI = wire.ModelInfo("mini", 8, 4, 16, 12, 9, 2, 0.1, 1, "")


def chunk(index: int, frames: int, width: int = 8) -> wire.Frames:
    return wire.Frames("video_a", index, 0, frames, width, 4, 0.1)


def test_chunks_are_asked_for_one_at_a_time() -> None:
    attempt = Attempt(clip(), MINI)
    assert attempt.open(b"px") == wire.Open("video_a", "mini", "a", 7, 40, picture=b"px", background=True)
    asked = []
    for index, frames in enumerate((9, 12, 12, 7)):
        asked += attempt.next()
        assert attempt.accept(chunk(index, frames)) == range(frames)
    assert asked == [wire.Credit("video_a", limit, 0.0) for limit in (1, 2, 3, 4)]
    assert attempt.next() == []


@pytest.mark.parametrize(
    ("changes", "steers"),
    [
        # Chunks begin at frames 0, 9, 21 and 33: the nearest counts.
        ([Change(9 / 16, "b")], {1: "b"}),
        ([Change(14 / 16, "b")], {1: "b"}),
        ([Change(15 / 16, "b")], {2: "b"}),
        ([Change(5 / 16, "b"), Change(1.9, "c")], {1: "b", 3: "c"}),
        # What would be seen for no frame is left out.
        ([Change(0.5, "b"), Change(0.7, "c"), Change(0.8, "d")], {1: "d"}),
        ([Change(0.1, "b")], {0: "b"}),
        # The last chunk takes what is left.
        ([Change(2.4, "b")], {3: "b"}),
    ],
)
def test_prompts_change_at_the_chunk_that_begins_then(changes: list[Change], steers: dict[int, str]) -> None:
    attempt, found = Attempt(clip(*changes), MINI), dict[int, str]()
    for index, frames in enumerate((9, 12, 12, 7)):
        *steer, credit = attempt.next()
        assert isinstance(credit, wire.Credit)
        for each in steer:
            assert isinstance(each, wire.Steer)
            found[index] = each.prompt
        attempt.accept(chunk(index, frames))
    assert found == steers


@pytest.mark.parametrize(
    ("recorded", "kept"), [(0, [range(9), range(12)]), (9, [range(9, 9), range(12)]), (15, [range(9, 9), range(6, 12)])]
)
def test_a_second_take_leaves_out_what_is_recorded(recorded: int, kept: list[range]) -> None:
    made = clip()
    made.recorded = recorded
    attempt = Attempt(made, MINI)
    assert [list(attempt.accept(chunk(index, frames))) for index, frames in ((0, 9), (1, 12))] == [*map(list, kept)]


def test_frames_past_the_end_are_left_out() -> None:
    attempt = Attempt(clip(frames=10), MINI)
    attempt.accept(chunk(0, 9))
    assert attempt.accept(chunk(1, 12)) == range(1)
    assert attempt.next() == []


@pytest.mark.parametrize("wrong", [chunk(1, 9), chunk(0, 9, width=16)])
def test_what_was_not_asked_for_is_refused(wrong: wire.Frames) -> None:
    with pytest.raises(UnexpectedError):
        Attempt(clip(), MINI).accept(wrong)


def test_progress_and_end() -> None:
    made = clip()
    assert made.progress == 0
    made.recorded = 39
    assert made.progress == 97
    made.recorded = 40
    assert made.progress == 99, "until the file is whole"
    made.finish(2000.0, 60.0)
    assert (made.status, made.progress, made.completed_at, made.expires_at) == (Status.COMPLETED, 100, 2000.0, 2060.0)
    failed = clip()
    failed.finish(2000.0, 60.0, Failure("x", "y", True))
    assert (failed.status, failed.progress, failed.completed_at, failed.expires_at) == (Status.FAILED, 0, None, 2060.0)


def test_a_record_keeps_everything() -> None:
    made = clip(Change(1.0, "b", "cut"))
    made.finish(2000.0, 60.0, Failure("x", "y", True))
    assert msgspec.json.decode(msgspec.json.encode(made), type=Clip) == made


def test_a_remix_keeps_what_comes_before_the_change() -> None:
    prompts = [Change(0.0, "a"), Change(1.0, "b"), Change(2.0, "c")]
    assert remix(prompts, Change(1.5, "x", "cut")) == [*prompts[:2], Change(1.5, "x", "cut")]
    assert remix(prompts, Change(1.0, "x")) == [prompts[0], Change(1.0, "x")]
    assert remix(prompts, Change(0.0, "x")) == [Change(0.0, "x")]
