import subprocess
import sys
from dataclasses import replace

import pytest
from diffusers import AutoencoderKLWan

from engine.config import DIT_1_3B, DIT_5B, DIT_14B, MINI, PRESETS
from engine.stream.steps import step_sigmas


def timesteps(steps: tuple[int, ...], shift: float) -> list[float]:
    return [round(1000 * sigma, 2) for sigma in step_sigmas(steps, shift)]


@pytest.mark.parametrize(
    ("steps", "shift", "expected"),
    [
        ((1000, 750, 500, 250), 5.0, [1000, 937.5, 833.33, 625]),
        ((1000, 750, 500, 250), 8.0, [1000, 960, 888.89, 727.27]),  # what a wrong shift would give
        ((1000, 800, 600, 400, 200), 5.0, [1000, 952.38, 882.35, 769.23, 555.56]),  # Rolling Forcing
    ],
)
def test_tables(steps: tuple[int, ...], shift: float, expected: list[float]) -> None:
    assert timesteps(steps, shift) == expected


@pytest.mark.parametrize(
    ("name", "first", "later"),
    [
        ("self-forcing-1.3b", [1000, 937.5, 833.33, 625], [1000, 937.5, 833.33, 625]),
        ("causal-forcing-1.3b", [1000, 937.5, 833.33, 625], [1000, 937.5, 833.33, 625]),
        ("causal-forcing-1.3b-2step", [1000, 937.5, 833.33, 625], [1000, 833.33]),
        ("causal-forcing-1.3b-1step", [1000, 937.5, 833.33, 625], [1000]),
        ("causal-forcing-1.3b-framewise", [1000, 937.5, 833.33, 625], [1000, 937.5, 833.33, 625]),
        ("longlive-1.3b", [1000, 937.5, 833.33, 625], [1000, 937.5, 833.33, 625]),
        ("krea-14b", [1000, 937.5, 833.33, 625, 4.98], [1000, 937.5, 833.33, 625, 4.98]),
        ("krea-14b-4step", [1000, 908.84, 713.98, 4.98], [1000, 908.84, 713.98, 4.98]),
        ("ti2v-5b", [999.8, 937.27, 833.06, 624.69], [999.8, 937.27, 833.06, 624.69]),
    ],
)
def test_timesteps_of_the_presets(name: str, first: list[float], later: list[float]) -> None:
    preset = PRESETS[name]
    assert [round(1000 * sigma, 2) for sigma in preset.first_sigmas] == first
    assert [round(1000 * sigma, 2) for sigma in preset.sigmas] == later


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_every_preset_is_consistent(preset) -> None:  # type: ignore[no-untyped-def]
    _, ph, pw = preset.dit.patch
    assert preset.width % (preset.spatial_stride * pw) == 0
    assert preset.height % (preset.spatial_stride * ph) == 0
    assert preset.cache().window >= preset.chunk + preset.sink
    assert preset.rollout().latent_channels == preset.dit.in_channels == preset.vae.latent_channels
    assert preset.text.dim == preset.dit.text_dim
    assert preset.temporal_stride == 4
    if preset is not MINI:
        assert preset.dit.head_dim == 128
        assert preset.context_sigma == 0
        assert len(preset.statistics.mean) == len(preset.statistics.std) == preset.dit.in_channels
        assert preset.light_vae.latent_channels == preset.dit.in_channels
        assert preset.spatial_stride == preset.vae.spatial_stride
        assert preset.text.length == 512


def test_geometry() -> None:
    small, large = PRESETS["longlive-1.3b"], PRESETS["ti2v-5b"]
    assert (small.dit, small.window, small.sink, small.latent_rows, small.latent_columns) == (DIT_1_3B, 12, 3, 60, 104)
    assert small.cache().rows * small.cache().columns == 1560
    assert (large.dit, large.latent_rows, large.latent_columns, large.fps) == (DIT_5B, 44, 80, 24)
    assert large.cache().rows * large.cache().columns == 880
    assert PRESETS["krea-14b"].dit == DIT_14B
    assert (small.first_chunk_frames, small.chunk_frames) == (9, 12)


def test_a_frame_wise_preset_makes_four_frames_a_chunk() -> None:
    for name in ("causal-forcing-1.3b-framewise", "causal-forcing-1.3b-2step", "causal-forcing-1.3b-1step"):
        preset = PRESETS[name]
        assert (preset.first_chunk_frames, preset.chunk_frames, preset.window) == (1, 4, 21)


def test_rules_that_cannot_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="recomputed has no sink"):
        replace(PRESETS["longlive-1.3b"], context="recompute")
    with pytest.raises(ValueError, match="absolute sink"):
        replace(PRESETS["ti2v-5b"], turn_sink=True)
    with pytest.raises(ValueError, match="two past chunks"):
        replace(PRESETS["ti2v-5b"], window=24)


def test_latent_statistics_are_those_of_diffusers() -> None:
    import inspect

    defaults = inspect.signature(AutoencoderKLWan.__init__).parameters
    preset = PRESETS["self-forcing-1.3b"]
    assert preset.statistics.mean == tuple(defaults["latents_mean"].default)
    assert preset.statistics.std == tuple(defaults["latents_std"].default)


def test_presets_are_read_without_torch() -> None:
    code = "import sys, engine.config; sys.exit(int('torch' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
