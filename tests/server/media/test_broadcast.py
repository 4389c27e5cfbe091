"""The encoder that viewers share: keyframes, skipped frames, failure and closing."""

import asyncio
import gc
import weakref
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from server.media import broadcast
from server.media.broadcast import MAX_PENDING, Broadcast
from server.media.encoder import Codec, EncodedFrame
from server.media.frames import Frame
from server.media.viewer import Viewer
from server.metrics import Metrics
from tests.server.media.samples import frame

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def broadcasting(codec: Codec, last: Frame) -> AsyncIterator[tuple[Broadcast, Metrics]]:
    metrics = Metrics()
    sender = Broadcast(codec, 16, 2500, last, last.pts, metrics)
    try:
        yield sender, metrics
    finally:
        sender.close()


async def taken(viewer: Viewer, count: int) -> list[EncodedFrame]:
    items = [await asyncio.wait_for(viewer.next(), 5) for _ in range(count)]
    assert all(isinstance(item, EncodedFrame) for item in items)
    return items  # type: ignore[return-value]


async def test_keyframes_asked_for_at_once_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "KEY_SECONDS", 0.0)
    async with broadcasting("vp8", frame(0, 128, 96)) as (sender, _):
        viewers = [Viewer("vp8", events=False) for _ in range(5)]
        for viewer in viewers:
            sender.join(viewer)
        sender.show(frame(1, 128, 96), 5625)
        firsts = [(await taken(viewer, 1))[0] for viewer in viewers]
        assert len(set(map(id, firsts))) == 1  # the same object for all
        assert firsts[0].key
        keys = []
        for index in range(2, 12):
            if index == 6:
                for _ in range(10):
                    sender.request_key()
            sender.show(frame(index, 128, 96), 5625 * index)
            keys += [encoded.key for encoded in await taken(viewers[0], 1)]
        assert keys == [index == 6 for index in range(2, 12)]


async def test_keyframes_are_rationed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(broadcast, "KEY_SECONDS", 1e6)
    async with broadcasting("vp8", frame(0, 128, 96)) as (sender, _):
        sender._key_at = -1e9
        viewer = Viewer("vp8", events=False)
        sender.join(viewer)
        for index in range(1, 8):
            sender.request_key()
            sender.show(frame(index, 128, 96), 5625 * index)
            [encoded] = await taken(viewer, 1)
            assert encoded.key == (index == 1)


async def test_an_encoder_that_cannot_keep_up_skips_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    async with broadcasting("h264", frame(0, 128, 96)) as (sender, metrics):
        viewer = Viewer("h264", events=False)
        sender.join(viewer)
        for index in range(1, 11):  # without a turn of the event loop in between
            sender.show(frame(index, 128, 96), 5625 * index)
        times = [encoded.packet.pts for encoded in await taken(viewer, MAX_PENDING)]
        assert times == [9 * 5625, 10 * 5625]
        assert 'reason="slow_encoder"} 8.0' in metrics.render().decode()


async def test_an_encoder_that_fails_lets_its_viewers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async with broadcasting("h264", frame(0, 128, 96)) as (sender, _):
        viewer = Viewer("h264", events=False)
        sender.join(viewer)
        sender.show(frame(1, 64, 64), 5625)  # of another size
        assert await asyncio.wait_for(viewer.next(), 5) is None
        assert viewer.close_code == 1011


async def test_closing_just_as_a_frame_comes(caplog: pytest.LogCaptureFixture) -> None:
    async with broadcasting("vp8", frame(0, 128, 96)) as (sender, _):
        viewer = Viewer("vp8", events=False)
        sender.join(viewer)
        sender.show(frame(1, 128, 96), 5625)
        await taken(viewer, 1)
        await asyncio.sleep(0)  # the broadcast waits for the next frame again
        sender.show(frame(2, 128, 96), 11250)
        await asyncio.sleep(0)
    await asyncio.wait([sender._task])
    assert sender._task.exception() is None
    assert caplog.records == []


async def test_what_was_closed_is_freed_at_once() -> None:
    gc.collect()
    gc.disable()
    try:
        async with broadcasting("h264", frame(0, 128, 96)) as (sender, _):
            viewer = Viewer("h264", events=False)
            sender.join(viewer)
            sender.show(frame(1, 128, 96), 5625)
            await taken(viewer, 1)
            held = weakref.ref(sender)
            task = sender._task
        await asyncio.wait([task])
        del sender, task
        async with asyncio.timeout(5):  # the encoder's thread may still refer to it
            while held() is not None:
                await asyncio.sleep(0.01)
    finally:
        gc.enable()
