"""Presets: every model that the engine can serve, by name, as frozen data validated once.

Importing this loads no torch, so that listing presets and checking weights is fast.
"""

from dataclasses import dataclass
from typing import Literal, get_args

from engine.models.config import (
    TAEW21,
    TAEW22,
    UMT5_XXL,
    WAN21,
    WAN21_STATISTICS,
    WAN22,
    WAN22_STATISTICS,
    DiTConfig,
    LatentStatistics,
    LightVAEConfig,
    TextConfig,
    VAEConfig,
)
from engine.stream.steps import step_sigmas

PlainPrecision = Literal["exact", "fp8", "int8"]
"""How the cache of the model as written keeps past chunks: as computed, or in 8 bits with a scale per vector."""

KVPrecision = Literal[PlainPrecision, "int8-fp8"]
"""How a KV cache keeps past chunks; `int8-fp8` is keys in int8 and values in float8, which the fused model's attention
reads without dequantising them."""

Role = Literal["qkv", "o", "cross_q", "cross_o", "up", "down"]
"""A projection of a transformer block; `qkv` joins three linear layers that read the same input."""
ROLES: tuple[Role, ...] = get_args(Role)

QuantScheme = Literal["fp8", "fp8-tensor", "int8", "mxfp8", "nvfp4", "fp8-weights", "int8-weights"]
"""How a projection is quantised: both operands with a scale per row (fp8, int8), per matrix (fp8-tensor) or per block
(mxfp8, nvfp4); or only the weights, with a scale per row."""

TextPlacement = Literal["resident", "offload", "cpu"]
"""Where the text encoder's weights live and where it runs; see `engine.offload.text`."""

TextFormat = Literal["fp8", "int8"]
"""What the text encoder's weights may be quantised to."""


@dataclass(frozen=True)
class CacheConfig:
    """Geometry of the rolling KV cache, in latent frames, and in tokens for the rows and columns of a frame.

    `window` counts everything that a query attends to: sink, past and the chunk itself.

    Raises:
        ValueError: window or sink is not a multiple of the chunk, or the window cannot hold sink and chunk.
    """

    chunk: int
    window: int
    sink: int
    rows: int
    columns: int

    def __post_init__(self) -> None:
        for name in ("window", "sink"):
            if getattr(self, name) % self.chunk:
                raise ValueError(f"{name} must be a multiple of the chunk of {self.chunk}, got {getattr(self, name)}")
        if self.window < self.sink + self.chunk:
            raise ValueError(f"window {self.window} cannot hold the sink {self.sink} and a chunk of {self.chunk}")


@dataclass(frozen=True)
class RolloutConfig:
    """What the rollout needs of a preset: noise levels, and the shape of a chunk's latents."""

    sigmas: tuple[float, ...]
    """Noise levels of the denoising steps, falling."""
    chunk: int
    latent_channels: int
    latent_rows: int
    latent_columns: int
    first_sigmas: tuple[float, ...] | None = None
    """Noise levels of a scene's first chunk where they differ: it has no past to condition on."""
    context_sigma: float = 0.0
    """Noise level of the context pass: 0 in every public Wan preset; a little keeps small models from drifting."""


@dataclass(frozen=True)
class HubSource:
    """Files of a repository on the Hugging Face Hub that a preset needs, for `python -m engine download`."""

    repository: str
    files: tuple[str, ...]
    licence: str
    """For repositories whose card states none."""
    loras: tuple[str, ...] = ()
    """LoRAs that are merged into the weights."""
    revision: str = "main"


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One model: its networks, and how its weights are to be sampled.

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
    statistics: LatentStatistics | None
    """Of the VAE's latents; None where only the store has them."""
    family: Literal["mini", "wan2.1", "wan2.2"]
    """The autoencoder that the latents belong to; the public ones use the UMT5-XXL text encoder."""
    spatial_stride: int
    steps: tuple[int, ...]
    """Denoising steps as indices into the shifted table of 1000 noise levels."""
    first_steps: tuple[int, ...] | None = None
    """Steps of a scene's first chunk where they differ: it has no past to condition on."""
    shift: float
    chunk: int
    window: int
    sink: int
    context_sigma: float
    soft_chunks: int
    """Chunks over which a `soft` prompt change blends."""
    weights: str = ""
    """The files that `python -m engine convert` needs, for messages."""
    sources: tuple[HubSource, ...] = ()
    """Where they are published; empty where Livereel knows no place."""
    generator: Literal["generator_ema", "generator"] = "generator_ema"
    """The network of a pickled checkpoint that its authors sample with."""

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
            self.first_sigmas if self.first_steps else None,
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
    statistics=None,
    family="mini",
    spatial_stride=8,
    steps=(1000, 500),
    shift=3.0,
    chunk=3,
    window=9,
    sink=3,
    context_sigma=0.2,
    soft_chunks=2,
)

# The public checkpoints. Sources: the configurations that their authors published with the weights.

DIT_1_3B = DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, text_dim=4096)
DIT_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40, text_dim=4096)
DIT_5B = DiTConfig(dim=3072, ffn_dim=14336, num_heads=24, num_layers=30, text_dim=4096, in_channels=48, out_channels=48)


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
    sources: tuple[HubSource, ...] = (),
) -> Preset:
    new = dit is DIT_5B
    return Preset(
        name=name,
        description=description,
        weights=weights,
        sources=sources,
        generator=generator,
        width=1280 if new else 832,
        height=704 if new else 480,
        fps=24 if new else 16,
        dit=dit,
        text=UMT5_XXL,
        vae=WAN22 if new else WAN21,
        light_vae=TAEW22 if new else TAEW21,
        statistics=WAN22_STATISTICS if new else WAN21_STATISTICS,
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

# Where they are published. Sources: the download instructions of their authors' READMEs, read in December 2026.


def _base(repository: str, vae: str) -> HubSource:
    """Text encoder, its tokenizer and the VAE of a model by Wan's authors."""
    files = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", vae)
    return HubSource(repository, files, "apache-2.0")


WAN21_1_3B = _base("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth")
WAN21_14B = _base("Wan-AI/Wan2.1-T2V-14B", "Wan2.1_VAE.pth")
WAN22_5B = _base("Wan-AI/Wan2.2-TI2V-5B", "Wan2.2_VAE.pth")
NOT_STATED = "not stated: see the repository"

PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        MINI,
        _wan(
            "self-forcing-1.3b",
            "Self-Forcing (DMD) on Wan 2.1 T2V 1.3B: trained for clips of five seconds",
            weights=f"self_forcing_dmd.pt {BASE}",
            sources=(
                HubSource("gdhe17/Self-Forcing", ("checkpoints/self_forcing_dmd.pt",), NOT_STATED),
                WAN21_1_3B,
            ),
        ),
        _wan(
            "causal-forcing-1.3b",
            "Causal-Forcing on Wan 2.1 T2V 1.3B, 4 steps",
            weights=f"the chunk-wise causal_forcing.pt {BASE}",
            sources=(
                HubSource("zhuhz22/Causal-Forcing", ("chunkwise/causal_forcing.pt",), "apache-2.0"),
                WAN21_1_3B,
            ),
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
            sources=(
                HubSource(
                    "Efficient-Large-Model/LongLive-1.3B",
                    ("models/longlive_base.pt",),
                    NOT_STATED,
                    loras=("models/lora.pt",),
                ),
                WAN21_1_3B,
            ),
            generator="generator",
            window=12,
            sink=3,
        ),
        # Krea's server fixes the timesteps at these whole numbers and shifts nothing; it sees one past chunk
        _wan(
            "krea-14b",
            "Krea Realtime on Wan 2.1 T2V 14B",
            weights="krea-realtime-video-14b.safetensors and Wan2.1-T2V-14B for text encoder and VAE",
            sources=(
                HubSource("krea/krea-realtime-video", ("krea-realtime-video-14b.safetensors",), NOT_STATED),
                WAN21_14B,
            ),
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
            sources=(
                HubSource("Efficient-Large-Model/LongLive-2.0-5B", ("model_bf16.pt",), NOT_STATED),
                WAN22_5B,
            ),
            dit=DIT_5B,
            steps=(1000, 946, 854, 681),
            shift=1.0,
            chunk=8,
            window=32,
            sink=8,
        ),
    )
}
