"""The rollout and the transformers that it runs."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from engine.config import Preset
from engine.pipeline import Pipeline
from engine.transforms.apply import Speed

Build = Callable[..., Pipeline]


def frames(pipeline: Pipeline, chunks: int = 5) -> torch.Tensor:
    state = pipeline.open("a blue cube", seed=3)
    out = []
    for index in range(chunks):
        if index == 2:
            pipeline.steer(state, "a red ball", "recache")
        out.append(pipeline.next_chunk(state).frames)
        pipeline.commit(state)
    return torch.cat(out).float()


def test_without_a_context_pass_the_past_is_another(build: Build, toy: Preset) -> None:
    with_pass, without = (frames(build(toy, speed=Speed(context_pass=used))) for used in (True, False))
    first = toy.first_chunk_frames
    assert torch.equal(with_pass[:first], without[:first])
    assert not torch.equal(with_pass[first:], without[first:])


def test_fewer_steps_from_one_chunk_to_the_next(build: Build, toy: Preset) -> None:
    preset = replace(toy, steps=(1000, 750, 500, 250))
    pipeline = build(preset)
    calls = []
    forward = pipeline.dit.forward  # type: ignore[attr-defined]

    def counted(x: torch.Tensor, t: torch.Tensor, *rest: object) -> torch.Tensor:
        calls.append(float(t[0, 0]))
        out: torch.Tensor = forward(x, t, *rest)
        return out

    pipeline.dit.forward = counted  # type: ignore[attr-defined]
    state = pipeline.open("a blue cube", seed=3)
    seen = []
    for steps in (None, 3, 2, 1, 9):
        state.steps = steps
        calls.clear()
        pipeline.next_chunk(state)
        seen.append([round(t / 1000, 3) for t in calls])
        pipeline.commit(state)
    all_of_them = [round(s, 3) for s in preset.sigmas]
    a, b, c, d = all_of_them
    assert seen == [[a, b, c, d], [a, b, c], [a, c], [a], [a, b, c, d]]


@pytest.mark.parametrize("speed", [Speed(), Speed(fused=True)], ids=["as written", "fused"])
@torch.inference_mode()
def test_a_forward_is_its_two_parts_and_a_commit_the_first(build: Build, toy: Preset, speed: Speed) -> None:
    """Every transformer: `begin` writes all keys and values, `finish` only computes the flow."""
    served = build(toy, speed=speed).served
    model = served.dit
    x = torch.randn(1, toy.dit.in_channels, toy.chunk, toy.latent_rows, toy.latent_columns)
    t, context = torch.full((1, toy.chunk), 500.0), model.encode_text(torch.randn(1, 4, toy.dit.text_dim))
    whole, parts, committed = (served.new_cache() for _ in range(3))
    expected = model(x, t, context, whole).clone()
    begun = model.begin(x, t, context, parts)
    assert torch.equal(parts.keys.data, whole.keys.data) and torch.equal(parts.values.data, whole.values.data)
    assert torch.equal(model.finish(begun, context, parts), expected)
    model.commit(x, t, context, committed)
    assert torch.equal(committed.keys.data, whole.keys.data)


def test_without_graphs_there_is_nothing_to_prepare(build: Build, toy: Preset) -> None:
    for speed in (Speed(), Speed(fused=True)):
        served = build(toy, speed=speed).served
        assert not served.dit.prepare(served.new_cache())
