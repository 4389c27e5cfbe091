"""Levels of H.264: which one a stream needs, and its name in SDP and in Media Source Extensions. All is pure.

Sources: Recommendation ITU-T H.264, table A-1, for the levels; RFC 6184, sections 8.1 and 8.2.2, for SDP; RFC 6381,
section 3.3, for codec strings.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Level:
    """One row of table A-1, with the limits that a stream of this project can meet."""

    idc: int
    """`level_idc`: ten times the level's number."""
    macroblocks_per_second: int
    macroblocks: int
    """Per frame."""
    kbps: int
    """Bit rate, and here also the size of the buffer, in 1000 bits: no level has a smaller buffer (`MaxCPB`)."""


LEVELS = (
    Level(10, 1485, 99, 64),
    Level(11, 3000, 396, 192),
    Level(12, 6000, 396, 384),
    Level(13, 11_880, 396, 768),
    Level(20, 11_880, 396, 2000),
    Level(21, 19_800, 792, 4000),
    Level(22, 20_250, 1620, 4000),
    Level(30, 40_500, 1620, 10_000),
    Level(31, 108_000, 3600, 14_000),
    Level(32, 216_000, 5120, 20_000),
    Level(40, 245_760, 8192, 20_000),
    Level(41, 245_760, 8192, 50_000),
    Level(42, 522_240, 8704, 50_000),
    Level(50, 589_824, 22_080, 135_000),
    Level(51, 983_040, 36_864, 240_000),
    Level(52, 2_073_600, 36_864, 240_000),
    Level(60, 4_177_920, 139_264, 240_000),
    Level(61, 8_355_840, 139_264, 480_000),
    Level(62, 16_711_680, 139_264, 800_000),
)
"""Table A-1 without level 1b, which has the size and rate of level 1 and is written in another way."""


def level_idc(width: int, height: int, fps: int, kbps: int) -> int:
    """The lowest level for frames of this size in pixels, at this rate and at this bit rate in kbit/s.

    The encoder writes it into the SPS, from where `avcC` has it, and session descriptions state it. Raises `ValueError`
    if no level suffices.
    """
    columns, rows = -(-width // 16), -(-height // 16)
    for level in LEVELS:
        if (
            columns * rows <= level.macroblocks
            and max(columns, rows) ** 2 <= 8 * level.macroblocks
            and columns * rows * fps <= level.macroblocks_per_second
            and kbps <= level.kbps
        ):
            return level.idc
    raise ValueError(f"no level of H.264 has room for {width}x{height} at {fps} frames/s and {kbps} kbit/s")


def codec_string(sps: bytes) -> str:
    """The codec's name for Media Source Extensions, such as `avc1.42c015`. `sps` has no start code."""
    return f"avc1.{sps[1:4].hex()}"


BASELINE_PATTERNS = ((0x42, 0x0F, 0x00), (0x4D, 0x8F, 0x80), (0x58, 0xCF, 0xC0))
"""`profile_idc`, with mask and value of `profile-iop`: what RFC 6184, table 5, counts as Baseline or Constrained
Baseline. Decoders of either play the encoder's Constrained Baseline."""
LEVEL_1B = 0x10
"""In `profile-iop` beside level_idc 11: level 1b is meant."""


def answered_profile(parameters: dict[str, str], level: int | None) -> str | None:
    """The `profile-level-id` to answer to an offer of H.264 with these `fmtp` parameters, or None if a stream of
    Constrained Baseline at `level` (a level_idc; None if it is not known yet) cannot be sent under it.

    The profile is the offer's own. The level may be higher than the offered one only with `level-asymmetry-allowed=1`.
    """
    # RFC 6184 infers level 1 from a missing profile-level-id; browsers and aiortc infer level 3.1, and so do players
    # that omit it.
    offered = parameters.get("profile-level-id", "42e01f").lower()
    try:
        profile, iop, offered_level = bytes.fromhex(offered)
    except ValueError:
        return None
    if level is None or not any(profile == idc and iop & mask == value for idc, mask, value in BASELINE_PATTERNS):
        return None
    if offered_level == 11 and iop & LEVEL_1B:
        offered_level = 10
    if offered_level < level and parameters.get("level-asymmetry-allowed") != "1":
        return None
    return f"{profile:02x}{iop & ~LEVEL_1B:02x}{level:02x}"
