import pytest

from engine.scheduler import Claim, pick


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({}, None),
        ({"a": Claim(0, 0, 1.0)}, None),
        ({"a": Claim(0, 2, 5.0), "b": Claim(7, 9, 4.0)}, "b"),
        ({"a": Claim(2, 2, 1.0), "b": Claim(0, 1, 9.0)}, "b"),
        ({"a": Claim(0, 1, -3.0), "b": Claim(0, 1, 0.0)}, "a"),
        ({"a": Claim(0, 1, 1.0), "b": Claim(0, 1, 1.0)}, "a"),
    ],
)
def test_pick(claims: dict[str, Claim], expected: str | None) -> None:
    assert pick(claims) == expected
