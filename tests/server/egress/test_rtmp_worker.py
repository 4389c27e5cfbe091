"""The process that speaks RTMP, by itself: no frame waits for a later one."""

import asyncio
import random
import sys
import time
from pathlib import Path

import pytest

from server import sandbox
from server.egress import rtmp_worker
from server.egress.rtmp_worker import AccessUnit, Opening, pack
from server.media.encoder import VideoEncoder
from tests.server.egress.harness import SECRET, free_port

pytestmark = pytest.mark.anyio

ARRIVALS = """
import av, contextlib, sys, time
with av.open(sys.argv[1], options={"listen": "1", "probesize": "2000", "analyzeduration": "1"}) as source:
    with contextlib.suppress(OSError):  # libav's listener raises it at every end
        for packet in source.demux(video=0):
            if packet.pts is not None:
                print(round(4 * packet.pts * packet.time_base), time.monotonic(), flush=True)
"""


@pytest.mark.parametrize("silent_audio", [True, False])
async def test_a_frame_arrives_before_the_next_one_is_sent(silent_audio: bool) -> None:
    """Four frames a second, as slow as a muxer that waits for the next frame needs to be found out."""
    url = f"rtmp://127.0.0.1:{free_port()}/live/{SECRET}"
    listener = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", ARRIVALS, url), stdout=asyncio.subprocess.PIPE
    )
    await asyncio.sleep(1)  # until it listens
    worker = await sandbox.start(Path(rtmp_worker.__file__))
    assert worker.stdin is not None
    worker.stdin.write(pack(Opening(url, "rtmp://live.example:1935/live", silent_audio)))
    encoder = VideoEncoder("h264", 64, 48, 4, 2500)
    sent = {}
    for index in range(16):
        noise = random.Random(index).randbytes(64 * 48 * 3)  # the listener begins after some thousand bytes
        encoded = encoder.encode(memoryview(noise), 22_500 * index, key=index % 4 == 0)
        assert encoded is not None
        sent[index] = time.monotonic()
        worker.stdin.write(pack(AccessUnit(22_500 * index, encoded.key, bytes(encoded.packet))))
        await worker.stdin.drain()
        await asyncio.sleep(0.25)
    worker.stdin.close()
    await worker.wait()
    printed = (await asyncio.wait_for(listener.communicate(), 20))[0].split()
    arrived = {int(index): float(at) for index, at in zip(printed[::2], printed[1::2], strict=True)}
    delays = sorted(arrived[index] - sent[index] for index in range(8, 15))  # by then the listener has settled
    assert delays[len(delays) // 2] < 0.15, delays


@pytest.mark.parametrize("text", ["live", "rtmp://[::1]:1935/a'b", "x:y=z,[1]|2\\"])
def test_escaped_text_is_one_token(text: str) -> None:
    """Every character but letters, digits and underscores has a backslash."""
    escaped = rtmp_worker.escape(text)
    assert escaped.replace("\\\\", "\0").replace("\\", "").replace("\0", "\\") == text
    assert len(escaped) == len(text) + sum(not (letter.isalnum() or letter == "_") for letter in text)
