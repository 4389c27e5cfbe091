"""What asyncio lacks: waiting for an event or a time or the first of several coroutines, and opening in a thread."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from typing import Any, TypeVar, overload

T = TypeVar("T")


async def wait_until(event: asyncio.Event, deadline: float | None) -> None:
    """Wait for `event`; set it at `deadline`, a time of the monotonic clock, if nobody has done so before.

    Playback calls this a thousand times a second, so it starts no task and raises no exception. Unlike `wait_for` of
    Python 3.11 it never loses a cancellation that arrives in the same turn of the event loop.
    """
    timer = None
    if deadline is not None:
        timer = asyncio.get_running_loop().call_later(max(0.0, deadline - time.monotonic()), event.set)
    try:
        await event.wait()
    finally:
        if timer is not None:
            timer.cancel()


@overload
async def first_of(*work: Coroutine[Any, Any, T]) -> T: ...


@overload
async def first_of(*work: Coroutine[Any, Any, T], timeout: float) -> T | None: ...


async def first_of(*work: Coroutine[Any, Any, T], timeout: float | None = None) -> T | None:
    """Run coroutines side by side and return the result of the first to finish, or raise its exception.

    The others are cancelled, and have ended when this returns; so have all, if this is cancelled. If several finish in
    the same turn of the event loop, the one given first counts. None if none finishes within `timeout` seconds.
    """
    tasks = [asyncio.create_task(each) for each in work]
    done = set[asyncio.Task[T]]()
    try:
        done, _ = await asyncio.wait(tasks, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
        return next(task for task in tasks if task in done).result() if done else None
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        for task in tasks:
            if not task.cancelled():
                task.exception()  # asyncio logs those that nobody asked for
        # The first one's exception refers to this frame: together they would keep all that the work's frames hold until
        # the garbage collector comes by.
        del task, tasks, done


async def open_in_thread(open: Callable[[], T], close: Callable[[T], object], executor: Executor | None = None) -> T:
    """Call `open` in a thread and return its result, which the caller closes.

    If this is cancelled meanwhile, the thread goes on, and `close` gets the result there is then: what was opened for
    nobody is not lost. `executor` as in `run_in_executor`.
    """
    loop = asyncio.get_running_loop()
    opening = loop.run_in_executor(executor, open)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:

        def discard(opened: asyncio.Future[T]) -> None:
            if not opened.cancelled() and opened.exception() is None:
                close(opened.result())

        opening.add_done_callback(discard)
        raise
