"""Distil the teacher into a student of at most four steps: causal consistency distillation.

The student predicts, from any noise level of a grid, where the teacher's guided flow ends. It is taught one grid
step at a time: the teacher takes the step, the student's own average says where it leads from there. Every chunk
stands in the same context as in the teacher's training, and half of the contexts are the student's own guesses.
Sampling then adds fresh noise between steps, as Self-Forcing does.

Song et al. 2023 (arXiv 2303.01469); the causal form: Causal Forcing++, `../shared/specs/training.md` section 4.
Cost on one H100: about 4 minutes.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from engine.config import Preset
from engine.models.dit import TextContext
from engine.recipes import teacher as base
from engine.recipes.optimizer import MuonAdamW
from engine.recipes.run import EMA, Run, learning_rate
from engine.stream.schedule import shifted_sigma

GRID = 16
GUIDANCE = 2.0

Flow = Callable[[base.Model, Tensor, Tensor, TextContext], Tensor]
"""(model, noisy [B, K, C, F, h, w], sigma [B, K, chunks], text) -> flow, same shape as noisy."""


def consistency_loss(
    student: base.Model,
    average: base.Model,
    teacher: base.Model,
    flow: Flow,
    latents: Tensor,
    text: Callable[[base.Model], TextContext],
    null: Callable[[base.Model], TextContext],
    preset: Preset,
    served: float,
    weight: Tensor,
) -> Tensor:
    """Mean squared error in flow units over latents [B, K, C, F, h, w] with chunk weights [B, chunks].

    `served`: share of the noise levels drawn from those that the student will be run at.
    """
    device, chunk = latents.device, preset.chunk
    levels = torch.tensor([shifted_sigma(i / GRID, preset.shift) for i in range(GRID + 1)], device=device)
    shape = (*latents.shape[:2], latents.shape[3] // chunk)
    index = torch.randint(1, GRID + 1, shape, device=device)
    if served > 0:
        used = [int((levels - sigma).abs().argmin()) for sigma in preset.sigmas]
        pick = torch.tensor(used, device=device)[torch.randint(0, len(used), shape, device=device)]
        index = torch.where(torch.rand(shape, device=device) < served, pick, index)
    sigma, following = levels[index], levels[index - 1]

    def spread(level: Tensor) -> Tensor:
        return level.repeat_interleave(chunk, dim=2)[:, :, None, :, None, None]

    noisy = (1 - spread(sigma)) * latents + spread(sigma) * torch.randn_like(latents)
    with torch.no_grad():
        guided = flow(teacher, noisy, sigma, text(teacher)).float()
        free = flow(teacher, noisy, sigma, null(teacher)).float()
        moved = noisy + spread(following - sigma) * (free + GUIDANCE * (guided - free))
        end = moved - spread(following) * flow(average, moved, following, text(average)).float()
        wanted = (noisy - end) / spread(sigma)
    error = (flow(student, noisy, sigma, text(student)).float() - wanted).square().mean(dim=(2, 4, 5))
    spread_weight = weight.repeat_interleave(chunk, dim=1)[:, None].expand_as(error)
    return (error * spread_weight).sum() / spread_weight.sum()


def train(run: Run, preset: Preset, pools: base.Pools, *, clip_batch: int, first_batch: int) -> None:
    run.seed(3 + int(run.has("student")))
    device = run.device
    teacher = base.load(run, "teacher", preset).requires_grad_(False)
    resumed = run.has("student")
    student, average = (base.load(run, "student" if resumed else "teacher", preset) for _ in range(2))
    student.text.requires_grad_(False)
    pools.read(teacher.text, preset)
    average.requires_grad_(False)
    for model in (teacher, student, average):
        base.compile_blocks(model, device)
    optimiser = MuonAdamW([student], student.matrices(), lr=6e-4)
    ema = EMA(student, 0.99)
    targets: list[Tensor] = [dict(average.named_parameters())[name] for name in ema.average]
    attend = base.forcing(preset, 1, base.CHUNKS, device)
    first_attend = base.forcing(preset, 0, 1, device)

    def first_flow(model: base.Model, noisy: Tensor, sigma: Tensor, text: TextContext) -> Tensor:
        t = sigma[:, 0].repeat_interleave(preset.chunk, dim=1) * 1000
        return model.dit(noisy[:, 0], t, text, first_attend)[:, None]

    def prompt_text(model: base.Model, encoded: Tensor) -> TextContext:
        return model.dit.encode_text(encoded)

    def null_text(model: base.Model, rows: int) -> TextContext:
        return model.dit.encode_text(pools.clips.null[None]).map(lambda x: x.expand(rows, *x.shape[1:]))

    step = 0
    totals = {"clip": torch.zeros((), device=device), "first": torch.zeros((), device=device)}
    while step == 0 or run.progress() < 1:
        progress = run.progress()
        served = 0.0 if progress < 0.4 and not resumed else 0.5
        full = step % 2 == 0
        with torch.autocast(device.type, torch.bfloat16):
            if full:
                batch = base.Batch(pools.clips, clip_batch, 0.0, preset)
                context = batch.latents
                if torch.rand(()) < 0.6:
                    guess = base.own_guess(average, attend, batch, preset)
                    keep = (torch.rand(clip_batch, 1, 1, 1, 1, device=device) < 0.2).float()
                    context = keep * context + (1 - keep) * guess
                context, context_sigma = base.spoil(context, preset)

                def clip_flow(
                    model: base.Model,
                    noisy: Tensor,
                    sigma: Tensor,
                    text: TextContext,
                    context: Tensor = context,
                    level: Tensor = context_sigma,
                ) -> Tensor:
                    return base.forced_flow(model, attend, context, level, noisy, sigma, text)

                loss = consistency_loss(
                    student,
                    average,
                    teacher,
                    clip_flow,
                    batch.latents[:, None],
                    partial(batch.text, copies=1),
                    partial(null_text, rows=clip_batch * 2 * base.CHUNKS),
                    preset,
                    served,
                    batch.weight,
                )
            else:
                index = torch.randint(0, len(pools.firsts), (first_batch,), device=device)
                latents = pools.firsts.latents[index].float()
                wording = torch.randint(0, base.CAPTIONS, (first_batch,), device=device)
                encoded = pools.firsts.text[index, 0, wording]
                loss = consistency_loss(
                    student,
                    average,
                    teacher,
                    first_flow,
                    latents[:, None],
                    partial(prompt_text, encoded=encoded),
                    partial(null_text, rows=first_batch),
                    preset,
                    served,
                    torch.ones(first_batch, 1, device=device),
                )
        loss.backward()
        norm = optimiser.step(learning_rate(progress, step, decay_from=0.5))
        ema.update(step + 1000 * resumed)
        torch._foreach_copy_(targets, list(ema.average.values()))
        step += 1
        totals["clip" if full else "first"].lerp_(loss.detach(), 0.02 if step > 100 else 0.5)
        run.log(step, totals | {"norm": norm})
        if step == 2:
            run.say(f"compiled after {run.elapsed():.0f} s")
    run.save("student", average.state_dict())
    run.say(f"{step} steps")
