"""Requests to the API of outputs, and an RTMP listener in a process of its own."""

import asyncio
import socket
import sys
from typing import Any

SECRET = "sk_7f3aSECRET"


async def post(gateway: Any, stream: dict[str, Any], **fields: Any) -> Any:
    return await gateway.http.post(f"/v1/streams/{stream['id']}/outputs", json=fields)


async def get(gateway: Any, output: dict[str, Any]) -> dict[str, Any]:
    return (await gateway.http.get(f"/v1/streams/{output['stream_id']}/outputs/{output['id']}")).json()


async def reached(gateway: Any, output: dict[str, Any], state: str, seconds: float = 20) -> dict[str, Any]:
    async def there() -> bool:
        return (await get(gateway, output))["state"] == state

    await gateway.until(there, seconds)
    return await get(gateway, output)


def states(seen: Any) -> list[str]:
    return [event["state"] for event in seen.of("output.state")]


LISTENER = """
import av, contextlib, json, sys
with av.open(sys.argv[1], options={"listen": "1"}) as source:
    video = source.streams.video[0]
    frames, keys, sound = [], 0, []
    tracks = [each.codec_context.name for each in source.streams]
    with contextlib.suppress(OSError):  # libav's listener raises it at every end
        for packet in source.demux():
            if packet.stream is not video:
                for frame in packet.decode():
                    start, peak = float(frame.pts * frame.time_base), float(abs(frame.to_ndarray()).max())
                    sound.append([start, frame.samples / frame.sample_rate, peak])
                continue
            keys += packet.is_keyframe
            for frame in packet.decode():
                frames.append([float(frame.pts * frame.time_base), *frame.to_image().resize((1, 1)).getpixel((0, 0))])
            if len(frames) >= int(sys.argv[2]):
                break
    size = [video.width, video.height]
    print(json.dumps({"frames": frames, "keys": keys, "size": size, "tracks": tracks, "sound": sound}))
"""


async def listen(port: int, frames: int) -> asyncio.subprocess.Process:
    url = f"rtmp://127.0.0.1:{port}/live/{SECRET}"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LISTENER, url, str(frames)), stdout=asyncio.subprocess.PIPE
    )


async def asked_for(port: int) -> tuple[asyncio.Server, asyncio.Future[bytes]]:
    """An RTMP server that says nothing after the handshake, and the `connect` command that it gets.

    RTMP 1.0, sections 5.2 (handshake) and 5.3.1 (chunks: of 128 bytes, here on one chunk stream).
    """
    command: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        hello = await reader.readexactly(1 + 1536)
        writer.write(b"\3" + bytes(1536) + hello[1:])
        await reader.readexactly(1536)
        header = await reader.readexactly(12)
        left, body = int.from_bytes(header[4:7]), b""
        while left:
            body += await reader.readexactly(min(left, 128))
            left -= min(left, 128)
            if left:
                await reader.readexactly(1)
        command.set_result(body)
        writer.close()

    return await asyncio.start_server(on_client, "127.0.0.1", port), command


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
