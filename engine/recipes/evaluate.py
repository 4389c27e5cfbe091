"""Measure what the models draw: probes trained on real renders read the attributes out of generated frames.

Prints, for each probe, in per cent of attributes read as asked: its accuracy on real held-out renders (the gate), on
renders passed through the VAE, on video of held-out prompts, on pairs of shape and colour never trained on, two and
twenty chunks after a prompt change by each transition (all attributes, and the changed ones alone), and along a long
stream (drift). And the VAE's PSNR, SSIM and gradient energy; and with `--endless`, how sharpness, contrast and colour
of still and of moving scenes change over time (`engine.recipes.endless`).

With `--served` the student is what the repository ships (low-bit storage included), otherwise the checkpoints in
`--folder`. Generation is `engine.stream`'s, with the cache and the transitions that serve; `--sampling` changes numbers
of the preset, so that one run makes one table of several.

Cost on one H200, 192 prompts, each sampling: 10 s of attributes and steering, 8 s for 300 chunks of 24 streams.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.config import MINI, Preset
from engine.models.light_vae import LightDecoder
from engine.recipes import captions, endless, export, teacher, train_vae, world
from engine.recipes import probe as probes
from engine.recipes.generation import Generator
from engine.recipes.run import Run, arguments
from engine.stream.steps import shifted_sigma

MAIN = tuple(world.ATTRIBUTES)[:8]
"""The attributes of the scene and its main object; the other six are its companions'."""
READ_FROM = 2
"""First chunk of the two that are read: past the start."""
STEER_AT = 3
"""Chunk from which the changed prompt runs."""
LATE = 20
"""Chunks after a change of prompt at which it is read again: the sink may hold on to what was."""


def prompts(scenes: Tensor, preset: Preset, seed: int) -> Tensor:
    """Token ids [N, length] of complete captions."""
    return captions.encode(scenes, seed, preset.text.length, 1, complete=True)[:, 0].to(scenes.device)


@torch.no_grad()
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
    """Per cent right in each attribute over the rows where it is active (and in `only`), and the means of the main
    object's eight and of all.

    `read` and `only` are in canonical order, `scenes` need not be.
    """
    counted = world.active(scenes) if only is None else world.active(scenes) & only
    right = ((read == world.canonical(scenes)) & counted).sum(dim=0).double()
    total = counted.sum(dim=0).double()
    table = {name: float(100 * right[i] / total[i]) for i, name in enumerate(world.ATTRIBUTES) if total[i] > 0}
    main = [table[name] for name in MAIN if name in table]
    means = {"main": sum(main) / len(main)} if main else {}
    return table | means | {"mean": sum(table.values()) / len(table), "n": float(len(scenes))}


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


@torch.no_grad()
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
        self.scenes: dict[str, list[dict[str, object]]] = {}
        """Of each endless run: what every scene looked like over time."""

    def add(self, name: str, figures: dict[str, float]) -> None:
        self.rows[name] = figures
        print(f"{name:42s} " + " ".join(f"{key} {value:.2f}" for key, value in figures.items()), flush=True)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(self.rows | {"scenes": self.scenes}, indent=1))


def main() -> None:
    parser = arguments(__doc__, 0)
    parser.add_argument("--served", action="store_true", help="evaluate the shipped weights")
    parser.add_argument("--prompts", type=int, default=256, help="held-out prompts for each figure")
    parser.add_argument(
        "--sampling",
        action="append",
        metavar="FIELD=VALUE,...",
        help="numbers of the preset to change (window, sink, context_sigma, shift); again for another row of the table",
    )
    parser.add_argument("--endless", type=int, default=0, metavar="CHUNKS", help="length of the endless streams")
    parser.add_argument("--endless-streams", type=int, default=24, help="of these, half with nothing that moves")
    parser.add_argument("--drift-minutes", type=float, default=0.0, help="length of the drift run")
    parser.add_argument("--drift-streams", type=int, default=48)
    parser.add_argument(
        "--skip", nargs="*", default=[], choices=["vae", "real", "teacher", "steps", "attributes", "steer"]
    )
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--pictures", type=Path, help="write contact sheets of generated frames into this folder")
    parser.add_argument("--seed", type=int, default=2024)
    options = parser.parse_args()
    run = Run("evaluate", options.folder, 0)
    report = evaluate(run, MINI, options)
    if options.json:
        report.save(options.json)


def changed(preset: Preset, sampling: str) -> Preset:
    """The preset with some numbers changed, given as `sink=3,context_sigma=0.1`."""
    pairs = (pair.split("=") for pair in sampling.split(",") if pair)
    return replace(preset, **{name: type(getattr(preset, name))(value) for name, value in pairs})


@dataclass(frozen=True)
class Model:
    """A row of the table: a network and how it is sampled."""

    name: str
    network: teacher.Model
    preset: Preset
    sigmas: Sequence[float]
    guidance: float = 1.0

    @property
    def serves(self) -> bool:
        """Whether it takes the steps that the preset serves with, or is a teacher."""
        return self.guidance > 1 or self.sigmas == self.preset.sigmas

    def generator(self, seed: int) -> Generator:
        return Generator(self.network.dit, self.network.text, self.preset, seed, self.sigmas, self.guidance)


class Evaluation:
    """The judges, the held-out prompts, and the report that figures go to."""

    def __init__(self, run: Run, preset: Preset, options: argparse.Namespace) -> None:
        self.run, self.preset, self.options = run, preset, options
        self.report = Report()
        self.shipped = shipped = export.Shipped(run.device) if options.served else None
        self.bundle = shipped.bundle() if shipped else train_vae.load(run, preset)
        self.light: LightDecoder = self.bundle.light
        self.judges = {
            name: shipped.probe(name) if shipped else probes.load(run, name)
            for name in probes.PROBES
            if shipped or run.has(name)
        }
        self.random = torch.Generator(run.device).manual_seed(options.seed)
        self.scenes = world.sample_scenes(options.prompts, self.random, split="train")
        self.unseen = world.sample_scenes(options.prompts, self.random, split="held_out")
        self.targets = world.steer_scenes(self.scenes, self.random, split="train")
        self.endless_scenes = endless.sample_scenes(options.endless_streams, self.random)

    def judge(self, name: str, frames: Tensor, scenes: Tensor, only: Tensor | None = None) -> None:
        for probe_name, probe in self.judges.items():
            self.report.add(f"{name} [{probe_name}]", accuracy(probe.read(frames), scenes, only))

    def picture(self, name: str, frames: Tensor, columns: int = 6) -> None:
        if self.options.pictures:
            file = name.replace(",", "").replace(" ", "-").replace("=", "-")
            save_sheet(frames, self.options.pictures / f"{file}.png", columns)

    def real(self) -> None:
        """The gate: what the probes read in real renders, and in renders passed through the VAE."""
        preset = self.preset
        scenes = world.sample_scenes(2 * self.options.prompts, self.random, split="any")
        coded: list[Tensor] = []
        reads: dict[str, list[Tensor]] = {name: [] for name in self.judges}
        frames = preset.first_chunk_frames + 3 * preset.chunk_frames
        for clip in probes.real_clips(scenes, self.random, frames=frames):
            tail = clip[:, -probes.WINDOW :]
            for name, probe in self.judges.items():
                reads[name].append(probe.read(tail))
            coded.append(decode(self.light, self.bundle.encode(clip), preset, 2))
        for name in self.judges:
            self.report.add(f"real renders [{name}]", accuracy(torch.cat(reads[name]), scenes))
        self.judge("real through VAE", torch.cat(coded), scenes)

    def models(self) -> list[Model]:
        run, preset, skip = self.run, self.preset, self.options.skip
        found: list[Model] = []
        if run.has("teacher") and "teacher" not in skip:
            euler16 = [shifted_sigma(i / 16, preset.shift) for i in range(16, 0, -1)]
            found.append(Model("teacher 16 cfg 2", teacher.load(run, "teacher", preset).eval(), preset, euler16, 2.0))
        if self.shipped or run.has("student"):
            network = self.shipped.student() if self.shipped else teacher.load(run, "student", preset).eval()
            for sampling in self.options.sampling or [""]:
                variant = changed(preset, sampling)
                name = f"student {len(variant.sigmas)}"
                found.append(Model(f"{name} {sampling}".strip(), network, variant, variant.sigmas))
            for steps in (1, 2, 3, 4) if "steps" not in skip else ():
                if steps != len(preset.sigmas):
                    table = [shifted_sigma(1 - i / steps, preset.shift) for i in range(steps)]
                    found.append(Model(f"student {steps}", network, preset, table))
        return found

    def attributes(self, model: Model) -> None:
        """What is drawn of held-out prompts, and of pairs of shape and colour never trained on."""
        preset, seed = model.preset, self.options.seed
        make = model.generator(seed)
        frames = decode(self.light, make.roll(prompts(self.scenes, preset, seed), READ_FROM + 2), preset, READ_FROM)
        self.judge(model.name, frames, self.scenes)
        self.picture(model.name, frames[:24])
        if model.serves:
            pair = torch.zeros_like(world.active(self.unseen))
            pair[:, [world.COLUMN["shape"], world.COLUMN["colour"]]] = True
            held = make.roll(prompts(self.unseen, preset, seed), READ_FROM + 2)
            self.judge(f"{model.name}, unseen pairs", decode(self.light, held, preset, READ_FROM), self.unseen, pair)

    def steering(self, model: Model) -> None:
        """Two chunks after a prompt change, and twenty: all attributes, and the changed ones alone."""
        preset, seed, target = model.preset, self.options.seed, self.targets
        ids, new = prompts(self.scenes, preset, seed), prompts(target, preset, seed + 1)
        fresh = world.active(target) & ~world.active(self.scenes)
        different = (world.canonical(target) != world.canonical(self.scenes)) | fresh
        for transition in ("recache", "soft", "cut") if model.guidance == 1 else ("recache",):
            latents = model.generator(seed).roll(ids, STEER_AT + LATE + 2, new, STEER_AT, transition)
            for label, at in ((transition, STEER_AT + 2), (f"{transition}, late", STEER_AT + LATE)):
                frames = decode(self.light, latents, preset, at)
                self.judge(f"{model.name}, {label}, all", frames, target)
                self.judge(f"{model.name}, {label}, changed", frames, target, different)
            moments = (1, 3, 5, STEER_AT + LATE)
            strip = [decode(self.light, latents[:8], preset, at)[:, ::8] for at in moments]
            self.picture(f"{model.name} {transition}", torch.cat(strip, dim=1), columns=12)

    def endless(self, model: Model) -> None:
        """Sharpness, contrast and colour over a long stream, and what the probes read at its ends."""
        preset, options = model.preset, self.options
        scenes = self.endless_scenes
        texts = captions.write(scenes, options.seed, 1, complete=True)
        started = time.monotonic()
        make = model.generator(options.seed)
        found = endless.run(make, self.light, scenes, prompts(scenes, preset, options.seed), options.endless)
        for kind, figures in found.summary().items():
            self.report.add(f"{model.name}, endless, {kind}", figures)
        still = world.nothing_moves(scenes)
        for kind, which in (("still", still), ("moving", ~still)):
            self.judge(f"{model.name}, endless, {kind}, first", found.first[which], scenes[which])
            self.judge(f"{model.name}, endless, {kind}, last", found.last[which], scenes[which])
        self.report.scenes[f"{model.name}, endless"] = found.by_scene([several[0] for several in texts])
        self.picture(f"{model.name} endless", found.sheet, columns=found.sheet.shape[1])
        seconds = time.monotonic() - started
        self.report.add(f"{model.name}, endless", {"chunks": options.endless, "seconds taken": seconds})

    def drift(self, model: Model) -> None:
        """Attributes along one long rollout, at the start and then at ten equally spaced moments."""
        preset, options = model.preset, self.options
        scenes = self.scenes[: options.drift_streams]
        chunks = int(options.drift_minutes * 60 * preset.fps / preset.chunk_frames)
        started = time.monotonic()
        streams = model.generator(options.seed).open(prompts(scenes, preset, options.seed))
        marks = {2 + round(i * (chunks - 6) / 10) for i in range(11)}
        recent: list[Tensor] = []
        for chunk in range(chunks):
            recent = [*recent[-3:], streams.next()]
            if chunk - 1 in marks:
                frames = decode(self.light, torch.cat(recent, dim=2), preset, len(recent) - 2)
                self.judge(f"drift, {chunk * preset.chunk_frames / preset.fps:.0f} s", frames, scenes)
                self.picture(f"drift-{chunk:05d}", frames[:24])
        self.report.add("drift", {"chunks": chunks, "seconds taken": time.monotonic() - started})


def evaluate(run: Run, preset: Preset, options: argparse.Namespace) -> Report:
    """Everything that `options` ask for, printed as it is found."""
    evaluation = Evaluation(run, preset, options)
    if "vae" not in options.skip:
        figures = vae_figures(evaluation.bundle, max(4, options.prompts // 4), evaluation.random)
        evaluation.report.add("vae", figures)
    if "real" not in options.skip:
        evaluation.real()
    for model in evaluation.models():
        if "attributes" not in options.skip:
            evaluation.attributes(model)
        if model.serves and "steer" not in options.skip:
            evaluation.steering(model)
        if model.serves and model.guidance == 1 and options.endless:
            evaluation.endless(model)
        if model.serves and model.guidance == 1 and options.drift_minutes:
            evaluation.drift(model)
    return evaluation.report


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
