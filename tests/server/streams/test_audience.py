"""`Audience`: who is counted, who gets which frame, and what happens at the end."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.errors import ApiError
from server.library.mp4 import GrowingFile
from server.library.recording_writer import RecordingWriter
from server.media.encoder import Codec, VideoEncoder
from server.media.frames import Frame, PictureEncoder
from server.media.matte import Matte
from server.media.viewer import Viewer
from server.metrics import Metrics
from server.streams import audience as module
from server.streams.audience import Audience

pytestmark = pytest.mark.anyio


def frame(index: int) -> Frame:
    return Frame(index, 5625 * index, 16, 16, 0, memoryview(bytes([index]) * (16 * 16 * 3)))


@pytest.fixture
def demands() -> list[bool]:
    """Grows whenever somebody comes."""
    return []


@pytest.fixture
def audience(demands: list[bool]) -> Iterator[Audience]:
    metrics = Metrics()
    with ThreadPoolExecutor(1) as executor:
        found = Audience(
            PictureEncoder(executor, metrics), 500, metrics, on_demand=lambda: demands.append(True), now=0.0
        )
        found.fps = 16
        yield found


async def show(audience: Audience, index: int) -> None:
    audience.deliver(await audience.show(frame(index), 5625 * index))


async def test_who_counts_as_demand(audience: Audience, demands: list[bool]) -> None:
    listener, watcher = Viewer("events"), Viewer("mjpeg")
    audience.add(listener)
    assert (audience.watching, audience.needed) == (0, False)
    audience.add(watcher)
    assert (audience.watching, audience.needed) == (1, True)
    audience.remove(watcher)
    audience.remove(watcher)
    assert (audience.watching, audience.needed) == (0, False)
    audience.hold()
    assert audience.needed
    audience.release()
    assert not audience.needed
    assert audience.unwatched_since > 0.0
    assert len(demands) == 4


async def test_pictures_go_to_those_who_are_there_when_they_are_delivered(audience: Audience) -> None:
    stays, leaves = Viewer("rgb24"), Viewer("mjpeg")
    audience.add(stays)
    audience.add(leaves)
    packets = await audience.show(frame(0), 0)
    assert len(packets) == 2
    audience.remove(leaves)
    audience.deliver(packets)
    assert (len(stays), len(leaves)) == (1, 0)
    packet = await stays.next()
    assert isinstance(packet, bytes)
    assert packet.endswith(frame(0).rgb)


async def test_a_new_viewer_gets_the_frame_on_screen(audience: Audience) -> None:
    viewer = Viewer("rgb24")
    assert await audience.packet_on_screen(viewer) is None
    await show(audience, 3)
    packet = await audience.packet_on_screen(viewer)
    assert packet is not None
    assert packet.endswith(frame(3).rgb)
    assert await audience.packet_on_screen(Viewer("events")) is None


async def test_too_many_viewers(audience: Audience, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_VIEWERS", 1)
    audience.add(Viewer("events"))
    with pytest.raises(ApiError) as refused:
        await audience.packet_on_screen(Viewer("mjpeg"))
    assert refused.value.code == "too_many_viewers"


@pytest.mark.parametrize(("format", "codec"), [("fmp4", "h264"), ("vp8", "vp8")])
async def test_one_encoder_for_all_viewers_of_a_codec(audience: Audience, format: Codec, codec: Codec) -> None:
    viewers = [Viewer(format), Viewer(format)]
    audience.add(viewers[0])
    assert not audience.broadcasts, "there is nothing to encode before the first frame"
    await show(audience, 0)
    audience.add(viewers[1])
    assert [*audience.broadcasts] == [(codec, False)]
    audience.remove(viewers[0])
    assert audience.broadcasts
    audience.remove(viewers[1])
    assert not audience.broadcasts


async def test_viewers_with_mattes_get_pictures_of_twice_the_height(audience: Audience) -> None:
    audience.set_matte(Matte("luma", "#000000", 0.1, 0.1), paused=False)
    plain, stacked = Viewer("rgb24"), Viewer("rgb24", alpha=True)
    audience.add(plain)
    audience.add(stacked)
    await show(audience, 0)
    small, large = await plain.next(), await stacked.next()
    assert isinstance(small, bytes)
    assert isinstance(large, bytes)
    assert len(large) - 16 == 2 * (len(small) - 16)


async def test_events_reach_everybody(audience: Audience) -> None:
    viewers = [Viewer("events"), Viewer("mjpeg"), Viewer("mjpeg", events=False)]
    for viewer in viewers:
        audience.add(viewer)
    audience.publish([{"type": "state", "seq": 1}])
    assert [len(viewer) for viewer in viewers] == [1, 1, 0]
    assert await viewers[0].next() == '{"type":"state","seq":1}'


async def test_the_end_leaves_nothing_but_the_last_frame(audience: Audience) -> None:
    viewer = Viewer("events")
    audience.add(viewer)
    await show(audience, 7)
    audience.close(1000)
    assert await viewer.next() is None
    assert viewer.close_code == 1000
    assert not audience.viewers
    assert audience.on_screen is not None
    assert audience.on_screen.rgb.obj == bytes(frame(7).rgb)


def recording(path: Path) -> RecordingWriter:
    path.touch()
    return RecordingWriter("mp4", 16, GrowingFile(path), lambda: False)


async def test_a_recording_begun_after_its_encoder_failed_gets_another(
    audience: Audience, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("the encoder broke")

    audience.add(Viewer("fmp4"))
    with monkeypatch.context() as patch:
        patch.setattr(VideoEncoder, "encode", broken)
        await show(audience, 0)
        (first,) = audience.broadcasts.values()
        async with asyncio.timeout(5):
            while not first.failed:
                await asyncio.sleep(0.01)
    writer = recording(tmp_path / "film.mp4")
    audience.record(writer)
    await show(audience, 1)
    audience.close(1000)
    assert await asyncio.wait_for(writer.run(), 5) == "stream_ended"
    assert writer.film is not None and writer.film.frames == 1


async def test_a_recording_whose_encoder_cannot_be_made_ends(
    audience: Audience, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    await show(audience, 0)
    monkeypatch.setattr(module, "Broadcast", broken)
    writer = recording(tmp_path / "film.mp4")
    with pytest.raises(RuntimeError):
        audience.record(writer)
    assert not audience.recordings
    assert await asyncio.wait_for(writer.run(), 5) == "failed"
