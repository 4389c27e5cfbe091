"""The light decoder: a TAEHV-class network of 2-D convolutions whose only link through time is one remembered
frame of features per memory block.

The network is a plain list of layers; the memories are carried by the caller, so a stream decoded chunk by chunk
and a clip decoded at once run the same weights and give the same frames.

Parameter names are TAEHV's (github.com/madebyollin/taehv): `decoder.N.weight`, `.bias`, `.conv.weight`, where N counts
all layers. Its checkpoints hold an encoder too, `encoder.N...`, for which there is no place here, and a first TGrow
that may have the rows of several frames, of which the last `widths[0]` are meant.

Shapes: N batch, T frames, C channels, H, W; activations are [N * T, C, H, W] inside.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.config import LightVAEConfig


class MemBlock(nn.Module):
    """Residual block over the features of a frame and of the frame before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor, past: Tensor) -> Tensor:
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TGrow(nn.Module):
    """Makes `growth` frames of every frame: a 1x1 convolution whose channels unfold into time."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.growth = growth
        self.conv = nn.Conv2d(width, width * growth, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).unflatten(1, (self.growth, -1)).flatten(0, 1)


class Clamp(nn.Module):
    """tanh(x / 3) * 3: keeps a wild latent from blowing up the picture."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


Memories = list[Tensor]
"""One [N, H, W, C] per memory block: the features of the newest frame it has seen."""


class LightDecoder(nn.Module):
    """Latents to pixels. Each latent frame becomes `temporal_stride` frames; of the first, only the last is shown."""

    def __init__(self, config: LightVAEConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths
        layers: list[nn.Module] = [Clamp(), nn.Conv2d(config.latent_channels, widths[0], 3, padding=1), nn.ReLU()]
        for level, width in enumerate(widths):
            layers += [MemBlock(width) for _ in range(config.blocks[level])]
            if level + 1 < len(widths):
                enlarge = nn.Upsample(scale_factor=2, mode="nearest")
                grow = TGrow(width, config.time_growth[level])
                narrow = nn.Conv2d(width, widths[level + 1], 3, padding=1, bias=False)
                layers += [enlarge, grow, narrow] if config.enlarge_first else [grow, narrow, enlarge]
        if not config.blocks[-1]:
            layers.append(nn.ReLU())  # memory blocks end in one already
        layers.append(nn.Conv2d(widths[-1], 3 * config.pixel_shuffle**2, 3, padding=1))
        self.decoder = nn.Sequential(*layers)

    def forward(self, z: Tensor, memories: Memories | None = None) -> tuple[Tensor, Memories]:
        """Decode consecutive latent frames.

        Args:
            z: [N, T, C, h, w] latents, scaled as `config.normalised` says.
            memories: what the call before returned; None at the start of a clip.

        Returns:
            frames [N, T * temporal_stride, 3, H, W], about [0, 1] but not clamped, and the memories to pass on. The
            first `temporal_stride - 1` frames of a clip are to be dropped by the caller, who knows where it starts.
        """
        batch = len(z)
        carried: Memories = []
        x = z.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        for layer in self.decoder:
            if isinstance(layer, MemBlock):
                frames = x.permute(0, 2, 3, 1).unflatten(0, (batch, -1))  # channels last, in memory too
                before = torch.zeros_like(frames[:, 0]) if memories is None else memories[len(carried)]
                past = torch.cat([before[:, None], frames[:, :-1]], dim=1)
                carried.append(frames[:, -1].clone())
                x = layer(x, past.flatten(0, 1).permute(0, 3, 1, 2))
            else:
                x = layer(x)
        return F.pixel_shuffle(x, self.config.pixel_shuffle).unflatten(0, (batch, -1)), carried
