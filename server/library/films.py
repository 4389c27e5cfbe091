"""Reads from a film on disk what it holds, and repairs one whose writer was stopped.

Sources: ISO/IEC 14496-12 for MP4; RFC 8794 (EBML) and RFC 9559 (Matroska) for WebM. Only headers are read, so that the
time this takes depends on the number of frames and not on their size.
"""

import contextlib
import logging
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from engine.wire import CLOCK_RATE
from server.media import fmp4

logger = logging.getLogger("livereel.store")

FilmFormat = Literal["mp4", "webm"]
"""MP4 contains the H.264 frames that viewers get; WebM is encoded separately, as VP9."""

MAX_HEAD_BYTES = 1 << 20
"""The largest `moov` or `moof` that is read."""

# Ids of EBML elements.
SEGMENT, INFO, TRACKS, TRACK_ENTRY, CLUSTER = 0x18538067, 0x1549A966, 0x1654AE6B, 0xAE, 0x1F43B675
DURATION, DEFAULT_DURATION, TIMESTAMP, VOID = 0x4489, 0x23E383, 0xE7, 0xEC
SIMPLE_BLOCK, BLOCK_GROUP, BLOCK = 0xA3, 0xA0, 0xA1
DURATION_BYTES = 11
"""The size of a `Duration` element of 64 bits, for which FFmpeg keeps room as `Void`."""


@dataclass(slots=True)
class Film:
    """The part of a film that is whole."""

    frames: int = 0
    seconds: float = 0.0
    size: int = 0
    """Bytes up to the end of the last whole element of the file."""


@dataclass(slots=True)
class _Scan(Film):
    """What a film holds, and what it lacks."""

    head: tuple[int, bytes] | None = None
    """Offset and bytes that state the duration, if none is stated."""
    index: bytes = b""
    """The index that is missing at the end."""


def repair(path: Path, format: FilmFormat) -> Film:
    """Cut off what its writer left incomplete, and state duration and index (MP4 only) if they are missing.

    Returns what the film holds, also if it cannot be repaired, as on a full disk. Raises OSError if it cannot be read.
    """
    with path.open("rb") as file:
        end = os.fstat(file.fileno()).st_size
        scan = (_scan_mp4 if format == "mp4" else _scan_webm)(file, end)
    film = Film(scan.frames, scan.seconds, scan.size)
    try:
        if scan.size < end or scan.head or scan.index:
            with path.open("r+b", buffering=0) as raw:
                raw.truncate(scan.size)
                if scan.head:
                    os.pwrite(raw.fileno(), scan.head[1], scan.head[0])
                if scan.index and os.pwrite(raw.fileno(), scan.index, scan.size) == len(scan.index):
                    film.size += len(scan.index)
    except OSError as error:
        logger.error("%s could not be repaired: %s", path.name, error)
        with contextlib.suppress(OSError):
            os.truncate(path, film.size)
    return film


def _scan_mp4(file: BinaryIO, end: int) -> _Scan:
    scan, head, ticks, indexed = _Scan(), b"", 0, False
    keyframes: list[tuple[int, int]] = []
    fragment: tuple[int, bytes] | None = None
    for name, start, stop in _boxes(file, end):
        body = b""
        if name in (b"moov", b"moof") and stop - start <= MAX_HEAD_BYTES:
            file.seek(start)
            body = file.read(stop - start)
        if name == b"moov":
            file.seek(0)
            head = file.read(stop) if stop <= MAX_HEAD_BYTES else b""
        elif name == b"moof":
            fragment = start, body
            continue  # without its `mdat` it is incomplete
        elif name == b"mdat" and fragment is not None:
            time, durations, key = fmp4.read_fragment(fragment[1])
            if key:
                keyframes.append((time, fragment[0]))
            scan.frames += len(durations)
            ticks, fragment = time + sum(durations), None
        indexed = name == b"mfra"
        scan.size = stop
    scan.seconds = ticks / CLOCK_RATE
    if scan.frames:
        if stated := fmp4.state_duration(head, ticks):
            scan.head = 0, stated
        scan.index = b"" if indexed else fmp4.index(keyframes)
    return scan


def _boxes(file: BinaryIO, end: int) -> Iterator[tuple[bytes, int, int]]:
    """The whole boxes of an MP4 file: name, start and end."""
    at = 0
    while at + 8 <= end:
        file.seek(at)
        size, name = struct.unpack("!I4s", file.read(8))
        if size < 8 or at + size > end:
            return
        yield name, at, at + size
        at += size


def _scan_webm(file: BinaryIO, end: int) -> _Scan:
    scan, period, last, room, stated = _Scan(), 0.0, 0, 0, False
    segments = (element for element in _elements(file, 0, end) if element[0] == SEGMENT)
    for _, segment, segment_end in segments:
        for id, start, stop in _elements(file, segment, segment_end):
            if id == INFO:
                for inner, body, inner_end in _elements(file, start, stop):
                    stated |= inner == DURATION
                    if inner == VOID:
                        room = inner_end - DURATION_BYTES if inner_end - body <= DURATION_BYTES - 2 else 0
            elif id == TRACKS:
                period = _frame_period(file, start, stop) / 1e6
            elif id == CLUSTER:
                times = list(_block_times(file, start, stop))
                scan.frames += len(times)
                last = times[-1] if times else last
            scan.size = stop
    if scan.frames:
        scan.seconds = (last + period) / 1000
        if room and not stated:
            scan.head = room, struct.pack("!HBd", DURATION, 0x80 | 8, last + period)
    return scan


def _frame_period(file: BinaryIO, start: int, stop: int) -> int:
    """The period of the first track's frames in nanoseconds; 0 if it is not stated."""
    for id, entry, entry_end in _elements(file, start, stop):
        if id == TRACK_ENTRY:
            for inner, body, inner_end in _elements(file, entry, entry_end):
                if inner == DEFAULT_DURATION:
                    return _unsigned(file, body, inner_end)
    return 0


def _block_times(file: BinaryIO, start: int, stop: int) -> Iterator[int]:
    """The times of a cluster's frames in milliseconds, which is FFmpeg's scale."""
    base = 0
    for id, body, inner_end in _elements(file, start, stop):
        if id == TIMESTAMP:
            base = _unsigned(file, body, inner_end)
        elif id == SIMPLE_BLOCK:
            yield base + _offset_of_block(file, body)
        elif id == BLOCK_GROUP:
            for inner, inner_body, _ in _elements(file, body, inner_end):
                if inner == BLOCK:
                    yield base + _offset_of_block(file, inner_body)


def _offset_of_block(file: BinaryIO, body: int) -> int:
    file.seek(body + 1)  # after the track's number
    return int.from_bytes(file.read(2), signed=True)


def _unsigned(file: BinaryIO, body: int, stop: int) -> int:
    file.seek(body)
    return int.from_bytes(file.read(min(8, stop - body)))


def _elements(file: BinaryIO, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """The whole EBML elements between two offsets: id, start of the body, end. A `Segment` ends with the file at the
    latest."""
    at = start
    while at < end:
        file.seek(at)
        head = file.read(12)
        width = _width(head, 0)
        length = _width(head, width)
        if not width or not length or width + length > len(head):
            return
        id, body = int.from_bytes(head[:width]), at + width + length
        size = int.from_bytes(head[width : width + length]) & (1 << 7 * length) - 1
        unknown = size == (1 << 7 * length) - 1
        stop = end if unknown else body + size
        if id == SEGMENT:
            stop = min(stop, end)
        if stop > end:
            return
        yield id, body, stop
        at = stop


def _width(data: bytes, at: int) -> int:
    """How many bytes the variable-size integer takes that begins there; 0 if none does."""
    return 9 - data[at].bit_length() if at < len(data) and data[at] else 0
