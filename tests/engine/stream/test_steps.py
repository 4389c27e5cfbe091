"""Noise levels of configured steps."""

import pytest

from engine.stream.steps import fewer, shifted_sigma, step_sigmas


def test_self_forcing_timesteps_at_shift_5() -> None:
    timesteps = [1000 * sigma for sigma in step_sigmas([1000, 750, 500, 250], 5)]
    assert timesteps == pytest.approx([1000, 937.5, 833.3333, 625], abs=1e-3)


def test_gui_demo_timesteps_at_shift_8() -> None:
    timesteps = [1000 * sigma for sigma in step_sigmas([1000, 750, 500, 250], 8)]
    assert timesteps == pytest.approx([1000, 960, 888.89, 727.27], abs=1e-2)


@pytest.mark.parametrize("steps", [[], [500, 1000], [1000, 1000], [1000, 0], [1500]])
def test_bad_steps_are_refused(steps: list[int]) -> None:
    with pytest.raises(ValueError, match="steps"):
        step_sigmas(steps, 3)


def test_shift_is_monotone_and_keeps_the_ends() -> None:
    values = [shifted_sigma(i / 10, 3) for i in range(11)]
    assert values[0] == 0 and values[-1] == 1 and values == sorted(values)


def test_fewer_steps_are_spread_evenly_and_keep_the_noisiest() -> None:
    sigmas = step_sigmas([1000, 750, 500, 250], 5)
    assert fewer(sigmas, 2) == (sigmas[0], sigmas[2])
    assert fewer(sigmas, 4) == sigmas
    for count in (0, 5):
        with pytest.raises(ValueError, match="1 to 4"):
            fewer(sigmas, count)
