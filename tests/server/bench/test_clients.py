"""What viewers over WebRTC count as a frame, and how a client records faults."""

import asyncio
from typing import Any

import pytest

from server.bench.clients import Client, Outcomes, ReceivedFrames, RtpDepacketizer

pytestmark = pytest.mark.anyio


def packet(number: int, body: bytes, *, last: bool = False) -> bytes:
    """An RTP packet with one word of header extensions, which differ between viewers."""
    header = bytes([0x90, 96 | 128 * last]) + number.to_bytes(2, "big") + bytes(8)
    return header + b"\xbe\xde\0\1" + number.to_bytes(4, "big") + body


def frames(*packets: bytes, codec: str = "H264") -> tuple[list[int], int]:
    received = ReceivedFrames()
    depacketizer = RtpDepacketizer(received, codec)
    for each in packets:
        asyncio.run(depacketizer.handle_packet(each, 0))
    return [frame for frame, _ in received.frames], depacketizer.lost


def test_frames_are_told_apart_by_what_is_in_them() -> None:
    one = frames(packet(65534, b"x", last=True), packet(65535, b"a"), packet(0, b"b", last=True))
    other = frames(packet(6, b"x", last=True), packet(7, b"a"), packet(8, b"b", last=True))
    assert one == other == ([hash(b"ab")], 0)


def test_a_frame_counts_only_if_nothing_of_it_is_lost() -> None:
    start = packet(1, b"x", last=True)
    assert frames(start, packet(2, b"a"), packet(4, b"c", last=True), packet(5, b"d", last=True)) == ([hash(b"d")], 1)
    # The end of one frame and the start of the next were lost: neither counts.
    assert frames(start, packet(2, b"a"), packet(5, b"d", last=True), packet(6, b"e", last=True)) == ([hash(b"e")], 2)


def test_the_number_of_a_vp8_picture_is_no_part_of_it() -> None:
    first = frames(packet(1, b"\x10x", last=True), packet(2, b"\x90\x80\x80\1abc", last=True), codec="VP8")
    second = frames(packet(1, b"\x10x", last=True), packet(2, b"\x90\x80\x85\7abc", last=True), codec="VP8")
    assert first == second == ([hash(b"abc")], 0)


async def test_a_fault_is_noted(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        client = Client(gateway.http, outcomes := Outcomes())
        assert await client.open(duration_s=-1) is None
        nothing = {"id": "st_none", "ws_url": f"ws://{gateway.address}/v1/streams/st_none/ws"}
        assert await client.watch(nothing, "mjpeg", 2) == 0
    assert list(outcomes.faults) == ["opened: 400 invalid_value"]
    assert list(outcomes.refused) == ["stream_not_found"]
