"""The procedural world: its scenes, its parameters, and the two renderers held together."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.recipes import world
from engine.recipes.world import ATTRIBUTES, COLUMN

NEVER = 10**9


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair_is_held(scenes: Tensor, suffix: str = "") -> Tensor:
    held = {(world.SHAPES.index(s), world.COLOURS.index(c)) for s, c in world.HELD_OUT}
    shape, colour = scenes[:, COLUMN["shape" + suffix]].tolist(), scenes[:, COLUMN["colour" + suffix]].tolist()
    return torch.tensor([pair in held for pair in zip(shape, colour, strict=True)])


def still(scenes: Tensor, variation: world.Variation, frames: int = 4, start: float = 3.0) -> Tensor:
    n = scenes.shape[0]
    return world.clip_params(scenes, scenes, torch.full((n,), NEVER), variation, frames, torch.full((n,), start))


def base_scene(**values: str) -> list[int]:
    row = dict.fromkeys(ATTRIBUTES, 0)
    row |= {"count": 2, "colour2": 5, "colour3": 2, "relation3": 1}
    return [ATTRIBUTES[name].index(values[name]) if name in values else index for name, index in row.items()]


# ---------------------------------------------------------------- scenes


def test_same_seed_gives_the_same_scenes_and_parameters() -> None:
    def draw(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        g = generator(seed)
        scenes = world.sample_scenes(16, g)
        target = world.steer_scenes(scenes, g)
        start = torch.zeros(16)
        return scenes, target, world.clip_params(scenes, target, start, world.sample_variation(16, g), 3, start)

    first, second, other = draw(1), draw(1), draw(2)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], other[0])


def test_held_out_pairs_are_one_in_ten_and_touch_nothing_twice() -> None:
    assert len(world.HELD_OUT) * 10 == len(world.SHAPES) * len(world.COLOURS)
    shapes, colours = zip(*world.HELD_OUT, strict=True)
    assert set(shapes) == set(world.SHAPES)
    assert len(set(colours)) == len(colours)


@pytest.mark.parametrize("steered", [False, True])
def test_splits(steered: bool) -> None:
    splits: tuple[world.Split, ...] = ("train", "held_out", "any")
    for split in splits:
        g = generator()
        scenes = world.sample_scenes(4000, g, split=split, count_weights=(0.3, 0.3, 0.4))
        if steered:
            scenes = world.steer_scenes(scenes, g, split=split)
        assert scenes.dtype == torch.int64
        for column, (name, names) in enumerate(ATTRIBUTES.items()):
            reached = 7 if (split, name) == ("held_out", "colour") else len(names)
            assert len(set(scenes[:, column].tolist())) == reached
            assert scenes[:, column].min() >= 0 and scenes[:, column].max() < len(names)
        held = [pair_is_held(scenes, suffix) for suffix in ("", "2", "3")]
        if split == "any":
            assert all(0.05 < h.float().mean() < 0.15 for h in held)
        else:
            assert held[0].all() == (split == "held_out") and held[0].any() == (split == "held_out")
            assert not held[1].any() and not held[2].any()
        assert (scenes[:, COLUMN["relation2"]] != scenes[:, COLUMN["relation3"]]).all()


@pytest.mark.parametrize("split", ["train", "held_out", "any"])
def test_steering_changes_what_shows(split: world.Split) -> None:
    g = generator()
    scenes = world.sample_scenes(6000, g, split=split, count_weights=(0.4, 0.3, 0.3))
    target = world.steer_scenes(scenes, g, split=split)
    shown = world.active(scenes) | world.active(target)
    changed = ((scenes != target) & shown).sum(dim=1)
    recounted = (scenes[:, 0] != target[:, 0]).float().mean()
    assert changed.min() >= 1
    assert 0.12 < recounted < 0.18
    same_count = scenes[:, 0] == target[:, 0]
    everything = (changed == shown.sum(dim=1) - 1) & same_count
    assert 0.22 < everything.float().mean() < 0.28
    assert 0.5 < ((changed <= 3) & same_count).float().mean() < 0.65


def test_active_follows_the_count() -> None:
    scenes = torch.tensor([base_scene(count=name) for name in world.COUNTS])
    assert world.active(scenes).sum(dim=1).tolist() == [8, 11, 14]


# ---------------------------------------------------------------- parameters


def test_canonical_order_is_by_relation_and_loses_nothing() -> None:
    scenes = world.sample_scenes(512, torch.Generator().manual_seed(3), count_weights=(0.2, 0.2, 0.6))
    ordered = world.canonical(scenes)
    two = scenes[:, 0] == 2
    second, third = world.COLUMN["relation2"], world.COLUMN["relation3"]
    assert (ordered[two, second] < ordered[two, third]).all()
    assert torch.equal(ordered[~two], scenes[~two])
    assert torch.equal(ordered.sort(dim=1).values, scenes.sort(dim=1).values)
    assert torch.equal(world.canonical(ordered), ordered)
    swapped = (ordered != scenes).any(dim=1)
    assert swapped.any()
    assert torch.equal(ordered[swapped][:, world.COLUMN["shape2"]], scenes[swapped][:, world.COLUMN["shape3"]])


def test_parameters_are_finite_after_a_year() -> None:
    g = generator()
    scenes = world.sample_scenes(64, g, split="any")
    params = still(scenes, world.sample_variation(64, g), frames=5, start=3e7)
    assert params.shape == (64, 5, world.P) and params.dtype == torch.float32
    assert params.isfinite().all() and params.abs().max() < 50


def test_a_clip_continues_where_another_ended() -> None:
    g = generator()
    scenes = world.sample_scenes(32, g, split="any")
    variation = world.sample_variation(32, g)
    whole = still(scenes, variation, frames=40, start=0.0)
    tail = still(scenes, variation, frames=8, start=2.0)
    torch.testing.assert_close(whole[:, 32:], tail, atol=1e-5, rtol=0)


def test_morph_is_smooth_and_ends_in_the_new_scene() -> None:
    g, n, frames, change = generator(), 400, 40, 10
    before = world.sample_scenes(n, g, split="any", count_weights=(0.3, 0.3, 0.4))
    after = world.steer_scenes(before, g, split="any")
    variation = world.sample_variation(n, g)
    params = world.clip_params(before, after, torch.full((n,), change), variation, frames, torch.full((n,), 3.0))
    old, new = still(before, variation, frames), still(after, variation, frames)
    # Where a companion does not show, its look is nobody's business.
    companions = world._P["OBJECTS"] + world._OBJECT_SIZE
    end = change + world.MORPH_FRAMES
    torch.testing.assert_close(
        params[:, : change + 1, :companions], old[:, : change + 1, :companions], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(params[:, end:, :companions], new[:, end:, :companions], atol=1e-5, rtol=0)
    for j in (1, 2):
        at = slice(world._P["OBJECTS"] + j * world._OBJECT_SIZE, world._P["OBJECTS"] + (j + 1) * world._OBJECT_SIZE)
        gone, there = before[:, 0] >= j, after[:, 0] >= j
        torch.testing.assert_close(params[gone, : change + 1, at], old[gone, : change + 1, at], atol=1e-5, rtol=0)
        torch.testing.assert_close(params[there, end:, at], new[there, end:, at], atol=1e-5, rtol=0)
    step = params.diff(dim=1).abs()
    phases = [world._P[name] + i for name in ("WAVES", "AURORA") for i in range(world._FIELDS[name])]
    step[..., phases] = 0  # angles wrap
    assert step.max() < 1.2, "nothing jumps: a companion changes sides unseen, a fall takes half a second"


def test_companions_keep_clear_of_the_main_object() -> None:
    g, n = generator(), 600
    scenes = world.sample_scenes(n, g, split="any", count_weights=(0.0, 0.3, 0.7))
    params = still(scenes, world.sample_variation(n, g), frames=64)
    objects = params[..., world._P["OBJECTS"] :].reshape(n, 64, 3, world._OBJECT_SIZE)
    ground = objects[..., [0, 2]]
    for j in (1, 2):
        shown = scenes[:, 0] >= j
        apart = (ground[..., j, :] - ground[..., 0, :]).norm(dim=-1)[shown]
        assert apart.min() > 1.4
    both = scenes[:, 0] == 2
    assert (ground[..., 1, :] - ground[..., 2, :]).norm(dim=-1)[both].min() > 1.4


# ---------------------------------------------------------------- pictures


def some_params(n: int, seed: int) -> Tensor:
    """Frames of n clips, each at a different stage of its morph."""
    g = generator(seed)
    before = world.sample_scenes(n, g, split="any", count_weights=(0.3, 0.3, 0.4))
    after = world.steer_scenes(before, g, split="any")
    change = torch.linspace(-14, 2, n)
    start = torch.rand(n, generator=g) * 1000
    return world.clip_params(before, after, change, world.sample_variation(n, g), 1, start)[:, 0]


def test_render_shape_and_empty_batch() -> None:
    frames = world.render(some_params(2, 0), size=32)
    assert frames.shape == (2, 3, 32, 32) and frames.dtype == torch.uint8
    assert frames.float().std() > 20
    assert world.render(torch.empty(0, world.P), size=32).shape == (0, 3, 32, 32)


@pytest.mark.parametrize("name", list(ATTRIBUTES))
def test_every_attribute_shows(name: str) -> None:
    scenes = torch.tensor([base_scene(**{name: value}) for value in ATTRIBUTES[name]])
    if name in ("relation2", "relation3"):  # two companions would stand in one place
        scenes[:, 0] = 1 if name == "relation2" else 2
        if name == "relation3":
            scenes[:, COLUMN["relation2"]] = (scenes[:, COLUMN["relation3"]] + 1) % 4
    g = generator(3)
    variation = world.sample_variation(1, g)[torch.zeros(len(scenes), dtype=torch.long)]
    params = torch.cat([still(scenes, variation, frames=1, start=start) for start in (0.2, 0.9)], dim=1)
    pictures = world.render(params.flatten(0, 1), size=32).float().reshape(len(scenes), -1)
    apart = torch.cdist(pictures, pictures, p=1) / pictures.shape[1]
    apart.fill_diagonal_(torch.inf)
    assert apart.min() > 0.4


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_kernel_agrees_with_the_reference(tmp_path: Path) -> None:
    source, library = tmp_path / "world.cpp", tmp_path / "world.so"
    source.write_text(world.kernel_source(), encoding="utf-8")
    subprocess.run(["g++", "-O1", "-shared", "-fPIC", "-o", library, source], check=True)
    params = some_params(12, 7).contiguous()
    expected = world.render_reference(params, 64)
    frames = torch.empty_like(expected)
    ctypes.CDLL(str(library)).render_host(
        ctypes.c_void_p(params.data_ptr()), ctypes.c_void_p(frames.data_ptr()), len(params), 64
    )
    difference = (frames.int() - expected.int()).abs()
    assert difference.float().mean() < 0.5
    assert (difference > 8).float().mean() < 0.005


@pytest.mark.gpu
def test_gpu_agrees_with_the_reference() -> None:
    params = some_params(12, 7)
    difference = (world.render(params.cuda()).cpu().int() - world.render_reference(params).int()).abs()
    assert difference.float().mean() < 0.5
    assert (difference > 8).float().mean() < 0.005
