"""Draws frames in a terminal: two pixels per character cell, in 24-bit colour."""

import os
import sys
import time
from collections.abc import Callable, Iterable
from typing import TextIO

from livereel.errors import LivereelError
from livereel.events import Event
from livereel.frames import Frame

HALF = "\N{UPPER HALF BLOCK}"
HIDE, SHOW, HOME, RESET, CLEAR = "\x1b[?25l", "\x1b[?25h", "\x1b[H", "\x1b[0m", "\x1b[2J"
FRAMES_PER_SECOND = 12
"""More than that is a burden for terminals."""


def fit(width: int, height: int, columns: int, lines: int) -> tuple[int, int]:
    """Columns and lines of the largest picture of these proportions; a cell is twice as high as wide."""
    columns = max(1, min(columns, 2 * lines * width // height))
    return columns, max(1, columns * height // width // 2)


def draw(frame: Frame, columns: int, lines: int) -> str:
    """A frame of RGB24 as text of at most this size. Raises `LivereelError` for another format."""
    if frame.format != "rgb24":
        raise LivereelError("Only frames of the format rgb24 can be drawn")
    columns, lines = fit(frame.width, frame.height, columns, lines)

    def colour(column: int, row: int) -> str:
        x, y = column * frame.width // columns, row * frame.height // (2 * lines)
        start = (y * frame.width + x) * 3
        return ";".join(map(str, frame.data[start : start + 3]))

    return "\n".join(
        "".join(
            f"\x1b[38;2;{colour(column, 2 * line)};48;2;{colour(column, 2 * line + 1)}m{HALF}"
            for column in range(columns)
        )
        + RESET
        for line in range(lines)
    )


def printable(text: str) -> str:
    """The text without control characters, which a prompt may contain and a terminal would obey."""
    return "".join(each if each.isprintable() else "\N{REPLACEMENT CHARACTER}" for each in text)


def play(items: Iterable[Event | Frame], size: Callable[[], os.terminal_size], title: str, out: TextIO) -> None:
    """Draw a stream until it ends. `size` tells the terminal's columns and lines, which may change."""
    out.write(HIDE + CLEAR)
    drawn_at = float("-inf")
    try:
        for item in items:
            if isinstance(item, Frame) and time.monotonic() - drawn_at >= 1 / FRAMES_PER_SECOND:
                drawn_at = time.monotonic()
                columns, lines = size()
                caption = f"{printable(title)}  {item.seconds:6.1f} s"[:columns]
                out.write(f"{HOME}{draw(item, columns, lines - 2)}\n{RESET}{caption}")
                out.flush()
    finally:
        out.write(f"{RESET}{SHOW}\n")
        out.flush()


def is_terminal() -> bool:
    """Whether somebody sees what is written to standard output."""
    return sys.stdout.isatty()
