"""Measure what the models draw: probes trained on real renders read the attributes out of generated frames.

Prints, for each probe: its accuracy on real held-out renders (the gate), on renders passed through the VAE, on the
teacher's and the student's video for held-out prompts, on pairs of shape and colour never trained on, two chunks
after a prompt change (all attributes, and the changed ones alone), and over a long stream (drift). And the VAE's
PSNR, SSIM and gradient energy.

With `--served` the student is what the repository ships (low-bit storage included), otherwise the checkpoints in
`--folder`. Generation here is `engine.stream`'s, with the cache and the transitions that serve.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import MINI, Preset
from engine.models.dit import CausalWan, TextContext
from engine.models.light_vae import LightDecoder
from engine.models.text_encoder import TextEncoder
from engine.recipes import captions, export, train_vae, world
from engine.recipes import probe as probes
from engine.recipes import teacher as base
from engine.recipes.run import Run, arguments
from engine.stream.kv_cache import KVCache
from engine.stream.rollout import forward
from engine.stream.sampler import euler, few_step
from engine.stream.steps import shifted_sigma

READ_FROM = 2
"""First chunk of the two that are read: past the start."""
STEER_AT = 3


def prompts(scenes: Tensor, preset: Preset, seed: int) -> Tensor:
    """Token ids [N, length] of complete captions."""
    return captions.encode(scenes, seed, preset.text.length, 1, complete=True)[:, 0].to(scenes.device)


class Generator:
    """Rolls a batch of streams out, chunk by chunk, with the cache that serves."""

    def __init__(
        self,
        dit: CausalWan,
        text: TextEncoder,
        preset: Preset,
        seed: int,
        sigmas: Sequence[float],
        guidance: float = 1.0,
    ) -> None:
        """`guidance` above 1 solves the flow by Euler steps with a null prompt beside; 1 is few-step sampling."""
        self.dit, self.text, self.preset, self.sigmas, self.guidance = dit, text, preset, sigmas, guidance
        self.device: torch.device = dit.patch_embedding.weight.device
        self.rng = torch.Generator(self.device).manual_seed(seed)

    def _cache(self, batch: int) -> KVCache:
        config = self.preset.dit
        dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        return KVCache(
            self.preset.cache(),
            layers=config.num_layers,
            heads=config.num_heads,
            head_dim=config.head_dim,
            batch=batch,
            device=self.device,
            dtype=dtype,
        )

    def _noise(self, batch: int) -> Tensor:
        p = self.preset
        shape = (batch, p.dit.in_channels, p.chunk, p.latent_rows, p.latent_columns)
        return torch.randn(shape, generator=self.rng, device=self.device)

    @torch.inference_mode()
    def roll(
        self, ids: Tensor, chunks: int, change: Tensor | None = None, change_at: int = 0, transition: str = "recache"
    ) -> Tensor:
        """Latents [N, C, chunks * chunk, h, w] under prompts ids [N, L], `change` instead from chunk `change_at`."""
        batch = len(ids)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            branches = [ids] if self.guidance == 1 else [ids, base.null_ids(self.preset, self.device).expand_as(ids)]
            kvs = [self.dit.encode_text(self.text(branch)) for branch in branches]
            caches = [self._cache(batch) for _ in branches]
            out: list[Tensor] = []
            for chunk in range(chunks):
                if change is not None and transition == "soft" and 0 <= chunk - change_at < self.preset.soft_chunks:
                    share = (chunk - change_at + 1) / self.preset.soft_chunks
                    kvs[0] = self.dit.encode_text(torch.lerp(self.text(ids), self.text(change), share))
                if change is not None and transition == "recache" and chunk == change_at:
                    kvs[0] = self.dit.encode_text(self.text(change))
                    kept = out[-(self.preset.window // self.preset.chunk - 1) :]
                    for cache, kv in zip(caches, kvs, strict=True):
                        cache.reset(cache.start_frame - len(kept) * self.preset.chunk)
                        for latents in kept:
                            self._commit(kv, cache, latents)
                out.append(self._chunk(kvs, caches, batch))
                for cache, kv in zip(caches, kvs, strict=True):
                    self._commit(kv, cache, out[-1])
        return torch.cat(out, dim=2)

    def _chunk(self, kvs: list[TextContext], caches: list[KVCache], batch: int) -> Tensor:
        if self.guidance == 1:
            return few_step(
                lambda x, sigma: forward(self.dit, x, sigma, kvs[0], caches[0]),
                lambda step: self._noise(batch),
                self.sigmas,
            )

        def guided(x: Tensor, sigma: float) -> Tensor:
            with_text, without = (forward(self.dit, x, sigma, kv, cache) for kv, cache in zip(kvs, caches, strict=True))
            return without + self.guidance * (with_text - without)

        return euler(guided, self._noise(batch), self.sigmas)

    def _commit(self, kv: TextContext, cache: KVCache, latents: Tensor) -> None:
        sigma = self.preset.context_sigma
        forward(self.dit, (1 - sigma) * latents + sigma * self._noise(len(latents)), sigma, kv, cache)
        cache.advance()


@torch.inference_mode()
def decode(light: LightDecoder, latents: Tensor, preset: Preset, first: int, batch: int = 32) -> Tensor:
    """uint8 [N, 24, 3, H, W]: two chunks from chunk `first` on, two chunks of run-up decoded and dropped."""
    chunk = preset.chunk
    lead = min(first, 2)
    out = []
    for part in latents[:, :, (first - lead) * chunk : (first + 2) * chunk].split(batch):
        with torch.autocast(part.device.type, torch.bfloat16, enabled=part.is_cuda):
            frames = light(part.transpose(1, 2))[0].float()
        out.append((frames[:, -probes.WINDOW :].clamp(0, 1) * 255).round().to(torch.uint8))
    return torch.cat(out)


def accuracy(read: Tensor, scenes: Tensor, only: Tensor | None = None) -> dict[str, float]:
    """Per cent right in each attribute over the rows where it is active (and in `only`), and the mean of these.

    `read` and `only` are in canonical order, `scenes` need not be.
    """
    counted = world.active(scenes) if only is None else world.active(scenes) & only
    right = ((read == world.canonical(scenes)) & counted).sum(dim=0).double()
    total = counted.sum(dim=0).double()
    table = {name: float(100 * right[i] / total[i]) for i, name in enumerate(world.ATTRIBUTES) if total[i] > 0}
    return table | {"mean": sum(table.values()) / len(table), "n": float(len(scenes))}


def ssim(a: Tensor, b: Tensor) -> float:
    """Mean structural similarity of frames [N, 3, H, W] in [0, 1], 8 x 8 means (Wang et al. 2004)."""

    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 8, stride=4)

    mu_a, mu_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mu_a**2, mean(b * b) - mu_b**2
    cov = mean(a * b) - mu_a * mu_b
    c1, c2 = 0.01**2, 0.03**2
    score = (2 * mu_a * mu_b + c1) * (2 * cov + c2) / ((mu_a**2 + mu_b**2 + c1) * (var_a + var_b + c2))
    return float(score.mean())


@torch.inference_mode()
def vae_figures(bundle: train_vae.Bundle, clips: int, generator: torch.Generator) -> dict[str, float]:
    """PSNR (dB), SSIM and gradient energy ratio of both decoders over `clips` clips of 33 frames."""
    light_psnr, full_psnr, similar, energy, full_energy = [], [], [], [], []
    batches = train_vae.frame_batches(4, 33, generator, ahead=1)
    for _ in range(clips // 4):
        frames = next(batches)
        target = frames.float() / 255
        z = bundle.encode(frames)
        with torch.autocast(frames.device.type, torch.bfloat16, enabled=frames.is_cuda):
            light = train_vae.light_frames(bundle.light, z, bundle.stride).float().clamp(0, 1)
            full = bundle.vae.decode(bundle.statistics.restore(z)).float().transpose(1, 2)
        full = (full / 2 + 0.5).clamp(0, 1)
        light_psnr.append(train_vae.psnr_per_clip(light, target))
        full_psnr.append(train_vae.psnr_per_clip(full, target))
        similar.append(ssim(light.flatten(0, 1), target.flatten(0, 1)))
        energy.append(train_vae.energy_ratio(light, target))
        full_energy.append(train_vae.energy_ratio(full, target))
    light_all, full_all, light_energy = torch.cat(light_psnr), torch.cat(full_psnr), torch.cat(energy)
    return {
        "light psnr": float(light_all.mean()),
        "light worst": float(light_all.min()),
        "light ssim": sum(similar) / len(similar),
        "light energy": float(light_energy.mean()),
        "light energy min": float(light_energy.min()),
        "light energy max": float(light_energy.max()),
        "vae psnr": float(full_all.mean()),
        "vae worst": float(full_all.min()),
        "vae energy": float(torch.cat(full_energy).mean()),
    }


class Report:
    """Rows of figures, printed as a table and kept for a file."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, float]] = {}

    def add(self, name: str, figures: dict[str, float]) -> None:
        self.rows[name] = figures
        print(f"{name:42s} " + " ".join(f"{key} {value:.2f}" for key, value in figures.items()), flush=True)


def main() -> None:
    parser = arguments(__doc__, 0)
    parser.add_argument("--served", action="store_true", help="evaluate the shipped weights")
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts for each figure")
    parser.add_argument("--drift-minutes", type=float, default=0.0, help="length of the drift run")
    parser.add_argument("--drift-streams", type=int, default=48)
    parser.add_argument("--skip", nargs="*", default=[], choices=["vae", "teacher", "steps", "steer"])
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--pictures", type=Path, help="write contact sheets of generated frames into this folder")
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    run = Run("evaluate", options.folder, 0)
    report = evaluate(run, MINI, options)
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report.rows, indent=1))


def evaluate(run: Run, preset: Preset, options: argparse.Namespace) -> Report:
    report = Report()
    device = run.device
    shipped = export.Shipped(device) if options.served else None
    bundle = shipped.bundle() if shipped else train_vae.load(run, preset)
    light: LightDecoder = bundle.light
    judges = {
        name: shipped.probe(name) if shipped else probes.load(run, name)
        for name in probes.PROBES
        if shipped or run.has(name)
    }
    generator = torch.Generator(device).manual_seed(options.seed)
    n = options.prompts

    def judge(name: str, frames: Tensor, scenes: Tensor, only: Tensor | None = None) -> None:
        for probe_name, judge in judges.items():
            report.add(f"{name} [{probe_name}]", accuracy(judge.read(frames), scenes, only))

    if "vae" not in options.skip:
        report.add("vae", vae_figures(bundle, max(4, n // 4), generator))

    real = world.sample_scenes(2 * n, generator, split="any")
    coded: list[Tensor] = []
    reads: dict[str, list[Tensor]] = {name: [] for name in judges}
    for clip in probes.real_clips(real, generator, frames=preset.first_chunk_frames + 3 * preset.chunk_frames):
        tail = clip[:, -probes.WINDOW :]
        for name, judge_ in judges.items():
            reads[name].append(judge_.read(tail))
        coded.append(decode(light, bundle.encode(clip), preset, 2))
    for name in judges:
        report.add(f"real renders [{name}]", accuracy(torch.cat(reads[name]), real))
    judge("real through VAE", torch.cat(coded), real)

    scenes = world.sample_scenes(n, generator, split="train")
    unseen = world.sample_scenes(n, generator, split="held_out")
    ids = prompts(scenes, preset, options.seed)
    models: dict[str, tuple[base.Model, Sequence[float], float]] = {}
    euler16 = [shifted_sigma(i / 16, preset.shift) for i in range(16, 0, -1)]
    if run.has("teacher") and "teacher" not in options.skip:
        models["teacher 16 cfg 2"] = (base.load(run, "teacher", preset).eval(), euler16, 2.0)
    if shipped or run.has("student"):
        student = shipped.student() if shipped else base.load(run, "student", preset).eval()
        models[f"student {len(preset.sigmas)}"] = (student, preset.sigmas, 1.0)
        if "steps" not in options.skip:
            for steps in (1, 2, 3, 4):
                if steps != len(preset.sigmas):
                    table = [shifted_sigma(1 - i / steps, preset.shift) for i in range(steps)]
                    models[f"student {steps}"] = (student, table, 1.0)
    pair = torch.zeros_like(world.active(unseen))
    pair[:, [list(world.ATTRIBUTES).index("shape"), list(world.ATTRIBUTES).index("colour")]] = True
    for name, (model, sigmas, guidance) in models.items():
        make = Generator(model.dit, model.text, preset, options.seed, sigmas, guidance)
        latents = make.roll(ids, READ_FROM + 2)
        frames = decode(light, latents, preset, READ_FROM)
        judge(name, frames, scenes)
        if options.pictures:
            save_sheet(frames[:24], options.pictures / f"{name.replace(' ', '-')}.png")
        served = guidance > 1 or sigmas == preset.sigmas
        if served:
            held = make.roll(prompts(unseen, preset, options.seed), READ_FROM + 2)
            judge(f"{name}, unseen pairs", decode(light, held, preset, READ_FROM), unseen, pair)
        if served and "steer" not in options.skip:
            target = world.steer_scenes(scenes, generator, split="train")
            both = world.active(target) & ~world.active(scenes)
            changed = (world.canonical(target) != world.canonical(scenes)) | both
            for transition in ("recache", "soft") if guidance == 1 else ("recache",):
                steered = make.roll(ids, STEER_AT + 4, prompts(target, preset, options.seed + 1), STEER_AT, transition)
                frames = decode(light, steered, preset, STEER_AT + 2)
                judge(f"{name}, {transition}, all", frames, target)
                judge(f"{name}, {transition}, changed", frames, target, changed)
                if options.pictures:
                    strip = torch.cat([decode(light, steered, preset, at)[:8, ::6] for at in (1, 3, 5)], dim=1)
                    save_sheet(strip, options.pictures / f"{name.replace(' ', '-')}-{transition}.png", columns=12)
    if options.drift_minutes and (shipped or run.has("student")):
        model, sigmas, _ = models[f"student {len(preset.sigmas)}"]
        make = Generator(model.dit, model.text, preset, options.seed, sigmas)
        drift(report, judge, make, scenes[: options.drift_streams], ids[: options.drift_streams], light, options)
    return report


def drift(
    report: Report,
    judge: Callable[[str, Tensor, Tensor], None],
    make: Generator,
    scenes: Tensor,
    ids: Tensor,
    light: LightDecoder,
    options: argparse.Namespace,
) -> None:
    """Accuracy along one long rollout, at the start and then at ten equally spaced moments."""
    preset = make.preset
    chunks = int(options.drift_minutes * 60 * preset.fps / preset.chunk_frames)
    started = time.monotonic()
    with torch.inference_mode(), torch.autocast(make.device.type, torch.bfloat16, enabled=make.device.type == "cuda"):
        kv = make.dit.encode_text(make.text(ids))
        cache = make._cache(len(ids))
        marks = {2 + round(i * (chunks - 6) / 10) for i in range(11)}
        recent: list[Tensor] = []
        for chunk in range(chunks):
            recent = [*recent[-3:], make._chunk([kv], [cache], len(ids))]
            make._commit(kv, cache, recent[-1])
            if chunk - 1 in marks:
                latents = torch.cat(recent, dim=2)
                frames = decode(light, latents, preset, len(recent) - 2)
                judge(f"drift, {chunk * preset.chunk_frames / preset.fps:.0f} s", frames, scenes)
                if options.pictures:
                    save_sheet(frames[:24], options.pictures / f"drift-{chunk:05d}.png")
    report.add("drift", {"chunks": chunks, "seconds taken": time.monotonic() - started})


def save_sheet(clips: Tensor, path: Path, columns: int = 6) -> None:
    """A contact sheet: a row of evenly spaced frames for each of the clips [N, T, 3, H, W]."""
    from PIL import Image

    count = min(columns, clips.shape[1])
    picked = clips[:, torch.linspace(0, clips.shape[1] - 1, count).round().long().to(clips.device)]
    small = F.interpolate(picked.flatten(0, 1).float(), scale_factor=0.5, mode="area").unflatten(0, picked.shape[:2])
    rows = small.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(rows.round().to(torch.uint8).cpu().numpy()).save(path)


if __name__ == "__main__":
    main()
