"""The model that the repository ships."""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.assemble import WEIGHTS, assemble, describe
from engine.checkpoints.store import verify
from engine.config import MINI
from engine.pipeline import Pipeline
from engine.recipes import world
from engine.recipes.export import Shipped
from engine.warmup import warm

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


def drawn(mini: Pipeline, prompt: str, then: str | None = None) -> dict[str, str]:
    """What the second probe reads out of the newest 24 frames: two chunks after the start, or after the change."""
    state = mini.open(prompt, seed=5)
    chunks = []
    for index in range(8 if then else 4):
        if then and index == 4:
            mini.steer(state, then, "recache")
        chunks.append(mini.next_chunk(state).frames)
        mini.commit(state)
    probe = Shipped(torch.device("cpu")).probe("probe-b")
    read = probe.read(torch.cat(chunks[-2:]).permute(0, 3, 1, 2)[None])[0].tolist()
    return {name: values[read[world.COLUMN[name]]] for name, values in world.ATTRIBUTES.items()}


SCENES = [
    ("a red ball bouncing on grass by day", {"shape": "sphere", "colour": "red", "ground": "grass", "sky": "day"}),
    ("a blue ring spinning on sand at night", {"shape": "ring", "colour": "blue", "ground": "sand", "sky": "night"}),
    ("a pink cone on snow, overcast", {"shape": "cone", "colour": "pink", "ground": "snow", "sky": "overcast"}),
]


@pytest.mark.parametrize(("prompt", "asked"), SCENES)
def test_what_is_asked_for_is_drawn(mini: Pipeline, prompt: str, asked: dict[str, str]) -> None:
    seen = drawn(mini, prompt)
    assert {name: seen[name] for name in asked} == asked


def test_a_change_is_drawn(mini: Pipeline) -> None:
    (prompt, _), _, (then, asked) = SCENES
    seen = drawn(mini, prompt, then)
    assert {name: seen[name] for name in asked} == asked


def test_it_draws_with_one_step_what_it_is_asked_for(mini: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stream that would run dry: the network runs less often, and the picture is still the one that was asked for."""
    calls = 0
    begin = type(mini.dit).begin

    def counting(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        return begin(*arguments, **options)

    monkeypatch.setattr(type(mini.dit), "begin", counting)
    state = mini.open("a red metal cube spinning on grass at sunset, orbiting camera", seed=5)
    chunks, made = [], []
    for index in range(5):
        if index == 2:
            mini.set_steps(state, 1)
        before = calls
        chunk = mini.next_chunk(state)
        mini.commit(state)
        chunks.append(chunk.frames)
        made.append((chunk.steps, calls - before))
    # Denoising, and the context pass.
    assert made == [(None, 3), (None, 3), (1, 2), (1, 2), (1, 2)]
    probe = Shipped(torch.device("cpu")).probe("probe-b")
    read = probe.read(torch.cat(chunks[-2:]).permute(0, 3, 1, 2)[None])[0].tolist()
    drawn = {name: values[read[world.COLUMN[name]]] for name, values in world.ATTRIBUTES.items()}
    assert (drawn["shape"], drawn["colour"], drawn["ground"], drawn["sky"]) == ("cube", "red", "grass", "sunset")
