"""Configurations of the networks, as frozen data. Importing this loads no torch, which takes seconds."""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class DiTConfig:
    """Configuration of a Wan transformer."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    text_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch: tuple[int, int, int] = (1, 2, 2)
    freq_dim: int = 256
    eps: float = 1e-6
    pooled_text: bool = False
    """A linear layer adds the prompt's mean to the time embedding; without it a small model hardly follows prompts."""

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads


@dataclass(frozen=True)
class TextConfig:
    """Configuration of a UMT5 encoder, and the fixed length of a prompt in tokens."""

    vocab_size: int
    dim: int
    ffn_dim: int
    num_heads: int
    head_dim: int
    num_layers: int
    length: int


UMT5_XXL = TextConfig(
    vocab_size=256_384, dim=4096, ffn_dim=10_240, num_heads=64, head_dim=64, num_layers=24, length=512
)
"""The encoder of every public Wan model (Wan-Video/Wan2.1, `wan/modules/t5.py` and `wan/configs`)."""


@dataclass(frozen=True)
class VAEConfig:
    """Configuration of a causal VAE. Levels are listed from fine to coarse; each halves height and width.

    Raises:
        ValueError: the lists do not describe the same levels.
    """

    encoder_widths: tuple[int, ...] = (16, 48, 96)
    decoder_widths: tuple[int, ...] = (16, 48, 96)
    decoder_inputs: tuple[int, ...] = (16, 48)
    """Channels that each level of the decoder, except the coarsest, receives from the coarser one."""
    res_blocks: tuple[int, ...] = (0, 1, 1)
    """Residual blocks of each level of the encoder; the decoder has one more."""
    halve_time: tuple[bool, ...] = (True, True)
    """Which steps down also halve the frame rate, after frame 0."""
    latent_channels: int = 16
    patch: int = 2
    """Patches of patch x patch pixels are folded into channels first; 1 for none."""
    patch_columns_first: bool = False
    """Order of a patch's pixels: by columns in Wan 2.2, by rows in mini."""
    shortcuts: bool = False
    """Wan 2.2: a residual path without parameters around every level, which averages or repeats."""

    def __post_init__(self) -> None:
        levels = len(self.encoder_widths)
        if len(self.decoder_widths) != levels or len(self.res_blocks) != levels:
            raise ValueError(f"decoder_widths and res_blocks must have {levels} levels, as encoder_widths has")
        if len(self.decoder_inputs) != levels - 1 or len(self.halve_time) != levels - 1:
            raise ValueError(f"decoder_inputs and halve_time must have {levels - 1} entries, one per step of size")

    @property
    def temporal_stride(self) -> int:
        """Pixel frames to a latent frame, after the first."""
        return 1 << sum(self.halve_time)

    @property
    def spatial_stride(self) -> int:
        return self.patch << len(self.halve_time)


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of each latent channel, by which the diffusion model's latents are normalised."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def normalise(self, latents: "Tensor") -> "Tensor":
        """Latents of `CausalVAE.encode`, [B, C, T, h, w], to those of the diffusion model."""
        return (latents - self._like(self.mean, latents)) / self._like(self.std, latents)

    def restore(self, latents: "Tensor") -> "Tensor":
        """Latents of the diffusion model, [B, C, T, h, w], to those that `CausalVAE.decode` takes."""
        return latents * self._like(self.std, latents) + self._like(self.mean, latents)

    def _like(self, values: tuple[float, ...], latents: "Tensor") -> "Tensor":
        import torch

        return torch.tensor(values, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1, 1)


WAN21 = VAEConfig(
    encoder_widths=(96, 192, 384, 384),
    decoder_widths=(96, 192, 384, 384),
    decoder_inputs=(96, 192, 192),
    res_blocks=(2, 2, 2, 2),
    halve_time=(False, True, True),
    patch=1,
)
"""`Wan2.1_VAE.pth`, which Wan 2.2's 14B models use too."""

WAN21_LIGHT = VAEConfig(
    encoder_widths=(24, 48, 96, 96),
    decoder_widths=(24, 48, 96, 96),
    decoder_inputs=(24, 48, 48),
    res_blocks=(2, 2, 2, 2),
    halve_time=(False, True, True),
    patch=1,
)
"""LightX2V's `lightvaew2_1`: a quarter of the widths, for the same latents."""

WAN22 = VAEConfig(
    encoder_widths=(160, 320, 640, 640),
    decoder_widths=(256, 512, 1024, 1024),
    decoder_inputs=(512, 1024, 1024),
    res_blocks=(2, 2, 2, 2),
    halve_time=(False, True, True),
    latent_channels=48,
    patch=2,
    patch_columns_first=True,
    shortcuts=True,
)
"""`Wan2.2_VAE.pth`, of Wan 2.2 TI2V 5B."""

# Both lists: Wan's own code, and diffusers' configurations of these VAEs.
# fmt: off
WAN21_STATISTICS = LatentStatistics(
    mean=(
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ),
    std=(
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    ),
)

WAN22_STATISTICS = LatentStatistics(
    mean=(
        -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
        -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
        -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
        -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
        -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
        0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
    ),
    std=(
        0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
        0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
        0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
        0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
        0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
        0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
    ),
)
# fmt: on


@dataclass(frozen=True)
class LightVAEConfig:
    """Configuration of the light decoder. Levels are listed from coarse to fine.

    Raises:
        ValueError: the lists do not describe the same levels.
    """

    latent_channels: int = 16
    normalised: bool = True
    """Whether it takes the diffusion model's latents, or those restored by the VAE's mean and std (LightTAE)."""
    widths: tuple[int, ...] = (96, 64, 16)
    blocks: tuple[int, ...] = (2, 1, 1)
    """Memory blocks of each level."""
    time_growth: tuple[int, ...] = (2, 2)
    """Frames made of each frame between one level and the next; the product is the temporal stride."""
    pixel_shuffle: int = 2
    """The last doubling of size rearranges channels, which costs next to nothing; 1 for none."""
    enlarge_first: bool = False
    """Whether size doubles before a level's closing convolution, as in TAEHV, or after it, at a quarter of the cost."""

    def __post_init__(self) -> None:
        if not len(self.widths) == len(self.blocks) == len(self.time_growth) + 1:
            raise ValueError("widths and blocks must have as many levels, and time_growth one entry fewer")

    @property
    def temporal_stride(self) -> int:
        stride = 1
        for growth in self.time_growth:
            stride *= growth
        return stride


TAEW21 = LightVAEConfig(
    widths=(256, 128, 64, 64), blocks=(3, 3, 3, 0), time_growth=(1, 2, 2), pixel_shuffle=1, enlarge_first=True
)
"""TAEHV's `taew2_1`, for the latents of Wan 2.1."""

TAEW22 = replace(TAEW21, latent_channels=48, pixel_shuffle=2)
"""TAEHV's `taew2_2`, for the latents of Wan 2.2 TI2V 5B."""

LIGHT_TAEW21 = replace(TAEW21, normalised=False)
"""LightX2V's `lighttaew2_1`, which was distilled on the VAE's own latents."""
