"""Stream a model at full size, with random weights, and print where a chunk's time and memory go.

    python -m engine.bench.rollout self-forcing-1.3b --chunks 400

Speed depends on sizes and not on values, so no checkpoint is needed. Each chunk is itemised by device events:
denoising steps, decoding, copying frames to the host, context pass. Beside it stands the machine's own ceiling, a
large bfloat16 matrix product timed in the same run, and the share of it that the transformer reaches by the
operations it must do. The first and the last chunks at full window show whether an endless stream stays flat.
"""

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from engine.assemble import best_device, best_dtype
from engine.config import PRESETS, Preset
from engine.models.config import LatentStatistics
from engine.models.dit import CausalWan
from engine.models.light_vae import LightDecoder
from engine.models.vae import CausalVAE
from engine.options import add_speed
from engine.stream import pruned_heads as heads
from engine.stream.decoding import (
    Decoder,
    FullDecoding,
    LightDecoding,
    PictureEncoding,
    SideStream,
    leading_frame,
    to_bytes,
    to_host,
)
from engine.stream.rollout import commit_chunk, denoise_chunk
from engine.stream.steps import fewer
from engine.transforms.apply import Speed, accelerate, from_arguments
from engine.transforms.calibrate import calibrate

PROMPT_TOKENS = 200
"""A long prompt. The rest of the text's length is padding, which cross-attention counts without visiting it."""
STAGES = ("steps", "decode", "copy", "context")


def random_weights(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Fill a module from the meta device with values that keep activations near one."""
    module.to(dtype)  # on the meta device, where it costs nothing
    module.to_empty(device=device)
    for name, p in module.named_parameters():
        fan_in = p[0].numel() if p.ndim > 1 else 1
        if p.ndim == 1 or "gamma" in name:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
        elif "modulation" in name:
            nn.init.normal_(p, std=p.shape[-1] ** -0.5)
        else:
            nn.init.normal_(p, std=fan_in**-0.5)
    module.requires_grad_(False).eval()


def random_prompt(preset: Preset, tokens: int, batch: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Encodings of prompts of so many tokens, padded with zeros as the encoder pads: [batch, L, text_dim]."""
    text = torch.randn(batch, preset.text.length, preset.text.dim, device=device, dtype=dtype)
    text[:, tokens:] = 0
    return text


def operations(preset: Preset, keys: int, prompt: int) -> float:
    """Floating-point operations of one forward of a chunk that sees `keys` tokens and a prompt of `prompt`: two for
    each multiply-add."""
    dit = preset.dit
    tokens = preset.chunk * preset.latent_rows * preset.latent_columns // (dit.patch[1] * dit.patch[2])
    linears = 6 * dit.dim**2 + 2 * dit.dim * dit.ffn_dim  # q k v o, and cross-attention's q o
    attention = 2 * dit.dim * (keys + min(prompt + 1, preset.text.length))
    return 2.0 * tokens * dit.num_layers * (linears + attention)


def ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 1.0) -> float:
    """Operations a second of a large matrix product on random data, sustained."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    a @ b
    synchronise(device)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        for _ in range(8):
            a @ b
        synchronise(device)
        count += 8
    return 2.0 * size**3 * count / (time.perf_counter() - started)


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


@dataclass
class Clock:
    """Times of the stages of every chunk, in seconds; by device events, so that nothing waits while it runs."""

    device: torch.device
    marks: list[dict[str, tuple[torch.cuda.Event | float, torch.cuda.Event | float]]] = field(default_factory=list)

    def chunk(self) -> None:
        """A new one begins, and the one before ends."""
        now = self._now()
        if self.marks:
            self.marks[-1]["chunk"] = self.marks[-1]["chunk"][0], now
        self.marks.append({"chunk": (now, now)})

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = self.marks[-1].get(name, (self._now(), None))[0]
        yield
        self.marks[-1][name] = before, self._now()

    def _now(self) -> torch.cuda.Event | float:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> list[dict[str, float]]:
        synchronise(self.device)

        def between(a: torch.cuda.Event | float, b: torch.cuda.Event | float) -> float:
            if isinstance(a, float) and isinstance(b, float):
                return b - a
            return cast(torch.cuda.Event, a).elapsed_time(cast(torch.cuda.Event, b)) / 1e3

        return [{name: between(*pair) for name, pair in marks.items()} for marks in self.marks]


def random_encoder(preset: Preset, device: torch.device, dtype: torch.dtype) -> PictureEncoding:
    """A preset's encoder of pictures, with random weights."""
    with torch.device("meta"):
        network = CausalVAE(preset.vae)
    random_weights(network, device, dtype)
    channels = preset.dit.in_channels
    return PictureEncoding(network, LatentStatistics((0.0,) * channels, (1.0,) * channels))


def random_model(preset: Preset, decoding: str, device: torch.device, dtype: torch.dtype) -> tuple[CausalWan, Decoder]:
    """A preset's transformer and the decoder named by `decoding`, `light` or `full`, with random weights."""
    with torch.device("meta"):
        wan = CausalWan(preset.dit)
        network: LightDecoder | CausalVAE
        network = LightDecoder(preset.light_vae) if decoding == "light" else CausalVAE(preset.vae)
    for module in (wan, network):
        random_weights(module, device, dtype)
    channels = preset.dit.in_channels
    statistics = LatentStatistics((0.0,) * channels, (1.0,) * channels)
    if isinstance(network, CausalVAE):
        return wan, FullDecoding(network, statistics)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return wan, LightDecoding(network, statistics)


@torch.inference_mode()
def roll(
    preset: Preset,
    chunks: int,
    decoding: str,
    speed: Speed,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    overlap: bool = False,
    prompt_tokens: int = PROMPT_TOKENS,
) -> tuple[list[dict[str, float]], dict[str, float], float]:
    """Seconds of every stage of every chunk, and of the chunk, from its start to the next one's; memory in bytes;
    seconds to a new stream's first frames in the host."""
    before = allocated(device)
    wan, decoder = random_model(preset, decoding, device, dtype)
    served = accelerate(wan, decoder, preset, speed, batch=batch)
    weights = allocated(device) - before
    if speed.sparse_weights:
        print(f"2:4 sparse: {', '.join(sorted(served.policy.sparse)) or 'none'}")
    beside = SideStream(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)  # of serving: loading may hold exact weights for a moment
    model, decoder, cache = served.dit, served.decoder, served.new_cache()
    text = random_prompt(preset, prompt_tokens, batch, device, dtype)
    if speed.fixed_scales:
        calibrate(served, preset, [text])
    context = model.encode_text(text)
    rollout, clock, seeds = preset.rollout(), Clock(device), range(batch)
    memories: list[list[Tensor] | None] = [None] * batch
    pictures = random_encoder(preset, device, dtype) if preset.context == "recompute" else None
    leading: list[Tensor] = []
    early = 0
    for index in range(chunks):
        clock.chunk()
        rows = [(seed, index) for seed in seeds]
        with clock.stage("steps"):
            latents = denoise_chunk(model, rollout, cache, context, rows)
        with beside(latents) if overlap else nullcontext():
            for row, part in enumerate(latents.split(1)):
                with clock.stage("decode"):
                    frames, memories[row] = decoder(part, memories[row])
                with clock.stage("copy"):
                    to_host(to_bytes(frames))
                leading.append(leading_frame(frames, preset.chunk, preset.temporal_stride))
        with clock.stage("context"):
            if pictures is not None:
                beside.join(*leading)
                rows_of = zip(latents.split(1), leading, strict=True)
                latents = torch.cat([pictures.begin_clip(*row) for row in rows_of])
                cache.reset(0)
            leading.clear()
            commit_chunk(model, rollout, cache, context, latents, rows, context_pass=speed.context_pass)
        if index == 2 * preset.window // preset.chunk:
            early = allocated(device)
    synchronise(device)
    memory = {
        "weights": weights,
        "kv cache": cache.bytes(),
        "decoder state": sum(x.nbytes for row in memories for x in row or ()),
    }
    if device.type == "cuda":
        memory |= {
            "peak": torch.cuda.max_memory_allocated(device),
            "growth since the window filled": allocated(device) - early,
        }
    cache.reset(0)
    synchronise(device)
    started = time.perf_counter()
    latents = denoise_chunk(model, rollout, cache, context, [(seed, 0) for seed in seeds])
    frames, _ = decoder(latents[:1], None)
    to_host(to_bytes(frames))
    synchronise(device)
    first = time.perf_counter() - started
    return clock.seconds(), {name: float(size) for name, size in memory.items()}, first


def summary(seconds: Sequence[dict[str, float]]) -> dict[str, float]:
    """Milliseconds: the median of each stage, and of whole chunks the median, the 95th percentile and the longest."""
    whole = sorted(stages["chunk"] for stages in seconds)
    figures = {name: 1e3 * median(stages[name] for stages in seconds) for name in STAGES}
    last = len(whole) - 1
    return figures | {"chunk": 1e3 * median(whole), "p95": 1e3 * whole[round(0.95 * last)], "max": 1e3 * whole[last]}


def add_preset(parser: argparse.ArgumentParser) -> None:
    """A preset and what may be changed about it: shared by what runs models at full size."""
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--window", type=int, help="latent frames seen (default: the preset's)")
    parser.add_argument("--sink", type=int, help="of these, pinned to the start (default: the preset's)")
    parser.add_argument("--resolution", metavar="WxH", help="default: the preset's")
    parser.add_argument("--steps", type=int, help="denoise with so many steps, as serving does when short of time")
    add_speed(parser)
    parser.add_argument(
        "--prune-share", type=float, metavar="SHARE", help="prune the first heads of every layer instead of a FILE's"
    )


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace, device: torch.device) -> tuple[Preset, Speed]:
    """The changed preset, and what is done for speed on this device; leaves with an error where they cannot be."""
    preset = PRESETS[options.preset]
    changes: dict[str, Any] = {
        name: value for name in ("window", "sink") if (value := getattr(options, name)) is not None
    }
    if options.resolution:
        try:
            changes["width"], changes["height"] = map(int, options.resolution.split("x"))
        except ValueError:
            parser.error(f"--resolution is WIDTHxHEIGHT, such as 832x480; got {options.resolution!r}")
    try:
        if options.steps is not None:
            own = [*preset.shorter, preset.steps]
            steps = own[options.steps - 1] if 0 < options.steps <= len(own) > 1 else fewer(preset.steps, options.steps)
            changes |= {"steps": steps, "shorter": preset.shorter[: options.steps - 1]}
        preset = replace(preset, **changes)
        preset.cache()
        preset.rollout()
        speed = from_arguments(options, device, preset.dit)
        if options.prune_share is None:
            return preset, speed
        pruned = heads.first(preset.dit, options.prune_share)
        fused = speed.fused or (bool(pruned) and not options.plain)
        return preset, replace(speed, fused=fused, pruned_heads=pruned)
    except ValueError as error:
        parser.error(str(error))


def describe_speed(preset: Preset, speed: Speed) -> str:
    """What is done for speed, on one line."""
    pruned = f"{len(speed.pruned_heads)} of {preset.dit.num_layers * preset.dit.num_heads}"
    return " ".join(f"{name}={value}" for name, value in (vars(speed) | {"pruned_heads": pruned}).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset(parser)
    parser.add_argument("--chunks", type=int, default=40)
    parser.add_argument("--decoder", choices=("light", "full"), default="light")
    parser.add_argument("--batch", type=int, default=1, help="streams whose chunks are made in one batch")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS, help=f"of the prompt ({PROMPT_TOKENS})")
    parser.add_argument("--in-turn", action="store_true", help="decode before the context pass, not beside it")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    device = best_device()
    preset, speed = chosen(parser, options, device)
    dtype = best_dtype(device)
    steady = 2 * preset.window // preset.chunk  # from there on the window is full, and every shape has been met
    if options.chunks < steady + 4:
        parser.error(f"--chunks must be at least {steady + 4} for this window")

    best = ceiling(device, dtype)
    seconds, memory, opening = roll(
        preset,
        options.chunks,
        options.decoder,
        speed,
        device,
        dtype,
        batch=options.batch,
        overlap=not options.in_turn,
        prompt_tokens=options.prompt_tokens,
    )
    full = seconds[steady:-1]  # the last one's end is not known
    part = min(20, len(full) // 2)
    first, last = summary(full[:part]), summary(full[-part:])

    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    shape = f"{preset.width}x{preset.height}, window {preset.window} ({preset.sink} sink), {len(preset.steps)} steps"
    order = "before the context pass" if options.in_turn else "beside the context pass"
    print(f"{preset.name} on {where}, {dtype}: {shape}, {options.decoder} decoder {order}, {speed.kv_cache} cache")
    print(describe_speed(preset, speed))
    frames = options.chunks * preset.chunk
    print(
        f"{options.chunks} chunks, {frames} latent frames, {options.batch} streams in a batch, "
        f"prompts of {options.prompt_tokens} tokens"
    )
    for name, figures in ((f"first {part} at full window, ms", first), (f"last {part}, ms", last)):
        print(f"{name:30s} " + "  ".join(f"{key} {value:.1f}" for key, value in figures.items()))
    chunk = last["chunk"] / 1e3
    playback = preset.chunk_frames / preset.fps
    print(f"a new stream's first {preset.first_chunk_frames} frames are in host memory after {1e3 * opening:.0f} ms")
    tokens = preset.window * preset.latent_rows * preset.latent_columns // (preset.dit.patch[1] * preset.dit.patch[2])
    work = options.batch * operations(preset, tokens, options.prompt_tokens)
    reached = work * len(preset.steps) / (last["steps"] / 1e3)
    print(f"frames/s {options.batch * preset.chunk_frames / chunk:.1f}, real-time factor {chunk / playback:.3f}")
    print(f"a forward is {work / 1e12:.3g} Tflop: {reached / 1e12:.3g} Tflop/s, {100 * reached / best:.0f} % of the")
    print(f"ceiling of {best / 1e12:.3g} Tflop/s (a large product, measured in this run)")
    print("memory, GiB: " + "  ".join(f"{name} {size / 2**30:.2f}" for name, size in memory.items()))
    if options.json:
        report = {
            "opening": opening,
            "first": first,
            "last": last,
            "memory": memory,
            "ceiling": best,
            "reached": reached,
        }
        options.json.write_text(json.dumps({"preset": preset.name, "device": where, **report}, indent=1))


if __name__ == "__main__":
    main()
