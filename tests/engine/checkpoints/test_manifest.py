"""What `check` says about a native store, from its manifest and headers: no file is hashed."""

import json
from pathlib import Path

import pytest
import torch

from engine.checkpoints import sources, store
from engine.checkpoints.headers import StoreError
from engine.checkpoints.manifest import MANIFEST, read_manifest

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    networks = {part: {"a.weight": torch.ones(64, 64)} for part in ("dit", "text_encoder", "vae")}
    statistics = {"mean": torch.zeros(4), "std": torch.ones(4)}
    store.save(tmp_path, {**networks, "statistics": statistics}, low_bit=set(), extra={"tokenizer.json": "{}"})
    return tmp_path


def test_a_whole_store_lacks_nothing(folder: Path) -> None:
    found = sources.find(folder)
    assert not found.faults and not found.lacking()
    _, files = read_manifest(folder)
    assert list(files["dit.safetensors"].entries) == ["dit.a.weight"] and not files["tokenizer.json"].entries


def test_every_damage_is_named_at_once(folder: Path) -> None:
    (folder / "text_encoder.safetensors").write_text(POINTER)
    (folder / "tokenizer.json").write_text(POINTER)
    vae = folder / "vae.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1])
    (folder / "statistics.safetensors").unlink()
    with (folder / "dit.safetensors").open("r+b") as file:  # the header stays
        file.seek(-64 * 64 * 2, 2)
        file.write(bytes(64 * 64 * 2))
    found = sources.find(folder)
    text = "; ".join(found.faults)
    for name, fault in (
        ("text_encoder.safetensors", "is a Git LFS pointer"),
        ("tokenizer.json", "is a Git LFS pointer"),
        ("vae.safetensors", "is truncated"),
        ("statistics.safetensors", "is missing"),
        ("dit.safetensors", "holds zeros instead of weights"),
    ):
        assert f"{folder / name} {fault}" in text
    assert len(found.faults) == 5
    assert found.lacking() == ["text_encoder", "statistics", "tokenizer.json"]
    with pytest.raises(StoreError, match="git lfs pull"):
        store.open_store(folder)


def test_what_was_never_converted_is_lacking(folder: Path) -> None:
    path = folder / MANIFEST
    files = json.loads(path.read_text())["files"]
    path.write_text(json.dumps({"files": {"dit.safetensors": files["dit.safetensors"]}}))
    assert sources.find(folder).lacking() == ["text_encoder", "vae or light_vae", "statistics", "tokenizer.json"]
    path.write_text(POINTER)
    with pytest.raises(StoreError, match=r"manifest\.json is a Git LFS pointer"):
        sources.find(folder)
