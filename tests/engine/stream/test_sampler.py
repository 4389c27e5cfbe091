import math
from collections.abc import Callable

import pytest
import torch
from diffusers import UniPCMultistepScheduler

from engine.stream.sampler import SAMPLERS, chunk_noise, euler, renoise, to_x0, unipc
from engine.stream.steps import Level, step_levels, unipc_steps

Sampling = Callable[..., torch.Tensor]


def levels(*sigmas: float) -> list[Level]:
    return [Level(sigma, sigma) for sigma in sigmas]


@pytest.mark.parametrize("sample", SAMPLERS.values(), ids=SAMPLERS)
def test_a_sampler_recovers_a_known_x0(sample: Sampling) -> None:
    """With the true flow of one clean sample, any schedule ends exactly on it."""
    clean = torch.randn(2, 3, 4)

    def flow(x: torch.Tensor, level: Level) -> torch.Tensor:
        return (x - clean) / level.sigma

    out = sample(flow, lambda step: torch.randn_like(clean), levels(0.999, 0.75, 0.4))
    assert torch.allclose(out, clean, atol=1e-5)
    assert torch.allclose(to_x0(clean + 0.3 * clean, clean, 0.3), clean)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_unipc_is_that_of_diffusers(count: int) -> None:
    """Given the same sigmas, for a flow that is not straight; the noise after the first is never asked for."""
    table = step_levels(unipc_steps(count), 5.0, whole=True)
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2", flow_shift=5.0
    )
    scheduler.set_timesteps(count)
    scheduler.sigmas = torch.tensor([*(level.sigma for level in table), 0.0], dtype=torch.float64)
    scheduler.timesteps = torch.arange(count)
    start = torch.randn(2, 50, dtype=torch.float64)

    def flow(x: torch.Tensor, level: Level) -> torch.Tensor:
        return torch.sin(3 * x) + x * level.told

    x = start
    for t, level in zip(scheduler.timesteps, table, strict=True):
        x = scheduler.step(flow(x, level), t, x).prev_sample
    found = unipc(flow, lambda step: {0: start}[step], table)
    assert torch.allclose(found, x, rtol=1e-9, atol=1e-9)


def test_renoise_adds_fresh_noise_of_the_next_level() -> None:
    seen = []

    def flow(x: torch.Tensor, level: Level) -> torch.Tensor:
        seen.append((level.sigma, x.clone()))
        return x / level.sigma  # x0 is zero

    renoise(flow, lambda step: torch.full((1,), float(step + 1)), levels(1.0, 0.5))
    assert [(s, float(x)) for s, x in seen] == [(1.0, 1.0), (0.5, 1.0)]


def test_euler_solves_a_straight_flow_in_one_step() -> None:
    noise, clean = torch.randn(5), torch.randn(5)
    assert torch.allclose(euler(lambda x, sigma: noise - clean, noise, [1.0]), clean, atol=1e-6)


def test_noise_is_a_function_of_seed_chunk_and_step() -> None:
    shape = (16, 3, 8, 8)
    base = chunk_noise(7, 3, 1, shape)
    assert torch.equal(base, chunk_noise(7, 3, 1, shape))
    others = [chunk_noise(8, 3, 1, shape), chunk_noise(7, 4, 1, shape), chunk_noise(7, 3, 0, shape)]
    for other in others:
        correlation = float((base * other).mean())
        assert abs(correlation) < 5 / math.sqrt(base.numel())
    assert abs(float(base.mean())) < 0.1 and abs(float(base.std()) - 1) < 0.05
    assert chunk_noise(2**63 - 1, 2**40, 0, (2,)).isfinite().all()


def test_noise_never_changes() -> None:
    """The same numbers on every machine and in every version: a seed names a video."""
    values = chunk_noise(42, 5, 1, (3,)).tolist()
    assert values == pytest.approx([-0.05879, 0.313883, 0.223249], abs=1e-5)
