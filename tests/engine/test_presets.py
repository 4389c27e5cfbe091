"""Each family's way of sampling, written out again plainly, against the pipeline: latents on small random weights.

The references keep every chunk's keys unrotated, with no ring and no slots, and say for each chunk what it sees and
where that stands. Networks, noise and RoPE are the engine's own; they are tested elsewhere.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UniPCMultistepScheduler
from torch import Tensor

from engine.config import PRESETS, Preset
from engine.models.config import DiTConfig, TextConfig
from engine.models.dit import Attend, TextContext
from engine.ops.rope import rope_angles, rotate
from engine.pipeline import Pipeline
from engine.stream.sampler import chunk_noise
from engine.stream.state import StreamState
from engine.transforms.apply import Speed
from engine.wire import Transition

Build = Callable[..., Pipeline]


@pytest.fixture(autouse=True)
def one_thread(two_threads: None) -> None:
    """Networks so small are slower on two."""
    torch.set_num_threads(1)


SEED = 3
OLD, NEW = "a red ball", "a blue cube"


def small(name: str) -> Preset:
    """The preset with networks of toy width and four tokens a frame; how it samples is as it is."""
    preset = PRESETS[name]
    channels = preset.dit.in_channels
    side = 4 * preset.spatial_stride
    return replace(
        preset,
        width=side,
        height=side,
        dit=DiTConfig(
            dim=64, ffn_dim=96, num_heads=2, num_layers=2, text_dim=32, in_channels=channels, out_channels=channels
        ),
        text=TextConfig(vocab_size=64, dim=32, ffn_dim=64, num_heads=2, head_dim=16, num_layers=1, length=16),
        vae=replace(preset.vae, encoder_widths=(8, 8, 8, 8), decoder_widths=(8, 8, 8, 8), decoder_inputs=(8, 8, 8)),
        light_vae=replace(preset.light_vae, widths=(8, 8, 8, 8), blocks=(1, 1, 1, 0)),
    )


@dataclass
class Chunk:
    """Keys, unrotated, and values of a chunk, by layer."""

    position: int
    layers: list[tuple[Tensor, Tensor]]
    latents: Tensor


@dataclass
class Seen:
    """Attention over chunks at given positions and over the queries' own keys; the `SelfAttend` of a reference."""

    past: Sequence[tuple[Chunk, int]]
    position: int
    frames: int
    head_dim: int
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        self.own: dict[int, tuple[Tensor, Tensor]] = {}

    def turned(self, k: Tensor, position: int) -> Tensor:
        frames = torch.arange(position, position + k.shape[1] // 4)
        return rotate(k, rope_angles(frames, 2, 2, self.head_dim))

    def at(self, layer: int) -> Attend:
        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.own[layer] = k, v
            keys = [self.turned(chunk.layers[layer][0], position) for chunk, position in self.past]
            values = [chunk.layers[layer][1] for chunk, _ in self.past]
            q, key, value = (
                self.turned(q, self.position),
                torch.cat([*keys, self.turned(k, self.position)], 1),
                [*values, v],
            )
            rows = (x.transpose(1, 2) for x in (q, key, torch.cat(value, 1)))
            return F.scaled_dot_product_attention(*rows, attn_mask=self.mask).transpose(1, 2)

        return attend


class Reference:
    """What the families have in common: the model, its noise, and a pass over a chunk."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.preset = pipeline, pipeline.preset
        self.wan = pipeline.served.wan
        self.history: list[Chunk] = []

    def text(self, prompt: str) -> TextContext:
        return self.wan.encode_text(self.pipeline.encode_prompt(prompt))

    def noise(self, index: int, step: int) -> Tensor:
        preset = self.preset
        shape = (preset.dit.in_channels, preset.chunk, preset.latent_rows, preset.latent_columns)
        return chunk_noise(SEED, index, step, shape)[None]

    def run(
        self, x: Tensor, t: float, text: TextContext, past: Sequence[tuple[Chunk, int]], position: int,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Chunk]:  # fmt: skip
        seen = Seen(past, position, x.shape[2], self.preset.dit.head_dim, mask)
        flow = self.wan(x, torch.full((1, x.shape[2]), t), text, seen)
        return flow, Chunk(position, [seen.own[layer] for layer in sorted(seen.own)], x)

    def renoise(
        self,
        index: int,
        timesteps: Sequence[float],
        text: TextContext,
        past: Sequence[tuple[Chunk, int]],
        position: int,
    ) -> Tensor:
        x = self.noise(index, 0)
        for step, t in enumerate(timesteps):
            sigma = max(t / 1000, 0.0049801)
            x0 = x - sigma * self.run(x, t, text, past, position)[0]
            if step + 1 < len(timesteps):
                following = max(timesteps[step + 1] / 1000, 0.0049801)
                x = (1 - following) * x0 + following * self.noise(index, step + 1)
        return x0


FOUR = (1000, 937.5, 2500 / 3, 625)


def self_forcing(
    reference: Reference, chunks: int, change: int, timesteps: Sequence[float] = FOUR, chunk: int = 3
) -> list[Tensor]:
    """Self-Forcing and Causal-Forcing: 21 latent frames are seen; the first chunk takes four steps. They publish no
    prompt change: Livereel's rewrites the window, in order and from its oldest chunk on."""
    text, history, out = reference.text(OLD), reference.history, []
    past = 21 // chunk - 1
    for index in range(chunks):
        if index == change:
            text = reference.text(NEW)
            kept = history[-past:]
            history = []
            for old in kept:
                history.append(reference.run(old.latents, 0, text, at_home(history), old.position)[1])
        seen = at_home(history[-past:])
        x0 = reference.renoise(index, timesteps if index else FOUR, text, seen, chunk * index)
        out.append(x0)
        history.append(reference.run(x0, 0, text, seen, chunk * index)[1])
    return out


def at_home(chunks: Sequence[Chunk]) -> list[tuple[Chunk, int]]:
    return [(chunk, chunk.position) for chunk in chunks]


def longlive(reference: Reference, chunks: int, change: int, *, relative: bool) -> list[Tensor]:
    """Window 12, sink 3. At a change the cached frames are rewritten in one pass, block-causal, but for the sink."""
    text, out = reference.text(OLD), []
    sink: list[Chunk] = []
    local: list[Chunk] = []

    def seen(past: Sequence[Chunk], oldest: int) -> list[tuple[Chunk, int]]:
        return [(chunk, oldest - 3 if relative else 0) for chunk in sink] + at_home(past)

    for index in range(chunks):
        if index == change:
            text = reference.text(NEW)
            kept = local[-3:]
            block = torch.arange(3 * len(kept)).repeat_interleave(4) // 3
            mask = torch.cat([torch.ones(len(block), 12, dtype=torch.bool), block[:, None] >= block], 1)
            x, first = torch.cat([chunk.latents for chunk in kept], 2), kept[0].position
            _, whole = reference.run(x, 0, text, seen([], first), first, mask)
            split = [[(k.split(12, 1), v.split(12, 1)) for k, v in whole.layers]][0]
            local = [
                Chunk(chunk.position, [(k[i], v[i]) for k, v in split], chunk.latents) for i, chunk in enumerate(kept)
            ]
        position = 3 * index
        past = local[-2:]
        context = seen(past, past[0].position if past else position)
        x0 = reference.renoise(index, FOUR, text, context, position)
        out.append(x0)
        _, own = reference.run(x0, 0, text, context, position)
        (local if sink else sink).append(own)
    return out


def krea(reference: Reference, chunks: int, change: int, timesteps: Sequence[float]) -> list[Tensor]:
    """Before every chunk the last three latents alone are passed at time 0, at positions 0 to 2, under the text of the
    chunk before; from chunk 2 on the first of them is encoded from its last decoded frame."""
    text, out = reference.text(OLD), []
    vae, statistics = reference.pipeline.pictures.network, reference.pipeline.pictures.statistics  # type: ignore[union-attr]
    for index in range(chunks):
        context: list[tuple[Chunk, int]] = []
        if index:
            latents = out[-1]
            if index > 1:
                pixels = vae.decode(statistics.restore(torch.cat(out, 2)))
                frame = pixels[:, :, [-9]].clamp(-1, 1)
                latents = torch.cat([statistics.normalise(vae.encode(frame)), latents[:, :, 1:]], 2)
            context = [(reference.run(latents, 0, text, [], 0)[1], 0)]
        if index == change:
            text = reference.text(NEW)
        out.append(reference.renoise(index, timesteps, text, context, 3 if index else 0))
    return out


def diffusers_unipc(sigmas: Sequence[float], timesteps: Sequence[int]) -> UniPCMultistepScheduler:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=2, solver_type="bh2", flow_shift=5.0
    )
    scheduler.set_timesteps(len(timesteps))
    scheduler.sigmas, scheduler.timesteps = torch.tensor([*sigmas, 0.0]), torch.tensor(timesteps)
    return scheduler


def longlive2(reference: Reference, chunks: int, change: int, cut: int, second_cut: int) -> list[Tensor]:
    """Window 32, sink 8, chunks of 8; UniPC. A change rewrites nothing. A cut moves positions on by 8, and the first
    chunk after it stays until the one after the next cut is there."""
    s = torch.linspace(0.999, 0, 5, dtype=torch.float64)[:-1]
    sigmas = (5 * s / (1 + 4 * s)).tolist()
    text, out, history, offset = reference.text(OLD), [], reference.history, 0
    kept: Chunk | None = None
    for index in range(chunks):
        if index in (change, second_cut):
            text = reference.text(NEW)
        if index == cut:
            text = reference.text(OLD)
        offset += 8 * (index in (cut, second_cut))
        position = 8 * index + offset
        local = [chunk for chunk in history[1:] if chunk is not kept]
        shot = [kept] if kept is not None else []
        seen = at_home([*history[:1], *shot, *(local[-(2 - len(shot)) :])])
        x = reference.noise(index, 0)
        scheduler = diffusers_unipc(sigmas, [999, 937, 833, 624])
        for t in (999, 937, 833, 624):
            flow, _ = reference.run(x, t, text, seen, position)
            x = scheduler.step(flow, t, x).prev_sample
        out.append(x)
        history.append(reference.run(x, 0, text, seen, position)[1])
        if index in (cut, second_cut):
            kept = history[-1]
    return out


def play(
    pipeline: Pipeline, chunks: int, steers: dict[int, tuple[str, Transition]], *, commit: bool = True
) -> list[Tensor]:
    state = pipeline.open(OLD, seed=SEED)
    return [follow(pipeline, state, steers.get(index), commit=commit) for index in range(chunks)]


def follow(
    pipeline: Pipeline, state: StreamState, steer: tuple[str, Transition] | None, *, commit: bool = True
) -> Tensor:
    if steer:
        pipeline.steer(state, *steer)
    pipeline.next_chunk(state)
    latents = state.uncommitted
    assert latents is not None
    if commit:
        pipeline.commit(state)
    return latents


def error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


CHANGE: dict[int, tuple[str, Transition]] = {5: (NEW, "recache")}
KREA5, KREA4 = (1000, 937.5, 2500 / 3, 625, 0), (1000, 1000 * 3.33 / 3.664, 1000 * 1.665 / 2.332, 0)
CUTS: dict[int, tuple[str, Transition]] = {5: (NEW, "recache"), 7: (OLD, "cut"), 10: (NEW, "cut")}
FAMILIES = {
    "self-forcing-1.3b": (10, CHANGE, lambda r: self_forcing(r, 10, 5)),
    "causal-forcing-1.3b": (10, CHANGE, lambda r: self_forcing(r, 10, 5)),
    "causal-forcing-1.3b-framewise": (26, CHANGE, lambda r: self_forcing(r, 26, 5, FOUR, 1)),
    "causal-forcing-1.3b-2step": (26, CHANGE, lambda r: self_forcing(r, 26, 5, (1000, 2500 / 3), 1)),
    "causal-forcing-1.3b-1step": (26, CHANGE, lambda r: self_forcing(r, 26, 5, (1000,), 1)),
    "longlive-1.3b": (10, CHANGE, lambda r: longlive(r, 10, 5, relative=False)),
    "longlive-1.3b-infinity": (10, CHANGE, lambda r: longlive(r, 10, 5, relative=True)),
    "krea-14b": (7, CHANGE, lambda r: krea(r, 7, 5, KREA5)),
    "krea-14b-4step": (7, CHANGE, lambda r: krea(r, 7, 5, KREA4)),
    "ti2v-5b": (14, CUTS, lambda r: longlive2(r, 14, 5, 7, 10)),
}


def test_every_public_preset_has_its_reference() -> None:
    assert FAMILIES.keys() == PRESETS.keys() - {"mini"}


@pytest.mark.parametrize("speed", [Speed(), Speed(fused=True)], ids=["as written", "fused"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_preset_samples_as_its_authors_do(build: Build, name: str, speed: Speed) -> None:
    chunks, steers, expected = FAMILIES[name]
    pipeline = build(small(name), speed=speed, full=True)
    with torch.inference_mode():
        reference = expected(Reference(pipeline))
    assert error(play(pipeline, chunks, steers), reference) < 1e-5


@pytest.mark.parametrize("name", ["longlive-1.3b", "krea-14b", "ti2v-5b"])
def test_an_owed_context_pass_is_made_up(build: Build, name: str) -> None:
    """A steer that comes before the last chunk's context pass changes nothing about it."""
    chunks, steers, _ = FAMILIES[name]
    at_once, owed = (play(build(small(name), full=True), chunks, steers, commit=commit) for commit in (True, False))
    assert error(owed, at_once) < 1e-6


LOSSY = Speed(fused=True, low_bit="int8", kv_cache="int8-fp8", keep=0.5)


@pytest.mark.parametrize("speed", [LOSSY, Speed(kv_cache="int8")], ids=["8 bits, sparse", "plain, int8 cache"])
@pytest.mark.parametrize("name", ["causal-forcing-1.3b-2step", "longlive-1.3b", "krea-14b", "ti2v-5b"])
def test_it_stays_near_in_8_bits(build: Build, name: str, speed: Speed) -> None:
    chunks, steers, expected = FAMILIES[name]
    pipeline = build(small(name), full=True)
    with torch.inference_mode():
        reference = expected(Reference(pipeline))
    assert 0 < error(play(build(small(name), full=True, speed=speed), chunks, steers), reference) < 0.1


@pytest.mark.parametrize("name", ["causal-forcing-1.3b-2step", "longlive-1.3b", "krea-14b", "ti2v-5b"])
def test_a_batch_makes_what_each_would_alone(build: Build, name: str) -> None:
    """One stream is two chunks ahead, and is steered; prompts and seeds are their own."""
    alone, together = (build(small(name), full=True) for _ in range(2))
    expected, found = [], []
    for pipeline, out in ((alone, expected), (together, found)):
        states = [pipeline.open(prompt, seed) for seed, prompt in enumerate((OLD, NEW))]
        follow(pipeline, states[0], None)
        follow(pipeline, states[0], None)
        follow(pipeline, states[1], None)
        follow(pipeline, states[0], ("a cube", "recache"))
        for _ in range(5):
            if pipeline is together:
                pipeline.next_chunks(states)
            else:
                for state in states:
                    pipeline.next_chunk(state)
            out += [state.uncommitted for state in states]
            pipeline.commit(*states)
    assert error(found, expected) < 1e-5


@pytest.mark.parametrize("name", ["krea-14b", "ti2v-5b", "causal-forcing-1.3b-framewise"])
def test_fewer_steps_are_the_samplers_own_shorter_schedules(build: Build, name: str) -> None:
    """Where the authors have a rule for any number of steps, it is theirs."""
    pipeline = build(small(name))
    told: list[float] = []
    forward = pipeline.dit.forward  # type: ignore[attr-defined]
    pipeline.dit.forward = lambda x, t, *rest: (told.append(round(float(t[0, 0]), 1)), forward(x, t, *rest))[1]  # type: ignore[attr-defined]
    state = pipeline.open(OLD, SEED)
    seen = []
    for steps in (2, 1, 9):
        pipeline.set_steps(state, steps)
        told.clear()
        pipeline.next_chunk(state)
        seen.append(list(told))
        pipeline.commit(state)
    all_of_them = {
        "krea-14b": ([1000, 0], [1000], [1000, 937.5, 833.3, 625, 0]),
        "ti2v-5b": ([999, 833], [999], [999, 937, 833, 624]),
        "causal-forcing-1.3b-framewise": ([1000, 833.3], [1000], [1000, 937.5, 833.3, 625]),
    }
    assert seen == list(all_of_them[name])


def test_a_recomputed_context_needs_an_encoder_and_a_context_pass(build: Build) -> None:
    pipeline = build(small("krea-14b"))
    with pytest.raises(ValueError, match="no VAE encoder"):
        Pipeline(pipeline.preset, pipeline.tokenizer, pipeline.text_encoder, pipeline.served)
    with pytest.raises(ValueError, match="no-context-pass"):
        build(small("krea-14b"), speed=Speed(context_pass=False))


def test_a_recomputed_context_starts_from_a_picture_and_forgets_it_at_a_cut(build: Build) -> None:
    pipeline = build(small("krea-14b"), full=True)
    pictures = [torch.full((1, 32, 32, 3), level, dtype=torch.uint8) for level in (0, 255)]
    streams = [pipeline.open(OLD, SEED, picture=picture) for picture in pictures]
    shown = [[follow(pipeline, state, None) for _ in range(3)] for state in streams]
    assert min(error([a], [b]) for a, b in zip(*shown, strict=True)) > 1e-4
    after = [[follow(pipeline, state, (NEW, "cut") if not i else None) for i in range(3)] for state in streams]
    assert error(*after) == 0
    for state in streams:
        pipeline.refresh(state)
        assert len(state.leading) == len(state.recent) == 1
