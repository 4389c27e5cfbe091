"""The layer over aiortc: what it takes from inside there, and what it does to session descriptions."""

import asyncio
import inspect
import re
from typing import Any

import pytest
from aioice import Connection
from aioice.ice import StunProtocol
from aiortc import (
    RTCCertificate,
    RTCConfiguration,
    RTCPeerConnection,
    RTCRtpReceiver,
    RTCRtpSender,
    RTCSessionDescription,
)
from aiortc.rtcdtlstransport import generate_certificate
from cryptography.hazmat.primitives.asymmetric import rsa

from server.errors import ApiError
from server.media.webrtc import CREDENTIAL_SECONDS, Certificate, IceServer, Peer, ice_servers, with_public_address

pytestmark = pytest.mark.anyio


async def test_names_taken_from_inside_aiortc() -> None:
    """These are internals of aiortc and aioice: a version that changes them must fail here."""
    peer = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    assert [type(each) for each in peer._RTCPeerConnection__certificates] == [RTCCertificate]
    transceiver = peer.addTransceiver("video", "sendonly")
    assert transceiver.receiver._RTCRtpReceiver__remote_bitrate_estimator is not None
    assert "if self.__remote_bitrate_estimator is not None:" in inspect.getsource(RTCRtpReceiver._handle_rtp_packet)
    sender = transceiver.sender
    assert not inspect.signature(sender._send_keyframe).parameters
    assert "self._send_keyframe()" in inspect.getsource(RTCRtpSender._handle_rtcp_packet)
    gatherer = sender.transport.transport.iceGatherer
    assert isinstance(gatherer._connection, Connection)
    assert gatherer._connection._check_list == []
    assert list(inspect.signature(Connection.get_component_candidates).parameters) == [
        "self",
        "component",
        "addresses",
        "timeout",
    ]
    assert list(inspect.signature(RTCCertificate._create_ssl_context).parameters) == ["self", "srtp_profiles"]
    assert list(inspect.signature(sender._retransmit).parameters) == ["sequence_number"]
    assert "await self._retransmit(" in inspect.getsource(RTCRtpSender._handle_rtcp_packet)
    assert list(inspect.signature(Connection.data_received).parameters) == ["self", "data", "component"]
    assert "self.receiver.data_received(" in inspect.getsource(StunProtocol.datagram_received)
    # Used by the benchmarks' viewers.
    assert list(inspect.signature(sender.transport._handle_rtp_data).parameters) == ["data", "arrival_time_ms"]
    assert "self._handle_rtp_data(" in inspect.getsource(type(sender.transport)._recv_next)
    await peer.close()


@pytest.mark.parametrize("role", ["actpass", "passive"])
async def test_a_peer_with_an_rsa_certificate(rtc_viewer: Any, run_gateway: Any, role: str) -> None:
    """GStreamer has one. It must work whichever side starts the DTLS handshake."""
    key = rsa.generate_private_key(65537, 2048)
    async with run_gateway() as gateway:
        stream = await gateway.open()

        async def started() -> bool:
            return (await gateway.get(stream))["state"] == "live"

        await gateway.until(started)
        viewer = rtc_viewer(gateway, stream, "VP8")
        transport = viewer.receiver.transport
        certificate = Certificate(key, generate_certificate(key))  # type: ignore[arg-type]
        transport._RTCDtlsTransport__local_certificate = certificate
        offer = (await viewer.offer()).replace("a=setup:actpass", f"a=setup:{role}")
        await viewer.connect(offer)
        assert ("a=setup:active" in viewer.answer) == (role == "passive")
        await viewer.frames(2)
        await viewer.peer.close()


async def test_no_server_is_asked_that_nobody_named() -> None:
    for servers, address in (([], None), ([IceServer("stun:stun.example.org")], "203.0.113.7")):
        peer = Peer(servers, address, local=True)
        ice = peer._sender.transport.transport.iceGatherer._connection
        assert (ice.stun_server, ice.turn_server) == (None, None)
        await peer.close()
    peer = Peer([IceServer("turn:turn.example.org", "a", "b")], None, local=True)
    ice = peer._sender.transport.transport.iceGatherer._connection
    assert (ice.turn_server, ice.turn_username, ice.turn_password) == (("turn.example.org", 3478), "a", "b")
    await peer.close()


async def test_before_the_size_is_known_there_is_no_level_to_promise() -> None:
    client = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    client.addTransceiver("video", "recvonly")
    await client.setLocalDescription(await client.createOffer())
    both = client.localDescription.sdp
    peer = Peer([], None, local=True, level=None)
    await peer.negotiate(both)
    assert set(re.findall(r"a=rtpmap:\d+ (\w+)/", peer.answer)) == {"VP8", "rtx"}
    await peer.close()
    peer = Peer([], None, local=True, level=None)
    with pytest.raises(ApiError) as refused:
        await peer.negotiate(both.replace("VP8/", "AV1/"))
    assert (refused.value.status_code, refused.value.code) == (409, "stream_starting")
    await peer.close()
    await client.close()


@pytest.mark.parametrize("local", [True, False])
async def test_loopback_is_offered_to_who_is_here(local: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda use_ipv4, use_ipv6: ["127.0.0.2"])
    client = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    client.addTransceiver("video", "recvonly")
    await client.setLocalDescription(await client.createOffer())
    peer = Peer([], None, local=local)
    await peer.negotiate(client.localDescription.sdp)
    hosts = re.findall(r"a=candidate:\S+ 1 udp \d+ (\S+)", peer.answer)
    assert hosts == (["127.0.0.2", "127.0.0.1"] if local else ["127.0.0.2"])
    await peer.close()
    await client.close()


async def test_closing_before_and_during_a_connection_leaves_nothing() -> None:
    tasks = len(asyncio.all_tasks())
    peer = Peer([], None, local=True)
    await peer.close()
    await peer.close()
    client = RTCPeerConnection(RTCConfiguration(iceServers=[]))
    client.addTransceiver("video", "recvonly")
    await client.setLocalDescription(await client.createOffer())
    peer = Peer([], None, local=True)
    await peer.negotiate(client.localDescription.sdp)
    await client.setRemoteDescription(RTCSessionDescription(peer.answer, "answer"))
    await peer.close()
    await client.close()
    await asyncio.sleep(0.1)
    assert len(asyncio.all_tasks()) == tasks


def test_credentials_name_their_end() -> None:
    stun, turn = ice_servers(("stun:a", "turn:b"), "hush", "viewer", 1000.9)
    assert stun == IceServer("stun:a")
    assert turn.username == f"{1000 + CREDENTIAL_SECONDS}:viewer"
    [_, later] = ice_servers(("stun:a", "turn:b"), "hush", "viewer", 2000)
    [_, other] = ice_servers(("stun:a", "turn:b"), "hush!", "viewer", 1000)
    assert len({turn.credential, later.credential, other.credential}) == 3


def test_the_public_address_takes_the_place_of_our_own() -> None:
    sdp = (
        "m=video 5000 UDP/TLS/RTP/SAVPF 97\r\nc=IN IP4 10.0.0.2\r\n"
        "a=candidate:1 1 udp 2130706431 10.0.0.2 5000 typ host\r\n"
        "a=candidate:2 1 udp 2130706431 fd00::2 5001 typ host\r\n"
        "a=candidate:3 1 udp 2130706431 127.0.0.1 5002 typ host\r\n"
        "a=candidate:4 1 udp 16777215 198.51.100.9 6000 typ relay raddr 10.0.0.2 rport 5000\r\n"
    )
    assert with_public_address(sdp, "203.0.113.7") == (
        "m=video 5000 UDP/TLS/RTP/SAVPF 97\r\nc=IN IP4 203.0.113.7\r\n"
        "a=candidate:1 1 udp 2130706431 203.0.113.7 5000 typ host\r\n"
        "a=candidate:2 1 udp 2130706431 fd00::2 5001 typ host\r\n"
        "a=candidate:3 1 udp 2130706431 127.0.0.1 5002 typ host\r\n"
        "a=candidate:4 1 udp 16777215 198.51.100.9 6000 typ relay raddr 10.0.0.2 rport 5000\r\n"
    )
    assert "a=candidate:2 1 udp 2130706431 2001:db8::1 5001" in with_public_address(sdp, "2001:db8::1")
