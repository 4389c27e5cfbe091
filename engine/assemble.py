"""From a preset's name to a warm pipeline: verify, build on the meta device, load, cast, warm."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, TypeVar

import torch
from torch import nn

from engine.checkpoints import store
from engine.checkpoints.tokenizer import load_tokenizer
from engine.config import PRESETS, KVPrecision, TextFormat, TextPlacement
from engine.models.config import LatentStatistics
from engine.models.dit import CausalWan
from engine.models.light_vae import LightDecoder
from engine.models.text_encoder import TextEncoder
from engine.models.tokenizer import Tokenizer
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
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def best_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the hardware multiplies it fast, float32 elsewhere; fixed by the machine, so frames repeat.

    On a CPU that is AMX, or AMD's AVX-512 BF16: Zen 4 ran our shapes 2 to 3 times faster in bfloat16, while an Intel
    with AVX-512 BF16 and no AMX ran them slower (`docs/benchmarks.md`).
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
    kv_precision: KVPrecision = "exact",
    decoder: Literal["light", "full"] = "light",
    text_encoder: TextPlacement = "resident",
    text_weights: TextFormat | None = None,
    speed: Speed | None = None,
    loras: bool = False,
) -> Pipeline:
    """Load a preset.

    `kv_precision` is how past chunks are kept, see `engine.stream.kv_cache`; `decoder` is the light decoder or the
    VAE's own, which takes several times as long; `text_encoder` is where that lives, see `engine.offload.text`,
    and `text_weights` keeps its weights in 8 bits; `speed` is by default whatever costs no exactness on this device;
    `loras` says that weights may change while it serves.

    Raises:
        KeyError: no preset has this name.
        store.StoreError: a weight file is missing, truncated, altered or does not fit; the message names it.
    """
    preset = PRESETS[name]
    folder = weights or WEIGHTS / name
    if weights is None and not folder.exists():
        raise store.StoreError(
            f"the weights of {name} are not part of Livereel: give the folder that `python -m engine convert {name}` "
            f"wrote as --weights"
        )
    device = device or best_device()
    dtype = dtype or best_dtype(device)
    tensors = store.load(folder)

    def build(component: str, network: Callable[[], T]) -> T:
        """The network on the CPU, with its weights in `dtype`."""
        prefix = component + "."
        mine = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        if not mine:
            raise store.StoreError(f"{folder} holds no {component}, which {name} needs: convert its weights too")
        with torch.device("meta"):
            module = network()
        try:
            module.load_state_dict(mine, assign=True)
        except RuntimeError as error:
            raise store.StoreError(f"weights in {folder} do not fit preset {name}: {error}") from None
        return module.to(dtype=dtype).requires_grad_(False).eval()

    text = build("text_encoder", lambda: TextEncoder(preset.text))
    if text_weights is not None:
        quantise_weights(text, text_weights)
    encoder = place_text_encoder(text, text_encoder, device)
    dit = build("dit", lambda: CausalWan(preset.dit)).to(device)
    if not {"statistics.mean", "statistics.std"} <= tensors.keys():
        raise store.StoreError(f"{folder} holds no latent statistics, which {name} needs: convert its weights again")
    mean, std = (tuple(tensors[f"statistics.{part}"].tolist()) for part in ("mean", "std"))
    statistics = LatentStatistics(mean, std)
    # the VAE may be missing where the light decoder serves: then no stream can start from a picture
    held = any(key.startswith("vae.") for key in tensors)
    vae = build("vae", lambda: CausalVAE(preset.vae)).to(device) if held or decoder == "full" else None
    decoding: Decoder
    if decoder == "full":
        assert vae is not None
        decoding = FullDecoding(vae, statistics)
    else:
        light = build("light_vae", lambda: LightDecoder(preset.light_vae)).to(device)
        light.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        decoding = LightDecoding(light, statistics)
    try:
        tokenizer = load_tokenizer(folder)
    except ValueError as error:
        raise store.StoreError(str(error)) from None
    pictures = None if vae is None else PictureEncoding(vae, statistics)
    if speed is None:
        speed = fastest_exact(device) if kv_precision == "exact" else Speed()
    served = accelerate(dit, decoding, preset, speed, kv_precision=kv_precision, keep_on_host=loras)
    for line in device_notes(served.policy, speed, device):
        print(f"engine: {line}", flush=True)
    pipeline = Pipeline(preset, tokenizer, encoder, served, pictures)
    if speed.fixed_scales:
        calibrate(served, preset, [pipeline.encode_prompt(prompt) for prompt in PROMPTS])
    return pipeline


def device_notes(policy: Policy, speed: Speed, device: torch.device) -> Iterator[str]:
    """What a user who asked for `speed` should know about this device: what it emulates, and which projections are
    sparse."""
    if speed.sparse_weights == "faster":
        yield f"2:4 sparse weights: {', '.join(sorted(policy.sparse)) or 'none would be faster here'}"
    for held in (WeightFormat(policy.scheme), *([WeightFormat(policy.scheme, sparse=True)] if policy.sparse else [])):
        if reason := unsupported_reason(held, device):
            form = f"2:4 {held.scheme or 'sparse'}" if held.sparse else held.scheme
            yield f"{form} products are emulated here, and slower for it: {reason}"


PROMISED = {"cuda": 0.95, "cpu": 0.9}
"""`ModelInfo.promised` by device. Chunks of a GPU hardly vary, and nobody else works there: on an H200 that was busy
for 0.94 of the time, with 5 streams or with 8 of 2 steps, none was late in 2 minutes (`docs/benchmarks.md`)."""


def describe(pipeline: Pipeline, warmup: WarmupResult) -> ModelInfo:
    """What the gateway is told about a loaded and warm model."""
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
