"""Revocation: what was started with an API key ends when the key is removed from the key file."""

from collections.abc import Callable, Container, Iterable
from typing import Protocol


class KeyHolder(Protocol):
    """Something that keeps what clients have started: streams, sessions, outputs, clips, requests."""

    def started_with_keys(self) -> Iterable[tuple[int | None, Callable[[], object]]]:
        """For each thing that has not ended: the serial of the API key it was started with, and a call that ends it.

        The serial is None where no keys are configured.
        """


def end_revoked(holder: KeyHolder, current: Container[int]) -> None:
    """End everything that was started with a key that is not among the `current` ones, given by their serials."""
    for serial, end in list(holder.started_with_keys()):
        if serial is not None and serial not in current:
            end()
