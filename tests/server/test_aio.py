"""`server.aio`: waits for an event or a time, and for the first of several coroutines."""

import asyncio
import time

import pytest

from server.aio import first_of, wait_until

pytestmark = pytest.mark.anyio


async def test_wait_until_returns_when_the_event_is_set() -> None:
    event = asyncio.Event()
    asyncio.get_running_loop().call_soon(event.set)
    await wait_until(event, None)


async def test_wait_until_sets_the_event_at_the_deadline() -> None:
    event, began = asyncio.Event(), time.monotonic()
    await wait_until(event, began + 0.02)
    assert event.is_set()
    assert time.monotonic() - began >= 0.02


async def test_first_of_returns_the_first_result_and_cancels_the_rest() -> None:
    cancelled = asyncio.Event()

    async def quick() -> str:
        return "quick"

    async def endless() -> str:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise
        return "never"

    assert await first_of(endless(), quick()) == "quick"
    assert cancelled.is_set()


async def test_first_of_prefers_the_one_given_first() -> None:
    async def say(word: str) -> str:
        return word

    assert await first_of(say("one"), say("two")) == "one"


async def test_first_of_raises_what_the_first_raises() -> None:
    async def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await first_of(fail(), asyncio.sleep(10))


async def test_first_of_gives_up_after_the_timeout() -> None:
    assert await first_of(asyncio.Event().wait(), asyncio.Event().wait(), timeout=0.01) is None


async def test_first_of_cancels_its_work_when_it_is_cancelled() -> None:
    left = []

    async def endless() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            left.append(True)

    task = asyncio.create_task(first_of(endless(), endless()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert left == [True, True]
