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
    from engine.models.vae import VAEConfig
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
    family: Literal["mini", "wan2.1", "wan2.2"]
    """Whose autoencoder the latents belong to; both public ones go with the UMT5-XXL text encoder."""
    spatial_stride: int
    latent_mean: tuple[float, ...] | None = None
    latent_std: tuple[float, ...] | None = None
    """Of the VAE's latents, by channel: z = latent * std + mean. None where the store holds them (`statistics`)."""
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
"""Fields of a `TextConfig`; every public Wan model reads through this encoder."""


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

WAN21_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN21_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip
WAN22_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip

DIT_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096)
DIT_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096)
DIT_5B = DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, text_dim=4096, in_channels=48, out_channels=48)

# Here the sizes of the public text encoder and autoencoders come in; those of the VAEs below are stand-ins.


def _umt5_xxl() -> "TextConfig":
    from engine.models.text_encoder import TextConfig

    return TextConfig(**UMT5_XXL)


def _wan21_vae() -> "VAEConfig":
    from engine.models.vae import VAEConfig

    return VAEConfig(widths=(96, 192, 384, 384), latent_channels=16, res_blocks=(2, 2, 2, 2), patch=1)


def _wan22_vae() -> "VAEConfig":
    from engine.models.vae import VAEConfig

    return VAEConfig(widths=(160, 320, 640, 640), latent_channels=48, res_blocks=(2, 2, 2, 2), patch=2)


def _taehv(channels: int, shuffle: int) -> Callable[[], "LightVAEConfig"]:
    def sizes() -> "LightVAEConfig":
        from engine.models.light_vae import LightVAEConfig

        return LightVAEConfig(channels, (256, 128, 64, 64), (3, 3, 3, 0), (1, 2, 2), shuffle)

    return sizes


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
        light_vae=_taehv(48, 2) if new else _taehv(16, 1),
        family="wan2.2" if new else "wan2.1",
        spatial_stride=16 if new else 8,
        latent_mean=WAN22_MEAN if new else WAN21_MEAN,
        latent_std=WAN22_STD if new else WAN21_STD,
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
            weights=f"longlive_base.pt with lora.pt merged in, {BASE}",
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
