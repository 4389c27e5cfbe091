"""Latents to frames, and pictures to latents, chunk by chunk: the light decoder that serves, or the VAE's own."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from engine.models.config import LatentStatistics
from engine.models.light_vae import LightDecoder
from engine.models.vae import CausalVAE


class Decoder(Protocol):
    """Decodes consecutive chunks. What it remembers between them is the caller's to keep."""

    @property
    def network(self) -> nn.Module:
        """Whose weights it runs."""

    def __call__(self, latents: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Frames of normalised latents float32 [1, C, F, h, w].

        Args:
            memories: what the call before returned; None at the start of a scene, whose first latent frame is one
                frame of pixels.

        Returns:
            uint8 [1, T, H, W, 3], and the memories to pass on, all of constant size.
        """


def to_bytes(frames: Tensor) -> Tensor:
    """Frames [1, T, 3, H, W], about [0, 1], as uint8 [1, T, H, W, 3]."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory. From a GPU it is only begun: it is there when the stream has come so far."""
    if not x.is_cuda:
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


class SideStream:
    """Work on a GPU stream of its own, while what comes next goes on in the current one: decoding beside the context
    pass. It has precedence, since frames are what a viewer waits for. Elsewhere it is done on the spot."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def __call__(self, *inputs: Tensor) -> Iterator[None]:
        """What runs inside reads `inputs`, and nothing else that the current stream made since it last waited."""
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        for x in inputs:
            x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield


@dataclass(frozen=True)
class LightDecoding:
    """By the light decoder, one latent frame at a time: a third of the memory, and on a CPU a sixth faster."""

    network: LightDecoder
    statistics: LatentStatistics

    def __call__(self, latents: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        config = self.network.config
        scaled = latents if config.normalised else self.statistics.restore(latents)
        first = config.temporal_stride - 1 if memories is None else 0
        dtype = next(self.network.parameters()).dtype
        parts = []
        for latent in scaled.transpose(1, 2).to(dtype).split(1, dim=1):
            frames, memories = self.network(latent, memories)
            parts.append(to_bytes(frames))
        assert memories is not None
        return torch.cat(parts, dim=1)[:, first:], memories


@dataclass(frozen=True)
class FullDecoding:
    """By the VAE's own decoder, one latent frame at a time: that bounds the memory of its widest layers."""

    network: CausalVAE
    statistics: LatentStatistics

    def __call__(self, latents: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        dtype = self.network.conv1.weight.dtype
        parts = []
        for latent in self.statistics.restore(latents).to(dtype).split(1, dim=2):
            pixels, memories = self.network.decode_chunk(latent, memories)
            parts.append(pixels)
        assert memories is not None
        return to_bytes(torch.cat(parts, dim=2).transpose(1, 2) / 2 + 0.5), memories


@dataclass(frozen=True)
class PictureEncoding:
    """By the VAE's encoder, a few frames at a time."""

    network: CausalVAE
    statistics: LatentStatistics

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [1 + 4k, H, W, 3] -> normalised latents float32 [1, C, 1 + k, h, w]."""
        weight = self.network.conv1.weight
        pixels = frames.permute(3, 0, 1, 2)[None].to(weight.device).to(weight.dtype) / 127.5 - 1
        stride, state, parts = self.network.config.temporal_stride, None, []
        for part in (pixels[:, :, :1], *pixels[:, :, 1:].split(stride, dim=2)):
            latents, state = self.network.encode_chunk(part, state)
            parts.append(latents.float())
        return self.statistics.normalise(torch.cat(parts, dim=2))
