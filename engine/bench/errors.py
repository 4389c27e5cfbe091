"""What every transform changes: against the model as it is written, in float32, over one rollout.

    python -m engine.bench.errors mini --chunks 8
    python -m engine.bench.errors mini --chunks 8 --pruned-heads FILE FILE   # these policies' heads pruned, and no more

`mini` runs with its weights, the other presets with random ones. Each variant starts from the same noise and prompt and
goes its own way: its cache holds what it wrote itself, so errors of early chunks feed later ones. Printed are the
relative L2 errors of the latents of the first chunk, of the last one and of all, and the PSNR of the frames in dB.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from engine.assemble import WEIGHTS, assemble, best_device, best_dtype
from engine.bench.rollout import random_model
from engine.bench.streams import NoWords, RandomText
from engine.config import PRESETS, ROLES, Preset
from engine.ops.linear import fp8_rows_supported
from engine.pipeline import Pipeline
from engine.stream import pruned_heads as heads
from engine.transforms.apply import Speed, accelerate
from engine.transforms.calibrate import calibrate

PROMPT = "a shiny red cube bouncing on grass at sunset with a small blue ball to the left, orbiting camera"

Make = Callable[[torch.dtype, Speed], Pipeline]


def variants(device: torch.device) -> Iterator[tuple[str, Speed]]:
    """Each transform alone, and together what would serve together."""
    gpu = device.type == "cuda"
    fused = Speed(fused=True, graphs=gpu)
    yield "as it is written", Speed()
    yield "fused", fused
    yield "fp8 projections", replace(fused, low_bit="fp8")
    yield "fp8, fixed scales", replace(fused, low_bit="fp8", fixed_scales=True)
    yield "fp8-tensor", replace(fused, low_bit="fp8-tensor")
    yield "fp8-tensor, fixed scales", replace(fused, low_bit="fp8-tensor", fixed_scales=True)
    yield "int8 projections", replace(fused, low_bit="int8")
    yield "int8, fixed scales", replace(fused, low_bit="int8", fixed_scales=True)
    yield "mxfp8", replace(fused, low_bit="mxfp8")
    yield "nvfp4", replace(fused, low_bit="nvfp4")
    yield "fp8 weights alone", replace(fused, low_bit="fp8-weights")
    yield "int8 weights alone", replace(fused, low_bit="int8-weights")
    yield "2:4 weights", replace(fused, sparse_weights=frozenset(ROLES))
    yield "2:4 weights, fp8", replace(fused, low_bit="fp8", sparse_weights=frozenset(ROLES))
    yield "8-bit attention", replace(fused, kv_cache="int8-fp8")
    yield "half of the past", replace(fused, keep=0.5)
    yield "a fifth of the past", replace(fused, keep=0.2)
    yield "no context pass", replace(fused, context_pass=False)
    yield "fp8, 8-bit attention", replace(fused, low_bit="fp8", kv_cache="int8-fp8")
    yield "the same, a fifth of the past", replace(fused, low_bit="fp8", kv_cache="int8-fp8", keep=0.2)


def pruning(files: Sequence[Path], preset: Preset, device: torch.device) -> Iterator[tuple[str, Speed]]:
    """The heads of each file pruned, alone and beside what looks at half of the past. Raises ValueError, see `load`."""
    for file in files:
        pruned = heads.load(file, preset.dit)
        speed = Speed(fused=True, graphs=device.type == "cuda", pruned_heads=pruned)
        yield f"{file.stem}, {len(pruned)} heads", speed
        yield "the same, half of the past", replace(speed, keep=0.5)


@torch.inference_mode()
def run(pipeline: Pipeline, chunks: int) -> tuple[list[Tensor], Tensor]:
    """Latents of every chunk, float32 on the CPU, and all frames."""
    state = pipeline.open(PROMPT, seed=1)
    latents, frames = [], []
    for _ in range(chunks):
        frames.append(pipeline.next_chunk(state).frames)
        pipeline.commit(state)
        latents.append(state.recent[-1].float().cpu())
    return latents, torch.cat(frames).float()


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def maker(preset: Preset, device: torch.device) -> Make:
    """Pipelines of this preset that differ in number format and transforms alone."""
    if (WEIGHTS / preset.name).exists():
        return lambda dtype, speed: assemble(preset.name, device=device, dtype=dtype, speed=speed)
    text = RandomText(preset, device)

    def make(dtype: torch.dtype, speed: Speed) -> Pipeline:
        torch.manual_seed(0)
        wan, decoder = random_model(preset, "light", device, torch.float32)
        wan.to(dtype)
        decoder.network.to(dtype)
        pipeline = Pipeline(preset, NoWords(), text, accelerate(wan, decoder, preset, speed))
        if speed.fixed_scales:
            calibrate(pipeline.served, preset, [pipeline.encode_prompt(PROMPT)])
        return pipeline

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--pruned-heads", type=Path, nargs="+", metavar="FILE", help="policies to compare")
    options = parser.parse_args()
    if options.chunks < 1:
        parser.error("--chunks must be at least 1")
    device, preset = best_device(), PRESETS[options.preset]
    try:
        compared = list(pruning(options.pruned_heads, preset, device) if options.pruned_heads else variants(device))
    except ValueError as error:
        parser.error(str(error))
    make, dtype = maker(preset, device), best_dtype(device)
    expected, shown = run(make(torch.float32, Speed()), options.chunks)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    emulated = "" if fp8_rows_supported(device) else "; fp8 products emulated"
    print(f"{preset.name} on {where}, {options.chunks} chunks, against float32{emulated}")
    print(f"{'':40s}{'first':>10s}{'last':>10s}{'all':>10s}{'PSNR, dB':>10s}")
    formats = [torch.float32, *([dtype] if dtype != torch.float32 else [])]
    for number_format in formats:
        for name, speed in compared:
            if number_format == torch.float32 and speed == Speed():
                continue
            latents, frames = run(make(number_format, speed), options.chunks)
            errors = [relative(*pair) for pair in zip(latents, expected, strict=True)]
            whole = relative(torch.cat(latents), torch.cat(expected))
            psnr = float(-10 * ((frames - shown) / 255).square().mean().clamp(min=1e-10).log10())
            label = f"{name}, {str(number_format).removeprefix('torch.')}"
            print(f"{label:40s}{errors[0]:10.4f}{errors[-1]:10.4f}{whole:10.4f}{psnr:10.1f}", flush=True)


if __name__ == "__main__":
    main()
