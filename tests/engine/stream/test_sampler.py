import math

import pytest
import torch

from engine.stream.sampler import chunk_noise, euler, few_step, to_x0


def test_few_step_recovers_a_known_x0() -> None:
    """With the true flow of one clean sample, any schedule ends exactly on it."""
    clean = torch.randn(2, 3, 4)

    def flow(x: torch.Tensor, sigma: float) -> torch.Tensor:
        return (x - clean) / sigma

    out = few_step(flow, lambda step: torch.randn_like(clean), [1.0, 0.75, 0.4])
    assert torch.allclose(out, clean, atol=1e-5)
    assert torch.allclose(to_x0(clean + 0.3 * clean, clean, 0.3), clean)


def test_few_step_adds_fresh_noise_of_the_next_level() -> None:
    seen = []

    def flow(x: torch.Tensor, sigma: float) -> torch.Tensor:
        seen.append((sigma, x.clone()))
        return x / sigma  # x0 is zero

    few_step(flow, lambda step: torch.full((1,), float(step + 1)), [1.0, 0.5])
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
