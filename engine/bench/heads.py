"""How much does each head of the self-attention look at the past? And the policy that prunes those that hardly do.

    python -m engine.bench.heads mini --chunks 8
    python -m engine.bench.heads mini --below 0.05 --write heads.json

The model as it is written is rolled out under every prompt and seed. Once its window is full, the softmax of every
forward, denoising steps and context pass alike, is summed over the sink, the past and the current chunk, and averaged
over queries and forwards. Printed are these three shares by layer and head, the one that looks at the past least first,
and beside them the largest share of the past in a single forward. Random weights would say nothing of a model's heads,
so the presets that need weights from elsewhere take their folder as --weights.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from engine.assemble import WEIGHTS, assemble, best_device, best_dtype
from engine.checkpoints.store import StoreError
from engine.config import PRESETS, Preset
from engine.ops.rope import rotate
from engine.pipeline import Pipeline
from engine.stream import pruned_heads as heads
from engine.stream.kv_cache import KVCache
from engine.stream.rollout import commit_chunk, denoise_chunk
from engine.transforms.apply import Speed
from engine.transforms.calibrate import PROMPTS

PLAIN = (
    "a shiny red cube bouncing on grass at sunset with a small blue ball to the left, orbiting camera",
    "a green ball rolling over sand under a cloudy sky, panning camera",
)
"""In the words that `mini` knows, beside the prompts that scales are calibrated on."""

QUERIES = 512
"""At once: their scores, in float32, are what measuring takes beyond a rollout."""


@dataclass
class Mass:
    """Shares of attention by layer and head, each [layers, heads] in float64; a forward counts as one."""

    sums: Tensor
    """[layers, heads, 3] summed over forwards: on the sink, on the past, on the current chunk."""
    most: Tensor
    """Largest share of the past in one forward."""
    forwards: int = 0

    @property
    def mean(self) -> Tensor:
        """[layers, heads, 3], which sum to 1."""
        return self.sums / self.forwards


class MeasuredCache(KVCache):
    """A cache that measures where attention goes, in `mass`, while its window is full; an exact one."""

    mass: Mass

    def measure(self, layers: int, heads: int) -> None:
        """Start over."""
        self.mass = Mass(torch.zeros(layers, heads, 3, dtype=torch.float64), torch.zeros(layers, heads).double())

    def _attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = super()._attend(layer, q, k, v)
        if self.written + 1 >= self.sink_slots + self.ring_slots:
            shares = self.shares(layer, rotate(q, self._angles)).double().cpu()
            self.mass.sums[layer] += shares
            self.mass.most[layer] = self.mass.most[layer].maximum(shares[:, 1])
            self.mass.forwards += layer == 0
        return out

    def shares(self, layer: int, q: Tensor) -> Tensor:
        """Where the turned queries [B, Sq, heads, head_dim] look: float32 [heads, 3], on sink, past and current chunk,
        averaged over batch and queries."""
        keys = self.keys.read(layer, self.filled).permute(0, 2, 3, 1).float()
        slots = torch.arange(self.filled, device=self.device) // self.chunk_tokens
        # 0, 1 or 2; while the sink is filled, the current chunk is part of it, and counts as the current one
        part = (slots >= self.sink_slots).int().masked_fill(slots == self.slot, 2)
        parts = torch.stack([part == i for i in range(3)], dim=1).float()
        total = torch.zeros(q.shape[2], 3, device=self.device)
        for some in q.float().split(QUERIES, 1):
            weights = (some.transpose(1, 2) @ keys * self.head_dim**-0.5).softmax(dim=-1)
            total += (weights @ parts).sum(dim=(0, 2))
        return total / (q.shape[0] * q.shape[1])


@torch.inference_mode()
def measure(pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], chunks: int) -> Mass:
    """Roll the pipeline's model out `chunks` chunks under each prompt, the seeds as one batch.

    Raises ValueError where the window holds nothing but the sink and the current chunk, or is never full.
    """
    preset, wan = pipeline.preset, pipeline.served.wan
    sizes, rollout = preset.dit, preset.rollout()
    cache = MeasuredCache(
        preset.cache(),
        layers=sizes.num_layers,
        heads=sizes.num_heads,
        head_dim=sizes.head_dim,
        batch=len(seeds),
        device=pipeline.device,
        dtype=wan.patch_embedding.weight.dtype,
    )
    slots = cache.sink_slots + cache.ring_slots
    if cache.ring_slots < 2:
        raise ValueError(f"the window of {preset.window} latent frames holds no past that heads could look at")
    if chunks < slots:
        raise ValueError(f"the window is full from chunk {slots} on, and only {chunks} are rolled out")
    cache.measure(sizes.num_layers, sizes.num_heads)
    for prompt in prompts:
        cache.reset(0)
        context = wan.encode_text(pipeline.encode_prompt(prompt).expand(len(seeds), -1, -1))
        for index in range(chunks):
            rows = [(seed, index) for seed in seeds]
            latents = denoise_chunk(wan, rollout, cache, context, rows)
            commit_chunk(wan, rollout, cache, context, latents, rows)
    return cache.mass


def table(mass: Mass) -> str:
    """A line for every head, by its share of the past."""
    lines = [f"{'layer':>5s}{'head':>6s}{'sink':>10s}{'past':>10s}{'current':>10s}{'past, most':>12s}"]
    count = mass.mean.shape[1]
    for at in mass.mean[..., 1].flatten().argsort(stable=True).tolist():
        layer, head = divmod(at, count)
        sink, past, current = mass.mean[layer, head].tolist()
        lines.append(f"{layer:5d}{head:6d}{sink:10.4f}{past:10.4f}{current:10.4f}{mass.most[layer, head]:12.4f}")
    return "\n".join(lines)


def ready(preset: Preset, weights: Path | None) -> Pipeline:
    """The model as it is written. Raises StoreError, see `assemble`."""
    device = best_device()
    return assemble(preset.name, weights=weights, device=device, dtype=best_dtype(device), speed=Speed())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("preset", choices=sorted(PRESETS))
    parser.add_argument("--weights", type=Path, help="folder of the weights (default: those in the repository)")
    parser.add_argument("--chunks", type=int, default=8, help="of every rollout (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="rollouts of every prompt (default: %(default)s)")
    parser.add_argument("--prompt", action="append", dest="prompts", help="may be given again (default: four)")
    parser.add_argument("--below", type=float, metavar="SHARE", help="prune heads with less than that on the past")
    parser.add_argument("--write", type=Path, metavar="FILE", help="where the policy of --below goes")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error("--seeds must be at least 1")
    if options.below is not None and not 0 <= options.below <= 1:
        parser.error(f"--below is a share from 0 to 1, got {options.below}")
    if options.write and options.below is None:
        parser.error("--write needs --below: heads with less than that on the past go into the file")
    preset = PRESETS[options.preset]
    if options.weights is None and not (WEIGHTS / preset.name).exists():
        parser.error(
            f"the weights of {preset.name} are not part of Livereel, and random ones say nothing of its heads:"
            " give their folder as --weights"
        )
    prompts = options.prompts or [*PLAIN, *PROMPTS]
    try:
        pipeline = ready(preset, options.weights)
        mass = measure(pipeline, prompts, range(options.seeds), options.chunks)
    except (StoreError, ValueError) as error:
        parser.error(str(error))
    where = torch.cuda.get_device_name(pipeline.device) if pipeline.device.type == "cuda" else "CPU"
    print(f"{preset.name} on {where}: {len(prompts)} prompts, {options.seeds} seeds, {options.chunks} chunks each;")
    print(f"{mass.forwards} forwards of {options.seeds} streams at full window")
    print(table(mass))
    past = mass.mean[..., 1].tolist()
    count = preset.dit.num_layers * preset.dit.num_heads
    for threshold in (0.02, 0.05, 0.1, 0.2):
        print(f"below {threshold:4.0%}: {len(heads.below(past, threshold))} of {count} heads")
    if options.below is not None:
        chosen = heads.below(past, options.below)
        print(f"below {options.below:.4g}: {len(chosen)} of {count} heads: {sorted(chosen)}")
        if options.write:
            heads.save(chosen, options.write)


if __name__ == "__main__":
    main()
