"""A spare: an engine process that is as ready as its device allows, and in nobody's way until it is wanted.

It prepares in a thread that only gets processor time which nobody else wants. A thread, because whoever is not root may
give priority away but not take it back: this one ends, and the threads that serve never gave any away. What torch
starts for it inherits its priority and goes with it; every thread that computes has such helpers of its own.
"""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")
EXPENDABLE = 500
"""Added to the kernel's score of who is ended first when memory runs out; 1000 is the most."""


def aside(work: Callable[[], T]) -> T:
    """What `work` returns or raises, in a thread of the lowest priority."""
    with ThreadPoolExecutor(1, thread_name_prefix="aside", initializer=_give_way) as thread:
        return thread.submit(work).result()


def _give_way() -> None:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def expendable() -> Iterator[None]:
    """Meanwhile the kernel sooner ends this process than another, and gives its session what the others leave.

    Where Linux groups processes by session, priority counts within a session alone, and the session has its own. These
    two can be taken back by anyone.
    """
    score, group = Path("/proc/self/oom_score_adj"), Path("/proc/self/autogroup")
    before = ""
    with contextlib.suppress(OSError):
        before = score.read_text()
        score.write_text(str(min(1000, int(before) + EXPENDABLE)))
    alone = os.getsid(0) == os.getpid()
    if alone:
        with contextlib.suppress(OSError):
            group.write_text("19")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if before:
                score.write_text(before)
        if alone:
            with contextlib.suppress(OSError):
                group.write_text("0")
