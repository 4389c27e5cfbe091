"""Places in the engine and in the queue, with invented clocks."""

import pytest

from server.streams.admission import Admission, Full, QueuePosition, capacity, cost


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


def test_an_engine_says_how_much_of_it_may_be_promised() -> None:
    assert [capacity(0.19, promised) for promised in (0.9, 0.95, 1.0)] == [4, 5, 5]
    places = Admission(queue_limit=100)
    for promised, live in ((0.9, 4), (0.95, 5), (0.5, 5), (1.2, 6)):
        places.set_costs({"mini": 0.19}, promised)
        for _ in range(4):
            places.request(f"{promised} {len(places.positions(0.0))}", "mini", 0.0)
        places.admit()
        assert round(places.load / 0.19) == live
        for waiting in places.positions(0.0):
            places.release(waiting)


def test_first_come_first_served() -> None:
    places = admission()
    for name in "abcd":
        assert places.request(name, "mini", 0.0) is None
        places.admit()
    assert list(places.positions(0.0)) == ["c", "d"]
    places.release("a")
    assert places.admit() == ["c"]
    assert places.positions(0.0) == {"d": QueuePosition(1, None)}


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
    assert places.positions(4.0) == {
        "d": QueuePosition(1, 6.0),
        "e": QueuePosition(2, 26.0),
        "f": QueuePosition(3, None),
        "g": QueuePosition(4, None),
    }


def test_leaving_the_queue_moves_the_others_up() -> None:
    places = admission(share=0.9, queue_limit=5)
    for name in "abcd":
        places.request(name, "mini", 0.0)
        places.admit()
    places.release("b")
    assert places.admit() == []
    assert {name: place.position for name, place in places.positions(0.0).items()} == {"c": 1, "d": 2}


def test_everybody_waits_until_the_engine_is_up() -> None:
    places = Admission(2)
    assert places.request("a", "mini", 0.0) is None
    assert places.admit() == []
    assert places.positions(0.0) == {"a": QueuePosition(1, None)}
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
    assert places.positions(0.0) == {}


def served(waiting: list[tuple[str, int]], count: int, share: float = 0.9) -> str:
    """Owners in the order in which their streams got places, each stream ending when the next one is due.

    `waiting` has an owner and his priority for each request, in the order of arrival.
    """
    places = admission(share, queue_limit=1000)
    owners = {}
    for number, (owner, priority) in enumerate(waiting):
        owners[str(number)] = owner
        assert places.request(str(number), "mini", 0.0, owner=owner, priority=priority) is None
    live = places.admit()
    order = list(live)
    while len(order) < count:
        places.release(live.pop(0))
        live += (admitted := places.admit())
        order += admitted
    return "".join(owners[stream] for stream in order[:count])


@pytest.mark.parametrize(
    ("waiting", "share", "order"),
    [
        ([("a", 1)] * 100 + [("b", 1)], 0.9, "abaaaa"),
        ([("a", 1)] * 100 + [("b", 1)] * 3, 0.9, "abababaa"),
        ([("a", 1)] * 100 + [("b", 1)] * 3 + [("c", 1)] * 2, 0.9, "abcabcabaa"),
        ([("a", 1)] * 100 + [("b", 3)] * 100, 0.9, "babbbabbbabb"),
        ([("a", 1)] * 5 + [("b", 100)] * 300, 0.9, "ba" + "b" * 99),
        # two live at once: the share of the engine counts before the turns
        ([("a", 1)] * 100 + [("b", 1)] * 3, 0.45, "abababaa"),
        ([("a", 1)] * 100 + [("b", 1)], 0.3, "abaaaa"),
    ],
)
def test_owners_take_turns(waiting: list[tuple[str, int]], share: float, order: str) -> None:
    assert served(waiting, len(order), share) == order


def test_within_an_owner_the_higher_priority_goes_first() -> None:
    places = admission(share=0.9, queue_limit=9)
    for name, priority in (("first", 1), ("batch", 1), ("live", 5)):
        places.request(name, "mini", 0.0, owner="a", priority=priority)
    assert list(places.positions(0.0)) == ["live", "first", "batch"]


def test_who_was_away_has_saved_no_turns_and_lost_none() -> None:
    places = admission(share=0.9, queue_limit=99)
    for number in range(40):
        places.request(f"a{number}", "mini", 0.0, owner="a")
    for number in range(20):
        places.admit()
        places.release(f"a{number}")
    for number in range(20):
        places.request(f"b{number}", "mini", 0.0, owner="b")
    order = []
    for _ in range(8):
        order += places.admit()
        places.release(order[-1])
    assert [name[0] for name in order] == ["b", "a"] * 4
    for name in list(places.positions(0.0)):
        places.release(name)
    assert places.admit() == []
    assert not places._turns, "nobody is remembered for ever"


def test_a_full_queue_lets_every_owner_in_once() -> None:
    places = admission(share=0.9, queue_limit=2)
    for number in range(3):
        assert places.request(f"a{number}", "mini", 0.0, owner="a") is None
        places.admit()
    assert isinstance(places.request("a3", "mini", 0.0, owner="a"), Full)
    assert places.request("b0", "mini", 0.0, owner="b") is None
    assert isinstance(places.request("b1", "mini", 0.0, owner="b"), Full)
    assert list(places.positions(0.0)) == ["b0", "a1", "a2"]
    # a place that is given up is free for the next
    places.release("b0")
    places.release("a1")
    assert places.request("a3", "mini", 0.0, owner="a") is None
