"""A viewer's queue: its order, what it drops, and when it is overrun."""

import asyncio

import pytest

from server.media.viewer import MAX_EVENTS, MAX_FRAMES, Viewer

pytestmark = pytest.mark.anyio


async def test_a_viewer_gets_everything_in_order() -> None:
    viewer = Viewer("mjpeg")
    viewer.event("one")
    viewer.frame(b"two")
    viewer.event("three")
    viewer.finish(1000)
    assert [await viewer.next() for _ in range(4)] == ["one", b"two", "three", None]


async def test_a_slow_viewer_loses_the_oldest_frames_and_no_event() -> None:
    viewer = Viewer("mjpeg")
    dropped = 0
    for number in range(100):
        dropped += viewer.frame(bytes([number]))
        if number % 10 == 0:
            viewer.event(str(number))
        assert len(viewer) <= MAX_FRAMES + 10
    assert dropped == viewer.dropped == 100 - MAX_FRAMES
    items = [await viewer.next() for _ in range(len(viewer))]
    assert [item for item in items if isinstance(item, str)] == [str(number) for number in range(0, 100, 10)]
    assert [item[0] for item in items if isinstance(item, bytes)] == list(range(100 - MAX_FRAMES, 100))


async def test_a_viewer_that_takes_no_events_is_overrun() -> None:
    viewer = Viewer("mjpeg")
    for number in range(MAX_EVENTS):
        viewer.event(str(number))
    assert not viewer.overrun
    viewer.event("one too many")
    assert viewer.overrun
    assert len(viewer) == 0
    viewer.event("more")
    assert viewer.frame(b"more") == 1
    assert len(viewer) == 0
    assert await viewer.next() is None


async def test_a_waiting_viewer_wakes_up() -> None:
    viewer = Viewer("mjpeg")
    waiting = asyncio.create_task(viewer.next())
    await asyncio.sleep(0)
    viewer.frame(b"frame")
    assert await waiting == b"frame"
    waiting = asyncio.create_task(viewer.next())
    await asyncio.sleep(0)
    viewer.finish(1011)
    assert await waiting is None


async def test_a_slow_viewer_of_encoded_frames_continues_at_a_keyframe() -> None:
    viewer = Viewer("fmp4")
    names = [f"{number}" for number in range(40)]
    keys = {0, 20, 23}
    dropped = sum(viewer.frame(name.encode(), key=int(name) in keys) for name in names[:20])
    # Frames 0 to 7 fill the queue; after the ninth none of them can be decoded without a lost one.
    assert dropped == viewer.dropped == 20
    assert viewer.awaits_key
    assert len(viewer) == 0
    for name in names[20:30]:
        viewer.frame(name.encode(), key=int(name) in keys)
    # 20 to 27 filled it again; 28 made room by dropping 20 to 22, up to the next keyframe.
    assert [await viewer.next() for _ in range(len(viewer))] == [str(n).encode() for n in range(23, 30)]
    assert viewer.dropped == 23
    assert not viewer.awaits_key


async def test_a_new_viewer_starts_at_a_keyframe_and_misses_nothing() -> None:
    viewer = Viewer("h264", events=False)
    viewer.event("not for it")
    assert viewer.frame(b"before", key=False) == 0
    viewer.init_segment(b"init")
    assert viewer.frame(b"key", key=True) == 0
    assert viewer.frame(b"after", key=False) == 0
    assert [await viewer.next() for _ in range(3)] == [b"init", b"key", b"after"]
    assert viewer.dropped == 0


async def test_an_init_segment_is_never_dropped() -> None:
    viewer = Viewer("fmp4")
    viewer.init_segment(b"init")
    for number in range(100):
        viewer.frame(b"frame", key=number == 0)
    assert len(viewer) == 1
    assert await viewer.next() == b"init"
