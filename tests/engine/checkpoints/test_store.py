import json
from pathlib import Path

import pytest
import torch

from engine.checkpoints import store


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    parts = {
        "dit": {"a.weight": torch.randn(8, 16), "a.bias": torch.randn(8), "conv.weight": torch.randn(4, 3, 1, 2, 2)},
        "light_vae": {"c.weight": torch.randn(4, 4, 3, 3)},
    }
    store.save(tmp_path / "w", parts, low_bit={"dit"}, extra={"tokenizer.json": "{}"})
    return tmp_path / "w"


def test_low_bit_round_trip(folder: Path) -> None:
    torch.manual_seed(0)
    weight, bias, conv = torch.randn(8, 16), torch.randn(8), torch.randn(4, 3, 1, 2, 2)
    tensors = store.load(folder)
    assert set(tensors) == {"dit.a.weight", "dit.a.bias", "dit.conv.weight", "light_vae.c.weight"}
    assert torch.equal(tensors["dit.a.bias"], bias)
    for name, value in (("dit.a.weight", weight), ("dit.conv.weight", conv)):
        step = value.abs().flatten(1).amax(dim=1).reshape(-1, *[1] * (value.ndim - 1)) / 127
        assert ((tensors[name] - value).abs() <= step / 2 + 1e-6).all()
    assert tensors["light_vae.c.weight"].dtype == torch.bfloat16


def test_missing_truncated_and_altered_files_are_all_named(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    light = folder / "light_vae.safetensors"
    light.write_bytes(light.read_bytes()[:-1])
    dit = folder / "dit.safetensors"
    data = bytearray(dit.read_bytes())
    data[-1] ^= 1
    dit.write_bytes(data)
    with pytest.raises(store.StoreError) as error:
        store.load(folder)
    text = str(error.value)
    assert "tokenizer.json is missing" in text
    assert "light_vae.safetensors is truncated" in text
    assert "dit.safetensors is altered" in text


def test_a_folder_without_a_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(store.StoreError, match=r"manifest\.json is missing"):
        store.verify(tmp_path)
    (tmp_path / "manifest.json").write_text("[]")
    with pytest.raises(store.StoreError, match="not a manifest"):
        store.verify(tmp_path)


def test_a_manifest_cannot_point_outside(folder: Path) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["../secret"] = {"bytes": 1, "sha256": ""}
    path.write_text(json.dumps(manifest))
    with pytest.raises(store.StoreError, match="plain file"):
        store.verify(folder)


def test_a_link_is_refused(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "elsewhere"
    light = folder / "light_vae.safetensors"
    target.write_bytes(light.read_bytes())
    light.unlink()
    light.symlink_to(target)
    with pytest.raises(store.StoreError, match="plain file"):
        store.verify(folder)
