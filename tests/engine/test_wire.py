import subprocess
import sys

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
