"""Latents to frames, by the light decoder or the VAE's own, and pictures to latents; chunk by chunk."""

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
    """Decodes consecutive chunks. The caller keeps its state (`memories`) between them."""

    @property
    def network(self) -> nn.Module:
        """The module that holds its weights."""

    def __call__(self, latents: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """Frames of normalised latents float32 [1, C, F, h, w].

        Args:
            memories: what the previous call returned; None at the start of a scene, whose first latent frame is a
                single frame of pixels.

        Returns:
            [1, T, 3, H, W], about [0, 1], and the memories for the next call, of constant size.
        """


def to_bytes(frames: Tensor) -> Tensor:
    """Frames [1, T, 3, H, W], about [0, 1], as uint8 [1, T, H, W, 3]."""
    return (frames.float().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 1, 3, 4, 2).contiguous()


def to_host(x: Tensor) -> Tensor:
    """A copy in host memory. From a GPU it is asynchronous: complete once the current CUDA stream has reached it."""
    if not x.is_cuda:
        return x
    host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
    return host.copy_(x, non_blocking=True)


class SideStream:
    """A second CUDA stream, for decoding while the current stream runs the context pass. It has the higher priority,
    since a viewer waits for frames. Without a GPU, work runs where it stands."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" else None

    @contextmanager
    def __call__(self, *inputs: Tensor) -> Iterator[None]:
        """Run the context's work in the side stream, after what the current stream has queued so far.

        `inputs` are the tensors of the current stream that the work reads.
        """
        if self._stream is None:
            yield
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        for x in inputs:
            x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield

    def join(self, *outputs: Tensor) -> None:
        """Let the current stream wait for the side stream, whose `outputs` it is going to read."""
        if self._stream is None:
            return
        torch.cuda.current_stream().wait_stream(self._stream)
        for x in outputs:
            x.record_stream(torch.cuda.current_stream())


@dataclass(frozen=True)
class LightDecoding:
    """The light decoder, one latent frame at a time: a third of the memory, and on a CPU a sixth faster."""

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
            parts.append(frames)
        assert memories is not None
        return torch.cat(parts, dim=1)[:, first:], memories


@dataclass(frozen=True)
class FullDecoding:
    """The VAE's own decoder, one latent frame at a time, which bounds the memory of its widest layers."""

    network: CausalVAE
    statistics: LatentStatistics

    def __call__(self, latents: Tensor, memories: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        dtype = self.network.conv1.weight.dtype
        parts = []
        for latent in self.statistics.restore(latents).to(dtype).split(1, dim=2):
            pixels, memories = self.network.decode_chunk(latent, memories)
            parts.append(pixels)
        assert memories is not None
        return torch.cat(parts, dim=2).transpose(1, 2) / 2 + 0.5, memories


@dataclass(frozen=True)
class PictureEncoding:
    """The VAE's encoder, a few frames at a time."""

    network: CausalVAE
    statistics: LatentStatistics

    def __call__(self, frames: Tensor) -> Tensor:
        """uint8 [1 + 4k, H, W, 3] -> normalised latents float32 [1, C, 1 + k, h, w]."""
        weight = self.network.conv1.weight
        return self.encode(frames.permute(0, 3, 1, 2)[None].to(weight.device).to(weight.dtype) / 127.5 - 1)

    def encode(self, frames: Tensor) -> Tensor:
        """[1, 1 + 4k, 3, H, W] in [-1, 1] -> normalised latents float32 [1, C, 1 + k, h, w]."""
        pixels = frames.transpose(1, 2).to(self.network.conv1.weight.dtype)
        stride, state, parts = self.network.config.temporal_stride, None, []
        for part in pixels.split_with_sizes([1, *[stride] * (pixels.shape[2] // stride)], dim=2):
            latents, state = self.network.encode_chunk(part, state)
            parts.append(latents.float())
        return self.statistics.normalise(torch.cat(parts, dim=2))

    def begin_clip(self, latents: Tensor, frame: Tensor) -> Tensor:
        """Latents [1, C, F, h, w] as if they began a clip: the first one is encoded again, from `frame` alone.

        Args:
            frame: [1, 3, H, W] in [0, 1], the frame of pixels that the first latent ends with.
        """
        return torch.cat([self.encode(2 * frame[:, None].float() - 1).to(latents), latents[:, :, 1:]], dim=2)


def leading_frame(frames: Tensor, chunk: int, stride: int) -> Tensor:
    """Of a chunk's decoded frames [1, T, 3, H, W] that with which its first latent ends: [1, 3, H, W] in [0, 1]."""
    return frames[:, -1 - (chunk - 1) * stride].clamp(0, 1)
