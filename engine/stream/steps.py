"""Noise levels of the denoising steps: the shifted table of 1000 levels that Wan and Self-Forcing index into."""

from collections.abc import Sequence

TABLE_SIZE = 1000


def shifted_sigma(s: float, shift: float) -> float:
    """sigma = k s / (1 + (k - 1) s) for s in [0, 1] and shift k; above 1, more steps are at high noise."""
    return shift * s / (1 + (shift - 1) * s)


def step_sigmas(steps: Sequence[int], shift: float) -> tuple[float, ...]:
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


def fewer(sigmas: Sequence[float], count: int) -> tuple[float, ...]:
    """`count` of the noise levels, evenly spaced, with the noisiest: of four levels at shift 5, two are 1 and 0.833.

    Raises:
        ValueError: count is not between 1 and the number of levels.
    """
    if not 1 <= count <= len(sigmas):
        raise ValueError(f"a schedule of {len(sigmas)} steps has 1 to {len(sigmas)}, got {count}")
    return tuple(sigmas[i * len(sigmas) // count] for i in range(count))
