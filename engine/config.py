"""Presets: every model that the engine can serve, by name, as frozen data validated once."""

from dataclasses import dataclass

from engine.models.dit import DiTConfig
from engine.models.light_vae import LightVAEConfig
from engine.models.text_encoder import TextConfig
from engine.models.vae import VAEConfig
from engine.stream.kv_cache import CacheConfig
from engine.stream.rollout import RolloutConfig
from engine.stream.schedule import step_sigmas


@dataclass(frozen=True)
class Preset:
    """One model: its networks, and the recipe that its weights were trained for.

    Lengths in time are latent frames; sizes in space are pixels.
    """

    name: str
    description: str
    width: int
    height: int
    fps: int
    dit: DiTConfig
    text: TextConfig
    light_vae: LightVAEConfig
    vae: VAEConfig
    spatial_stride: int
    steps: tuple[int, ...]
    """Denoising steps as indices into the shifted table of 1000 noise levels."""
    shift: float
    chunk: int
    window: int
    sink: int
    context_sigma: float
    soft_chunks: int
    """Chunks over which a `soft` prompt change blends."""

    @property
    def temporal_stride(self) -> int:
        return self.light_vae.temporal_stride

    @property
    def chunk_frames(self) -> int:
        return self.chunk * self.temporal_stride

    @property
    def first_chunk_frames(self) -> int:
        """The first latent frame of a scene holds one pixel frame."""
        return (self.chunk - 1) * self.temporal_stride + 1

    @property
    def latent_rows(self) -> int:
        return self.height // self.spatial_stride

    @property
    def latent_columns(self) -> int:
        return self.width // self.spatial_stride

    @property
    def sigmas(self) -> tuple[float, ...]:
        return step_sigmas(self.steps, self.shift)

    def cache(self) -> CacheConfig:
        _, ph, pw = self.dit.patch
        return CacheConfig(self.chunk, self.window, self.sink, self.latent_rows // ph, self.latent_columns // pw)

    def rollout(self) -> RolloutConfig:
        return RolloutConfig(
            self.sigmas,
            self.chunk,
            self.dit.in_channels,
            self.latent_rows,
            self.latent_columns,
            self.context_sigma,
        )


MINI = Preset(
    name="mini",
    description="The embedded model: simple objects that move over a ground under a sky, trained by this project",
    width=256,
    height=256,
    fps=16,
    dit=DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=8, text_dim=256, patch=(1, 4, 4), pooled_text=True),
    text=TextConfig(vocab_size=512, dim=256, ffn_dim=512, num_heads=4, head_dim=64, num_layers=4, length=64),
    light_vae=LightVAEConfig(),
    vae=VAEConfig(),
    spatial_stride=8,
    steps=(1000, 500),
    shift=3.0,
    chunk=3,
    window=9,
    sink=0,
    context_sigma=0.05,
    soft_chunks=2,
)

PRESETS: dict[str, Preset] = {MINI.name: MINI}
