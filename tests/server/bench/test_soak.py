"""Which stalls a killed engine excuses, and how soon streams resume."""

import signal

import httpx
import pytest

from server.bench import soak
from server.bench.clients import Outcomes
from server.bench.gateway import Gateway


@pytest.mark.parametrize(
    ("fate", "at", "expected"),
    [
        (signal.SIGKILL, 99.0, False),
        (signal.SIGKILL, 100.5, True),
        (signal.SIGKILL, 106.0, True),  # it resumed at 104, plus three seconds of grace
        (signal.SIGKILL, 108.0, False),
        (signal.SIGSTOP, 107.5, True),  # the gateway may notice only at 105
        (signal.SIGSTOP, 109.0, False),
    ],
)
def test_what_a_kill_excuses(fate: signal.Signals, at: float, expected: bool) -> None:
    outcomes = Outcomes(resumed=[(50.0, "a"), (104.0, "a")])
    run = soak.Soak(Gateway("", 0), httpx.AsyncClient(), outcomes, failures=[soak.InjectedFailure(100.0, fate)])
    assert soak.during_recovery(run, at) is expected


def test_how_soon_each_long_stream_resumed() -> None:
    failures = [
        soak.InjectedFailure(100.0, signal.SIGKILL),
        soak.InjectedFailure(200.0, signal.SIGKILL),
        soak.InjectedFailure(300.0, signal.SIGSTOP),
    ]
    outcomes = Outcomes(
        resumed=[(101.0, "a"), (102.0, "b"), (103.0, "b"), (100.5, "brief"), (203.0, "b"), (304.0, "a")]
    )
    run = soak.Soak(Gateway("", 0), httpx.AsyncClient(), outcomes, failures=failures, long_streams={"a", "b"})
    assert sorted(soak.resume_delays(run, failures[0])) == [1.0, 2.0]
    assert sorted(soak.resume_delays(run, failures[1])) == [3.0, float("inf")]
    lines = list(soak.resume_figures(run, 5.0))
    assert [(name.split()[1], figures, good) for name, figures, good in lines] == [
        ("SIGKILL", [2.5, float("inf")], False),
        ("SIGSTOP", [float("inf")] * 2, False),
    ]
