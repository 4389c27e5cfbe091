"""`server.aio`: waits for an event or a time, and for the first of several coroutines; opening in a thread."""

import asyncio
import gc
import threading
import time
import weakref
from pathlib import Path

import pytest

from server.aio import first_of, open_in_thread, wait_until

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


async def test_first_of_keeps_nothing_of_what_failed() -> None:
    """Its frame and the task's exception refer to each other, unless it lets go: an upload would stay in memory."""

    class Upload:
        pass

    async def decode(upload: Upload) -> None:
        raise ValueError("no")

    async def receive() -> weakref.ref[Upload]:
        upload = Upload()
        with pytest.raises(ValueError, match="no"):
            await first_of(decode(upload), asyncio.Event().wait())
        return weakref.ref(upload)

    gc.disable()
    try:
        assert (await receive())() is None
    finally:
        gc.enable()


async def test_what_a_thread_opens_for_nobody_is_closed() -> None:
    may_open, closed = threading.Event(), list[str]()

    def open_slowly() -> str:
        may_open.wait()
        return "file"

    opening = asyncio.create_task(open_in_thread(open_slowly, closed.append))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert closed == []
    may_open.set()
    async with asyncio.timeout(10):
        while closed != ["file"]:
            await asyncio.sleep(0.01)


async def test_what_a_thread_opens_belongs_to_the_caller() -> None:
    closed = list[str]()
    assert await open_in_thread(lambda: "file", closed.append) == "file"
    with pytest.raises(FileNotFoundError):
        await open_in_thread(Path("/nonexistent").read_text, closed.append)
    await asyncio.sleep(0)
    assert closed == []


async def test_an_opening_that_fails_for_nobody_is_silent() -> None:
    may_open, errors = threading.Event(), list[object]()
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: errors.append(context))

    def fail_slowly() -> str:
        may_open.wait()
        raise OSError

    opening = asyncio.create_task(open_in_thread(fail_slowly, errors.append))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    opening.cancel()
    await asyncio.wait([opening])
    may_open.set()
    await asyncio.to_thread(lambda: None)
    del opening
    gc.collect()
    assert errors == []
