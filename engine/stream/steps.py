"""Noise levels of the denoising steps: the shifted table of 1000 levels that Wan and Self-Forcing index into."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

TABLE_SIZE = 1000
T = TypeVar("T")


class Level(NamedTuple):
    """A noise level of a denoising step."""

    sigma: float
    told: float
    """The level that the network is told: its timestep is 1000 times this. Some families round it."""


def shifted_sigma(s: float, shift: float) -> float:
    """sigma = k s / (1 + (k - 1) s) for s in [0, 1] and shift k; above 1, more steps are at high noise."""
    return shift * s / (1 + (shift - 1) * s)


def step_sigmas(steps: Sequence[float], shift: float) -> tuple[float, ...]:
    """Noise levels of step indices into the table, as Self-Forcing's configurations give them.

    Index 1000 is the noisiest entry of the table, 0 is clean: [1000, 750, 500, 250] at shift 5 gives timesteps 1000,
    937.5, 833.33 and 625 (guandeh17/Self-Forcing, `configs/self_forcing_dmd.yaml`, `warp_denoising_step`).

    Raises:
        ValueError: the steps do not fall strictly, or are not within (0, 1000].
    """
    if (
        not steps
        or any(not 0 < step <= TABLE_SIZE for step in steps)
        or list(steps) != sorted(set(steps), reverse=True)
    ):
        raise ValueError(f"steps must fall strictly within (0, {TABLE_SIZE}], got {list(steps)}")
    return tuple(shifted_sigma(step / TABLE_SIZE, shift) for step in steps)


def step_levels(steps: Sequence[float], shift: float, *, whole: bool = False) -> tuple[Level, ...]:
    """Noise levels of step indices; a last index of 0 may follow, which is told as clean.

    The latents of that step are at the table's last level, 1 / 1000 before the shift: the table of 1000 timesteps is
    padded with a 0, and noise is looked up by the nearest entry (krea-ai/realtime-video, `release_server.py`).

    Args:
        whole: cut timesteps to whole numbers before the network is told them, as diffusers' UniPC does.

    Raises:
        ValueError: see `step_sigmas`.
    """
    ends_clean = len(steps) > 1 and steps[-1] == 0
    sigmas = step_sigmas(steps[:-1] if ends_clean else steps, shift)
    levels = [Level(sigma, int(1000 * sigma) / 1000 if whole else sigma) for sigma in sigmas]
    return (*levels, *([Level(shifted_sigma(1 / TABLE_SIZE, shift), 0.0)] if ends_clean else []))


def spaced(count: int) -> tuple[int, ...]:
    """`count` step indices from 1000 to 0, evenly spaced and cut to whole numbers, as Krea's server chooses them."""
    return tuple(TABLE_SIZE - -(-TABLE_SIZE * i // max(count - 1, 1)) for i in range(count))


def unipc_steps(count: int) -> tuple[float, ...]:
    """`count` step indices for `unipc`, from 999 evenly towards 0, as LongLive 2.0's `inference.yaml` has them."""
    return tuple((TABLE_SIZE - 1) * (count - i) / count for i in range(count))


@dataclass(frozen=True)
class Schedule:
    """The noise levels of a chunk's denoising steps, falling, and those of fewer steps."""

    levels: tuple[Level, ...]
    shorter: tuple[tuple[Level, ...], ...] = ()
    """The schedules of 1, 2, ... steps, where they are not chosen among `levels`."""

    def of(self, count: int | None) -> tuple[Level, ...]:
        """The levels for `count` steps, or for all of them where that is None or more than there are.

        Raises:
            ValueError: count is below 1.
        """
        if count is None or count >= len(self.levels):
            return self.levels
        if self.shorter and count >= 1:
            return self.shorter[count - 1]
        return fewer(self.levels, count)


def fewer(levels: Sequence[T], count: int) -> tuple[T, ...]:
    """`count` of the noise levels, evenly spaced, with the noisiest: of four levels at shift 5, two are 1 and 0.833.

    Raises:
        ValueError: count is not between 1 and the number of levels.
    """
    if not 1 <= count <= len(levels):
        raise ValueError(f"a schedule of {len(levels)} steps has 1 to {len(levels)}, got {count}")
    return tuple(levels[i * len(levels) // count] for i in range(count))
