"""Presets: every model that the engine can serve, by name, as frozen data validated once.

Importing this loads no torch, so that listing presets and checking weights is fast.
"""

from dataclasses import dataclass
from typing import Any, Literal, get_args

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
from engine.stream.steps import Schedule, spaced, step_levels, unipc_steps

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

Sampler = Literal["renoise", "unipc"]
"""How a chunk's latents are made of noise; see `engine.stream.sampler`."""

ContextRule = Literal["pass", "recompute"]
"""How clean latents get into the KV cache: by a pass over each chunk once it is denoised; or the cache is emptied
before every chunk and written from the last latents alone, at positions from 0, the first of them encoded again from
its pixels as the first frame of a clip."""

RecacheRule = Literal["window", "past", "nothing"]
"""What a `recache` steer rewrites under the new text: sink and past, the past alone, or neither."""

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
    turn_sink: bool = True
    """Whether the sink is rotated anew each chunk to stand just before the past, or stays where it was written."""

    def __post_init__(self) -> None:
        for name in ("window", "sink"):
            if getattr(self, name) % self.chunk:
                raise ValueError(f"{name} must be a multiple of the chunk of {self.chunk}, got {getattr(self, name)}")
        if self.window < self.sink + self.chunk:
            raise ValueError(f"window {self.window} cannot hold the sink {self.sink} and a chunk of {self.chunk}")


@dataclass(frozen=True)
class RolloutConfig:
    """What the rollout needs of a preset: how to sample, and the shape of a chunk's latents."""

    schedule: Schedule
    chunk: int
    latent_channels: int
    latent_rows: int
    latent_columns: int
    first_schedule: Schedule | None = None
    """Of a scene's first chunk where it differs: that chunk has no past to condition on."""
    context_sigma: float = 0.0
    """Noise level of the context pass: 0 in every public Wan preset; a little keeps small models from drifting."""
    sampler: Sampler = "renoise"


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
    steps: tuple[float, ...]
    """Denoising steps as indices into the shifted table of 1000 noise levels; see `step_levels`."""
    first_steps: tuple[float, ...] | None = None
    """Steps of a scene's first chunk where they differ: it has no past to condition on."""
    shorter: tuple[tuple[float, ...], ...] = ()
    """The schedules of 1, 2, ... steps, where they are not chosen evenly among `steps`."""
    shift: float
    sampler: Sampler = "renoise"
    whole_timesteps: bool = False
    """Whether the network is told timesteps cut to whole numbers."""
    chunk: int
    window: int
    sink: int
    turn_sink: bool = True
    """See `CacheConfig`."""
    context: ContextRule = "pass"
    context_sigma: float
    recache: RecacheRule = "window"
    shot_offset: int | None = None
    """Latent frames by which positions jump where a `cut` steer begins a scene. The past then stays in sight, and the
    scene's first chunk is kept as a second sink until the next cut. None: a cut shows nothing of the past."""
    soft_chunks: int
    """Chunks over which a `soft` prompt change blends."""
    weights: str = ""
    """The files that `python -m engine convert` needs, for messages."""
    sources: tuple[HubSource, ...] = ()
    """Where they are published; empty where Livereel knows no place."""
    generator: Literal["generator_ema", "generator"] = "generator_ema"
    """The network of a pickled checkpoint that its authors sample with."""

    def __post_init__(self) -> None:
        if self.context == "recompute" and self.sink:
            raise ValueError("a context that is recomputed has no sink")
        if self.shot_offset is not None and (self.turn_sink or self.window < self.sink + 3 * self.chunk):
            raise ValueError("scene cuts that keep the past need an absolute sink, and a window of two past chunks")

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
        return tuple(level.sigma for level in self._schedule(self.steps).levels)

    @property
    def first_sigmas(self) -> tuple[float, ...]:
        """Noise levels of the first chunk of a scene."""
        return tuple(level.sigma for level in self._schedule(self.first_steps or self.steps).levels)

    def _schedule(self, steps: tuple[float, ...]) -> Schedule:
        full, *shorter = (step_levels(part, self.shift, whole=self.whole_timesteps) for part in (steps, *self.shorter))
        return Schedule(full, tuple(shorter))

    def cache(self) -> CacheConfig:
        _, ph, pw = self.dit.patch
        rows, columns = self.latent_rows // ph, self.latent_columns // pw
        return CacheConfig(self.chunk, self.window, self.sink, rows, columns, self.turn_sink)

    def rollout(self) -> RolloutConfig:
        return RolloutConfig(
            self._schedule(self.steps),
            self.chunk,
            self.dit.in_channels,
            self.latent_rows,
            self.latent_columns,
            self._schedule(self.first_steps) if self.first_steps else None,
            self.context_sigma,
            self.sampler,
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

# Where the weights are published, by their authors' READMEs as far as they were at hand. Not tried against the Hub.
NOT_STATED = "not stated: see the repository"


def _base(repository: str, vae: str) -> HubSource:
    """Text encoder, its tokenizer and the VAE of a model by Wan's authors."""
    files = ("models_t5_umt5-xxl-enc-bf16.pth", "google/umt5-xxl/tokenizer.json", vae)
    return HubSource(repository, files, "apache-2.0")


BASE = {
    DIT_1_3B: _base("Wan-AI/Wan2.1-T2V-1.3B", "Wan2.1_VAE.pth"),
    DIT_14B: _base("Wan-AI/Wan2.1-T2V-14B", "Wan2.1_VAE.pth"),
    DIT_5B: _base("Wan-AI/Wan2.2-TI2V-5B", "Wan2.2_VAE.pth"),
}


def _wan(
    name: str,
    description: str,
    source: HubSource,
    *,
    weights: str,
    dit: DiTConfig = DIT_1_3B,
    steps: tuple[float, ...] = FOUR_STEPS,
    chunk: int = 3,
    window: int = 21,
    sink: int = 0,
    soft_chunks: int = 2,
    **differences: Any,
) -> Preset:
    """A preset of the Wan family. `differences` are fields of `Preset` that are not the defaults."""
    base, new = BASE[dit], dit is DIT_5B
    return Preset(
        name=name,
        description=description,
        weights=f"{weights} and {base.repository.removeprefix('Wan-AI/')} for text encoder and VAE",
        sources=(source, base),
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
        shift=5.0,
        chunk=chunk,
        window=window,
        sink=sink,
        context_sigma=0.0,
        soft_chunks=soft_chunks,
        **differences,
    )


def _causal_forcing(
    name: str,
    description: str,
    file: str,
    *,
    generator: Literal["generator_ema", "generator"] = "generator_ema",
    chunk: int = 1,
    steps: tuple[float, ...] = FOUR_STEPS,
    first_steps: tuple[float, ...] | None = None,
) -> Preset:
    return _wan(
        name,
        f"Causal-Forcing on Wan 2.1 T2V 1.3B, {description}",
        HubSource("zhuhz22/Causal-Forcing", (file,), "apache-2.0"),
        weights=file,
        generator=generator,
        chunk=chunk,
        steps=steps,
        first_steps=first_steps,
    )


def _longlive(name: str, description: str, *, turn_sink: bool) -> Preset:
    """LongLive 1.3B: trained with window and sink. A prompt change rewrites the past and keeps the sink's old keys
    (NVlabs/LongLive, `configs/longlive_interactive_inference.yaml`, `global_sink: true`)."""
    files, loras = ("models/longlive_base.pt",), ("models/lora.pt",)
    return _wan(
        name,
        f"LongLive on Wan 2.1 T2V 1.3B: {description}",
        HubSource("Efficient-Large-Model/LongLive-1.3B", files, NOT_STATED, loras),
        weights="longlive_base.pt with --lora lora.pt,",
        generator="generator",
        window=12,
        sink=3,
        turn_sink=turn_sink,
        recache="past",
    )


def _krea(name: str, steps: int) -> Preset:
    """Krea's server: the context is one chunk, recomputed; a schedule for any number of steps; a blend of four
    embeddings, the first of which is the old one (krea-ai/realtime-video, `release_server.py`)."""
    file = "krea-realtime-video-14b.safetensors"
    return _wan(
        name,
        f"Krea Realtime on Wan 2.1 T2V 14B, {steps} steps",
        HubSource("krea/krea-realtime-video", (file,), NOT_STATED),
        weights=file,
        dit=DIT_14B,
        steps=spaced(steps),
        shorter=tuple(spaced(count) for count in range(1, steps)),
        window=6,
        context="recompute",
        recache="nothing",
        soft_chunks=3,
    )


PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        MINI,
        _wan(
            "self-forcing-1.3b",
            "Self-Forcing (DMD) on Wan 2.1 T2V 1.3B: trained for clips of five seconds",
            HubSource("gdhe17/Self-Forcing", ("checkpoints/self_forcing_dmd.pt",), NOT_STATED),
            weights="self_forcing_dmd.pt",
        ),
        _causal_forcing(
            "causal-forcing-1.3b", "4 steps", "chunkwise/causal_forcing.pt", generator="generator", chunk=3
        ),
        _causal_forcing("causal-forcing-1.3b-framewise", "frame by frame, 4 steps", "framewise/causal_forcing.pt"),
        _causal_forcing(
            "causal-forcing-1.3b-2step",
            "frame by frame, 2 steps after a first frame of 4",
            "causal-forcing++/framewise-2step.pt",
            steps=(1000, 500),
            first_steps=FOUR_STEPS,
        ),
        _causal_forcing(
            "causal-forcing-1.3b-1step",
            "frame by frame, 1 step after a first frame of 4",
            "causal-forcing++/framewise-1step.pt",
            steps=(1000,),
            first_steps=FOUR_STEPS,
        ),
        _longlive("longlive-1.3b", "for minutes, with prompt changes", turn_sink=False),
        _longlive("longlive-1.3b-infinity", "without end, its sink moving along", turn_sink=True),
        _krea("krea-14b", 5),
        _krea("krea-14b-4step", 4),
        _wan(
            "ti2v-5b",
            "LongLive 2.0 on Wan 2.2 TI2V 5B, text to video in 1280x704",
            HubSource("Efficient-Large-Model/LongLive-2.0-5B", ("model_bf16.pt",), NOT_STATED),
            weights="the LongLive 2.0 generator (merged, or its base with --lora)",
            generator="generator",
            dit=DIT_5B,
            sampler="unipc",
            steps=unipc_steps(4),
            shorter=tuple(unipc_steps(count) for count in range(1, 4)),
            whole_timesteps=True,
            chunk=8,
            window=32,
            sink=8,
            turn_sink=False,
            recache="nothing",
            shot_offset=8,
        ),
    )
}
