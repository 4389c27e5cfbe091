"""OpenAI's own client against our /v1/videos, over real sockets: what it is promised is what it gets."""

import asyncio
import io
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import av
import openai
import pytest
from openai import AsyncOpenAI
from openai.types import Video
from PIL import Image

from server.auth import keys
from server.backends.fake import FakeBackend

pytestmark = [pytest.mark.anyio, pytest.mark.filterwarnings("ignore:The Sora API")]


@pytest.fixture
async def gateway(run_gateway: Any) -> AsyncIterator[Any]:
    async with run_gateway() as running:
        yield running


@pytest.fixture
async def client(gateway: Any) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"http://{gateway.address}/v1", api_key="unused", max_retries=0) as made:
        yield made


def exact(video: Video) -> None:
    """The object holds OpenAI's fields with the types that OpenAI's schema says, and one field more."""
    assert re.fullmatch(r"\d+x\d+", video.size)
    # The schema lists OpenAI's own sizes.
    Video.model_validate({**video.model_dump(), "size": "1280x720"}, strict=True)
    assert set(video.model_extra or {}) == {"extra"}


def shown(data: bytes) -> int:
    with av.open(io.BytesIO(data)) as container:
        return sum(1 for _ in container.decode(video=0))


async def test_from_a_prompt_to_a_film(client: AsyncOpenAI) -> None:
    video = await client.videos.create(prompt="a red ball", model="mini", seconds="4", size="64x48")
    exact(video)
    assert (video.object, video.seconds, video.size, video.model) == ("video", "4", "64x48", "mini")
    assert video.status in ("queued", "in_progress") and video.completed_at is None
    while video.status != "completed":
        await asyncio.sleep(0.02)
        video = await client.videos.retrieve(video.id)
        exact(video)
    assert video.progress == 100 and video.completed_at and video.expires_at
    content = await client.videos.download_content(video.id)
    assert content.response.headers["content-type"] == "video/mp4"
    assert shown(content.content) == 64
    still = await client.videos.download_content(video.id, variant="thumbnail")
    assert Image.open(io.BytesIO(still.content)).size == (64, 48)


async def test_polling_helper_picture_and_extra(client: AsyncOpenAI) -> None:
    Image.new("RGB", (64, 48), (9, 9, 200)).save(out := io.BytesIO(), "PNG")
    video = await client.videos.create_and_poll(
        prompt="a",
        seconds="4",
        input_reference=("start.png", out.getvalue(), "image/png"),
        extra_body={"extra": {"seed": 7, "prompts": [{"at_s": 1.0, "prompt": "x"}, {"at_s": 1.5, "prompt": "12"}]}},
        poll_interval_ms=20,
    )
    assert video.status == "completed"
    extra = (video.model_extra or {})["extra"]
    assert extra["seed"] == 7
    assert [(each["at_s"], each["prompt"]) for each in extra["prompts"]] == [(0, "a"), (1, "x"), (1.5, "12")]
    remixed = await client.videos.remix(video.id, prompt="b", extra_body={"extra": {"at_s": 2.0}})
    exact(remixed)
    assert (remixed.remixed_from_video_id, remixed.prompt, remixed.seconds) == (video.id, "b", "4")
    assert (await client.videos.poll(remixed.id, poll_interval_ms=20)).status == "completed"
    assert shown((await client.videos.download_content(remixed.id)).content) == 64


async def test_list_pages_and_delete(client: AsyncOpenAI) -> None:
    made = [(await client.videos.create(prompt=f"{number}", seconds="4")).id for number in range(5)]
    listed = [video.id async for video in client.videos.list(limit=2)]
    assert listed == made[::-1]
    page = await client.videos.list(limit=2, order="asc", after=made[0])
    assert ([video.id for video in page.data], page.has_next_page()) == (made[1:3], True)
    for id in made:
        deleted = await client.videos.delete(id)
        assert (deleted.id, deleted.deleted, deleted.object) == (id, True, "video.deleted")
    assert [video async for video in client.videos.list()] == []


async def test_a_film_is_streamed_while_it_is_made(run_gateway: Any) -> None:
    async with (
        run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.1)) as gateway,
        AsyncOpenAI(base_url=f"http://{gateway.address}/v1", api_key="unused") as client,
    ):
        video = await client.videos.create(prompt="a", seconds="8")
        await gateway.until(lambda: gateway.streams.clips.get(video.id).recorded > 0)
        data = b""
        async with client.videos.with_streaming_response.download_content(video.id) as response:
            async for part in response.iter_bytes():
                data += part
                if b"moof" in data and (now := await client.videos.retrieve(video.id)).progress < 100:
                    assert now.status == "in_progress"
        assert shown(data) == 128


async def test_errors_are_the_exceptions_of_the_client(client: AsyncOpenAI, gateway: Any) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        await client.videos.create(prompt="a", size="720x1280")
    assert (bad.value.code, bad.value.param, bad.value.type) == ("invalid_value", "size", "invalid_request_error")
    with pytest.raises(openai.NotFoundError) as absent:
        await client.videos.retrieve("video_none")
    assert absent.value.code == "video_not_found"
    with pytest.raises(openai.NotFoundError) as model:
        await client.videos.create(prompt="a", model="sora-2")
    assert (model.value.code, model.value.param) == ("model_not_found", "model")
    gateway.backend.extra_seconds = 0.5
    video = await client.videos.create(prompt="a", seconds="8")
    with pytest.raises(openai.ConflictError) as early:
        await client.videos.remix(video.id, prompt="b")
    assert early.value.code == "video_not_completed"
    gateway.backend.restarts_left = 0
    gateway.backend.crash()
    failed = await client.videos.retrieve(video.id)
    exact(failed)
    assert failed.status == "failed" and failed.error and failed.error.code == "engine_failed"
    with pytest.raises(openai.InternalServerError) as down:
        await client.videos.create(prompt="a")
    assert (down.value.status_code, down.value.code) == (503, "engine_failed")


async def test_keys_and_limits_are_too(run_gateway: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    guest = keys.add_key(path, "guest", "guest", ["view"], 1, 1000)
    slow = keys.add_key(path, "slow", "slow", ["control"], 1, 2)
    async with run_gateway(keys=path) as gateway:

        def client(key: str) -> AsyncOpenAI:
            return AsyncOpenAI(base_url=f"http://{gateway.address}/v1", api_key=key, max_retries=0)

        async with client("wrong") as nobody, client(guest) as viewer, client(slow) as limited:
            with pytest.raises(openai.AuthenticationError):
                await nobody.videos.list()
            with pytest.raises(openai.PermissionDeniedError):
                await viewer.videos.create(prompt="a")
            await limited.videos.list()
            await limited.videos.list()
            with pytest.raises(openai.RateLimitError) as much:
                await limited.videos.list()
            assert much.value.code == "rate_limited"
