"""Standby: an engine process that prepares as far as its device allows, without slowing others down, and then waits.

It prepares in a thread of the lowest scheduling priority. A thread, because a process that is not root may lower a
priority but not raise it again: this thread ends, and the threads that serve never lowered theirs. The threads that
torch starts for it inherit its priority and end with it; every thread that computes has worker threads of its own.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
OOM_SCORE = 500
"""Added to the score by which the kernel's out-of-memory killer chooses a process; 1000 is the highest."""


def run_at_idle_priority(work: Callable[[], T]) -> T:
    """Run `work` in a thread of the lowest priority; returns or raises what it does."""
    with ThreadPoolExecutor(1, thread_name_prefix="standby", initializer=_set_idle_priority) as thread:
        return thread.submit(work).result()


def _set_idle_priority() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def low_priority_process() -> Iterator[None]:
    """Within this context the kernel kills this process before others when memory runs out, and runs its session last.

    Where Linux groups processes by session (autogroup), a thread's priority counts only within its session, so the
    session needs a low priority too. Any user may raise both again.
    """
    score, group = Path("/proc/self/oom_score_adj"), Path("/proc/self/autogroup")
    before = ""
    with contextlib.suppress(OSError):
        before = score.read_text()
        score.write_text(str(min(1000, int(before) + OOM_SCORE)))
    leads_session = os.getsid(0) == os.getpid()
    if leads_session:
        with contextlib.suppress(OSError):
            group.write_text("19")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if before:
                score.write_text(before)
        if leads_session:
            with contextlib.suppress(OSError):
                group.write_text("0")
