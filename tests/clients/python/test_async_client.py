"""The asynchronous client, against both servers. What it shares with the synchronous one is tried there."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import livereel
import pytest
from livereel import AsyncClient, events

pytestmark = pytest.mark.anyio


@pytest.fixture
async def client(server: Any) -> AsyncIterator[AsyncClient]:
    async with server.make_async() as client:
        yield client


async def test_a_stream_from_open_to_end(client: AsyncClient) -> None:
    async with client.stream("a red ball", seed=7) as stream:
        times = []
        async for frame in stream.frames():
            times.append(frame.pts)
            if len(times) == 4:
                break
        assert times == sorted(set(times)) and stream.state == "live"
        assert (await stream.pause()).state == "paused"
        assert (await stream.resume()).state == "live"
    assert (await client.attach(stream.id)).info.ended_reason == "deleted"


async def test_a_stream_outlives_its_opening_without_a_block(client: AsyncClient) -> None:
    stream = await client.stream("a red ball")
    assert stream.id in [each.id for each in await client.streams() if not each.over]
    async with client.attach(stream.id) as same:
        assert same.prompt == "a red ball"
    assert not (await stream.refresh()).over
    await stream.end()


async def test_a_steer_is_followed_by_its_event(client: AsyncClient) -> None:
    async with client.stream("a red ball") as stream:
        async for item in stream.watch("rgb24"):
            if isinstance(item, livereel.Frame) and stream.prompt == "a red ball":
                await stream.steer("a blue cube")
            if isinstance(item, events.PromptApplied):
                assert item.prompt == stream.prompt == "a blue cube"
                break
        else:
            pytest.fail("the stream ended without it")


async def test_clips(client: AsyncClient, tmp_path: Path) -> None:
    video = await client.videos.generate("a red ball", tmp_path / "out.mp4", seconds=0.5)
    assert video.status == "completed" and (tmp_path / "out.mp4").read_bytes()[4:8] == b"ftyp"
    assert [each.status async for each in client.videos.progress(video.id)] == ["completed"]
    await client.videos.delete(video.id)
    with pytest.raises(livereel.NotFound):
        await client.videos.get(video.id)


async def test_the_rest_of_the_server(client: AsyncClient) -> None:
    assert [model.id for model in await client.models.list()] == ["mini"]
    assert (await client.readiness()).ready
    assert [lora.id for lora in await client.loras.list()] == ["watercolour"]
    with pytest.raises(livereel.InvalidRequest):
        await client.stream(" ")


async def test_many_streams_at_once(fake: Any) -> None:
    async with AsyncClient(transport=fake.async_transport) as client:

        async def count(prompt: str) -> int:
            async with client.stream(prompt, duration_s=0.5) as stream:
                return len([frame async for frame in stream.frames()])

        assert await asyncio.gather(*(count(f"ball {k}") for k in range(5))) == [8] * 5
