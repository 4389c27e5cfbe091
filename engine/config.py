"""Presets: every model that the engine can serve, by name, as frozen data validated once.

Importing this loads no torch, so that presets are listed and weights checked in no time.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from engine.models.sizes import DiTConfig
from engine.stream.schedule import step_sigmas

if TYPE_CHECKING:
    from engine.models.light_vae import LightVAEConfig
    from engine.models.text_encoder import TextConfig
    from engine.models.vae import LatentStatistics, VAEConfig
    from engine.stream.kv_cache import CacheConfig
    from engine.stream.rollout import RolloutConfig

T = TypeVar("T")


class Deferred(Generic[T]):
    """A field that is given as a value or as a function that makes it, and read as the value.

    For sizes that are defined beside modules: their files are imported when the field is first read.
    """

    def __set_name__(self, owner: type, name: str) -> None:
        self.slot = f"_{name}"

    def __set__(self, instance: object, value: T | Callable[[], T]) -> None:
        object.__setattr__(instance, self.slot, value)

    def __get__(self, instance: Any, owner: type | None = None) -> T:
        if instance is None:
            raise AttributeError("a preset's class holds no value")  # so that dataclasses see no default
        value = getattr(instance, self.slot)
        if callable(value):
            value = value()
            object.__setattr__(instance, self.slot, value)
        return value


@dataclass(frozen=True, kw_only=True)
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
    text: Deferred["TextConfig"] = Deferred()
    light_vae: Deferred["LightVAEConfig"] = Deferred()
    vae: Deferred["VAEConfig"] = Deferred()
    statistics: Deferred["LatentStatistics | None"] = Deferred()
    """Of the VAE's latents; None where the store alone has them."""
    family: Literal["mini", "wan2.1", "wan2.2"]
    """Whose autoencoder the latents belong to; both public ones go with the UMT5-XXL text encoder."""
    spatial_stride: int
    steps: tuple[int, ...]
    """Denoising steps as indices into the shifted table of 1000 noise levels."""
    first_steps: tuple[int, ...] | None = None
    """Those of the first chunk of a scene, where they differ: it has no past to lean on."""
    shift: float
    chunk: int
    window: int
    sink: int
    context_sigma: float
    soft_chunks: int
    """Chunks over which a `soft` prompt change blends."""
    weights: str = ""
    """What `python -m engine convert` is to be given."""
    generator: Literal["generator_ema", "generator"] = "generator_ema"
    """Which network of a pickled checkpoint the authors sample with."""

    @property
    def text_sizes(self) -> dict[str, int]:
        """`text`, field by field, without loading its module."""
        return MINI_TEXT if self.family == "mini" else UMT5_XXL

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

    @property
    def first_sigmas(self) -> tuple[float, ...]:
        """Noise levels of the first chunk of a scene."""
        return step_sigmas(self.first_steps or self.steps, self.shift)

    def cache(self) -> "CacheConfig":
        from engine.stream.kv_cache import CacheConfig

        _, ph, pw = self.dit.patch
        return CacheConfig(self.chunk, self.window, self.sink, self.latent_rows // ph, self.latent_columns // pw)

    def rollout(self) -> "RolloutConfig":
        from engine.stream.rollout import RolloutConfig

        return RolloutConfig(
            self.sigmas,
            self.chunk,
            self.dit.in_channels,
            self.latent_rows,
            self.latent_columns,
            self.context_sigma,
        )


MINI_TEXT = {
    "vocab_size": 512,
    "dim": 256,
    "ffn_dim": 512,
    "num_heads": 4,
    "head_dim": 64,
    "num_layers": 4,
    "length": 64,
}
UMT5_XXL = {
    "vocab_size": 256_384,
    "dim": 4096,
    "ffn_dim": 10_240,
    "num_heads": 64,
    "head_dim": 64,
    "num_layers": 24,
    "length": 512,
}
"""Fields of a `TextConfig`; every public Wan model reads through this encoder. The second is UMT5_XXL of its module, to
be read without torch."""


def _mini_text() -> "TextConfig":
    from engine.models.text_encoder import TextConfig

    return TextConfig(**MINI_TEXT)


def _mini_light_vae() -> "LightVAEConfig":
    from engine.models.light_vae import LightVAEConfig

    return LightVAEConfig()


def _mini_vae() -> "VAEConfig":
    from engine.models.vae import VAEConfig

    return VAEConfig()


MINI = Preset(
    name="mini",
    description="The embedded model: simple objects that move over a ground under a sky, trained by this project",
    width=256,
    height=256,
    fps=16,
    dit=DiTConfig(dim=384, ffn_dim=1536, num_heads=6, num_layers=8, text_dim=256, patch=(1, 4, 4), pooled_text=True),
    text=_mini_text,
    light_vae=_mini_light_vae,
    vae=_mini_vae,
    statistics=None,
    family="mini",
    spatial_stride=8,
    steps=(1000, 500),
    shift=3.0,
    chunk=3,
    window=9,
    sink=0,
    context_sigma=0.05,
    soft_chunks=2,
)

# The public checkpoints. Sources: `../shared/specs/causal-wan.md` 2.6 and 2.8, and the configurations that the
# authors published with the weights.

DIT_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096)
DIT_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096)
DIT_5B = DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, text_dim=4096, in_channels=48, out_channels=48)


def _umt5_xxl() -> "TextConfig":
    from engine.models.text_encoder import UMT5_XXL

    return UMT5_XXL


def _wan21_vae() -> "VAEConfig":
    from engine.models.vae import WAN21

    return WAN21


def _wan21_light_vae() -> "LightVAEConfig":
    from engine.models.light_vae import TAEW21

    return TAEW21


def _wan21_statistics() -> "LatentStatistics":
    from engine.models.vae import WAN21_STATISTICS

    return WAN21_STATISTICS


def _wan22_vae() -> "VAEConfig":
    from engine.models.vae import WAN22

    return WAN22


def _wan22_light_vae() -> "LightVAEConfig":
    from engine.models.light_vae import TAEW22

    return TAEW22


def _wan22_statistics() -> "LatentStatistics":
    from engine.models.vae import WAN22_STATISTICS

    return WAN22_STATISTICS


FOUR_STEPS = (1000, 750, 500, 250)


def _wan(
    name: str,
    description: str,
    *,
    weights: str,
    dit: DiTConfig = DIT_1_3B,
    steps: tuple[int, ...] = FOUR_STEPS,
    first_steps: tuple[int, ...] | None = None,
    shift: float = 5.0,
    chunk: int = 3,
    window: int = 21,
    sink: int = 0,
    generator: Literal["generator_ema", "generator"] = "generator_ema",
) -> Preset:
    new = dit is DIT_5B
    return Preset(
        name=name,
        description=description,
        weights=weights,
        generator=generator,
        width=1280 if new else 832,
        height=704 if new else 480,
        fps=24 if new else 16,
        dit=dit,
        text=_umt5_xxl,
        vae=_wan22_vae if new else _wan21_vae,
        light_vae=_wan22_light_vae if new else _wan21_light_vae,
        statistics=_wan22_statistics if new else _wan21_statistics,
        family="wan2.2" if new else "wan2.1",
        spatial_stride=16 if new else 8,
        steps=steps,
        first_steps=first_steps,
        shift=shift,
        chunk=chunk,
        window=window,
        sink=sink,
        context_sigma=0.0,
        soft_chunks=2,
    )


BASE = "and Wan2.1-T2V-1.3B for text encoder and VAE"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        MINI,
        _wan(
            "self-forcing-1.3b",
            "Self-Forcing (DMD) on Wan 2.1 T2V 1.3B: trained for clips of five seconds",
            weights=f"self_forcing_dmd.pt {BASE}",
        ),
        _wan(
            "causal-forcing-1.3b",
            "Causal-Forcing on Wan 2.1 T2V 1.3B, 4 steps",
            weights=f"the chunk-wise causal_forcing.pt {BASE}",
            generator="generator",
        ),
        _wan(
            "causal-forcing-1.3b-2step",
            "Causal-Forcing++ on Wan 2.1 T2V 1.3B, 2 steps after a first chunk of 4",
            weights=f"the chunk-wise 2-step .pt {BASE}",
            steps=(1000, 500),
            first_steps=FOUR_STEPS,
        ),
        _wan(
            "causal-forcing-1.3b-1step",
            "Causal-Forcing++ on Wan 2.1 T2V 1.3B, 1 step after a first chunk of 4",
            weights=f"the chunk-wise 1-step .pt {BASE}",
            steps=(1000,),
            first_steps=FOUR_STEPS,
        ),
        _wan(
            "longlive-1.3b",
            "LongLive on Wan 2.1 T2V 1.3B: trained with window and sink, for minutes",
            weights=f"longlive_base.pt with --lora lora.pt, {BASE}",
            generator="generator",
            window=12,
            sink=3,
        ),
        # Krea's server fixes the timesteps at these whole numbers and shifts nothing; it sees one past chunk
        _wan(
            "krea-14b",
            "Krea Realtime on Wan 2.1 T2V 14B",
            weights="krea-realtime-video-14b.safetensors and Wan2.1-T2V-14B for text encoder and VAE",
            dit=DIT_14B,
            steps=(1000, 937, 833, 625),
            shift=1.0,
            window=6,
        ),
        # the timesteps, unshifted, of the 4-step configuration of LongLive 2.0, the causal student of this model
        _wan(
            "ti2v-5b",
            "LongLive 2.0 on Wan 2.2 TI2V 5B, text to video in 1280x704",
            weights="the LongLive 2.0 generator and Wan2.2-TI2V-5B for text encoder and VAE",
            dit=DIT_5B,
            steps=(1000, 946, 854, 681),
            shift=1.0,
            chunk=8,
            window=32,
            sink=8,
        ),
    )
}
