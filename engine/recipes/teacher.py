"""Train the causal teacher: flow matching over chunks, each seeing the clean chunks before it (teacher forcing).

Objective: mean squared error of the flow v = noise - x0 of noisy chunks, with a noise level for each chunk, weighted
by what is in the picture (`EMPHASIS`). A step takes sequences of four chunks. Their clean latents run once through the
model as context; each of `COPIES` noisy versions reads that context, as the served cache with its sink would show it,
and carries the loss. Every other step takes first chunks only, in a large batch: there nothing but the text tells what
to draw, which is what binds words to pictures.

Contexts are imperfect in three ways, so that the model learns to repair what it will meet when it serves: by a little
noise, whose level it is told; by its own one-step guess in place of the clean latents, in the later part of training;
and, where a student exists already, by that student's own long rollouts (`Rollouts`).

The text encoder is `engine.recipes.text`'s and frozen: its output for every caption is computed once. Cost on two
H100: about 9 minutes. Result: `docs/benchmarks.md`, "What `mini` draws".
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
from engine.recipes.generation import Generator, null_ids
from engine.recipes.optimizer import Optimiser, Replay
from engine.recipes.run import Run, learning_rate

CHUNKS = 4
"""Of a training sequence."""
LENGTH = 12
"""Chunks of a clip in the pool, which sequences are cut from."""
COPIES = 2
EMPHASIS = (4.0, 10.0)
"""What an error in the main object, its shadow or its reflection counts more than one in ground or sky, which are easy
and most of the picture; and one in a companion, which is small. The best flow is the same at every place; more of the
network goes into what is looked at."""
COUNTS = (0.3, 0.35, 0.35)
"""Shares of training scenes with one, two and three objects."""
STILL = 0.2
"""Share of training scenes in which nothing moves: there errors add up for as long as a stream lasts."""
CLIPS = 24
FIRST_CLIPS = 192
"""Of each step, on each rank."""
CAPTIONS = 4
"""Wordings of each scene."""
ROLLOUTS = 1024
"""Streams rolled out by the student itself, on each rank."""
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
    """Self-attention of [clean | noisy 1 | ... | noisy K], each a whole clip of chunks, as the served cache has it.

    A clean chunk sees the clean chunks of the sink and the window, and itself; a noisy chunk sees the same clean past
    and itself. Both see as many keys, so chunks with equally long pasts share one attention call and no mask is
    needed. Once the ring rolls, the sink's keys stand just before the oldest chunk of the ring, as in `KVCache`.
    """

    def __init__(self, copies: int, chunks: int, config: CacheConfig, head_dim: int, device: torch.device) -> None:
        self.parts, self.chunks = 1 + copies, chunks
        self.sink = config.sink // config.chunk
        self.past = config.window // config.chunk - 1
        """Chunks before the current one in a full window, the sink's among them."""

        def angles(first: int, count: int) -> Tensor:
            frames = torch.arange(first * config.chunk, (first + count) * config.chunk, device=device)
            return rope_angles(frames, config.rows, config.columns, head_dim)

        self.angles = angles(0, chunks).repeat(self.parts, 1, 1)
        self.sink_angles = [angles(i, self.sink) for i in range(chunks - self.past)] if self.sink else []
        """Where the sink stands for each of the chunks whose window is full."""

    def at(self, layer: int) -> Attend:
        return self._attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raw = k.unflatten(1, (self.parts, self.chunks, -1))[:, 0, : self.sink].flatten(1, 2)
        q, k = rotate(q, self.angles), rotate(k, self.angles)
        q, k, v = (x.unflatten(1, (self.parts, self.chunks, -1)) for x in (q, k, v))
        outs = []
        for past in range(min(self.past, self.chunks - 1) + 1):
            stop = past + 1 if past < self.past else self.chunks
            group = slice(past, stop)
            runs = stop - past
            keys: list[Tensor] = []
            values: list[Tensor] = []
            nearer = past
            if past == self.past and self.sink:
                nearer = past - self.sink
                turned = torch.stack([rotate(raw, angles) for angles in self.sink_angles], dim=1)
                keys.append(turned[:, None].expand(-1, self.parts, -1, -1, -1, -1))
                held = v[:, :1, : self.sink].flatten(2, 3)
                values.append(held[:, :, None].expand(-1, self.parts, runs, -1, -1, -1))
            for back in range(nearer, 0, -1):
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
        self, bundle: train_vae.Bundle, preset: Preset, count: int, generator: torch.Generator, chunks: int
    ) -> None:
        device = generator.device
        self.chunks = chunks
        frames = preset.first_chunk_frames + (chunks - 1) * preset.chunk_frames
        before = world.sample_scenes(count, generator, split="train", count_weights=COUNTS)
        still = torch.rand(count, generator=generator, device=device) < STILL
        before = torch.where(still[:, None], world.without_motion(before), before)
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
        batch = max(1, 256 // chunks) if device.type == "cuda" else 2
        for i in range(0, count, batch):
            part = params[i : i + batch]
            pixels, alone, bare = (
                world.render(p.flatten(0, 1)).unflatten(0, (-1, frames))
                for p in (part, world.without_objects(part, 1), world.without_objects(part))
            )
            self.latents[i : i + batch] = bundle.encode(pixels).bfloat16()
            objects, companions = differs(pixels, bare, preset), differs(pixels, alone, preset)
            weight = torch.where(objects > 0, EMPHASIS[0], 1.0)
            self.emphasis[i : i + batch] = torch.where(companions > 0, EMPHASIS[1], weight)
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


def sample_sigma(shape: tuple[int, ...], shift: float, device: torch.device) -> Tensor:
    u = torch.rand(shape, device=device)
    return shift * u / (1 + (shift - 1) * u)


def per_frame(sigma: Tensor, chunk: int) -> Tensor:
    """[B, chunks] -> [B, 1, frames, 1, 1]."""
    return sigma.repeat_interleave(chunk, dim=1)[:, None, :, None, None]


class Rollouts:
    """Streams that the student itself rolled out, with the cache that serves, from the first chunks of real clips.

    Its own errors add up in them as they do when it serves. Real clips stay the targets. That works for as long as
    the stream and the clip show the same: for ever where nothing moves, and for `NEAR` chunks elsewhere, until small
    errors of speed have added up to another phase.
    """

    NEAR = 3

    def __init__(self, clips: Clips, preset: Preset, count: int) -> None:
        self.clips, self.preset = clips, preset
        self.rows = (clips.change == clips.chunks).nonzero()[:, 0][:count]
        """Of the clips [M] that nothing steers."""
        still = world.nothing_moves(clips.scenes[self.rows, 0])
        self.starts = torch.where(still, clips.chunks - CHUNKS + 1, min(self.NEAR, clips.chunks - CHUNKS + 1))
        """How many chunks, from the second on, a training sequence may continue at: [M]."""
        self.latents = clips.latents[self.rows].clone()
        """[M, C, 3 * chunks, h, w]"""

    def __len__(self) -> int:
        return len(self.rows)

    def refresh(self, model: Model, seed: int, batch: int = 256) -> None:
        """Roll every stream out anew by a model whose blocks are not compiled."""
        make = Generator(model.dit, model.text, self.preset, seed)
        chunk = self.preset.chunk
        wording = seed % CAPTIONS
        for part in torch.arange(len(self.rows), device=self.rows.device).split(batch):
            rows = self.rows[part]
            streams = make.open(self.clips.ids[rows, 0, wording])
            streams.append(self.clips.latents[rows, :, :chunk].float())
            for index in range(1, self.clips.chunks):
                self.latents[part, :, index * chunk : (index + 1) * chunk] = streams.next().bfloat16()


class Batch:
    """Sequences of `CHUNKS` cut from the pool, and the text that each chunk runs under.

    A sequence is one chunk, which the sink holds, and three consecutive ones from anywhere later in the same clip: what
    a live stream sees however old it is. Where chunks are left out between, the first of the three is context alone:
    when it was drawn, the chunk before it was seen.

    In four of ten steered clips the whole context is read under the new text: that is what `recache` does at a prompt
    change. Their chunks before the change carry no loss.
    """

    def __init__(self, clips: Clips, size: int, drop: float, preset: Preset, rollouts: Rollouts | None = None) -> None:
        device = clips.latents.device

        def below(limit: Tensor | int) -> Tensor:
            return (torch.rand(size, device=device) * limit).long()

        def chance(share: float) -> Tensor:
            return torch.rand(size, device=device) < share

        starts = clips.chunks - CHUNKS + 1
        if rollouts is None:
            index = below(len(clips))
            change = clips.change[index]
            then = torch.where(chance(0.25), 1, 1 + below(starts))
            around = (change - below(3)).clamp(1, starts)
            then = torch.where((change < clips.chunks) & chance(0.6), around, then)
            held = torch.where(chance(0.6), 0, torch.where(chance(0.6), then - 1, below(then)))
        else:
            row = below(len(rollouts))
            index = rollouts.rows[row]
            change = clips.change[index]
            then = 1 + below(rollouts.starts[row])
            held = torch.zeros_like(then)
        chunks = torch.stack([held, then, then + 1, then + 2], dim=1)
        """Which chunks of its clip each sequence is made of: [B, CHUNKS]."""

        def cut(pool: Tensor, rows: Tensor) -> Tensor:
            """[N, C, 3 * chunks, h, w] -> [B, C, 3 * CHUNKS, h, w]."""
            parts = pool.unflatten(2, (-1, preset.chunk))[rows[:, None], :, chunks]
            return parts.transpose(1, 2).flatten(2, 3).float()

        self.latents = cut(clips.latents, index)
        self.context = self.latents
        """What the model sees of the sequence; the latents are what it is to draw."""
        if rollouts is not None:
            self.context = cut(rollouts.latents, row)
        wording = torch.randint(0, CAPTIONS, (size, 2), device=device)
        text = torch.stack([clips.text[index, side, wording[:, side]] for side in range(2)], dim=1)
        dropped = torch.rand(size, 1, 1, 1, device=device) < drop
        self.encoded = torch.where(dropped, clips.null, text)
        self.side = (chunks >= change[:, None]).long()
        recache = chance(0.4) & (change <= then + 2)
        self.context_side = torch.where(recache[:, None], 1, self.side)
        seen = torch.stack([held == 0, then == held + 1, held >= 0, held >= 0], dim=1)
        counts = torch.where(seen & ~(recache[:, None] & (self.side == 0)), 1.0, 0.0)
        self.weight = cut(clips.emphasis[:, None], index)[:, 0] * per_frame(counts, preset.chunk)[:, 0]
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


def add_context_noise(latents: Tensor, preset: Preset) -> tuple[Tensor, Tensor]:
    """Context with noise up to sigma 0.2 on half of the clips, and its level [B, chunks]."""
    batch = len(latents)
    sigma = 0.2 * torch.rand(batch, CHUNKS, device=latents.device)
    sigma = sigma * (torch.rand(batch, 1, device=latents.device) < 0.6)
    spread = per_frame(sigma, preset.chunk)
    return (1 - spread) * latents + spread * torch.randn_like(latents), sigma


@torch.no_grad()
def one_step_guess(model: Model, attend: TeacherForcing, batch: Batch, preset: Preset) -> Tensor:
    """The latents as the model itself would have drawn them: one step from a random noise level, chunk by chunk."""
    sigma = 0.15 + 0.65 * torch.rand(len(batch.latents), 1, CHUNKS, device=batch.latents.device)
    spread = per_frame(sigma[:, 0], preset.chunk)
    noisy = (1 - spread) * batch.latents + spread * torch.randn_like(batch.latents)
    context, context_sigma = add_context_noise(batch.latents, preset)
    flow = forced_flow(model, attend, context, context_sigma, noisy[:, None], sigma, batch.text(model, 1))
    return noisy - spread * flow[:, 0].float()


def guessed_context(model: Model, attend: TeacherForcing, batch: Batch, preset: Preset, real: float) -> Tensor:
    """The model's own guess of the latents, but the real ones in a share `real` of the clips."""
    guess = one_step_guess(model, attend, batch, preset)
    keep = (torch.rand(len(guess), 1, 1, 1, 1, device=guess.device) < real).float()
    return keep * batch.latents + (1 - keep) * guess


def weighted_error(out: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Mean squared difference of [B, K, C, F, h, w] under weights [B, F, h, w]."""
    error = (out - wanted).square().mean(dim=(1, 2))
    return (error * weight).sum() / weight.sum()


def flow_loss(
    model: Model, attend: TeacherForcing, guess_attend: TeacherForcing, batch: Batch, preset: Preset, guessed: bool
) -> Tensor:
    """Mean squared error of the flow over noisy chunks, under the batch's weights."""
    size, copies = len(batch.latents), attend.parts - 1
    latents = batch.latents
    context = guessed_context(model, guess_attend, batch, preset, 0.3) if guessed else batch.context
    context, context_sigma = add_context_noise(context, preset)
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
    pools = Pools(Clips(bundle, preset, clips, generator, LENGTH), Clips(bundle, preset, firsts, generator, 1))
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


def context_kind(*, own: bool, rolled: bool) -> str:
    """Which contexts the next step takes: real ones, the model's own guesses, or the student's rollouts.

    Drawn from the CPU's generator, which is seeded alike on every rank.
    """
    draw = float(torch.rand(()))
    if rolled and draw < 0.3:
        return "rolled"
    return "own" if own and draw < 0.65 else "clip"


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

    rollouts = Rollouts(pools.clips, preset, ROLLOUTS) if run.has("student") else None
    if rollouts:  # there are some
        rollouts.refresh(load(run, "student", preset), run.rank)
        run.say(f"{len(rollouts)} streams of the student rolled out after {run.elapsed():.0f} s")

    def clip_loss(guessed: bool, rolled: Rollouts | None) -> Tensor:
        batch = Batch(pools.clips, clip_batch, 0.1, preset, rolled)
        return flow_loss(model, attend, guess_attend, batch, preset, guessed)

    losses: dict[str, Callable[[], Tensor]] = {
        "clip": partial(clip_loss, False, None),
        "own": partial(clip_loss, True, None),
        "rolled": partial(clip_loss, False, rollouts),
        "first": lambda: first_chunk_loss(model, first_attend, pools.firsts, first_batch, preset, 0.1),
    }
    trainer = Trainer(run, model, optimiser, losses)
    while (progress := run.progress()) < 1 or trainer.step == 0:
        if trainer.step % 2:
            kind = "first"
        else:
            kind = context_kind(own=resumed or progress > 0.7, rolled=bool(rollouts))
        trainer.descend(kind, learning_rate(progress, trainer.step, decay_from=0.5 if final else 1.0))
        if trainer.step == 2:
            run.say(f"compiled after {run.elapsed():.0f} s")
    model.load_state_dict(model.state_dict() | optimiser.averages)
    run.save("teacher", model.state_dict())
    run.say(f"{trainer.step} steps")
