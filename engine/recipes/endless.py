"""Measure whether endless streams hold: sharpness, colour and contrast of every scene over time, still ones by name.

Attributes averaged over moving scenes do not show it when a scene in which nothing moves decays: a probe still finds a
red cube in a mosaic of red blobs, and a moving camera renews the picture. So half of these scenes have nothing that
moves, and what is measured is the picture itself: sharpness (standard deviation of the luma's 4-neighbour Laplacian),
contrast (standard deviation of the luma) and mean colour, in grey levels of 0 to 255, of every chunk, compared over the
first and the last ten chunks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.models.light_vae import LightDecoder
from engine.recipes import world
from engine.recipes.generation import Generator

SPAN = 10
"""Chunks at either end that are compared."""
HOLDS = (0.77, 1.3)
"""A scene holds if its sharpness at the end, over that at the start, stays within these."""

STILL: tuple[dict[str, str], ...] = (
    {"shape": "cube", "colour": "red", "ground": "sand", "sky": "day"},
    {"shape": "sphere", "colour": "blue", "ground": "grass", "sky": "night"},
    {"shape": "cylinder", "colour": "yellow", "ground": "snow", "sky": "overcast", "material": "metal"},
    {"shape": "cone", "colour": "green", "ground": "tiles", "sky": "sunset"},
)
"""Scenes of one still object before a static camera that fell apart within 40 s without a sink."""
MOVING: tuple[dict[str, str], ...] = (
    {"shape": "ring", "colour": "orange", "ground": "tiles", "sky": "day", "motion": "spinning", "camera": "static"},
)


def scene(values: dict[str, str]) -> Tensor:
    """The scene int64 [A] of the named values; every other attribute has its first one."""
    return torch.tensor([names.index(values.get(name, names[0])) for name, names in world.ATTRIBUTES.items()])


def sample_scenes(count: int, generator: torch.Generator) -> Tensor:
    """int64 [count, A]: the first half still, the second as the training split has them; named ones at the head."""
    scenes = world.sample_scenes(count, generator, split="train")
    half = count // 2
    scenes[:half] = world.without_motion(scenes[:half])
    for at, named in ((0, STILL[:half]), (half, MOVING[: count - half])):
        for index, values in enumerate(named):
            scenes[at + index] = scene(values)
    return scenes


def look(frames: Tensor) -> Tensor:
    """Sharpness, contrast and mean red, green and blue of uint8 frames [N, T, 3, H, W], mean over T: float [N, 5]."""
    x = frames.float()
    luma = 0.299 * x[:, :, 0] + 0.587 * x[:, :, 1] + 0.114 * x[:, :, 2]
    inner = luma[..., 1:-1, 1:-1]
    laplacian = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:] - 4 * inner
    sharpness, contrast = (y.flatten(2).std(dim=2).mean(dim=1) for y in (laplacian, luma))
    return torch.cat([sharpness[:, None], contrast[:, None], x.mean(dim=(1, 3, 4))], dim=1)


@dataclass(frozen=True)
class Endless:
    """What a long rollout of N scenes looked like."""

    scenes: Tensor
    """int64 [N, A]"""
    series: Tensor
    """float [N, chunks, 5]: what `look` says of every chunk."""
    first: Tensor
    """uint8 [N, 24, 3, H, W]: the third and fourth chunk."""
    last: Tensor
    """The same of the last two."""
    sheet: Tensor
    """uint8 [N, moments, 3, H, W]: a frame of every scene at equally spaced moments."""

    def ends(self) -> tuple[Tensor, Tensor]:
        """Means [N, 5] over the first and the last chunks. The first chunk, which has no past, counts to neither."""
        span = max(1, min(SPAN, self.series.shape[1] // 3))
        return self.series[:, 1 : 1 + span].mean(dim=1), self.series[:, -span:].mean(dim=1)

    def summary(self) -> dict[str, dict[str, float]]:
        """Figures of the still and of the moving scenes."""
        first, last = self.ends()
        ratio = last[:, 0] / first[:, 0]
        contrast = last[:, 1] / first[:, 1]
        shift = (last[:, 2:] - first[:, 2:]).abs().amax(dim=1)
        rows = {}
        still = world.nothing_moves(self.scenes).to(ratio.device)
        for name, which in (("still", still), ("moving", ~still)):
            if not which.any():
                continue
            part = ratio[which]
            rows[name] = {
                "sharpness": float(part.median()),
                "least": float(part.min()),
                "most": float(part.max()),
                "hold %": 100 * float(((part >= HOLDS[0]) & (part <= HOLDS[1])).float().mean()),
                "contrast": float(contrast[which].median()),
                "colour shift": float(shift[which].mean()),
                "worst shift": float(shift[which].max()),
                "n": float(which.sum()),
            }
        return rows

    def by_scene(self, prompts: Sequence[str], points: int = 40) -> list[dict[str, object]]:
        """Each scene's prompt, its figures at either end, and its series at `points` moments."""
        first, last = self.ends()
        chunks = self.series.shape[1]
        moments = torch.linspace(0, chunks - 1, min(points, chunks)).round().long()
        still = world.nothing_moves(self.scenes).tolist()
        names = ("sharpness", "contrast", "red", "green", "blue")
        return [
            {
                "prompt": prompt,
                "nothing moves": still[index],
                "first": dict(zip(names, _rounded(first[index]), strict=True)),
                "last": dict(zip(names, _rounded(last[index]), strict=True)),
                "chunks": moments.tolist(),
                "series": [_rounded(row) for row in self.series[index].cpu()[moments]],
            }
            for index, prompt in enumerate(prompts)
        ]


def _rounded(values: Tensor) -> list[float]:
    return [round(float(value), 2) for value in values]


@torch.no_grad()
def run(
    make: Generator,
    light: LightDecoder,
    scenes: Tensor,
    ids: Tensor,
    chunks: int,
    moments: int = 6,
    every: Callable[[int], None] = lambda chunk: None,
) -> Endless:
    """Roll scenes [N, A] under prompts ids [N, L] out for `chunks`, at least 4, decoding every chunk.

    `every` is called after each chunk.
    """
    streams = make.open(ids)
    memories = None
    series: list[Tensor] = []
    first: list[Tensor] = []
    last: list[Tensor] = []
    sheet: list[Tensor] = []
    shown = {round(i * (chunks - 1) / (moments - 1)) for i in range(moments)}
    for chunk in range(chunks):
        latents = streams.next()
        with torch.autocast(make.device.type, torch.bfloat16, enabled=make.device.type == "cuda"):
            decoded, memories = light(latents.transpose(1, 2), memories)
        frames = (decoded.float().clamp(0, 1) * 255).round().to(torch.uint8)
        series.append(look(frames[:, -make.preset.first_chunk_frames :] if chunk == 0 else frames))
        if chunk in (2, 3):
            first.append(frames)
        if chunk >= chunks - 2:
            last.append(frames)
        if chunk in shown:
            sheet.append(frames[:, -1])
        every(chunk)
    return Endless(
        scenes, torch.stack(series, dim=1), torch.cat(first, 1), torch.cat(last, 1), torch.stack(sheet, dim=1)
    )
