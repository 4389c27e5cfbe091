"""Noise levels of configured steps."""

import pytest

from engine.stream.steps import Schedule, fewer, shifted_sigma, spaced, step_levels, step_sigmas, unipc_steps


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


@pytest.mark.parametrize(
    ("count", "expected"),
    [(5, [1000, 937.5, 833.33, 625, 0]), (4, [1000, 908.84, 713.98, 0]), (3, [1000, 833.33, 0]), (1, [1000])],
)
def test_kreas_schedules_end_clean_on_the_tables_last_noise(count: int, expected: list[float]) -> None:
    """linspace(1000, 0, n) cut to integers, looked up in the table of shift 5, padded with 0."""
    levels = step_levels(spaced(count), 5)
    assert [round(1000 * level.told, 2) for level in levels] == expected
    if count > 1:
        assert levels[-1].sigma == pytest.approx(0.0049801, abs=1e-7)
    assert all(level.sigma == level.told for level in levels[: -1 if count > 1 else None])


def test_unipc_levels_and_the_whole_timesteps_that_the_network_is_told() -> None:
    levels = step_levels(unipc_steps(4), 5, whole=True)
    assert [level.sigma for level in levels] == pytest.approx([0.9998, 0.9373, 0.8331, 0.6247], abs=5e-5)
    assert [round(1000 * level.told, 6) for level in levels] == [999, 937, 833, 624]


def test_a_schedule_has_its_own_shorter_ones_or_chooses_among_its_levels() -> None:
    chosen = Schedule(step_levels([1000, 750, 500, 250], 5))
    assert chosen.of(2) == fewer(chosen.levels, 2)
    own = Schedule(step_levels(spaced(3), 5), tuple(step_levels(spaced(n), 5) for n in (1, 2)))
    assert own.of(2) == step_levels(spaced(2), 5) != fewer(own.levels, 2)
    assert own.of(None) == own.of(3) == own.of(9) == own.levels
    for schedule in (chosen, own):
        with pytest.raises(ValueError, match="steps has 1 to"):
            schedule.of(0)
