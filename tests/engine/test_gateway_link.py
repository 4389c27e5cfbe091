"""The writing side of the ring; `test_worker.py` has the socket's thread at work."""

import os
from collections.abc import Iterator

import pytest

from engine import wire
from engine.gateway_link import FrameSlots, resident_bytes


@pytest.fixture
def memory() -> Iterator[int]:
    descriptor = os.memfd_create("test")
    os.ftruncate(descriptor, wire.Ring.bytes_for(2, 8))
    yield descriptor
    os.close(descriptor)


def test_slots_are_taken_and_released(memory: int) -> None:
    slots = FrameSlots(memory)
    assert (slots.free, slots.used, slots.total) == (0, 0, 0)
    slots.lay_out(wire.Layout(2, 8))
    (a, first), (b, second) = (slots.write(memoryview(bytes([i] * 8))) for i in range(2))
    assert {a, b} == {0, 1} and first != second
    assert (slots.free, slots.used, slots.total) == (0, 2, 2)
    slots.release(a, second)  # the generation of another chunk
    assert slots.free == 0
    for _ in range(2):
        slots.release(a, first)
    assert (slots.free, slots.used) == (1, 1)
    reader = wire.Ring(memory, 2, 8)
    assert reader.read(b, second, 8) == bytes([1] * 8)
    reader.close()
    slots.close()


def test_resident_memory_is_that_of_the_process() -> None:
    assert resident_bytes() > 2**20
