"""A model that denoises frame by frame: a first chunk of one frame, then chunks of four."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from itertools import pairwise
from typing import Any

import pytest

from engine import wire
from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio


async def test_a_stream_plays_and_is_steered_within_a_chunk_or_two(
    run_gateway: Callable[..., AbstractAsyncContextManager[Any]],
) -> None:
    backend = FakeBackend(width=64, height=48, chunk_frames=4, first_chunk_frames=1, chunk_seconds=0.01)
    async with run_gateway(backend) as gateway:
        stream = await gateway.open()
        seen = await gateway.watch(stream, until=lambda seen: len(seen.frames) >= 20)
        assert (await gateway.patch(stream, prompt="a blue cube")).status_code == 200
        seen = await gateway.watch(stream, until=lambda seen: len(seen.frames) >= 20)
    assert {b - a for a, b in pairwise(seen.pts)} == {90_000 // 16}, "no frame is missing"
    assert sum(isinstance(message, wire.Steer) for message in backend.sent) == 1
