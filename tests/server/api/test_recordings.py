"""Recordings of live streams: what was shown, every frame of it, as a film."""

import asyncio
import errno
import io
import json
import shutil
import stat
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image, ImageChops, ImageStat

from server.backends.fake import FakeBackend
from server.library.films import FilmFormat
from server.media import broadcast
from server.media.encoder import VideoEncoder
from server.media.matte import Matte
from server.streams.stream import Stream
from tests.server.library.disk import full_at

pytestmark = pytest.mark.anyio
FORMATS: list[FilmFormat] = ["mp4", "webm"]


async def record(gateway: Any, stream: dict[str, Any], format: str = "mp4") -> dict[str, Any]:
    response = await gateway.http.post(f"/v1/streams/{stream['id']}/recordings", json={"format": format})
    assert response.status_code == 201, response.text
    assert response.headers["location"] == f"/v1/recordings/{response.json()['id']}"
    return dict(response.json())


async def get(gateway: Any, recording: dict[str, Any]) -> dict[str, Any]:
    return dict((await gateway.http.get(f"/v1/recordings/{recording['id']}")).json())


async def done(gateway: Any, recording: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (found := await get(gateway, recording))["status"] == "recording":
            await asyncio.sleep(0.02)
    return found


async def film(gateway: Any, recording: dict[str, Any]) -> bytes:
    response = await gateway.http.get(f"/v1/recordings/{recording['id']}/content")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == f"video/{recording['format']}"
    return bytes(response.content)


def frames(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(container.streams.video[0]))


def milliseconds(shown: list[av.VideoFrame]) -> list[int]:
    return [round(1000 * frame.pts * frame.time_base) for frame in shown]


def live(gateway: Any, stream: dict[str, Any]) -> Stream:
    found = gateway.streams.get(stream["id"])
    assert isinstance(found, Stream)
    return found


def drawn(backend: FakeBackend, stream: Stream, index: int) -> Image.Image:
    """What the pretended engine draws."""
    session = stream.session
    opened = type("Opened", (), {"seed": session.seed})
    pretended = type("Drawn", (), {"opened": opened, "prompt": session.prompt})
    return Image.frombytes("RGB", (backend.width, backend.height), backend._picture(pretended, index))


@pytest.mark.parametrize("format", FORMATS)
async def test_every_frame_from_the_first_to_the_last(run_gateway: Any, format: str) -> None:
    backend = FakeBackend(width=132, height=98, chunk_seconds=0.02)
    async with run_gateway(backend, idle_timeout_s=0.5) as gateway:
        stream = await gateway.open(duration_s=2)
        made = await record(gateway, stream, format)
        assert (made["status"], made["stream_id"], made["expires_at"]) == ("recording", stream["id"], None)
        # Nobody watches, and it plays all the same.
        finished = await done(gateway, made)
        assert (finished["status"], finished["ended_reason"]) == ("completed", "stream_ended")
        assert (finished["frames"], finished["frames_lost"], finished["duration_s"]) == (32, 0, 2.0)
        data = await film(gateway, made)
        assert len(data) == finished["bytes"]
        shown = frames(data)
        assert milliseconds(shown) == pytest.approx([62.5 * k for k in range(32)], abs=1)
        with av.open(io.BytesIO(data)) as container:
            assert container.streams.video[0].codec_context.name == ("h264" if format == "mp4" else "vp9")
            assert container.duration == pytest.approx(2e6, abs=1e3)
        for index in (0, 9, 31):
            gap = ImageChops.difference(shown[index].to_image(), drawn(backend, live(gateway, stream), index))
            assert sum(ImageStat.Stat(gap).mean) / 3 < 6
        part = await gateway.http.get(f"/v1/recordings/{made['id']}/content", headers={"range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, data[4:8])


def with_alpha(data: bytes) -> list[av.VideoFrame]:
    """The decoder of libvpx knows of alpha channels, FFmpeg's own does not."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        assert stream.metadata["ALPHA_MODE"] == "1"
        decoder = av.CodecContext.create("libvpx-vp9", "r")
        return [frame for packet in container.demux(stream) for frame in decoder.decode(packet)]


def plane(frame: av.VideoFrame, number: int) -> Image.Image:
    data = bytes(frame.planes[number])
    return Image.frombytes("L", (frame.width, frame.height), data, "raw", "L", frame.planes[number].line_size)


CLEAR, OPAQUE = [255 * (level < 5) for level in range(256)], [255 * (level > 250) for level in range(256)]
"""Which levels of a matte are looked at, as Pillow's masks."""


async def test_webm_is_transparent_where_the_matte_says_so(run_gateway: Any) -> None:
    backend = FakeBackend(width=132, height=98, chunk_seconds=0.02)
    async with run_gateway(backend, idle_timeout_s=0.5) as gateway:
        stream = await gateway.open(duration_s=2, seed=1)  # other seeds have balls too dark for the matte
        url = f"/v1/streams/{stream['id']}"
        made = await gateway.http.post(f"{url}/recordings", json={"format": "webm", "alpha": True})
        assert made.status_code == 201 and made.json()["alpha"] is True
        # it becomes transparent while it is recorded
        while live(gateway, stream).audience.on_screen is None or live(gateway, stream).audience.on_screen.index < 8:
            await asyncio.sleep(0.02)
        matte = Matte("luma", "#000000", 0.3, 0.2)
        set_to = {"mode": "luma", "tolerance": matte.tolerance, "softness": matte.softness}
        assert (await gateway.http.put(f"{url}/matte", json=set_to)).status_code == 200
        assert (await done(gateway, made.json()))["frames_lost"] == 0
        shown = with_alpha(await film(gateway, made.json()))
        assert len(shown) == 32 and shown[0].format.name == "yuva420p"
        assert plane(shown[0], 3).getextrema() == (255, 255)
        for index in (20, 31):
            picture = drawn(backend, live(gateway, stream), index)
            alpha, right = plane(shown[index], 3), matte.opacity_image(picture)
            assert ImageStat.Stat(ImageChops.difference(alpha, right)).mean[0] < 6
            # nor is it the mean that fits; a single pixel the encoder may blur, and more so while it is short of time
            clear, opaque = (ImageStat.Stat(alpha, right.point(mask)).mean[0] for mask in (CLEAR, OPAQUE))
            assert clear < 20 and opaque > 200
            colours = ImageChops.difference(
                plane(shown[index], 0), picture.convert("L").point(lambda v: 16 + v * 219 // 255)
            )
            assert ImageStat.Stat(colours).mean[0] < 6


async def test_h264_has_no_alpha_channel(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        asked = {"format": "mp4", "alpha": True}
        response = await gateway.http.post(f"/v1/streams/{stream['id']}/recordings", json=asked)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "alpha")


async def test_mp4_is_what_the_viewers_get(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoders = []

    def counted(*arguments: Any) -> VideoEncoder:
        encoders.append(arguments)
        return VideoEncoder(*arguments)

    monkeypatch.setattr(broadcast, "VideoEncoder", counted)
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=1)
        made = await record(gateway, stream)
        seen = await gateway.watch(stream, "?format=fmp4")
        await done(gateway, made)
        assert len(encoders) == 1, "encoded once"
        watched = b"".join(packet[16:] for _, packet in seen.frames)
        theirs = {bytes(frame.to_ndarray().tobytes()) for frame in frames(watched)}
        ours = {bytes(frame.to_ndarray().tobytes()) for frame in frames(await film(gateway, made))}
        assert len(theirs) >= 15 and theirs <= ours


async def test_what_stands_still_is_there_once(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A paused picture is sent to viewers again and again; a film has media time."""
    monkeypatch.setattr(broadcast, "HOLD_SECONDS", 0.05)
    async with run_gateway() as gateway:
        stream = await gateway.open()
        made = await record(gateway, stream)
        await gateway.until(lambda: live(gateway, stream).playback.shown > 4)
        await gateway.patch(stream, paused=True)
        await asyncio.sleep(0.3)
        await gateway.patch(stream, paused=False)
        await gateway.until(lambda: live(gateway, stream).playback.shown > 20)
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        finished = await done(gateway, made)
        shown = frames(await film(gateway, made))
        assert len(shown) == finished["frames"] == live(gateway, stream).audience.on_screen.index + 1
        assert finished["frames_lost"] == 0
        assert [frame.pts for frame in shown] == [5625 * k for k in range(len(shown))]
        for index, frame in enumerate(shown):
            gap = ImageChops.difference(frame.to_image(), drawn(gateway.backend, live(gateway, stream), index))
            assert sum(ImageStat.Stat(gap).mean) / 3 < 6, index


@pytest.mark.parametrize("format", FORMATS)
async def test_from_the_middle_and_until_it_is_stopped(run_gateway: Any, format: str) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        await gateway.watch(stream, "?format=fmp4", until=lambda seen: len(seen.frames) > 5)
        made = await record(gateway, stream, format)
        await gateway.until(lambda: gateway.streams.recorder.get(made["id"]).frames > 16)
        stopped = (await gateway.http.post(f"/v1/recordings/{made['id']}/stop")).json()
        assert (stopped["status"], stopped["ended_reason"]) == ("completed", "stopped")
        assert (await gateway.http.post(f"/v1/recordings/{made['id']}/stop")).json() == stopped
        shown = frames(await film(gateway, made))
        assert len(shown) == stopped["frames"] and stopped["frames_lost"] == 0
        assert milliseconds(shown) == pytest.approx([62.5 * k for k in range(len(shown))], abs=1)
        assert (await gateway.get(stream))["state"] == "live"
        assert not live(gateway, stream).audience.broadcasts, "and nobody is encoded for any more"


async def test_a_recording_outlives_its_stream(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.registry.RECORD_SECONDS", 0.1)
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=0.5)
        made = await record(gateway, stream)
        await done(gateway, made)

        async def forgotten() -> bool:
            return (await gateway.http.get(f"/v1/streams/{stream['id']}")).status_code == 404

        await gateway.until(forgotten)
        assert len(frames(await film(gateway, made))) == 8
        for path in ("/v1/recordings", f"/v1/streams/{stream['id']}/recordings"):
            assert [each["id"] for each in (await gateway.http.get(path)).json()["data"]] == [made["id"]]
        refused = await gateway.http.post(f"/v1/streams/{stream['id']}/recordings", json={})
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "stream_not_found")


async def test_a_film_is_read_while_it_is_recorded(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=3)
        made = await record(gateway, stream)
        data, early = b"", None
        async with gateway.http.stream("GET", f"/v1/recordings/{made['id']}/content") as response:
            async for part in response.aiter_bytes():
                data += part
                if early is None and b"mdat" in data:
                    early = await get(gateway, made)
                    assert len(frames(data)) >= 16
        assert early is not None and early["status"] == "recording"
        assert len(frames(data)) == 48


async def test_an_engine_that_dies_leaves_no_gap(run_gateway: Any) -> None:
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02, restart_after=0.2)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open(duration_s=3)
        made = await record(gateway, stream)
        await gateway.until(lambda: live(gateway, stream).playback.shown > 12)
        backend.crash()
        finished = await done(gateway, made)
        assert (finished["status"], finished["frames"], finished["frames_lost"]) == ("completed", 48, 0)
        assert [frame.pts for frame in frames(await film(gateway, made))] == [5625 * k for k in range(48)]


@pytest.mark.parametrize("format", FORMATS)
async def test_a_server_that_ends_finishes_its_films(run_gateway: Any, tmp_path: Path, format: str) -> None:
    data = tmp_path / "data"
    async with run_gateway(data=data) as gateway:
        stream = await gateway.open()
        made = await record(gateway, stream, format)
        await gateway.until(lambda: gateway.streams.recorder.get(made["id"]).frames > 10)
        assert {stat.S_IMODE(path.stat().st_mode) for path in data.iterdir()} == {0o600}
    async with run_gateway(data=data) as gateway:
        finished = await get(gateway, made)
        assert (finished["status"], finished["ended_reason"]) == ("completed", "stream_ended")
        shown = frames(await film(gateway, made))
        assert len(shown) == finished["frames"] > 10
        record_path = data / f"{made['id']}.json"
        record_path.write_text(json.dumps({**json.loads(record_path.read_text()), "status": "recording"}))
    async with run_gateway(data=data) as gateway:  # after one that was killed
        finished = await get(gateway, made)
        assert (finished["status"], finished["ended_reason"]) == ("completed", "server_restarted")
        response = await gateway.http.delete(f"/v1/recordings/{made['id']}")
        assert (response.status_code, [path.name for path in data.iterdir()]) == (204, ["lock"])
        assert (await gateway.http.get(f"/v1/recordings/{made['id']}")).status_code == 404


async def test_what_cannot_be_recorded(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        path = f"/v1/streams/{stream['id']}/recordings"
        post = gateway.http.post
        bad = await post(path, json={"format": "avi"})
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "format")
        assert "mp4 or webm" in bad.json()["error"]["message"]
        assert (await post(path, json={"path": "/tmp/x"})).json()["error"]["code"] == "unknown_field"
        monkeypatch.setattr("server.library.recorder.MAX_RUNNING", 1)
        made = await record(gateway, stream)
        many = await post(path, json={})
        assert (many.status_code, many.json()["error"]["code"]) == (429, "too_many_recordings")
        await gateway.http.delete(f"/v1/streams/{stream['id']}")
        over = await post(path, json={})
        assert (over.status_code, over.json()["error"]["code"]) == (409, "stream_ended")
        await done(gateway, made)
        assert (await gateway.http.get("/v1/streams/st_none/recordings")).status_code == 404


async def test_without_a_frame_there_is_no_film(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.5)) as gateway:
        stream = await gateway.open()
        queued = await gateway.open()
        for each in (stream, queued):
            made = await record(gateway, each)
            await gateway.http.delete(f"/v1/streams/{each['id']}")
            assert (await done(gateway, made))["status"] == "failed"
            response = await gateway.http.get(f"/v1/recordings/{made['id']}/content")
            assert (response.status_code, response.json()["error"]["code"]) == (409, "recording_failed")


async def test_a_disk_that_is_full_ends_it_with_what_there_is(run_gateway: Any, tmp_path: Path) -> None:
    async with run_gateway(data=tmp_path / "data", data_limit_gb=10e-6) as gateway:
        stream = await gateway.open()
        made = await record(gateway, stream)
        finished = await done(gateway, made)
        assert (finished["status"], finished["ended_reason"]) == ("completed", "storage_full")
        assert len(frames(await film(gateway, made))) == finished["frames"] > 0
        assert (await gateway.get(stream))["state"] == "live"


@pytest.mark.parametrize("format", FORMATS)
async def test_a_disk_that_the_kernel_calls_full_leaves_a_film_and_a_free_slot(
    run_gateway: Any, tmp_path: Path, format: str
) -> None:
    async with run_gateway(data=tmp_path / "data") as gateway:
        stream = await gateway.open()
        with full_at(3_000):
            made = await record(gateway, stream, format)
            finished = await done(gateway, made)
            stopped = await gateway.http.post(f"/v1/recordings/{made['id']}/stop")
        assert stopped.json() == finished == await get(gateway, made)
        assert (finished["status"], finished["ended_reason"]) == ("completed", "storage_full")
        data = await film(gateway, made)
        assert len(data) == finished["bytes"] <= 3_000
        assert finished["frames"] == len(frames(data)) > 0
        assert finished["duration_s"] == pytest.approx(finished["frames"] / 16, abs=0.001)
        assert not gateway.streams.recorder._writers and (await gateway.get(stream))["state"] == "live"
    async with run_gateway(data=tmp_path / "data") as gateway:
        assert await get(gateway, made) == finished


@pytest.mark.parametrize("format", FORMATS)
async def test_a_killed_server_loses_a_second_of_its_films(run_gateway: Any, tmp_path: Path, format: str) -> None:
    killed = tmp_path / "killed"
    async with run_gateway(data=tmp_path / "data") as gateway:
        stream = await gateway.open()
        made = await record(gateway, stream, format)
        await gateway.until(lambda: gateway.streams.recorder.get(made["id"]).frames > 34, 20)
        recorded = gateway.streams.recorder.get(made["id"]).frames
        shutil.copytree(tmp_path / "data", killed)  # as SIGKILL would leave it
        killed.chmod(0o700)
    async with run_gateway(data=killed) as gateway:
        finished = await get(gateway, made)
        assert (finished["status"], finished["ended_reason"]) == ("completed", "server_restarted")
        data = await film(gateway, made)
        assert finished["frames"] == len(frames(data)) >= recorded - 24
        assert finished["bytes"] == len(data)
        with av.open(io.BytesIO(data)) as container:
            assert container.duration == pytest.approx(1e6 * finished["duration_s"], abs=1e3)


@pytest.mark.parametrize("format", FORMATS)
async def test_a_film_that_is_removed_by_hand_is_gone(run_gateway: Any, tmp_path: Path, format: str) -> None:
    data = tmp_path / "data"
    async with run_gateway(data=data) as gateway:
        stream = await gateway.open()
        made, other = await record(gateway, stream, format), await record(gateway, stream, format)
        await gateway.until(lambda: gateway.streams.recorder.get(made["id"]).frames > 8)
        for each in (made, other):
            await gateway.http.post(f"/v1/recordings/{each['id']}/stop")
        (data / f"{made['id']}.{format}").unlink()
        for method in ("GET", "HEAD"):
            assert (await gateway.http.request(method, f"/v1/recordings/{made['id']}/content")).status_code == 410
        (data / f"{other['id']}.{format}").unlink()
        for each in (made, other):
            gone = await get(gateway, each)
            assert (gone["status"], gone["ended_reason"]) == ("failed", "file_removed")
            assert (gone["frames"], gone["duration_s"], gone["bytes"]) == (0, 0, 0)
            response = await gateway.http.get(f"/v1/recordings/{each['id']}/content")
            assert (response.status_code, response.json()["error"]["code"]) == (410, "file_removed")
        running = await record(gateway, stream, format)
        await gateway.until(lambda: gateway.streams.recorder.get(running["id"]).frames > 8)
        (data / f"{running['id']}.{format}").unlink()
        finished = await done(gateway, running)
        assert (finished["status"], finished["ended_reason"]) == ("failed", "file_removed")
    async with run_gateway(data=data) as gateway:
        assert (await get(gateway, made))["ended_reason"] == "file_removed"
        assert (await gateway.http.get(f"/v1/recordings/{made['id']}/content")).status_code == 410


async def test_a_folder_that_is_away_loses_no_film(run_gateway: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with run_gateway(data=data) as gateway:
        stream = await gateway.open(duration_s=0.5)
        made = await record(gateway, stream)
        finished = await done(gateway, made)
        data.rename(tmp_path / "elsewhere")
        response = await gateway.http.get(f"/v1/recordings/{made['id']}/content")
        assert response.status_code == 410
        await asyncio.sleep(1.2)  # the housekeeper meets it
        (tmp_path / "elsewhere").rename(data)
        assert await get(gateway, made) == finished
        assert len(await film(gateway, made)) == finished["bytes"]


async def test_what_cannot_be_deleted_stays(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    async with run_gateway() as gateway:
        stream = await gateway.open(duration_s=0.5)
        made = await record(gateway, stream)
        await done(gateway, made)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", read_only)
            response = await gateway.http.delete(f"/v1/recordings/{made['id']}")
            assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")
        assert (await get(gateway, made))["status"] == "completed"
        assert (await gateway.http.delete(f"/v1/recordings/{made['id']}")).status_code == 204
        assert (await gateway.http.get(f"/v1/recordings/{made['id']}")).status_code == 404


async def test_recordings_of_others_do_not_exist(run_gateway: Any, holders: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    made = holders(
        path,
        ("studio", "studio", "control"),
        ("guest", "studio", "view"),
        ("other", "other", "control"),
    )
    async with run_gateway(keys=path) as gateway:
        call = gateway.http.request
        stream = (await call("POST", "/v1/streams", headers=made["studio"], json={"prompt": "a"})).json()
        at = f"/v1/streams/{stream['id']}/recordings"
        assert (await call("POST", at, headers=made["other"], json={})).status_code == 404
        assert (await call("POST", at, headers=made["guest"], json={})).status_code == 403
        token = (await call("POST", f"/v1/streams/{stream['id']}/tokens", headers=made["studio"], json={})).json()
        assert (await call("POST", at, params={"token": token["token"]}, json={})).status_code == 403
        recording = (await call("POST", at, headers=made["studio"], json={})).json()
        mine = f"/v1/recordings/{recording['id']}"
        for method, path_ in (("GET", mine), ("GET", f"{mine}/content"), ("POST", f"{mine}/stop"), ("DELETE", mine)):
            theirs = await call(method, path_, headers=made["other"])
            assert (theirs.status_code, theirs.json()["error"]["code"]) == (404, "recording_not_found")
            assert (await call(method, path_)).status_code == 401
        assert (await call("GET", mine, params={"token": token["token"]})).status_code == 404
        assert (await call("GET", "/v1/recordings", headers=made["other"])).json()["data"] == []
        assert (await call("GET", mine, headers=made["guest"])).status_code == 200
        assert (await call("DELETE", mine, headers=made["guest"])).status_code == 403
        assert (await call("DELETE", mine, headers=made["studio"])).status_code == 204


async def test_a_stream_that_is_recorded_does_not_rest(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    async with run_gateway(unwatched_pause_s=0.3) as gateway:
        stream = await gateway.open()
        await gateway.watch(stream, until=lambda seen: len(seen.frames) > 2)
        session = gateway.streams.get(stream["id"]).session
        await gateway.until(lambda: session.state == "paused")
        # It wakes for a recording, and rests again after it.
        made = await gateway.http.post(f"/v1/streams/{stream['id']}/recordings", json={"format": "mp4"})
        assert made.status_code == 201 and session.state == "live"
        await asyncio.sleep(0.8)
        assert session.state == "live"
        stopped = (await gateway.http.post(f"/v1/recordings/{made.json()['id']}/stop")).json()
        assert stopped["frames"] > 5
        await gateway.until(lambda: session.state == "paused")


async def test_streams_are_looked_after_whatever_becomes_of_the_folder(
    run_gateway: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreadable(path: Any) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with run_gateway(idle_timeout_s=1.5) as gateway:
        monkeypatch.setattr("server.library.store.os.scandir", unreadable)
        await asyncio.sleep(1.2)  # so that the housekeeper has met it, and twice
        stream = await gateway.open()
        await gateway.until(lambda: gateway.streams.get(stream["id"]).session.ended_reason == "idle", 10)
        monkeypatch.undo()
    assert [each.message for each in caplog.records].count(
        "the data folder cannot be read: [Errno 24] Too many open files"
    ) == 1
