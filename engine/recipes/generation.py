"""Batched generation with the cache, the sampler and the transitions that serve: many streams in step.

Evaluation reads what it draws, and distillation trains on contexts that come from it. `engine.pipeline` does the same
for one stream at a time; its noise is a function of (seed, chunk, step), here it comes from one generator.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from engine.config import Preset
from engine.models.dit import CausalWan, TextContext
from engine.models.text_encoder import TextEncoder
from engine.stream.kv_cache import KVCache
from engine.stream.rollout import forward
from engine.stream.sampler import euler, renoise
from engine.stream.steps import Level


def null_ids(preset: Preset, device: torch.device) -> Tensor:
    """Token ids int64 [length] of the empty prompt: an end token alone."""
    ids = torch.zeros(preset.text.length, dtype=torch.long, device=device)
    ids[0] = 1
    return ids


class Generator:
    """A model, how it is sampled, and the noise that it draws from."""

    def __init__(
        self,
        dit: CausalWan,
        text: TextEncoder,
        preset: Preset,
        seed: int,
        sigmas: Sequence[float] | None = None,
        guidance: float = 1.0,
    ) -> None:
        """`sigmas`: noise levels, the preset's if None. `guidance` above 1 solves the flow by Euler steps with a null
        prompt beside; 1 is few-step sampling."""
        self.dit, self.text, self.preset, self.guidance = dit, text, preset, guidance
        self.sigmas = preset.sigmas if sigmas is None else sigmas
        self.device: torch.device = dit.patch_embedding.weight.device
        self.random = torch.Generator(self.device).manual_seed(seed)

    def cache(self, batch: int) -> KVCache:
        config = self.preset.dit
        return KVCache(
            self.preset.cache(),
            layers=config.num_layers,
            heads=config.num_heads,
            head_dim=config.head_dim,
            batch=batch,
            device=self.device,
            dtype=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
        )

    def noise(self, batch: int) -> Tensor:
        p = self.preset
        shape = (batch, p.dit.in_channels, p.chunk, p.latent_rows, p.latent_columns)
        return torch.randn(shape, generator=self.random, device=self.device)

    def open(self, ids: Tensor) -> "Streams":
        """Streams of the prompts ids [N, L], at their first chunk."""
        return Streams(self, ids)

    def roll(
        self, ids: Tensor, chunks: int, change: Tensor | None = None, change_at: int = 0, transition: str = "recache"
    ) -> Tensor:
        """Latents [N, C, chunks * chunk, h, w] under prompts ids [N, L], `change` instead from chunk `change_at`."""
        streams = self.open(ids)
        out: list[Tensor] = []
        for chunk in range(chunks):
            if change is not None and chunk == change_at:
                streams.steer(change, transition)
            out.append(streams.next())
        return torch.cat(out, dim=2)


class Streams:
    """A batch of streams under way, all at the same chunk."""

    def __init__(self, generator: Generator, ids: Tensor) -> None:
        self.generator, self.count = generator, len(ids)
        self.caches = [generator.cache(len(ids)) for _ in range(1 if generator.guidance == 1 else 2)]
        self.recent: list[Tensor] = []
        """The past chunks of the window, oldest first: what `recache` writes again."""
        self.blend: list[Tensor] = []
        """The texts that a `soft` change has yet to go through, one for each chunk."""
        with torch.no_grad(), self._autocast():
            self.text = generator.text(ids)
            self.contexts = [self._context(self.text)]
            if generator.guidance != 1:
                null = null_ids(generator.preset, generator.device).expand_as(ids)
                self.contexts.append(self._context(generator.text(null)))

    def _autocast(self) -> torch.autocast:
        device = self.generator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def _context(self, text: Tensor) -> TextContext:
        return self.generator.dit.encode_text(text)

    @torch.no_grad()
    def next(self) -> Tensor:
        """Latents float32 [N, C, chunk, h, w] of the next chunk, whose keys and values are written."""
        with self._autocast():
            if self.blend:
                self.text = self.blend.pop(0)
                self.contexts[0] = self._context(self.text)
            latents = self._denoise()
            self._keep(latents)
        return latents

    @torch.no_grad()
    def append(self, latents: Tensor) -> None:
        """Take latents [N, C, chunk, h, w], real ones for example, as the next chunk."""
        with self._autocast():
            self._keep(latents)

    @torch.no_grad()
    def steer(self, ids: Tensor, transition: str) -> None:
        """Prompts ids [N, L] from the next chunk on. `transition`: recache, soft or cut."""
        preset = self.generator.preset
        with self._autocast():
            text = self.generator.text(ids)
            if transition == "soft":
                shares = [(step + 1) / preset.soft_chunks for step in range(preset.soft_chunks)]
                self.blend = [torch.lerp(self.text, text, share) for share in shares]
                return
            self.text = text
            self.contexts[0] = self._context(text)
            kept, self.recent = self.recent if transition == "recache" else [], []
            for cache in self.caches:
                cache.reset(cache.start_frame - len(kept) * preset.chunk)
            for latents in kept:
                self._keep(latents)

    def _denoise(self) -> Tensor:
        model = self.generator
        if model.guidance == 1:
            return renoise(
                lambda x, level: forward(model.dit, x, level.told, self.contexts[0], self.caches[0]),
                lambda step: model.noise(self.count),
                [Level(sigma, sigma) for sigma in model.sigmas],
            )

        def guided(x: Tensor, sigma: float) -> Tensor:
            with_text, without = (
                forward(model.dit, x, sigma, context, cache)
                for context, cache in zip(self.contexts, self.caches, strict=True)
            )
            return without + model.guidance * (with_text - without)

        return euler(guided, model.noise(self.count), model.sigmas)

    def _keep(self, latents: Tensor) -> None:
        """The context pass."""
        preset = self.generator.preset
        past = preset.window // preset.chunk - 1
        self.recent = [*self.recent, latents][-past:] if past else []
        sigma = preset.context_sigma
        for context, cache in zip(self.contexts, self.caches, strict=True):
            noisy = (1 - sigma) * latents + sigma * self.generator.noise(self.count) if sigma else latents
            forward(self.generator.dit, noisy, sigma, context, cache)
            cache.advance()
