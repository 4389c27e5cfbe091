"""Timing on a CPU: one call, in milliseconds."""

import time

from engine.timing import milliseconds


def test_a_cpu_times_one_call() -> None:
    calls = []

    def work() -> None:
        calls.append(1)
        time.sleep(0.02)

    assert milliseconds([work], "cpu") >= 20
    assert len(calls) == 1
