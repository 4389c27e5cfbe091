"""WHEP with aiortc in the part of the viewer: what is answered, what is refused, and that pictures come."""

import asyncio
import base64
import gc
import hashlib
import hmac
import re
import weakref
from collections.abc import Callable
from typing import Any

import pytest
from aiortc import RTCSessionDescription
from aiortc.rtp import RTCP_PSFB_FIR, RTCP_PSFB_PLI
from PIL import Image, ImageChops, ImageStat

from server.backends.fake import FakeBackend
from server.media.broadcast import Broadcast
from server.media.encoder import VideoEncoder
from server.media.frames import Frame
from server.media.h264 import level_idc
from server.media.webrtc import Peer

pytestmark = pytest.mark.anyio

SDP = {"content-type": "application/sdp"}
FRAGMENT = {"content-type": "application/trickle-ice-sdpfrag"}


async def live(gateway: Any, **fields: Any) -> dict[str, Any]:
    return await gateway.live(**fields)


def original(gateway: Any, stream: dict[str, Any], index: int) -> Image.Image:
    backend = gateway.backend
    rgb = backend._picture(backend._streams[stream["id"]], index)
    return Image.frombytes("RGB", (backend.width, backend.height), rgb)


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """The playback clock's time of every frame that an encoder was shown, by the frame's index."""
    times: dict[int, int] = {}
    show = Broadcast.show

    def noting(self: Broadcast, frame: Frame, clock: int) -> None:
        times[frame.index] = clock
        show(self, frame, clock)

    monkeypatch.setattr(Broadcast, "show", noting)
    return times


def difference(one: Image.Image, other: Image.Image) -> float:
    """Mean absolute difference of all channels."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


@pytest.mark.parametrize("codec", ["VP8", "H264"])
async def test_pictures_come_with_the_time_of_the_stream(
    run_gateway: Any, rtc_viewer: Any, clocks: dict[int, int], codec: str
) -> None:
    async with run_gateway(FakeBackend(width=128, height=96, chunk_seconds=0.02)) as gateway:
        stream = await gateway.open()
        async with rtc_viewer(gateway, stream, codec) as viewer:
            assert "a=sendonly" in viewer.answer
            assert "a=setup:passive" in viewer.answer
            assert "a=end-of-candidates" in viewer.answer
            frames = await viewer.frames(30)
            # The clock starts with the first viewer: frame 0 is the first that it gets.
            assert [frame.pts for frame in frames] == [clocks[index] for index in range(30)]
            # Media time, and later only where this machine has kept the clock waiting.
            assert clocks[0] == 0
            assert all(clocks[index + 1] - clocks[index] >= 5625 for index in range(29))
            assert (frames[0].width, frames[0].height) == (128, 96)
            for index in (0, 15, 29):
                assert difference(frames[index].to_image(), original(gateway, stream, index)) < 6
            assert (await gateway.get(stream))["viewers"] == 1


async def test_the_viewers_order_of_codecs_counts(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        for codecs in (("VP8", "H264"), ("H264", "VP8")):
            async with rtc_viewer(gateway, stream, *codecs) as viewer:
                assert re.search(r"a=rtpmap:\d+ (\w+)/", viewer.answer)[1] == codecs[0]  # type: ignore[index]
                await viewer.frames(3)


async def test_an_offer_of_sound_too_gets_video_alone(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "VP8", audio=True) as viewer:
            assert "m=audio 0 " in viewer.answer
            assert re.findall(r"m=(\w+)|a=(inactive|sendonly)", viewer.answer) == [
                ("audio", ""),
                ("", "inactive"),
                ("video", ""),
                ("", "sendonly"),
            ]
            await viewer.frames(3)


async def test_an_offer_with_a_data_channel_and_two_videos(run_gateway: Any, rtc_viewer: Any) -> None:
    """RFC 8829, section 5.3.1: what is not wanted is rejected, with port 0."""
    async with run_gateway() as gateway:
        stream = await live(gateway)
        viewer = rtc_viewer(gateway, stream, "VP8")
        viewer.peer.addTransceiver("video", "recvonly")
        viewer.peer.createDataChannel("data")
        async with viewer:
            assert re.findall(r"m=(\w+) (\d+)", viewer.answer)[1:] == [("video", "0"), ("application", "0")]
            assert re.findall(r"a=group:.*", viewer.answer) == ["a=group:BUNDLE 0\r"]
            await viewer.frames(3)


@pytest.mark.parametrize(
    "change",
    [
        lambda offer: re.sub(r"a=group:BUNDLE.*\r\n", "", offer),
        lambda offer: re.sub(r"a=(group:BUNDLE.*|mid:.*)\r\n", "", offer),
        lambda offer: offer.replace("a=recvonly\r\n", ""),
        lambda offer: offer.replace("a=recvonly", "a=sendrecv"),
    ],
    ids=["no BUNDLE", "no mid", "no direction", "sendrecv"],
)
@pytest.mark.parametrize("audio", [False, True])
async def test_offers_that_leave_something_out(
    run_gateway: Any, rtc_viewer: Any, change: Callable[[str], str], audio: bool
) -> None:
    """RFC 5888, section 9.1: no group where none was offered. RFC 8866, section 6.7: the direction is sendrecv."""
    async with run_gateway() as gateway:
        stream = await live(gateway)
        viewer = rtc_viewer(gateway, stream, "VP8", audio=audio)
        offer = await viewer.offer()
        response = await gateway.http.post(viewer.url, content=change(offer), headers=SDP)
        assert response.status_code == 201, response.text
        answer = response.text
        assert ("a=group" in answer) == ("a=group" in change(offer))
        assert ("a=mid" in answer) == ("a=mid" in change(offer))
        # aiortc itself bundles what has no group, and knows its own sections by their mids.
        mids = iter(re.findall(r"a=mid:.*\r\n", offer))
        if "a=mid" not in answer:
            answer = re.sub(r"(?=a=(sendonly|inactive)\r\n)", lambda _: next(mids), answer)
        await viewer.peer.setRemoteDescription(RTCSessionDescription(answer, "answer"))
        await viewer.frames(2)
        await viewer.peer.close()


@pytest.mark.parametrize(("settings", "alpha"), [({}, False), ({"bitrate_kbps": 20_000}, False), ({}, True)])
async def test_answer_stream_and_init_segment_state_one_level(
    run_gateway: Any, rtc_viewer: Any, settings: dict[str, Any], alpha: bool
) -> None:
    async with run_gateway(FakeBackend(width=1280, height=704, fps=24, chunk_seconds=0.02), **settings) as gateway:
        stream = await live(gateway)
        level = level_idc(1280, 1408 if alpha else 704, 24, settings.get("bitrate_kbps", 2500))
        query = "?alpha=stacked" if alpha else ""
        viewer = rtc_viewer(gateway, {**stream, "whep_url": stream["whep_url"] + query}, "H264")
        response = await gateway.http.post(viewer.url, content=await viewer.offer(), headers=SDP)
        answered = set(re.findall(r"profile-level-id=42[0-9a-f]{2}([0-9a-f]{2})", response.text))
        assert answered == {f"{level:02x}"}
        await viewer.peer.close()
        query = "?format=fmp4" + ("&alpha=stacked" if alpha else "")
        seen = await gateway.watch(stream, query, until=lambda seen: len(seen.frames) > 1)
        init = seen.frames[0][1]
        assert init[init.index(b"avcC") + 5 :][:3] == bytes([0x42, 0xC0, level])


async def test_a_level_that_cannot_be_kept(run_gateway: Any, rtc_viewer: Any) -> None:
    """RFC 6184, section 8.2.2: without level-asymmetry-allowed the stream may not exceed the offer's level."""
    async with run_gateway(FakeBackend(width=256, height=256, chunk_seconds=0.02)) as gateway:
        stream = await live(gateway)
        viewer = rtc_viewer(gateway, stream, "H264")
        offer = (await viewer.offer()).replace("level-asymmetry-allowed=1", "level-asymmetry-allowed=0")
        low = re.sub("profile-level-id=(42..)1f", r"profile-level-id=\g<1>0d", offer)
        response = await gateway.http.post(viewer.url, content=low, headers=SDP)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_common_codec")
        assert "level 2.1" in response.json()["error"]["message"]
        response = await gateway.http.post(viewer.url, content=offer, headers=SDP)
        assert response.status_code == 201
        assert set(re.findall("profile-level-id=42..(..)", response.text)) == {"15"}
        assert "level-asymmetry-allowed" not in response.text
        await viewer.peer.close()


async def test_one_encoder_serves_every_viewer_of_a_codec(
    run_gateway: Any, rtc_viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[VideoEncoder] = []
    encoded: list[tuple[VideoEncoder, int]] = []
    make, encode = VideoEncoder.__init__, VideoEncoder.encode

    def counting_make(self: VideoEncoder, *arguments: Any) -> None:
        made.append(self)
        make(self, *arguments)

    def counting_encode(self: VideoEncoder, rgb: memoryview, clock: int, *, key: bool) -> Any:
        encoded.append((self, clock))
        return encode(self, rgb, clock, key=key)

    monkeypatch.setattr(VideoEncoder, "__init__", counting_make)
    monkeypatch.setattr(VideoEncoder, "encode", counting_encode)
    async with run_gateway() as gateway:
        stream = await live(gateway)
        assert made == []
        async with rtc_viewer(gateway, stream, "H264") as one, rtc_viewer(gateway, stream, "H264") as other:
            fragments = gateway.watch(stream, "?format=fmp4", until=lambda seen: len(seen.frames) > 20)
            await asyncio.gather(one.frames(20), other.frames(20), fragments)
            assert len(made) == 1
            async with rtc_viewer(gateway, stream, "VP8") as third:
                await third.frames(10)
                assert len(made) == 2
            # Every frame once per codec: no time on the playback clock comes twice.
            assert len(encoded) == len(set(encoded))
        live_stream = gateway.streams.get(stream["id"])
        await gateway.until(lambda: not live_stream.audience.broadcasts)
        count = len(encoded)
        async with rtc_viewer(gateway, stream, "VP8") as again:
            await again.frames(3)
        assert len(made) == 3
        assert {encoder for encoder, _ in encoded[count:]} == {made[2]}


async def test_who_joins_starts_with_a_keyframe(run_gateway: Any, rtc_viewer: Any, clocks: dict[int, int]) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "H264") as first:
            early = await first.frames(20)
            async with rtc_viewer(gateway, stream, "H264") as second:
                [late] = await second.frames(1)
                assert late.key_frame
            assert [frame.key_frame for frame in early] == [True] + [False] * 19
            # The first viewer sees the same keyframe, and loses nothing by it.
            more = await first.frames(20)
            assert sum(frame.key_frame for frame in more) == 1
            assert [frame.pts for frame in early + more] == [clocks[index] for index in range(40)]


@pytest.mark.parametrize("kind", [RTCP_PSFB_PLI, RTCP_PSFB_FIR])
async def test_a_viewer_that_cannot_go_on_gets_one_keyframe(run_gateway: Any, rtc_viewer: Any, kind: int) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "H264") as viewer:
            # Long enough after the keyframe that the viewer came with for the next to be allowed.
            before = await viewer.frames(20)
            for _ in range(10):
                await viewer.cannot_go_on(kind)
            after = await viewer.frames(15)
            assert [frame.key_frame for frame in before] == [True] + [False] * 19
            assert sum(frame.key_frame for frame in after) == 1


async def test_a_picture_that_stands_still_is_sent_to_who_joins(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "VP8") as other:
            await other.frames(3)
            await gateway.patch(stream, paused=True)
        index = gateway.streams.get(stream["id"]).audience.on_screen.index
        async with rtc_viewer(gateway, stream, "H264") as viewer:
            frames = await viewer.frames(2)
            assert frames[0].key_frame
            assert not frames[1].key_frame  # the same once more, for the receiver's sake
            assert difference(frames[1].to_image(), original(gateway, stream, index)) < 6
            await gateway.patch(stream, paused=False)
            [resumed] = await viewer.frames(1)
            assert resumed.pts > frames[1].pts
            assert gateway.streams.get(stream["id"]).audience.on_screen.index > index


async def test_a_stall_is_time_that_passes(run_gateway: Any, rtc_viewer: Any, clocks: dict[int, int]) -> None:
    """The receiver's clock goes on: it would take every later frame for late, and wait longer for ever."""
    async with run_gateway() as gateway:
        stream = await live(gateway)
        playback = gateway.streams.get(stream["id"]).playback
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            await viewer.frames(1)  # frame 0, which the clock has waited with
            gateway.backend.extra_seconds = 1.5
            await gateway.until(lambda: playback.stalls == 1, 10)
            gateway.backend.extra_seconds = 0.0
            await gateway.until(lambda: playback.held_seconds > 0, 10)
            held, shown = round(playback.held_seconds * 90000), playback.shown
            while (frame := (await viewer.frames(1))[0]).pts < held + shown * 5625:
                pass
            assert frame.pts in clocks.values()
            assert clocks[shown] >= shown * 5625 + held


async def test_a_session_and_its_end(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            await viewer.frames(2)
            assert re.fullmatch(rf"/v1/streams/{stream['id']}/whep/[\w-]{{32}}", viewer.session)
            other = await gateway.open()
            stolen = viewer.session.replace(stream["id"], other["id"])
            assert (await gateway.http.delete(stolen)).status_code == 404
            response = await gateway.http.delete(viewer.session, headers={"if-match": '"anything"'})
            assert response.status_code == 200
            assert (await gateway.get(stream))["viewers"] == 0
            again = await gateway.http.delete(viewer.session)
            assert (again.status_code, again.json()["error"]["code"]) == (404, "session_not_found")
            assert (await gateway.http.patch(viewer.session, content="", headers=FRAGMENT)).status_code == 404


async def test_the_end_of_the_stream_is_the_end_of_its_sessions(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            await viewer.frames(2)
            await gateway.http.delete(f"/v1/streams/{stream['id']}")

            async def gone() -> bool:
                return (await gateway.http.delete(viewer.session)).status_code == 404

            await gateway.until(gone)
            await gateway.until(lambda: viewer.peer.connectionState == "closed")


async def test_a_viewer_that_leaves_is_forgotten(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        tasks = len(asyncio.all_tasks())
        for _ in range(3):
            async with rtc_viewer(gateway, stream, "VP8") as viewer:
                await viewer.frames(1)
        session = gateway.streams.get(stream["id"])
        await gateway.until(lambda: not session.audience.viewers and not session.audience.broadcasts)
        await gateway.until(lambda: len(asyncio.all_tasks()) <= tasks + 2)
        assert 'livereel_viewers{format="vp8"} 0.0' in (await gateway.http.get("/metrics")).text


async def test_nothing_of_a_connection_waits_for_the_garbage_collector(run_gateway: Any, rtc_viewer: Any) -> None:
    """Most of its 250 KiB the collector does not see, and so would come late."""
    async with run_gateway() as gateway:
        stream = await live(gateway)
        gc.collect()
        gc.disable()
        try:
            async with rtc_viewer(gateway, stream, "VP8", audio=True) as viewer:
                await viewer.frames(1)
                [peer] = [weakref.ref(each) for each in gc.get_objects() if type(each) is Peer]
                connection = weakref.ref(peer()._connection)
                [transport] = {weakref.ref(each.sender.transport) for each in connection().getTransceivers()}
                ice = weakref.ref(transport().transport.iceGatherer._connection)
            await gateway.until(lambda: not any(each() for each in (peer, connection, transport, ice)))
        finally:
            gc.enable()


async def test_a_session_that_never_connects_is_given_up(
    run_gateway: Any, rtc_viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.whep.CONNECT_SECONDS", 0.2)
    monkeypatch.setattr("server.api.whep.MAX_CONNECTING", 1)
    async with run_gateway() as gateway:
        stream = await live(gateway)
        viewer = rtc_viewer(gateway, stream, "VP8")
        offer = await viewer.offer()
        first = await gateway.http.post(viewer.url, content=offer, headers=SDP)
        assert first.status_code == 201
        crowded = await gateway.http.post(viewer.url, content=offer, headers=SDP)
        assert (crowded.status_code, crowded.json()["error"]["code"]) == (503, "too_many_connecting")
        assert int(crowded.headers["retry-after"]) > 0

        async def gone() -> bool:
            return (await gateway.http.delete(first.headers["location"])).status_code == 404

        await asyncio.sleep(0.3)
        await gateway.until(gone)
        assert (await gateway.http.post(viewer.url, content=offer, headers=SDP)).status_code == 201
        await viewer.peer.close()


async def test_viewers_are_limited(run_gateway: Any, rtc_viewer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.api.whep.MAX_VIEWERS", 1)
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            await viewer.frames(1)
            second = rtc_viewer(gateway, stream, "VP8")
            response = await gateway.http.post(second.url, content=await second.offer(), headers=SDP)
            assert (response.status_code, response.json()["error"]["code"]) == (503, "too_many_viewers")
            assert "retry-after" in response.headers
            await second.peer.close()


# refusals


def without(pattern: str) -> Callable[[str], str]:
    return lambda offer: "".join(line for line in offer.splitlines(True) if not re.match(pattern, line))


BAD_OFFERS: dict[str, tuple[Callable[[str], str | bytes], str]] = {
    "empty": (lambda offer: "", "invalid_sdp"),
    "no SDP": (lambda offer: "hello", "invalid_sdp"),
    "JSON": (lambda offer: '{"sdp": ""}', "invalid_sdp"),
    "not UTF-8": (lambda offer: b"v=0\r\n\xff\xfe", "invalid_sdp"),
    "NUL": (lambda offer: offer.replace("s=-", "s=\0"), "invalid_sdp"),
    "cut": (lambda offer: offer[: offer.index("m=")] + "m=video", "invalid_sdp"),
    "no media": (lambda offer: offer[: offer.index("m=")], "invalid_sdp"),
    "sound alone": (lambda offer: offer.replace("m=video", "m=audio"), "invalid_sdp"),
    "sends": (lambda offer: offer.replace("a=recvonly", "a=sendonly"), "invalid_sdp"),
    "inactive": (lambda offer: offer.replace("a=recvonly", "a=inactive"), "invalid_sdp"),
    "no codec of ours": (lambda offer: offer.replace("VP8/", "AV1/"), "no_common_codec"),
    "no ICE": (without("a=ice-"), "invalid_sdp"),
    "no DTLS": (without("a=fingerprint"), "invalid_sdp"),
    "no setup": (without("a=setup"), "invalid_sdp"),
    "a bad setup": (lambda offer: offer.replace("actpass", "holdconn"), "invalid_sdp"),
    "a bad payload type": (lambda offer: re.sub(r"(m=video \d+ \S+) .*", r"\1 999", offer), "invalid_sdp"),
    "fmtp of nothing": (lambda offer: offer + "a=fmtp:5 x=y\r\n", "invalid_sdp"),
    "no mux": (without("a=rtcp"), "invalid_sdp"),
    "too many lines": (lambda offer: offer + "a=x\r\n" * 2000, "invalid_sdp"),
}


@pytest.mark.parametrize("name", BAD_OFFERS)
async def test_offers_that_cannot_be_answered(run_gateway: Any, rtc_viewer: Any, name: str) -> None:
    change, code = BAD_OFFERS[name]
    async with run_gateway() as gateway:
        stream = await live(gateway)
        viewer = rtc_viewer(gateway, stream, "VP8")
        tasks = len(asyncio.all_tasks())
        response = await gateway.http.post(viewer.url, content=change(await viewer.offer()), headers=SDP)
        assert response.status_code == 400, response.text
        assert response.headers["content-type"] == "application/json"
        error = response.json()["error"]
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
        await viewer.peer.close()
        await gateway.until(lambda: len(asyncio.all_tasks()) <= tasks)


async def test_a_flood_of_candidates_is_cut(run_gateway: Any, rtc_viewer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does the server knock where only itself, its own network's services or nobody could be meant."""
    tried: list[str] = []
    from aioice import Connection

    add = Connection.add_remote_candidate

    async def note(self: Any, candidate: Any) -> None:
        tried.append(candidate.host)
        await add(self, candidate)

    async with run_gateway() as gateway:
        stream = await live(gateway)
        viewer = rtc_viewer(gateway, stream, "VP8")
        offer = without("a=candidate|a=end-of")(await viewer.offer())
        monkeypatch.setattr(Connection, "add_remote_candidate", note)
        hosts = ["127.0.0.1", "169.254.169.254", "224.0.0.1", "0.0.0.0", "fe80::1", "x.local", "example.com"]
        hosts += [f"10.0.0.{n}" for n in range(100)]
        lines = [f"a=candidate:{n} 1 udp 99 {host} 50000 typ host\r\n" for n, host in enumerate(hosts)]
        lines += [
            "a=candidate:a 1 tcp 99 10.1.0.1 50000 typ host\r\n",
            "a=candidate:b 1 udp 99 10.1.0.1 53 typ host\r\n",
        ]
        response = await gateway.http.post(viewer.url, content=offer + "".join(lines), headers=SDP)
        assert response.status_code == 201
        assert tried == [f"10.0.0.{n}" for n in range(32)]
        # What is trickled counts too.
        late = await gateway.http.patch(response.headers["location"], content=lines[20], headers=FRAGMENT)
        assert late.status_code == 204
        assert len(tried) == 32
        await gateway.http.delete(response.headers["location"])
        await viewer.peer.close()


async def test_streams_that_have_no_picture(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(chunk_seconds=0.7), queue_limit=2) as gateway:
        first, second = await gateway.open(), await gateway.open()
        assert second["state"] == "queued"
        for method in ("GET", "HEAD", "POST"):
            content, headers = ("v=0", SDP) if method == "POST" else (None, {})
            queued = await gateway.http.request(method, second["whep_url"], content=content, headers=headers)
            assert queued.status_code == 409
            assert int(queued.headers["retry-after"]) > 0
        await gateway.http.delete(f"/v1/streams/{first['id']}")
        over = await gateway.http.post(first["whep_url"], content="v=0", headers=SDP)
        assert (over.status_code, over.json()["error"]["code"]) == (409, "stream_ended")
        missing = await gateway.http.post("/v1/streams/st_none/whep", content="v=0", headers=SDP)
        assert (missing.status_code, missing.json()["error"]["code"]) == (404, "stream_not_found")


async def test_bodies_of_the_wrong_kind(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        for kind in ("application/json", "text/plain", "multipart/form-data", "application/trickle-ice-sdpfrag", ""):
            wrong = await gateway.http.post(stream["whep_url"], content="v=0", headers={"content-type": kind})
            assert (wrong.status_code, wrong.json()["error"]["code"]) == (415, "unsupported_media_type")
            assert wrong.headers["accept-post"] == "application/sdp"
        large = await gateway.http.post(stream["whep_url"], content="v=0" + "x" * 70_000, headers=SDP)
        assert large.status_code == 413
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            wrong = await gateway.http.patch(viewer.session, content="", headers=SDP)
            assert wrong.status_code == 415
            assert wrong.headers["accept-patch"] == "application/trickle-ice-sdpfrag"


async def test_what_a_session_can_be_told(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            await viewer.frames(1)

            async def patch(body: str | bytes, **headers: str) -> tuple[int, str | None]:
                sent = {**FRAGMENT, **{name.replace("_", "-"): value for name, value in headers.items()}}
                response = await gateway.http.patch(viewer.session, content=body, headers=sent)
                return response.status_code, response.json()["error"]["code"] if response.content else None

            user = re.search(r"a=ice-ufrag:(\S+)", viewer.peer.localDescription.sdp)[1]  # type: ignore[index]
            candidate = "m=video 9 X 0\r\na=mid:0\r\na=candidate:1 1 udp 99 10.0.0.1 50000 typ host\r\n"
            assert await patch(f"a=ice-ufrag:{user}\r\na=ice-pwd:x\r\n{candidate}") == (204, None)
            assert await patch(candidate + "a=end-of-candidates\r\n") == (204, None)
            assert await patch("a=candidate:1 1 sctp 99 10.0.0.1 50000 typ host\r\n") == (204, None)
            assert await patch("a=candidate:nonsense\r\n") == (204, None)
            # RFC 9725, section 4.3: a fragment of the same ICE session is trickle, of another a restart.
            own = f"a=ice-ufrag:{user}\r\na=ice-pwd:x\r\n{candidate}"
            assert await patch(own, if_match="*") == (204, None)
            assert await patch(candidate, if_match="*") == (204, None)
            for if_match in ("*", viewer.etag):
                restart = "a=ice-ufrag:other\r\na=ice-pwd:x\r\n"
                assert await patch(restart, if_match=if_match) == (422, "ice_restart_unsupported")
            assert await patch("a=ice-ufrag:other\r\na=ice-pwd:x\r\n") == (422, "ice_restart_unsupported")
            # RFC 9110, section 13.1.1: any of a list, by strong comparison.
            assert re.fullmatch(r'"[!#-~]+"', viewer.etag)
            assert await patch(own, if_match=viewer.etag) == (204, None)
            assert await patch(own, if_match=f'"1", {viewer.etag}') == (204, None)
            for if_match in ('"1"', f"W/{viewer.etag}", "1", viewer.etag.strip('"')):
                assert await patch(own, if_match=if_match) == (412, "no_such_etag")
            assert await patch("hello") == (400, "invalid_sdpfrag")
            assert await patch(b"a=\xff") == (400, "invalid_sdp")
            assert await patch("a=x\r\n" * 2000) == (400, "invalid_sdpfrag")
            await viewer.frames(3)  # none of this has hurt it


async def test_what_the_endpoint_says_of_itself(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        options = await gateway.http.options(stream["whep_url"])
        assert (options.status_code, options.headers["accept-post"]) == (200, "application/sdp")
        head = await gateway.http.head(stream["whep_url"])
        assert (head.status_code, head.headers["content-type"]) == (200, "application/sdp")
        get = await gateway.http.get(stream["whep_url"])
        assert (get.status_code, get.content) == (204, b"")
        put = await gateway.http.put(stream["whep_url"])
        assert (put.status_code, set(put.headers["allow"].split(", "))) == (405, {"POST", "OPTIONS", "HEAD", "GET"})
        async with rtc_viewer(gateway, stream, "VP8") as viewer:
            posted = await gateway.http.post(viewer.session, content="v=0", headers=SDP)
            assert (posted.status_code, set(posted.headers["allow"].split(", "))) == (
                405,
                {"PATCH", "DELETE", "OPTIONS"},
            )
            assert (await gateway.http.options(viewer.session)).headers["accept-patch"] == FRAGMENT["content-type"]
            assert viewer.accept_patch == FRAGMENT["content-type"]


async def test_the_endpoint_with_a_slash(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await live(gateway)
        slashed = {**stream, "whep_url": stream["whep_url"] + "/"}
        for method, status in (("OPTIONS", 200), ("HEAD", 200), ("GET", 204)):
            assert (await gateway.http.request(method, slashed["whep_url"])).status_code == status
        wrong = await gateway.http.post(slashed["whep_url"], content="v=0", headers={"content-type": "text/plain"})
        assert wrong.status_code == 415
        async with rtc_viewer(gateway, slashed, "VP8") as viewer:
            assert re.fullmatch(rf"/v1/streams/{stream['id']}/whep/[\w-]{{32}}", viewer.session)
            await viewer.frames(2)


# finding a way


async def test_turn_servers_come_with_credentials_that_expire(run_gateway: Any, rtc_viewer: Any) -> None:
    urls = ("stun:stun.example.org", "turn:turn.example.org:3478?transport=udp")
    settings = {"ice_servers": urls, "turn_secret": "hush", "public_address": "203.0.113.7"}
    async with run_gateway(**settings) as gateway:
        stream = await live(gateway)
        viewer = rtc_viewer(gateway, stream, "VP8")
        response = await gateway.http.post(viewer.url, content=await viewer.offer(), headers=SDP)
        assert response.status_code == 201
        stun, turn = response.headers.get_list("link")
        assert stun == '<stun:stun.example.org>; rel="ice-server"'
        found = re.fullmatch(
            r'<turn:turn.example.org:3478\?transport=udp>; rel="ice-server"; username="(\d+):[\w-]+"; '
            r'credential="(.+)"; credential-type="password"',
            turn,
        )
        assert found
        username = re.search(r'username="([^"]+)"', turn)[1]  # type: ignore[index]
        digest = hmac.new(b"hush", username.encode(), hashlib.sha1).digest()
        assert found[2] == base64.b64encode(digest).decode()
        assert (await gateway.http.options(viewer.url)).headers.get_list("link")[0] == stun
        preflight = await gateway.http.options(viewer.url, headers={"access-control-request-method": "POST"})
        assert (preflight.status_code, "link" in preflight.headers) == (200, False)
        # Loopback stays what it is for a viewer on this machine.
        assert re.findall(r"a=candidate:\S+ 1 udp \d+ (\S+)", response.text) == ["127.0.0.1"]
        assert "c=IN IP4 203.0.113.7" in response.text
        await gateway.http.delete(response.headers["location"])
        await viewer.peer.close()
