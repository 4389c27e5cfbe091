"""Waiting for an event or a time, as everything does that plays frames: some thousand times a second in all."""

import asyncio
import time


async def wait_until(wake: asyncio.Event, until: float | None) -> None:
    """Wait for `wake`, which is set at `until` (on the monotonic clock) at the latest.

    It takes no task and no exception, and unlike Python 3.11's `wait_for` it never forgets a cancellation that comes in
    the same turn.
    """
    timer = None
    if until is not None:
        timer = asyncio.get_running_loop().call_later(max(0.0, until - time.monotonic()), wake.set)
    try:
        await wake.wait()
    finally:
        if timer is not None:
            timer.cancel()
