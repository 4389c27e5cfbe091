"""The Wan-class causal video autoencoder, at any width, with Wan 2.1's parameter names.

Both halves see the past only. The first frame of a clip is coded alone: a clip of 1 + 4k frames has 1 + k latent
frames, and the temporal resamplers pass the first one through (`../shared/specs/causal-wan.md` 2.7). This module
runs whole clips.

Shapes: B batch, C channels, T frames, H, W.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class VAEConfig:
    """Widths of both halves from fine to coarse; every step down halves height, width and, after frame 0, time."""

    widths: tuple[int, ...] = (16, 48, 96)
    latent_channels: int = 16
    res_blocks: tuple[int, ...] = (0, 1, 1)
    """Residual blocks of each level of the encoder; the decoder has one more. Wan 2.1 has 2 everywhere."""
    patch: int = 2
    """Pixels are folded patch x patch into channels first (Wan 2.2 does so with 2, Wan 2.1 not: 1)."""


def convolve_frames(taps: Sequence[Tensor], conv: nn.Conv3d, padding: tuple[int, int]) -> Tensor:
    """A 3-D convolution as one 2-D convolution over frames laid side by side in channels.

    The same sum, which libraries run several times faster at our widths than their 3-D kernels. `taps` are the
    frames [B, T, H, W, C] that each tap of the temporal kernel sees; returns [B, C, T, H, W], channels last.
    """
    batch = len(taps[0])
    beside = torch.cat([*taps], dim=-1).flatten(0, 1).permute(0, 3, 1, 2)
    out = F.conv2d(beside, conv.weight.transpose(1, 2).flatten(1, 2), conv.bias, padding=padding)
    return out.unflatten(0, (batch, -1)).transpose(1, 2)


class CausalConv3d(nn.Conv3d):
    """A 3-D convolution padded with zeros on the past side only."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.history = kernel[0] - 1

    def forward(self, x: Tensor) -> Tensor:
        frames = x.permute(0, 2, 3, 4, 1)
        count = frames.shape[1]
        frames = F.pad(frames, (0, 0, 0, 0, 0, 0, self.history, 0))
        taps = [frames[:, back : back + count] for back in range(self.history + 1)]
        return convolve_frames(taps, self, (self.kernel_size[1] // 2, self.kernel_size[2] // 2))


class ChannelNorm(nn.Module):
    """RMS norm over channels with a gain, Wan's `RMS_norm`."""

    def __init__(self, dim: int, *, images: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *((1, 1) if images else (1, 1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.rsqrt((x * x).mean(dim=1, keepdim=True) + 1e-12).to(x.dtype)
        return x * scale * self.gamma.to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            ChannelNorm(inputs),
            nn.SiLU(),
            CausalConv3d(inputs, outputs, (3, 3, 3)),
            ChannelNorm(outputs),
            nn.SiLU(),
            nn.Identity(),  # Wan has a dropout of 0 here; the index keeps its parameter names
            CausalConv3d(outputs, outputs, (3, 3, 3)),
        )
        self.shortcut: nn.Module = CausalConv3d(inputs, outputs, (1, 1, 1)) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention among the positions of each frame."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(dim, images=True)
        self.to_qkv = nn.Conv2d(dim, dim * 3, 1)
        self.proj = nn.Conv2d(dim, dim, 1)
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)
        qkv = self.to_qkv(self.norm(frames)).flatten(2).transpose(1, 2).unsqueeze(1)
        q, k, v = qkv.chunk(3, dim=-1)
        out = F.scaled_dot_product_attention(q, k, v).squeeze(1).transpose(1, 2).reshape(frames.shape)
        return x + self.proj(out).unflatten(0, (len(x), -1)).transpose(1, 2)


def per_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of x [B, C, T, H, W]."""
    frames: Tensor = layer(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (len(x), -1)).transpose(1, 2)


class Downsample(nn.Module):
    """Halve height and width, and the number of frames after the first."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = per_frame(self.resample, x)
        if x.shape[2] == 1:
            return x
        frames = x.permute(0, 2, 3, 4, 1)
        halved = convolve_frames([frames[:, :-2:2], frames[:, 1:-1:2], frames[:, 2::2]], self.time_conv, (0, 0))
        return torch.cat([x[:, :, :1], halved], dim=2)


class Upsample(nn.Module):
    """Double height and width, and the number of frames after the first; those never see the first."""

    def __init__(self, dim: int, outputs: int) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, outputs, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2] > 1:
            pairs = self.time_conv(x[:, :, 1:]).unflatten(1, (2, -1))
            x = torch.cat([x[:, :, :1], pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)], dim=2)
        return per_frame(self.resample, x)


def middle(dim: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def head(dim: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, outputs, (3, 3, 3)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.widths
        self.conv1 = CausalConv3d(3 * config.patch**2, widths[0], (3, 3, 3))
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            inputs = widths[max(level - 1, 0)]
            for block in range(config.res_blocks[level]):
                layers.append(ResidualBlock(inputs if block == 0 else width, width))
            if level + 1 < len(widths):
                layers.append(Downsample(width))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.middle(self.downsamples(self.conv1(x))))
        return out


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths: Sequence[int] = config.widths[::-1]
        self.conv1 = CausalConv3d(config.latent_channels, widths[0], (3, 3, 3))
        self.middle = middle(widths[0])
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            for _ in range(config.res_blocks[-1 - level] + 1):
                layers.append(ResidualBlock(width, width))
            if level + 1 < len(widths):
                layers.append(Upsample(width, widths[level + 1]))
        self.upsamples = nn.Sequential(*layers)
        self.head = head(widths[-1], 3 * config.patch**2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.upsamples(self.middle(self.conv1(x))))
        return out


class CausalVAE(nn.Module):
    """Pixels in [-1, 1] to latents and back. `encode` gives the posterior mean; nothing is normalised here."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.latent_channels, 2 * config.latent_channels, (1, 1, 1))
        self.conv2 = CausalConv3d(config.latent_channels, config.latent_channels, (1, 1, 1))
        self.decoder = Decoder(config)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, C, 1 + k, h, w], of pixels [B, 3, 1 + 4k, H, W]."""
        patch = self.config.patch
        folded = per_frame(nn.PixelUnshuffle(patch), pixels) if patch > 1 else pixels
        mean, log_variance = self.conv1(self.encoder(folded)).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, pixels: Tensor) -> Tensor:
        return self.posterior(pixels)[0]

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, 1 + k, h, w] -> [B, 3, 1 + 4k, H, W], about [-1, 1], not clamped."""
        out = self.decoder(self.conv2(latents))
        return per_frame(nn.PixelShuffle(self.config.patch), out) if self.config.patch > 1 else out
