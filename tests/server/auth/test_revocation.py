"""What was started with a key that is gone ends, and nothing else does."""

from collections.abc import Callable, Iterator

from server.auth.revocation import end_revoked


class Started:
    """A holder of things by name, each with the serial of the key that it was started with."""

    def __init__(self, **keys: int | None) -> None:
        self.keys = dict(keys)

    def started_with_keys(self) -> Iterator[tuple[int | None, Callable[[], object]]]:
        for name, key in self.keys.items():
            yield key, lambda name=name: self.keys.pop(name)


def test_only_what_revoked_keys_started_ends() -> None:
    started = Started(mine=1, theirs=2, local=None, more=1)
    end_revoked(started, {2, 3})
    assert started.keys == {"theirs": 2, "local": None}
    end_revoked(started, set())
    assert started.keys == {"local": None}
