"""`RestartPolicy`: pauses, when streams are given up, and when a row of failures is over."""

import pytest

from server.backends.restart import MAX_FAILURES, Restart, RestartPolicy


def policy() -> RestartPolicy:
    return RestartPolicy(first=0.5, longest=60.0, quiet=60.0)


def test_pauses_double_and_streams_are_given_up_in_the_end() -> None:
    tried = policy()
    found = [tried.fail(float(n), standby=False) for n in range(MAX_FAILURES + 3)]
    assert [each.pause for each in found] == [0.5, 1, 2, 4, 8, 60, 60, 60, 60]
    assert [each.retrying for each in found] == [True] * (MAX_FAILURES - 1) + [False] * 4
    assert tried.failing_since == 0.0


def test_a_standby_takes_over_at_once_twice() -> None:
    """Three deaths in a minute end no stream."""
    tried = policy()
    found = [tried.fail(10.0 * n, standby=True) for n in range(MAX_FAILURES)]
    assert found[:4] == [Restart(0.0, True), Restart(0.0, True), Restart(0.5, True), Restart(1.0, True)]
    assert not found[-1].retrying


@pytest.mark.parametrize(("lasted", "pause"), [(59.0, 1.0), (60.0, 0.5)])
def test_an_engine_that_was_up_for_long_begins_anew(lasted: float, pause: float) -> None:
    tried = policy()
    tried.fail(0.0, standby=False)
    tried.up(1.0)
    assert tried.failing_since is None
    assert tried.fail(1.0 + lasted, standby=False).pause == pause
    assert tried.failing_since == 1.0 + lasted


def test_nobody_waits_for_an_engine_that_cannot_start_at_all() -> None:
    """It is tried again all the same: weights may be put back."""
    tried = policy()
    found = [tried.fail(float(n), standby=False, hopeless=True) for n in range(9)]
    assert not any(each.retrying for each in found)
    assert [each.pause for each in found] == [0.5, 1, 2, 4, 8, 60, 60, 60, 60]
    tried = policy()
    tried.up(0.0)
    assert tried.fail(1.0, standby=False, hopeless=True).retrying  # the weights were sound a moment ago
