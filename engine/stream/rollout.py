"""The causal rollout: denoise a chunk against the cache, then commit it by a context pass."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine.config import RolloutConfig
from engine.models.dit import TextContext
from engine.stream.batch import RollingCache
from engine.stream.sampler import SAMPLERS, chunk_noise

NoiseKey = tuple[int, int]
"""Seed of a stream and index of its chunk: what the noise of a row of a batch is a function of."""


class Transformer(Protocol):
    """What the rollout runs: `CausalWan`, or a transform of it. Each takes the kind of cache that belongs to it.

    x is [B, C, F, H, W]; t is [B, F], noise levels times 1000.
    """

    @property
    def patch_embedding(self) -> nn.Conv3d: ...

    def encode_text(self, text: Tensor) -> TextContext:
        """The context of text [G, L, text_dim], whose padding positions are zero."""

    def __call__(self, x: Tensor, t: Tensor, text: TextContext, cache: Any) -> Tensor:
        """The flow of x, in x's shape: `begin`, then `finish`. The next call may overwrite it."""

    def begin(self, x: Tensor, t: Tensor, text: TextContext, cache: Any) -> Any:
        """The part of a forward in which all keys and values of x are written to the cache."""

    def finish(self, begun: Any, text: TextContext, cache: Any) -> Tensor:
        """The flow, from what `begin` returned; once per `begin`."""

    def commit(self, x: Tensor, t: Tensor, text: TextContext, cache: Any) -> None:
        """Write the keys and values of x to the cache, and compute no flow."""

    def refresh(self) -> None:
        """Update what is kept beside the model's weights, which have changed. Streams' contexts and caches are not."""

    def prepare(self, cache: Any) -> bool:
        """Do ahead what the first forwards on this cache would do, and reset it; false where that is nothing.

        Call it after a stream has run on another cache, which gives the shapes.
        """


def forward(model: Transformer, x: Tensor, sigma: float, context: TextContext, cache: RollingCache) -> Tensor:
    """The float32 flow of a chunk x [B, C, F, H, W]; K and V are written to the chunk's slot.

    Args:
        sigma: the noise level that the model is told.
    """
    return model(*_inputs(model, x, sigma), context, cache).float()


def _inputs(model: Transformer, x: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
    t = torch.full((x.shape[0], x.shape[2]), sigma * 1000, device=x.device, dtype=torch.float32)
    return x.to(model.patch_embedding.weight.dtype), t


def denoise_chunk(
    model: Transformer,
    config: RolloutConfig,
    cache: RollingCache,
    context: TextContext,
    rows: Sequence[NoiseKey],
    *,
    steps: int | None = None,
) -> Tensor:
    """Clean latents float32 [B, C, F, H, W] of the chunks that the cache is at.

    Args:
        rows: one entry per row of the batch.
        steps: take the schedule of so many steps, if it is shorter; None takes the configured one.
    """
    shape = (config.latent_channels, config.chunk, config.latent_rows, config.latent_columns)

    def noise(step: int) -> Tensor:
        return torch.stack([chunk_noise(seed, chunk, step, shape, cache.device) for seed, chunk in rows])

    schedule = config.first_schedule if config.first_schedule and not cache.written else config.schedule
    sample = SAMPLERS[config.sampler]
    return sample(lambda x, level: forward(model, x, level.told, context, cache), noise, schedule.of(steps))


CONTEXT_STEP = 1000
"""Stands for the step in the noise of the context pass; no sampling step has so high a number."""


def commit_chunk(
    model: Transformer,
    config: RolloutConfig,
    cache: RollingCache,
    context: TextContext,
    latents: Tensor,
    rows: Sequence[NoiseKey],
    *,
    context_pass: bool = True,
) -> None:
    """The context pass: write the K and V of clean latents, which later chunks attend to, and advance the cache.

    With `context_pass` false, later chunks attend to what the last denoising step wrote: a fifth less work, but keys of
    noisy latents.
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
