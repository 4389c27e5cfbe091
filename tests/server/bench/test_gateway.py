"""What a benchmark measures of a gateway: quantiles, growth, and the report."""

import pytest

from server.bench.gateway import Sample, growth, quantile, report


def test_quantiles_are_of_what_came_in_between() -> None:
    before = {'lag_bucket{le="0.01"}': 90.0, 'lag_bucket{le="0.1"}': 100.0, 'lag_bucket{le="+Inf"}': 100.0}
    after = {'lag_bucket{le="0.01"}': 100.0, 'lag_bucket{le="0.1"}': 120.0, 'lag_bucket{le="+Inf"}': 121.0}
    assert quantile({}, before, "lag", 0.9) == 0.01
    assert quantile(before, after, "lag", 0.4) == 0.01
    assert quantile(before, after, "lag", 0.9) == 0.1
    assert quantile(before, after, "lag", 0.99) == float("inf")
    assert quantile(after, after, "lag", 0.99) == 0.0


def test_growth_is_that_of_the_second_half() -> None:
    memory = [0, 50, 100, 100, 102, 104]
    samples = [Sample(30.0 * k, value * 2**20, 0.0, 0, 0, 0) for k, value in enumerate(memory)]
    assert growth(samples, "resident") == pytest.approx(4.0)
    assert growth(samples, "engine") == 0.0


def test_a_report_fails_with_one_bad_figure(capsys: pytest.CaptureFixture[str]) -> None:
    assert report([("a", 1, True)]) == 0
    assert report([("a", 1, True), ("b", 2, False)]) == 1
    assert "NOT AS IT SHOULD BE" in capsys.readouterr().out
