"""The token bucket, with invented times."""

from server.rate_limit import TokenBucket


def test_a_burst_and_then_an_even_refill() -> None:
    bucket = TokenBucket(4, now=0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [0, 0, 0, 0]
    assert bucket.left == 0
    assert bucket.take(0.0) == 15
    assert bucket.full_in == 60.0
    assert bucket.take(15.0) == 0
    assert bucket.take(22.5) == 8  # half a token: the wait is rounded up


def test_it_never_holds_more_than_a_minute() -> None:
    bucket = TokenBucket(2, now=0.0)
    assert [bucket.take(1000.0) for _ in range(3)] == [0, 0, 30]
