"""Drawing in a terminal: size, colours, and that the cursor comes back."""

import io
import os

import pytest
from livereel import Client, LivereelError
from livereel.frames import Frame
from livereel.terminal import HALF, HIDE, SHOW, draw, fit, play, printable
from livereel.testing import FakeServer


@pytest.mark.parametrize(
    ("picture", "room", "size"),
    [((256, 256), (80, 24), (48, 24)), ((832, 480), (80, 60), (80, 23)), ((16, 16), (1, 1), (1, 1))],
)
def test_the_picture_keeps_its_proportions(
    picture: tuple[int, int], room: tuple[int, int], size: tuple[int, int]
) -> None:
    assert fit(*picture, *room) == size


def test_two_pixels_per_cell() -> None:
    red, blue = bytes([255, 0, 0]), bytes([0, 0, 255])
    frame = Frame("rgb24", 2, 2, 0, 0, red * 2 + blue * 2)
    cell = f"\x1b[38;2;255;0;0;48;2;0;0;255m{HALF}"
    assert draw(frame, 2, 1) == cell * 2 + "\x1b[0m"
    with pytest.raises(LivereelError):
        draw(Frame("mjpeg", 2, 2, 0, 0, b""), 2, 1)


def test_a_prompt_cannot_steer_the_terminal() -> None:
    assert printable("a r\u00e9d\x1b[2Jball\x9b\x07") == "a r\u00e9d\ufffd[2Jball\ufffd\ufffd"


def test_a_stream_is_drawn_until_it_ends(fake: FakeServer) -> None:
    out = io.StringIO()
    with Client(transport=fake.transport) as client, client.stream("a red ball", duration_s=0.5) as stream:
        play(stream.watch("rgb24"), lambda: os.terminal_size((20, 10)), stream.prompt, out)
    assert out.getvalue().startswith(HIDE) and out.getvalue().endswith(f"{SHOW}\n")
    assert HALF in out.getvalue() and "a red ball" in out.getvalue()
