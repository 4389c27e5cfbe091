"""Places in the engine and in the queue, with invented clocks."""

import pytest

from server.admission import Admission, Full, Place, capacity, cost


def admission(share: float = 0.4, queue_limit: int = 2) -> Admission:
    made = Admission(queue_limit)
    made.set_costs({"mini": share})
    return made


@pytest.mark.parametrize(
    ("chunk_seconds", "streams"),
    [(0.01, 67), (0.25, 2), (0.3, 2), (0.3375, 2), (0.34, 1), (0.7, 1), (0.75, 1), (9.0, 1)],
)
def test_capacity_keeps_a_tenth_in_reserve(chunk_seconds: float, streams: int) -> None:
    share = cost(chunk_seconds, chunk_frames=12, fps=16)
    assert capacity(share) == streams
    places = admission(share, queue_limit=100)
    for number in range(streams + 1):
        places.request(str(number), "mini", 0.0)
    assert len(places.admit()) == streams


def test_capacity_does_not_lose_a_stream_to_floating_point() -> None:
    assert capacity(0.3) == 3
    assert capacity(0.9) == 1


def test_first_come_first_served() -> None:
    places = admission()
    for name in "abcd":
        assert places.request(name, "mini", 0.0) is None
        places.admit()
    assert list(places.places(0.0)) == ["c", "d"]
    places.release("a")
    assert places.admit() == ["c"]
    assert places.places(0.0) == {"d": Place(1, None)}


def test_the_queue_is_bounded_and_says_when_to_come_back() -> None:
    places = admission()
    for name in "abcd":
        places.request(name, "mini", 0.0)
        places.admit()
    assert places.request("e", "mini", 0.0) == Full(60)
    places.expect_end("a", 12.3)
    assert places.request("e", "mini", 0.0) == Full(13)
    assert places.request("e", "mini", 20.0) == Full(1)


def test_a_queue_of_none_still_takes_what_fits() -> None:
    places = admission(queue_limit=0)
    assert places.request("a", "mini", 0.0) is None
    assert places.admit() == ["a"]
    places.request("b", "mini", 0.0)
    places.admit()
    assert isinstance(places.request("c", "mini", 0.0), Full)


def test_waiting_times_come_from_the_ends_that_are_known() -> None:
    places = admission(share=0.3, queue_limit=5)
    for name in "abcdefg":
        places.request(name, "mini", 0.0)
        places.admit()
    places.expect_end("a", 30.0)
    places.expect_end("c", 10.0)
    assert places.places(4.0) == {"d": Place(1, 6.0), "e": Place(2, 26.0), "f": Place(3, None), "g": Place(4, None)}


def test_leaving_the_queue_moves_the_others_up() -> None:
    places = admission(share=0.9, queue_limit=5)
    for name in "abcd":
        places.request(name, "mini", 0.0)
        places.admit()
    places.release("b")
    assert places.admit() == []
    assert {name: place.position for name, place in places.places(0.0).items()} == {"c": 1, "d": 2}


def test_everybody_waits_until_the_engine_is_up() -> None:
    places = Admission(2)
    assert places.request("a", "mini", 0.0) is None
    assert places.admit() == []
    assert places.places(0.0) == {"a": Place(1, None)}
    places.set_costs({"mini": 0.5})
    assert places.admit() == ["a"]


def test_a_model_slower_than_real_time_plays_alone() -> None:
    places = admission(share=3.0)
    places.request("a", "mini", 0.0)
    places.request("b", "mini", 0.0)
    assert places.admit() == ["a"]


def test_nothing_is_admitted_to_an_engine_that_is_gone() -> None:
    places = admission()
    places.set_costs({})
    places.request("a", "mini", 0.0)
    assert places.admit() == []


def test_releasing_twice_does_no_harm() -> None:
    places = admission()
    places.release("never seen")
    places.request("a", "mini", 0.0)
    places.admit()
    places.release("a")
    places.release("a")
    assert places.places(0.0) == {}
