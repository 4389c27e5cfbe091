"""The causal video autoencoder of Wan 2.1 and Wan 2.2, at any width, with the parameter names of their checkpoints.

Encoder and decoder see the past only. The first frame of a clip is coded alone: 1 + 4k frames have 1 + k latent frames,
and the temporal resamplers pass the first one through. `encode` and `decode` take whole clips. `encode_chunk` and
`decode_chunk` take a clip in parts, with the same result; what each layer caches between two calls is a tensor in a
list that the caller keeps.

Shapes: B batch, C channels, T frames, H, W. `frames` are [B, T, H, W, C], everything else is [B, C, T, H, W]; in memory
channels are last in both.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.models.config import VAEConfig

State = list[Tensor]
"""What a half remembers of a clip: [B, 1 or 2 frames, H, W, C] per causal layer, in the order they run. Calls replace
tensors and never write into them, so a list that was kept stays good, and a clip can be continued from it again."""


class Past:
    """The frames that the layers see from before a call, and those that they leave to the next one."""

    def __init__(self, state: State | None = None, *, keep: bool = True) -> None:
        """`state` None begins a clip. `keep` False is for whole clips, after which nothing comes."""
        self.first = state is None
        self.state = state
        self.keep = keep
        self.kept: State = []

    def join(self, frames: Tensor, count: int) -> Tensor:
        """The remembered frames followed by `frames`; the last `count` of them all are remembered next."""
        if self.state is not None:
            frames = torch.cat([self.state[len(self.kept)], frames], dim=1)
        if self.keep:
            self.kept.append(frames[:, -count:].clone(memory_format=torch.contiguous_format))
        return frames


class Causal(nn.Module):
    """A layer that sees the past: it is called with `(x, past)`."""


class Chain(Causal, nn.Sequential):
    """Layers in a row, causal ones among them."""

    def forward(self, x: Tensor, past: Past) -> Tensor:  # type: ignore[override]
        for layer in self:
            x = layer(x, past) if isinstance(layer, Causal) else layer(x)
        return x


def to_frames(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 4, 1)


def from_frames(frames: Tensor) -> Tensor:
    return frames.permute(0, 4, 1, 2, 3)


def per_frame(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Apply a 2-D layer to every frame of x."""
    return layer(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (len(x), -1)).transpose(1, 2)


def convolve_frames(taps: Sequence[Tensor], conv: nn.Conv3d, padding: tuple[int, int]) -> Tensor:
    """A 3-D convolution as one 2-D convolution over frames laid side by side in channels.

    The same sum, which libraries run several times faster at our widths than their 3-D kernels. `taps` are the frames
    that each tap of the temporal kernel sees; returns [B, C, T, H, W].
    """
    beside = torch.cat([*taps], dim=-1)
    shape = beside.shape[:2]
    beside = beside.flatten(0, 1).permute(0, 3, 1, 2)
    out = F.conv2d(beside, conv.weight.transpose(1, 2).flatten(1, 2), conv.bias, padding=padding)
    return out.unflatten(0, shape).transpose(1, 2)


class CausalConv3d(Causal, nn.Conv3d):
    """A 3-D convolution that sees the frames before a chunk; before a clip there are zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int]) -> None:
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))
        self.reach = kernel[0] - 1

    def forward(self, x: Tensor, past: Past) -> Tensor:  # type: ignore[override]
        frames, count = to_frames(x), x.shape[2]
        if self.reach:
            if past.first:
                frames = F.pad(frames, (0, 0, 0, 0, 0, 0, self.reach, 0))
            frames = past.join(frames, self.reach)
        taps = [frames[:, back : back + count] for back in range(self.reach + 1)]
        return convolve_frames(taps, self, (self.kernel_size[1] // 2, self.kernel_size[2] // 2))


class ChannelNorm(nn.Module):
    """RMS norm over channels with a gain, Wan's `RMS_norm`: summed in float32, as squares overflow float16."""

    def __init__(self, dim: int, *, images: bool = False) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(dim, *((1, 1) if images else (1, 1, 1))))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        rms = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide) * x.shape[1] ** -0.5
        scale = rms.clamp_min(max(1e-6, torch.finfo(x.dtype).tiny)).reciprocal()
        return x * scale.to(x.dtype) * self.gamma.to(x.dtype)


class ResidualBlock(Causal):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.residual = Chain(
            ChannelNorm(inputs),
            nn.SiLU(),
            CausalConv3d(inputs, outputs, (3, 3, 3)),
            ChannelNorm(outputs),
            nn.SiLU(),
            nn.Identity(),  # Wan has a dropout of 0 here; the index keeps its parameter names
            CausalConv3d(outputs, outputs, (3, 3, 3)),
        )
        self.shortcut = Chain() if inputs == outputs else CausalConv3d(inputs, outputs, (1, 1, 1))

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.residual(x, past) + self.shortcut(x, past)


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


class Downsample(Causal):
    """Halve height and width and, where `time`, the number of frames after the first, which passes through."""

    def __init__(self, dim: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(dim, dim, 3, stride=2))
        self.time_conv = nn.Conv3d(dim, dim, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        x = per_frame(self.resample, x)
        if self.time_conv is None:
            return x
        frames = past.join(to_frames(x), 1)
        halved = convolve_frames([frames[:, :-2:2], frames[:, 1:-1:2], frames[:, 2::2]], self.time_conv, (0, 0))
        return torch.cat([x[:, :, :1], halved], dim=2) if past.first else halved


class Upsample(Causal):
    """Double height and width and, where `time`, the number of frames after the first; those never see the first."""

    def __init__(self, dim: int, outputs: int, *, time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(dim, outputs, 3, padding=1)
        )
        self.time_conv = CausalConv3d(dim, dim * 2, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, past: Past) -> Tensor:
        if self.time_conv is not None:
            # of a first call that is a single frame nothing goes through: only the zeros are remembered
            later = x[:, :, 1:] if past.first else x
            pairs = to_frames(self.time_conv(later, past)).unflatten(-1, (2, x.shape[1]))
            doubled = from_frames(pairs.movedim(4, 2).flatten(1, 2))
            x = torch.cat([x[:, :, :1], doubled], dim=2) if past.first else doubled
        return per_frame(self.resample, x)


def average_down(x: Tensor, outputs: int, time: int, space: int) -> Tensor:
    """Fold cells of `time` frames by `space` by `space` into channels and average groups of these to `outputs`.

    Wan 2.2's AvgDown3D. An odd first frame is averaged with zeros before it, as there.
    """
    frames = F.pad(to_frames(x), (0, 0, 0, 0, 0, 0, -x.shape[2] % time, 0))
    cells = frames.unflatten(3, (-1, space)).unflatten(2, (-1, space)).unflatten(1, (-1, time))
    cells = cells.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(4)
    return from_frames(cells.unflatten(4, (outputs, -1)).mean(dim=-1))


def duplicate_up(x: Tensor, outputs: int, time: int, space: int) -> Tensor:
    """Repeat channels, then unfold them into cells of `time` frames by `space` by `space`: Wan 2.2's DupUp3D."""
    cells = to_frames(x).repeat_interleave(outputs * time * space**2 // x.shape[1], dim=-1)
    cells = cells.unflatten(-1, (outputs, time, space, space)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return from_frames(cells.flatten(5, 6).flatten(3, 4).flatten(1, 2))


class DownLevel(Causal):
    """A level of Wan 2.2's encoder, with its shortcut."""

    def __init__(self, layers: Sequence[nn.Module], outputs: int, *, time: int, space: int) -> None:
        super().__init__()
        self.downsamples = Chain(*layers)
        self.outputs, self.time, self.space = outputs, time, space

    def forward(self, x: Tensor, past: Past) -> Tensor:
        return self.downsamples(x, past) + average_down(x, self.outputs, self.time, self.space)


class UpLevel(Causal):
    """A level of Wan 2.2's decoder, with its shortcut: all but the finest, which has none."""

    def __init__(self, layers: Sequence[nn.Module], outputs: int, *, time: int, space: int) -> None:
        super().__init__()
        self.upsamples = Chain(*layers)
        self.outputs, self.time, self.space = outputs, time, space

    def forward(self, x: Tensor, past: Past) -> Tensor:
        out: Tensor = self.upsamples(x, past)
        if self.space == 1:
            return out
        repeated = duplicate_up(x, self.outputs, self.time, self.space)
        return out + (repeated[:, :, self.time - 1 :] if past.first else repeated)


def middle(dim: int) -> Chain:
    return Chain(ResidualBlock(dim, dim), FrameAttention(dim), ResidualBlock(dim, dim))


def head(dim: int, outputs: int) -> Chain:
    return Chain(ChannelNorm(dim), nn.SiLU(), CausalConv3d(dim, outputs, (3, 3, 3)))


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.encoder_widths
        self.conv1 = CausalConv3d(3 * config.patch**2, widths[0], (3, 3, 3))
        layers: list[nn.Module] = []
        for level, width in enumerate(widths):
            inputs = [widths[max(level - 1, 0)], *[width] * config.res_blocks[level]]
            steps: list[nn.Module] = [ResidualBlock(inputs[i], width) for i in range(config.res_blocks[level])]
            last = level + 1 == len(widths)
            time = not last and config.halve_time[level]
            if not last:
                steps.append(Downsample(width, time=time))
            if config.shortcuts:
                steps = [DownLevel(steps, width, time=1 + time, space=1 if last else 2)]
            layers += steps
        self.downsamples = Chain(*layers)
        self.middle = middle(widths[-1])
        self.head = head(widths[-1], 2 * config.latent_channels)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        out: Tensor = self.head(self.middle(self.downsamples(self.conv1(x, past), past), past), past)
        return out


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        widths = config.decoder_widths
        inputs = (*config.decoder_inputs, widths[-1])
        self.conv1 = CausalConv3d(config.latent_channels, widths[-1], (3, 3, 3))
        self.middle = middle(widths[-1])
        layers: list[nn.Module] = []
        for level in reversed(range(len(widths))):
            width = widths[level]
            steps: list[nn.Module] = [ResidualBlock(inputs[level], width)]
            steps += [ResidualBlock(width, width) for _ in range(config.res_blocks[level])]
            time = level > 0 and config.halve_time[level - 1]
            if level > 0:
                steps.append(Upsample(width, inputs[level - 1], time=time))
            if config.shortcuts:
                steps = [UpLevel(steps, width, time=1 + time, space=2 if level > 0 else 1)]
            layers += steps
        self.upsamples = Chain(*layers)
        self.head = head(widths[0], 3 * config.patch**2)

    def forward(self, x: Tensor, past: Past) -> Tensor:
        out: Tensor = self.head(self.upsamples(self.middle(self.conv1(x, past), past), past), past)
        return out


class CausalVAE(nn.Module):
    """Pixels in [-1, 1] to latents and back. Encoding gives the posterior mean; nothing is normalised here.

    A call of `encode_chunk` or `decode_chunk` without a state begins a clip.
    """

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * config.latent_channels, 2 * config.latent_channels, (1, 1, 1))
        self.conv2 = CausalConv3d(config.latent_channels, config.latent_channels, (1, 1, 1))
        self.decoder = Decoder(config)

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance, each [B, C, 1 + k, h, w], of pixels [B, 3, 1 + 4k, H, W].

        Raises:
            ValueError: the number of frames is not of this form.
        """
        mean, log_variance = self._moments(pixels, Past(keep=False)).chunk(2, dim=1)
        return mean, log_variance

    def encode(self, pixels: Tensor) -> Tensor:
        return self.posterior(pixels)[0]

    def encode_chunk(self, pixels: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Encode the next frames of a clip: [B, 3, 1 + 4k, H, W] to begin with, then [B, 3, 4k, H, W] each time.

        Returns:
            latents, [B, C, 1 + k or k, h, w], and the state to pass on.

        Raises:
            ValueError: the number of frames is not of this form.
        """
        past = Past(state)
        return self._moments(pixels, past).chunk(2, dim=1)[0], past.kept

    def decode(self, latents: Tensor) -> Tensor:
        """[B, C, 1 + k, h, w] -> [B, 3, 1 + 4k, H, W], about [-1, 1], not clamped."""
        return self._pixels(latents, Past(keep=False))

    def decode_chunk(self, latents: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Decode the next latent frames of a clip, any number of them: [B, C, k, h, w].

        Returns:
            pixels [B, 3, 4k, H, W], three frames fewer at the start of a clip, and the state to pass on.
        """
        past = Past(state)
        return self._pixels(latents, past), past.kept

    def _moments(self, pixels: Tensor, past: Past) -> Tensor:
        count, stride, patch = pixels.shape[2], self.config.temporal_stride, self.config.patch
        if count < 1 or (count - past.first) % stride:
            due = f"begins with 1 + {stride}k frames" if past.first else f"goes on with {stride}k frames"
            raise ValueError(f"{count} frames cannot be encoded: a clip {due}")
        if patch > 1:
            pixels = per_frame(lambda image: self._turn(F.pixel_unshuffle(self._turn(image), patch)), pixels)
        moments: Tensor = self.conv1(self.encoder(pixels, past), past)
        return moments

    def _pixels(self, latents: Tensor, past: Past) -> Tensor:
        patch = self.config.patch
        pixels: Tensor = self.decoder(self.conv2(latents, past), past)
        if patch > 1:
            pixels = per_frame(lambda image: self._turn(F.pixel_shuffle(self._turn(image), patch)), pixels)
        return pixels

    def _turn(self, images: Tensor) -> Tensor:
        """Exchange rows and columns where a patch is counted down its columns."""
        return images.transpose(-1, -2) if self.config.patch_columns_first else images
