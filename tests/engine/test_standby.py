"""A standby prepares without slowing others down, waits, and serves on request."""

import os
import subprocess
import sys
import threading

import pytest

from engine.standby import OOM_SCORE, run_at_idle_priority

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_work_at_idle_priority_returns_and_raises() -> None:
    assert run_at_idle_priority(lambda: 7) == 7
    with pytest.raises(SystemExit, match="3"):
        run_at_idle_priority(lambda: sys.exit(3))


@linux
def test_idle_priority_covers_the_threads_that_work_starts() -> None:
    def work() -> list[int]:
        found = [os.sched_getscheduler(0)]
        helper = threading.Thread(target=lambda: found.append(os.sched_getscheduler(0)))
        helper.start()
        helper.join()
        return found

    before = os.sched_getscheduler(0)
    assert run_at_idle_priority(work) == [os.SCHED_IDLE, os.SCHED_IDLE]
    assert os.sched_getscheduler(0) == before


@linux
def test_low_priority_of_the_process_ends_with_the_context() -> None:
    # In a process and session of its own, as an engine is.
    code = (
        "from pathlib import Path; from engine.standby import low_priority_process\n"
        "files = [Path('/proc/self', name) for name in ('oom_score_adj', 'autogroup')]\n"
        "def show(): print(*(file.read_text().strip() for file in files if file.exists()))\n"
        "show()\n"
        "with low_priority_process(): show()\n"
        "show()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, start_new_session=True
    )
    before, meanwhile, after = (line.split() for line in run.stdout.splitlines())
    assert after == before
    assert int(meanwhile[0]) == min(1000, int(before[0]) + OOM_SCORE)
    if len(before) > 1:  # the kernel groups processes by session: "/autogroup-7 nice 0"
        assert (before[-1], meanwhile[-1]) == ("0", "19")
