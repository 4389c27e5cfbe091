"""The table of errors: every variant can be made and run, and only what rounds differs."""

from collections.abc import Callable

import torch

from engine.bench import errors
from engine.config import Preset
from engine.pipeline import Pipeline
from engine.transforms.apply import Speed

EXACT = {"as it is written", "fused", "half of the past", "a fifth of the past"}
"""The toy's whole past fits into one block of keys, so that none is left out."""


def test_variants_differ_by_what_they_round(build: Callable[..., Pipeline], toy: Preset) -> None:
    expected, frames = errors.run(build(toy), 4)
    assert len(expected) == 4 and len(frames) == toy.first_chunk_frames + 3 * toy.chunk_frames
    for name, speed in errors.variants(torch.device("cpu")):
        latents, _ = errors.run(build(toy, speed=speed), 4)
        apart = errors.relative(torch.cat(latents), torch.cat(expected))
        assert (apart < 1e-5) == (name in EXACT), name
        assert apart < 0.5, name


def test_random_weights_are_the_same_for_every_variant(toy: Preset) -> None:
    make = errors.maker(toy, torch.device("cpu"))
    first, second = (errors.run(make(torch.float32, Speed()), 2)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
