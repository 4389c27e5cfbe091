"""Where heads look is measured: the shares are those of the softmax; what hardly looks at the past can be pruned."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from engine.bench import errors, rollout
from engine.bench import heads as bench
from engine.config import CacheConfig, Preset
from engine.pipeline import Pipeline
from engine.stream.pruned_heads import below
from engine.transforms.apply import Speed


@pytest.mark.parametrize("sink", [0, 3])
def test_shares_are_those_of_the_softmax(sink: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every slot of the ring, the queries taken a few at a time."""
    monkeypatch.setattr(bench, "QUERIES", 5)
    torch.manual_seed(0)
    config = CacheConfig(chunk=3, window=12, sink=sink, rows=2, columns=2)
    cache = bench.MeasuredCache(config, layers=1, heads=2, head_dim=16, batch=2)
    cache.measure(1, 2)
    expected = []
    for chunk in range(8):
        q, k, v = (torch.randn(2, 12, 2, 16) * 3 for _ in range(3))
        cache._attend(0, q, k, v)
        if chunk >= 3:
            turned = bench.rotate(q, cache._angles)
            weights = torch.einsum("bqhd,bkhd->bhqk", turned, cache.keys.data[0]).div(4).softmax(-1)
            by_slot = weights.mean((0, 2)).unflatten(-1, (4, 12)).sum(-1)
            current, in_sink = by_slot[:, cache.slot], by_slot[:, : sink // 3].sum(-1)
            expected.append(torch.stack([in_sink, 1 - in_sink - current, current], -1).double())
        cache.advance()
    mass = cache.mass
    assert mass.forwards == len(expected) == 5
    assert torch.allclose(mass.mean[0], torch.stack(expected).mean(0), atol=1e-5)
    assert torch.allclose(mass.most[0], torch.stack(expected)[..., 1].amax(0), atol=1e-5)
    assert (mass.mean[0, :, 0] > 0).all() == (sink > 0)


def test_a_rollout_is_measured(build: Callable[..., Pipeline], toy: Preset) -> None:
    """Every forward at full window, the same again each time; the table has the heads in order."""
    pipeline = build(toy)
    mass = bench.measure(pipeline, ["a red cube", "a blue ball"], range(2), 5)
    assert mass.forwards == 2 * 3 * (len(toy.steps) + 1)
    assert torch.allclose(mass.mean.sum(-1), torch.ones(2, 2, dtype=torch.float64))
    assert (mass.most >= mass.mean[..., 1]).all() and (mass.mean[..., 1] > 0).all()
    assert torch.equal(mass.sums, bench.measure(pipeline, ["a red cube", "a blue ball"], range(2), 5).sums)
    lines = [line.split() for line in bench.table(mass).splitlines()[1:]]
    past = [float(line[3]) for line in lines]
    assert past == sorted(past) and len(past) == 4
    least = int(lines[0][0]), int(lines[0][1])
    assert below(mass.mean[..., 1].tolist(), (past[0] + past[1]) / 2) == {least}


@pytest.mark.parametrize(("window", "chunks", "message"), [(9, 2, "full from chunk 3"), (3, 5, "holds no past")])
def test_without_a_past_nothing_can_be_measured(
    build: Callable[..., Pipeline], toy: Preset, window: int, chunks: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bench.measure(build(replace(toy, window=window, sink=0)), ["a red cube"], range(1), chunks)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["self-forcing-1.3b"], "random ones say nothing of its heads: give their folder as --weights"),
        (["mini", "--below", "2"], "a share from 0 to 1"),
        (["mini", "--write", "heads.json"], "--write needs --below"),
        (["mini", "--chunks", "1", "--prompt", "a red cube"], "full from chunk 3 on"),
    ],
)
def test_what_cannot_be_measured_says_so(
    words: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["heads", *words])
    with pytest.raises(SystemExit):
        bench.main()
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_policy_is_written(
    build: Callable[..., Pipeline], toy: Preset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "ready", lambda preset, weights: build(toy))
    file = tmp_path / "heads.json"
    command = ["heads", "mini", "--chunks", "3", "--prompt", "a red cube", "--below", "1", "--write", str(file)]
    monkeypatch.setattr(sys, "argv", command)
    bench.main()
    assert bench.heads.load(file, toy.dit) == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_policies_are_compared(toy: Preset, tmp_path: Path) -> None:
    bench.heads.save(frozenset({(0, 1)}), tmp_path / "few.json")
    bench.heads.save(frozenset(), tmp_path / "none.json")
    files = [tmp_path / "few.json", tmp_path / "none.json"]
    found = dict(list(errors.pruning(files, toy, torch.device("cpu")))[:3])
    assert found == {
        "few, 1 heads": Speed(fused=True, pruned_heads=frozenset({(0, 1)})),
        "the same, half of the past": Speed(fused=True, pruned_heads=frozenset({(0, 1)}), keep=0.5),
        "none, 0 heads": Speed(fused=True),
    }


def chosen(*words: str) -> tuple[Preset, Speed]:
    parser = argparse.ArgumentParser()
    rollout.add_preset(parser)
    options = parser.parse_args(["mini", *words])
    return rollout.chosen(parser, options, torch.device("cpu"))


def test_a_share_is_pruned_for_measuring(capsys: pytest.CaptureFixture[str]) -> None:
    """By itself it is enough for the fused model, as every other option for speed is."""
    preset, speed = chosen("--prune-share", "0.5")
    assert speed == Speed(fused=True, pruned_heads=frozenset((layer, head) for layer in range(8) for head in range(3)))
    assert "pruned_heads=24 of 48" in rollout.describe_speed(preset, speed)
    assert chosen("--prune-share", "0")[1] == Speed()
    with pytest.raises(SystemExit):
        chosen("--prune-share", "1.5")
    assert "the share of pruned heads must be from 0 to 1" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        chosen("--prune-share", "0.5", "--plain")
    assert "pruned_heads can only be used together with the fused model" in capsys.readouterr().err
