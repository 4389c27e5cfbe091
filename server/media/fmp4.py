"""Builds and reads fragmented MP4 with one H.264 track: an init segment, then fragments of one or more frames, and in
files an index of keyframes at the end. All functions are pure.

Sources: ISO/IEC 14496-12 for the boxes, 14496-15 for `avcC`, and the byte stream format of Media Source Extensions for
what browsers require. Times are in 1/90000 s.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from engine.wire import CLOCK_RATE

TRACK = 1
SPS, PPS, AUD, SEI = 7, 8, 9, 6
"""NAL unit types of H.264."""
UNITY = struct.pack("!9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
KEY_FLAGS, OTHER_FLAGS = 0x02000000, 0x01010000
"""Sample flags: depends on no other sample; depends on others and is no random access point."""


def nal_units(access_unit: bytes) -> list[bytes]:
    """The NAL units of an access unit in Annex B, without start codes."""
    # Emulation prevention keeps 00 00 01 out of a unit, and the last byte of a unit is never zero.
    return [unit.rstrip(b"\0") for unit in access_unit.split(b"\0\0\1")[1:]]


def init_segment(sps: bytes, pps: bytes, width: int, height: int, duration: int = 0) -> bytes:
    """`ftyp` and `moov` for these parameter sets (NAL units without start codes).

    `duration` is 0 while it is unknown; the segment's length does not depend on it, so that it can be filled in later.
    """
    # The 32-bit boxes hold at most 13 hours; `mehd` holds the duration in any case.
    short = duration if duration < 1 << 32 else 0
    avcc = struct.pack("!5BBH", 1, sps[1], sps[2], sps[3], 0xFF, 0xE1, len(sps)) + sps
    avcc += struct.pack("!BH", 1, len(pps)) + pps
    avc1 = struct.pack("!6xH16xHHIII H32xHh", 1, width, height, 0x480000, 0x480000, 0, 1, 24, -1)
    stsd = _full_box("stsd", 0, 0, struct.pack("!I", 1), _box("avc1", avc1, _box("avcC", avcc)))
    empty = struct.pack("!I", 0)
    stbl = _box(
        "stbl",
        stsd,
        _full_box("stts", 0, 0, empty),
        _full_box("stsc", 0, 0, empty),
        _full_box("stsz", 0, 0, empty, empty),
        _full_box("stco", 0, 0, empty),
    )
    dinf = _box("dinf", _full_box("dref", 0, 0, struct.pack("!I", 1), _full_box("url ", 0, 1)))
    minf = _box("minf", _full_box("vmhd", 0, 1, bytes(8)), dinf, stbl)
    mdhd = _full_box("mdhd", 0, 0, struct.pack("!4IHH", 0, 0, CLOCK_RATE, short, 0x55C4, 0))  # language "und"
    hdlr = _full_box("hdlr", 0, 0, struct.pack("!I4s12x", 0, b"vide"), b"video\0")
    tkhd = _full_box(
        "tkhd",
        0,
        3,
        struct.pack("!5I8x4H", 0, 0, TRACK, 0, short, 0, 0, 0, 0),
        UNITY,
        struct.pack("!2I", width << 16, height << 16),
    )
    trak = _box("trak", tkhd, _box("mdia", mdhd, hdlr, minf))
    mvhd = _full_box(
        "mvhd",
        0,
        0,
        struct.pack("!4IIH10x", 0, 0, CLOCK_RATE, short, 0x10000, 0x100),
        UNITY,
        bytes(24),
        struct.pack("!I", TRACK + 1),
    )
    mehd = _full_box("mehd", 1, 0, struct.pack("!Q", duration))
    mvex = _box("mvex", mehd, _full_box("trex", 0, 0, struct.pack("!5I", TRACK, 1, 0, 0, 0)))
    return _box("ftyp", b"isom", struct.pack("!I", 0x200), b"isomiso5avc1mp41") + _box("moov", mvhd, trak, mvex)


def state_duration(init: bytes, duration: int) -> bytes:
    """An init segment whose duration is unknown, with this duration; empty if `init_segment` has not made it."""
    try:
        at = init.index(b"avcC") + 4 + 6  # after the version, profile, level, and number of SPS
        sps, at = _sized(init, at)
        pps, _ = _sized(init, at + 1)
        width, height = (side >> 16 for side in struct.unpack_from("!2I", init, init.index(b"tkhd") + 4 + 76))
        known = init_segment(sps, pps, width, height) == init
    except (ValueError, IndexError, struct.error):
        return b""
    return init_segment(sps, pps, width, height, duration) if known else b""


def _sized(data: bytes, at: int) -> tuple[bytes, int]:
    """The bytes whose 16-bit length is at `at`, and where they end."""
    (size,) = struct.unpack_from("!H", data, at)
    return data[at + 2 : at + 2 + size], at + 2 + size


@dataclass(frozen=True, slots=True)
class Sample:
    """One frame, with length-prefixed NAL units."""

    data: bytes
    duration: int
    key: bool


def sample(units: Sequence[bytes], duration: int, *, key: bool) -> Sample:
    """A frame made of these NAL units, without parameter sets (they are in the init segment)."""
    kept = (unit for unit in units if unit[0] & 31 not in (SPS, PPS, AUD, SEI))
    return Sample(b"".join(struct.pack("!I", len(unit)) + unit for unit in kept), duration, key)


def fragment(number: int, time: int, samples: Sequence[Sample]) -> bytes:
    """`moof` and `mdat` with these frames, the first shown at `time`. `number` counts fragments from 1."""
    tfhd = _full_box("tfhd", 0, 0x020000, struct.pack("!I", TRACK))  # offsets count from the start of the moof
    tfdt = _full_box("tfdt", 1, 0, struct.pack("!Q", time))
    # data offset present; duration, size and flags of each sample
    fields = 0x000001 | 0x000100 | 0x000200 | 0x000400
    size_of_trun = 8 + 4 + 4 + 4 + 12 * len(samples)
    size_of_moof = 8 + 16 + 8 + len(tfhd) + len(tfdt) + size_of_trun
    entries = [
        struct.pack("!III", each.duration, len(each.data), KEY_FLAGS if each.key else OTHER_FLAGS) for each in samples
    ]
    trun = _full_box("trun", 0, fields, struct.pack("!Ii", len(samples), size_of_moof + 8), *entries)
    moof = _box("moof", _full_box("mfhd", 0, 0, struct.pack("!I", number)), _box("traf", tfhd, tfdt, trun))
    return moof + _box("mdat", *(each.data for each in samples))


def read_fragment(moof: bytes) -> tuple[int, list[int], bool]:
    """Time of the first frame, duration of each, and whether the first is a keyframe, from a `moof` of `fragment`;
    no frames if it is none."""
    try:
        (time,) = struct.unpack_from("!Q", moof, moof.index(b"tfdt") + 8)
        at = moof.index(b"trun") + 8
        (count,) = struct.unpack_from("!I", moof, at)
        entries = list(struct.iter_unpack("!III", moof[at + 8 : at + 8 + 12 * count]))
    except (ValueError, struct.error):
        return 0, [], False
    return time, [duration for duration, _, _ in entries], bool(entries) and entries[0][2] == KEY_FLAGS


def index(keyframes: Sequence[tuple[int, int]]) -> bytes:
    """`mfra`: an index of the fragments that begin with a keyframe, as pairs of time and byte offset of the `moof`."""
    entries = (struct.pack("!QQBBB", time, offset, 1, 1, 1) for time, offset in keyframes)
    tfra = _full_box("tfra", 1, 0, struct.pack("!III", TRACK, 0, len(keyframes)), *entries)
    return _box("mfra", tfra, _full_box("mfro", 0, 0, struct.pack("!I", 8 + len(tfra) + 16)))


def _box(name: str, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack("!I4s", 8 + len(body), name.encode()) + body


def _full_box(name: str, version: int, flags: int, *parts: bytes) -> bytes:
    return _box(name, struct.pack("!I", version << 24 | flags), *parts)
