"""Whole pipelines under every legal set of transforms that a CPU can run, against the model as it is written."""

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.config import MINI, KVPrecision, Preset, QuantScheme, Role
from engine.options import add_speed
from engine.pipeline import Pipeline
from engine.transforms.apply import Speed, accelerate, fastest_exact, from_arguments
from engine.transforms.low_bit import Policy
from engine.transforms.sparse_weights import prune_weights

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


@pytest.mark.parametrize("low_bit", [None, "fp8", "int8"])
@pytest.mark.parametrize("kv_cache", ["exact", "int8-fp8"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("context_pass", [True, False])
def test_every_legal_set(
    build: Build, toy: Preset, low_bit: QuantScheme | None, kv_cache: KVPrecision, keep: float, context_pass: bool
) -> None:
    """The toy's untrained frames are noise around grey, so only their distance is looked at."""
    speed = Speed(True, low_bit, kv_cache, keep, context_pass=context_pass)
    expected = frames(build(toy, speed=Speed(context_pass=context_pass)))
    found = frames(build(toy, speed=speed))
    assert found.shape == expected.shape
    limit = 0.01 if low_bit is None and kv_cache == "exact" and keep == 1 else 2.0
    assert (found - expected).abs().mean() < limit


@pytest.mark.parametrize(
    "options",
    [
        {"low_bit": "fp8"},
        {"kv_cache": "int8-fp8"},
        {"keep": 0.5},
        {"graphs": True},
        {"pruned_heads": frozenset({(0, 0)})},
    ],
)
def test_what_needs_the_fused_model_says_so(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} can only be used together with the fused model"):
        Speed(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", [0.0, -1.0, 1.5])
def test_keep_is_a_share(keep: float) -> None:
    with pytest.raises(ValueError, match="keep must be above 0 and at most 1"):
        Speed(fused=True, keep=keep)


def test_impossible_combinations(build: Build, toy: Preset) -> None:
    pipeline = build(toy)
    wan, decoder = pipeline.served.wan, pipeline.decoder
    with pytest.raises(ValueError, match="CUDA graphs need a GPU"):
        accelerate(wan, decoder, toy, Speed(fused=True, graphs=True))
    with pytest.raises(ValueError, match="needs the unfused model"):
        Speed(fused=True, kv_cache="int8")
    with pytest.raises(ValueError, match="layer 1 has no head 2: heads are 0 to 1"):
        accelerate(wan, decoder, toy, Speed(fused=True, pruned_heads=frozenset({(1, 2)})))


def test_a_cpu_serves_without_graphs() -> None:
    assert not fastest_exact(torch.device("cpu")).graphs
    assert fastest_exact(torch.device("cuda")) == Speed(fused=True, graphs=True)


def test_a_closed_streams_cache_serves_the_next(build: Build, toy: Preset) -> None:
    pipeline = build(toy, speed=Speed(fused=True))
    first = pipeline.open("a blue cube", seed=3)
    reference = pipeline.next_chunk(first).frames
    pipeline.next_chunk(first)
    pipeline.close(first)
    second = pipeline.open("a blue cube", seed=3)
    assert second.cache is first.cache
    assert torch.equal(pipeline.next_chunk(second).frames, reference)
    assert pipeline.open("a blue cube", seed=3).cache is not first.cache


def options(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_speed(parser)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], Speed()),
        (["--kv-cache", "int8"], Speed(kv_cache="int8")),
        (["--low-bit-attention"], Speed(fused=True, kv_cache="int8-fp8")),
        (["--low-bit", "nvfp4"], Speed(fused=True, low_bit="nvfp4")),
        (["--low-bit", "fp8-tensor", "--fixed-scales"], Speed(True, "fp8-tensor", fixed_scales=True)),
        (["--sparse-weights"], Speed(fused=True, sparse_weights="faster")),
        (["--sparse-weights", "up", "down"], Speed(fused=True, sparse_weights=frozenset({"up", "down"}))),
        (["--low-bit", "fp8", "--sparse-weights", "qkv"], Speed(True, "fp8", sparse_weights=frozenset({"qkv"}))),
    ],
)
def test_what_rounds_or_prunes_is_asked_for(words: list[str], expected: Speed) -> None:
    assert from_arguments(options(*words), torch.device("cpu"), MINI.dit) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--low-bit", "int8", "--sparse-weights", "up"], "not in int8"),
        (["--low-bit", "mxfp8", "--sparse-weights"], "not in mxfp8"),
        (["--fixed-scales"], "fixed_scales can only be used together"),
        (["--low-bit", "mxfp8", "--fixed-scales"], "fixed_scales need low_bit"),
        (["--low-bit", "fp8-weights", "--fixed-scales"], "fixed_scales need low_bit"),
        (["--pruned-heads", "nowhere/heads.json"], "nowhere/heads.json cannot be read"),
        (["--low-bit-attention", "--kv-cache", "int8"], "exclude each other"),
        (["--keep", "0.5", "--kv-cache", "fp8"], "needs the unfused model"),
        (["--plain", "--sparse-weights"], "sparse_weights can only be used together with the fused model"),
    ],
)
def test_what_cannot_be_together_says_so(words: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_arguments(options(*words), torch.device("cpu"), MINI.dit)


def test_a_gpu_without_float8_is_pointed_to_int8(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    gpu = torch.device("cuda")
    with pytest.raises(ValueError, match="use int8"):
        from_arguments(options("--low-bit", "fp8"), gpu, MINI.dit)
    assert from_arguments(options("--low-bit", "int8"), gpu, MINI.dit).low_bit == "int8"


def test_sparse_weights_are_served_and_told(build: Build, toy: Preset) -> None:
    """The model as it is written, with the same weights pruned, is their reference."""
    roles: frozenset[Role] = frozenset({"qkv", "up"})
    pruned = build(toy)
    prune_weights(pruned.served.wan, Policy(sparse=roles))
    pipeline = build(toy, speed=Speed(fused=True, sparse_weights=roles))
    assert pipeline.served.policy.sparse == roles
    assert (frames(pipeline) - frames(pruned)).abs().mean() < 0.01
    assert (frames(pipeline) - frames(build(toy))).abs().mean() > 0.01


def test_a_device_that_speeds_up_nothing_prunes_nothing(build: Build, toy: Preset) -> None:
    pipeline = build(toy, speed=Speed(fused=True, sparse_weights="faster"))
    assert pipeline.served.policy.sparse == frozenset()
    assert torch.equal(frames(pipeline, 2), frames(build(toy, speed=Speed(fused=True)), 2))


@pytest.fixture
def wide(toy: Preset) -> Preset:
    """The toy with chunks of 192 tokens, as `mini` has, so that there are blocks of the past to leave out."""
    return replace(toy, width=256, height=256)


def latents(pipeline: Pipeline, chunks: int = 5) -> torch.Tensor:
    state = pipeline.open("a blue cube", seed=3)
    for _ in range(chunks):
        pipeline.next_chunk(state)
        pipeline.commit(state)
    return torch.cat(list(state.recent)).float()


def test_a_policy_without_heads_changes_nothing(build: Build, wide: Preset, tmp_path: Path) -> None:
    file = tmp_path / "heads.json"
    file.write_text('{"0": [], "1": []}')
    asked = from_arguments(options("--pruned-heads", str(file)), torch.device("cpu"), wide.dit)
    assert asked == Speed()
    found = latents(build(wide, speed=replace(asked, fused=True)))
    assert torch.equal(found, latents(build(wide, speed=Speed(fused=True))))


@pytest.mark.parametrize("low_bit", [None, "fp8", "int8"])
@pytest.mark.parametrize("kv_cache", ["exact", "int8-fp8"])
@pytest.mark.parametrize("keep", [1.0, 0.5])
def test_pruned_heads_beside_every_transform(
    build: Build, wide: Preset, tmp_path: Path, low_bit: QuantScheme | None, kv_cache: KVPrecision, keep: float
) -> None:
    """They change the latents, by the file's heads, and again in the same way."""
    file = tmp_path / "heads.json"
    file.write_text('{"1": [0]}')
    words = ["--pruned-heads", str(file), "--keep", str(keep)]
    words += ["--low-bit", low_bit] if low_bit else []
    words += ["--low-bit-attention"] if kv_cache == "int8-fp8" else []
    speed = from_arguments(options(*words), torch.device("cpu"), wide.dit)
    assert speed == Speed(True, low_bit, kv_cache, keep, pruned_heads=frozenset({(1, 0)}))
    found = latents(build(wide, speed=speed), 4)
    assert torch.equal(found, latents(build(wide, speed=speed), 4))
    expected = latents(build(wide, speed=replace(speed, pruned_heads=frozenset())), 4)
    assert 0 < (found - expected).norm() / expected.norm() < 0.2
