"""Every way that trainers nest, split and store a pickled network gives the same tensors."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.checkpoints import sources
from engine.checkpoints.headers import StoreError
from engine.checkpoints.self_forcing import read_pickle

WEIGHTS = {"blocks.0.ffn.0.weight": torch.ones(3, 2), "blocks.0.ffn.0.bias": torch.arange(3.0)}


def same(found: Any, expected: dict[str, Tensor] = WEIGHTS) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize(
    ("content", "key"),
    [
        (WEIGHTS, ""),
        ({"model": WEIGHTS, "step": 3}, "model"),
        ({"state_dict": WEIGHTS, "epoch": 1, "optimizer": {}}, "state_dict"),
        ({"state_dict": {"generator": WEIGHTS, "critic": {}}}, "state_dict.generator"),
        ({"module": WEIGHTS}, "module"),
        ({"generator_ema": {}, "generator": WEIGHTS}, "generator"),
        ({"generator_ema": None, "generator": WEIGHTS}, "generator"),
        ({"generator": {"model": WEIGHTS}, "generator_ema": {}}, "generator.model"),
    ],
)
def test_the_network_is_found_where_trainers_put_it(tmp_path: Path, content: Any, key: str, old: bool) -> None:
    """Also in the format of torch before 1.6, which is no zip file."""
    torch.save(content, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    tensors, where = read_pickle(tmp_path / "x.pt")
    assert same(tensors) and where == key


def test_without_tensors_the_keys_are_named(tmp_path: Path) -> None:
    for content in ({"generator_ema": {}, "step": 1}, {"model": {"step": 1}}, {}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(StoreError, match=r"x\.pt"):
            read_pickle(tmp_path / "x.pt")
    circle: dict[str, Any] = {}
    circle["model"] = {"model": circle}
    torch.save(circle, tmp_path / "x.pt")
    with pytest.raises(StoreError, match="instead of a tensor"):
        read_pickle(tmp_path / "x.pt")


def test_an_old_file_that_is_cut_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False)
    whole = path.read_bytes()
    for size in (2, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(StoreError, match="refused: it is damaged"):
            read_pickle(path)


def shards(folder: Path) -> Path:
    index = {}
    for number, (name, value) in enumerate(WEIGHTS.items(), 1):
        index[name] = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: value}, folder / index[name])
    path = folder / "pytorch_model.bin.index.json"
    path.write_text(json.dumps({"weight_map": index}))
    return path


def test_shards_with_an_index_are_one_network(tmp_path: Path) -> None:
    index = shards(tmp_path)
    assert same(read_pickle(index)[0])
    for place in (tmp_path, index):
        assert sources.find(place).pickles == [index]
    assert sources.pickle_fault(index) is None


def test_what_is_wrong_with_pickled_shards_is_named(tmp_path: Path) -> None:
    index = shards(tmp_path)
    first, second = sorted(tmp_path.glob("*.bin"))
    torch.save({"other": torch.ones(1)}, second)
    with pytest.raises(StoreError, match=r"other is in .*00002\.bin, but the index says None"):
        read_pickle(index)
    torch.save({}, second)
    with pytest.raises(StoreError, match="00002"):
        read_pickle(index)
    second.unlink()
    fault = sources.pickle_fault(index)
    assert fault == f"{second} is missing"
    index.write_text(json.dumps({"weight_map": {"a": "../x.bin"}}))
    assert "plain file name" in sources.find(tmp_path).faults[0]
    index.unlink()
    assert sources.find(tmp_path).faults == [
        f"{first} is one shard of several, and their index {index.name} is missing: download it too"
    ]
