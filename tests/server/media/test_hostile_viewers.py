"""Viewers over WebRTC, and those who only know their port, who send what nobody should."""

import asyncio
import contextlib
import random
import re
import socket
import struct
from pathlib import Path
from typing import Any

import pylibsrtp
import pytest
from aioice import stun
from aiortc.rtp import RTCP_PSFB_PLI

from server.auth import keys
from server.backends.fake import FakeBackend
from server.media import webrtc

pytestmark = pytest.mark.anyio
SDP = {"content-type": "application/sdp"}


def port_of(viewer: Any) -> int:
    """The address at which the server listens for this viewer."""
    return int(re.findall(r"a=candidate:\S+ 1 udp \d+ 127\.0\.0\.1 (\d+)", viewer.answer)[0])


def stun_datagrams(username: str) -> list[bytes]:
    """STUN requests with a wrong signature, truncated or too long, and unsolicited responses."""
    made = []
    for kind in stun.Class:
        message = stun.Message(message_method=stun.Method.BINDING, message_class=kind)
        message.attributes["USERNAME"] = username
        message.attributes["PRIORITY"] = 1
        message.attributes["USE-CANDIDATE"] = None
        made.append(bytes(message))
        message.add_message_integrity(b"a guess")
        whole = bytes(message)
        made += [whole, whole[:-1], whole[:30], whole[:20], whole + bytes(1000)]
        made.append(whole[:2] + struct.pack("!H", 65535) + whole[4:])
    return made


def datagrams(username: str) -> list[bytes]:
    """Datagrams that are not STUN, DTLS, SRTP or SRTCP, and ones that begin like one of them."""
    dice = random.Random(7)
    noise = [dice.randbytes(dice.choice([1, 2, 3, 12, 13, 28, 100, 1400])) for _ in range(300)]
    first = [bytes([byte]) + dice.randbytes(60) for byte in range(256)]
    records = [
        struct.pack("!BHHIHH", kind, version, epoch, 0, 1, length) + body
        for kind in (20, 21, 22, 23, 24, 63)
        for version in (0xFEFD, 0xFEFF, 0x0304)
        for epoch in (0, 1)
        for length, body in ((2, b"\2\50"), (0, b""), (65535, bytes(200)), (12, b"\1" + b"\xff" * 11))
    ]
    return [b"", *(bytes([byte]) for byte in range(256)), *first, *noise, *records, *stun_datagrams(username)]


@pytest.mark.parametrize("audio", [False, True])
async def test_datagrams_of_strangers_hurt_nobody(run_gateway: Any, rtc_viewer: Any, audio: bool) -> None:
    """The attackers know the port and even the ICE user fragments, but none of the passwords."""
    async with run_gateway() as gateway:
        stream = await gateway.live()
        async with rtc_viewer(gateway, stream, "VP8", audio=audio) as viewer:
            await viewer.frames(2)
            ours, theirs = (
                re.search(r"a=ice-ufrag:(\S+)", sdp)[1]  # type: ignore[index]
                for sdp in (viewer.answer, viewer.peer.localDescription.sdp)
            )
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
                stranger.connect(("127.0.0.1", port_of(viewer)))
                for number, datagram in enumerate(datagrams(f"{ours}:{theirs}")):
                    stranger.send(datagram)
                    if number % 50 == 0:
                        await asyncio.sleep(0.01)
            await viewer.frames(10)
            assert (await gateway.get(stream))["viewers"] == 1
            # The peer's state also counts its transport for the rejected audio section, which aiortc does not close.
            [video] = [each for each in viewer.peer.getTransceivers() if each.kind == "video"]
            assert video.receiver.transport.state == "connected"


async def test_datagrams_before_the_handshake(run_gateway: Any, rtc_viewer: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.live()
        viewer = rtc_viewer(gateway, stream, "VP8")
        response = await gateway.http.post(viewer.url, content=await viewer.offer(), headers=SDP)
        viewer.answer = response.text
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
            stranger.connect(("127.0.0.1", port_of(viewer)))
            for datagram in datagrams("a:b"):
                stranger.send(datagram)
        await viewer.peer.setRemoteDescription(type(viewer.peer.localDescription)(viewer.answer, "answer"))
        await viewer.frames(2)
        await viewer.peer.close()


async def test_a_viewer_that_talks_nonsense_hurts_only_itself(run_gateway: Any, rtc_viewer: Any) -> None:
    """RTP and RTCP that are encrypted correctly and are nonsense inside."""
    dice = random.Random(8)
    async with run_gateway() as gateway:
        stream = await gateway.live()
        async with rtc_viewer(gateway, stream, "VP8") as good, rtc_viewer(gateway, stream, "VP8") as bad:
            await asyncio.gather(good.frames(2), bad.frames(2))
            sent = 0
            for kind in [*range(192, 224)] * 8 + [*range(128)] * 2:
                # Encryption requires a valid header; the rest may be anything.
                count, length = dice.randrange(32), dice.choice([0, 1, 2, 6, 50, 65535])
                head = struct.pack("!BBH", 0x80 | dice.choice([0, 0x20]) | count, kind, length)
                with contextlib.suppress(pylibsrtp.Error):
                    await bad.receiver.transport._send_rtp(head + dice.randbytes(dice.choice([4, 8, 24, 200])))
                    sent += 1
            assert sent > 200
            await asyncio.sleep(0.2)
            await good.frames(10)
        assert (await gateway.http.get("/livez")).status_code == 200


async def test_a_storm_of_lost_packets_and_pictures(
    run_gateway: Any, rtc_viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these packets requests 3400 retransmissions, and the next one a keyframe."""
    monkeypatch.setattr(webrtc, "RETRANSMISSIONS_PER_MINUTE", 60)
    async with run_gateway(FakeBackend(width=256, height=256, chunk_seconds=0.02)) as gateway:
        stream = await gateway.live()
        async with rtc_viewer(gateway, stream, "H264") as bad, rtc_viewer(gateway, stream, "H264") as good:
            await asyncio.gather(good.frames(20), bad.frames(20))
            [source] = {each.ssrc for each in (await bad.receiver.getStats()).values() if each.type == "inbound-rtp"}
            [peer] = [each for each in gateway_peers(gateway) if each._sender._ssrc == source]
            sent: list[int] = []
            send = peer._sender.transport._send_rtp

            async def counting(data: bytes) -> None:
                sent.append(len(data))
                await send(data)

            peer._sender.transport._send_rtp = counting
            history = list(peer._sender._RTCRtpSender__rtp_history.values())
            first = min(packet.sequence_number for packet in history)
            asked = struct.pack("!HH", first, 0xFFFF) * 200  # 17 packets each
            nack = struct.pack("!BBHLL", 0x81, 205, 2 + 200, 1, source) + asked
            before, loop = len(sent), asyncio.get_running_loop()
            started = loop.time()
            for _ in range(20):
                await bad.receiver.transport._send_rtp(nack)
                await bad.cannot_go_on(RTCP_PSFB_PLI)
            frames = await good.frames(30)
            seconds = loop.time() - started
            assert sum(frame.key_frame for frame in frames) <= 2 + seconds
            # 60 at once and one a second from then on; the rest is the stream itself, some packets a frame
            assert len(sent) - before < 60 + seconds * (1 + 16 * 20)


def gateway_peers(gateway: Any) -> list[Any]:
    """The gateway's WebRTC connections."""
    return [session.peer for session in gateway.app.state.whep_sessions._sessions.values()]


async def test_one_key_leaves_room_for_others_to_connect(
    run_gateway: Any, rtc_viewer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.whep.MAX_CONNECTING_PER_KEY", 2)
    path = tmp_path / "keys.toml"
    shown = [keys.add_key(path, name, "studio", ["control"], 4, 1000) for name in ("one", "two")]
    async with run_gateway(keys=path) as gateway:
        gateway.http.headers["authorization"] = f"Bearer {shown[0]}"
        stream = await gateway.live()
        viewer = rtc_viewer(gateway, stream, "VP8")
        offer = await viewer.offer()
        answers = [await gateway.http.post(viewer.url, content=offer, headers=SDP) for _ in range(3)]
        assert [answer.status_code for answer in answers] == [201, 201, 503]
        assert answers[2].json()["error"]["code"] == "too_many_connecting"
        gateway.http.headers["authorization"] = f"Bearer {shown[1]}"
        assert (await gateway.http.post(viewer.url, content=offer, headers=SDP)).status_code == 201
        await viewer.peer.close()


async def test_another_certificate_than_the_offer_names_is_refused(
    run_gateway: Any, rtc_viewer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.api.whep.CONNECT_SECONDS", 2.0)
    async with run_gateway() as gateway:
        stream = await gateway.live()
        viewer = rtc_viewer(gateway, stream, "VP8")
        offer = await viewer.offer()
        forged = re.sub(
            r"(a=fingerprint:sha-\d+ )(\S+)",
            lambda found: found[1] + ":".join(["AB"] * (len(found[2]) // 3 + 1)),
            offer,
        )
        assert forged != offer
        await viewer.connect(forged)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1.0):
                await viewer.frames(1)

        async def gone() -> bool:
            return (await gateway.http.delete(viewer.session)).status_code == 404

        await asyncio.sleep(1.5)
        await gateway.until(gone)
        assert (await gateway.get(stream))["viewers"] == 0
        await viewer.peer.close()


BOMBS = {
    "ten thousand sections": lambda offer: offer[: offer.index("m=")] + "m=video 9 UDP/TLS/RTP/SAVPF 96\r\n" * 10_000,
    "a line of 60 kB": lambda offer: offer + "a=fmtp:97 " + "x" * 60_000 + "\r\n",
    "a megabyte": lambda offer: offer + "a=" + "x" * 1_000_000,
    "a thousand formats": lambda offer: re.sub(r"(m=video \d+ \S+) .*", r"\1" + " 96" * 1000, offer),
    "a group of everything": lambda offer: offer.replace("a=group:BUNDLE 0", "a=group:BUNDLE" + " 0" * 5000),
    "line breaks": lambda offer: offer.replace("\r\n", "\r\r\n\n"),
    "names that inject": lambda offer: offer.replace("a=mid:0", "a=mid:0\r\nSet-Cookie: a=b"),
    "huge numbers": lambda offer: re.sub(r"a=rtpmap:(\d+) VP8/90000", r"a=rtpmap:\1 VP8/" + "9" * 5000, offer),
    "no end of extensions": lambda offer: offer + "".join(f"a=extmap:{n} urn:x\r\n" for n in range(500)),
    "sources": lambda offer: offer + "".join(f"a=ssrc:{n} cname:x\r\n" for n in range(500)),
    "candidates": lambda offer: (
        offer.replace("a=end-of-candidates\r\n", "")
        + "".join(f"a=candidate:{n} 1 udp 99 10.0.0.1 {2000 + n} typ host\r\n" for n in range(500))
    ),
}


@pytest.mark.parametrize("name", BOMBS)
async def test_offers_that_swell(run_gateway: Any, rtc_viewer: Any, name: str) -> None:
    """Each is refused or answered soon, and the gateway keeps running."""
    async with run_gateway() as gateway:
        stream = await gateway.live()
        viewer = rtc_viewer(gateway, stream, "VP8")
        offer = BOMBS[name](await viewer.offer())
        async with asyncio.timeout(10):
            response = await gateway.http.post(viewer.url, content=offer, headers=SDP)
        assert response.status_code in (201, 400, 413), response.text
        assert "set-cookie" not in response.headers
        if response.status_code == 201:
            await gateway.http.delete(response.headers["location"])
        async with rtc_viewer(gateway, stream, "VP8") as other:
            await other.frames(1)
        await viewer.peer.close()
