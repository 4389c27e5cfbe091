"""Few-step sampling of one chunk, as Self-Forcing does it: predict x0, add fresh noise, predict again."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Flow = Callable[[Tensor, float], Tensor]
"""(noisy latents, sigma) -> flow v = noise - x0, same shape."""


def to_x0(x: Tensor, v: Tensor, sigma: float) -> Tensor:
    """x0 = x_sigma - sigma v, for x_sigma = (1 - sigma) x0 + sigma noise."""
    return x - sigma * v


def few_step(flow: Flow, noise: Callable[[int], Tensor], sigmas: Sequence[float]) -> Tensor:
    """The clean latents of a chunk.

    Args:
        flow: the model as a function of noisy latents and noise level.
        noise: step index -> standard normal latents: the start for step 0, fresh noise for the others.
        sigmas: falling noise levels, one model call each; the first is 1, which is pure noise.
    """
    x = noise(0)
    for step, sigma in enumerate(sigmas):
        x0 = to_x0(x, flow(x, sigma), sigma)
        if step + 1 < len(sigmas):
            following = sigmas[step + 1]
            x = (1 - following) * x0 + following * noise(step + 1)
    return x0


def euler(flow: Flow, x: Tensor, sigmas: Sequence[float]) -> Tensor:
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
