"""Train the causal teacher: flow matching over chunks, each seeing the clean chunks before it (teacher forcing).

A step takes clips of four chunks. Their clean latents run once through the model as context; each of `COPIES` noisy
versions, with its own noise level per chunk, reads that context and carries the loss. Every other step takes first
chunks only, in a large batch: there nothing but the text tells what to draw, which is what binds words to pictures.

The context is spoiled in two ways, so that the model learns to repair what it will meet in its own rollouts: by a
little noise, whose level it is told, and, in the later part of training, by replacing it with the model's own
one-step guess of it.

The text encoder is `engine.recipes.text`'s and stands still: its output for every caption is worked out once. Cost on
two H100: about 9 minutes.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import MINI, CacheConfig, Preset
from engine.models.dit import Attend, Block, CausalWan, TextContext
from engine.models.text_encoder import TextEncoder
from engine.ops.attention import attention
from engine.ops.rope import rope_angles, rotate
from engine.recipes import captions, train_vae, world
from engine.recipes.optimizer import Optimiser, Replay
from engine.recipes.run import Run, learning_rate

CHUNKS = 4
COPIES = 2
EMPHASIS = 4.0
"""What an error in an object, its shadow or its reflection counts more than one in ground or sky, which are easy and
most of the picture. The best flow is the same at every place; more of the network goes into what is looked at."""
CLIPS = 24
FIRST_CLIPS = 192
"""Of each step, on each rank."""
CAPTIONS = 4
"""Wordings of each scene."""
NEVER = 1e6
"""A change frame that no clip reaches."""


class Model(nn.Module):
    """What is trained together: the transformer and the text encoder it reads."""

    def __init__(self, preset: Preset) -> None:
        super().__init__()
        self.dit = CausalWan(preset.dit)
        self.text = TextEncoder(preset.text)

    def matrices(self) -> set[str]:
        """Names of the parameters for Muon: the matrices inside transformer blocks."""
        return {f"dit.blocks.{name}" for name, p in self.dit.blocks.named_parameters() if p.ndim == 2}


class TeacherForcing:
    """Self-attention of [clean | noisy 1 | ... | noisy K], each a whole clip of chunks.

    A clean chunk sees the clean chunks of its window and itself; a noisy chunk sees the same clean past and itself.
    Both see as many keys, so chunks with equally long pasts share one attention call and no mask is needed.
    """

    def __init__(self, copies: int, chunks: int, config: CacheConfig, head_dim: int, device: torch.device) -> None:
        self.parts, self.chunks = 1 + copies, chunks
        self.past = config.window // config.chunk - 1
        frames = torch.arange(chunks * config.chunk, device=device)
        self.angles = rope_angles(frames, config.rows, config.columns, head_dim).repeat(self.parts, 1, 1)

    def at(self, layer: int) -> Attend:
        return self._attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = rotate(q, self.angles), rotate(k, self.angles)
        q, k, v = (x.unflatten(1, (self.parts, self.chunks, -1)) for x in (q, k, v))
        outs = []
        for past in range(min(self.past, self.chunks - 1) + 1):
            stop = past + 1 if past < self.past else self.chunks
            group = slice(past, stop)
            runs = stop - past
            keys: list[Tensor] = []
            values: list[Tensor] = []
            for back in range(past, 0, -1):
                before = slice(past - back, stop - back)
                for source, gathered in ((k, keys), (v, values)):
                    gathered.append(source[:, :1, before].expand(-1, self.parts, -1, -1, -1, -1))
            keys.append(k[:, :, group])
            values.append(v[:, :, group])
            flat_k, flat_v = torch.cat(keys, dim=3).flatten(0, 2), torch.cat(values, dim=3).flatten(0, 2)
            flat = attention(q[:, :, group].flatten(0, 2), flat_k, flat_v)
            outs.append(flat.unflatten(0, (-1, self.parts, runs)))
        return torch.cat(outs, dim=2).flatten(1, 3)


# data


class Clips:
    """A pool of coded clips with the captions before and after the change of each.

    latents [N, C, 3 * chunks, h, w] bf16; emphasis [N, 3 * chunks, h, w], what errors there count; ids
    [N, 2, CAPTIONS, length]; change [N], the first chunk under the second caption, `chunks` where there is none. `text`
    [N, 2, CAPTIONS, length, text_dim] and `null` are there after `read`.
    """

    text: Tensor
    null: Tensor

    def __init__(
        self, bundle: train_vae.Bundle, preset: Preset, count: int, generator: torch.Generator, chunks: int = CHUNKS
    ) -> None:
        device = generator.device
        frames = preset.first_chunk_frames + (chunks - 1) * preset.chunk_frames
        before = world.sample_scenes(count, generator, split="train")
        after = world.steer_scenes(before, generator, split="train")
        chunk = torch.randint(1, max(chunks, 2), (count,), generator=generator, device=device)
        steered = (torch.rand(count, generator=generator, device=device) < 0.45) & (chunk < chunks)
        self.change = torch.where(steered, chunk, chunks)
        self.scenes = torch.stack([before, after], dim=1)
        change_frame = torch.where(
            steered, (preset.first_chunk_frames + (chunk - 1) * preset.chunk_frames).float(), NEVER
        )
        start = torch.rand(count, generator=generator, device=device) * 60
        variation = world.sample_variation(count, generator)
        params = world.clip_params(before, after, change_frame, variation, frames, start)
        shape = (count, preset.dit.in_channels, chunks * preset.chunk, preset.latent_rows, preset.latent_columns)
        self.latents = torch.empty(shape, dtype=torch.bfloat16, device=device)
        self.emphasis = torch.empty((count, *shape[2:]), dtype=torch.bfloat16, device=device)
        batch = 64 if device.type == "cuda" else 2
        for i in range(0, count, batch):
            part = params[i : i + batch]
            pixels, bare = (
                world.render(p.flatten(0, 1)).unflatten(0, (-1, frames)) for p in (part, world.without_objects(part))
            )
            self.latents[i : i + batch] = bundle.encode(pixels).bfloat16()
            self.emphasis[i : i + batch] = 1 + (EMPHASIS - 1) * differs(pixels, bare, preset)
        seed = int(torch.randint(0, 1 << 30, (1,), generator=generator, device=device))
        ids = [
            captions.encode(side, seed + i, preset.text.length, CAPTIONS)
            for i, side in enumerate((before, after)[: min(chunks, 2)])
        ]
        self.ids = torch.stack([ids[0], ids[-1]], dim=1).to(device)

    def __len__(self) -> int:
        return len(self.latents)

    @torch.no_grad()
    def read(self, encoder: TextEncoder, preset: Preset) -> None:
        """Encode every caption once: the text encoder stands still while the transformer trains."""
        with torch.autocast(self.ids.device.type, torch.bfloat16):
            parts = [encoder(part).bfloat16() for part in self.ids.flatten(0, 2).split(1024)]
            self.text = torch.cat(parts).unflatten(0, self.ids.shape[:3])
            self.null = encoder(null_ids(preset, self.ids.device)[None])[0].bfloat16()


def differs(pixels: Tensor, bare: Tensor, preset: Preset) -> Tensor:
    """Which latent cells two clips uint8 [B, 1 + 4k, 3, H, W] differ in: float [B, 1 + k, h, w] of zeros and ones."""
    different = (pixels.short() - bare.short()).abs().amax(dim=2) > 12
    cells = F.max_pool2d(different.float(), preset.spatial_stride)
    rest = cells[:, 1:].unflatten(1, (-1, preset.temporal_stride)).amax(dim=2)
    return torch.cat([cells[:, :1], rest], dim=1)


def null_ids(preset: Preset, device: torch.device) -> Tensor:
    """The empty prompt: an end token alone."""
    ids = torch.zeros(preset.text.length, dtype=torch.long, device=device)
    ids[0] = 1
    return ids


def sample_sigma(shape: tuple[int, ...], shift: float, device: torch.device) -> Tensor:
    u = torch.rand(shape, device=device)
    return shift * u / (1 + (shift - 1) * u)


def per_frame(sigma: Tensor, chunk: int) -> Tensor:
    """[B, chunks] -> [B, 1, frames, 1, 1]."""
    return sigma.repeat_interleave(chunk, dim=1)[:, None, :, None, None]


class Batch:
    """Clips drawn from the pool, and the text that each chunk runs under.

    In four of ten steered clips the whole context is read under the new text: that is what `recache` does at a prompt
    change. Their chunks before the change carry no loss.
    """

    def __init__(self, clips: Clips, size: int, drop: float, preset: Preset) -> None:
        device = clips.latents.device
        index = torch.randint(0, len(clips), (size,), device=device)
        self.latents = clips.latents[index].float()
        wording = torch.randint(0, CAPTIONS, (size, 2), device=device)
        text = torch.stack([clips.text[index, side, wording[:, side]] for side in range(2)], dim=1)
        dropped = torch.rand(size, 1, 1, 1, device=device) < drop
        self.encoded = torch.where(dropped, clips.null, text)
        change = clips.change[index]
        chunk = torch.arange(CHUNKS, device=device)
        self.side = (chunk[None] >= change[:, None]).long()
        recache = (torch.rand(size, device=device) < 0.4) & (change < CHUNKS)
        self.context_side = torch.where(recache[:, None], 1, self.side)
        counts = torch.where(recache[:, None] & (self.side == 0), 0.0, 1.0)
        self.weight = clips.emphasis[index].float() * per_frame(counts, preset.chunk)[:, 0]
        """[B, F, h, w]"""

    def text(self, model: Model, copies: int) -> TextContext:
        """For [clean | noisy ...], one row per chunk of every part: B * (1 + copies) * CHUNKS rows."""
        context = model.dit.encode_text(self.encoded.flatten(0, 1))
        rows = torch.arange(len(self.encoded), device=self.encoded.device)[:, None] * 2
        picked = (rows + torch.cat([self.context_side, *[self.side] * copies], dim=1)).flatten()
        return context.map(lambda x: x.index_select(0, picked))


def forced_flow(
    model: Model,
    attend: TeacherForcing,
    context: Tensor,
    context_sigma: Tensor,
    noisy: Tensor,
    sigma: Tensor,
    text: TextContext,
) -> Tensor:
    """The flow of noisy [B, K, C, F, h, w] at sigma [B, K, chunks] over context [B, C, F, h, w]; same shape."""
    copies = noisy.shape[1]
    chunk = context.shape[2] // sigma.shape[-1]
    x = torch.cat([context, *noisy.unbind(1)], dim=2)
    t = torch.cat([context_sigma, sigma.flatten(1)], dim=1).repeat_interleave(chunk, dim=1) * 1000
    out = model.dit(x, t, text, attend)
    return out[:, :, context.shape[2] :].unflatten(2, (copies, -1)).transpose(1, 2)


def spoil(latents: Tensor, preset: Preset) -> tuple[Tensor, Tensor]:
    """Context with noise up to sigma 0.2 on half of the clips, and its level [B, chunks]."""
    batch = len(latents)
    sigma = 0.2 * torch.rand(batch, CHUNKS, device=latents.device)
    sigma = sigma * (torch.rand(batch, 1, device=latents.device) < 0.6)
    spread = per_frame(sigma, preset.chunk)
    return (1 - spread) * latents + spread * torch.randn_like(latents), sigma


@torch.no_grad()
def own_guess(model: Model, attend: TeacherForcing, batch: Batch, preset: Preset) -> Tensor:
    """The latents as the model itself would have drawn them: one step from a random noise level, chunk by chunk."""
    sigma = 0.15 + 0.65 * torch.rand(len(batch.latents), 1, CHUNKS, device=batch.latents.device)
    spread = per_frame(sigma[:, 0], preset.chunk)
    noisy = (1 - spread) * batch.latents + spread * torch.randn_like(batch.latents)
    context, context_sigma = spoil(batch.latents, preset)
    flow = forced_flow(model, attend, context, context_sigma, noisy[:, None], sigma, batch.text(model, 1))
    return noisy - spread * flow[:, 0].float()


def mixed_context(model: Model, attend: TeacherForcing, batch: Batch, preset: Preset, real: float) -> Tensor:
    """The model's own guess of the latents, but the real ones in a share `real` of the clips."""
    guess = own_guess(model, attend, batch, preset)
    keep = (torch.rand(len(guess), 1, 1, 1, 1, device=guess.device) < real).float()
    return keep * batch.latents + (1 - keep) * guess


def weighted_error(out: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Mean squared difference of [B, K, C, F, h, w] under weights [B, F, h, w]."""
    error = (out - wanted).square().mean(dim=(1, 2))
    return (error * weight).sum() / weight.sum()


def flow_loss(
    model: Model, attend: TeacherForcing, guess_attend: TeacherForcing, batch: Batch, preset: Preset, own_context: bool
) -> Tensor:
    """Mean squared error of the flow over noisy chunks, under the batch's weights."""
    size, copies = len(batch.latents), attend.parts - 1
    latents = batch.latents
    context = mixed_context(model, guess_attend, batch, preset, 0.3) if own_context else latents
    context, context_sigma = spoil(context, preset)
    sigma = sample_sigma((size, copies, CHUNKS), preset.shift, latents.device)
    spread = sigma.repeat_interleave(preset.chunk, dim=2)[:, :, None, :, None, None]
    noise = torch.randn(size, copies, *latents.shape[1:], device=latents.device)
    noisy = (1 - spread) * latents[:, None] + spread * noise
    flow = forced_flow(model, attend, context, context_sigma, noisy, sigma, batch.text(model, copies))
    return weighted_error(flow.float(), noise - latents[:, None], batch.weight)


def draw_firsts(clips: Clips, size: int, preset: Preset) -> tuple[Tensor, Tensor, Tensor]:
    """First chunks [size, C, chunk, h, w], the text and the weight [size, chunk, h, w] of each, from the pool."""
    device = clips.latents.device
    index = torch.randint(0, len(clips), (size,), device=device)
    wording = torch.randint(0, CAPTIONS, (size,), device=device)
    first = slice(0, preset.chunk)
    latents, weight = clips.latents[index, :, first].float(), clips.emphasis[index, first].float()
    return latents, clips.text[index, 0, wording], weight


def first_chunk_loss(
    model: Model, attend: TeacherForcing, clips: Clips, size: int, preset: Preset, drop: float
) -> Tensor:
    """The same loss on first chunks alone."""
    device = clips.latents.device
    latents, text, weight = draw_firsts(clips, size, preset)
    text = torch.where(torch.rand(size, 1, 1, device=device) < drop, clips.null, text)
    sigma = sample_sigma((size, 1), preset.shift, device)
    spread = per_frame(sigma, preset.chunk)
    noise = torch.randn_like(latents)
    noisy = (1 - spread) * latents + spread * noise
    kv = model.dit.encode_text(text)
    t = sigma.repeat_interleave(preset.chunk, dim=1) * 1000
    flow = model.dit(noisy, t, kv, attend)
    return weighted_error(flow.float()[:, None], (noise - latents)[:, None], weight)


# stages


def forcing(preset: Preset, copies: int, chunks: int, device: torch.device) -> TeacherForcing:
    return TeacherForcing(copies, chunks, preset.cache(), preset.dit.head_dim, device)


def initialise(model: Model) -> None:
    """Small modulation and a zero output, so that training starts from the identity."""
    nn.init.normal_(cast(nn.Linear, model.dit.time_projection[1]).weight, std=0.02)
    nn.init.zeros_(model.dit.head.head.weight)
    nn.init.zeros_(model.dit.head.head.bias)
    with torch.no_grad():
        for block in cast(Iterable[Block], model.dit.blocks):
            block.modulation[:, [0, 1, 3, 4]] = 0


def compile_blocks(model: Model, device: torch.device) -> None:
    if device.type == "cuda":
        torch._dynamo.config.cache_size_limit = 64
        for block in model.dit.blocks:
            block.compile(dynamic=False)


def load(run: Run, name: str = "teacher", preset: Preset = MINI) -> Model:
    model = Model(preset).to(run.device)
    model.load_state_dict(run.load(name))
    return model


@dataclass(frozen=True)
class Pools:
    """What training draws from: whole clips, and first chunks alone, of which many more are needed."""

    clips: Clips
    firsts: Clips

    def read(self, encoder: TextEncoder, preset: Preset) -> None:
        self.clips.read(encoder, preset)
        self.firsts.read(encoder, preset)


def code_pools(run: Run, preset: Preset, clips: int, firsts: int, seed: int) -> Pools:
    generator = run.generator(seed)
    bundle = train_vae.load(run, preset)
    pools = Pools(Clips(bundle, preset, clips, generator), Clips(bundle, preset, firsts, generator, chunks=1))
    run.say(f"{clips} clips and {firsts} first chunks coded on each rank after {run.elapsed():.0f} s")
    return pools


class Trainer:
    """Steps over whole clips and over first chunks in turn: what teacher and student training share.

    A loss does the same work on tensors every time, so that it can be recorded.
    """

    def __init__(
        self, run: Run, model: Model, optimiser: Optimiser, losses: Mapping[str, Callable[[], Tensor]]
    ) -> None:
        self.run, self.model, self.optimiser, self.losses = run, model, optimiser, losses
        self.replay = Replay(run.device)
        self.step = 0
        self.norm = torch.zeros(())
        self.totals = {kind: torch.zeros((), device=run.device) for kind in losses}

    def _descend(self, kind: str) -> Tensor:
        self.optimiser.clear()
        with torch.autocast(self.run.device.type, torch.bfloat16):
            loss = self.losses[kind]()
        loss.backward()
        return self.totals[kind].lerp_(loss.detach(), 0.03)

    def descend(self, kind: str, factor: float) -> None:
        self.optimiser.schedule(factor)
        self.replay(kind, lambda: self._descend(kind))
        self.optimiser.exchange()
        self.norm = self.replay("update", self.optimiser.update)
        self.step += 1
        self.run.log(self.step, self.totals | {"norm": self.norm})


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def train(run: Run, preset: Preset, pools: Pools, *, clip_batch: int, first_batch: int, final: bool) -> None:
    resumed = run.has("teacher")
    run.seed(1 + int(resumed))
    device = run.device
    if resumed:
        model = load(run, preset=preset)
        run.say("resumes")
    else:
        model = Model(preset).to(device)
        initialise(model)
        model.text.load_state_dict(run.load("text"))
        run.align(model)
    model.text.requires_grad_(False)
    pools.read(model.text, preset)
    compile_blocks(model, device)
    attend, guess_attend = forcing(preset, COPIES, CHUNKS, device), forcing(preset, 1, CHUNKS, device)
    first_attend = forcing(preset, 0, 1, device)
    parameters = trainable(model)
    optimiser = Optimiser(parameters, model.matrices(), lr=1.5e-3)

    def clip_loss(own_context: bool) -> Tensor:
        batch = Batch(pools.clips, clip_batch, 0.1, preset)
        return flow_loss(model, attend, guess_attend, batch, preset, own_context)

    losses: dict[str, Callable[[], Tensor]] = {
        "clip": partial(clip_loss, False),
        "own": partial(clip_loss, True),
        "first": lambda: first_chunk_loss(model, first_attend, pools.firsts, first_batch, preset, 0.1),
    }
    trainer = Trainer(run, model, optimiser, losses)
    while (progress := run.progress()) < 1 or trainer.step == 0:
        if trainer.step % 2:
            kind = "first"
        else:
            kind = "own" if (resumed or progress > 0.7) and torch.rand(()) < 0.5 else "clip"
        trainer.descend(kind, learning_rate(progress, trainer.step, decay_from=0.5 if final else 1.0))
        if trainer.step == 2:
            run.say(f"compiled after {run.elapsed():.0f} s")
    model.load_state_dict(model.state_dict() | optimiser.averages)
    run.save("teacher", model.state_dict())
    run.say(f"{trainer.step} steps")
