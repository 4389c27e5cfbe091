"""Few-step samplers of one chunk: how clean latents are made of noise by a few calls of the model."""

from collections.abc import Callable, Sequence
from math import expm1, log

import numpy as np
import torch
from torch import Tensor

from engine.config import Sampler
from engine.stream.steps import Level

Flow = Callable[[Tensor, Level], Tensor]
"""(noisy latents, their noise level) -> flow v = noise - x0, same shape."""
Noise = Callable[[int], Tensor]
"""Step index -> standard normal latents: the start for step 0, fresh noise for the others."""


def to_x0(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """x0 = x_sigma - sigma v, for x_sigma = (1 - sigma) x0 + sigma noise."""
    return x - sigma * v


def renoise(flow: Flow, noise: Noise, levels: Sequence[Level]) -> Tensor:
    """The clean latents of a chunk as Self-Forcing makes them: predict x0, add fresh noise of the next level to it.

    Args:
        flow: the model as a function of noisy latents and noise level.
        levels: falling, one model call each; the first is about 1, which is pure noise.
    """
    x = noise(0)
    for step, level in enumerate(levels):
        x0 = to_x0(x, flow(x, level), level.sigma)
        if step + 1 < len(levels):
            following = levels[step + 1].sigma
            x = (1 - following) * x0 + following * noise(step + 1)
    return x0


def unipc(flow: Flow, noise: Noise, levels: Sequence[Level]) -> Tensor:
    """The clean latents of a chunk by UniPC of order 2 in the variant B2, which predicts x0 and adds no noise.

    A predictor steps to the next level by the predictions so far; the prediction there then corrects that step. The
    last level, before 0, is of order 1: its prediction is the result. Arguments as in `renoise`; the first level must
    be below 1.

    Source: Zhao et al., UniPC (arXiv 2302.04867), algorithms 1 and 2, with alpha = 1 - sigma and
    lambda = log(alpha / sigma).
    """
    x = noise(0)
    past: list[tuple[float, Tensor]] = []  # lambda and predicted x0 of the steps so far
    carried = torch.zeros_like(x)  # what the last step kept of its noisy latents
    for step, level in enumerate(levels):
        sigma = level.sigma
        alpha, here = 1 - sigma, log((1 - sigma) / sigma)
        x0 = to_x0(x, flow(x, level), sigma)
        if step + 1 == len(levels):
            break
        if past:  # the corrector; of order 2 once two predictions lie before this one
            h = here - past[-1][0]
            change, weight = 0.5 * (x0 - past[-1][1]), expm1(-h)
            if len(past) > 1:
                b1 = -1 / h - 1 / weight
                b2 = -2 * b1 / h - 1 / weight
                ratio = (past[-2][0] - past[-1][0]) / h
                rho = (b1 - b2) / (1 - ratio)
                change = rho / ratio * (past[-2][1] - past[-1][1]) + (b1 - rho) * (x0 - past[-1][1])
            x = carried - alpha * weight * (past[-1][1] + change)
        following = levels[step + 1].sigma
        h = log((1 - following) / following) - here
        change = 0.5 * h / (past[-1][0] - here) * (past[-1][1] - x0) if past else torch.zeros_like(x)
        carried = following / sigma * x
        x = carried - (1 - following) * expm1(-h) * (x0 + change)
        past = [*past[-1:], (here, x0)]
    return x0


SAMPLERS: dict[Sampler, Callable[[Flow, Noise, Sequence[Level]], Tensor]] = {"renoise": renoise, "unipc": unipc}


def euler(flow: Callable[[Tensor, float], Tensor], x: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Solve dx/dsigma = v from sigmas[0] to 0 by Euler steps, as a teacher is sampled."""
    for sigma, following in zip(sigmas, [*sigmas[1:], 0.0], strict=True):
        x = x + (following - sigma) * flow(x, sigma)
    return x


def chunk_noise(
    seed: int,
    chunk: int,
    step: int,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Standard normal noise as a function of (seed, chunk, step) alone, the same on every machine.

    The generator is Philox, which is counter-based: the seed is its key, chunk and step the high words of its counter.
    So any chunk can be generated again without those before it.
    """
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, step, chunk]))
    values = torch.from_numpy(generator.standard_normal(tuple(shape), dtype=np.float32))
    if torch.device(device).type == "cuda":
        values = values.pin_memory()  # copying from pageable memory would block until the GPU is idle
    return values.to(device=device, dtype=dtype, non_blocking=True)
