"""The pipeline on random weights: counting, determinism, transitions."""

from collections.abc import Callable

import pytest
import torch

from engine.config import Preset
from engine.pipeline import Chunk, NotFiniteError, PictureError, Pipeline
from engine.stream.decoding import FullDecoding
from engine.stream.state import StreamState
from engine.transforms.apply import Speed
from engine.wire import Transition


def run(pipeline: Pipeline, state: StreamState, chunks: int) -> list[torch.Tensor]:
    out = []
    for _ in range(chunks):
        out.append(pipeline.next_chunk(state).frames)
        pipeline.commit(state)
    return out


def test_frames_are_counted_and_shaped(pipeline: Pipeline) -> None:
    state = pipeline.open("a red ball", seed=1)
    chunks = [pipeline.next_chunk(state) for _ in range(4)]
    assert [chunk.index for chunk in chunks] == [0, 1, 2, 3]
    assert [len(chunk.frames) for chunk in chunks] == [9, 12, 12, 12]
    assert [chunk.frame for chunk in chunks] == [0, 9, 21, 33]
    assert chunks[0].frames.shape == (9, 64, 64, 3) and chunks[0].frames.dtype == torch.uint8
    assert [chunk.discontinuity for chunk in chunks] == [True, False, False, False]


def test_the_vaes_own_decoder_gives_the_frames_of_the_whole_clip(full_pipeline: Pipeline) -> None:
    """Chunk by chunk, one latent frame at a time, as if all latents had been decoded at once."""
    state = full_pipeline.open("a red ball", seed=1)
    latents, frames = [], []
    for _ in range(3):
        frames.append(full_pipeline.next_chunk(state).frames)
        assert state.uncommitted is not None
        latents.append(state.uncommitted)
        full_pipeline.commit(state)
    assert [len(part) for part in frames] == [9, 12, 12]
    decoder = full_pipeline.decoder
    assert isinstance(decoder, FullDecoding)
    with torch.inference_mode():
        whole = decoder.network.decode(decoder.statistics.restore(torch.cat(latents, dim=2)))[0] / 2 + 0.5
    whole = (whole.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert int((torch.cat(frames).short() - whole.short()).abs().max()) <= 1


def test_same_seed_and_prompt_give_the_same_frames(pipeline: Pipeline) -> None:
    one, two, other = (run(pipeline, pipeline.open("a red ball", seed=seed), 5) for seed in (3, 3, 4))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], other[0])


def test_streams_do_not_touch_each_other(pipeline: Pipeline) -> None:
    alone = run(pipeline, pipeline.open("a red ball", seed=3), 4)
    a, b = pipeline.open("a red ball", seed=3), pipeline.open("a blue cube", seed=9)
    mixed = []
    for _ in range(4):
        mixed.append(pipeline.next_chunk(a).frames)
        pipeline.next_chunk(b)
        pipeline.commit(b)
        pipeline.commit(a)
    assert all(torch.equal(x, y) for x, y in zip(alone, mixed, strict=True))


def test_the_owed_context_pass_is_made_up(pipeline: Pipeline) -> None:
    explicit = run(pipeline, pipeline.open("a red ball", seed=3), 4)
    state = pipeline.open("a red ball", seed=3)
    owed = [pipeline.next_chunk(state).frames for _ in range(4)]
    assert all(torch.equal(x, y) for x, y in zip(explicit, owed, strict=True))


@pytest.mark.parametrize("transition", ["soft", "recache", "cut"])
def test_a_steer_takes_effect_at_the_chunk_it_names(pipeline: Pipeline, transition: Transition) -> None:
    plain = run(pipeline, pipeline.open("a red ball", seed=3), 6)
    state = pipeline.open("a red ball", seed=3)
    before = run(pipeline, state, 3)
    assert pipeline.steer(state, "a blue cube", transition) == 3
    after = [pipeline.next_chunk(state) for _ in range(3)]
    assert all(torch.equal(x, y) for x, y in zip(before, plain, strict=False))
    assert not torch.equal(after[0].frames, plain[3])
    cut = transition == "cut"
    assert [chunk.discontinuity for chunk in after] == [cut, False, False]
    assert [len(chunk.frames) for chunk in after] == [9 if cut else 12, 12, 12]
    assert after[1].frame == after[0].frame + len(after[0].frames)


@pytest.mark.parametrize("committed", [True, False])
def test_recache_equals_a_history_under_the_new_text(pipeline: Pipeline, committed: bool) -> None:
    """Rewriting the window is what a context pass over the same latents under the new prompt would have left."""
    state = pipeline.open("a red ball", seed=3)
    run(pipeline, state, 4)
    pipeline.next_chunk(state)
    if committed:
        pipeline.commit(state)
    kept = [*state.recent, *([] if committed else [state.uncommitted])][-2:]
    pipeline.steer(state, "a blue cube", "recache")
    other = pipeline.open("a blue cube", seed=3)
    with torch.inference_mode():
        pipeline._cross_boundary(state)
        other.cache.reset(9)
        for latents in kept:
            assert latents is not None
            pipeline._write([other], latents)
    assert state.cache.start_frame == other.cache.start_frame == 15
    count = 2 * state.cache.chunk_tokens
    for layer in range(len(state.cache.keys.data)):
        assert torch.equal(state.cache.keys.read(layer, count), other.cache.keys.read(layer, count))
        assert torch.equal(state.cache.values.read(layer, count), other.cache.values.read(layer, count))


@pytest.mark.parametrize("committed", [True, False])
def test_refreshing_under_the_same_weights_changes_nothing(pipeline: Pipeline, committed: bool) -> None:
    """While the window holds all there was; later, what it holds was written with an older past in sight."""
    plain = run(pipeline, pipeline.open("a red ball", seed=3), 3)
    state = pipeline.open("a red ball", seed=3)
    frames = []
    for _ in range(3):
        pipeline.refresh(state)
        frames.append(pipeline.next_chunk(state).frames)
        if committed:
            pipeline.commit(state)
    assert all(torch.equal(x, y) for x, y in zip(plain, frames, strict=True))


def test_cut_forgets_the_old_scene(pipeline: Pipeline) -> None:
    histories = []
    for first in ("a red ball", "a cube"):
        state = pipeline.open(first, seed=3)
        run(pipeline, state, 3)
        pipeline.steer(state, "a blue cube", "cut")
        histories.append(run(pipeline, state, 3))
    assert all(torch.equal(x, y) for x, y in zip(*histories, strict=True))


def test_soft_blends_over_its_chunks(pipeline: Pipeline) -> None:
    state = pipeline.open("a red ball", seed=3)
    start, goal = state.text, pipeline.encode_prompt("a blue cube")
    run(pipeline, state, 2)
    pipeline.steer(state, "a blue cube", "soft")
    pipeline.next_chunk(state)
    assert torch.allclose(state.text, (start + goal) / 2, atol=1e-6)
    pipeline.next_chunk(state)
    assert torch.equal(state.text, goal)
    assert state.blend_to is None


def test_the_newest_waiting_steer_wins(pipeline: Pipeline) -> None:
    outs = []
    for prompts in (["a cube", "a blue cube"], ["a blue cube"]):
        state = pipeline.open("a red ball", seed=3)
        run(pipeline, state, 2)
        for prompt in prompts:
            pipeline.steer(state, prompt, "recache")
        outs.append(pipeline.next_chunk(state).frames)
    assert torch.equal(outs[0], outs[1])


def test_a_resumed_stream_continues_the_clock(pipeline: Pipeline) -> None:
    state = pipeline.open("a red ball", seed=3, chunk=10, frame=117)
    first, second = pipeline.next_chunk(state), pipeline.next_chunk(state)
    assert (first.index, first.frame, len(first.frames), first.discontinuity) == (10, 117, 9, True)
    assert (second.index, second.frame) == (11, 126)


def test_values_that_are_not_finite_end_the_stream(pipeline: Pipeline) -> None:
    state = pipeline.open("a red ball", seed=3)
    pipeline.dit.head.head.bias.fill_(float("nan"))
    with pytest.raises(NotFiniteError, match="chunk 0"):
        pipeline.next_chunk(state)


def clip(frames: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (frames, 64, 64, 3), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("frames", "seen"), [(1, 9), (8, 9), (9, 9), (20, 9), (21, 21), (40, 21)], ids=str)
def test_a_stream_starts_from_what_it_was_shown(pipeline: Pipeline, frames: int, seen: int) -> None:
    """The newest frames that fill whole chunks, one standing still, get a context pass; the decoder saw them too."""
    picture = clip(frames)
    state = pipeline.open("a red ball", seed=3, picture=picture)
    shown = picture[-seen:] if frames >= seen else torch.cat([picture, picture[-1:].repeat(seen - frames, 1, 1, 1)])
    assert pipeline.pictures is not None
    with torch.inference_mode():
        latents = pipeline.pictures(shown)
    assert torch.equal(torch.cat(state.recent, dim=2), latents)
    assert (state.cache.written, state.chunk, state.frame) == (latents.shape[2] // 3, 0, 0)

    other = pipeline.open("a red ball", seed=3)
    with torch.inference_mode():
        for part in latents.split(3, dim=2):
            pipeline._write([other], part)
    count = state.cache.written * state.cache.chunk_tokens
    assert torch.equal(state.cache.keys.read(1, count), other.cache.keys.read(1, count))

    chunks = [pipeline.next_chunk(state) for _ in range(3)]
    assert [(chunk.index, chunk.frame, len(chunk.frames)) for chunk in chunks] == [(0, 0, 12), (1, 12, 12), (2, 24, 12)]


def test_a_picture_matters_and_repeats_and_can_be_steered(pipeline: Pipeline) -> None:
    plain = run(pipeline, pipeline.open("a red ball", seed=3), 1)[0]
    streams = [pipeline.open("a red ball", seed=3, picture=clip(1, seed)) for seed in (1, 1, 2)]
    first, again, other = (torch.cat(run(pipeline, state, 2)) for state in streams)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[:9], plain)
    for transition in ("recache", "soft", "cut"):
        pipeline.steer(streams[0], "a blue cube", transition)
        assert len(run(pipeline, streams[0], 2)[0]) == (9 if transition == "cut" else 12)


@pytest.mark.parametrize("shape", [(1, 32, 64, 3), (64, 64, 3), (0, 64, 64, 3), (1, 64, 64, 4)])
def test_a_picture_of_another_size_is_refused(pipeline: Pipeline, shape: tuple[int, ...]) -> None:
    with pytest.raises(PictureError, match="64x64 RGB"):
        pipeline.open("a red ball", seed=3, picture=torch.zeros(shape, dtype=torch.uint8))


def test_a_model_without_an_encoder_says_so(pipeline: Pipeline) -> None:
    pipeline.pictures = None
    with pytest.raises(PictureError, match="VAE encoder"):
        pipeline.open("a red ball", seed=3, picture=clip(1))


BATCHED = [Speed(), Speed(fused=True), Speed(fused=True, kv_cache="int8-fp8", keep=0.5)]


@pytest.mark.parametrize("speed", BATCHED, ids=["as written", "fused", "8 bits, sparse"])
def test_a_batch_makes_what_each_would_alone(build: Callable[..., Pipeline], toy: Preset, speed: Speed) -> None:
    """Streams at different places of their rings, with prompts of their own, up to the rounding of products."""

    def opened() -> tuple[Pipeline, list[StreamState]]:
        pipeline = build(toy, speed=speed)
        states = [
            pipeline.open(prompt, seed) for seed, prompt in enumerate(("a red ball", "a blue cube", "a red cube"))
        ]
        for state, chunks in zip(states, (1, 2, 4), strict=True):
            run(pipeline, state, chunks)
        return pipeline, states

    pipeline, alone = opened()
    together, states = opened()
    for _ in range(4):
        expected = [pipeline.next_chunk(state) for state in alone]
        latents = [state.uncommitted for state in alone]
        for state in alone:
            pipeline.commit(state)
        found = together.next_chunks(states)
        assert [state.chunk for state in states] == [state.chunk for state in alone]
        for one, chunk, state, exact in zip(found, expected, states, latents, strict=True):
            assert isinstance(one, Chunk) and state.uncommitted is not None and exact is not None
            assert (one.index, one.frame, one.discontinuity, one.steps) == (
                chunk.index, chunk.frame, chunk.discontinuity, chunk.steps
            )  # fmt: skip
            # in 8 bits a value between two numbers may fall to either side
            limit = 5e-2 if speed.kv_cache != "exact" else 1e-4
            assert (state.uncommitted - exact).norm() / exact.norm() < limit
            assert (one.frames.short() - chunk.frames.short()).abs().float().mean() < (1 if speed.fused else 0.01)
        together.commit(*states)
        assert all(state.uncommitted is None for state in states)
        assert [s.cache.start_frame for s in states] == [s.cache.start_frame for s in alone]


def test_streams_of_a_kind_may_have_a_batch(pipeline: Pipeline) -> None:
    new, playing, other, fewer, steered, soft = (pipeline.open("a red ball", seed) for seed in range(6))
    for state in (playing, other, fewer, steered, soft):
        run(pipeline, state, 2)
    assert pipeline.kind(playing) == pipeline.kind(other) is not None
    assert pipeline.kind(new) not in (None, pipeline.kind(playing)), "its first chunk may have other steps"
    pipeline.next_chunk(new)
    assert pipeline.kind(new) == pipeline.kind(playing), "the context pass that is owed comes first"
    pipeline.set_steps(fewer, 1)
    assert pipeline.kind(fewer) not in (None, pipeline.kind(playing))
    pipeline.steer(steered, "a blue cube", "cut")
    pipeline.steer(soft, "a blue cube", "soft")
    assert pipeline.kind(steered) is None and pipeline.kind(soft) is None
    for state in (steered, soft):
        pipeline.next_chunk(state)
    assert pipeline.kind(steered) is not None and pipeline.kind(soft) is None, "a blend goes on"
    with pytest.raises(ValueError, match="no common batch"):
        pipeline.next_chunks([pipeline.open("a red ball", 1), playing])


def test_a_batch_says_whose_values_are_not_finite(pipeline: Pipeline) -> None:
    states = [pipeline.open("a red ball", seed) for seed in range(2)]
    for state in states:
        run(pipeline, state, 1)
    with torch.inference_mode():
        states[1].cache.values.data[:] = float("nan")
    good, bad = pipeline.next_chunks(states)
    assert isinstance(good, Chunk) and isinstance(bad, NotFiniteError)
