"""The causal rollout: denoise a chunk against the cache, then commit it by a context pass."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.config import RolloutConfig
from engine.models.dit import TextContext
from engine.stream.batch import JoinedCaches
from engine.stream.kv_cache import KVCache
from engine.stream.sampler import chunk_noise, few_step
from engine.stream.steps import fewer

Cache = KVCache | JoinedCaches
Row = tuple[int, int]
"""Of a row of a batch: the stream's seed and the index of its chunk, which its noise is made of."""


class Transformer(Protocol):
    """What is rolled out: `CausalWan`, or another way through its weights, with the cache that belongs to it."""

    @property
    def patch_embedding(self) -> nn.Conv3d: ...

    def encode_text(self, text: Tensor) -> TextContext: ...

    def __call__(self, x: Tensor, t: Tensor, text: TextContext, cache: Any) -> Tensor:
        """The flow of x [B, C, F, H, W] at the noise levels t [B, F], times 1000."""

    def commit(self, x: Tensor, t: Tensor, text: TextContext, cache: Any) -> None:
        """Write the keys and values of x to the cache, as a call does, and nothing else."""


def forward(model: Transformer, x: Tensor, sigma: float, context: TextContext, cache: Cache) -> Tensor:
    """The flow of a chunk [B, C, F, H, W] at one noise level, K and V written to the chunk's slot of the cache."""
    return model(*_inputs(model, x, sigma), context, cache).float()


def _inputs(model: Transformer, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    t = torch.full((x.shape[0], x.shape[2]), sigma * 1000, device=x.device, dtype=torch.float32)
    return x.to(model.patch_embedding.weight.dtype), t


def denoise_chunk(
    model: Transformer,
    config: RolloutConfig,
    cache: Cache,
    context: TextContext,
    rows: Sequence[Row],
    *,
    steps: int | None = None,
) -> Tensor:
    """Clean latents float32 [B, C, F, H, W] of the chunks that the cache stands at.

    `steps` takes fewer than the configured steps.
    """
    shape = (config.latent_channels, config.chunk, config.latent_rows, config.latent_columns)

    def noise(step: int) -> Tensor:
        return torch.stack([chunk_noise(seed, chunk, step, shape, cache.device) for seed, chunk in rows])

    sigmas = config.first_sigmas if config.first_sigmas and not cache.written else config.sigmas
    if steps is not None:
        sigmas = fewer(sigmas, min(steps, len(sigmas)))
    return few_step(lambda x, sigma: forward(model, x, sigma, context, cache), noise, sigmas)


CONTEXT_STEP = 1000
"""Counter word of the context pass's noise, far from any sampling step."""


def commit_chunk(
    model: Transformer,
    config: RolloutConfig,
    cache: Cache,
    context: TextContext,
    latents: Tensor,
    rows: Sequence[Row],
    *,
    context_pass: bool = True,
) -> None:
    """The context pass: write the clean K and V that later chunks will see, and move the cache on.

    Without it, later chunks see what the last denoising step wrote: a fifth less work, from keys of noisy latents.
    """
    if not context_pass:
        cache.advance()
        return
    sigma = config.context_sigma
    if sigma > 0:
        shape = latents.shape[1:]
        noise = torch.stack([chunk_noise(*row, CONTEXT_STEP, shape, latents.device) for row in rows])
        latents = (1 - sigma) * latents + sigma * noise
    model.commit(*_inputs(model, latents, sigma), context, cache)
    cache.advance()
