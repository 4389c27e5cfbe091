import os
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from engine import wire


def test_round_trip_keeps_type_and_fields() -> None:
    message = wire.Open("s", "mini", "a red ball", 7, max_frames=48)
    assert wire.decode_to_engine(wire.encode(message)) == message


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04\x95\x00.",  # the start of a pickle
        msgspec.msgpack.encode({"type": "Launch"}),
        msgspec.msgpack.encode({"type": "Close", "stream": 3}),
        msgspec.msgpack.encode({"type": "Close", "stream": "s", "more": 1}),
        msgspec.msgpack.encode({"type": "Ready", "protocol": 1, "pid": 1, "models": []}),  # the other direction
        wire.encode(wire.Close("s"))[:-1],
    ],
)
def test_anything_else_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.MsgspecError):
        wire.decode_to_engine(data)


def test_the_contract_loads_no_torch() -> None:
    code = "import sys, engine.wire; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture
def ends() -> Iterator[tuple[wire.Ring, wire.Ring]]:
    """The engine's and the gateway's end of a ring of 3 slots of 5000 bytes."""
    memory = os.memfd_create("test")
    os.ftruncate(memory, wire.Ring.bytes_for(3, 5000))
    rings = wire.Ring(memory, 3, 5000), wire.Ring(memory, 3, 5000)
    os.close(memory)
    yield rings
    for ring in rings:
        ring.close()


def test_slots_keep_to_themselves(ends: tuple[wire.Ring, wire.Ring]) -> None:
    engine, gateway = ends
    for slot in range(3):
        engine.write(slot, slot + 1, memoryview(bytes([slot]) * (5000 - slot)))
    for slot in range(3):
        assert gateway.read(slot, slot + 1, 5000 - slot) == bytes([slot]) * (5000 - slot)


def test_a_slot_is_read_only_as_what_was_announced(ends: tuple[wire.Ring, wire.Ring]) -> None:
    engine, gateway = ends
    with pytest.raises(wire.DamagedError):
        gateway.read(1, 1, 10)  # nothing was written yet
    engine.write(1, 1, memoryview(bytes(10)))
    engine.write(1, 2, memoryview(bytes(10)))
    for slot, generation, size in (
        (1, 1, 10),
        (1, 3, 10),
        (3, 2, 10),
        (-1, 2, 10),
        (1, 2, 0),
        (1, 2, -5),
        (1, 2, 5001),
    ):
        with pytest.raises(wire.DamagedError):
            gateway.read(slot, generation, size)
    assert gateway.read(1, 2, 10) == bytes(10)


def test_a_slot_that_is_half_written_is_not_read(ends: tuple[wire.Ring, wire.Ring]) -> None:
    engine, gateway = ends
    engine.write(0, 1, memoryview(bytes(10)))
    engine._stamps[0] = 2  # the engine died in the middle of the next write
    for generation in (1, 2):
        with pytest.raises(wire.DamagedError):
            gateway.read(0, generation, 10)


def test_a_ring_that_cannot_be() -> None:
    memory = os.memfd_create("test")
    try:
        with pytest.raises(ValueError, match="greater than file size"):
            wire.Ring(memory, 1, 1)
        for slots, slot_bytes in ((0, 1), (1, 0), (-1, 1)):
            with pytest.raises(ValueError, match="no ring"):
                wire.Ring(memory, slots, slot_bytes)
        os.ftruncate(memory, wire.Ring.bytes_for(1, 1))
        ring = wire.Ring(memory, 1, 1)
        with pytest.raises(ValueError, match="does not fit"):
            ring.write(0, 1, memoryview(bytes(2)))
        ring.close()
    finally:
        os.close(memory)
