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
    frames, keys = [], 0
    with contextlib.suppress(OSError):  # libav's listener raises it at every end
        for packet in source.demux(video):
            keys += packet.is_keyframe
            for frame in packet.decode():
                frames.append([float(frame.pts * frame.time_base), *frame.to_image().resize((1, 1)).getpixel((0, 0))])
            if len(frames) >= int(sys.argv[2]):
                break
    print(json.dumps({"frames": frames, "keys": keys, "size": [video.width, video.height]}))
"""


async def listen(port: int, frames: int) -> asyncio.subprocess.Process:
    url = f"rtmp://127.0.0.1:{port}/live/{SECRET}"
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", LISTENER, url, str(frames)), stdout=asyncio.subprocess.PIPE
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
