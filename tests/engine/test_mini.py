"""The model that the repository ships."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.assemble import WEIGHTS, assemble, describe, warm
from engine.checkpoints.store import verify
from engine.config import MINI
from engine.pipeline import Pipeline

FRAMES = """
import hashlib, sys, torch
from engine.assemble import assemble
torch.set_num_threads(2)
pipeline = assemble("mini")
state = pipeline.open("a red cube on grass at sunset", seed=11)
digest = hashlib.sha256()
for chunk in range(4):
    if chunk == 2:
        pipeline.steer(state, "a blue ball on snow", "recache")
    digest.update(pipeline.next_chunk(state).frames.numpy().tobytes())
print(digest.hexdigest())
"""


@pytest.fixture(scope="module")
def mini() -> Pipeline:
    torch.set_num_threads(2)
    return assemble("mini")


def test_the_weights_fit_the_promise() -> None:
    folder = WEIGHTS / MINI.name
    verify(folder)
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) <= 32 << 20
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}


def test_frames_repeat_bit_for_bit_in_another_process() -> None:
    root = Path(__file__).parents[2]
    digests = [
        subprocess.run(
            [sys.executable, "-c", FRAMES], check=True, cwd=root, capture_output=True, text=True
        ).stdout.split()[-1]
        for _ in range(2)
    ]
    assert digests[0] == digests[1]
    assert len(digests[0]) == len(hashlib.sha256().hexdigest())


def test_the_model_describes_itself(mini: Pipeline) -> None:
    info = describe(mini, warm(mini))
    assert (info.name, info.width, info.height, info.fps) == ("mini", 256, 256, 16)
    assert (info.first_chunk_frames, info.chunk_frames) == (9, 12)
    assert info.steps <= 4
    assert 20e6 < info.parameters < 40e6


@pytest.mark.parametrize(
    ("prompt", "darker"),
    [("a red ball on snow at noon, clear sky", "a red ball on grass at night"), ("snow at noon", "grass at midnight")],
)
def test_the_sky_follows_the_prompt(mini: Pipeline, prompt: str, darker: str) -> None:
    """The least that text must do: day is brighter than night, from the start and after a change."""
    brightness = {}
    for name, first, then in (("day", prompt, darker), ("night", darker, prompt)):
        state = mini.open(first, seed=5)
        chunks = []
        for index in range(6):
            if index == 2:
                mini.steer(state, then, "recache")
            chunks.append(mini.next_chunk(state).frames[-1, :64].float().mean().item())
            mini.commit(state)
        brightness[name] = chunks
    assert brightness["day"][1] > brightness["night"][1] + 30
    assert brightness["night"][5] > brightness["day"][5] + 30
