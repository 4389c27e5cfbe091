"""The procedural world: endless 16 fps scenes of one to three objects, drawn from a table of per-frame parameters.

A scene is a row of class indices, one column per attribute (`ATTRIBUTES`). `clip_params` turns two scenes, the moment
at which the first becomes the second, and a clip's random phases into float32 parameters, in which every attribute is
a soft weight: shapes blend their distance fields, colours mix, movements add up, so that a changed prompt is a smooth
morph. `render` draws them by sphere tracing: `render_reference` in plain torch on any device, `render_cuda` by the
kernel in world.cu. Both do the same arithmetic in float32.

The SDF primitives, the blend by weights and the soft shadow follow https://iquilezles.org/articles/distfunctions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

FPS = 16
SIZE = 256
MORPH_FRAMES = 12

COUNTS = ("one", "two", "three")
SHAPES = ("sphere", "cube", "cylinder", "cone", "ring", "diamond", "cross")
COLOURS = ("red", "orange", "yellow", "green", "teal", "blue", "purple", "pink", "white", "black")
MATERIALS = ("matte", "metal", "striped")
MOTIONS = ("still", "spinning", "bouncing", "sliding", "circling", "pulsing", "floating")
GROUNDS = ("grass", "sand", "snow", "tiles", "water")
SKIES = ("day", "sunset", "night", "overcast", "aurora")
CAMERAS = ("static", "orbiting", "zooming", "panning", "rising")
RELATIONS = ("left", "right", "front", "behind")

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "count": COUNTS,
    "shape": SHAPES,
    "colour": COLOURS,
    "material": MATERIALS,
    "motion": MOTIONS,
    "ground": GROUNDS,
    "sky": SKIES,
    "camera": CAMERAS,
    "shape2": SHAPES,
    "colour2": COLOURS,
    "relation2": RELATIONS,
    "shape3": SHAPES,
    "colour3": COLOURS,
    "relation3": RELATIONS,
}
COLUMN = {name: index for index, name in enumerate(ATTRIBUTES)}

HELD_OUT: tuple[tuple[str, str], ...] = (
    ("sphere", "purple"),
    ("cube", "teal"),
    ("cylinder", "red"),
    ("cone", "blue"),
    ("ring", "yellow"),
    ("diamond", "orange"),
    ("cross", "pink"),
)
"""Shape and colour pairs that no object of a training scene has: one pair in ten."""

Split = Literal["train", "held_out", "any"]

_CARDINALITY = tuple(len(names) for names in ATTRIBUTES.values())
_HELD_COLOUR = tuple(COLOURS.index(dict(HELD_OUT)[shape]) for shape in SHAPES)

# ------------------------------------------------------------------ scenes


def _randint(high: int, n: int, generator: torch.Generator) -> Tensor:
    return torch.randint(high, (n,), generator=generator, device=generator.device)


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator, device=generator.device)


def active(scenes: Tensor) -> Tensor:
    """Which attributes show: bool [N, A] for scenes [N, A]; a companion's columns are active when `count` has it."""
    mask = torch.ones_like(scenes, dtype=torch.bool)
    mask[:, COLUMN["shape2"] : COLUMN["shape3"]] = scenes[:, :1] >= 1
    mask[:, COLUMN["shape3"] :] = scenes[:, :1] >= 2
    return mask


def canonical(scenes: Tensor) -> Tensor:
    """The same scenes [N, A] with two companions in the order of their relations.

    Nothing in a picture tells which of two companions was named first, so this is what can be read out of one.
    """
    second, third = (list(range(COLUMN["shape" + suffix], COLUMN["relation" + suffix] + 1)) for suffix in ("2", "3"))
    swap = (scenes[:, 0] >= 2) & (scenes[:, second[-1]] > scenes[:, third[-1]])
    ordered = scenes.clone()
    ordered[:, second] = torch.where(swap[:, None], scenes[:, third], scenes[:, second])
    ordered[:, third] = torch.where(swap[:, None], scenes[:, second], scenes[:, third])
    return ordered


def _pairs(n: int, generator: torch.Generator, split: Split) -> tuple[Tensor, Tensor]:
    """Shapes and colours, int64 [n] each, uniform over the pairs of the split."""
    held = torch.tensor(_HELD_COLOUR, device=generator.device)
    shape = _randint(len(SHAPES), n, generator)
    if split == "held_out":
        return shape, held[shape]
    if split == "any":
        return shape, _randint(len(COLOURS), n, generator)
    return shape, (held[shape] + 1 + _randint(len(COLOURS) - 1, n, generator)) % len(COLOURS)


def sample_scenes(
    n: int,
    generator: torch.Generator,
    *,
    split: Split = "train",
    count_weights: tuple[float, float, float] = (0.6, 0.25, 0.15),
) -> Tensor:
    """Random scenes, int64 [n, A] on the generator's device.

    `split` rules the main object's shape and colour; companions are held-out pairs only under "any". Every column is
    drawn, also those that `count` makes inactive; the two relations always differ.
    """
    scenes = torch.stack([_randint(k, n, generator) for k in _CARDINALITY], dim=1)
    weights = torch.tensor(count_weights, dtype=torch.float32, device=generator.device)
    scenes[:, 0] = torch.multinomial(weights, n, replacement=True, generator=generator)
    for suffix in ("", "2", "3"):
        pair = _pairs(n, generator, "train" if suffix and split == "held_out" else split)
        scenes[:, COLUMN["shape" + suffix]], scenes[:, COLUMN["colour" + suffix]] = pair
    other = 1 + _randint(len(RELATIONS) - 1, n, generator)
    scenes[:, COLUMN["relation3"]] = (scenes[:, COLUMN["relation2"]] + other) % len(RELATIONS)
    return scenes


def without_motion(scenes: Tensor) -> Tensor:
    """The same scenes [N, A] with still objects and a static camera."""
    still = scenes.clone()
    still[:, COLUMN["motion"]] = MOTIONS.index("still")
    still[:, COLUMN["camera"]] = CAMERAS.index("static")
    return still


def nothing_moves(scenes: Tensor) -> Tensor:
    """Which of scenes [N, A] are of still objects before a static camera: bool [N]."""
    motion, camera = scenes[:, COLUMN["motion"]], scenes[:, COLUMN["camera"]]
    return (motion == MOTIONS.index("still")) & (camera == CAMERAS.index("static"))


def steer_scenes(scenes: Tensor, generator: torch.Generator, *, split: Split = "train") -> Tensor:
    """New targets for scenes [N, A]: what a viewer may ask for next. At least one active attribute differs.

    In 60 % one to three active attributes change, in 25 % all but the count, in 15 % the count and up to two more.
    A few more may follow where the split or two equal relations would otherwise be violated.
    """
    n, device = scenes.shape[0], generator.device
    mode = torch.rand(n, generator=generator, device=device)
    recount = mode >= 0.85
    few = (mode < 0.6) | recount

    target = scenes.clone()
    count = (scenes[:, 0] + 1 + _randint(2, n, generator)) % 3
    target[:, 0] = torch.where(recount, count, scenes[:, 0])
    fresh = active(target) & ~active(scenes)
    changeable = active(target) & ~fresh
    changeable[:, 0] = False

    draw = torch.rand(scenes.shape, generator=generator, device=device).masked_fill(~changeable, 2.0)
    rank = draw.argsort(dim=1).argsort(dim=1)
    amount = 1 + _randint(3, n, generator) - recount.long()
    change = changeable & torch.where(few[:, None], rank < amount[:, None], True)
    if split == "held_out":  # one held-out colour per shape: the two can only change together
        pair = [COLUMN["shape"], COLUMN["colour"]]
        change[:, pair] = change[:, pair].any(dim=1, keepdim=True)

    size = torch.tensor(_CARDINALITY, device=device)
    shift = 1 + (torch.rand(scenes.shape, generator=generator, device=device) * (size - 1)).long().clamp(max=8)
    target = torch.where(change, (scenes + shift.minimum(size - 1)) % size, target)
    drawn = sample_scenes(n, generator, split=split)
    target = torch.where(fresh, drawn, target)

    held = torch.tensor(_HELD_COLOUR, device=device)
    for suffix in ("", "2", "3"):
        if split == "any":
            break
        s, c = COLUMN["shape" + suffix], COLUMN["colour" + suffix]
        if split == "held_out" and not suffix:
            target[:, c] = held[target[:, s]]
            continue
        for _ in range(2):  # a second shift where the first came back to the old colour that had to change
            wrong = (target[:, c] == held[target[:, s]]) | (change[:, c] & (target[:, c] == scenes[:, c]))
            target[:, c] = torch.where(wrong, (target[:, c] + 1) % len(COLOURS), target[:, c])

    first, second = COLUMN["relation2"], COLUMN["relation3"]
    for _ in range(3):  # move the one that changes; where neither does (a fresh companion), the second
        clash = target[:, first] == target[:, second]
        move_first = change[:, first] & ~change[:, second] & ~fresh[:, second]
        move_second = ~move_first
        stale_first = change[:, first] & (target[:, first] == scenes[:, first])
        stale_second = change[:, second] & (target[:, second] == scenes[:, second])
        a, b = target[:, first], target[:, second]
        target[:, first] = torch.where((clash & move_first) | stale_first, (a + 1) % 4, a)
        target[:, second] = torch.where((clash & move_second) | stale_second, (b + 1) % 4, b)
    return target


# ------------------------------------------------------------------ variation


@dataclass(frozen=True)
class Variation:
    """What differs between two clips of the same scene; float32 [N, ...] on one device.

    A `phase` is a fraction of a period; angles are radians.
    """

    motion_phase: Tensor
    """[N]"""
    camera_phase: Tensor
    """[N]"""
    yaw: Tensor
    """[N, 3] of the three objects."""
    side: Tensor
    """[N, 1] -1 or 1: to which side of the line of sight a companion in front or behind stands if it may choose."""
    light_azimuth: Tensor
    """[N] of the key light, from the camera's direction."""
    height: Tensor
    """[N] added to the camera's elevation."""
    turf: Tensor
    """[N, 3] shift in two axes and turn of the ground's texture."""
    waves: Tensor
    """[N, 6] phases of four ripples and two aurora curtains."""

    def __getitem__(self, index: Any) -> "Variation":
        """The clips that `index`, a slice or tensor, selects."""
        return Variation(*(getattr(self, field.name)[index] for field in fields(self)))


def sample_variation(n: int, generator: torch.Generator) -> Variation:
    """Random phases and small offsets of n clips, on the generator's device."""

    def sign(*shape: int) -> Tensor:
        return torch.randint(2, shape, generator=generator, device=generator.device) * 2.0 - 1.0

    turf = torch.cat([_uniform(-20, 20, (n, 2), generator), _uniform(-0.35, 0.35, (n, 1), generator)], dim=1)
    return Variation(
        motion_phase=_uniform(0, 1, (n,), generator),
        camera_phase=_uniform(0, 1, (n,), generator),
        yaw=_uniform(0.3, 0.65, (n, 3), generator) * sign(n, 3),
        side=sign(n, 1),
        light_azimuth=_uniform(0.55, 1.05, (n,), generator) * sign(n),
        height=_uniform(-0.035, 0.035, (n,), generator),
        turf=turf,
        waves=_uniform(0, 1, (n, 6), generator),
    )


# ------------------------------------------------------------------ the parameter table

_OBJECT_FIELDS = {"CENTRE": 3, "SCALE": 1, "COS": 1, "SIN": 1, "SHAPE": len(SHAPES), "COLOUR": 3}
_FIELDS = {
    "EYE": 3, "RIGHT": 3, "UP": 3, "FORWARD": 3,
    "LIGHT": 3, "KEY": 3, "AMBIENT_HIGH": 3, "AMBIENT_LOW": 3, "RIM": 3, "GROUND_KEY": 3, "GROUND_AMBIENT": 3,
    "SHADE": 1, "ZENITH": 3, "HORIZON": 3, "SKY": len(SKIES), "AURORA": 2,
    "GROUND": len(GROUNDS), "BOUNCE": 3, "TURF": 4, "WAVES": 4,
    "STRIPE": 3, "METAL": 1, "STRIPED": 1,
    "OBJECTS": 3 * sum(_OBJECT_FIELDS.values()),
}  # fmt: skip


def _offsets(widths: dict[str, int]) -> dict[str, int]:
    offsets, at = {}, 0
    for name, width in widths.items():
        offsets[name] = at
        at += width
    return offsets


_P = _offsets(_FIELDS)
_O = _offsets(_OBJECT_FIELDS)
_OBJECT_SIZE = sum(_OBJECT_FIELDS.values())
P = sum(_FIELDS.values())
"""Width of a row of parameters."""

FOCAL = 1.9
"""Distance of the picture plane in half heights of the picture: a field of view of 55 degrees."""

# Display-referred, squared for light. Saturated and far apart; black and white stop short of the ends to keep form.
_PALETTE = {
    "red": (0.88, 0.10, 0.12), "orange": (1.00, 0.47, 0.03), "yellow": (1.00, 0.86, 0.12),
    "green": (0.10, 0.66, 0.18), "teal": (0.05, 0.72, 0.70), "blue": (0.12, 0.28, 0.93),
    "purple": (0.56, 0.15, 0.74), "pink": (1.00, 0.47, 0.74), "white": (0.97, 0.97, 0.97),
    "black": (0.12, 0.12, 0.13),
}  # fmt: skip
_STRIPE, _STRIPE_ON_WHITE = (0.95, 0.95, 0.95), (0.24, 0.24, 0.27)


class _Sky(NamedTuple):
    zenith: tuple[float, float, float]  # display-referred
    horizon: tuple[float, float, float]  # display-referred
    key: tuple[float, float, float]
    ambient: tuple[float, float, float]
    bounce: tuple[float, float, float]
    ground_key: tuple[float, float, float]
    ground_ambient: tuple[float, float, float]
    rim: tuple[float, float, float]
    elevation: float  # of the key light, radians
    shade: float  # how dark a shadow is


# Objects are lit better than the ground at night: a colour must be readable under every sky.
_SKIES = {
    "day": _Sky((0.20, 0.46, 0.90), (0.80, 0.90, 0.98), (0.85, 0.82, 0.76), (0.27, 0.30, 0.35), (0.15, 0.14, 0.12),
                (0.76, 0.74, 0.69), (0.26, 0.29, 0.34), (0.10, 0.11, 0.13), 0.90, 1.0),
    "sunset": _Sky((0.34, 0.27, 0.55), (1.00, 0.63, 0.38), (0.92, 0.78, 0.64), (0.27, 0.25, 0.29), (0.15, 0.11, 0.10),
                   (1.05, 0.68, 0.43), (0.20, 0.16, 0.22), (0.40, 0.22, 0.10), 0.52, 1.0),
    "night": _Sky((0.03, 0.05, 0.17), (0.15, 0.21, 0.42), (0.72, 0.74, 0.80), (0.20, 0.22, 0.28), (0.10, 0.10, 0.12),
                  (0.24, 0.28, 0.39), (0.075, 0.09, 0.14), (0.16, 0.20, 0.32), 0.80, 0.9),
    "overcast": _Sky((0.55, 0.58, 0.63), (0.78, 0.80, 0.81), (0.44, 0.45, 0.46), (0.48, 0.49, 0.51), (0.24, 0.24, 0.24),
                     (0.24, 0.24, 0.24), (0.44, 0.45, 0.46), (0.06, 0.06, 0.06), 1.10, 0.75),
    "aurora": _Sky((0.02, 0.07, 0.14), (0.09, 0.25, 0.30), (0.68, 0.74, 0.72), (0.20, 0.25, 0.25), (0.09, 0.11, 0.11),
                   (0.24, 0.33, 0.31), (0.075, 0.11, 0.11), (0.10, 0.32, 0.22), 0.85, 0.9),
}  # fmt: skip
_GROUND_MEAN = {
    "grass": (0.16, 0.28, 0.05), "sand": (0.66, 0.45, 0.21), "snow": (0.62, 0.70, 0.84),
    "tiles": (0.35, 0.35, 0.34), "water": (0.06, 0.19, 0.30),
}  # fmt: skip

_BOTTOM = (0.95, 0.76, 0.89, 0.85, 0.929, 1.176, 0.95)  # how far below its centre each unit shape reaches
_COMPANION_SCALE = 0.55
_SIDE_X, _SIDE_Z, _FRONT, _BEHIND = 2.1, 0.1, (1.15, 1.75), (2.3, -2.2)

_PERIOD = {
    "spinning": 2.5, "bouncing": 1.0, "sliding": 3.0, "circling": 3.0, "pulsing": 1.3, "floating": 2.5,
    "orbiting": 6.0, "zooming": 5.0, "panning": 6.0, "rising": 6.0,
}  # fmt: skip
_WAVE_PERIODS = (2.4, 2.0, 1.5, 1.2)
_AURORA_PERIODS = (9.0, 13.0)


def _table(rows: Sequence[tuple[float, ...]], device: torch.device, *, display: bool = False) -> Tensor:
    table = torch.tensor(rows, device=device)
    return table.square() if display else table


def _turn(time: Tensor, period: float, phase: Tensor) -> Tensor:
    """Angle in [0, 2 pi), float32, of something periodic at float64 times: exact however long a stream is."""
    return (2 * math.pi * torch.frac(time / period + phase.double())).float()


def _place(scenes: Tensor, shown: Tensor, variation: Variation, j: int) -> Tensor:
    """Where companion j, 1 or 2, stands: float32 [N, 2], x and z, in scenes [N, A].

    In front and behind leave a side open; it is chosen so that two companions do not hide each other.
    """
    left, right, front = (RELATIONS.index(name) for name in ("left", "right", "front"))
    own, other = COLUMN[f"relation{j + 1}"], COLUMN[f"relation{4 - j}"]
    side = variation.side[:, 0] if j == 1 else -variation.side[:, 0]
    beside = scenes[:, other].where(shown[:, other], -1)
    side = torch.where(beside == left, 1.0, torch.where(beside == right, -1.0, side))
    relation = scenes[:, own]
    zero = torch.zeros_like(side)
    x = torch.where(relation == front, side * _FRONT[0], side * _BEHIND[0])
    z = torch.where(relation == front, zero + _FRONT[1], zero + _BEHIND[1])
    lateral = (relation == left) | (relation == right)
    x = torch.where(lateral, torch.where(relation == left, -_SIDE_X, _SIDE_X), x)
    return torch.stack([x, torch.where(lateral, zero + _SIDE_Z, z)], dim=1)


def clip_params(
    before: Tensor,
    after: Tensor,
    change_frame: Tensor,
    variation: Variation,
    frames: int,
    start_time: Tensor,
) -> Tensor:
    """Parameters of N clips, float32 [N, frames, P].

    before, after: scenes [N, A]. change_frame: [N], the frame at which the morph of 12 frames begins; at or beyond
    `frames` it never does, at or below -12 it is over. start_time: [N] seconds, absolute: a clip that begins where
    another of the same scene and variation ended continues it.
    """
    device, n = before.device, before.shape[0]
    index = torch.arange(frames, device=device, dtype=torch.float64)
    time = start_time.to(device, torch.float64)[:, None] + index / FPS
    change = change_frame.to(device, torch.float64)[:, None]
    progress = ((index - change) / MORPH_FRAMES).clamp(0, 1).float()
    progress = progress * progress * (3 - 2 * progress)

    # A companion that comes or goes keeps its own look while it grows or shrinks.
    shown_before, shown_after = active(before), active(after)
    before, after = torch.where(shown_before, before, after), torch.where(shown_after, after, before)

    def weights(name: str) -> Tensor:
        old, new = (
            torch.nn.functional.one_hot(s[:, COLUMN[name]], len(ATTRIBUTES[name])).float()[:, None]
            for s in (before, after)
        )
        return old + (new - old) * progress[..., None]

    def ramp(old: Tensor, new: Tensor) -> Tensor:
        return old.float()[:, None] + (new.float() - old.float())[:, None] * progress

    presence = [
        torch.ones_like(progress),
        ramp(shown_before[:, COLUMN["shape2"]], shown_after[:, COLUMN["shape2"]]),
        ramp(shown_before[:, COLUMN["shape3"]], shown_after[:, COLUMN["shape3"]]),
    ]
    company = presence[1]

    params = torch.empty(n, frames, P, device=device)

    def put(name: str, value: Tensor, base: int = 0, table: dict[str, int] = _P) -> None:
        at = base + table[name]
        params[..., at : at + value.shape[-1]] = value

    # ---- main object
    motion = dict(zip(MOTIONS, weights("motion").unbind(-1), strict=True))
    phase = variation.motion_phase[:, None]
    turn = {name: _turn(time, period, phase) for name, period in _PERIOD.items() if name in motion}
    pulse = 1 + 0.25 * motion["pulsing"] * torch.sin(turn["pulsing"])
    fall = turn["bouncing"] / (2 * math.pi)
    height = motion["bouncing"] * 5.0 * fall * (1 - fall)
    height = height + motion["floating"] * (0.80 + 0.20 * torch.sin(turn["floating"]))
    reach = 1.15 - 0.70 * company  # companions must not be run over
    circle = 0.85 - 0.40 * company
    circle = circle * motion["circling"]
    x = motion["sliding"] * reach * torch.sin(turn["sliding"]) + circle * torch.sin(turn["circling"])
    z = circle * torch.cos(turn["circling"])

    # Spinning is an angle, not an offset: the morph goes from one angle to the other the short way round.
    spins_before = (before[:, COLUMN["motion"]] == MOTIONS.index("spinning")).double()[:, None]
    spins_after = (after[:, COLUMN["motion"]] == MOTIONS.index("spinning")).double()[:, None]
    turns = time / _PERIOD["spinning"] + phase.double()
    middle = torch.where(change.abs() < 1e6, change, 0.0) + MORPH_FRAMES / 2
    turns_middle = (start_time.to(device, torch.float64)[:, None] + middle / FPS) / _PERIOD["spinning"] + phase.double()
    difference = spins_after - spins_before
    short = difference * turns - torch.round(difference * turns_middle)
    spin = (2 * math.pi * torch.frac(spins_before * turns + progress.double() * short)).float()

    bottom = torch.tensor(_BOTTOM, device=device)
    palette = _table([_PALETTE[name] for name in COLOURS], device, display=True)
    for j, suffix in enumerate(("", "2", "3")):
        base = _P["OBJECTS"] + j * _OBJECT_SIZE
        shape = weights("shape" + suffix)
        if j == 0:
            scale, yaw = pulse, spin + variation.yaw[:, :1]
            centre = torch.stack([x, shape @ bottom * scale + height, z], dim=-1)
        else:
            old, new = _place(before, shown_before, variation, j), _place(after, shown_after, variation, j)
            # From one place to another it shrinks away and grows again, rather than crossing the main object.
            moved = (old != new).any(dim=1)[:, None]
            scale = _COMPANION_SCALE * presence[j] * torch.where(moved, (1 - 2 * progress).square(), 1.0)
            place = old[:, None] + (new - old)[:, None] * progress[..., None]
            yaw = variation.yaw[:, j : j + 1].expand_as(progress)
            centre = torch.stack([place[..., 0], shape @ bottom * scale, place[..., 1]], dim=-1)
        put("CENTRE", centre, base, _O)
        put("SCALE", scale[..., None], base, _O)
        put("COS", torch.cos(yaw)[..., None], base, _O)
        put("SIN", torch.sin(yaw)[..., None], base, _O)
        put("SHAPE", shape, base, _O)
        put("COLOUR", weights("colour" + suffix) @ palette, base, _O)
    material = weights("material")
    put("METAL", material[..., 1:2])
    put("STRIPED", material[..., 2:3])
    stripes = [_STRIPE_ON_WHITE if name == "white" else _STRIPE for name in COLOURS]
    put("STRIPE", weights("colour") @ _table(stripes, device, display=True))

    # ---- sky and light
    sky = weights("sky")
    put("SKY", sky)

    def of_sky(field: str, *, display: bool = False) -> Tensor:
        return sky @ _table([getattr(_SKIES[name], field) for name in SKIES], device, display=display)

    elevation = (sky @ torch.tensor([_SKIES[name].elevation for name in SKIES], device=device))[..., None]
    azimuth = variation.light_azimuth[:, None, None].expand_as(elevation)
    light = torch.cat([
        torch.sin(azimuth) * torch.cos(elevation), torch.sin(elevation), torch.cos(azimuth) * torch.cos(elevation)
    ], dim=-1)  # fmt: skip
    put("LIGHT", light)
    put("ZENITH", of_sky("zenith", display=True))
    put("HORIZON", of_sky("horizon", display=True))
    put("KEY", of_sky("key"))
    put("AMBIENT_HIGH", of_sky("ambient"))
    put("RIM", of_sky("rim"))
    ground_key, ground_ambient = of_sky("ground_key"), of_sky("ground_ambient")
    put("GROUND_KEY", ground_key)
    put("GROUND_AMBIENT", ground_ambient)
    put("SHADE", (sky @ torch.tensor([_SKIES[name].shade for name in SKIES], device=device))[..., None])
    phases = [_turn(time, period, variation.waves[:, 4 + i : 5 + i]) for i, period in enumerate(_AURORA_PERIODS)]
    put("AURORA", torch.stack(phases, dim=-1))

    # ---- ground
    ground = weights("ground")
    put("GROUND", ground)
    bounce = (ground @ _table([_GROUND_MEAN[name] for name in GROUNDS], device)) * (
        ground_key * light[..., 1:2] + ground_ambient
    )
    put("BOUNCE", bounce)
    put("AMBIENT_LOW", of_sky("bounce") * 0.7 + bounce * 0.25)
    angle = variation.turf[:, 2]
    turf = torch.stack([torch.cos(angle), torch.sin(angle), variation.turf[:, 0], variation.turf[:, 1]], dim=-1)
    put("TURF", turf[:, None].expand(n, frames, 4))
    phases = [_turn(time, period, variation.waves[:, i : i + 1]) for i, period in enumerate(_WAVE_PERIODS)]
    put("WAVES", torch.stack(phases, dim=-1))

    # ---- camera
    camera = dict(zip(CAMERAS, weights("camera").unbind(-1), strict=True))
    phase = variation.camera_phase[:, None]
    sway = {name: torch.sin(_turn(time, _PERIOD[name], phase)) for name in CAMERAS if name != "static"}
    azimuth = camera["orbiting"] * sway["orbiting"] * math.radians(30) * (1 - 0.5 * company)
    elevation = (
        math.radians(21)
        + variation.height[:, None]
        + camera["rising"] * (math.radians(10.5) * sway["rising"] - math.radians(1.5))
    )
    distance = (5.7 + 0.95 * company) * (1 + camera["zooming"] * sway["zooming"] * (0.22 - 0.07 * company))
    yaw = camera["panning"] * sway["panning"] * (math.radians(8) - math.radians(2) * company)
    eye = torch.stack([
        distance * torch.cos(elevation) * torch.sin(azimuth),
        0.5 + distance * torch.sin(elevation),
        distance * torch.cos(elevation) * torch.cos(azimuth),
    ], dim=-1)  # fmt: skip
    pitch = torch.atan2(eye[..., 1] - 1.45, distance * torch.cos(elevation))
    heading = azimuth + yaw
    zero = torch.zeros_like(heading)
    put("EYE", eye)
    put("RIGHT", torch.stack([torch.cos(heading), zero, -torch.sin(heading)], dim=-1))
    up = [torch.sin(pitch) * -torch.sin(heading), torch.cos(pitch), torch.sin(pitch) * -torch.cos(heading)]
    put("UP", torch.stack(up, dim=-1))
    forward = [-torch.cos(pitch) * torch.sin(heading), -torch.sin(pitch), -torch.cos(pitch) * torch.cos(heading)]
    put("FORWARD", FOCAL * torch.stack(forward, dim=-1))
    return params


def without_objects(params: Tensor, first: int = 0) -> Tensor:
    """The same scenes [..., P] without the objects from `first` on: 0 leaves ground and sky, 1 the main object too."""
    bare = params.clone()
    for j in range(first, 3):
        bare[..., _P["OBJECTS"] + j * _OBJECT_SIZE + _O["SCALE"]] = 0
    return bare


# ------------------------------------------------------------------ rendering


def render(params: Tensor, size: int = SIZE) -> Tensor:
    """Frames, uint8 RGB [F, 3, size, size], of parameters [F, P], float32; by the kernel where they are on a GPU."""
    if params.is_cuda:
        return render_cuda(params, size)
    return render_reference(params, size)


def kernel_source() -> str:
    """CUDA C of the renderer, for NVRTC, nvcc or, without __CUDACC__, a C++ compiler."""
    defines = [f"#define P_{name} {offset}" for name, offset in _P.items()]
    defines += [f"#define O_{name} {offset}" for name, offset in _O.items()]
    defines += [f"#define P_COUNT {P}", f"#define O_SIZE {_OBJECT_SIZE}", f"#define FOCAL {FOCAL}f"]
    return "\n".join(defines) + "\n" + Path(__file__).with_suffix(".cu").read_text(encoding="utf-8")


@cache
def _kernel(device: int) -> Any:  # cupy is untyped
    import cupy  # type: ignore[import-not-found, import-untyped, unused-ignore]

    with cupy.cuda.Device(device):
        module = cupy.RawModule(code=kernel_source(), options=("--use_fast_math", "--std=c++17"), backend="nvrtc")
        return module.get_function("render_frames")


def render_cuda(params: Tensor, size: int = SIZE) -> Tensor:
    """`render` by the kernel of world.cu, on torch's current stream; compiled at the first call."""
    import cupy

    params = params.contiguous()
    out = torch.empty(params.shape[0], 3, size, size, dtype=torch.uint8, device=params.device)
    if params.shape[0] == 0:
        return out
    device = params.device.index
    kernel = _kernel(device)
    tiles = ((size + 15) // 16) ** 2
    with cupy.cuda.Device(device), cupy.cuda.ExternalStream(torch.cuda.current_stream(params.device).cuda_stream):
        arguments = (params.data_ptr(), out.data_ptr(), cupy.int32(size))
        kernel((params.shape[0], tiles), (256,), arguments)
    return out


_BOUND, _PENUMBRA, _HIT, _FAR = 1.28, 0.45, 0.002, 400.0
_MARCH_STEPS, _SHADOW_STEPS = 40, 24


class _V3(NamedTuple):
    """A vector per ray: float32 [R] each, or numbers where all rays share it."""

    x: Any
    y: Any
    z: Any

    def plus(self, b: "_V3") -> "_V3":
        return _V3(self.x + b.x, self.y + b.y, self.z + b.z)

    def minus(self, b: "_V3") -> "_V3":
        return _V3(self.x - b.x, self.y - b.y, self.z - b.z)

    def times(self, s: Any) -> "_V3":
        return _V3(self.x * s, self.y * s, self.z * s)

    def tinted(self, b: "_V3") -> "_V3":
        return _V3(self.x * b.x, self.y * b.y, self.z * b.z)

    def dot(self, b: "_V3") -> Any:
        return self.x * b.x + self.y * b.y + self.z * b.z

    def unit(self) -> "_V3":
        return self.times(1.0 / torch.sqrt(self.dot(self)))

    def mix(self, b: "_V3", s: Any) -> "_V3":
        return self.plus(b.minus(self).times(s))

    def at(self, index: Tensor) -> "_V3":
        return _V3(*(c[index] if isinstance(c, Tensor) else c for c in self))


def _smooth(low: float, high: float, x: Tensor) -> Tensor:
    s = ((x - low) / (high - low)).clamp(0, 1)
    return s * s * (3 - 2 * s)


def _hash(x: Tensor, y: Tensor) -> Tensor:
    mask = 0xFFFFFFFF
    h = (x * 374761393 + y * 668265263) & mask
    h = ((h ^ (h >> 13)) * 1274126177) & mask
    return ((h ^ (h >> 16)) >> 8).float() * (1.0 / 16777216.0)


def _noise(x: Tensor, y: Tensor) -> Tensor:
    fx, fy = x.floor(), y.floor()
    ix, iy, u, v = fx.long(), fy.long(), x - fx, y - fy
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    lower = torch.lerp(_hash(ix, iy), _hash(ix + 1, iy), u)
    upper = torch.lerp(_hash(ix, iy + 1), _hash(ix + 1, iy + 1), u)
    return torch.lerp(lower, upper, v)


def _box(q: _V3, hx: float, hy: float, hz: float) -> Tensor:
    a, b, c = q.x.abs() - hx, q.y.abs() - hy, q.z.abs() - hz
    outside: Tensor = torch.sqrt(a.clamp(min=0).square() + b.clamp(min=0).square() + c.clamp(min=0).square())
    inside: Tensor = a.maximum(b.maximum(c)).clamp(max=0)
    return outside + inside


class _Object:
    """One object of one frame; lengths inside are in object units."""

    def __init__(self, row: list[float]) -> None:
        self.centre = _V3(*row[_O["CENTRE"] : _O["CENTRE"] + 3])
        self.scale, self.cos, self.sin = row[_O["SCALE"]], row[_O["COS"]], row[_O["SIN"]]
        self.weights = row[_O["SHAPE"] : _O["SHAPE"] + len(SHAPES)]
        self.colour = _V3(*row[_O["COLOUR"] : _O["COLOUR"] + 3])

    def turn(self, d: _V3) -> _V3:
        return _V3(self.cos * d.x - self.sin * d.z, d.y, self.sin * d.x + self.cos * d.z)

    def place(self, p: _V3) -> _V3:
        return self.turn(p.minus(self.centre).times(1.0 / self.scale))

    def distance(self, q: _V3) -> Tensor:
        """Signed distance: the shapes' own, blended by weight; never more than the true one."""
        total: Tensor = torch.zeros_like(q.x)
        d: Tensor
        for name, weight in zip(SHAPES, self.weights, strict=True):
            if weight <= 0:
                continue
            radius = torch.sqrt(q.x * q.x + q.z * q.z)
            match name:
                case "sphere":
                    d = torch.sqrt(q.dot(q)) - 0.95
                case "cube":
                    d = _box(q, 0.72, 0.72, 0.72) - 0.04
                case "cylinder":
                    a, b = radius - 0.68, q.y.abs() - 0.86
                    d = torch.sqrt(a.clamp(min=0).square() + b.clamp(min=0).square()) + a.maximum(b).clamp(max=0) - 0.03
                case "cone":
                    d = (0.8944 * radius + 0.4472 * (q.y - 1.05)).maximum(-0.85 - q.y)
                case "ring":
                    y, z = 0.95534 * q.y - 0.29552 * q.z, 0.29552 * q.y + 0.95534 * q.z
                    a = torch.sqrt(q.x * q.x + y * y) - 0.70
                    d = torch.sqrt(a * a + z * z) - 0.26
                case "diamond":
                    d = (q.x.abs() + 0.85 * q.y.abs() + q.z.abs() - 1.0) * 0.60257
                case _:
                    a, b = _box(q, 0.92, 0.26, 0.26), _box(q, 0.26, 0.92, 0.26)
                    d = a.minimum(b).minimum(_box(q, 0.26, 0.26, 0.92)) - 0.03
            total = total + weight * d
        return total

    def march(self, origin: _V3, ray: _V3, limit: Tensor) -> Tensor:
        """Distance [R] along rays [R] to the object, or `limit` [R] where it is missed."""
        result = limit.clone()
        if self.scale < 0.01:
            return result
        p, d = self.place(origin), self.turn(ray)
        b = p.dot(d)
        disc = b * b - p.dot(p) + _BOUND * _BOUND
        alive = (disc > 0).nonzero().squeeze(1)
        b, disc, d = b[alive], disc[alive].sqrt(), d.at(alive)
        t, end = (-b - disc).clamp(min=0), (disc - b).minimum(limit[alive] / self.scale)
        for _ in range(_MARCH_STEPS):
            keep = (t < end).nonzero().squeeze(1)
            if keep.numel() == 0:
                break
            alive, d, t, end = alive[keep], d.at(keep), t[keep], end[keep]
            step = self.distance(p.plus(d.times(t)))
            hit = step < _HIT
            result[alive[hit]] = t[hit] * self.scale
            t = torch.where(hit, end, t + step)
        return result

    def shadow(self, origin: _V3, light: _V3) -> Tensor:
        """Share of the light that reaches points [R]."""
        result = torch.ones_like(origin.x)
        if self.scale < 0.01:
            return result
        p, d = self.place(origin), self.turn(light)
        b = p.dot(d)
        disc = b * b - p.dot(p) + (_BOUND + _PENUMBRA) ** 2
        alive = (disc > 0).nonzero().squeeze(1)
        b, disc, p = b[alive], disc[alive].sqrt(), p.at(alive)
        t, end, shade = (-b - disc).clamp(min=0.03), disc - b, torch.ones_like(b)
        for _ in range(_SHADOW_STEPS):
            running = t < end
            step = self.distance(p.plus(_V3(d.x * t, d.y * t, d.z * t)))
            shade = torch.where(running, shade.minimum(9.0 * step / t), shade)
            shade = torch.where(shade < 0.005, 0.0, shade)
            t = torch.where(running & (shade > 0), t + step.clamp(0.05, 0.35), end)
        result[alive] = shade * shade * (3 - 2 * shade)
        return result

    def contact(self, p: _V3) -> Tensor:
        """Ambient light left at ground points [R] by the nearness of the object."""
        result = torch.ones_like(p.x)
        if self.scale < 0.01:
            return result
        q = self.place(p)
        near = (q.dot(q) <= (_BOUND + 0.6) ** 2).nonzero().squeeze(1)
        q = _V3(q.x[near], q.y + torch.zeros_like(q.x[near]), q.z[near])
        result[near] = 1 - 0.6 * (1 - (self.distance(q) / 0.6).clamp(0, 1)).square()
        return result


class _Frame:
    """The torch twin of world.cu for one row of parameters; function by function the same arithmetic."""

    def __init__(self, row: list[float]) -> None:
        self._row = row
        start = _P["OBJECTS"]
        self.objects = [_Object(row[start + j * _OBJECT_SIZE : start + (j + 1) * _OBJECT_SIZE]) for j in range(3)]
        self.light = self.vector("LIGHT")

    def number(self, name: str) -> float:
        return self._row[_P[name]]

    def vector(self, name: str) -> _V3:
        return _V3(*self._row[_P[name] : _P[name] + 3])

    def list(self, name: str) -> list[float]:
        return self._row[_P[name] : _P[name] + _FIELDS[name]]

    def shadows(self, p: _V3) -> Tensor:
        a, b, c = (o.shadow(p, self.light) for o in self.objects)
        return a.minimum(b).minimum(c)

    def gradient(self, height: Tensor) -> _V3:
        s = 1 - (height * 2.2).clamp(0, 1)
        return self.vector("ZENITH").mix(self.vector("HORIZON"), s * s)

    def sky(self, d: _V3) -> _V3:
        c = self.gradient(d.y)
        w = self.list("SKY")
        depth = 1.0 / (-d.z).clamp(min=0.2)
        u, v = d.x * depth, (d.y * depth).clamp(min=0)
        rise = _smooth(0.0, 0.12, v)
        if w[0] + w[3] > 0:
            n = 0.65 * _noise(u * 5 + 40.3, v * 12 + 7.1) + 0.35 * _noise(u * 11 + 3.7, v * 25 + 90.2)
            c = c.mix(_V3(0.93, 0.95, 0.98), w[0] * rise * 0.85 * _smooth(0.48, 0.72, n))
            c = c.times(1 + w[3] * rise * (0.9 * n - 0.5))
        if w[1] > 0:
            r = torch.sqrt((u + 0.26).square() + (v - 0.13).square())
            glow = w[1] * 0.8 * rise * torch.exp(-9.0 * r * r)
            c = c.plus(_V3(0.75 * glow, 0.30 * glow, 0.06 * glow))
            c = c.mix(_V3(1.0, 0.86, 0.50), w[1] * _smooth(0.075, 0.060, r))
        starry = w[2] + 0.6 * w[4]
        if starry > 0:
            x, y = u * 13 + 50, v * 13 + 20
            fx, fy = x.floor(), y.floor()
            ix, iy = fx.long(), fy.long()
            a, b = x - fx - 0.25 - 0.5 * _hash(ix, iy), y - fy - 0.25 - 0.5 * _hash(ix + 31, iy)
            bright = (_hash(ix, iy + 57) - 0.55).clamp(min=0) * 1.6
            glow = starry * bright * torch.exp(-90.0 * (a * a + b * b))
            c = c.plus(_V3(0.9 * glow, 0.95 * glow, glow))
        if w[2] > 0:
            r = torch.sqrt((u - 0.30).square() + (v - 0.21).square())
            glow = w[2] * rise * torch.exp(-30.0 * r * r)
            c = c.plus(_V3(0.10 * glow, 0.13 * glow, 0.20 * glow))
            c = c.mix(_V3(0.93, 0.92, 0.82), w[2] * _smooth(0.070, 0.056, r))
        if w[4] > 0:
            p, q = self.list("AURORA")
            base = 0.09 + 0.035 * torch.sin(u * 5 + p) + 0.02 * torch.sin(u * 9 - q)
            up = v - base
            curtain = _smooth(-0.03, 0.03, up) * torch.exp(-8.0 * up.clamp(min=0))
            curtain = curtain * (0.65 + 0.35 * torch.sin(u * 17 + 2 * torch.sin(u * 4 + q) + 0.5 * p))
            tone = _V3(0.10, 0.85, 0.38).mix(_V3(0.50, 0.12, 0.62), (up * 4.5).clamp(0, 1))
            c = c.plus(tone.times(w[4] * curtain))
        return c

    def ground(self, origin: _V3, ray: _V3, t: Tensor, pixel: float) -> _V3:
        t = t.clamp(max=_FAR)
        p = _V3(origin.x + ray.x * t, 0.0, origin.z + ray.z * t)
        footprint: Tensor = t * pixel / (-ray.y).clamp(min=0.02)

        def fade(cell: float) -> Tensor:
            return 1 / (1 + (3 * footprint / cell).square())

        cos, sin, dx, dz = self.list("TURF")
        x, z = cos * p.x - sin * p.z + dx, sin * p.x + cos * p.z + dz
        w = self.list("GROUND")
        zero = torch.zeros_like(x)
        solid = _V3(zero, zero, zero)
        if w[0] > 0:
            n, m = _noise(x * 0.9, z * 0.9), _noise(x * 2.6 + 9, z * 2.6) - 0.5
            c = _V3(0.10, 0.22, 0.035).mix(_V3(0.22, 0.34, 0.06), 0.5 + (n - 0.5) * fade(1.1))
            solid = solid.plus(c.times(w[0] * (1 + 0.7 * m * fade(0.38))))
        if w[1] > 0:
            n = _noise(x * 0.55, z * 0.55) - 0.5
            wave = torch.sin(z * 5.5 + x * 1.6 + 6 * n) * fade(1.1)
            tone = w[1] * (1 + 0.20 * wave + 0.25 * n * fade(1.8))
            solid = solid.plus(_V3(0.66 * tone, 0.45 * tone, 0.21 * tone))
        if w[2] > 0:
            n, m = _noise(x * 0.5 + 3, z * 0.5), _noise(x * 1.3, z * 1.3 + 5) - 0.5
            c = _V3(0.44, 0.55, 0.76).mix(_V3(0.76, 0.82, 0.91), 0.5 + (_smooth(0.25, 0.75, n) - 0.5) * fade(2.0))
            solid = solid.plus(c.times(w[2] * (1 + 0.16 * m * fade(0.77))))
        if w[3] > 0:
            sharp = 0.28 / footprint
            a, b = (torch.sin(x * 2.618) * sharp).clamp(-1, 1), (torch.sin(z * 2.618) * sharp).clamp(-1, 1)
            solid = solid.plus(_V3(0.085, 0.095, 0.12).mix(_V3(0.62, 0.60, 0.56), 0.5 + 0.5 * a * b).times(w[3]))

        key, ambient = self.vector("GROUND_KEY"), self.vector("GROUND_AMBIENT")
        shade = 1 - self.number("SHADE") * (1 - self.shadows(_V3(p.x, zero, p.z)))
        near = self.objects[0].contact(p) * self.objects[1].contact(p) * self.objects[2].contact(p)
        direct = self.light.y * shade
        arriving = _V3(*(k * direct + a * near for k, a in zip(key, ambient, strict=True)))
        c = solid.tinted(arriving)
        if w[4] > 0:
            f = self.list("WAVES")
            a, b = torch.cos(2.1 * x + 1.2 * z + f[0]), torch.cos(-1.5 * x + 2.7 * z + f[1])
            d, e = torch.cos(4.6 * x + 2.0 * z + f[2]), torch.cos(-3.1 * x + 5.2 * z + f[3])
            slow, fast = 0.055 * 0.45 * fade(1.6), 0.012 * 0.45 * fade(0.9)
            nx = slow * (2.1 * a - 1.5 * b) + fast * (4.6 * d - 3.1 * e)
            nz = slow * (1.2 * a + 2.7 * b) + fast * (2.0 * d + 5.2 * e)
            normal = _V3(-nx, torch.ones_like(nx), -nz).unit()
            facing = (-ray.dot(normal)).clamp(min=0)
            mirror = ray.plus(normal.times(2 * facing))
            mirror = _V3(mirror.x, mirror.y.abs(), mirror.z)
            fresnel = 0.10 + 0.75 * (1 - facing).square().square()
            wet = _V3(0.016, 0.13, 0.22).tinted(key.plus(ambient)).mix(self.gradient(mirror.y), fresnel)
            glint = mirror.dot(_V3(-self.light.x, self.light.y, -self.light.z)).clamp(min=0)
            glint = 0.25 * glint.square().square().square()
            wet = wet.plus(_V3(key.x * glint, key.y * glint, key.z * glint))
            c = c.plus(wet.times(w[4] * (0.45 + 0.55 * shade) * (0.4 + 0.6 * near)))
        return self.vector("HORIZON").mix(c, torch.exp(-(t * (1.0 / 32.0)).square()))

    def surface(self, o: _Object, hero: bool, origin: _V3, ray: _V3, t: Tensor) -> _V3:
        p = origin.plus(ray.times(t))
        q = o.place(p)
        e = 0.004
        a, b = o.distance(q.plus(_V3(e, -e, -e))), o.distance(q.plus(_V3(-e, -e, e)))
        c, d = o.distance(q.plus(_V3(-e, e, -e))), o.distance(q.plus(_V3(e, e, e)))
        m = _V3(a - b - c + d, c + d - a - b, b + d - a - c).unit()
        n = _V3(o.cos * m.x + o.sin * m.z, m.y, o.cos * m.z - o.sin * m.x)

        base = o.colour
        if hero and self.number("STRIPED") > 0:
            band = torch.sin((0.42 * q.x + 0.86 * q.y + 0.28 * q.z) * 8.0 + 0.6)
            base = base.mix(self.vector("STRIPE"), self.number("STRIPED") * (0.5 + 4 * band).clamp(0, 1))
        half = 1 - 0.42 * (0.5 - q.x * 60).clamp(0, 1)
        base = _V3(base.x * half, base.y * half, base.z * half)

        lambert = n.dot(self.light)
        shade = torch.zeros_like(lambert)
        lit = (lambert > 0).nonzero().squeeze(1)
        shade[lit] = self.shadows(p.plus(n.times(0.03)).at(lit))
        shade = 1 - self.number("SHADE") * (1 - shade)
        corner = 1 - 0.45 * (1 - p.y * 2).clamp(0, 1) * (0.6 - 0.4 * n.y)
        key = self.vector("KEY")
        ambient = self.vector("AMBIENT_LOW").mix(self.vector("AMBIENT_HIGH"), 0.5 + 0.5 * n.y).times(corner)
        direct = 0.72 * lambert.clamp(min=0) * shade + 0.32 * (0.5 + 0.5 * lambert).square()
        arriving = _V3(key.x * direct, key.y * direct, key.z * direct).plus(ambient)
        colour = base.tinted(arriving)

        facing = (-n.dot(ray)).clamp(0, 1)
        edge = (1 - facing).square()
        if hero and self.number("METAL") > 0:
            bulge = m.plus(q.times(0.45)).unit()
            bulge = _V3(o.cos * bulge.x + o.sin * bulge.z, bulge.y, o.cos * bulge.z - o.sin * bulge.x)
            mirror = ray.minus(bulge.times(2 * bulge.dot(ray)))
            high, bounce = self.vector("AMBIENT_HIGH"), self.vector("BOUNCE")
            above = self.gradient(mirror.y).times(0.6).plus(high).plus(key.times(0.35))
            lamp = _smooth(0.22, 0.08, (mirror.x.abs() - 0.42).abs())
            above = above.times(1 + 0.9 * lamp - 0.6 * (mirror.y * 1.4).clamp(0, 1))
            dark = 0.08 + 0.45 * (mirror.y * -1.3).clamp(0, 1)
            below = _V3(*(dark * (0.5 * g + h + 0.25 * k) for g, h, k in zip(bounce, high, key, strict=True)))
            world = below.mix(above, _smooth(-0.04, 0.04, mirror.y))
            grey = (0.3 * world.x + 0.55 * world.y + 0.15 * world.z) * 0.75
            world = world.times(0.25).plus(_V3(grey, grey, grey))
            shine = mirror.dot(self.light).clamp(min=0)
            for _ in range(5):
                shine = shine.square()
            tint = base.times(0.95).plus(_V3(0.04, 0.04, 0.04))
            metal = tint.tinted(world.times(1.2).plus(arriving.times(0.12))).times(corner)
            metal = metal.plus(world.times(0.30 * edge * edge))
            metal = metal.plus(tint.times(0.7).plus(_V3(0.25, 0.25, 0.25)).tinted(key).times(1.7 * shine * shade))
            colour = colour.mix(metal, self.number("METAL"))
        glow = edge * (1 - facing) * (0.6 + 0.4 * n.y)
        rim = self.vector("RIM")
        return colour.plus(_V3(rim.x * glow, rim.y * glow, rim.z * glow))

    def trace(self, x: Tensor, y: Tensor, pixel: float) -> Tensor:
        """Display-referred colours 0..1, float32 [3, R], seen through points [R] of the picture."""
        right, up, forward, origin = (self.vector(name) for name in ("RIGHT", "UP", "FORWARD", "EYE"))
        ray = _V3(*(r * x + u * y + f for r, u, f in zip(right, up, forward, strict=True))).unit()
        t = torch.where(ray.y < -1e-4, -origin.y / ray.y, 1e9)
        below = t < 1e9
        seen = torch.full(t.shape, -1, device=t.device)
        for j, o in enumerate(self.objects):
            hit = o.march(origin, ray, t)
            seen = torch.where(hit < t, j, seen)
            t = hit
        out: Tensor = torch.empty(3, t.shape[0], device=t.device)

        def fill(index: Tensor, colour: _V3) -> None:
            for channel in range(3):
                out[channel, index] = colour[channel]

        for j, o in enumerate(self.objects):
            index = (seen == j).nonzero().squeeze(1)
            if index.numel():
                fill(index, self.surface(o, j == 0, origin, ray.at(index), t[index]))
        index = ((seen < 0) & below).nonzero().squeeze(1)
        if index.numel():
            fill(index, self.ground(origin, ray.at(index), t[index], pixel))
        index = ((seen < 0) & ~below).nonzero().squeeze(1)
        if index.numel():
            fill(index, self.sky(ray.at(index)))
        return out.clamp(0, 1).sqrt()


def render_reference(params: Tensor, size: int = SIZE) -> Tensor:
    """`render` in plain torch on any device, a frame at a time: 0.1 to 0.3 s a frame of 256 x 256 on one core."""
    device = params.device
    at = (torch.arange(2 * size, device=device) + 0.5) / size - 1
    y, x = torch.meshgrid(-at, at, indexing="ij")
    out = torch.empty(params.shape[0], 3, size, size, dtype=torch.uint8, device=device)
    for index, row in enumerate(params.float().tolist()):
        fine = _Frame(row).trace(x.flatten(), y.flatten(), 2.0 / (size * FOCAL)).view(3, size, 2, size, 2)
        out[index] = (fine.mean(dim=(2, 4)) * 255 + 0.5).to(torch.uint8)
    return out
