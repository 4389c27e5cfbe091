"""From a preset's name to a pipeline: build on the meta device, load, apply the transforms, calibrate."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn

from engine.checkpoints import hub, store, tokenizer, wan
from engine.config import PRESETS, Preset, TextFormat, TextPlacement
from engine.models.config import LatentStatistics
from engine.models.dit import CausalWan
from engine.models.light_vae import LightDecoder
from engine.models.text_encoder import TextEncoder
from engine.models.tokenizer import PromptTokenizer, Tokenizer
from engine.models.vae import CausalVAE
from engine.offload.text import place_text_encoder
from engine.pipeline import Pipeline
from engine.stream.decoding import Decoder, FullDecoding, LightDecoding, PictureEncoding
from engine.transforms.apply import Speed, accelerate, fastest_exact
from engine.transforms.calibrate import PROMPTS, calibrate
from engine.transforms.low_bit import Policy, WeightFormat, unsupported_reason
from engine.transforms.weight_only import quantise_weights
from engine.warmup import WarmupResult
from engine.wire import ModelInfo

WEIGHTS = Path(__file__).parent / "weights"
T = TypeVar("T", bound=nn.Module)


def best_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast, float32 elsewhere. The machine alone decides, so frames repeat.

    On a CPU that is AMX, or AMD's AVX-512 BF16: Zen 4 ran our shapes 2 to 3 times faster in bfloat16, while an Intel
    CPU with AVX-512 BF16 and no AMX ran them slower (`docs/benchmarks.md`).
    """
    if device.type != "cpu":
        return torch.bfloat16
    try:
        description = Path("/proc/cpuinfo").read_text()
    except OSError:
        return torch.float32
    amd = "AuthenticAMD" in description
    return torch.bfloat16 if "amx_bf16" in description or (amd and "avx512_bf16" in description) else torch.float32


def assemble(
    name: str,
    *,
    weights: Path | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
    decoder: Literal["light", "full"] = "light",
    text_encoder: TextPlacement = "resident",
    text_weights: TextFormat | None = None,
    speed: Speed | None = None,
    loras: bool = False,
) -> Pipeline:
    """Load a preset. What is left out is chosen for this machine.

    Args:
        weights: folder of a native store; by default the one in the repository.
        decoder: the light decoder, or the VAE's own, which takes several times as long.
        text_encoder: where it lives, see `engine.offload.text`.
        text_weights: quantise its weights.
        speed: by default the transforms that lose no precision on this device.
        loras: weights may change while serving.

    Raises:
        KeyError: no preset has this name.
        store.StoreError: a weight file is missing, truncated, altered or does not fit; the message names it.
    """
    preset = PRESETS[name]
    device = device or best_device()
    speed = speed or fastest_exact(device)
    loader = _open_store(preset, weights, dtype or best_dtype(device))
    loader.require("text_encoder", "dit", "statistics", tokenizer.FILE, "vae" if decoder == "full" else "light_vae")
    if preset.context == "recompute":
        loader.require("vae")

    on_device = text_encoder == "resident" and text_weights is None
    text = loader.load("text_encoder", lambda: TextEncoder(preset.text), device if on_device else torch.device("cpu"))
    if text_weights is not None:
        quantise_weights(text, text_weights)
    encoder = place_text_encoder(text, text_encoder, device)
    dit = loader.load("dit", lambda: CausalWan(preset.dit), device)
    statistics = loader.statistics(preset.vae.latent_channels)
    # a store for the light decoder may lack the VAE; no stream can then start from a picture
    vae = loader.load("vae", lambda: CausalVAE(preset.vae), device) if loader.weights.shapes("vae") else None
    decoding: Decoder
    if decoder == "full":
        assert vae is not None
        decoding = FullDecoding(vae, statistics)
    else:
        light = loader.load("light_vae", lambda: LightDecoder(preset.light_vae), device)
        light.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        decoding = LightDecoding(light, statistics)

    served = accelerate(dit, decoding, preset, speed, keep_on_host=loras)
    for line in device_notes(served.policy, speed, device):
        print(f"engine: {line}", flush=True)
    pictures = None if vae is None else PictureEncoding(vae, statistics)
    pipeline = Pipeline(preset, loader.tokenizer(), encoder, served, pictures)
    if speed.fixed_scales:
        calibrate(served, preset, [pipeline.encode_prompt(prompt) for prompt in PROMPTS])
    return pipeline


def _open_store(preset: Preset, weights: Path | None, dtype: torch.dtype) -> "_Loader":
    folder = weights or WEIGHTS / preset.name
    if weights is None and not folder.exists():
        folder = hub.default_folder(preset.name)
        if not folder.exists():
            fetch = f"run `python -m engine download {preset.name}`, or " if preset.sources else ""
            raise store.StoreError(
                f"the weights of {preset.name} are not part of Livereel: {fetch}give the folder that "
                f"`python -m engine convert {preset.name}` wrote as --weights"
            )
    return _Loader(preset.name, dtype, store.open_store(folder))


@dataclass(frozen=True)
class _Loader:
    """Takes networks out of a store."""

    preset: str
    dtype: torch.dtype
    weights: store.Store

    def require(self, *parts: str) -> None:
        """Raises StoreError, before any file is read, unless the store has all these components and text files."""
        there = {*self.weights.components(), *self.weights.texts()}
        if missing := [part for part in parts if part not in there]:
            raise store.StoreError(
                f"{self.weights.folder} holds no {', no '.join(missing)}, which {self.preset} needs: convert its "
                f"weights again, from all of its networks"
            )

    def load(self, component: str, network: Callable[[], T], device: torch.device) -> T:
        """The network on `device`, with its weights in `dtype`."""
        with torch.device("meta"):
            module = network()
        tensors = self._read(
            component, {name: tuple(value.shape) for name, value in module.state_dict().items()}, device
        )
        module.load_state_dict(tensors, assign=True)
        return module.to(dtype=self.dtype).requires_grad_(False).eval()

    def statistics(self, channels: int) -> LatentStatistics:
        tensors = self._read("statistics", {"mean": (channels,), "std": (channels,)}, torch.device("cpu"))
        return LatentStatistics(tuple(tensors["mean"].tolist()), tuple(tensors["std"].tolist()))

    def _read(self, component: str, expected: dict[str, tuple[int, ...]], device: torch.device) -> dict[str, Tensor]:
        if differences := wan.compare(expected, self.weights.shapes(component)):
            raise store.StoreError(
                f"weights in {self.weights.folder} do not fit preset {self.preset}: {component}: "
                + "; ".join(wan.sentences(differences))
            )
        return self.weights.read(component, device)

    def tokenizer(self) -> PromptTokenizer:
        try:
            return tokenizer.parse_tokenizer(
                self.weights.read_text(tokenizer.FILE), self.weights.folder / tokenizer.FILE
            )
        except ValueError as error:
            raise store.StoreError(str(error)) from None


def device_notes(policy: Policy, speed: Speed, device: torch.device) -> Iterator[str]:
    """What to tell a user who asked for `speed`: the projections that became sparse, and formats that are emulated."""
    if speed.sparse_weights == "faster":
        yield f"2:4 sparse weights: {', '.join(sorted(policy.sparse)) or 'none would be faster here'}"
    formats = [WeightFormat(policy.scheme), *([WeightFormat(policy.scheme, sparse=True)] if policy.sparse else [])]
    for weight in formats:
        if reason := unsupported_reason(weight, device):
            form = f"2:4 {weight.scheme or 'sparse'}" if weight.sparse else weight.scheme
            yield f"{form} products are emulated here, and slower for it: {reason}"


PROMISED = {"cuda": 0.95, "cpu": 0.9}
"""`ModelInfo.promised` by device type. A GPU's chunk times hardly vary, and nothing else runs there: on an H200 that
was busy for 0.94 of the time, with 5 streams or with 8 of 2 steps, no chunk was late in 2 minutes
(`docs/benchmarks.md`)."""


def describe(pipeline: Pipeline, warmup: WarmupResult) -> ModelInfo:
    """What the engine reports about its model when it is ready."""
    preset = pipeline.preset
    words = pipeline.tokenizer if isinstance(pipeline.tokenizer, Tokenizer) else None
    modules = (pipeline.text_encoder, pipeline.served.wan, pipeline.decoder.network)
    return ModelInfo(
        name=preset.name,
        width=preset.width,
        height=preset.height,
        fps=preset.fps,
        chunk_frames=preset.chunk_frames,
        first_chunk_frames=preset.first_chunk_frames,
        steps=len(preset.steps),
        chunk_seconds=warmup.chunk_seconds,
        parameters=sum(p.numel() for module in modules for p in module.parameters()),
        description=preset.description,
        vocabulary=words.forms() if words else None,
        prompt_words=preset.text.length - 1 if words else None,
        promised=PROMISED.get(pipeline.device.type, 0.9),
    )
