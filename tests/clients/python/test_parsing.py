"""Dataclasses from JSON: nested ones, lists of them, and what is none."""

from dataclasses import dataclass, field

import pytest
from livereel import LivereelError
from livereel.parsing import parse


@dataclass
class Leaf:
    size: int


@dataclass
class Tree:
    leaf: Leaf | None
    leaves: list[Leaf] = field(default_factory=list)
    others: list[Leaf] | None = None
    name: str | None = None


def test_nested() -> None:
    tree = parse(Tree, {"leaf": {"size": 1}, "leaves": [{"size": 2}], "others": [{"size": 3}], "name": "oak"})
    assert tree == Tree(Leaf(1), [Leaf(2)], [Leaf(3)], "oak")
    assert parse(Tree, {"leaf": None}) == Tree(None)
    assert parse(Tree, {}).leaves is not parse(Tree, {}).leaves


@pytest.mark.parametrize("data", [None, [], "x", 3])
def test_no_object(data: object) -> None:
    with pytest.raises(LivereelError, match="Livereel server"):
        parse(Tree, data)
