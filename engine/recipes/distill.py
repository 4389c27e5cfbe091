"""Distil the teacher into a student of at most four steps: causal consistency distillation.

Objective: the student predicts, from any noise level of a grid, where the teacher's guided flow ends. It is taught one
grid step at a time: the teacher takes the step, the student's own average says where it leads from there. Every chunk
has the same context as in the teacher's training: real chunks, the student's own one-step guesses of them, and, in the
second part of the run, its own rollouts with the served cache, with the world's renders of that time as targets.
Sampling then adds fresh noise between steps, as Self-Forcing does.

Song et al. 2023 (arXiv 2303.01469); the causal form: Causal Forcing++ (see `docs/decisions/0005`). Cost on two H100:
about 6 minutes. Result: `docs/benchmarks.md`, "What `mini` draws".
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from engine.config import Preset
from engine.models.dit import TextContext
from engine.recipes import teacher
from engine.recipes.optimizer import Optimiser
from engine.recipes.run import Run, learning_rate
from engine.stream.steps import shifted_sigma

GRID = 16
GUIDANCE = 2.0
REFRESH = 0.12
"""Share of a run after which the student's own rollouts are made anew; they begin in its second part."""

Flow = Callable[[teacher.Model, Tensor, Tensor, TextContext], Tensor]
"""(model, noisy [B, K, C, F, h, w], sigma [B, K, chunks], text) -> flow, same shape as noisy."""


class Levels:
    """The grid of noise levels, and how training draws from it."""

    def __init__(self, preset: Preset, device: torch.device) -> None:
        levels = [shifted_sigma(i / GRID, preset.shift) for i in range(GRID + 1)]
        served = [min(range(GRID + 1), key=lambda i: abs(levels[i] - sigma)) for sigma in preset.sigmas]
        self.levels, self.served = torch.tensor(levels, device=device), torch.tensor(served, device=device)
        self.share = torch.zeros((), device=device)
        """Of the levels drawn: those that the student will be run at, rather than any."""

    def sample(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """A level and the one below it."""
        device = self.levels.device
        index = torch.randint(1, GRID + 1, shape, device=device)
        pick = self.served[torch.randint(0, len(self.served), shape, device=device)]
        index = torch.where(torch.rand(shape, device=device) < self.share, pick, index)
        return self.levels[index], self.levels[index - 1]


@dataclass(frozen=True)
class Networks:
    """The student, its moving average, and the frozen teacher."""

    student: teacher.Model
    average: teacher.Model
    teacher: teacher.Model


def consistency_loss(
    models: Networks,
    flow: Flow,
    latents: Tensor,
    text: Callable[[teacher.Model], TextContext],
    null: Callable[[teacher.Model], TextContext],
    chunk: int,
    levels: Levels,
    weight: Tensor,
) -> Tensor:
    """Mean squared error in flow units over latents [B, K, C, F, h, w] under weights [B, F, h, w]."""
    sigma, following = levels.sample((*latents.shape[:2], latents.shape[3] // chunk))

    def spread(level: Tensor) -> Tensor:
        return level.repeat_interleave(chunk, dim=2)[:, :, None, :, None, None]

    noisy = (1 - spread(sigma)) * latents + spread(sigma) * torch.randn_like(latents)
    with torch.no_grad():
        guided = flow(models.teacher, noisy, sigma, text(models.teacher)).float()
        free = flow(models.teacher, noisy, sigma, null(models.teacher)).float()
        moved = noisy + spread(following - sigma) * (free + GUIDANCE * (guided - free))
        end = moved - spread(following) * flow(models.average, moved, following, text(models.average)).float()
        wanted = (noisy - end) / spread(sigma)
    return teacher.weighted_error(flow(models.student, noisy, sigma, text(models.student)).float(), wanted, weight)


def train(run: Run, preset: Preset, pools: teacher.Pools, *, clip_batch: int, first_batch: int) -> None:
    resumed = run.has("student")
    run.seed(3 + int(resumed))
    device = run.device
    guide = teacher.load(run, "teacher", preset).requires_grad_(False)
    student, average = (teacher.load(run, "student" if resumed else "teacher", preset) for _ in range(2))
    student.text.requires_grad_(False)
    pools.read(guide.text, preset)
    average.requires_grad_(False)
    models = Networks(student, average, guide)
    served = teacher.Model(preset).to(device)
    """The student as it serves: the average's weights, blocks as they are written."""
    for model in (guide, student, average):
        teacher.compile_blocks(model, device)
    optimiser = Optimiser(
        teacher.trainable(student), student.matrices(), lr=6e-4, decay=0.99, averaged=1000 if resumed else 0
    )
    for name, p in average.named_parameters():
        if name in optimiser.averages:
            p.data = optimiser.averages[name]
    for p, q in zip(served.parameters(), average.parameters(), strict=True):
        p.data = q.data
    attend = teacher.forcing(preset, 1, teacher.CHUNKS, device)
    first_attend = teacher.forcing(preset, 0, 1, device)
    levels = Levels(preset, device)

    def null_text(model: teacher.Model, rows: int) -> TextContext:
        return model.dit.encode_text(pools.clips.null[None]).map(lambda x: x.expand(rows, *x.shape[1:]))

    def first_flow(model: teacher.Model, noisy: Tensor, sigma: Tensor, text: TextContext) -> Tensor:
        t = sigma[:, 0].repeat_interleave(preset.chunk, dim=1) * 1000
        return model.dit(noisy[:, 0], t, text, first_attend)[:, None]

    def first_loss() -> Tensor:
        latents, encoded, weight = teacher.draw_firsts(pools.firsts, first_batch, preset)
        return consistency_loss(
            models,
            first_flow,
            latents[:, None],
            lambda model: model.dit.encode_text(encoded),
            partial(null_text, rows=first_batch),
            preset.chunk,
            levels,
            weight,
        )

    rollouts = teacher.Rollouts(pools.clips, preset, teacher.ROLLOUTS)

    def clip_loss(guessed: bool, rolled: teacher.Rollouts | None) -> Tensor:
        batch = teacher.Batch(pools.clips, clip_batch, 0.0, preset, rolled)
        context = teacher.guessed_context(average, attend, batch, preset, 0.2) if guessed else batch.context
        context, context_sigma = teacher.add_context_noise(context, preset)

        def clip_flow(model: teacher.Model, noisy: Tensor, sigma: Tensor, text: TextContext) -> Tensor:
            return teacher.forced_flow(model, attend, context, context_sigma, noisy, sigma, text)

        return consistency_loss(
            models,
            clip_flow,
            batch.latents[:, None],
            partial(batch.text, copies=1),
            partial(null_text, rows=clip_batch * 2 * teacher.CHUNKS),
            preset.chunk,
            levels,
            batch.weight,
        )

    losses: dict[str, Callable[[], Tensor]] = {
        "clip": partial(clip_loss, False, None),
        "own": partial(clip_loss, True, None),
        "rolled": partial(clip_loss, False, rollouts),
        "first": first_loss,
    }
    trainer = teacher.Trainer(run, student, optimiser, losses)
    due = 0.0
    while (progress := run.progress()) < 1 or trainer.step == 0:
        can_roll = resumed or progress > 0.4
        levels.share.fill_(0.5 if can_roll else 0.0)
        if can_roll and progress >= due and len(rollouts):
            rollouts.refresh(served, 2 * trainer.step + run.rank)
            due = progress + REFRESH
            run.say(f"rolled out at {run.elapsed():.0f} s")
        kind = "first" if trainer.step % 2 else teacher.context_kind(own=True, rolled=due > 0)
        trainer.descend(kind, learning_rate(progress, trainer.step, decay_from=0.5))
        if trainer.step == 2:
            run.say(f"compiled after {run.elapsed():.0f} s")
    run.save("student", average.state_dict())
    run.say(f"{trainer.step} steps")
