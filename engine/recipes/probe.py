"""Train the probes that read a scene's attributes out of frames: two of them, independent of each other.

A probe sees 24 frames of real renders only. It is the judge of generated video, so it must itself be right on at
least 99 of 100 real clips it has never seen, attribute by attribute; `engine.recipes.evaluate` prints that first.

Cost on one H100: about 2 minutes each.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.recipes import world
from engine.recipes.optimizer import Optimiser, convolutions, fit
from engine.recipes.run import Run, arguments, channels_last

WINDOW = 24
"""Frames that a probe looks at: two chunks, 1.5 s."""


@dataclass(frozen=True)
class ProbeConfig:
    """What a probe looks at (pictures of `size` pixels, one frame in `stride`) and how wide it is."""

    size: int
    stride: int
    widths: tuple[int, int, int, int]
    seed: int


PROBES = {
    "probe-a": ProbeConfig(size=160, stride=3, widths=(32, 64, 128, 192), seed=1),
    "probe-b": ProbeConfig(size=128, stride=3, widths=(48, 96, 128, 224), seed=2),
}


class Residual(nn.Module):
    """Pre-norm residual pair of layers: two 3x3 convolutions, or one and a mix with the frames before and after."""

    def __init__(self, width: int, *, time: bool) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
        self.norm = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU())
        self.second = nn.Conv2d(3 * width, width, 1) if time else nn.Conv2d(width, width, 3, padding=1)
        self.time = time

    def forward(self, x: Tensor, batch: int) -> Tensor:
        """x [batch * T, C, h, w]."""
        y = self.norm(self.first(x))
        if self.time:
            frames = y.unflatten(0, (batch, -1))
            before = torch.cat([frames[:, :1], frames[:, :-1]], dim=1)
            after = torch.cat([frames[:, 1:], frames[:, -1:]], dim=1)
            y = torch.cat([before, frames, after], dim=2).flatten(0, 1)
        out: Tensor = x + self.second(y)
        return out


class Probe(nn.Module):
    """24 frames -> logits of every attribute of the scene in canonical order."""

    def __init__(self, config: ProbeConfig) -> None:
        super().__init__()
        self.config = config
        a, b, c, d = config.widths
        self.body = nn.ModuleList(
            [
                nn.Conv2d(8, a, 5, stride=2, padding=2),
                Residual(a, time=False),
                nn.Conv2d(a, b, 3, stride=2, padding=1),
                Residual(b, time=False),
                Residual(b, time=True),
                nn.Conv2d(b, c, 3, stride=2, padding=1),
                Residual(c, time=False),
                Residual(c, time=True),
                nn.Conv2d(c, d, 3, stride=2, padding=1),
                Residual(d, time=True),
                Residual(d, time=True),
                nn.Sequential(nn.GroupNorm(8, d), nn.SiLU()),
            ]
        )
        self.sizes = [len(values) for values in world.ATTRIBUTES.values()]
        self.head = nn.Sequential(nn.Linear(2 * d, 256), nn.SiLU(), nn.Linear(256, sum(self.sizes)))

    def view(self, frames: Tensor) -> Tensor:
        """uint8 [B, WINDOW, 3, H, W] -> uint8 [B, n, 3, size, size]: what of the clip this probe looks at."""
        picked = frames[:, :: self.config.stride]
        if picked.shape[-1] == self.config.size:
            return picked
        small = F.interpolate(picked.flatten(0, 1).float(), size=self.config.size, mode="area")
        return small.round().to(torch.uint8).unflatten(0, picked.shape[:2])

    def forward(self, view: Tensor) -> list[Tensor]:
        """`view`'s output -> logits [B, values] of each attribute in the order of `world.ATTRIBUTES`."""
        x = view.float() / 127.5 - 1
        change = F.pad(x[:, 1:] - x[:, :-1], (0, 0, 0, 0, 0, 0, 1, 0))
        line = torch.linspace(-1, 1, x.shape[-1], device=x.device)
        across, down = line.expand_as(x[:, :, :1]), line[:, None].expand_as(x[:, :, :1])
        x = torch.cat([x, 2 * change, across, down], dim=2).flatten(0, 1)
        x = x.contiguous(memory_format=torch.channels_last)
        for layer in self.body:
            x = layer(x, len(view)) if isinstance(layer, Residual) else layer(x)
        features = x.unflatten(0, (len(view), -1))
        pooled = torch.cat([features.mean(dim=(1, 3, 4)), features.amax(dim=(1, 3, 4))], dim=1)
        return list(self.head(pooled).split(self.sizes, dim=1))

    @torch.no_grad()
    def read(self, frames: Tensor, batch: int = 32) -> Tensor:
        """The most likely value of every attribute, in canonical order: uint8 [B, WINDOW, 3, H, W] -> int64 [B, A]."""
        out = []
        for part in frames.split(batch):
            with torch.autocast(frames.device.type, torch.bfloat16):
                logits = self(self.view(part))
            out.append(torch.stack([logit.argmax(dim=1) for logit in logits], dim=1))
        return torch.cat(out)


def real_clips(scenes: Tensor, generator: torch.Generator, frames: int = WINDOW, batch: int = 32) -> list[Tensor]:
    """Renders of unchanging scenes [N, A] at random times: uint8 clips [<= batch, frames, 3, H, W], in order."""
    count = len(scenes)
    start = torch.rand(count, generator=generator, device=scenes.device) * 60
    never = torch.full((count,), 1e6, device=scenes.device)
    variation = world.sample_variation(count, generator)
    params = world.clip_params(scenes, scenes, never, variation, frames, start)
    return [world.render(part.flatten(0, 1)).unflatten(0, (-1, frames)) for part in params.split(batch)]


def train(run: Run, name: str, pool: int, batch: int) -> None:
    config = PROBES[name]
    torch.manual_seed(config.seed)
    generator = torch.Generator(run.device).manual_seed(1000 + config.seed + 10 * int(run.has(name)))
    probe = Probe(config).to(run.device)
    if run.has(name):
        probe.load_state_dict(run.load(name))
    channels_last(probe)
    scenes = world.sample_scenes(pool, generator, split="any", count_weights=(0.25, 0.35, 0.4))
    active, labels = world.active(scenes), world.canonical(scenes)
    count = len(range(0, WINDOW, config.stride))
    views = torch.empty((pool, count, 3, config.size, config.size), dtype=torch.uint8, device=run.device)
    position = 0
    for clips in _batches(scenes, generator):
        views[position : position + len(clips)] = probe.view(clips)
        position += len(clips)
    parameters = dict(probe.named_parameters())
    optimiser = Optimiser(parameters, convolutions(parameters), 2e-3, clip=2.0)

    def loss() -> Tensor:
        index = torch.randint(0, pool, (batch,), device=run.device)
        total = torch.zeros((), device=run.device)
        for column, logit in enumerate(probe(views[index])):
            each = F.cross_entropy(logit.float(), labels[index, column], reduction="none", label_smoothing=0.02)
            total = total + (each * active[index, column]).sum() / batch
        return total

    run.say(f"ready after {run.elapsed():.0f} s")
    run.restart_clock()
    report = fit(run, optimiser, loss)
    probe.load_state_dict(optimiser.averages)
    run.save(name, probe.state_dict())
    run.say(report)


def _batches(scenes: Tensor, generator: torch.Generator) -> Iterator[Tensor]:
    for part in scenes.split(512):
        yield from real_clips(part, generator)


def load(run: Run, name: str) -> Probe:
    probe = Probe(PROBES[name]).to(run.device)
    probe.load_state_dict(run.load(name))
    channels_last(probe)
    return probe.eval()


def main() -> None:
    parser = arguments(__doc__, 75)
    parser.add_argument("--probe", choices=list(PROBES), action="append", help="which (default: each)")
    parser.add_argument("--pool", type=int, default=50_000, help="clips rendered ahead of training")
    parser.add_argument("--batch", type=int, default=128)
    options = parser.parse_args()
    for name in options.probe or PROBES:
        train(Run(name, options.folder, options.seconds), name, options.pool, options.batch)


if __name__ == "__main__":
    main()
